"""Connecting without the loop's resolver: what connect(2) says is what is raised."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gateway import reach as module
from gateway.edge.origin.dial import UnclaimedConnection
from gateway.reach import dial, reach


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


class Taken:
    """Gives sockets of both families, as vmm does, and remembers them."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET6) -> None:
        self.family, self.given = family, list[socket.socket]()

    async def __call__(self) -> socket.socket:
        self.given.append(socket.socket(self.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        return self.given[-1]

    @property
    def open(self) -> int:
        return sum(one.fileno() >= 0 for one in self.given)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GUEST_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(module, "GUEST_ADDRESS6", "::1")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_listener_of_either_loopback_address_is_reached(loopback: None, address: str) -> None:
    take = Taken()
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        sock = await reach(take, server.getsockname()[1])
        assert sock.getpeername()[0].removeprefix("::ffff:") == address
        sock.close()
    assert take.open == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_a_port_without_a_listener_refuses(loopback: None, family: socket.AddressFamily) -> None:
    take = Taken(family)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await reach(take, port)
    assert take.open == 0 and len(take.given) == (2 if family == socket.AF_INET6 else 1)


async def test_a_guest_without_ipv6_refuses_as_ever(loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers no SYN of IPv6: as here a full listen queue."""
    monkeypatch.setattr(module, "_SECOND_SECONDS", 0.05)
    take = Taken()
    with socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=0) as server:
        full = [await take() for _ in range(3)]
        for one in full:
            one.connect_ex(server.getsockname())
        with pytest.raises(ConnectionRefusedError):
            await reach(take, server.getsockname()[1])
        assert take.open == len(full)
        for one in full:
            one.close()


async def test_what_an_application_says_first_waits_for_who_takes_the_connection() -> None:
    """HTTP/2 servers speak before they are spoken to."""
    said = asyncio.Queue[bytes]()

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            said.put_nowait(data)

    with socket.create_server(("127.0.0.1", 0)) as server, unconnected() as sock:
        await dial(sock, server.getsockname())
        peer, _ = server.accept()
        with peer:
            transport, unread = await asyncio.get_running_loop().create_connection(UnclaimedConnection, sock=sock)
            peer.sendall(b"SETTINGS")
            async with asyncio.timeout(2):
                while transport.is_reading():
                    await asyncio.sleep(0)
                unread.hand_over(Reader())
                peer.sendall(b"more")
                assert await said.get() + await said.get() == b"SETTINGSmore"
            transport.abort()
