"""The way to a port of a guest, from sockets that vmm made in its network: to 127.0.0.1, and where that refuses, to ::1 (vmm/guest/gate.c).

Applications that listen on `localhost` have often only one of the two: Node's, and so Vite's, take ::1.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable

GUEST_ADDRESS = "169.254.77.2"
GUEST_ADDRESS6 = "fd54:5250:52::2"
_SECOND_SECONDS = 1.0  # guests of older images have no IPv6, and never answer


async def reach(take: Callable[[], Awaitable[socket.socket]], port: int) -> socket.socket:
    """Connects a socket that `take` gives, and returns it. Raises what `take` raises, OSError; ConnectionRefusedError where neither address
    has a listener."""
    sock = await take()
    try:
        is_dual = sock.family == socket.AF_INET6
        await dial(sock, (f"::ffff:{GUEST_ADDRESS}" if is_dual else GUEST_ADDRESS, port))
        return sock
    except ConnectionRefusedError as error:
        sock.close()
        refused = error
        if not is_dual:  # the host has no IPv6
            raise
    except BaseException:
        sock.close()
        raise
    return await _reach_second(take, port, refused)


async def _reach_second(take: Callable[[], Awaitable[socket.socket]], port: int, refused: ConnectionRefusedError) -> socket.socket:
    sock = await take()  # a socket that was refused over IPv4 stays one of IPv4
    try:
        async with asyncio.timeout(_SECOND_SECONDS):
            await dial(sock, (GUEST_ADDRESS6, port))
        return sock
    except (OSError, TimeoutError):
        sock.close()
        raise refused from None
    except BaseException:
        sock.close()
        raise


async def dial(sock: socket.socket, address: tuple[str, int]) -> None:
    """Connects a socket that does not block (connect(2)). The loop's own call hands numbers to a thread, as if they had to be resolved,
    which costs as much as the connect. Raises OSError."""
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
