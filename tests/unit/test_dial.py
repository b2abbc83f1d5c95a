"""Connecting without the loop's resolver: what connect(2) says is what is raised."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gateway.edge.dial import dial


def unconnected() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


async def test_connects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, unconnected() as sock:
        await dial(sock, server.getsockname())
        assert sock.getpeername() == server.getsockname()


async def test_a_refusal_is_raised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with unconnected() as sock, pytest.raises(ConnectionRefusedError):
        await dial(sock, address)


def test_a_deadline_leaves_nothing_watched() -> None:
    """A full listen queue answers no SYN. On the standard library's loop, which says whether there was something to remove."""

    async def dialled(address: tuple[str, int]) -> bool:
        with unconnected() as sock:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await dial(sock, address)
            return asyncio.get_running_loop().remove_writer(sock.fileno())

    with socket.socket() as server, asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        full = [unconnected() for _ in range(3)]
        for one in full:
            one.connect_ex(server.getsockname())
        assert runner.run(dialled(server.getsockname())) is False
        for one in full:
            one.close()
