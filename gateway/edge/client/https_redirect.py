"""The redirect from plain HTTP to HTTPS, for a listener without TLS."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from ..policy.replies import date_line

_CLOSE_SECONDS = 5.0  # a connection is closed then, whatever has come on it
_REQUEST_HEAD_MAX_BYTES = 16384
_LOCATION = re.compile(rb"[A-Z]+ (/[\x21-\x7e]*) HTTP/1\.[01]\r\n")
_HOST = re.compile(rb"\r\nhost:[ \t]*([A-Za-z0-9.-]+)(?::[0-9]+)?[ \t]*\r\n", re.I)


class HttpsRedirect(asyncio.Protocol):
    """Answers one request with the same URI over HTTPS, then closes. The status is 308, with which a client keeps the method and the
    content (RFC 9110, 15.4.9)."""

    def __init__(self, port: int) -> None:
        self._suffix = b"" if port == 443 else b":%d" % port
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._transport.close)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._buffer += data
        if b"\r\n\r\n" in self._buffer or len(self._buffer) > _REQUEST_HEAD_MAX_BYTES:
            transport.write(redirect(self._buffer, self._suffix))
            transport.close()


def redirect(head: bytes, suffix: bytes) -> bytes:
    line, host = _LOCATION.match(head), _HOST.search(head)
    status = b"400 Bad Request"
    if line is not None and host is not None:
        status = b"308 Permanent Redirect\r\nLocation: https://%b%b%b" % (host[1], suffix, line[1])
    return b"HTTP/1.1 %b%b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, date_line())
