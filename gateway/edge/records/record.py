"""A request that has ended is a record to the counters and the access log."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

_MAPPED: Final = "::ffff:"
PROTOCOLS: Final = ("HTTP/1.1", "HTTP/2")
HTTP1: Final = 0
HTTP2: Final = 1


@dataclass(slots=True)
class RequestRecord:
    """A request that has ended. The exchange makes it once, when it ends, and only where an access log is kept. Times are the loop's, in
    seconds."""

    request_id: bytes
    client: str  # the peer's address
    protocol: int  # HTTP1 or HTTP2
    host: str  # empty, like method and target, where the head could not be read
    method: bytes
    target: bytes
    status: int
    sent: int  # bytes of the response's body
    began: float  # the head was complete
    first_byte: float  # the response's head was sent; 0 where none was
    ended: float
    held: float
    closed_by: str  # client or origin, where the exchange did not end in its usual way
    reason: str  # why the answer is ours, or why the exchange was cut short


def peer_of(transport: asyncio.BaseTransport | None) -> str:
    """Returns the other end's address, without its port. A socket of both families shows an IPv4 address mapped into IPv6 (RFC 4291,
    2.5.5.2), and systemd opens such ones."""
    name = transport.get_extra_info("peername") if transport is not None else None
    address = str(name[0]) if isinstance(name, tuple) else ""
    return address.removeprefix(_MAPPED) if "." in address else address
