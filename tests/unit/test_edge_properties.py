"""What holds for any conversation: cuts do not matter, and nothing is left of it, whatever was said."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import hypothesis
import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from hypothesis import given
from hypothesis import strategies as st
from waiting import turn, until

from gateway.edge import frames as f

FEW = hypothesis.settings(max_examples=25, deadline=None)
Work = Callable[[Rig], Awaitable[None]]


def with_rig(work: Work, http2: bool = False) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            rig = Rig(Path(directory), patch)
            rig.script = rig.echo
            await rig.start(http2=http2, hold_seconds=2, connect_seconds=0.1)
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
            len(worker._tasks) - 2,
            upstream["open"] - upstream["idle"] + streams,
            worker.table.account("s1").waiting,
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


def any_frames(token: str, port: int) -> st.SearchStrategy[bytes]:
    """Good ones, bad ones, on few streams, so that they meet."""
    number = st.integers(0, 9)
    block = f.encode(
        [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", b"/x"),
            (b":authority", HOST.encode()),
            (b"x-aws-proxy-auth", token.encode()),
            (b"x-aws-proxy-port", str(port).encode()),
        ]
    )
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
        _, writer = await rig.open()
        writer.write(f.PREFACE + f.settings({}))
        for one in data.draw(st.lists(any_frames(rig.token, rig.app_port), max_size=25)):
            writer.write(one)
            if data.draw(st.integers(0, 3)) == 0:
                await turn()
        if gate == "reopen":
            await rig.control.change("open", incarnation=2)
        for _ in range(data.draw(st.integers(0, 20))):
            await turn()
        writer.transport.abort()
        await settled(rig)

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
                await until(lambda: not rig.worker.table.account("s1").waiting)
                rig.control.change("hold", incarnation, is_live=False)
                incarnation += 1
                rig.control.change("open", incarnation)
            else:
                await asyncio.sleep(0.002)
        answers = [(await task)[0] for task in asked]
        assert all(status == 200 for status, _, _ in answers)
        assert sorted(seen) == sorted(body for _, _, body in answers)
        await settled(rig)
        rig.worker.upstream.end("s1", incarnation)

    with_rig(work)
