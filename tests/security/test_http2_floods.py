"""What a client of HTTP/2 can make an edge do for nothing, each flood with the bound where it ends, and another client that is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from edge_rig import Rig
from h2_client import Raw, fields
from waiting import until

from gateway.edge.client.http2 import Http2
from gateway.edge.wire import http2_frames as f
from gateway.edge.wire import http2_head

RESETS = 200  # of a connection at once, whoever resets; 20 more a second (http2_connection.py)
CONTROLS = 1000  # frames at once that want an answer, or carry nothing; 50 more a second
CALM = "goaway ENHANCE_YOUR_CALM"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(http2=True, head_seconds=5, body_seconds=5, connect_seconds=2)
    yield one
    await one.stop()


def block(rig: Rig, method: str = "GET", path: str = "/", *more: tuple[str, str]) -> bytes:
    return f.encode([(name.encode(), value.encode()) for name, value in fields(rig, path, method, *more)])


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An application that takes requests and answers none but the neighbour's."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if b" /neighbour " in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


async def read_all(raw: Raw) -> tuple[str, dict[int, int]]:
    """How the connection ends, and how many frames of each kind came before."""
    counts: dict[int, int] = {}
    while True:
        try:
            kind, _, _, payload = await raw.frame()
        except EOFError:
            return "closed", counts
        if kind == f.GOAWAY:
            return f"goaway {f.Code(int.from_bytes(payload[4:8], 'big')).name}", counts
        counts[kind] = counts.get(kind, 0) + 1


async def neighbour(rig: Rig) -> float:
    """Another client's request on the worker, and how long it took."""
    began = time.monotonic()
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig, path="/neighbour"), True))
    assert await raw.outcome() == "answer 200"
    raw.writer.close()
    return time.monotonic() - began


Made = Callable[[bytes, bytes, int], bytes]  # of blocks of a GET and a POST, and a stream's number, what ends in a reset
MADE: dict[str, Made] = {
    "rapid reset": lambda get, post, n: f.headers(n, get, True) + f.rst_stream(n, f.Code.CANCEL),
    "rapid reset of uploads": lambda get, post, n: f.headers(n, post, False) + f.frame(f.DATA, 0, n, b"x") + f.rst_stream(n, f.Code.NO_ERROR),
    "MadeYouReset: a stream's window beyond its bound": lambda get, post, n: f.headers(n, get, True) + f.window_update(n, (1 << 31) - 1),
    "MadeYouReset: a window that is opened by nothing": lambda get, post, n: f.headers(n, get, True) + f.window_update(n, 0),
    "MadeYouReset: DATA on a half-closed stream": lambda get, post, n: f.headers(n, get, True) + f.frame(f.DATA, 0, n, b"x"),
    "MadeYouReset: HEADERS on a half-closed stream": lambda get, post, n: f.headers(n, get, True) + f.headers(n, get, True),
    "MadeYouReset: PRIORITY of another length": lambda get, post, n: f.headers(n, get, True) + f.frame(f.PRIORITY, 0, n, bytes(4)),
    "MadeYouReset: a stream that depends on itself": lambda get, post, n: f.headers(n, get, True) + f.frame(f.PRIORITY, 0, n, u32(n) + b"\1"),
    "MadeYouReset: trailers that do not end": lambda get, post, n: f.headers(n, post, False) + f.headers(n, f.encode([(b"x", b"y")]), False),
    "MadeYouReset: trailers with a pseudo-header field": lambda get, post, n: f.headers(n, post, False) + f.headers(n, f.encode([(b":path", b"/")]), True),
    "MadeYouReset: more than the stream's window": lambda get, post, n: f.headers(n, post, False) + f.frame(f.DATA, 0, n, bytes(16384)) * 5,
    "MadeYouReset: a request that is malformed": lambda get, post, n: f.headers(n, get + f.encode([(b"X", b"y")]), True),
    "MadeYouReset: empty names (CVE-2019-9516)": lambda get, post, n: f.headers(n, get + b"\x00\x00\x00", True),
    "MadeYouReset: each in another way": lambda get, post, n: (
        f.headers(n, get, True)
        + (f.rst_stream(n, f.Code.CANCEL), f.window_update(n, 0), f.frame(f.DATA, 0, n, b"x"), f.window_update(n, (1 << 31) - 1))[n // 2 % 4]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
async def test_resets_have_one_budget_whoever_makes_them(rig: Rig, name: str) -> None:
    """Of 500 streams that end so, the application sees no more than the budget has, and the connection ends."""
    rig.script = silent
    began = time.monotonic()
    raw = Raw(*await rig.open())
    get, post = block(rig), block(rig, "POST")
    for number in range(1, 1001, 2):
        raw.send(MADE[name](get, post, number))
    seconds, (outcome, counts) = await asyncio.gather(neighbour(rig), read_all(raw))
    allowed = RESETS + 20 * (time.monotonic() - began) + 1
    assert outcome in (CALM, "closed") and counts.get(f.RST_STREAM, 0) <= allowed
    assert rig.received.count(b"\r\n\r\n") <= allowed + 1 and seconds < 2
    raw.writer.close()
    await until(lambda: not rig.worker.clients)
    assert not any(pool.waiters for pool in rig.worker.upstream.pools())


async def test_resets_within_the_budget_end_nothing(rig: Rig) -> None:
    """What the floods are measured by: the same, less often."""
    for made in list(MADE.values())[:6]:
        raw = Raw(*await rig.open())
        get, post = block(rig), block(rig, "POST")
        raw.send(*(made(get, post, number) for number in range(1, 101, 2)))
        raw.send(f.headers(1001, get, True))
        kind = number = 0
        while (kind, number) != (f.HEADERS, 1001):
            kind, _, number, _ = await raw.until(f.HEADERS, f.GOAWAY)
        raw.writer.close()


FLOODS: dict[str, Callable[[Rig], bytes]] = {
    "PING": lambda rig: f.frame(f.PING, 0, 0, bytes(8)) * (2 * CONTROLS),
    "SETTINGS": lambda rig: f.settings({}) * (2 * CONTROLS),
    "SETTINGS that move each stream's window": lambda rig: (f.settings({f.INITIAL_WINDOW_SIZE: 0}) + f.settings({f.INITIAL_WINDOW_SIZE: 1})) * CONTROLS,
    "SETTINGS that move all windows 2,000 times in a frame": lambda rig: f.frame(f.SETTINGS, 0, 0, b"\x00\x04\x00\x00\x00\x01" * 2000),
    "SETTINGS and PING, which have one budget": lambda rig: (f.settings({}) + f.frame(f.PING, 0, 0, bytes(8))) * CONTROLS,
    "empty DATA": lambda rig: f.headers(1, block(rig, "POST"), False) + f.frame(f.DATA, 0, 1) * (2 * CONTROLS),
    "empty CONTINUATION": lambda rig: f.frame(f.HEADERS, 1, 1, block(rig)) + f.frame(f.CONTINUATION, 0, 1) * 200,
    "CONTINUATION of fields": lambda rig: f.frame(f.HEADERS, 1, 1, block(rig)) + f.frame(f.CONTINUATION, 0, 1, b"\x00\x01x\x01y" * 3000) * 200,
    "HPACK: one long field named 4,000 times": lambda rig: f.headers(1, block(rig) + b"\x40\x01x\x7f\x81\x1e" + b"y" * 4000 + b"\xbe" * 4000, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
async def test_frames_that_cost_their_sender_nothing_end_the_connection(rig: Rig, name: str) -> None:
    raw = Raw(*await rig.open())
    rig.script = silent
    raw.send(FLOODS[name](rig))
    seconds, (outcome, counts) = await asyncio.gather(neighbour(rig), read_all(raw))
    assert outcome == CALM and seconds < 2
    assert counts.get(f.PING, 0) + counts.get(f.SETTINGS, 0) <= CONTROLS + 102
    raw.writer.close()
    await until(lambda: not rig.worker.clients)


IGNORED: dict[str, bytes] = {
    "PRIORITY of streams that never were": b"".join(f.frame(f.PRIORITY, 0, number, u32(0) + b"\xff") for number in range(1, 40_001, 2)),
    "PRIORITY as a chain, of others on others": b"".join(
        f.frame(f.PRIORITY, 0, number, u32(number + 2) + b"\0") for number in range(1, 40_001, 2)
    ),
    "frames of a type that nobody knows": f.frame(0x55, 0xFF, 7, bytes(100)) * 10_000,
    "PING that answers nothing": f.frame(f.PING, f.ACK, 0, bytes(8)) * 20_000,
    "SETTINGS that acknowledge nothing": f.frame(f.SETTINGS, f.ACK, 0) * 20_000,
    "the connection's window, opened by one": f.window_update(0, 1) * 20_000,
}


@pytest.mark.parametrize("name", IGNORED)
async def test_frames_that_mean_nothing_are_forgotten(rig: Rig, name: str) -> None:
    """They want no answer: the connection keeps nothing of them, and goes on."""
    raw = Raw(*await rig.open())
    raw.send(f.headers(1, block(rig), True))
    await raw.until(f.HEADERS)
    (client,) = rig.worker.clients
    assert isinstance(client, Http2)
    names = len(http2_head._known_names)
    raw.send(IGNORED[name])
    seconds = await neighbour(rig)
    await raw.settled()
    assert seconds < 2 and not client.streams and len(client._closed) <= 256 and not client._blocked and not client._out
    assert len(http2_head._known_names) <= names + 20
    raw.send(f.headers(3, block(rig), True))
    await raw.until(f.HEADERS)
    raw.writer.close()


async def stalled(rig: Rig, streams: int, size: int) -> Raw:
    """A client whose streams all wait for the connection's window."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            small = b" /neighbour " in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 if small else size) + b"x" * (1 if small else size))

    rig.script = script
    raw = Raw(*await rig.open(), start=False)
    raw.send(f.PREFACE + f.settings({f.INITIAL_WINDOW_SIZE: (1 << 31) - 1}))
    get = block(rig)
    raw.send(*(f.headers(number, get, True) for number in range(1, 2 * streams, 2)))
    (client,) = await until(lambda: list(rig.worker.clients))
    await until(lambda: len(client._blocked) == streams)
    return raw


async def dribbled(rig: Rig, streams: int) -> float:
    """The processor's time that 5,000 openings of the window by one byte take, while so many answers wait."""
    raw = await stalled(rig, streams, 90_000)
    before, got = time.process_time(), 0
    raw.send(f.window_update(0, 1) * 5_000)
    while got < f.WINDOW_BYTES + 5_000:
        kind, _, _, payload = await raw.frame()
        got += len(payload) if kind == f.DATA else 0
    spent = time.process_time() - before
    raw.writer.close()
    await until(lambda: not rig.worker.clients)
    return spent


async def test_a_window_that_is_opened_by_single_bytes_costs_what_it_lets_through(rig: Rig) -> None:
    """Data dribble (CVE-2019-9511): where 120 answers wait, a byte costs about what it costs where 2 do."""
    few, many = await dribbled(rig, 2), await dribbled(rig, 120)
    assert many < 5 * few + 0.05, (few, many)


async def test_settings_that_move_windows_to_and_fro_let_nothing_through_twice(rig: Rig) -> None:
    """A window below nothing (RFC 9113, 6.9.2) is filled up before a byte goes on."""
    raw = await stalled(rig, 2, 90_000)
    raw.send(
        f.settings({f.INITIAL_WINDOW_SIZE: 0}), f.window_update(0, 1 << 20), f.window_update(1, 10), f.frame(f.PING, 0, 0, b"settled?")
    )
    sent = {1: 0, 3: 0}
    while True:
        kind, _, number, payload = await raw.frame()
        if kind == f.PING:
            break
        if kind == f.DATA:
            sent[number] += len(payload)
    assert sum(sent.values()) == f.WINDOW_BYTES
    raw.send(f.settings({f.INITIAL_WINDOW_SIZE: 90_000}))
    ended = 0
    while ended < 2:
        kind, flags, number, payload = await raw.frame()
        if kind == f.DATA:
            sent[number] += len(payload)
            ended += bool(flags & f.END_STREAM)
    assert sent == {1: 90_000, 3: 90_000}
    raw.writer.close()
