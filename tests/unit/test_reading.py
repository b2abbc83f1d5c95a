"""Whoever pauses a connection's reading resumes it: a connection that goes back to its pool is read, whatever its last exchange did."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, OK, Rig, response
from h2_client import Judge, fields
from waiting import until

from gateway.edge.client.http2 import Request
from gateway.edge.policy import replies
from gateway.edge.reading import HELD, PEER_SLOW, THROTTLED, ReadGate


class Transport:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.closing = False

    def pause_reading(self) -> None:
        self.said.append("pause")

    def resume_reading(self) -> None:
        self.said.append("resume")

    def is_closing(self) -> bool:
        return self.closing


def test_a_transport_is_read_when_no_reason_to_pause_is_left() -> None:
    transport = Transport()
    gate = ReadGate(transport)
    gate.pause(THROTTLED)
    gate.pause(PEER_SLOW)
    gate.pause(PEER_SLOW)
    gate.resume(THROTTLED)
    assert transport.said == ["pause"] and gate.is_paused
    gate.resume(HELD)
    assert gate.is_paused, "a reason that does not hold cannot be lifted"
    gate.resume(PEER_SLOW)
    assert transport.said == ["pause", "resume"] and not gate.is_paused
    gate.resume(PEER_SLOW)
    assert transport.said == ["pause", "resume"]


def test_all_reasons_are_lifted_at_once() -> None:
    transport = Transport()
    gate = ReadGate(transport)
    gate.pause(THROTTLED)
    gate.pause(HELD)
    gate.clear()
    gate.clear()
    assert transport.said == ["pause", "resume"] and not gate.reasons


def test_a_transport_that_closes_is_left_alone() -> None:
    transport = Transport()
    gate = ReadGate(transport)
    gate.pause(HELD)
    transport.closing = True
    gate.resume(HELD)
    gate.pause(HELD)
    assert transport.said == ["pause"]


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


def sized(rig: Rig) -> None:
    """The application answers /N with N bytes, for ever."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            size = int((await rig.head(reader)).split(b" ")[1][1:])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            writer.write(b"x" * size)
            await writer.drain()

    rig.script = script


def whole(rig: Rig) -> None:
    """The application answers /N with N bytes in one write, for ever."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            size = int((await rig.head(reader)).split(b" ")[1][1:])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            await writer.drain()

    rig.script = script


def idle_origins_read(rig: Rig) -> bool:
    idle = rig.worker.upstream.idle()
    return bool(idle) and all(one.transport is not None and one.transport.is_reading() for one in idle)


async def test_a_throttled_answer_leaves_its_connection_reading(rig: Rig) -> None:
    await rig.start(limits="custom", workers=1, limit_bytes_per_second=1_000_000)
    sized(rig)
    for size in (1_200_000, 1000, 1000):
        ((status, _, body),) = await rig.ask(rig.request(f"/{size}"))
        assert status == 200 and len(body) == size
    assert idle_origins_read(rig) and rig.connects == 1


async def test_an_answer_to_a_slow_client_leaves_its_connection_reading(rig: Rig) -> None:
    await rig.start()
    sized(rig)
    rig.worker._servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is accepted inherits it
    size = 640_000  # the last piece is beyond what is buffered
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", rig.port))
        await until(lambda: rig.worker.clients)
        (client,) = rig.worker.clients
        # How much the kernel would take by itself depends on what it remembers of earlier connections.
        client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # type: ignore[union-attr]
        await loop.sock_sendall(slow, rig.request(f"/{size}"))
        await until(lambda: rig.worker.upstream.statistics()["open"] == 1)
        await until(lambda: client.transport.get_write_buffer_size() > 1 << 19)  # type: ignore[union-attr]
        left = size
        while left > 0:
            left -= len(await loop.sock_recv(slow, 1 << 20))
    await until(lambda: bool(rig.worker.upstream.idle()))
    assert [status for status, _, _ in await rig.ask(rig.request("/10"))] == [200]
    assert idle_origins_read(rig) and rig.connects == 1


async def test_an_answer_beyond_a_streams_window_leaves_its_connection_reading(rig: Rig) -> None:
    await rig.start(http2=True)
    sized(rig)
    client = Judge(*await rig.open())
    client.auto_credit = False
    fields = [
        (":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/200000"), ("x-aws-proxy-auth", rig.token),
        ("x-aws-proxy-port", str(rig.app_port)),
    ]  # fmt: skip
    first = client.ask(fields)
    while len(client.answers[first].body) < 65535:
        assert await client.turn()
    await until(lambda: bool(rig.worker.upstream.idle()))
    client.h2.increment_flow_control_window(1 << 20)
    client.h2.increment_flow_control_window(1 << 20, first)
    client.flush()
    assert len((await client.answer(first)).body) == 200_000
    client.auto_credit = True
    second = client.ask(fields)
    assert len((await client.answer(second)).body) == 200_000
    assert idle_origins_read(rig) and rig.connects == 1
    client.writer.close()


async def test_an_upload_that_is_answered_early_leaves_its_client_reading(rig: Rig) -> None:
    """The application takes nothing of a large body, answers when some of it is there, and closes."""
    await rig.start()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        (origin,) = rig.worker.upstream.pools()[0].open
        await until(lambda: origin.is_paused)  # the edge's buffer is full
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    rig.script = script
    reader, writer = await rig.open()
    size = 8 << 20
    writer.write(rig.request("/", f"Content-Length: {size}", method="POST") + bytes(size))
    status, fields, _ = await response(reader)
    assert status == 200 and fields["connection"] == "close"
    writer.close()
    await until(lambda: not rig.worker.clients)


async def test_answers_that_come_whole_are_charged_to_the_limit(rig: Rig) -> None:
    """Their client is not read until the bytes a second are there again."""
    await rig.start(limits="custom", workers=1, limit_bytes_per_second=100_000)
    whole(rig)
    reader, writer = await rig.open()
    for _ in range(2):
        writer.write(rig.request("/60000"))
        assert len((await response(reader))[2]) == 60_000
    (client,) = rig.worker.clients
    assert client.transport is not None and not client.transport.is_reading()
    await until(client.transport.is_reading, 5)
    writer.close()


async def test_answers_that_come_whole_wait_for_the_limit_over_http2(rig: Rig) -> None:
    """A stream has no next request that could wait for what its answer has spent: the answer does."""
    await rig.start(http2=True, limits="custom", workers=1, limit_bytes_per_second=150_000)
    whole(rig)
    judge = Judge(*await rig.open())
    started = asyncio.get_running_loop().time()
    numbers = [judge.ask(fields(rig, "/60000")) for _ in range(3)]
    for number in numbers:
        answer = await judge.answer(number)
        assert answer.ended and len(answer.body) == 60_000
    assert asyncio.get_running_loop().time() - started > 0.19  # 180,000 bytes, of which a second's worth is free
    judge.writer.close()


@pytest.fixture
def others_left_out() -> Iterator[None]:
    """Objects that there are before are none of the garbage collector's: to look through those of all tests takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("ends", ["reset", "connection"])
@pytest.mark.usefixtures("others_left_out")
async def test_nothing_of_an_answer_that_waits_for_the_limit_is_kept_for_a_client_that_left(rig: Rig, ends: str) -> None:
    """The limit's debt grows with each answer, and so would what is kept, and for how long."""
    await rig.start(http2=True, limits="custom", workers=1, limit_bytes_per_second=1_024)
    whole(rig)
    judge = Judge(*await rig.open())
    numbers = [judge.ask(fields(rig, "/60000")) for _ in range(3)]
    await until(lambda: all(stream.response_started for stream in requests()) and len(requests()) == 3)
    if ends == "reset":
        for number in numbers:
            judge.h2.reset_stream(number)
        judge.flush()
    else:
        judge.writer.transport.abort()
    await until(lambda: not requests())
    judge.writer.close()


def requests() -> list[Request]:
    gc.collect()
    return [kept for kept in gc.get_objects() if isinstance(kept, Request)]


async def test_a_body_that_comes_before_its_application_is_charged_to_the_limit(rig: Rig) -> None:
    await rig.start(http2=True, limits="custom", workers=1, limit_bytes_per_second=40_000)
    rig.script = rig.echo
    judge = Judge(*await rig.open())
    started = asyncio.get_running_loop().time()
    number = judge.ask([*fields(rig, "/", "POST"), ("content-length", "48000")], bytes(16_000), end=False)
    judge.h2.send_data(number, bytes(16_000))
    judge.h2.send_data(number, bytes(16_000), end_stream=True)
    judge.flush()
    assert len((await judge.answer(number)).body) == 48_000
    assert asyncio.get_running_loop().time() - started > 1.3  # 96,000 bytes
    judge.writer.close()


async def test_what_a_client_says_in_a_tunnel_is_charged_to_the_limit(rig: Rig) -> None:
    await rig.start(limits="custom", workers=1, limit_bytes_per_second=100_000)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        while await reader.read(65536):
            pass

    rig.script = script
    reader, writer = await rig.open()
    writer.write(
        rig.request(
            "/", "Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        )
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    writer.write(b"\x82\xff" + (120_000).to_bytes(8, "big") + bytes(120_004))
    (client,) = rig.worker.clients
    assert client.transport is not None
    await until(lambda: not client.transport.is_reading(), 5)
    await until(client.transport.is_reading, 5)
    writer.close()


async def test_an_exchange_that_is_over_says_nothing_to_the_next_ones_client(rig: Rig) -> None:
    """Timers, shells and cuts may outlive a request: what they call is then nobody's."""
    await rig.start()
    asked, answers = asyncio.Event(), asyncio.Semaphore(0)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await rig.head(reader):
            asked.set()
            await answers.acquire()
            writer.write(OK)

    rig.script = script
    reader, writer = await rig.open()

    async def under_way() -> Any:
        """The exchange of the request that the application has been asked now."""
        writer.write(rig.request())
        await asked.wait()
        asked.clear()
        (client,) = rig.worker.clients
        return client.exchange  # type: ignore[union-attr]

    over = await under_way()
    answers.release()
    assert (await response(reader))[2] == b"ok"
    for call in (
        lambda: over.refuse(replies.UNAVAILABLE), lambda: over.response_data(b"stray"), lambda: over.tunnel_write(b"stray"),
        lambda: over.pause_reading(PEER_SLOW), over.response_done, over.tunnel_over, over.cut_short, over.cut,
    ):  # fmt: skip
        assert await under_way() is not over
        call()
        answers.release()
        assert (await response(reader))[2] == b"ok"
    assert rig.connects == 1
    writer.close()
