"""What a connection to an application is before a protocol has taken it, and what its guest has not acknowledged."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import cast

_OUTQ = struct.Struct("i")


class UnclaimedConnection(asyncio.Protocol):
    """Keeps what comes on a connection that no protocol has taken yet, which a server of HTTP/2 sends first, and pauses reading
    until `hand_over`."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        self.transport.pause_reading()

    def hand_over(self, protocol: asyncio.Protocol) -> None:
        """The connection is `protocol`'s from now on."""
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if self._received:
            self.transport.resume_reading()  # first: what was received may be a reason for `protocol` to pause
            protocol.data_received(self._received)


def unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the guest has not acknowledged (tcp(7), SIOCOUTQ): after a sleep they would wait for a retransmission."""
    sock = transport.get_extra_info("socket")
    return int(_OUTQ.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]) if sock is not None else 0
