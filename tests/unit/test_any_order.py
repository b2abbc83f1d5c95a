"""Pool, exchanges and both protocols, in any order of pause, resume, completion, reset, throttle, park and reuse.

What holds afterwards, whatever was done: every exchange has ended, by an answer, a reset or a close; nobody waits; every idle
connection is read; and where no suspend came in between, each answer was the right one, to the byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import h2.exceptions
import hypothesis
import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from hypothesis import given
from hypothesis import strategies as st
from test_edge_properties import settled, with_rig
from waiting import turn, until

from gateway import messages as m
from gateway.edge.wire.websocket import FrameCounter

PATIENCE = 20.0  # of a client, for an exchange: beyond it hangs
UPGRADED = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@dataclass(frozen=True)
class Ask:
    """One request, and how its application and its client behave."""

    h2: bool
    framing: str  # of the answer: length, chunked, close
    size: int
    upload: int
    application: str  # ok, cuts (in the middle), hangs, early (answers before the upload is whole), keeps (Keep-Alive: timeout=1)
    piece: int  # bytes that the client reads at once
    pause: int  # turns of the loop between them
    leaves: bool  # the client does not wait for the end

    @property
    def path(self) -> str:
        return f"/{self.framing}/{self.size}/{self.application}"


asks = st.builds(
    Ask, st.booleans(), st.sampled_from(["length", "chunked", "close"]), st.sampled_from([0, 5, 3000, 90_000, 300_000, 700_000]),
    st.sampled_from([0, 0, 0, 7, 70_000, 600_000]), st.sampled_from(["ok", "ok", "ok", "ok", "cuts", "hangs", "early", "keeps"]),
    st.sampled_from([100_000, 1 << 20]), st.integers(0, 6), st.sampled_from([False, False, False, True]),
)  # fmt: skip
connections = st.lists(asks, min_size=1, max_size=4)
steps = st.lists(
    st.one_of(
        connections.map(lambda found: ("client", found)), connections.map(lambda found: ("client", found)),
        st.sampled_from([("tunnel", True), ("tunnel", False), ("suspend", True), ("suspend", False), ("throttle", None)]),
        st.integers(1, 30).map(lambda count: ("turns", count)),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


async def application(rig: Rig, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await rig.head(reader)
        if b"Upgrade: websocket" in head:
            writer.write(UPGRADED)
            while data := await reader.read(65536):
                writer.write(data)
            return
        _, framing, size, behaviour = head.split(b" ")[1].split(b"/")
        fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n"))}
        early = behaviour == b"early"
        if not early:
            await body(reader, fields)
        if behaviour == b"hangs":
            await reader.read()
            return
        answer(writer, framing, int(size), behaviour)
        await writer.drain()
        if framing == b"close" or behaviour == b"cuts":
            writer.write_eof() if behaviour != b"cuts" else writer.transport.abort()
            return
        if early:
            await body(reader, fields)


async def body(reader: asyncio.StreamReader, fields: dict[bytes, bytes]) -> None:
    if fields.get(b"transfer-encoding") == b"chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")
    else:
        await reader.readexactly(int(fields.get(b"content-length", b"0")))


def answer(writer: asyncio.StreamWriter, framing: bytes, size: int, behaviour: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Keep-Alive: timeout=1\r\n" if behaviour == b"keeps" else b""))
    content = bytes(size)
    if behaviour == b"cuts":
        content = content[: size // 2]
    if framing == b"length":
        writer.write(b"Content-Length: %d\r\n\r\n" % (size + (behaviour == b"cuts")) + content)
    elif framing == b"chunked":
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(content), 50_000):
            piece = content[at : at + 50_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if behaviour != b"cuts":
            writer.write(b"0\r\n\r\n")
    else:
        writer.write(b"\r\n" + content)


class Cut(Exception):
    """The answer ended before its end."""


async def read_slowly(reader: asyncio.StreamReader, ask: Ask, size: int) -> int:
    """Up to `size` bytes, as slowly as this client is; -1: to the end of the connection."""
    got = 0
    while got != size:
        data = await reader.read(ask.piece if size < 0 else min(ask.piece, size - got))
        if not data:
            if size < 0:
                return got
            raise Cut
        got += len(data)
        for _ in range(ask.pause):
            await turn()
    return got


async def answer_of_http1(reader: asyncio.StreamReader, ask: Ask) -> tuple[int, int, bool]:
    """Status, bytes of content, and whether the connection goes on."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status, goes_on = int(head.split(b" ")[1]), b"connection: close" not in head
        if b"transfer-encoding: chunked" in head:
            got = 0
            while size := int(await reader.readuntil(b"\r\n"), 16):
                got += await read_slowly(reader, ask, size)
                await reader.readexactly(2)
            await reader.readexactly(2)
            return status, got, goes_on
        if b"content-length: " in head:
            return status, await read_slowly(reader, ask, int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])), goes_on
        return status, await read_slowly(reader, ask, -1), False
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Cut from error


async def http1(rig: Rig, found: list[Ask], results: list[tuple[Ask, Any]]) -> None:
    """The requests that are not of HTTP/2, one after another on a connection that is made again where it was closed."""
    reader, writer = await rig.open()
    for ask in found:
        fields = [f"Content-Length: {ask.upload}"] if ask.upload else []
        try:
            writer.write(rig.request(ask.path, *fields, method="POST" if ask.upload else "GET") + bytes(ask.upload))
            if ask.leaves or ask.application == "hangs":
                for _ in range(5 * ask.pause):
                    await turn()
                if ask.leaves:  # with a reset; else its end looks as if only its half had ended
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                raise Cut
            async with asyncio.timeout(PATIENCE):
                status, got, goes_on = await answer_of_http1(reader, ask)
            results.append((ask, (status, got)))
        except (Cut, ConnectionError):
            results.append((ask, None))
            goes_on = False
        if not goes_on:
            writer.close()
            reader, writer = await rig.open()
    writer.close()


async def http2(rig: Rig, found: list[Ask], results: list[tuple[Ask, Any]]) -> None:
    """All of them at once, as streams of one connection whose windows open slowly."""
    reader, writer = await rig.open()
    client = Judge(reader, writer)
    numbers: dict[int, Ask] = {}
    try:
        for ask in found:
            fields = [
                (":method", "POST" if ask.upload else "GET"), (":scheme", "https"), (":authority", HOST), (":path", ask.path),
                ("x-aws-proxy-auth", rig.token), ("x-aws-proxy-port", str(rig.app_port)),
            ]  # fmt: skip
            numbers[client.ask(fields, bytes(min(ask.upload, 15_000)) if ask.upload else None)] = ask
        async with asyncio.timeout(PATIENCE):
            for number, ask in numbers.items():
                if ask.leaves or ask.application == "hangs":
                    client.h2.reset_stream(number)
                    client.flush()
                    client.answers[number].reset = 8
            while any(not one.ended and one.reset is None for one in client.answers.values()):
                if not await client.turn():
                    break
                for _ in range(found[0].pause):
                    await turn()
    except (ConnectionError, h2.exceptions.ProtocolError):
        pass
    for number, ask in numbers.items():
        one = client.answers[number]
        results.append((ask, (one.status, len(one.body)) if one.ended else None))
    writer.close()


async def tunnel(rig: Rig, stays: bool, done: asyncio.Event) -> None:
    """A WebSocket that says a word, and another one when all else is over: it was parked meanwhile, perhaps."""
    reader, writer = await rig.open()
    fields = ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
    writer.write(rig.request("/", *fields))
    word = b"\x81\x83\0\0\0\0abc"
    try:
        async with asyncio.timeout(PATIENCE):
            if b" 101 " in await reader.readuntil(b"\r\n\r\n"):
                writer.write(word)
                got = await reader.readexactly(len(word))
                if stays:
                    await done.wait()
                    writer.write(word)
                    counter = FrameCounter()
                    got = await reader.read(100)
                    counter.feed(got)
                assert got in (word, b"") or got.startswith(b"\x88"), got
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def suspend(rig: Rig, incarnation: int, parks: bool) -> None:
    """Gate, drain, sleep; the next request or word wakes it, or it is woken at once."""
    await rig.control.change("hold", incarnation)
    (connection,) = rig.control.connections
    request = m.DrainRequest("s1", incarnation, 0.05, True, 8 if parks else 0)
    await connection.call("drain", request, m.Drained)
    await rig.control.change("hold", incarnation, is_live=False)
    await rig.control.change("open", incarnation + 1)


async def sweep(rig: Rig) -> None:
    """As the worker does, only more often: clients that are gone are noticed."""
    while True:
        await asyncio.sleep(0.02)
        for client in list(rig.worker.clients):
            client.sweep(rig.worker.time())


async def conversation(rig: Rig, done: list[tuple[str, Any]]) -> None:
    sweeper = asyncio.ensure_future(sweep(rig))
    rig.script = lambda reader, writer: application(rig, reader, writer)
    results: list[tuple[Ask, Any]] = []
    over = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    incarnation, suspended = 1, False

    def start(work: Awaitable[None]) -> None:
        tasks.append(asyncio.ensure_future(work))

    for what, value in done:
        if what == "client":
            first, second = [one for one in value if not one.h2], [one for one in value if one.h2]
            start(http1(rig, first, results)) if first else None
            start(http2(rig, second, results)) if second else None
        elif what == "tunnel":
            start(tunnel(rig, value, over))
        elif what == "suspend":
            await suspend(rig, incarnation, value)
            incarnation, suspended = incarnation + 1, True
        elif what == "throttle":
            entry = rig.worker.routes.get(HOST)
            if entry is not None and entry.limiter is not None:
                entry.limiter._bytes = 0.0
        else:
            for _ in range(value):
                await turn()
    await until(lambda: sum(not task.done() for task in tasks) <= sum(step == ("tunnel", True) for step in done), PATIENCE + 1)
    over.set()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*tasks)
    if not suspended:
        for ask, result in results:
            if not ask.leaves and ask.application in ("ok", "keeps"):
                assert result == (200, ask.size), (ask, result)
    await settled(rig)
    sweeper.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sweeper


LIMITS: dict[str, Any] = {
    "limits": "custom", "workers": 1, "limit_bytes_per_second": 30_000_000, "limit_connections": 10_000, "limit_requests_per_second": 10_000,
}  # fmt: skip


def run(done: list[tuple[str, Any]], **settings: Any) -> None:
    with_rig(lambda rig: conversation(rig, done), http2=True, half_close_seconds=0.2, **settings)


@hypothesis.settings(max_examples=60, deadline=None)
@given(steps, st.booleans())
def test_any_order(done: list[tuple[str, Any]], limited: bool) -> None:
    run(done, **(LIMITS if limited else {}))


@pytest.mark.long
@hypothesis.settings(max_examples=1500, deadline=None)
@given(steps, st.booleans())
def test_any_order_for_long(done: list[tuple[str, Any]], limited: bool) -> None:
    run(done, **(LIMITS if limited else {}))
