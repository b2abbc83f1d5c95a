"""Conversations through a real worker: framing, errors, reuse, holding. The application side is written byte by byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from edge_rig import HOST, OK, Rig, response
from waiting import turn, until

from gateway.messages import Route


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(head_seconds=0.5, idle_seconds=5, hold_seconds=5, connect_seconds=0.2)
    yield one
    await one.stop()


async def test_pipelined_requests_are_answered_in_order_on_one_connection(rig: Rig) -> None:
    answers = await rig.ask(b"".join(rig.request(f"/{n}") for n in range(50)), 50)
    assert [body for _, _, body in answers] == [b"/%d" % n for n in range(50)]
    assert rig.connects == 1
    assert len({fields["x-amzn-requestid"] for _, fields, _ in answers}) == 50


async def test_a_long_pipeline_of_refusals_is_answered_without_recursion(rig: Rig) -> None:
    data = rig.request("/x", token="no") * 3000
    assert {status for status, _, _ in await rig.ask(data, 3000)} == {403}


async def test_token_never_reaches_the_application(rig: Rig) -> None:
    await rig.ask(rig.request() + rig.request(), 2)
    assert rig.token.encode() not in rig.received and b"x-aws-proxy" not in rig.received.lower()
    assert rig.received.count(b"x-amzn-requestid: ") == 2


async def test_memory_of_a_token_ends_with_it(rig: Rig) -> None:
    """The fast path must not outlive what it remembers: the token, the keys, the route."""
    reader, writer = await rig.open()
    for _ in range(2):
        writer.write(rig.request())
        assert (await response(reader))[0] == 200
    rig.now += 601
    writer.write(rig.request())
    status, _, body = await response(reader)
    assert (status, body) == (403, b"Token authentication failed") and rig.received.count(b"GET ") == 2
    writer.close()


async def test_memory_of_a_route_ends_with_it(rig: Rig) -> None:
    reader, writer = await rig.open()
    for gate, session, expected in (("open", "s1", 200), ("refuse", "s1", 502), ("open", "s1", 200), ("open", "s2", 403)):
        await rig.control.change(gate, session=session)
        for _ in range(2):
            writer.write(rig.request())
            assert (await response(reader))[0] == expected
    writer.close()


async def test_absolute_form_cannot_borrow_an_admitted_host(rig: Rig) -> None:
    """Same fields to the byte, another host in the request line: not what was remembered."""
    reader, writer = await rig.open()
    writer.write(rig.request())
    assert (await response(reader))[0] == 200
    other = rig.request().replace(b"GET / ", b"GET http://other.localhost/ ")
    writer.write(other)
    assert (await response(reader))[0] == 403
    writer.close()


async def test_unknown_host_is_looked_up_once_and_reads_as_a_bad_token(rig: Rig) -> None:
    token = rig.minter.mint("s2", [(1, 65535)], 600)
    data = rig.request(host="none.localhost", token=token) * 3
    assert {(status, body) for status, _, body in await rig.ask(data, 3)} == {(403, b"Token authentication failed")}
    assert rig.control.lookups == ["none.localhost"]
    rig.control.hidden["late.localhost"] = Route("late.localhost", "s2", 1, "open")
    assert (await rig.ask(rig.request(host="late.localhost", token=token)))[0][0] == 200


async def test_a_token_of_a_session_that_is_known_looks_up_no_other_host(rig: Rig) -> None:
    ((status, _, body),) = await rig.ask(rig.request(host="none.localhost"))
    assert (status, body) == (403, b"Token authentication failed") and rig.control.lookups == []


async def test_while_control_is_away_a_host_that_is_not_known_yet_is_unavailable_and_no_token_is_blamed(rig: Rig) -> None:
    rig.servers.pop(0).close()
    await until(lambda: not rig.worker.link.is_connected)
    late = rig.minter.mint("s2", [(1, 65535)], 600)
    ((status, _, body),) = await rig.ask(rig.request(host="late.localhost", token=late))
    assert (status, body) == (502, b"")
    answers = [await rig.ask(rig.request(host=host, token=rig.token)) for host in ("late.localhost", "none.localhost")]
    assert {(status, body) for ((status, _, body),) in answers} == {(403, b"Token authentication failed")}, "no token shows what exists"
    assert (await rig.ask(rig.request("/known")))[0][2] == b"/known"


@pytest.mark.parametrize(
    ("fields", "body"),
    [("Content-Length: 11", b"hello world"), ("Transfer-Encoding: chunked", b"5\r\nhello\r\n6\r\n world\r\n0\r\nsum: 1\r\n\r\n")],
)
@pytest.mark.parametrize("cut", [0, 1, 7, 1000])
async def test_bodies_arrive_to_the_byte_and_what_follows_is_the_next_request(rig: Rig, fields: str, body: bytes, cut: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        rig.received += await reader.readexactly(len(body))
        writer.write(OK)
        await rig.answer_all(reader, writer)

    rig.script = script
    reader, writer = await rig.open()
    data = rig.request("/", fields, method="POST") + body + rig.request("/next")
    if cut == 0:
        writer.write(data)
    else:
        for at in range(0, len(data), cut):
            writer.write(data[at : at + cut])
            await turn()
    assert (await response(reader))[2] == b"ok"
    assert (await response(reader))[2] == b"/next"
    assert body in rig.received and rig.connects == 1
    writer.close()


SMUGGLING = [
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"),
    (b"Content-Length: 4\r\nContent-Length: 5", b"abcd"),
    (b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
    (b"Transfer-Encoding : chunked", b"0\r\n\r\n"),
    (b"X: a\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    (b"Transfer-Encoding: chunked", b"5\nhello\n0\n\n"),
    (b"Transfer-Encoding: chunked", b"0x5\r\nhello\r\n0\r\n\r\n"),
]


@pytest.mark.parametrize(("fields", "body"), SMUGGLING)
async def test_smuggling_is_refused_and_the_connection_ends(rig: Rig, fields: bytes, body: bytes) -> None:
    reader, writer = await rig.open()
    head = rig.request(method="POST")[:-2] + fields + b"\r\n\r\n"
    writer.write(head + body + rig.request("/evil"))
    status, answer, _ = await response(reader)
    assert status == 400 and answer["connection"] == "close"
    assert await asyncio.wait_for(reader.read(), 5) == b"" and b"/evil" not in rig.received
    writer.close()


async def test_early_answer_ends_the_upload_and_the_connection(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request("/", "Content-Length: 1000000", method="PUT") + b"x" * 1000)
    status, fields, _ = await response(reader)
    assert (status, fields["connection"]) == (413, "close")
    writer.close()


async def test_interim_answers_and_expect(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Expect: 100-continue" in await rig.head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        rig.received += await reader.readexactly(3)
        writer.write(OK)

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request("/", "Content-Length: 3", "Expect: 100-continue", method="POST"))
    assert [(await response(reader))[0] for _ in range(2)] == [103, 100]
    writer.write(b"abc")
    assert (await response(reader))[2] == b"ok"
    writer.close()


async def test_answers_without_bodies(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await rig.head(reader):
            if head.startswith(b"HEAD"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            elif b"/204" in head:
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            elif b"/304" in head:
                writer.write(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 50\r\n\r\n")
            else:
                writer.write(OK)

    rig.script = script
    reader, writer = await rig.open()
    for method, target, status in (("HEAD", "/", 200), ("GET", "/204", 204), ("GET", "/304", 304), ("GET", "/", 200)) * 2:
        writer.write(rig.request(target, method=method))
        assert (await response(reader, no_body=method == "HEAD" or status == 304))[0] == status
    assert rig.connects == 1
    writer.close()


BROKEN = {
    "nothing": b"",
    "garbage": b"\x00\x01\x02 hello\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a coding that is not chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "chunked in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an upgrade nobody asked for": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000,
    "a large head": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + b"x" * 40_000 + b"\r\n\r\nok",
    "interim responses without end": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000,
}


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_applications_read_as_502(rig: Rig, case: str) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(BROKEN[case])

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request())
    status, fields, body = await response(reader)
    while status == 103:
        status, fields, body = await response(reader)
    assert (status, body) == (502, b"") and fields["cache-control"] == "private, no-store"
    rig.script = rig.answer_all
    writer.write(rig.request("/after"))  # the client's connection is as good as before
    assert (await response(reader))[2] == b"/after"
    writer.close()


SLOPPY = {
    "both framings": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"2\r\nok\r\n0\r\n\r\n",
    ),
    "two equal lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "a list of equal lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", b"ok"),
    "a control character": (b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "bare LF": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", b"ok"),
}


@pytest.mark.parametrize("case", SLOPPY)
async def test_sloppy_applications_are_understood_as_other_proxies_do(rig: Rig, case: str) -> None:
    sent, received = SLOPPY[case]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await rig.head(reader)
            writer.write(sent)

    rig.script = script
    reader, writer = await rig.open()
    for _ in range(2):  # seen first, and from memory
        writer.write(rig.request())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and head.count(b"\n") == head.count(b"\r\n") and b"\x01" not in head
        assert head.lower().count(b"\r\ncontent-length: 2\r\n") + head.lower().count(b"\r\ntransfer-encoding: chunked\r\n") == 1
        assert await reader.readexactly(len(received)) == received
    writer.close()


async def test_trailers_that_may_not_go_on_do_not(rig: Rig) -> None:
    """Neither way, and whether or not the application's connection is there yet; extensions are left out."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await rig.head(reader)
            rig.received += await reader.readuntil(b"0\r\n") + await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nx-amzn-requestid: 1\r\nSum: 2\r\n\r\n")

    rig.script = script
    body = b"5;x=y\r\nhello\r\n0\r\nAuthorization: evil\r\nX-aws-proxy-auth: evil\r\nContent-Length: 666\r\nSum: 1\r\n\r\n"
    reader, writer = await rig.open()
    for _ in range(2):
        rig.received = b""
        writer.write(rig.request("/", "Transfer-Encoding: chunked", method="POST") + body)
        assert (await response(reader))[0] == 200
        assert await reader.readuntil(b"\r\n\r\n") == b"2\r\nok\r\n0\r\nsum: 2\r\n\r\n"
        assert rig.received.endswith(b"5\r\nhello\r\n0\r\nsum: 1\r\n\r\n") and b"evil" not in rig.received and b"666" not in rig.received
    writer.close()


async def test_answers_have_a_date_and_one_request_id(rig: Rig) -> None:
    """RFC 9110, 6.6.1, of our own answers and of an application's that has none; what an application says of an id is not heard."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for date in (b"", b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n") * 2:
            await rig.head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\n" + date + b"x-amzn-requestid: spoofed\r\nContent-Length: 2\r\n\r\nok")

    rig.script = script
    reader, writer = await rig.open()
    for expected in (None, "Sun, 06 Nov 1994 08:49:37 GMT") * 2:
        writer.write(rig.request("/", "x-amzn-requestid: spoofed", "X_Amzn_RequestId: spoofed"))
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()
        await reader.readexactly(2)
        (date,) = [line[6:] for line in head.split("\r\n") if line.startswith("Date: ")]
        assert date == expected if expected else abs(parsedate_to_datetime(date).timestamp() - time.time()) < 5
        assert head.lower().count("x-amzn-requestid") == 1 and "spoofed" not in head and b"spoofed" not in rig.received
    writer.close()
    assert b"spoofed" not in rig.received
    for data in (rig.request(token="no"), b"GET /\r\n\r\n"):
        fields = (await rig.ask(data))[0][1]
        assert abs(parsedate_to_datetime(fields["date"]).timestamp() - time.time()) < 5


async def test_max_forwards_that_is_used_up_is_answered_here(rig: Rig) -> None:
    (status, _, body), (refused, _, _) = await rig.ask(
        rig.request("/", "Max-Forwards: 0", method="OPTIONS") + rig.request("/", "Max-Forwards: 0", method="TRACE"), 2
    )
    assert (status, body, refused) == (200, b"", 501) and not rig.received
    assert (await rig.ask(rig.request("/", "Max-Forwards: 0", method="OPTIONS", token="no")))[0][0] == 403
    assert (await rig.ask(rig.request("/a", "Max-Forwards: 0")))[0][2] == b"/a"  # of a GET it says nothing
    assert (await rig.ask(rig.request("/b", "Max-Forwards: 1", method="OPTIONS")))[0][2] == b"/b" and b"Max-Forwards: 0" in rig.received


async def test_an_answer_cut_short_is_seen_as_cut_short(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request())
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await response(reader)
    writer.close()


async def test_bytes_after_an_answer_are_not_the_next_clients(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if rig.connects == 1:
            await rig.head(reader)
            writer.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await rig.answer_all(reader, writer)

    rig.script = script
    assert (await rig.ask(rig.request()))[0][2] == b"ok"
    assert (await rig.ask(rig.request("/mine")))[0][2] == b"/mine"
    assert rig.connects == 2


async def test_nothing_listens(rig: Rig) -> None:
    closed = rig.request().replace(str(rig.app_port).encode(), b"1")
    rig.worker.settings.hold_seconds = 0.1
    assert (await rig.ask(closed))[0][0] == 502
    rig.worker.settings.hold_seconds = 5


async def test_tunnel_both_ways_with_early_bytes(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await rig.head(reader)
        assert b"Upgrade: websocket" in head and b"chat" in head and rig.token.encode() not in head
        writer.write(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
        while data := await reader.read(100):
            writer.write(data.upper())

    rig.script = script
    reader, writer = await rig.open()
    writer.write(
        f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: lambda-microvms, "
        f"lambda-microvms.authentication.{rig.token}, lambda-microvms.port.{rig.app_port}, chat\r\n\r\nfirst".encode()
    )
    status, fields, _ = await response(reader)
    assert status == 101 and fields["sec-websocket-protocol"] == "lambda-microvms"
    assert await reader.readexactly(10) == b"earlyFIRST"
    writer.write(b"more")
    assert await reader.readexactly(4) == b"MORE"
    writer.close()


async def test_a_switch_to_another_protocol_than_the_one_asked_for_makes_no_tunnel(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")

    rig.script = script
    answers = await rig.ask(rig.request("/", "Connection: upgrade", "Upgrade: websocket"))
    assert answers[0][0] == 502
    await rig.ask(rig.request("/", "Connection: upgrade", "Upgrade: h2c"))
    assert b"Upgrade: h2c" not in rig.received


# ---- holding ----


async def held(rig: Rig) -> asyncio.Task[list[tuple[int, dict[str, str], bytes]]]:
    """A request to a session that sleeps, which control was asked to resume."""
    await rig.control.change("hold", is_live=False)
    pending = asyncio.create_task(rig.ask(rig.request("/held")))
    await until(lambda: rig.control.resumed)
    return pending


async def test_a_connection_is_made_before_the_guest_runs(rig: Rig) -> None:
    """Control says that the next incarnation is about to run: held requests go on waiting, and find a connection."""
    pending = await held(rig)
    rig.control.change("hold", incarnation=2, is_live=True)
    await until(lambda: rig.connects)
    assert not rig.received and len(rig.control.resumed) == 1
    rig.control.change("open", incarnation=2)
    assert (await pending)[0][0] == 200 and rig.connects == 1


async def test_a_connection_ahead_that_found_nobody_says_nothing_of_later(rig: Rig) -> None:
    pending = await held(rig)
    rig.vmm.away = True
    rig.control.change("hold", incarnation=2, is_live=True)
    await until(lambda: rig.vmm.refused)
    rig.vmm.away = False
    rig.control.change("open", incarnation=2)
    assert (await pending)[0][0] == 200


async def test_sockets_are_asked_for_again_when_vmm_is_restarted(rig: Rig) -> None:
    rig.vmm.drops = 2
    await rig.control.change("open", incarnation=2)
    assert (await rig.ask(rig.request("/")))[0][0] == 200 and not rig.vmm.drops


async def test_a_connection_ahead_that_fails_is_made_again(rig: Rig) -> None:
    pending = await held(rig)
    rig.application.close()
    await rig.application.wait_closed()
    await rig.control.change("hold", incarnation=2, is_live=True)
    await until(lambda: all(task.done() for task in rig.worker.upstream.incarnation("s1", 2).preconnected.values()))
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port)
    rig.control.change("open", incarnation=2)
    assert (await pending)[0][0] == 200


async def test_held_requests_resume_once_and_go_on(rig: Rig) -> None:
    await rig.control.change("hold")
    pending = [asyncio.create_task(rig.ask(rig.request(f"/{n}"))) for n in range(40)]
    await until(lambda: rig.worker.holds.statistics()["requests"] == 40)
    assert len(rig.control.resumed) == 1 and not rig.received
    rig.control.change("open", incarnation=2)
    answers = [(await task)[0] for task in pending]
    assert sorted(body for _, _, body in answers) == sorted(b"/%d" % n for n in range(40))
    assert all(fields["server-timing"].startswith("hold;dur=") for _, fields, _ in answers)
    assert rig.received.count(b"GET ") == 40


async def test_held_body_waits_and_a_token_that_expires_meanwhile_is_good(rig: Rig) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        body = await reader.readexactly(300_000)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n%d" % len(body))

    rig.script = script
    await rig.control.change("hold")
    task = asyncio.create_task(rig.ask(rig.request("/", "Content-Length: 300000", method="POST") + b"x" * 300_000))
    await until(lambda: rig.control.resumed)
    rig.now += 601
    rig.control.change("open", incarnation=2)
    assert (await task)[0][2] == b"300000"


async def test_hold_has_a_deadline_and_a_client_that_leaves_is_forgotten(rig: Rig) -> None:
    rig.worker.settings.hold_seconds = 0.1
    await rig.control.change("hold")
    assert (await rig.ask(rig.request()))[0][0] == 502
    rig.worker.settings.hold_seconds = 5
    _, writer = await rig.open()
    writer.write(rig.request())
    await until(lambda: rig.worker.holds.statistics()["requests"])
    writer.transport.abort()
    await until(lambda: not rig.worker.holds.statistics()["requests"])
    assert rig.worker.routes.account("s1").waiting == 0


async def test_too_many_held(rig: Rig) -> None:
    rig.worker.settings.held_requests = 2
    await rig.control.change("hold")
    waiting = [asyncio.create_task(rig.ask(rig.request())) for _ in range(2)]
    await until(lambda: rig.worker.holds.statistics()["requests"] == 2)
    status, fields, _ = (await rig.ask(rig.request()))[0]
    assert (status, fields["retry-after"]) == (429, "1")
    rig.control.change("open", incarnation=2)
    assert {(await task)[0][0] for task in waiting} == {200}


async def test_stale_incarnation_is_asked_for_again(rig: Rig) -> None:
    """vmm says that the incarnation is gone before control has told us: the request waits for the news."""
    rig.vmm.gone = {1, 2}
    rig.control.change("hold")
    await rig.control.change("open", incarnation=2)
    task = asyncio.create_task(rig.ask(rig.request("/x")))
    await until(lambda: rig.vmm.refused > 1)
    rig.control.change("open", incarnation=3)
    assert (await task)[0][2] == b"/x"
    rig.worker.upstream.incarnation_ended("s1", 3)


# ---- bounds ----


async def test_slow_and_oversized_heads(rig: Rig) -> None:
    reader, writer = await rig.open()
    writer.write(b"GET / HT")
    status, fields, _ = await response(reader)
    assert (status, fields["connection"]) == (408, "close")
    writer.close()
    assert (await rig.ask(b"GET / HTTP/1.1\r\nX: " + b"x" * 33_000))[0][0] == 431
    assert (await rig.ask(rig.request("/", *["X: y"] * 201)))[0][0] == 431


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"\x16\x03\x01\x00\xa5\x01\x00", 408), (b"\x00" * 100 + b"\r\n\r\n", 400), (b"SSH-2.0-x\r\n\r\n", 400), (b"GET /\r\n\r\n", 400)],
)
async def test_garbage(rig: Rig, data: bytes, expected: int) -> None:
    status, fields, _ = (await rig.ask(data))[0]
    assert status == expected and fields["connection"] == "close"


async def test_a_client_that_does_not_read_stops_the_application(rig: Rig) -> None:
    """Back-pressure: a response of any size is held in bounded memory."""
    sent = 0
    applications: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        applications.append(writer)
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        while sent < 200_000_000:
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    rig.script = script
    _, writer = await rig.open()
    writer.write(rig.request())
    (origin,) = await until(lambda: [one for pool in rig.worker.upstream.pools() for one in pool.open])
    await until(lambda: origin.transport is not None and not origin.transport.is_reading())
    await until(lambda: applications[0].transport.get_write_buffer_size() > 64 << 10)  # the kernels' buffers are full, too
    assert sent < 30_000_000  # what kernels and the two bounds hold
    writer.transport.abort()
