"""HTTP/2 towards clients, under those who take, send or say more than they should: what is bounded, and what ends when."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, OK, Rig
from h2_client import Judge, Raw, fields
from waiting import until

from gateway.edge.client.http2 import Http2
from gateway.edge.wire import http2_frames as f

HIGH = 512 << 10  # of a client's write buffer (multiplex.py)
REFUSED = f.encode([(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", HOST.encode())])  # without a token


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(http2=True, head_seconds=0.5, body_seconds=0.5, idle_seconds=5, hold_seconds=5, connect_seconds=0.2)
    yield one
    await one.stop()


def block(rig: Rig, path: str = "/", method: str = "GET", *more: tuple[str, str]) -> bytes:
    return f.encode([(name.encode(), value.encode()) for name, value in fields(rig, path, method, *more)])


def connection(rig: Rig) -> Any:
    (one,) = rig.worker.clients
    assert isinstance(one, Http2)
    return one


async def open_narrow(rig: Rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose kernel buffers are small on both sides, so that what the client does not read stays in the edge."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", rig.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.write(f.PREFACE + f.settings({}))
    await until(lambda: rig.worker.clients)
    connection(rig).transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return reader, writer


# ---- what a client does not read ----


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_answers_that_nobody_reads_stop_the_reading_of_requests(rig: Rig, method: str) -> None:
    """Without a token, and by answers without a body, which no flow control bounds."""
    reader, writer = await open_narrow(rig)
    client = connection(rig)
    refused = REFUSED.replace(b"\x03GET", b"\x04HEAD") if method == "HEAD" else REFUSED
    count, most = 12_000, 0
    for number in range(count):
        writer.write(f.headers(1 + 2 * number, refused, True) + f.window_update(0, 100))
        if number % 200 == 0:
            await asyncio.sleep(0)
            most = max(most, client.transport.get_write_buffer_size())
    await until(lambda: client.write_paused)
    assert most < HIGH + (256 << 10) and sum(map(len, client._out)) < HIGH
    raw, answered = Raw(reader, writer, start=False), 0
    while answered < count:  # nothing is lost: it goes on when the client reads
        answered += (await raw.frame())[0] == f.HEADERS
    writer.close()


async def test_interim_responses_are_few_for_each_request(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 65 + OK)
        assert await reader.read() == b""

    rig.script = script
    client = Judge(*await rig.open())
    answer = await client.answer(client.ask(fields(rig)))
    assert answer.status == 502 and len(answer.interim) == 64
    await until(lambda: not rig.worker.upstream.statistics()["open"])


async def test_interim_responses_that_nobody_reads_stop_the_application(rig: Rig) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % (b"a" * 30_000)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        for _ in range(15):
            writer.write(hint)
            await writer.drain()
        writer.write(OK)
        await rig.answer_all(reader, writer)

    rig.script = script
    reader, writer = await open_narrow(rig)
    client = connection(rig)
    for number in range(60):
        writer.write(f.headers(1 + 2 * number, block(rig), True))
    await until(lambda: client.write_paused)
    await until(lambda: all(one.source_paused for one in client.streams.values()))
    assert client.transport.get_write_buffer_size() < HIGH + 60 * (256 << 10), "a read of each application's, at most"
    raw, ended = Raw(reader, writer, start=False), 0
    while ended < 60:
        kind, flags, _, _ = await raw.frame()
        ended += kind == f.DATA and bool(flags & f.END_STREAM)
    writer.close()


# ---- what stands still ----


async def test_a_stream_whose_window_is_never_opened_is_given_up(rig: Rig) -> None:
    rig.worker.settings.idle_seconds = 0.5
    rig.script = endless
    raw = Raw(*await rig.open(), start=False)
    raw.send(f.PREFACE, f.settings({f.INITIAL_WINDOW_SIZE: 0}), f.headers(1, block(rig), True))
    assert (await raw.until(f.HEADERS))[2] == 1
    raw.send(f.headers(3, block(rig, "/other"), True))
    for _ in range(3):  # what goes on on the connection, and on another stream, does not keep it
        await asyncio.sleep(0.3)
        raw.send(f.frame(f.PING, 0, 0, bytes(8)), f.window_update(3, 10))
    _, _, number, payload = await raw.until(f.RST_STREAM)
    assert (number, int.from_bytes(payload, "big")) == (1, f.Code.CANCEL)
    assert 3 in connection(rig).streams
    raw.writer.close()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    with_data = True
    while with_data:
        writer.write(b"x" * 10_000)
        await writer.drain()
        with_data = not writer.is_closing()


async def test_an_upload_that_stands_still_is_given_up_whatever_else_the_connection_says(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await reader.read()

    rig.script = script
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig, "/", "PUT"), False), f.frame(f.DATA, 0, 1, b"x"))
    await until(lambda: b"PUT" in rig.received)
    keeps_on = asyncio.create_task(repeat(0.1, lambda: raw.send(f.frame(f.PING, 0, 0, bytes(8)))))
    _, _, number, payload = await raw.until(f.HEADERS)
    assert number == 1 and f.new_decoder(1 << 16).decode(payload, True)[0][:2] == (b":status", b"408")
    keeps_on.cancel()
    raw.writer.close()


async def test_an_upload_that_drips_is_too_slow_as_over_http1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch)
    await rig.start(http2=True, body_seconds=0.5, body_bytes_per_second=100)
    rig.script = rig.echo
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig, "/", "PUT"), False))
    await until(lambda: b"PUT" in rig.received)
    drips = asyncio.create_task(repeat(0.05, lambda: raw.send(f.frame(f.DATA, 0, 1, b"x"))))
    try:
        _, _, number, payload = await raw.until(f.HEADERS)
        assert number == 1 and f.new_decoder(1 << 16).decode(payload, True)[0][:2] == (b":status", b"408")
        assert (await raw.until(f.DATA))[3] == b"The request's body comes too slowly"
    finally:
        drips.cancel()
        raw.writer.close()
        await rig.stop()


async def repeat(seconds: float, work: Any) -> None:
    while True:
        await asyncio.sleep(seconds)
        work()


@pytest.mark.parametrize("begun", ["a field block", "a frame"])
async def test_a_field_block_that_trickles_ends_the_connection(rig: Rig, begun: str) -> None:
    raw = Raw(*await rig.open())
    if begun == "a field block":
        raw.send(f.frame(f.HEADERS, 0, 1, b""))
        keeps_on = asyncio.create_task(repeat(0.2, lambda: raw.send(f.frame(f.CONTINUATION, 0, 1, b""))))
    else:
        raw.send(f.frame(f.HEADERS, f.END_HEADERS, 1, b"\x82" * 100)[:9])
        keeps_on = asyncio.create_task(repeat(0.2, lambda: raw.send(b"\x82")))
    assert await raw.outcome() == "goaway PROTOCOL_ERROR"
    keeps_on.cancel()


async def test_frames_that_end_in_the_middle_of_the_next_are_no_trickle(rig: Rig) -> None:
    """A connection that is never without half a frame goes on. Here each comes half a deadline after the one before it."""
    client = Raw(*await rig.open())
    await client.settled()
    machine, half = connection(rig), rig.worker.settings.head_seconds / 2
    clock = [machine.time()]
    machine.time = lambda: clock[0]
    whole = b"".join(f.headers(number, block(rig), True) for number in range(1, 41, 2))
    answered, at, step = 0, 0, len(whole) // 20
    while at < len(whole):
        client.send(whole[at : at + step - 3])
        clock[0] += half
        await until(lambda: machine.touched == clock[0])
        machine.sweep(clock[0])
        client.send(whole[at + step - 3 : at + step])
        at += step
    while answered < 20:
        answered += (await client.frame())[0] == f.HEADERS
    client.writer.close()


async def test_pings_keep_no_idle_connection(rig: Rig) -> None:
    rig.worker.settings.idle_seconds = 0.5
    raw = Raw(*await rig.open())
    keeps_on = asyncio.create_task(repeat(0.1, lambda: raw.send(f.frame(f.PING, 0, 0, bytes(8)))))
    _, _, _, payload = await raw.until(f.GOAWAY)
    assert int.from_bytes(payload[4:8], "big") == f.Code.NO_ERROR
    keeps_on.cancel()


async def test_a_closed_connection_that_reads_nothing_is_aborted(rig: Rig) -> None:
    rig.worker.settings.idle_seconds = 0.5
    _, writer = await open_narrow(rig)
    for number in range(1000):
        writer.write(f.headers(1 + 2 * number, REFUSED, True))
    await until(lambda: connection(rig).transport.get_write_buffer_size() > 50_000 and not connection(rig).streams)
    connection(rig).shut_down()
    await until(lambda: not rig.worker.clients)
    writer.close()


async def test_a_client_that_ends_its_half_is_gone(rig: Rig) -> None:
    """Its stream was silent: nothing else would have told of it."""
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await reader.read()
        closed.set()

    rig.script = script
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig), True))
    await raw.until(f.DATA)
    raw.writer.write_eof()
    await asyncio.wait_for(closed.wait(), 5)
    await until(lambda: not rig.worker.clients)
    raw.writer.close()


# ---- what is held ----


async def test_held_bytes_are_bounded_as_over_http1(rig: Rig) -> None:
    rig.worker.settings.held_bytes = 100_000
    await rig.control.change("hold")
    client = Judge(*await rig.open())
    await client.turn()  # the connection's window is open now
    numbers = [client.ask(fields(rig, "/", "POST"), b"x" * 16_000, end=False) for _ in range(4)]
    for _ in range(2):
        for number in numbers:
            client.h2.send_data(number, b"x" * 16_000)
            client.flush()
    answers = [client.answers[number] for number in numbers]
    while not any(one.fields for one in answers):
        assert await client.turn()
    assert {one.status for one in answers if one.fields} == {429}
    assert sum(one.held_bytes for one in connection(rig).streams.values()) <= 100_000
    await rig.control.change("open", incarnation=2)
    await until(lambda: not rig.worker.holds.statistics()["requests"])
    client.writer.close()


async def test_names_that_clients_send_are_not_kept_beyond_a_bound(rig: Rig) -> None:
    from gateway.edge.wire import http2_head

    raw = Raw(*await rig.open())
    long = b"x-" + b"a" * 5000
    raw.send(f.headers(1, block(rig) + f.encode([(long, b"1")]), True))
    assert await raw.outcome() == "answer 200"
    assert long not in http2_head._known_names
    raw.writer.close()


# ---- streams after our GOAWAY ----


async def test_a_stream_above_the_last_of_our_goaway_is_ignored(rig: Rig) -> None:
    rig.script = streaming_or(rig)
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig, "/stream"), True))
    await raw.until(f.DATA)
    connection(rig).shut_down()
    _, _, _, payload = await raw.until(f.GOAWAY)
    assert int.from_bytes(payload[:4], "big") == 1
    indexed = f.encode([(b":method", b"POST")]) + block(rig, "/late", "POST")[len(f.encode([(b":method", b"POST")])) :]
    raw.send(
        f.headers(3, indexed, False),
        *[f.frame(f.DATA, 0, 3, b"x" * 16_000)] * 300,
        f.frame(f.DATA, 1, 3),
        f.window_update(3, 9),
        f.rst_stream(3, f.Code.CANCEL),
    )
    kind, _, number, _ = await raw.until(f.WINDOW_UPDATE, f.RST_STREAM, f.HEADERS, f.GOAWAY)
    assert (kind, number) == (f.WINDOW_UPDATE, 0), "the connection's window is credited"
    raw.send(f.frame(f.PING, 0, 0, b"12345678"))
    assert (await raw.until(f.PING, f.RST_STREAM, f.HEADERS, f.GOAWAY))[0] == f.PING
    assert b"/late" not in rig.received and 1 in connection(rig).streams
    raw.writer.close()


def streaming_or(rig: Rig) -> Any:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/stream" in await rig.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
            await reader.read()
        else:
            writer.write(OK)
            await rig.answer_all(reader, writer)

    return script


# ---- what is counted ----


async def test_an_aborted_download_is_counted_once(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000)
        await reader.read()

    rig.script = script
    raw = Raw(*await rig.open(), start=False)
    raw.send(f.PREFACE, f.settings({f.INITIAL_WINDOW_SIZE: 10}), f.headers(1, block(rig), True))
    await raw.until(f.DATA)
    (stream,) = connection(rig).streams.values()
    await until(lambda: stream.origin is None)  # the application is done; the client is not
    raw.send(f.rst_stream(1, f.Code.CANCEL))
    await until(lambda: not connection(rig).streams)
    assert sum(map(sum, rig.worker.counters.answers)) == 1
    raw.writer.close()


async def test_a_connection_is_not_idle_because_its_only_request_took_long(rig: Rig) -> None:
    """What a sweep has seen of streams counts, not when something was last received."""
    agree = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await agree.wait()
        writer.write(OK)
        await rig.answer_all(reader, writer)

    rig.script = script
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig), True))
    await until(lambda: rig.received)
    client, now = connection(rig), rig.worker.time()
    client.sweep(now + 100)
    agree.set()
    await raw.until(f.DATA)
    client.sweep(now + 100 + rig.worker.settings.idle_seconds - 1)
    await raw.settled()
    assert not client.is_shutting_down
    client.sweep(now + 100 + rig.worker.settings.idle_seconds + 1)
    await raw.until(f.GOAWAY)
    raw.writer.close()


async def test_an_answer_that_ends_the_connection_arrives_also_where_its_client_has_sent_more(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000)
        await reader.read()

    rig.script = script
    reader, writer = await open_narrow(rig)
    client = connection(rig)
    writer.write(f.headers(1, block(rig), True))
    await until(lambda: rig.received and not client.streams)
    client.shut_down()
    for _ in range(100):
        writer.write(f.frame(f.PING, 0, 0, bytes(8)) * 100)
        await asyncio.sleep(0)
    raw, body, ended = Raw(reader, writer, start=False), 0, False
    while not ended:
        kind, _, _, payload = await raw.frame()
        body += len(payload) if kind == f.DATA else 0
        ended = kind == f.GOAWAY
    assert body == 60_000
    with pytest.raises(EOFError):
        await raw.frame()
    await until(lambda: not rig.worker.clients)
    writer.close()
