"""HTTP/2 through a real worker: h2's state machine judges what we say; the application speaks HTTP/1.1 or HTTP/2."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from edge_rig import HOST, OK, Rig
from h2_client import Answer, Judge, Raw, fields
from waiting import until

from gateway.edge.wire import http2_frames as f
from gateway.edge.wire.http1_head import parse_response
from gateway.edge.wire.websocket import accept_of


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(http2=True, head_seconds=0.5, idle_seconds=5, hold_seconds=5, connect_seconds=0.2)
    yield one
    await one.stop()


async def judge(rig: Rig) -> Judge:
    return Judge(*await rig.open())


async def test_streams_share_a_connection_and_are_answered_each(rig: Rig) -> None:
    client = await judge(rig)
    numbers = [client.ask(fields(rig, f"/{n}")) for n in range(60)]
    for n, number in enumerate(numbers):
        answer = await client.answer(number)
        assert (answer.status, answer.body) == (200, b"/%d" % n)
        assert len(answer.fields["x-amzn-requestid"]) == 36
    assert len({answer.fields["x-amzn-requestid"] for answer in client.answers.values()}) == 60
    assert rig.token.encode() not in rig.received and b"x-aws-proxy" not in rig.received.lower()
    assert b"\r\nHost: " + HOST.encode() in rig.received


async def test_same_fields_again_take_the_fast_path_until_the_token_ends(rig: Rig) -> None:
    client = await judge(rig)
    for _ in range(4):
        assert (await client.answer(client.ask(fields(rig)))).status == 200
    assert rig.connects == 1 and len(rig.worker.heads.lists)
    rig.now += 601
    answer = await client.answer(client.ask(fields(rig)))
    assert (answer.status, answer.body) == (403, b"Token authentication failed")
    assert answer.fields["cache-control"] == "private, no-store"


async def test_body_with_and_without_length_and_trailers_both_ways(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await rig.head(reader)
        if b"chunked" in head.lower():
            rig.received += await reader.readuntil(b"0\r\n")
            rig.received += await reader.readuntil(b"\r\n\r\n")
        else:
            rig.received += await reader.readexactly(5)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 5\r\nHost: evil\r\n\r\n")
        await script(reader, writer)

    rig.script = script
    client = await judge(rig)
    answer = await client.answer(client.ask(fields(rig, "/", "POST", ("content-length", "5")), b"hello"))
    assert (answer.body, answer.trailers) == (b"abcde", {"x-sum": "5"})
    assert b"hello" in rig.received and "transfer-encoding" not in answer.fields
    number = client.ask(fields(rig, "/", "POST"), b"hel", end=False)
    client.h2.send_data(number, b"lo")
    client.h2.send_headers(number, [("x-check", "1")], end_stream=True)
    client.flush()
    assert (await client.answer(number)).body == b"abcde"
    assert b"3\r\nhel\r\n" in rig.received and b"x-check: 1\r\n\r\n" in rig.received


async def test_large_bodies_both_ways_with_small_windows(rig: Rig) -> None:
    size = 3_000_000

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await rig.head(reader):
            await reader.readexactly(size)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            writer.write(b"y" * size)

    rig.script = script
    client = await judge(rig)
    number = client.ask(fields(rig, "/", "PUT", ("content-length", str(size))), end=False)
    await client.upload(number, size)
    assert (await client.answer(number)).body == b"y" * size
    again = client.ask(fields(rig, "/", "PUT", ("content-length", str(size))), end=False)
    await client.upload(again, size)
    assert (await client.answer(again)).body == b"y" * size and rig.connects == 1, "the application's connection goes on"


async def test_a_reader_that_stops_stops_only_its_own_stream(rig: Rig) -> None:
    stopped = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/big" not in await rig.head(reader):
            writer.write(OK)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        writer.write(b"x" * 100_000_000)
        await until(lambda: stopped.is_set() or writer.transport.get_write_buffer_size() < 1000)
        left.append(writer.transport.get_write_buffer_size())

    rig.script, left = script, []  # type: ignore[var-annotated]
    client = await judge(rig)
    client.auto_credit = False
    client.h2.increment_flow_control_window(1 << 24)
    client.flush()
    number = client.ask(fields(rig, "/big"))
    await client.until(lambda: len(client.answers[number].body) >= 65_535)
    assert (await client.answer(client.ask(fields(rig, "/small")))).body == b"ok"
    (connection,) = rig.worker.clients
    stream = connection.streams[number]  # type: ignore[union-attr]
    await until(lambda: stream.source_paused)
    stopped.set()
    await until(lambda: left)
    assert left[0] > 80_000_000, "the application still has it"
    assert len(stream.queue) < (128 << 10) + (256 << 10), "the bound, and a read"  # type: ignore[union-attr,arg-type]
    client.h2.reset_stream(number)
    client.flush()
    await until(lambda: not connection.streams)  # type: ignore[union-attr]


async def test_reset_by_the_client_leaves_nothing(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        assert await reader.read() == b""

    rig.script = script
    client = await judge(rig)
    number = client.ask(fields(rig))
    await until(lambda: rig.received)
    client.h2.reset_stream(number)
    client.flush()
    await until(lambda: not rig.worker.upstream.statistics()["open"])
    assert rig.worker.routes.account("s1").waiting == 0


async def test_early_answer_ends_the_upload_without_losing_the_answer(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await reader.read()

    rig.script = script
    client = await judge(rig)
    number = client.ask(fields(rig, "/", "PUT"), b"x" * 1000, end=False)
    answer = await client.answer(number)
    assert (answer.status, answer.body) == (413, b"big")
    assert await client.until(lambda: answer.reset is not None) and answer.reset == f.Code.NO_ERROR
    rig.script = rig.answer_all
    assert (await client.answer(client.ask(fields(rig, "/next")))).body == b"/next"
    assert rig.connects == 2  # a connection with half a request on it is not used again


async def test_interim_responses_and_answers_without_bodies(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await rig.head(reader):
            if head.startswith(b"HEAD"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            elif b"/204" in head:
                writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 50\r\n\r\n")

    rig.script = script
    client = await judge(rig)
    answer = await client.answer(client.ask(fields(rig, "/", "HEAD")))
    assert (answer.status, answer.body, answer.fields["content-length"]) == (200, b"", "1000")
    answer = await client.answer(client.ask(fields(rig, "/204")))
    assert (answer.status, answer.interim) == (204, [{":status": "103", "link": "</a>"}])
    assert (await client.answer(client.ask(fields(rig, "/304")))).status == 304


async def test_application_that_breaks_off(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/late" in await rig.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")

    rig.script = script
    client = await judge(rig)
    assert (await client.answer(client.ask(fields(rig, "/", "POST"), b"x"))).status == 502
    answer = await client.answer(client.ask(fields(rig, "/late")))
    assert answer.reset == f.Code.INTERNAL_ERROR and not answer.ended


async def test_held_streams_resume_once_and_bodies_wait_within_their_window(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await rig.head(reader):
            if b"POST" in head:
                await reader.readexactly(100_000)
            writer.write(OK)

    rig.script = script
    await rig.control.change("hold")
    client = await judge(rig)
    numbers = [client.ask(fields(rig, f"/{n}")) for n in range(20)]
    upload = client.ask(fields(rig, "/up", "POST", ("content-length", "100000")), b"x" * 16_000, end=False)
    await until(lambda: rig.worker.holds.statistics()["requests"] == 21 and rig.control.resumed)
    await rig.control.change("open", incarnation=2)
    await client.upload(upload, 84_000)
    for number in (*numbers, upload):
        answer = await client.answer(number)
        assert answer.status == 200 and answer.fields["server-timing"].startswith("hold;dur=")
    assert len(rig.control.resumed) == 1


async def test_websocket_by_extended_connect(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await rig.head(reader)
        assert b"sec-websocket-key: " in head.lower()
        key = rig.received[rig.received.lower().find(b"sec-websocket-key: ") + 19 :].partition(b"\r\n")[0]
        writer.write(
            b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %b\r\n\r\n\x82\x05early"
            % accept_of(key)
        )
        while data := await reader.read(100):
            writer.write(data)
        writer.write(b"\x82\x03end")

    rig.script = script
    client = await judge(rig)
    await client.until(lambda: client.h2.remote_settings.get(f.ENABLE_CONNECT_PROTOCOL))
    offered = f"lambda-microvms, lambda-microvms.authentication.{rig.token}, lambda-microvms.port.{rig.app_port}"
    number = client.h2.get_next_available_stream_id()
    client.answers[number] = Answer()
    client.h2.send_headers(
        number,
        [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"), (":path", "/ws"), (":authority", HOST),
         ("sec-websocket-version", "13"), ("sec-websocket-protocol", offered)],
    )  # fmt: skip
    client.h2.send_data(number, b"\x82\x81\0\0\0\0a")
    client.flush()
    answer = client.answers[number]
    await client.until(lambda: len(answer.body) >= 14)
    assert answer.status == 200 and answer.fields["sec-websocket-protocol"] == "lambda-microvms"
    assert "sec-websocket-accept" not in answer.fields and answer.body == b"\x82\x05early\x82\x81\0\0\0\0a"
    client.h2.end_stream(number)
    client.flush()
    assert (await client.answer(number)).body.endswith(b"\x82\x03end")
    assert b"GET /ws HTTP/1.1" in rig.received and rig.token.encode() not in rig.received


async def test_suspend_cuts_streams_with_goaway_and_1001(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await reader.read()

    rig.script = script
    client = await judge(rig)
    number = client.ask(fields(rig))
    await client.until(lambda: client.answers[number].body)
    rig.control.change("hold", is_live=False)
    answer = await client.answer(number)
    assert answer.reset == f.Code.CANCEL
    await client.until(client.terminations)
    assert [one.error_code for one in client.terminations()] == [f.Code.NO_ERROR]


async def test_drain_loses_no_stream(rig: Rig) -> None:
    client = await judge(rig)
    assert (await client.answer(client.ask(fields(rig)))).status == 200
    drained = asyncio.create_task(rig.worker.drain())
    number = client.ask(fields(rig, "/on-its-way"))
    assert (await client.answer(number)).body == b"/on-its-way"
    async with asyncio.timeout(10):
        while await client.turn():
            pass
        await drained
    (last,) = client.terminations()
    assert (last.error_code, last.last_stream_id) == (f.Code.NO_ERROR, number)


async def test_http2_application(rig: Rig) -> None:
    """Forced by X-aws-proxy-force-h2: prior knowledge, many streams on one connection, trailers, interim answers."""
    import h2.config
    import h2.connection

    seen: list[dict[str, str]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="latin-1"))
        server.initiate_connection()
        writer.write(server.data_to_send())
        bodies: dict[int, bytes] = {}
        while data := await reader.read(65536):
            for event in server.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    seen.append(dict(event.headers))
                    bodies[event.stream_id] = b""
                elif isinstance(event, h2.events.DataReceived):
                    bodies[event.stream_id] += event.data
                    server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    server.send_headers(event.stream_id, [(":status", "103"), ("link", "</a>")])
                    server.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                    server.send_data(event.stream_id, bodies[event.stream_id][:16_000])
                    server.send_headers(event.stream_id, [("grpc-status", "0"), ("grpc-message", "fine")], end_stream=True)
            writer.write(server.data_to_send())

    rig.script = script
    client = await judge(rig)
    forced = ("x-aws-proxy-force-h2", "true")
    numbers = [client.ask(fields(rig, f"/{n}", "POST", forced, ("te", "trailers")), b"%d" % n * 100) for n in range(30)]
    for n, number in enumerate(numbers):
        answer = await client.answer(number)
        assert answer.body == b"%d" % n * 100 and answer.trailers == {"grpc-status": "0", "grpc-message": "fine"}
        assert answer.interim == [{":status": "103", "link": "</a>"}]
    assert rig.connects <= 2 and all(one["te"] == "trailers" and one[":authority"] == HOST for one in seen)
    assert not any(name.startswith("x-aws-proxy") for one in seen for name in one)
    # The same application for a client of HTTP/1.1: chunked, with trailers.
    reader, writer = await rig.open()
    writer.write(rig.request("/one", "X-aws-proxy-force-h2: true", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n0\r\n\r\n")
    text = await asyncio.wait_for(reader.readuntil(b"fine\r\n\r\n"), 5)
    assert b"HTTP/1.1 200 \r\n" in text and b"3\r\nabc\r\n0\r\ngrpc-status: 0\r\n" in text
    writer.close()


async def test_force_h2_against_http1_is_a_502(rig: Rig) -> None:
    client = await judge(rig)
    answer = await client.answer(client.ask(fields(rig, "/", "GET", ("x-aws-proxy-force-h2", "true"))))
    assert (answer.status, answer.body) == (502, b"")


async def test_push_of_rapid_resets_ends_the_connection(rig: Rig) -> None:
    await rig.control.change("hold")
    raw = Raw(*await rig.open())
    block = f.encode([(name.encode(), value.encode()) for name, value in fields(rig)])
    for number in range(1, 1001, 2):
        raw.send(f.headers(number, block, True), f.rst_stream(number, f.Code.CANCEL))
    assert await raw.outcome() == "goaway ENHANCE_YOUR_CALM"
    await until(lambda: not rig.worker.holds.statistics()["requests"])


async def test_windows_grow_with_use_so_that_one_stream_fills_a_long_link(rig: Rig) -> None:
    """50 ms each way, by a relay: an upload would get 64 KiB a round trip if its window stayed what it was."""
    size = 12_000_000

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await reader.readexactly(size)
        writer.write(OK)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                writer.write(data)

        task = asyncio.create_task(deliver())
        while data := await reader.read(1 << 18):
            queue.put_nowait((loop.time() + 0.05, data))
        task.cancel()

    tasks: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, back = await rig.open()
        for pair in ((reader, back), (to, writer)):
            tasks.add(asyncio.create_task(carry(*pair)))

    rig.script = script
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    client = Judge(*await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1]))
    number = client.ask(fields(rig, "/", "PUT", ("content-length", str(size))), end=False)
    widest = await client.upload(number, size)
    assert (await client.answer(number)).body == b"ok"
    assert widest > 2_000_000  # 20 MB a second at this distance
    server.close()
    client.writer.close()
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("how", ["at once", "too little", "too much", "trailers"])
async def test_an_answer_that_is_not_as_long_as_its_length_is_never_ended_well(rig: Rig, how: str) -> None:
    """Whichever side it comes from: here, as if an application's side had not noticed (RFC 9113, 8.1.1)."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await reader.read()

    rig.script = script
    client = await judge(rig)
    number = client.ask(fields(rig))
    await until(lambda: rig.received)
    (connection,) = rig.worker.clients
    stream = connection.streams[number]  # type: ignore[union-attr]
    head = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 8", 200, False)
    if how == "at once":
        stream.response_whole(head, b"")  # type: ignore[attr-defined]
    else:
        stream.response_head(head)  # type: ignore[attr-defined]
        stream.response_data(b"x" * (9 if how == "too much" else 7))  # type: ignore[attr-defined]
    if how in ("too little", "trailers"):
        stream.response_done([(b"x", b"1")] if how == "trailers" else None)  # type: ignore[attr-defined]
    answer = await client.answer(number)
    if how == "at once":
        assert answer.status == 502
    else:
        assert answer.reset == f.Code.INTERNAL_ERROR and not answer.ended and not answer.trailers
    await until(lambda: not rig.worker.upstream.statistics()["open"])
