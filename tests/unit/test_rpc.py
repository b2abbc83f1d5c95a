"""Frames between processes: calls, errors, descriptors, lost connections."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from gateway.messages import SessionRef
from gateway.rpc import Client, Connection, Reply, RpcError, RpcLost, Server, Service, connect


class Trouble(Exception):
    pass


class Target:
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def rpc_echo(self, connection: Connection, body: SessionRef) -> SessionRef:
        return SessionRef(body.session * 2, body.incarnation)

    async def rpc_slow(self, connection: Connection, body: None) -> None:
        await asyncio.sleep(60)

    async def rpc_fail(self, connection: Connection, body: str) -> None:
        raise Trouble(body)

    async def rpc_pipe(self, connection: Connection, body: None) -> Reply:
        reading, writing = os.pipe()
        os.write(writing, b"hello")
        os.close(writing)
        return Reply(None, [reading])

    async def rpc_note(self, connection: Connection, body: str) -> None:
        self.heard.append(body)

    async def not_offered(self, connection: Connection, body: None) -> None:
        raise AssertionError


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def server(target: Target, tmp_path: Path):  # type: ignore[no-untyped-def]
    one = Server(tmp_path / "s", Service(target), {os.getuid()})
    yield one
    one.close()


async def test_call_and_error(server: Server, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    assert await connection.call("echo", SessionRef("ab", 3), SessionRef) == SessionRef("abab", 3)
    with pytest.raises(RpcError, match="what") as failed:
        await connection.call("fail", "what")
    assert failed.value.kind == "Trouble"
    for method in ("not_offered", "none"):
        with pytest.raises(RpcError):
            await connection.call(method)
    with pytest.raises(RpcError) as mistyped:
        await connection.call("echo", [1, 2, 3])
    assert mistyped.value.kind == "ValidationError"
    connection.close()


async def test_large_frames_and_many_at_once(server: Server, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    names = [f"{number}" * 50_000 for number in range(30)]
    answers = await asyncio.gather(*(connection.call("echo", SessionRef(name, 1), SessionRef) for name in names))
    assert [answer.session for answer in answers] == [name * 2 for name in names]
    connection.close()


async def test_descriptors_travel_and_are_closed_here(server: Server, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    connection = await connect(tmp_path / "s")
    for _ in range(20):
        _, descriptors = await connection.call_with_descriptors("pipe")
        assert os.read(descriptors[0], 10) == b"hello"
        os.close(descriptors[0])
    connection.close()
    await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


async def test_silence_and_loss(server: Server, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    with pytest.raises(RpcLost, match="no answer"):
        await connection.call("slow", timeout=0.01)
    waiting = asyncio.create_task(connection.call("slow"))
    await asyncio.sleep(0.01)
    server.close()
    with pytest.raises(RpcLost):
        await waiting
    with pytest.raises(RpcLost):
        await connection.call("echo", SessionRef("a", 1))
    server._socket, server._loop = socket.socket(), asyncio.get_running_loop()


async def test_other_users_are_refused(target: Target, tmp_path: Path) -> None:
    server = Server(tmp_path / "t", Service(target), {os.getuid() + 1})
    connection = await connect(tmp_path / "t")
    with pytest.raises(RpcLost):
        await connection.call("echo", SessionRef("a", 1))
    server.close()


async def test_client_connects_again_and_says_hello_first(target: Target, tmp_path: Path) -> None:
    hellos = []

    async def hello(connection: Connection) -> None:
        hellos.append(await connection.call("echo", SessionRef("x", 0), SessionRef))

    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    client = Client(tmp_path / "u", on_connect=hello)
    await client.call("echo", SessionRef("a", 1), SessionRef)
    server.close()
    await asyncio.sleep(0.001)
    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    assert (await client.call("echo", SessionRef("b", 1), SessionRef)).session == "bb"
    assert len(hellos) == 2
    client.notify("note", "n")
    await client.call("echo", SessionRef("a", 1))
    assert target.heard == ["n"]
    client.close()
    server.close()


async def test_a_frame_that_is_too_long_ends_the_connection(server: Server, tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tmp_path / "s"))
    sock.sendall(b"\xff\xff\xff\xff")
    sock.setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""
    sock.close()
