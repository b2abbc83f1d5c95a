"""Connecting a socket to an address that needs no resolving: the loop's own call hands numbers to a thread, which costs as much as
the connect."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
from typing import cast

_OUTQ = struct.Struct("i")


async def dial(sock: socket.socket, address: tuple[str, int]) -> None:
    """Connects a socket that does not block (connect(2)). Raises OSError."""
    number = sock.connect_ex(address)
    if number == errno.EINPROGRESS:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        loop.add_writer(sock.fileno(), _set, done)
        try:
            await done
        finally:
            loop.remove_writer(sock.fileno())
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


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
