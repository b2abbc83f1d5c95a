"""WebSocket over HTTP/2 (RFC 8441): nothing goes out before the application has agreed, in order afterwards, nowhere after a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from edge_rig import HOST, OK, Rig
from h2_client import Raw
from waiting import until

from gateway import messages as m
from gateway.edge.wire import http2_frames as f
from gateway.edge.wire.http2_connection import QUEUE_HIGH
from gateway.edge.wire.websocket import accept_of

PING = b"\x89\x80\0\0\0\0"  # of a client, masked
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(http2=True, connect_seconds=0.2)
    yield one
    await one.stop()


def connect(rig: Rig, number: int = 1, *more: tuple[bytes, bytes]) -> bytes:
    fields = [
        (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"https"), (b":path", b"/ws"), (b":authority", HOST.encode()),
        (b"x-aws-proxy-auth", rig.token.encode()), (b"x-aws-proxy-port", str(rig.app_port).encode()), *more,
    ]  # fmt: skip
    return f.headers(number, f.encode(fields), False)


def data(payload: bytes, end: bool = False, number: int = 1) -> bytes:
    return f.frame(f.DATA, f.END_STREAM if end else 0, number, payload)


class Application:
    """Answers a handshake when it is told to, and then collects what comes."""

    def __init__(self, rig: Rig, answer: bytes = b"") -> None:
        self.rig, self.answer = rig, answer
        self.asked, self.agree = asyncio.Event(), asyncio.Event()
        self.heard = b""  # behind the head
        self.heads: list[bytes] = []
        rig.script = self.serve

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await self.rig.head(reader)
        self.heads.append(head)
        self.asked.set()
        waiting = asyncio.create_task(self.listen(reader))
        await self.agree.wait()
        key = head.lower().partition(b"sec-websocket-key: ")[2].partition(b"\r\n")[0]
        at = head.lower().find(key)
        accept = accept_of(head[at : at + len(key)])
        switched = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %b\r\n\r\n" % accept
        writer.write(self.answer or switched)
        await waiting

    async def listen(self, reader: asyncio.StreamReader) -> None:
        while got := await reader.read(65536):
            self.heard += got


async def asked(rig: Rig, raw: Raw, application: Application) -> None:
    async with asyncio.timeout(5):
        await application.asked.wait()
    await raw.settled()


@pytest.mark.parametrize("when", ["before the connection is there", "behind the handshake", "both"])
async def test_nothing_goes_out_before_the_application_agrees_and_then_in_order(rig: Rig, when: str) -> None:
    application = Application(rig)
    raw = Raw(*await rig.open())
    raw.send(connect(rig))
    if when != "behind the handshake":
        raw.send(data(b"\x82\x81\0\0\0\0a"))
    await asked(rig, raw, application)
    if when != "before the connection is there":
        raw.send(data(b"\x82\x81\0\0\0\0b"), data(b"\x82\x81\0\0"), data(b"\0\0c"))
    await raw.settled()
    assert application.heard == b""
    application.agree.set()
    assert (await raw.until(f.HEADERS))[2] == 1
    raw.send(data(b"\x82\x81\0\0\0\0z"))
    expected = {"both": b"abcz", "behind the handshake": b"bcz"}.get(when, b"az")
    await until(lambda: len(application.heard) >= 7 * len(expected))
    assert application.heard == b"".join(b"\x82\x81\0\0\0\0%c" % letter for letter in expected)
    raw.writer.close()


async def test_an_end_that_comes_early_ends_the_tunnel_behind_what_was_said(rig: Rig) -> None:
    application = Application(rig)
    raw = Raw(*await rig.open())
    raw.send(connect(rig))
    await asked(rig, raw, application)
    raw.send(data(b"\x82\x81\0\0\0\0a", end=True))
    await raw.settled()
    application.agree.set()
    _, flags, number, _ = await raw.until(f.DATA, f.RST_STREAM)  # the application has read the end, and ends its half
    assert (flags, number) == (f.END_STREAM, 1) and application.heard == b"\x82\x81\0\0\0\0a"
    raw.writer.close()


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("status", [b"200 OK", b"403 Forbidden"])
async def test_after_a_refusal_what_was_sent_is_dropped_and_the_connection_not_used_again(rig: Rig, status: bytes, end: bool) -> None:
    application = Application(rig, b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % status)
    raw = Raw(*await rig.open())
    raw.send(connect(rig), data(SMUGGLED))
    await asked(rig, raw, application)
    raw.send(data(SMUGGLED, end))
    await raw.settled()
    application.agree.set()
    _, _, _, payload = await raw.until(f.HEADERS)
    assert f.new_decoder(1 << 16).decode(payload, True)[0][:2] == (b":status", status[:3])
    raw.send(data(SMUGGLED)) if not end else None
    await raw.settled()
    assert application.heard == b"" and rig.worker.upstream.statistics()["idle"] == 0
    rig.script = rig.answer_all
    fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/next"), (b":authority", HOST.encode()),
              (b"x-aws-proxy-auth", rig.token.encode()), (b"x-aws-proxy-port", str(rig.app_port).encode())]  # fmt: skip
    raw.send(f.headers(3, f.encode(fields), True))
    _, _, number, payload = await raw.until(f.DATA)
    while number != 3:
        _, _, number, payload = await raw.until(f.DATA)
    assert payload == b"/next" and rig.connects == 2 and b"smuggled" not in rig.received
    raw.writer.close()


async def test_a_wrong_accept_is_a_502_and_nothing_was_sent(rig: Rig) -> None:
    application = Application(
        rig, b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n"
    )
    raw = Raw(*await rig.open())
    raw.send(connect(rig), data(SMUGGLED))
    await asked(rig, raw, application)
    application.agree.set()
    assert await raw.outcome() == "answer 502"
    assert application.heard == b""
    raw.writer.close()


async def test_frames_that_came_early_are_followed_so_that_pings_are_no_activity(rig: Rig) -> None:
    application = Application(rig)
    raw = Raw(*await rig.open())
    raw.send(connect(rig), data(b"\x82\x84\0\0\0\0ab"))  # half of a frame
    await asked(rig, raw, application)
    application.agree.set()
    await raw.until(f.HEADERS)
    raw.send(data(b"cd"))
    await until(lambda: application.heard == b"\x82\x84\0\0\0\0abcd")
    account = rig.worker.routes.account("s1")
    before = account.count
    raw.send(data(PING))
    await until(lambda: application.heard.endswith(PING))
    assert account.count == before
    raw.send(data(b"\x82\x80\0\0\0\0"))
    await until(lambda: account.count > before)
    raw.writer.close()


async def test_a_handshake_carries_nothing_of_the_clients_own(rig: Rig) -> None:
    application = Application(rig)
    raw = Raw(*await rig.open())
    raw.send(connect(rig, 1, (b"sec-websocket-key", b"AAAAAAAAAAAAAAAAAAAAAA=="), (b"expect", b"100-continue")))
    await asked(rig, raw, application)
    (head,) = application.heads
    assert head.lower().count(b"sec-websocket-key: ") == 1 and b"AAAAAAAA" not in head and b"expect" not in head.lower()
    raw.send(connect(rig, 3, (b"content-length", b"5")))
    assert await raw.outcome() == "reset PROTOCOL_ERROR"
    raw.writer.close()


async def test_an_upgrade_to_something_else_is_a_502(rig: Rig) -> None:
    application = Application(
        rig, OK.replace(b"200 OK", b"101 Switching").replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    )
    raw = Raw(*await rig.open())
    raw.send(connect(rig))
    await asked(rig, raw, application)
    application.agree.set()
    assert await raw.outcome() == "answer 502"
    raw.writer.close()


async def test_pings_to_a_parked_tunnel_whose_answers_are_not_read_are_bounded(rig: Rig) -> None:
    """The edge answers them itself, and reads no more of a stream whose client takes none of its pongs."""
    application = Application(rig)
    raw = Raw(*await rig.open())
    raw.send(connect(rig))
    await asked(rig, raw, application)
    application.agree.set()
    (client,) = rig.worker.clients
    stream = await until(lambda: next((one for one in client.streams.values() if one.server_frames is not None), None))  # type: ignore[union-attr]
    (connection,) = rig.control.connections
    await rig.control.change("hold")
    drained = await connection.call("drain", m.DrainRequest("s1", 1, 1.0, True, 8), m.Drained)
    assert drained.parked == 1
    pings = (b"\x89\xfd\0\0\0\0" + b"x" * 125) * 100
    for _ in range(100):
        if not stream.paused:
            stream.on_data(pings, False)
    assert stream.paused and len(stream.queue) < 2 * QUEUE_HIGH
    raw.send(f.window_update(0, 1 << 20) + f.window_update(1, 1 << 20))
    await until(lambda: not stream.paused and not stream.queue)
    raw.writer.close()
