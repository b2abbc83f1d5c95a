"""What a client of plain HTTP/1 names: the Host of its first request (RFC 9112, 3.2). No I/O.

As strict as gateway/guest/client_hello.py: a request whose host two servers might see differently is refused.
"""

from __future__ import annotations

import re

from .client_hello import Malformed, host_name

_HEAD_BYTES = 16 << 10
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # a character of one (RFC 9110, 5.6.2)
_METHOD = re.compile(_TOKEN + rb"*")
_REQUEST = re.compile(_TOKEN + rb"{1,32} ([!-~]+) HTTP/1\.[01]")
_FIELD = re.compile(rb"(" + _TOKEN + rb"+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_AUTHORITY = re.compile(rb"http://([^/?#@]+)(?:[/?#].*)?", re.IGNORECASE)


class HostReader:
    """Of one connection: `feed` takes its first bytes, in whatever pieces they come."""

    def __init__(self) -> None:
        self._in = bytearray()

    def feed(self, data: bytes) -> str | None:
        """Returns the host's name in lower case, once the whole head is there. Raises Malformed."""
        self._in += data
        end = self._in.find(b"\r\n\r\n")
        if end > _HEAD_BYTES or (end < 0 and len(self._in) > _HEAD_BYTES):
            raise Malformed("a head that is too long")
        if end < 0:
            first = self._in[:32].split(b" ", 1)[0]
            if not _METHOD.fullmatch(first):
                raise Malformed("no HTTP/1 request")
            return None
        return _host(bytes(self._in[:end]))


def _host(head: bytes) -> str:
    request, *lines = head.split(b"\r\n")
    match = _REQUEST.fullmatch(request)
    if match is None:
        raise Malformed("no HTTP/1 request")
    hosts = []
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise Malformed("a field that is none")
        if field[1].lower() == b"host":
            hosts.append(_without_port(field[2].rstrip(b" \t")))
    if len(hosts) != 1:
        raise Malformed("not one Host" if hosts else "no Host")
    target = match[1]
    if not target.startswith(b"/") and target != b"*":
        authority = _AUTHORITY.fullmatch(target)
        if authority is None or _without_port(authority[1]) != hosts[0]:
            raise Malformed("a target that is another host's")
    return hosts[0]


def _without_port(text: bytes) -> str:
    name, colon, port = text.partition(b":")
    if colon and not (port.isdigit() and len(port) <= 5):
        raise Malformed("no port in Host")
    return host_name(name)
