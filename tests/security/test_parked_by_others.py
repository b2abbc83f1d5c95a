"""What waits for a session is that session's: no other's client gets it, and a token is judged when its request begins.

The rule of tokens that end meanwhile (docs/security.md, 32) is shown from both sides: what was admitted goes on, what comes next is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from edge_rig import HOST, Rig, response
from h2_client import Judge, fields
from waiting import until

from gateway import messages as m

OTHER = "two.lambda-microvm.us-east-1.localhost"
UPGRADED = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    one.control.routes[OTHER] = m.Route(OTHER, "s2", 1, "open")
    await one.start(http2=True, hold_seconds=20, connect_seconds=2)
    yield one
    await one.stop()


def frame(payload: bytes, mask: bytes = b"") -> bytes:
    head = bytes([0x81, (0x80 if mask else 0) | len(payload)])
    return head + mask + bytes(byte ^ mask[at & 3] if mask else byte for at, byte in enumerate(payload))


class Applications:
    """Two sessions' applications, each of which says whose it is in every answer. With `is_crossed` the edge might as well be one that mixes
    them up: what one is told, the other answers."""

    def __init__(self, rig: Rig, is_crossed: bool = False) -> None:
        self.heard: dict[str, bytes] = {"s1": b"", "s2": b""}
        self.writers: dict[str, asyncio.StreamWriter] = {}

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                whose = "s1" if b"host: one." in head else "s2"
                if b"upgrade: websocket" not in head:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + whose.encode())
                    continue
                self.writers[whose] = writer
                writer.write(UPGRADED)
                while data := await reader.read(65536):
                    self.heard[whose] += data
                    other = "s2" if whose == "s1" else "s1"
                    self.writers[other if is_crossed else whose].write(frame(f"{whose} heard".encode()))

        rig.script = serve


async def tunnel(rig: Rig, host: str, session: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await rig.open()
    token = rig.minter.mint(session, [(1, 65535)], 600)
    writer.write(rig.request("/", "Connection: upgrade", "Upgrade: websocket", token=token, host=host))
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def change(rig: Rig, host: str, session: str, gate: str, incarnation: int, is_live: bool = True) -> None:
    (connection,) = rig.control.connections
    await connection.call("route", m.Route(host, session, incarnation, gate, is_live))


async def park(rig: Rig, host: str = HOST, session: str = "s1") -> None:
    (connection,) = rig.control.connections
    await change(rig, host, session, "hold", 1)
    drained = await connection.call("drain", m.DrainRequest(session, 1, 0.0, True, 8), m.Drained)
    assert drained.parked == 1
    await change(rig, host, session, "hold", 1, is_live=False)


async def word(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        return await reader.readexactly(2 + len(b"s1 heard"))


async def both_woken(rig: Rig, is_crossed: bool) -> tuple[Applications, dict[str, bytes]]:
    """Parks a tunnel of each session, speaks on both, wakes the second one first, and returns what each client is told."""
    applications = Applications(rig, is_crossed)
    clients = {"s1": await tunnel(rig, HOST, "s1"), "s2": await tunnel(rig, OTHER, "s2")}
    await park(rig)
    await park(rig, OTHER, "s2")
    for session, (_, writer) in clients.items():
        writer.write(frame(f"from {session}".encode(), b"mask"))
    await until(lambda: len(rig.control.resumed) == 2)
    assert {one.session for one in rig.control.resumed} == {"s1", "s2"}
    await change(rig, OTHER, "s2", "open", 2)
    told = {"s2": b""} if is_crossed else {"s2": await word(clients["s2"][0])}
    assert applications.heard["s1"] == b"" or is_crossed, "the one that sleeps on has heard nothing"
    assert rig.worker.parking.count == 1
    await change(rig, HOST, "s1", "open", 2)
    for session, (reader, writer) in clients.items():
        told[session] = told.get(session) or await word(reader)
        writer.close()
    return applications, told


async def test_a_parked_stream_is_its_sessions(rig: Rig) -> None:
    """Both are woken with the same number of incarnation, to the same port: each client's word arrives once, at its own session."""
    applications, told = await both_woken(rig, is_crossed=False)
    assert told == {"s1": frame(b"s1 heard"), "s2": frame(b"s2 heard")}
    assert applications.heard == {"s1": frame(b"from s1", b"mask"), "s2": frame(b"from s2", b"mask")}


async def test_a_stream_that_is_answered_by_another_is_seen(rig: Rig) -> None:
    """The control: where the answers are mixed up behind the edge, the same look at them finds it."""
    _, told = await both_woken(rig, is_crossed=True)
    assert told == {"s1": frame(b"s2 heard"), "s2": frame(b"s1 heard")}


async def test_requests_of_one_connection_are_held_for_their_own_sessions(rig: Rig) -> None:
    """A client of HTTP/2 may ask both sessions on one connection: the one that opens answers its own requests, and no other's."""
    Applications(rig)
    await change(rig, HOST, "s1", "hold", 1, is_live=False)
    await change(rig, OTHER, "s2", "hold", 1, is_live=False)
    client = Judge(*await rig.open())
    token = rig.minter.mint("s2", [(1, 65535)], 600)
    second = [(name, token if name == "x-aws-proxy-auth" else value) for name, value in fields(rig, host=OTHER)]
    numbers = [client.ask(one) for one in (fields(rig), second) * 3]
    await until(lambda: rig.worker.holds.statistics()["requests"] == 6)
    await change(rig, OTHER, "s2", "open", 2)
    for number in numbers[1::2]:
        assert (await client.answer(number)).body == b"s2"
    assert not any(client.answers[number].fields for number in numbers[::2])
    await change(rig, HOST, "s1", "open", 2)
    for number in numbers[::2]:
        assert (await client.answer(number)).body == b"s1"
    client.writer.close()


async def test_who_has_left_is_answered_to_nobody(rig: Rig) -> None:
    """A client that left while it was held, or parked, leaves nothing that the next one could get."""
    applications = Applications(rig)
    _, parked = await tunnel(rig, HOST, "s1")
    await park(rig)
    _, held = await rig.open()
    held.write(rig.request("/left"))
    await until(lambda: rig.worker.holds.statistics()["requests"] == 1)
    for writer in (held, parked):
        writer.close()
    await until(lambda: not rig.worker.holds.statistics()["requests"] and not rig.worker.parking.count)
    await change(rig, HOST, "s1", "open", 2)
    assert [(status, body) for status, _, body in await rig.ask(rig.request("/next") * 2, 2)] == [(200, b"s1")] * 2
    assert applications.heard["s1"] == b"" and b"/left" not in rig.received


@pytest.fixture(params=["expired", "revoked"])
def end(request: pytest.FixtureRequest) -> Callable[[Rig], Awaitable[None]]:
    """Ends all tokens that there are."""

    async def expired(rig: Rig) -> None:
        rig.now += 601

    async def revoked(rig: Rig) -> None:
        (connection,) = rig.control.connections
        assert await connection.call("tokens", m.KeySet(rig.minter.verifiers(), m.Revoked(before=9e9)), bool)

    return expired if request.param == "expired" else revoked


End = Callable[[Rig], Awaitable[None]]


async def test_a_parked_stream_goes_on_when_its_token_has_ended_and_nothing_else_does(rig: Rig, end: End) -> None:
    """It was admitted; a new request with that token is refused, and wakes nobody."""
    applications = Applications(rig)
    token = rig.minter.mint("s1", [(1, 65535)], 600)
    ((status, _, _),) = await rig.ask(rig.request("/early", token=token))
    assert status == 200
    reader, writer = await tunnel(rig, HOST, "s1")
    await park(rig)
    await end(rig)
    ((status, _, body),) = await rig.ask(rig.request("/late", token=token))
    assert (status, body) == (403, b"Token authentication failed") and not rig.control.resumed
    rig.control.on_resume = lambda: rig.control.change("open", 2)
    writer.write(frame(b"awake?", b"mask"))
    assert await word(reader) == frame(b"s1 heard") and len(rig.control.resumed) == 1
    ((status, _, _),) = await rig.ask(rig.request("/late", token=token))
    assert status == 403 and applications.heard["s1"] == frame(b"awake?", b"mask") and b"/late" not in rig.received
    writer.close()


async def test_a_request_that_is_held_goes_on_when_its_token_has_ended_and_the_next_one_does_not(rig: Rig, end: End) -> None:
    Applications(rig)
    await change(rig, HOST, "s1", "hold", 1, is_live=False)
    reader, writer = await rig.open()
    writer.write(rig.request() + rig.request("/next"))
    await until(lambda: rig.control.resumed)
    await end(rig)
    await change(rig, HOST, "s1", "open", 2)
    assert (await response(reader))[0::2] == (200, b"s1")
    assert (await response(reader))[0] == 403 and b"/next" not in rig.received
    writer.close()
