"""Answers that the edge makes itself (service reference, 3.4): plain text, no envelope, never stored."""

from __future__ import annotations

from .admission import Refuse

_REASONS = {
    400: b"Bad Request", 403: b"Forbidden", 408: b"Request Timeout", 429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
    500: b"Internal Server Error", 501: b"Not Implemented", 502: b"Bad Gateway",
}  # fmt: skip

UNAVAILABLE = Refuse(502)
TOO_MANY = Refuse(429, b"Too many requests are waiting for this MicroVM")
LIMITED = Refuse(429, b"The rate limit of this MicroVM is exceeded")


def fields(refusal: Refuse) -> list[tuple[bytes, bytes]]:
    """Besides the request's id."""
    found = [(b"cache-control", b"private, no-store"), (b"content-length", b"%d" % len(refusal.body))]
    if refusal.body:
        found.append((b"content-type", b"text/plain"))
    if refusal.status == 429:
        found.append((b"retry-after", b"1"))
    return found


def make(refusal: Refuse, request_id: bytes, keep_alive: bool, head_only: bool) -> bytes:
    """The whole response in HTTP/1.1."""
    head = [b"HTTP/1.1 %d %b\r\nx-amzn-requestid: %b" % (refusal.status, _REASONS.get(refusal.status, b"Error"), request_id)]
    head += [b"%b: %b" % one for one in fields(refusal)]
    if not keep_alive:
        head.append(b"Connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + (b"" if head_only else refusal.body)
