"""What an intermediary says of itself and of its client, where settings ask for it: X-Forwarded-*, and Via (RFC 9110, 7.6.3).

The service adds neither (service reference, 3.5), so both are off. With `edge.forwarded` applications are told the client's address, scheme
and host, and can rely on that: whatever a client sends in these fields, or in Forwarded (RFC 7239), is taken away.
"""

from __future__ import annotations

import asyncio
from typing import Final

from gateway.config import Edge

from ..records.record import peer_of
from ..wire.http1_head import split_block

_FORWARDED: Final = b"forwarded"
_PREFIX: Final = b"x-forwarded-"


class Forwarding:
    """Writes a worker's Via and X-Forwarded-* fields. `is_on` is false where settings ask for neither, and nothing else is called then."""

    __slots__ = ("_is_forwarded", "is_on", "via")

    def __init__(self, settings: Edge) -> None:
        self._is_forwarded = settings.forwarded
        self.via = settings.via.encode("ascii")  # our pseudonym; empty: no Via is added
        self.is_on = settings.forwarded or bool(self.via)

    def of_block(self, block: bytes, version: bytes) -> bytes:
        """A request's field block as it goes on; `version` is the one it was received in. It depends on nothing else, so that it
        may be remembered."""
        added = b""
        if self._is_forwarded:
            kept = []
            for line in block.split(b"\r\n")[1:]:
                name = line.partition(b":")[0].lower().replace(b"_", b"-")  # which CGI and WSGI do not tell apart
                if name != _FORWARDED and not name.startswith(_PREFIX):
                    kept.append(b"\r\n" + line)
            block = b"".join(kept)
            hosts = [value for name, value in split_block(block) if name == b"host"]
            if hosts:
                added = b"\r\nX-Forwarded-Host: " + hosts[0]
        return block + added + self.via_line(version)

    def of_connection(self, transport: asyncio.BaseTransport) -> bytes:
        """Field lines that are the same for all requests of a client's connection."""
        if not self._is_forwarded:
            return b""
        scheme = b"https" if transport.get_extra_info("ssl_object") is not None else b"http"
        return b"\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: %b" % (peer_of(transport).encode("ascii"), scheme)

    def via_line(self, version: bytes) -> bytes:
        """Our own entry, behind those of the intermediaries before us; empty where none is added."""
        return b"\r\nVia: %b %b" % (version, self.via) if self.via else b""
