"""What holds for any conversation: cuts do not matter, and nothing is left of it, whatever was said."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from hypothesis import given
from hypothesis import strategies as st
from waiting import turn, until

from gateway.edge.wire import http2_frames as f

FEW = hypothesis.settings(max_examples=25, deadline=None)
Work = Callable[[Rig], Awaitable[None]]


def with_rig(work: Work, http2: bool = False, **settings: Any) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            rig = Rig(Path(directory), patch)
            rig.script = rig.echo
            await rig.start(http2=http2, hold_seconds=2, connect_seconds=0.1, **settings)
            try:
                await work(rig)
            finally:
                await rig.stop()

    asyncio.run(run())


async def settled(rig: Rig) -> None:
    """Nothing is left: no client, held request, task, stream, or request that waits; and every idle connection is read."""
    worker = rig.worker

    def left() -> tuple[int, ...]:
        upstream = worker.upstream.statistics()
        streams = sum(len(one.streams) for pool in worker.upstream.pools() for one in pool.shared)
        return (
            len(worker.clients),
            worker.holds.statistics()["requests"],
            len(worker.tasks) - 2,
            upstream["open"] - upstream["idle"] + streams,
            worker.routes.account("s1").waiting,
        )

    try:
        await until(lambda: not any(left()))
    except TimeoutError:
        raise AssertionError(f"clients, held, tasks, busy origins, waiting: {left()}") from None
    assert all(origin.is_reusable and origin.transport is not None and origin.transport.is_reading() for origin in worker.upstream.idle())


BODIES = st.binary(max_size=300)


@FEW
@given(st.lists(st.tuples(st.sampled_from(["GET", "length", "chunks"]), BODIES), min_size=1, max_size=5), st.data())
def test_any_cut_of_http1_reads_the_same(requests: list[tuple[str, bytes]], data: st.DataObject) -> None:
    cuts = [data.draw(st.integers(1, 200)) for _ in range(8)]

    async def work(rig: Rig) -> None:
        whole = b""
        for kind, body in requests:
            if kind == "GET":
                whole += rig.request("/x")
            elif kind == "length":
                whole += rig.request("/x", f"Content-Length: {len(body)}", method="POST") + body
            else:
                pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:100], body[100:]) if part)
                whole += rig.request("/x", "Transfer-Encoding: chunked", method="POST") + pieces + b"0\r\n\r\n"
        reader, writer = await rig.open()
        at = number = 0
        while at < len(whole):
            step = cuts[number % len(cuts)]
            writer.write(whole[at : at + step])
            await turn()
            at, number = at + step, number + 1
        for kind, body in requests:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert await reader.readexactly(length) == (b"" if kind == "GET" else body)
        writer.close()
        await settled(rig)

    with_rig(work)


@FEW
@given(st.lists(BODIES, min_size=1, max_size=5), st.data())
def test_any_cut_of_http2_reads_the_same(bodies: list[bytes], data: st.DataObject) -> None:
    cuts = [data.draw(st.integers(1, 120)) for _ in range(8)]

    async def work(rig: Rig) -> None:
        reader, writer = await rig.open()
        client = Judge(reader, writer)
        sent: list[bytes] = []
        client.flush = lambda: sent.append(client.h2.data_to_send())  # type: ignore[method-assign]
        fields = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", "/x"),
            (":authority", HOST),
            ("x-aws-proxy-auth", rig.token),
            ("x-aws-proxy-port", str(rig.app_port)),
        ]
        numbers = [client.ask(fields, body) for body in bodies]
        whole, at, number = b"".join(sent), 0, 0
        while at < len(whole):
            step = cuts[number % len(cuts)]
            writer.write(whole[at : at + step])
            await turn()
            at, number = at + step, number + 1
        del client.flush
        for one, body in zip(numbers, bodies, strict=True):
            answer = await client.answer(one)
            assert (answer.status, answer.body) == (200, body)
        writer.close()
        await settled(rig)

    with_rig(work, http2=True)


def block_of(token: str, port: int) -> bytes:
    return f.encode([
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/x"), (b":authority", HOST.encode()),
        (b"x-aws-proxy-auth", token.encode()), (b"x-aws-proxy-port", str(port).encode()),
    ])  # fmt: skip


def any_frames(token: str, port: int) -> st.SearchStrategy[bytes]:
    """Good ones, bad ones, on few streams, so that they meet."""
    number = st.integers(0, 9)
    block = block_of(token, port)
    payload = st.binary(max_size=40)
    return st.one_of(
        st.builds(lambda n, end: f.headers(n | 1, block, end), number, st.booleans()),
        st.builds(lambda n, data, end: f.frame(f.DATA, end, n | 1, data), number, payload, st.sampled_from([0, 1])),
        st.builds(lambda n: f.rst_stream(n | 1, f.Code.CANCEL), number),
        st.builds(f.window_update, number, st.integers(1, 100_000)),
        st.builds(f.frame, st.integers(0, 11), st.integers(0, 255), number, payload),
        st.just(f.frame(f.PING, 0, 0, b"12345678")), st.just(f.settings({f.INITIAL_WINDOW_SIZE: 10})), st.just(f.settings({f.INITIAL_WINDOW_SIZE: 70_000})),
    )  # fmt: skip


@hypothesis.settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["open", "hold", "reopen"]))
def test_any_frames_leave_nothing_behind(data: st.DataObject, gate: str) -> None:
    async def work(rig: Rig) -> None:
        if gate != "open":
            await rig.control.change("hold")
        reader, writer = await rig.open()
        writer.write(f.PREFACE + f.settings({}))
        heard = asyncio.create_task(everything(reader))
        for one in data.draw(st.lists(any_frames(rig.token, rig.app_port), max_size=25)):
            writer.write(one)
            if data.draw(st.integers(0, 3)) == 0:
                await turn()
        if gate == "reopen":
            await rig.control.change("open", incarnation=2)
        for _ in range(data.draw(st.integers(0, 20))):
            await turn()
        await until(lambda: rig.worker.clients or heard.done())
        for client in rig.worker.clients:
            client.transport.close()  # type: ignore[union-attr]  # behind whatever it has said
        in_order(await asyncio.wait_for(heard, 5))
        writer.close()
        await settled(rig)

    with_rig(work, http2=True)


async def everything(reader: asyncio.StreamReader) -> bytes:
    """Until the end, or a reset: bytes that nobody read make one of it."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(65536):
            data += more
    return data


class Heard:
    """One stream's answer."""

    def __init__(self) -> None:
        self.heads = 0
        self.body = b""
        self.ended = False
        self.reset: int | None = None


def in_order(data: bytes, is_whole: bool = False) -> dict[int, Heard]:
    """What was answered on each stream. Whatever was said to the edge, its own frames keep the rules: SETTINGS first, on a stream a head
    before content, nothing behind its end but a reset, nothing behind a reset, and no GOAWAY that takes back more than an earlier one."""
    streams: dict[int, Heard] = {}
    at, last = 0, 2**31
    assert not data or data[3] == f.SETTINGS
    while len(data) - at >= 9:
        length, kind, flags = int.from_bytes(data[at : at + 3], "big"), data[at + 3], data[at + 4]
        number, payload = int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : at + 9 + length]
        at += 9 + length
        if at > len(data):
            break
        if kind == f.GOAWAY:
            assert int.from_bytes(payload[:4], "big") <= last
            last = int.from_bytes(payload[:4], "big")
        if kind not in (f.HEADERS, f.DATA, f.RST_STREAM):
            continue
        one = streams.setdefault(number, Heard())
        assert number & 1 and one.reset is None
        if kind == f.RST_STREAM:
            one.reset = int.from_bytes(payload, "big")
            continue
        assert not one.ended and (kind == f.HEADERS or one.heads)
        one.heads += kind == f.HEADERS
        one.body += payload if kind == f.DATA else b""
        one.ended = bool(flags & f.END_STREAM)
    assert not is_whole or at == len(data)
    return streams


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.booleans(), st.just(b"")),
        st.tuples(st.just("data"), st.integers(0, 9), st.binary(max_size=200)),
        st.tuples(st.just("end"), st.integers(0, 9), st.binary(max_size=200)),
        st.tuples(st.just("reset"), st.integers(0, 9), st.just(b"")),
        st.tuples(st.just("window"), st.integers(0, 9), st.just(b"")),
        st.tuples(st.sampled_from(["small", "large", "ping", "turn", "suspend"]), st.just(0), st.just(b"")),
    ),
    max_size=40,
)  # fmt: skip


@FEW
@given(STEPS)
def test_any_conversation_within_the_rules_is_answered_to_the_byte(steps: list[tuple[str, int, bytes]]) -> None:
    """Uploads on several streams at once, in any order, with resets, small windows and a suspend in between: each request that was
    completed is answered with what it sent, and nothing else is answered."""

    async def work(rig: Rig) -> None:
        block, incarnation = block_of(rig.token, rig.app_port), 1
        reader, writer = await rig.open()
        writer.write(f.PREFACE + f.settings({}))
        sent: dict[int, bytes] = {}
        open_, complete, reset = list[int](), set[int](), set[int]()
        for what, choice, payload in steps:
            number = open_[choice % len(open_)] if open_ else 0
            if what == "open" and len(sent) < 60:
                number = 2 * len(sent) + 1
                sent[number] = b""
                writer.write(f.headers(number, block, bool(choice)))
                complete.add(number) if choice else open_.append(number)
            elif what in ("data", "end") and number:
                sent[number] += payload
                writer.write(f.frame(f.DATA, f.END_STREAM if what == "end" else 0, number, payload))
                if what == "end":
                    open_.remove(number)
                    complete.add(number)
            elif what == "reset" and sent:
                number = 2 * (choice % len(sent)) + 1
                reset.add(number)
                open_ = [one for one in open_ if one != number]
                writer.write(f.rst_stream(number, f.Code.CANCEL))
            elif what == "window":
                writer.write(f.window_update(number, 1 + choice))
            elif what in ("small", "large"):
                writer.write(f.settings({f.INITIAL_WINDOW_SIZE: 10 if what == "small" else 70_000}))
            elif what == "ping":
                writer.write(f.frame(f.PING, 0, 0, bytes(8)))
            elif what == "turn":
                await turn()
            elif what == "suspend" and incarnation < 3 and not open_:
                await rig.control.change("hold", incarnation)
                await until(lambda: not rig.worker.routes.account("s1").waiting)
                await rig.control.change("hold", incarnation, is_live=False)
                incarnation += 1
                await rig.control.change("open", incarnation)
        writer.write(f.settings({f.INITIAL_WINDOW_SIZE: 1 << 20}) + f.window_update(0, 1 << 20))
        expected, data = complete - reset, b""
        async with asyncio.timeout(5):
            while not all(number in (answers := in_order(data)) and answers[number].ended for number in expected):
                more = await reader.read(65536)
                assert more, "closed before everything was answered"
                data += more
        answers = in_order(data)
        for number in expected:
            assert answers[number].body == sent[number] and answers[number].heads == 1 and answers[number].reset is None
        assert not {number for number, one in answers.items() if one.heads} - complete
        writer.close()
        await settled(rig)
        rig.worker.upstream.incarnation_ended("s1", incarnation)

    with_rig(work, http2=True)


@FEW
@given(st.data())
def test_random_suspends_resumes_and_requests_lose_and_double_none(data: st.DataObject) -> None:
    """The application counts; the model is a set of the requests that were answered 200."""

    async def work(rig: Rig) -> None:
        incarnation, asked = 1, []
        seen: list[bytes] = []

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                target = (await rig.head(reader)).split(b" ")[1]
                seen.append(target)
                await asyncio.sleep(0.001)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(target), target))

        rig.script = script
        for number, step in enumerate(data.draw(st.lists(st.sampled_from(["ask", "ask", "ask", "sleep", "wait"]), max_size=30))):
            if step == "ask":
                asked.append(asyncio.create_task(rig.ask(rig.request(f"/{number}", method="POST"))))
            elif step == "sleep":  # the gate closes, what waits for a head is waited for, the incarnation ends, the next begins
                await rig.control.change("hold", incarnation)
                await until(lambda: not rig.worker.routes.account("s1").waiting)
                rig.control.change("hold", incarnation, is_live=False)
                incarnation += 1
                rig.control.change("open", incarnation)
            else:
                await asyncio.sleep(0.002)
        answers = [(await task)[0] for task in asked]
        assert all(status == 200 for status, _, _ in answers)
        assert sorted(seen) == sorted(body for _, _, body in answers)
        await settled(rig)
        rig.worker.upstream.incarnation_ended("s1", incarnation)

    with_rig(work)


class Said:
    """An application's response in HTTP/1.1, what its client must get of it, and whether it is whole."""

    def __init__(self, method: str, status: int, framing: str, pieces: list[bytes], broken: bool, extra: bytes) -> None:
        content = b"".join(pieces)
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(one), one) for one in pieces if one)
        fields, body, self.content = {
            "length": (b"Content-Length: %d\r\n" % len(content), content, content),
            "equal lengths": (b"Content-Length: %d\r\n" % len(content) * 2, content, content),
            "chunks": (b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n", content),
            "chunks beside a length": (b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n", content),
            "until close": (b"", content, content),
            "different lengths": (b"Content-Length: 1\r\nContent-Length: 2\r\n", content, b""),
        }[framing]
        self.is_refused = framing == "different lengths"
        has_content = method != "HEAD" and status == 200
        self.closes = framing == "until close" and has_content
        # A chunk's size line that is none, or content that is shorter than was said.
        self.is_broken = broken and has_content and not self.closes and not self.is_refused
        if self.is_broken:
            body = body[:-7] + b"zz\r\n" if framing.startswith("chunks") else body[:-1]
            self.is_broken = framing.startswith("chunks") or bool(content)
        if not has_content:
            body, self.content = b"", b""
        self.data = b"HTTP/1.1 %d X\r\n%b\r\n%b" % (status, fields, body) + (extra if not self.closes and not self.is_broken else b"")


async def read_answer(reader: asyncio.StreamReader, method: str) -> tuple[int, bytes, bool, bool]:
    """By framing alone, as RFC 9112, 6.3 has it: status, content, whether it is whole, and whether the connection goes on."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status, content = int(head.split(b" ")[1]), b""
    goes_on = b"\r\nconnection: close\r\n" not in head
    assert head.count(b"\r\ncontent-length:") + head.count(b"\r\ntransfer-encoding:") <= 1
    try:
        if method == "HEAD" or status in (204, 304):
            pass
        elif b"\r\ntransfer-encoding: chunked\r\n" in head:
            while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
                content += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(2) == b"\r\n"
        elif b"\r\ncontent-length: " in head:
            content = await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))
        else:
            content = await reader.read()
    except (asyncio.IncompleteReadError, ConnectionError):
        return status, content, False, False
    return status, content, True, goes_on


FRAMINGS = ["length", "equal lengths", "chunks", "chunks beside a length", "until close", "different lengths"]


@hypothesis.settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["GET", "HEAD"]), st.sampled_from([200, 200, 200, 204, 304]), st.sampled_from(FRAMINGS),
    st.lists(st.binary(min_size=1, max_size=40), max_size=4), st.booleans(), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"]),
    st.data(),
)  # fmt: skip
def test_an_answers_framing_is_checked_against_what_came(
    method: str, status: int, framing: str, pieces: list[bytes], broken: bool, extra: bytes, data: st.DataObject
) -> None:
    """Whole, it is what the application said and no more; broken, its client sees that; and the next request gets its own answer."""
    said = Said(method, status, framing, pieces, broken, extra)
    cuts = [data.draw(st.integers(1, 60)) for _ in range(6)]

    async def work(rig: Rig) -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if rig.connects == 1:
                await rig.head(reader)
                at = number = 0
                while at < len(said.data):
                    writer.write(said.data[at : at + cuts[number % len(cuts)]])
                    await turn()
                    at, number = at + cuts[number % len(cuts)], number + 1
                if said.closes or said.is_broken:
                    return
            await rig.answer_all(reader, writer)

        rig.script = script
        reader, writer = await rig.open()
        writer.write(rig.request("/first", method=method))
        got, content, is_whole, goes_on = await asyncio.wait_for(read_answer(reader, method), 5)
        if said.is_refused:
            assert (got, content, goes_on) == (502, b"", True)
        else:
            assert got == status and is_whole is not said.is_broken
            assert said.content.startswith(content) if said.is_broken else content == said.content
        if not goes_on:
            writer.close()
            reader, writer = await rig.open()
        writer.write(rig.request("/next"))
        assert await asyncio.wait_for(read_answer(reader, "GET"), 5) == (200, b"/next", True, True)
        writer.close()
        await settled(rig)

    with_rig(work)
