"""The edge makes some answers itself (service reference, 3.4), in plain text without an envelope, never stored; and it gives all a Date."""

from __future__ import annotations

from email.utils import formatdate
from time import time
from typing import Final

from ..wire.http2_frames import encode
from .admission import Refuse

_REASONS: Final = {
    200: b"OK", 400: b"Bad Request", 403: b"Forbidden", 408: b"Request Timeout", 426: b"Upgrade Required", 429: b"Too Many Requests",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 501: b"Not Implemented", 502: b"Bad Gateway",
}  # fmt: skip

UNAVAILABLE = Refuse(502)
NOT_IN_TIME = Refuse(502, reason="the MicroVM could not take the request in time")
NOT_KNOWN_NOW = Refuse(502, reason="this worker does not know the host, and control does not answer")
FAILED = Refuse(500)  # by a fault of our own
TOO_MANY = Refuse(429, b"Too many requests are waiting for this MicroVM")
LIMITED = Refuse(429, b"The rate limit of this MicroVM is exceeded")


class _Date:
    """Writes the Date of this second (RFC 9110, 5.6.7) once in each form that an answer takes."""

    __slots__ = ("block", "line", "second", "text")

    def __init__(self) -> None:
        self.second = -1
        self.text = b""
        self.line = b""  # of HTTP/1.1
        self.block = b""  # of HTTP/2: a literal field line, which no table changes (RFC 7541, 6.2.2)

    def now(self) -> _Date:
        second = int(time())
        if second != self.second:
            self.second, self.text = second, formatdate(second, usegmt=True).encode("ascii")
            self.line, self.block = b"\r\nDate: " + self.text, encode([(b"date", self.text)])
        return self


_date: Final = _Date()


def date_line() -> bytes:
    """Returns the Date that a response of HTTP/1.1 without one is given on its way (RFC 9110, 6.6.1)."""
    return _date.now().line


def date_block() -> bytes:
    """Returns the same for a response of HTTP/2."""
    return _date.now().block


def fields(refusal: Refuse) -> list[tuple[bytes, bytes]]:
    """Returns a refusal's fields besides the request's id and those of the connection."""
    found = [(b"date", _date.now().text), (b"cache-control", b"private, no-store"), (b"content-length", b"%d" % len(refusal.body))]
    if refusal.body:
        found.append((b"content-type", b"text/plain"))
    if refusal.status == 429 or refusal is NOT_IN_TIME or refusal is NOT_KNOWN_NOW:  # what passes: nothing of the MicroVM is lost
        found.append((b"retry-after", b"1"))
    if refusal.status == 426:
        found.append((b"sec-websocket-version", b"13"))  # RFC 6455, 4.4
    return found


def make(refusal: Refuse, request_id: bytes, keep_alive: bool, head_only: bool, minor: int = 1) -> bytes:
    """Returns the whole response in HTTP/1.1, to a request of HTTP/1.x with `minor` for x."""
    head = [b"HTTP/1.1 %d %b\r\nx-amzn-requestid: %b" % (refusal.status, _REASONS.get(refusal.status, b"Error"), request_id)]
    head += [b"%b: %b" % field_line for field_line in fields(refusal)]
    options = [] if keep_alive and minor else [b"keep-alive" if keep_alive else b"close"]
    if refusal.status == 426:
        head.append(b"Upgrade: websocket")  # RFC 9110, 15.5.22
        options.append(b"upgrade")
    if options:
        head.append(b"Connection: " + b", ".join(options))
    return b"\r\n".join(head) + b"\r\n\r\n" + (b"" if head_only else refusal.body)
