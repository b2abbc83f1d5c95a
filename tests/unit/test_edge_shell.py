"""A shell's WebSocket at the edge, over the edge's end of its socket, with a client that a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from waiting import until
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side, State

from gateway.config import Edge
from gateway.edge.origin import shell
from gateway.edge.origin.shell import ShellOrigin
from gateway.edge.policy.admission import SHELL_PORT
from gateway.edge.policy.head_cache import Cache
from gateway.edge.policy.routes import Account
from gateway.edge.reading import HELD, PEER_SLOW, UNREAD
from gateway.edge.sides import OriginContext, Parkable
from gateway.edge.wire.http1_head import NO_BODY, RequestHead, ResponseHead

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


class Parking:
    def __init__(self) -> None:
        self.woken: list[Parkable] = []
        self.discarded: list[Parkable] = []

    def wake(self, origin: Parkable) -> None:
        self.woken.append(origin)

    def discard(self, origin: Parkable) -> None:
        self.discarded.append(origin)


class Worker:
    def __init__(self) -> None:
        self.parking = Parking()


class Exchange:
    """What a client's side is told, in order."""

    def __init__(self) -> None:
        self.account = Account()
        self.response_started = False
        self.said: list[str] = []
        self.messages: list[tuple[Opcode, bytes]] = []
        self.reasons = 0
        self.client = Protocol(Side.CLIENT, state=State.OPEN)

    def switch(self, head: ResponseHead, data: bytes) -> None:
        self.response_started = True
        self.said.append("switch")

    def response_data(self, data: bytes) -> None:
        self.client.receive_data(data)
        self.messages += [(one.opcode, bytes(one.data)) for one in self.client.events_received()]  # type: ignore[union-attr]

    def tunnel_over(self) -> None:
        self.said.append("over")

    def cut(self) -> None:
        self.said.append("cut")

    def pause_reading(self, reason: int) -> None:
        self.reasons |= reason

    def resume_reading(self, reason: int) -> None:
        self.reasons &= ~reason


class Shell:
    """The shell with both of its ends."""

    def __init__(self) -> None:
        ours, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.worker = Worker()
        parking = self.worker.parking
        context = OriginContext(Edge(), asyncio.get_running_loop().time, Cache(1 << 16), parking.wake, parking.discard)
        self.origin = ShellOrigin(context, ("s1", 1, SHELL_PORT), ours)
        self.exchange: Any = Exchange()

    def open(self, *fields: bytes) -> None:
        block = b"".join(b"\r\n" + one for one in (b"sec-websocket-version: 13", b"sec-websocket-key: " + KEY, *fields))
        self.origin.open(self.exchange, RequestHead(b"GET", b"/", 1, "host", NO_BODY, upgrade=b"websocket", block=block))

    def say(self, opcode: Opcode, data: bytes) -> None:
        client = self.exchange.client
        client.send_text(data) if opcode is Opcode.TEXT else client.send_binary(data)
        self.flush()

    def flush(self) -> None:
        self.origin.send(b"".join(self.exchange.client.data_to_send()))

    async def typed(self) -> bytes:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(self.control, 65536)


@pytest.fixture
async def one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    monkeypatch.setattr(shell, "_CLOSE_SECONDS", 0.05)
    made = Shell()
    yield made
    made.origin.cancel()
    made.control.close()


async def test_what_is_typed_and_what_is_printed(one: Shell) -> None:
    one.open()
    (first,) = one.exchange.messages
    assert first[0] is Opcode.TEXT and b'"session_init"' in first[1]
    one.say(Opcode.BINARY, b"ls\n")
    assert await one.typed() == b"ils\n"
    one.say(Opcode.TEXT, b"plain text is typed")
    assert await one.typed() == b"iplain text is typed"
    deep = b'{"x":' + b"[" * 2000
    one.say(Opcode.TEXT, deep)
    assert await one.typed() == b"i" + deep, "what is nested too deeply is text as well"
    one.say(Opcode.TEXT, b'{"type": "resize", "cols": 100, "rows": 2000}')
    assert await one.typed() == b"r" + struct.pack("<HH", 100, 1000)
    one.control.send(b"ofiles")
    await until(lambda: one.exchange.messages[1:] == [(Opcode.BINARY, b"files")])
    assert one.exchange.account.count == 1


@pytest.mark.parametrize("answers", [True, False])
async def test_a_shell_that_exits_ends_even_if_its_client_says_nothing(
    one: Shell, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:  # fmt: skip
    monkeypatch.setattr(shell, "_CLOSE_SECONDS", 60.0 if answers else 0.05)
    one.open(b"x-torpor-exit-code: 1")
    one.control.send(b"x" + struct.pack("<i", 7))
    await until(lambda: one.exchange.messages[-1][0] is Opcode.CLOSE)
    assert one.exchange.messages[-2] == (Opcode.TEXT, b'{"type":"exit","code":7}')
    assert one.exchange.messages[-1][1] == struct.pack("!H", 1000) + b"shell exited"
    if answers:
        assert one.exchange.said == ["switch"]
        one.flush()  # the client's state machine echoes the Close frame
        assert one.exchange.said == ["switch", "over"]
    await until(lambda: one.exchange.said == ["switch", "over"])
    one.origin.cut()
    assert one.exchange.said == ["switch", "over"]


async def test_a_shell_that_control_closes_is_going_away(one: Shell) -> None:
    one.open()
    one.control.close()
    await until(lambda: one.exchange.messages[-1] == (Opcode.CLOSE, struct.pack("!H", 1001)))


async def test_a_client_is_stopped_while_the_terminal_takes_nothing(one: Shell) -> None:
    one.open()
    for _ in range(100):  # more than a socket's buffers take
        if not one.exchange.reasons:
            one.say(Opcode.BINARY, bytes(60_000))
    assert one.exchange.reasons == PEER_SLOW and one.origin.is_paused and not one.origin.is_silent(False)
    while one.exchange.reasons:
        await one.typed()
    assert not one.origin.is_paused and one.origin.is_silent(False)


async def test_a_client_that_asks_for_pongs_and_reads_none_is_not_read(one: Shell) -> None:
    one.open()
    one.exchange.client.send_ping(b"?")
    one.flush()
    assert one.exchange.messages[-1] == (Opcode.PONG, b"?") and not one.exchange.reasons
    one.origin.pause(PEER_SLOW)
    one.say(Opcode.BINARY, b"\x03")
    assert not one.exchange.reasons, "who does not read the output may still type ^C"
    one.exchange.client.send_ping(b"!")
    one.flush()
    assert one.exchange.reasons == UNREAD


async def test_output_is_not_read_while_a_reason_holds(one: Shell) -> None:
    one.open()
    one.origin.pause(PEER_SLOW)
    one.control.send(b"olater")
    with contextlib.suppress(TimeoutError):
        await until(lambda: len(one.exchange.messages) > 1, seconds=0.02)
    assert len(one.exchange.messages) == 1
    one.origin.resume(PEER_SLOW)
    await until(lambda: one.exchange.messages[1:] == [(Opcode.BINARY, b"later")])


async def test_what_is_typed_through_a_suspend_waits_and_wakes(one: Shell) -> None:
    one.open()
    one.origin.park(False)
    one.say(Opcode.TEXT, b'{"type": "resize", "cols": 90, "rows": 30}')
    assert not one.worker.parking.woken, "a window that changes its size wakes nobody"
    one.say(Opcode.BINARY, b"ls\n")
    assert one.worker.parking.woken == [one.origin]
    one.say(Opcode.BINARY, bytes(70_000))
    assert one.exchange.reasons == HELD
    one.origin.unpark()
    assert await one.typed() == b"r" + struct.pack("<HH", 90, 30)
    assert (await one.typed()).startswith(b"ils\n")
    while one.exchange.reasons:
        await one.typed()


async def test_a_parked_shell_that_ends_is_forgotten(one: Shell) -> None:
    one.open()
    one.origin.park(False)
    one.origin.cut()
    assert one.exchange.said == ["switch", "cut"] and one.worker.parking.discarded == [one.origin]
