"""Answers that the edge makes itself (service reference, 3.4): plain text, no envelope, never stored."""

from __future__ import annotations

from .admission import Refuse

_REASONS = {
    400: b"Bad Request", 403: b"Forbidden", 408: b"Request Timeout", 429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
    500: b"Internal Server Error", 501: b"Not Implemented", 502: b"Bad Gateway",
}  # fmt: skip

UNAVAILABLE = Refuse(502)
TOO_MANY = Refuse(429, b"Too many requests are waiting for this MicroVM")


def make(refusal: Refuse, request_id: bytes, keep_alive: bool, head_only: bool) -> bytes:
    """The whole response."""
    fields = b"\r\nx-amzn-requestid: %b\r\ncache-control: private, no-store\r\nContent-Length: %d" % (request_id, len(refusal.body))
    if refusal.body:
        fields += b"\r\nContent-Type: text/plain"
    if refusal.status == 429:
        fields += b"\r\nRetry-After: 1"
    if not keep_alive:
        fields += b"\r\nConnection: close"
    body = b"" if head_only else refusal.body
    return b"HTTP/1.1 %d %b%b\r\n\r\n%b" % (refusal.status, _REASONS.get(refusal.status, b"Error"), fields, body)
