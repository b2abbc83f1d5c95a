"""Frames between processes: calls, errors, descriptors, lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
from pathlib import Path

import msgspec
import pytest
from waiting import turns, until

from gateway import rpc
from gateway.rpc import Client, Connection, Reply, RpcError, RpcLost, Server, Service, connect


class Ref(msgspec.Struct):
    session: str
    incarnation: int


class Trouble(Exception):
    pass


class Target:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.taken = 0
        self.is_slow = asyncio.Event()

    async def rpc_echo(self, connection: Connection, body: Ref) -> Ref:
        return Ref(body.session * 2, body.incarnation)

    async def rpc_slow(self, connection: Connection, body: None) -> None:
        self.is_slow.set()
        await asyncio.Event().wait()

    async def rpc_stuck(self, connection: Connection, body: None) -> None:
        await asyncio.Event().wait()

    async def rpc_refuse(self, connection: Connection, body: str) -> None:
        raise RpcError("NotFound", body)

    async def rpc_take(self, connection: Connection, body: None, descriptors: list[int]) -> None:
        self.taken += len(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

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
    assert await connection.call("echo", Ref("ab", 3), Ref) == Ref("abab", 3)
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
    answers = await asyncio.gather(*(connection.call("echo", Ref(name, 1), Ref) for name in names))
    assert [answer.session for answer in answers] == [name * 2 for name in names]
    connection.close()


async def test_descriptors_travel_and_are_closed_here(server: Server, tmp_path: Path) -> None:
    before = descriptors_open()
    connection = await connect(tmp_path / "s")
    for _ in range(20):
        _, descriptors = await connection.call_with_descriptors("pipe")
        assert os.read(descriptors[0], 10) == b"hello"
        os.close(descriptors[0])
    connection.close()
    async with asyncio.timeout(5):
        await asyncio.wait([one.closed for one in server.connections])
    assert descriptors_open() <= before


async def test_silence_and_loss(server: Server, target: Target, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    with pytest.raises(RpcLost, match="no answer"):
        await connection.call("slow", timeout=0.01)
    target.is_slow.clear()
    waiting = asyncio.create_task(connection.call("slow"))
    await target.is_slow.wait()
    server.close()
    with pytest.raises(RpcLost):
        await waiting
    with pytest.raises(RpcLost):
        await connection.call("echo", Ref("a", 1))
    server._socket, server._loop = socket.socket(), asyncio.get_running_loop()


async def test_the_caller_of_a_handler_that_is_cancelled_is_told_at_once(server: Server, target: Target, tmp_path: Path) -> None:
    """Whether it was carried out nobody can say, as with a lost connection; the connection goes on."""
    connection = await connect(tmp_path / "s")
    waiting = asyncio.create_task(connection.call("slow", timeout=60.0))
    await target.is_slow.wait()
    (served,) = server.connections
    for task in list(served._tasks):
        task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(RpcLost, match="slow was called off"):
            await waiting
        assert await connection.call("echo", Ref("a", 1), Ref) == Ref("aa", 1)
    connection.close()


async def test_a_peer_that_does_not_read_is_cut_off(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an edge that is stopped: what is told to it once made control grow without a bound."""
    monkeypatch.setattr(rpc, "_UNSENT_MAX_BYTES", 4 << 20)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tmp_path / "s"))
    await until(lambda: server.connections)
    (served,) = server.connections
    for _ in range(100):
        served.notify("told", b"x" * 100_000)
    assert served.closed.done() and sum(len(data) for data, _ in served._out) < 5 << 20
    await until(lambda: not server.connections)
    sock.close()


async def test_what_was_sent_counts_no_longer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_UNSENT_MAX_BYTES", 4 << 20)
    connection = await connect(tmp_path / "s")
    for number in range(200):
        assert (await connection.call("echo", Ref("x" * 100_000, number), Ref)).incarnation == number
    assert connection._unsent == 0
    connection.close()


async def test_other_users_are_refused(target: Target, tmp_path: Path) -> None:
    server = Server(tmp_path / "t", Service(target), {os.getuid() + 1})
    connection = await connect(tmp_path / "t")
    with pytest.raises(RpcLost):
        await connection.call("echo", Ref("a", 1))
    server.close()


async def test_client_connects_again_and_says_hello_first(target: Target, tmp_path: Path) -> None:
    hellos = []

    async def hello(connection: Connection) -> None:
        hellos.append(await connection.call("echo", Ref("x", 0), Ref))

    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    client = Client(tmp_path / "u", on_connect=hello)
    await client.call("echo", Ref("a", 1), Ref)
    assert client.connection is not None
    server.close()
    await asyncio.wait([client.connection.closed])
    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    assert (await client.call("echo", Ref("b", 1), Ref)).session == "bb"
    assert len(hellos) == 2
    client.notify("note", "n")
    await client.call("echo", Ref("a", 1))
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


def descriptors_open() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_connection_whose_greeting_failed_is_closed(target: Target, tmp_path: Path) -> None:
    """Both ends: otherwise each try costs two descriptors, and its peer counts it as connected."""
    tries, third = 0, asyncio.Event()

    async def hello(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("the answer was not what was expected")
        if tries == 2:
            await connection.call("fail", "refused")
        third.set()

    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    client = Client(tmp_path / "u", on_connect=hello)
    async with asyncio.timeout(5):
        await third.wait()
    assert await client.call("echo", Ref("a", 1), Ref) == Ref("aa", 1)
    assert len(server.connections) == 1
    client.close()
    server.close()


@pytest.mark.parametrize("is_up", [True, False])
async def test_a_client_that_is_closed_leaves_no_descriptor(target: Target, tmp_path: Path, is_up: bool) -> None:
    greeted = asyncio.Event()

    async def hello(connection: Connection) -> None:
        greeted.set()
        if not is_up:
            await connection.call("slow")

    before = descriptors_open()
    server = Server(tmp_path / "u", Service(target), {os.getuid()})
    client = Client(tmp_path / "u", on_connect=hello)
    async with asyncio.timeout(5):
        await greeted.wait()
    await turns()
    client.close()
    server.close()
    await turns()
    assert descriptors_open() == before


async def test_a_refusal_keeps_the_kind_that_its_handler_gave_it(server: Server, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    with pytest.raises(RpcError) as failed:
        await connection.call("refuse", "not here")
    assert (failed.value.kind, str(failed.value)) == ("NotFound", "not here")
    connection.close()


async def test_an_answer_of_another_type_is_an_rpc_error(server: Server, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    with pytest.raises(RpcError) as failed:
        await connection.call("echo", Ref("a", 1), int)
    assert failed.value.kind == "ValidationError"
    connection.close()


async def test_a_call_waits_for_its_connection_and_its_answer_within_one_timeout(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []
    start = Connection.start_call

    def noted(self: Connection, method: str, body: object = None, kind: object = None, timeout: float = 10.0, *rest: object) -> object:
        left.append(timeout)
        return start(self, method, body, kind, timeout, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Connection, "start_call", noted)
    loop = asyncio.get_running_loop()
    client = Client(tmp_path / "late")
    call = asyncio.create_task(client.call("echo", Ref("a", 1), Ref, timeout=5.0))
    await turns()
    began = loop.time()
    await asyncio.sleep(0.02)  # the server comes late
    server = Server(tmp_path / "late", Service(target), {os.getuid()})
    late = loop.time() - began
    await call
    assert left[0] <= 5.0 - late
    client.close()
    server.close()


async def test_descriptors_that_go_with_a_call_are_closed_once_sent(server: Server, target: Target, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    await connection.call("echo", Ref("a", 1))
    before = descriptors_open()
    for _ in range(5):
        reading, writing = os.pipe()
        await connection.call("take", descriptors=[reading, writing])
    assert target.taken == 10 and descriptors_open() == before
    connection.close()


@pytest.mark.parametrize("method", ["echo", "none"])
async def test_descriptors_that_nobody_asked_for_are_closed(server: Server, tmp_path: Path, method: str) -> None:
    connection = await connect(tmp_path / "s")
    await connection.call("echo", Ref("a", 1))
    before = descriptors_open()
    for _ in range(5):
        with contextlib.suppress(RpcError):
            await connection.call(method, Ref("a", 1), descriptors=[os.dup(0)])
        await connection.call("pipe")
    assert descriptors_open() == before
    connection.close()


def frame(*fields: object) -> bytes:
    payload = msgspec.msgpack.encode(list(fields))
    return struct.pack("<I", len(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [
        frame(0, 1, "take", 3, None),  # names descriptors that did not come
        frame(0, 1, "take", -1, None),
        frame(0, 1),
        frame(2, 1, "", 0, 7) + frame(0, "x", 0, 0, None),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    ],
)
async def test_a_frame_that_cannot_be_read_ends_its_connection(server: Server, tmp_path: Path, data: bytes) -> None:
    before = descriptors_open()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tmp_path / "s"))
    sock.setblocking(False)
    socket.send_fds(sock, [data], [0])
    async with asyncio.timeout(5):
        assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""
    sock.close()
    await turns()
    assert descriptors_open() == before and not server.connections


async def test_descriptors_that_the_kernel_cut_off_fail_the_call_they_came_with(
    server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MSG_CTRUNC: a process that may have no more of them. Once the connection ended, and with it every call of all tenants."""
    monkeypatch.setattr(rpc, "_FDS_MAX", 2)
    connection = await connect(tmp_path / "s")
    await connection.call("take", descriptors=[os.dup(0)])
    before = descriptors_open()
    calls = [connection.call("take", descriptors=[os.dup(0)]) for _ in range(2)]
    with pytest.raises(RpcError, match="take: no descriptor is left") as caught:
        await connection.call("take", descriptors=[os.dup(0) for _ in range(8)])
    assert caught.value.kind == "Unavailable"
    await asyncio.gather(*calls)
    await connection.call("take", descriptors=[os.dup(0)])
    await turns()
    assert target.taken == 4 and descriptors_open() == before and not connection.closed.done()
    connection.close()


async def test_an_answer_whose_descriptors_were_cut_off_may_be_asked_for_again(server: Server, tmp_path: Path) -> None:
    """At the real limit: the process may have no more descriptors, for one moment."""
    connection = await connect(tmp_path / "s")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    call = asyncio.ensure_future(connection.call_with_descriptors("pipe"))
    receive = connection._receive

    def at_the_limit() -> bytes:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
        try:
            return receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    connection._receive = at_the_limit  # type: ignore[method-assign]
    with pytest.raises(RpcLost, match="no descriptor is left"):
        await call
    connection._receive = receive  # type: ignore[method-assign]
    _, (descriptor,) = await connection.call_with_descriptors("pipe")
    assert os.read(descriptor, 10) == b"hello"
    os.close(descriptor)
    connection.close()


async def test_who_cannot_be_accepted_is_tried_again_without_a_spin(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener without a descriptor for whom it accepts is readable all the while: the loop once turned for nothing else."""
    monkeypatch.setattr(rpc, "_ACCEPT_SECONDS", 0.02)
    accept, tries = server._socket.accept, []

    class Short:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def accept(self) -> object:
            tries.append(1)
            if len(tries) <= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return accept()

    real = server._socket
    server._socket = Short()  # type: ignore[assignment]
    connection = await connect(tmp_path / "s")
    assert (await connection.call("echo", Ref("a", 1), Ref)).session == "aa"
    assert len(tries) == 4
    connection.close()


async def test_a_handler_that_stands_is_reported_with_where_it_does(
    server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_STANDS_SECONDS", 0.02)
    said: list[dict[str, object]] = []
    monkeypatch.setattr(rpc.log, "error", lambda event, **fields: said.append({"event": event, **fields}))
    connection = await connect(tmp_path / "s")
    call = asyncio.ensure_future(connection.call("slow", timeout=0.01))
    await until(lambda: said)
    assert said[0]["event"] == "rpc.stands" and said[0]["method"] == "slow"
    assert any("Target.rpc_slow" in line for line in said[0]["where"])  # type: ignore[attr-defined]
    call.cancel()
    connection.close()
    await asyncio.gather(call, return_exceptions=True)


async def test_a_handler_whose_caller_waits_for_it_is_not_reported(
    server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build takes as long as it takes."""
    monkeypatch.setattr(rpc, "_STANDS_SECONDS", 0.02)
    said: list[str] = []
    monkeypatch.setattr(rpc.log, "error", lambda event, **fields: said.append(fields["method"]))
    connection = await connect(tmp_path / "s")
    waited_for = asyncio.ensure_future(connection.call("slow", timeout=60))
    await target.is_slow.wait()
    given_up = asyncio.ensure_future(connection.call("stuck", timeout=0.01))
    await until(lambda: said)
    assert said == ["stuck"], "the other one's time would have been over before"
    waited_for.cancel()
    connection.close()
    await asyncio.gather(waited_for, given_up, return_exceptions=True)


async def test_requests_and_answers_of_one_connection_keep_their_order(tmp_path: Path) -> None:
    """What follows an answer is begun after whoever waited for that answer has gone on: a route change after a table, say."""
    order: list[str] = []

    class Speaker:
        async def rpc_hello(self, connection: Connection, body: None) -> str:
            asyncio.get_running_loop().call_soon(lambda: [connection.notify("note", number) for number in range(3)])
            return "table"

    class Listener:
        async def rpc_note(self, connection: Connection, body: int) -> None:
            order.append(f"note {body}")

    async def hello(connection: Connection) -> None:
        order.append(await connection.call("hello", None, str))
        greeted.set()

    server, greeted = Server(tmp_path / "u", Service(Speaker()), {os.getuid()}), asyncio.Event()
    client = Client(tmp_path / "u", Service(Listener()), hello)
    await until(lambda: len(order) == 4)
    assert order == ["table", "note 0", "note 1", "note 2"]
    client.close()
    server.close()


async def test_a_call_is_sent_when_it_is_made_not_when_it_is_waited_for(server: Server, target: Target, tmp_path: Path) -> None:
    connection = await connect(tmp_path / "s")
    answer = connection.start_call("echo", Ref("a", 1), Ref)
    connection.notify("note", "after")
    assert await answer == (Ref("aa", 1), [])
    connection.close()
    with pytest.raises(RpcLost):
        await connection.start_call("echo", Ref("a", 1), Ref)
