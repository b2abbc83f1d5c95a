"""A client's HTTP/1.1 connection: every wait has an end, every buffer a bound, and every malformed request its answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, OK, Rig, response
from h2_client import Judge
from waiting import until

from gateway import messages as m
from gateway.edge import worker as edge_worker
from gateway.edge.policy.fairness import FairQueue

HIGH = 512 << 10
Start = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts a worker that looks at its connections twenty times a second."""
    monkeypatch.setattr(edge_worker, "_SWEEP_SECONDS", 0.05)
    rigs: list[Rig] = []

    async def begin(**settings: Any) -> Rig:
        rig = Rig(tmp_path, monkeypatch)
        rigs.append(rig)
        await rig.start(**settings)
        return rig

    yield begin
    for rig in rigs:
        await rig.stop()


async def small(rig: Rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that reads nothing until it is asked to, and takes little of what comes meanwhile."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", rig.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return reader, writer


def buffered(rig: Rig) -> int:
    """Bytes that the edge keeps for its client, who does not read them."""
    (client,) = rig.worker.clients
    return client.transport.get_write_buffer_size() if client.transport is not None else 0


def shrink(rig: Rig) -> None:
    """Of what the kernel keeps for connections that are accepted from now on."""
    for server in rig.worker._servers:
        for sock in server.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)


# ---- answers that are not read ----


@pytest.mark.parametrize("token", ["no", None])
async def test_who_does_not_read_its_answers_is_asked_for_no_more_requests(start: Start, token: str | None) -> None:
    """Refused or forwarded: what is written ahead of the client is bounded, and nothing of it is lost when it reads at last."""
    rig = await start()
    shrink(rig)
    reader, writer = await small(rig)
    target = "/" + "x" * 300
    one, count = rig.request(target, token=token), 12_000 if token else 3_000
    sent = asyncio.create_task(drained(writer, one * count))
    await until(lambda: rig.worker.clients and buffered(rig) > HIGH)
    most = 0
    for _ in range(12_000):  # turns in which a client without back-pressure would have grown the buffer
        await asyncio.sleep(0)
        most = max(most, buffered(rig))
    assert HIGH < most < 2 * HIGH
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(count):
        status, _, body = await response(reader)
        assert (status, body) == ((403, b"Request missing authentication") if token else (200, target.encode()))
    await sent
    writer.close()


async def drained(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def test_what_is_read_ahead_of_a_request_that_waits_is_bounded(start: Start) -> None:
    """Also from one request to the next: each answer lets as much be read as it has used up, no more."""
    rig = await start()
    one = rig.request("/", "X: " + "y" * 1000)
    _, writer = await rig.open()
    writer.write(one * 3000)
    most = 0
    async with asyncio.timeout(20):
        while rig.received.count(b"GET ") < 1000:
            await asyncio.sleep(0)
            if rig.worker.clients:
                (client,) = rig.worker.clients
                most = max(most, client._read_ahead.size)  # type: ignore[union-attr]
    assert most < (64 << 10) + 2 * (256 << 10)
    writer.transport.abort()


@pytest.mark.parametrize("fields", [(), ("Connection: close",)])
async def test_a_slow_reader_below_the_high_water_mark_is_given_up(start: Start, fields: tuple[str, ...]) -> None:
    """Also where our close waits for what it has not read."""
    rig = await start(idle_seconds=0.5)
    shrink(rig)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000)
        await rig.answer_all(reader, writer)

    rig.script = script
    _, writer = await small(rig)
    writer.write(rig.request("/", *fields))
    await until(lambda: rig.worker.clients and 0 < buffered(rig) < HIGH)
    await until(lambda: not rig.worker.clients, 15)  # the kernel looks when its next probe is due
    writer.transport.abort()


async def test_an_answer_that_ends_the_connection_arrives_though_more_requests_were_sent(start: Start) -> None:
    """A socket that is closed with unread bytes resets what it has written (RFC 9112, 9.6)."""
    rig = await start()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 400_000)

    rig.script = script
    reader, writer = await small(rig)
    sent = asyncio.create_task(drained(writer, rig.request() + rig.request("/never") * 5000))
    await until(lambda: rig.worker.clients and not next(iter(rig.worker.clients)).transport.is_reading())  # type: ignore[union-attr]
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await response(reader))[1]["connection"] == "close"
    assert await reader.readexactly(400_000) == b"x" * 400_000
    assert await asyncio.wait_for(reader.read(), 5) == b"" and b"/never" not in rig.received
    with contextlib.suppress(ConnectionError):
        await sent
    writer.close()


# ---- a client that has left ----


async def quiet(rig: Rig) -> asyncio.Event:
    """Scripts an application that answers nothing, or only a head; tells when its connection ends."""
    ended = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await rig.head(reader)
        if b"/events" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()

    rig.script = script
    return ended


@pytest.mark.parametrize("target", ["/poll", "/events"])
async def test_a_client_that_ends_its_half_of_a_silent_exchange_has_left(start: Start, target: str) -> None:
    rig = await start(half_close_seconds=0.3)
    ended = await quiet(rig)
    reader, writer = await rig.open()
    writer.write(rig.request(target))
    if target == "/events":
        assert (await response(reader))[0] == 200
    await until(lambda: b"GET" in rig.received)
    writer.write_eof()  # close() looks the same from here
    async with asyncio.timeout(5):
        await ended.wait()
    await until(lambda: not rig.worker.clients)
    assert rig.worker.routes.account("s1").waiting == 0
    writer.close()


async def test_a_half_closed_client_is_answered_while_bytes_pass(start: Start) -> None:
    rig = await start(half_close_seconds=0.3)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for _ in range(8):
            await asyncio.sleep(0.1)  # an application that takes longer in all than the client is waited for in silence
            writer.write(b"x")
        await rig.answer_all(reader, writer)

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request() + rig.request("/second"))
    await until(lambda: rig.received)
    writer.write_eof()
    assert (await response(reader))[2] == b"x" * 8
    assert (await response(reader))[2] == b"/second"
    assert await reader.read() == b""
    writer.close()


async def test_a_parked_stream_of_a_client_that_left_is_noticed(start: Start) -> None:
    rig = await start()
    await quiet(rig)
    reader, writer = await rig.open()
    writer.write(rig.request("/events"))
    assert (await response(reader))[0] == 200
    (connection,) = rig.control.connections
    await rig.control.change("hold")
    drained = await connection.call("drain", m.DrainRequest("s1", 1, 1.0, True, 8, one_way=True), m.Drained)
    assert drained.parked == 1
    writer.write_eof()
    await until(lambda: not rig.worker.parking.count and not rig.worker.clients)
    writer.close()


async def test_the_kernel_looks_for_vanished_peers(start: Start) -> None:
    rig = await start(idle_seconds=7)
    _, writer = await rig.open()
    (client,) = await until(lambda: rig.worker.clients)
    accepted = client.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 120
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
    writer.close()


# ---- what is malformed, slow, or waits ----


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET / HT", 408),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 33_000, 431),
    ],
)
async def test_the_second_request_of_a_connection_is_refused_as_the_first_is(start: Start, data: bytes, status: int) -> None:
    rig = await start(head_seconds=0.3)
    reader, writer = await rig.open()
    ids = set()
    for _ in range(2):
        writer.write(rig.request())
        good, fields, _ = await response(reader)
        assert good == 200
        ids.add(fields["x-amzn-requestid"])
    writer.write(data)
    refused, fields, body = await response(reader)
    assert (refused, fields["connection"]) == (status, "close") and body and fields["x-amzn-requestid"] not in ids
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_empty_lines_keep_no_connection_open(start: Start) -> None:
    rig = await start(idle_seconds=0.5)
    reader, writer = await rig.open()

    async def empty_lines() -> None:
        while True:
            writer.write(b"\r\n")
            await asyncio.sleep(0.1)

    task = asyncio.create_task(empty_lines())
    try:
        with contextlib.suppress(ConnectionResetError):  # what was sent into the end
            assert await asyncio.wait_for(reader.read(), 5) == b""
    finally:
        task.cancel()
        writer.close()


async def test_a_body_that_drips_is_answered_408(start: Start) -> None:
    rig = await start(body_seconds=0.5, body_bytes_per_second=100)
    await quiet(rig)
    reader, writer = await rig.open()
    writer.write(rig.request("/", "Content-Length: 1000", method="POST"))

    async def drip() -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.05)

    task = asyncio.create_task(drip())
    try:
        status, fields, body = await response(reader)
    finally:
        task.cancel()
    assert (status, fields["connection"], body) == (408, "close", b"The request's body comes too slowly")
    writer.close()


class NeverTheirTurn(FairQueue):
    """Every request that was seen before has to wait for a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def admit(self, account: Any, now: float) -> bool:
        return False

    def defer(self, account: Any, go_on: Callable[[], None]) -> None:
        self.waiting.append(go_on)


async def test_a_head_that_waits_for_its_turn_is_queued_once_and_what_follows_is_bounded(start: Start) -> None:
    rig = await start()
    reader, writer = await rig.open()
    for _ in range(2):
        writer.write(rig.request())
        assert (await response(reader))[0] == 200
    fairness, never = rig.worker.fairness, NeverTheirTurn()
    rig.worker.fairness, waiting = never, never.waiting
    writer.write(rig.request())
    await until(lambda: waiting)
    (client,) = rig.worker.clients
    writer.write(rig.request("/after") * 20_000)
    await until(lambda: not client.transport.is_reading())  # type: ignore[union-attr]
    assert len(waiting) == 1 and client._read_ahead.size < (64 << 10) + 2 * (256 << 10)  # type: ignore[union-attr]
    rig.worker.fairness = fairness
    waiting[0]()
    for expected in (b"/", b"/after", b"/after"):
        assert (await response(reader))[2] == expected
    writer.transport.abort()


async def test_pings_to_a_parked_tunnel_whose_answers_are_not_read_are_bounded(start: Start) -> None:
    """The edge answers them itself, and stops reading a client that takes none of its pongs."""
    rig = await start()
    shrink(rig)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        await reader.read()

    rig.script = script
    reader, writer = await small(rig)
    writer.write(rig.request("/", "Connection: upgrade", "Upgrade: websocket"))
    (client,) = await until(
        lambda: [one for one in rig.worker.clients if one.exchange is not None and one.exchange.server_frames is not None]
    )  # type: ignore[union-attr]
    (connection,) = rig.control.connections
    await rig.control.change("hold")
    drained = await connection.call("drain", m.DrainRequest("s1", 1, 1.0, True, 8, False), m.Drained)
    assert drained.parked == 1
    for _ in range(100):
        if client.transport.is_reading():
            client.data_received((b"\x89\xfd\0\0\0\0" + b"x" * 125) * 100)  # whole frames, as a read may bring them
    assert not client.transport.is_reading()
    assert HIGH < buffered(rig) < 2 * HIGH
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    while not client.transport.is_reading():
        assert await asyncio.wait_for(reader.read(1 << 16), 5)
    writer.transport.abort()


# ---- HTTP/1.0, and what is said of the way ----


async def test_http_1_0_keeps_its_connection_where_it_asks_and_the_length_is_known(start: Start) -> None:
    rig = await start()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await rig.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" if b"/chunks" in head else OK)

    rig.script = script
    reader, writer = await rig.open()
    old = rig.request("/", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    for data in (old, rig.request(), old):
        writer.write(data)
        status, fields, body = await response(reader)
        assert (status, body, fields.get("connection")) == (200, b"ok", "keep-alive" if data is old else None)
    writer.write(old.replace(rig.token.encode(), b"no"))
    status, fields, _ = await response(reader)
    assert (status, fields["connection"]) == (403, "keep-alive")
    writer.write(old.replace(b"GET /", b"GET /chunks"))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert b"Connection: close\r\n" in head and b"ransfer-" not in head and await reader.read() == b"ok"
    writer.close()
    reader, writer = await rig.open()
    writer.write(rig.request().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (await response(reader))[1]["connection"] == "close" and await reader.read() == b""
    writer.close()


SPOOFED = (
    "X-Forwarded-For: 6.6.6.6",
    "X-Forwarded-Proto: gopher",
    "Forwarded: for=6.6.6.6",
    "X-Forwarded-Port: 1",
    "Via: 1.1 before",
    "X_Forwarded_For: 6.6.6.6",
)


async def test_the_way_of_a_request_is_told_by_setting_and_cannot_be_spoofed(start: Start) -> None:
    rig = await start(forwarded=True, via="edge-1")
    reader, writer = await rig.open()
    for trace in ("1", "1", "1", "2", "3"):  # parsed, from the memory of its fields, of its head, of its decisive fields
        rig.received = b""
        writer.write(rig.request("/a", *SPOOFED, f"Trace: {trace}"))
        status, fields, _ = await response(reader)
        assert (status, fields["via"]) == (200, "1.1 edge-1")
        lines = rig.received.decode().split("\r\n")
        said = sorted(line for line in lines if line.lower().replace("_", "-").startswith(("x-forwarded", "forwarded", "via")))
        assert said == [
            "Via: 1.1 before",
            "Via: 1.1 edge-1",
            "X-Forwarded-For: 127.0.0.1",
            f"X-Forwarded-Host: {HOST}",
            "X-Forwarded-Proto: http",
        ]
    writer.close()


async def test_the_way_is_told_of_a_client_of_http2_alike(start: Start) -> None:
    rig = await start(http2=True, forwarded=True, via="edge-1")
    reader, writer = await rig.open()
    client = Judge(reader, writer)
    fields = [
        (":method", "GET"), (":scheme", "https"), (":path", "/a"), (":authority", HOST), ("x-aws-proxy-auth", rig.token),
        ("x-aws-proxy-port", str(rig.app_port)), *[(name.lower(), value) for name, _, value in (one.partition(": ") for one in SPOOFED)],
    ]  # fmt: skip
    for _ in range(2):
        rig.received = b""
        answer = await client.answer(client.ask(fields, None))
        assert (answer.status, dict(answer.fields)["via"]) == (200, "1.1 edge-1")
        lines = rig.received.decode().split("\r\n")
        said = sorted(line for line in lines if line.lower().replace("_", "-").startswith(("x-forwarded", "forwarded", "via")))
        assert said == [
            "Via: 2 edge-1",
            "X-Forwarded-For: 127.0.0.1",
            f"X-Forwarded-Host: {HOST}",
            "X-Forwarded-Proto: http",
            "via: 1.1 before",
        ]
    writer.close()


async def test_nothing_is_said_of_the_way_by_default(start: Start) -> None:
    """As the service (reference, 3.5); what a client says of it goes on."""
    rig = await start()
    fields = (await rig.ask(rig.request("/", *SPOOFED)))[0][1]
    assert "via" not in fields and rig.received.count(b"6.6.6.6") == 3 and rig.received.count(b"Via: ") == 1
