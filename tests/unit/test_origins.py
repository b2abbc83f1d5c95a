"""Applications' connections as applications treat them: closed in the moment of reuse, slow to come, never free, in TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest
from edge_rig import OK, Rig, response
from h2_client import serve_h2, speaks_h2
from test_parking import UPGRADED
from waiting import until

from gateway import reach
from gateway.config import Settings
from gateway.edge.origin import pool as pools
from gateway.edge.origin import upstream
from gateway.edge.wire import http2_frames as f
from gateway.instance import make_certificates


class Once:
    """An application that answers the first request of a connection, and closes it when the next one comes, without an answer, as
    if its timer had run out just before; `fields` are in its answers."""

    def __init__(self, rig: Rig, fields: bytes = b"") -> None:
        self.seen: list[tuple[int, bytes]] = []  # connection, method

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            number = rig.connects
            for answers in (True, False):
                head = await rig.head(reader)
                self.seen.append((number, head.split(b" ")[0]))
                if b"Content-Length: 2" in head:
                    await reader.readexactly(2)
                elif b"chunked" in head.lower():
                    await reader.readuntil(b"0\r\n\r\n")
                if answers:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + fields + b"\r\n")

        rig.script = script


async def ask(rig: Rig, method: str, *fields: str, body: bytes = b"") -> int:
    reader, writer = await rig.open()
    writer.write(rig.request("/", *fields, method=method) + body)
    status, _, _ = await response(reader, no_body=method == "HEAD")
    writer.close()
    return status


def age(rig: Rig, seconds: float) -> None:
    """The idle connections have been idle for longer."""
    for origin in rig.worker.upstream.idle():
        origin.idle_since -= seconds


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_request_that_met_the_end_of_its_connection_is_sent_once_more(rig: Rig, method: str) -> None:
    application = Once(rig)
    for _ in range(2):  # the second time from the caches of parsed heads
        assert await ask(rig, method) == 200
        assert await ask(rig, method) == 200
        assert await ask(rig, method) == 200
    name = method.encode()
    assert application.seen == [(1, name), (1, name), (2, name), (2, name), (3, name), (3, name), (4, name), (4, name), (5, name), (5, name), (6, name)]  # fmt: skip
    assert rig.worker.routes.account("s1").waiting == 0


async def test_an_answer_in_front_of_the_end_that_a_write_meets_is_read(rig: Rig) -> None:
    """Who refuses an upload before it has all of it, and closes."""
    refuses, has_refused = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await refuses.wait()
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # what close says: RST
        writer.transport.abort()
        has_refused.set()

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request("/", "Content-Length: 1000000", method="POST") + b"x")
    await until(lambda: rig.received)
    (origin,) = rig.worker.upstream.pools()[0].open
    assert origin.transport is not None
    origin.transport.pause_reading()  # the loop comes to writing first
    refuses.set()
    async with asyncio.timeout(5):
        await has_refused.wait()
    writer.write(b"x" * 999_999)
    status, fields, body = await response(reader)
    assert (status, fields["connection"], body) == (413, "close", b"big")
    assert rig.worker.routes.account("s1").waiting == 0 and not rig.worker.upstream.idle()
    writer.close()


async def test_behind_an_interim_response_it_is_not_sent_once_more(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(OK)
        await rig.head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")

    rig.script = script
    assert await ask(rig, "GET") == 200
    reader, writer = await rig.open()
    writer.write(rig.request())
    assert [(await response(reader))[0] for _ in range(2)] == [103, 502]
    assert rig.connects == 1
    writer.close()


async def test_it_is_sent_once_more_and_not_again(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        if rig.connects == 1:
            writer.write(OK)
            await rig.head(reader)

    rig.script = script
    assert await ask(rig, "GET") == 200
    assert await ask(rig, "GET") == 502
    assert rig.connects == 2


async def test_a_new_connection_that_ends_without_an_answer_is_a_502(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)

    rig.script = script
    assert await ask(rig, "POST") == 502 and rig.connects == 1


@pytest.mark.parametrize(("method", "fields", "body"), [
    ("POST", ("Content-Length: 2",), b"ok"), ("PUT", ("Transfer-Encoding: chunked",), b"0\r\n\r\n"), ("DELETE", (), b""), ("POST", (), b""),
])  # fmt: skip
@pytest.mark.parametrize("announced", [True, False])
async def test_what_cannot_be_sent_again_gets_a_proven_connection(
    rig: Rig, method: str, fields: tuple[str, ...], body: bytes, announced: bool
) -> None:
    application = Once(rig, b"Keep-Alive: timeout=5, max=100\r\n" if announced else b"")
    assert await ask(rig, method, *fields, body=body) == 200
    age(rig, 4.2 if announced else 1.2)
    assert await ask(rig, method, *fields, body=body) == 200
    assert [number for number, _ in application.seen] == [1, 2]


async def test_an_upgrade_gets_a_proven_connection(rig: Rig) -> None:
    seen = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await rig.head(reader):
            seen.append(rig.connects)
            writer.write(UPGRADED if b"Upgrade" in head else OK)

    rig.script = script
    assert await ask(rig, "GET") == 200
    age(rig, 1.2)
    fields = ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
    assert await ask(rig, "GET", *fields) == 101
    assert seen == [1, 2]


@pytest.mark.parametrize("early", [True, False])
async def test_a_connection_is_used_again_after_a_refused_upgrade_only_if_nothing_but_the_head_was_sent(rig: Rig, early: bool) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await rig.head(reader):
            asked.set()
            await answer.wait()
            writer.write(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")

    rig.script = script
    fields = ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
    asking = asyncio.create_task(ask(rig, "GET", *fields))
    await asked.wait()
    if early:
        (origin,) = rig.worker.upstream.pools()[0].open
        origin.send(b"GET /smuggled HTTP/1.1\r\n\r\n")
    answer.set()
    assert await asking == 426
    assert await ask(rig, "GET") == 426
    assert rig.connects == (2 if early else 1) and b"smuggled" not in rig.received


async def test_an_application_that_closes_after_each_answer_is_learned(rig: Rig) -> None:
    """It does not say Connection: close. What cannot be sent again gets a new connection each time from then on."""
    hold = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(OK)
        if rig.connects == 2:
            await hold.wait()

    rig.script = script
    assert await ask(rig, "POST") == 200
    await until(lambda: not rig.worker.upstream.idle())
    assert await ask(rig, "POST") == 200, "and this one is still open"
    assert await ask(rig, "POST") == 200
    assert rig.connects == 3
    hold.set()


async def test_a_stream_that_an_application_of_http2_did_not_look_at_is_opened_once_more(rig: Rig) -> None:
    """GOAWAY with a lower last stream (RFC 9113, 6.8), whatever the method."""

    speaks_h2(rig, lambda number: f.goaway(0, f.Code.NO_ERROR) if rig.connects == 1 else f.headers(number, f.encode_status(204), True))
    assert await ask(rig, "DELETE", "X-aws-proxy-force-h2: true") == 204 and rig.connects == 2


# ---- what has to wait ----


async def busy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Task[int], asyncio.Event, pools.Pool]:
    """A request that is answered when the event is set, on the one connection that its pool may have."""
    hold = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await hold.wait()
        writer.write(OK)

    rig.script = script
    first = asyncio.create_task(ask(rig, "GET"))
    await until(lambda: rig.connects)
    (pool,) = rig.worker.upstream.pools()
    monkeypatch.setattr(upstream, "_RAMP_SECONDS", 60.0)
    pool.allowed = 1
    return first, hold, pool


async def test_the_queue_for_a_connection_has_an_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.worker.settings.hold_seconds = 0.2
    rig.worker.settings.held_requests = 1
    first, hold, pool = await busy(rig, monkeypatch)
    second = asyncio.create_task(ask(rig, "GET"))
    await until(lambda: pool.waiting == 1)
    assert await ask(rig, "GET") == 429, "as many wait as are held"
    assert await second == 502 and pool.waiting == 0
    hold.set()
    assert await first == 200
    assert rig.worker.routes.account("s1").waiting == 0


async def test_a_client_that_leaves_the_queue_is_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, hold, pool = await busy(rig, monkeypatch)
    _, writer = await rig.open()
    writer.write(rig.request())
    await until(lambda: pool.waiting == 1)
    writer.transport.abort()
    await until(lambda: pool.waiting == 0)
    hold.set()
    assert await first == 200
    await until(lambda: not rig.worker.routes.account("s1").waiting)


async def test_an_error_of_our_own_is_answered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exchange is left unanswered, whatever raises."""

    async def broken(*arguments: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(reach, "dial", broken)
    assert await ask(rig, "GET") == 500
    assert rig.worker.routes.account("s1").waiting == 0
    (pool,) = rig.worker.upstream.pools()
    assert pool.connecting == 0


async def test_an_incarnation_that_ends_while_tls_is_tried(rig: Rig) -> None:
    """vmm says that it is gone: the request is answered all the same."""
    hold = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        rig.vmm.gone = {1}
        rig.worker.upstream.incarnation("s1", 1).sockets.close()
        writer.write(b"\x15\x03\x01\x00\x02\x02\x50")  # an alert: no HTTP, perhaps TLS
        await hold.wait()

    rig.script = script
    rig.worker.settings.hold_seconds = 0.3
    assert await ask(rig, "GET") == 502
    hold.set()


async def test_sockets_that_come_for_an_incarnation_that_has_ended_are_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = asyncio.Event(), asyncio.Event()
    vmm = rig.worker.upstream._vmm
    answer = vmm.call_with_descriptors

    async def late(*arguments: Any, **named: Any) -> Any:
        got = await answer(*arguments, **named)
        asked.set()
        await go.wait()
        return got

    monkeypatch.setattr(vmm, "call_with_descriptors", late)
    before = len(os.listdir("/proc/self/fd"))
    sockets = rig.worker.upstream.incarnation("s1", 1).sockets
    sockets.prefetch()
    async with asyncio.timeout(5):
        await asked.wait()
    rig.worker.upstream.incarnation_ended("s1", 1)
    go.set()
    await until(lambda: sockets._fetching is None)
    assert len(sockets) == 0 and len(os.listdir("/proc/self/fd")) == before


async def test_what_one_connection_raises_at_its_end_stops_no_other(rig: Rig) -> None:
    hold = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await hold.wait()

    rig.script = script
    asking = [asyncio.create_task(ask(rig, "GET")) for _ in range(3)]
    await until(lambda: rig.connects == 3)
    ended: list[object] = []

    class Broken:
        key = ("s1", 1, 0)
        stream_count = 1

        def parkable(self, one_way: bool) -> int:
            return 0

        def cut(self) -> None:
            ended.append(self)
            raise ValueError("a fault")

    incarnation = rig.worker.upstream.incarnation("s1", 1)
    incarnation.shells |= {Broken(), Broken()}  # type: ignore[arg-type]
    rig.worker.upstream.incarnation_ended("s1", 1)
    assert len(ended) == 2 and len(incarnation.sockets) == 0
    assert await asyncio.gather(*asking) == [502] * 3
    hold.set()


# ---- TLS ----


@pytest.fixture
def contexts(tmp_path: Path) -> ssl.SSLContext:
    settings = Settings(root=tmp_path / "root")
    settings.tls_dir.mkdir(parents=True)
    make_certificates(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings.tls_dir / "edge.crt", settings.tls_dir / "edge.key")
    return context


@pytest.mark.parametrize("alpn", [[], ["http/1.1"], ["h2", "http/1.1"]])
async def test_many_requests_to_a_port_of_tls(
    rig: Rig, contexts: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, alpn: list[str]
) -> None:  # fmt: skip
    """The first shows it; handshakes are made within the ramp, and one at a time until it is known what is spoken."""
    monkeypatch.setattr(upstream, "_TLS_SECONDS", 5.0)  # the rig's 0.2 are short for 20 handshakes on a busy machine
    handshakes = most = 0
    if alpn:
        contexts.set_alpn_protocols(alpn)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal handshakes, most
        tls = writer.get_extra_info("ssl_object")
        handshakes += 1
        if tls.selected_alpn_protocol() != "h2":
            while True:
                await rig.head(reader)
                writer.write(OK)
        await serve_h2(reader, writer, lambda stream: f.headers(stream, f.encode_status(200), True))

    rig.script = script
    rig.application.close()
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port, ssl=contexts)
    assert await asyncio.gather(*(ask(rig, "GET") for _ in range(20))) == [200] * 20
    (pool,) = rig.worker.upstream.pools()
    assert pool.tls == pools.TLS and pool.connecting == 0 and not pool.shared_connecting
    if "h2" in alpn:
        assert handshakes == 1 and len(pool.shared) == 1 and not pool.open
    else:
        assert not pool.shared and pool.open == set(pool.idle) and handshakes == len(pool.open)
    assert await ask(rig, "POST", "Content-Length: 2", body=b"ok") == 200


async def test_a_port_of_tls_is_known_after_a_sleep_until_another_application_listens_there(rig: Rig, contexts: ssl.SSLContext) -> None:
    """A request with content that wakes its application cannot be sent once more to find out."""
    post = ("POST", "Content-Length: 2")
    rig.script = rig.echo
    rig.application.close()
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port, ssl=contexts)
    assert await ask(rig, "GET") == 200
    for incarnation in (1, 2):
        await rig.control.change("hold", incarnation, is_live=False)
        await rig.control.change("open", incarnation + 1)
        assert await ask(rig, *post, body=b"ok") == 200
    rig.application.close()
    await rig.control.change("hold", 3, is_live=False)
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port)
    await rig.control.change("open", 4)
    assert [await ask(rig, *post, body=b"ok") for _ in range(2)] == [502, 200]
    await rig.control.change("refuse", 4, is_live=False)
    assert not rig.worker.upstream._spoke_tls


async def test_a_port_that_speaks_neither_is_not_asked_for_tls_again(rig: Rig) -> None:
    firsts = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        firsts.append(await reader.read(3))
        writer.write(b"220 smtp.example ESMTP\r\n")

    rig.script = script
    for _ in range(2):
        assert await ask(rig, "GET") == 502
    assert firsts == [b"GET", b"\x16\x03\x01", b"GET"]


async def test_an_application_that_speaks_before_it_is_asked_is_answered_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example ESMTP\r\n")
        await reader.read()

    rig.script = script
    assert await ask(rig, "POST") == 502
    assert rig.worker.routes.account("s1").waiting == 0
