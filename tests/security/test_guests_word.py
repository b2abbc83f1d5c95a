"""The wall around what a guest says: whatever its root writes on the agent's channel, control's memory, log and loop take their share of it.

The attacker is the other end of the channel. Each bound is taken away by its name, and the attack is seen to succeed then.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import turns, until

from gateway.sessions import agent as module
from gateway.sessions.agent import Agent
from gateway.sessions.frame import HEADER, MAGIC, frame
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.logs import LogStore

OUTPUT, EXIT, SHELL_OUTPUT, SHELL_EXIT, KILLED = 0x83, 0x84, 0x85, 0x87, 0x88


class Attacker:
    """A guest's root, who has the agent's channel for himself; and control's end of it."""

    def __init__(self) -> None:
        ours, self.channel = socket.socketpair()
        self.channel.setblocking(False)
        self.output: list[tuple[int, bytes]] = []
        self.exits: list[int] = []
        self.killed: list[str] = []
        self._ends = 0
        self.agent = Agent(ours.detach(), self._said, self.exits.append, self.killed.append)

    def _said(self, channel: int, data: bytes) -> None:
        self.output.append((channel, data))
        if data == b"broken":
            raise ValueError(data)

    async def say(self, *frames: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.channel, b"".join(frames))

    async def said(self, *frames: bytes) -> None:
        """Says it, and returns when control has read all of it."""
        self._ends += 1
        end = b"end %d" % self._ends
        await self.say(*frames)
        await self.say(frame(OUTPUT, end, 1))
        await until(lambda: self.output and self.output[-1] == (1, end))

    def close(self) -> None:
        self.agent.close()
        self.channel.close()


@pytest.fixture
async def attacker() -> AsyncIterator[Attacker]:
    one = Attacker()
    yield one
    one.close()


# ---- memory ----


@pytest.mark.parametrize("is_walled", [True, False])
async def test_lines_without_end_on_a_thousand_channels(
    attacker: Attacker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_walled: bool
) -> None:
    """Each channel keeps the rest of a line: there are three of them, and there were 65,536."""
    if not is_walled:
        monkeypatch.setattr(module, "_CHANNELS", range(1 << 16))
    writer = LineWriter(LogStore(tmp_path), "1", "g", "s")
    attacker.agent._on_output = lambda channel, data: (writer.feed(channel, data), attacker.output.append((channel, data)))[1]
    await attacker.said(*(frame(OUTPUT, b"x" * 1000, channel) for channel in range(1000)))
    kept = sum(map(len, writer._rest.values()))
    assert kept < 4000 if is_walled else kept > 900_000


async def shell_of(attacker: Attacker) -> tuple[socket.socket, Any]:
    edge = attacker.agent.shells.open(80, 24)
    return edge, next(iter(attacker.agent.shells._shells.values()))


@pytest.mark.parametrize("is_walled", [True, False])
async def test_shell_output_beyond_the_credit(attacker: Attacker, is_walled: bool) -> None:
    """A terminal that does not read stops its shell, and what a guest writes nevertheless is not kept: the shell is hung up."""
    edge, shell = await shell_of(attacker)
    if not is_walled:
        shell._credit = math.inf
    for _ in range(25):
        await attacker.said(*(frame(SHELL_OUTPUT, b"x" * 4096, shell._number) for _ in range(16)))
    queued = sum(map(len, shell._out))
    assert (queued <= 70_000 and not attacker.agent.shells.count) if is_walled else queued > 1_000_000
    edge.close()


async def test_a_shell_within_its_credit_goes_on(attacker: Attacker) -> None:
    """Ten times the credit, where the terminal reads: nobody is hung up."""
    edge, shell = await shell_of(attacker)
    got = 0
    for _ in range(160):
        await attacker.said(frame(SHELL_OUTPUT, b"x" * 4096, shell._number))
        got += len(await asyncio.get_running_loop().sock_recv(edge, 65536)) - 1
    assert got == 160 * 4096 and attacker.agent.shells.count == 1
    edge.close()


async def test_ends_of_a_shell_are_said_once(attacker: Attacker) -> None:
    edge, shell = await shell_of(attacker)
    await attacker.said(*[frame(SHELL_EXIT, struct.pack("<i", 1), shell._number)] * 1000)
    loop = asyncio.get_running_loop()
    assert await loop.sock_recv(edge, 99) == b"x" + struct.pack("<i", 1) and await loop.sock_recv(edge, 99) == b""
    edge.close()


@pytest.mark.parametrize("is_walled", [True, False])
async def test_a_guest_that_does_not_read_is_not_heard(attacker: Attacker, monkeypatch: pytest.MonkeyPatch, is_walled: bool) -> None:
    """Each byte of a shell's output is answered by a message of credit, which waits here for a guest that reads none."""
    monkeypatch.setattr(module, "_UNREAD_BYTES", 100_000 if is_walled else 1 << 40)
    edge, shell = await shell_of(attacker)
    one = frame(SHELL_OUTPUT, b"x", shell._number)
    loop = asyncio.get_running_loop()

    async def read() -> None:
        while await loop.sock_recv(edge, 99):
            pass

    async def flood() -> None:
        for _ in range(400):
            await until(lambda: shell._credit > 60_000)
            await attacker.say(one * 1000)

    reading, flooding = loop.create_task(read()), loop.create_task(flood())
    if is_walled:
        await until(lambda: attacker.agent._is_deaf)
        await turns(50)
        assert 100_000 < len(attacker.agent._out) < 300_000
        flooding.cancel()
        await drained(attacker)
        assert attacker.agent.shells.count == 1, "once it reads it is heard again"
    else:
        await until(lambda: len(attacker.agent._out) > 600_000, 20.0)
        flooding.cancel()
    reading.cancel()
    await asyncio.wait([reading, flooding])
    edge.close()


async def drained(attacker: Attacker) -> None:
    """The guest reads all that there is for it."""

    async def read() -> None:
        while await asyncio.get_running_loop().sock_recv(attacker.channel, 1 << 16):
            pass

    reading = asyncio.get_running_loop().create_task(read())
    await until(lambda: not attacker.agent._out)
    assert not attacker.agent._is_deaf
    reading.cancel()
    await asyncio.wait([reading])


# ---- the loop ----


@pytest.mark.parametrize("is_walled", [True, False])
async def test_messages_without_number_wait(attacker: Attacker, is_walled: bool) -> None:
    """What a guest says beyond its rate stays in its own channel, which stops it; it is heard when the time has come."""
    heard = 0

    def output(channel: int, data: bytes) -> None:
        nonlocal heard
        heard += 1

    attacker.agent._on_output = output
    attacker.agent._frames = module.Allowance(1000 if is_walled else math.inf, 100, asyncio.get_running_loop().time)
    flood = asyncio.ensure_future(attacker.say(frame(OUTPUT, b"", 1) * 100_000))
    if is_walled:
        await until(lambda: attacker.agent._later is not None)
        await turns(100)
        assert 1000 < heard <= 2 * (module._BUDGET_BYTES // HEADER.size) and not flood.done()
    else:
        await until(lambda: heard == 100_000, 30.0)
    flood.cancel()
    await asyncio.wait([flood])


async def test_after_its_time_it_is_heard_again(attacker: Attacker) -> None:
    attacker.agent._frames = module.Allowance(10, 10_000, asyncio.get_running_loop().time)
    for _ in range(3):
        await attacker.said(frame(OUTPUT, b"x", 1) * 200)
    assert len(attacker.output) == 603


@pytest.mark.parametrize("is_walled", [True, False])
async def test_a_frame_that_breaks_its_handling_hides_no_other(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch, is_walled: bool
) -> None:
    """Those behind it in the same read are heard at once; they were kept until the guest said more."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    if not is_walled:
        monkeypatch.setattr(Agent, "_frame_safely", Agent._frame)
    await attacker.say(frame(OUTPUT, b"broken", 1) + frame(OUTPUT, b"behind", 1))
    await until(lambda: attacker.output)
    await turns(20)
    assert ((1, b"behind") in attacker.output) is is_walled


@pytest.mark.parametrize("is_walled", [True, False])
async def test_an_application_ends_once(attacker: Attacker, is_walled: bool) -> None:
    for number in range(5):
        await attacker.said(frame(EXIT, struct.pack("<i", number)))
        if not is_walled:
            attacker.agent._exited.clear()
    assert attacker.exits == ([0] if is_walled else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("is_walled", [True, False])
async def test_killed_processes_fill_no_log(attacker: Attacker, is_walled: bool) -> None:
    """These lines do not go by the rate of an application's output: they had none."""
    if not is_walled:
        attacker.agent._kills = module.Allowance(math.inf, 1, asyncio.get_running_loop().time)
    await attacker.said(*(frame(KILLED, b"python3") for _ in range(1000)))
    assert len(attacker.killed) <= 40 if is_walled else len(attacker.killed) == 1000


# ---- anything at all ----


_FRAMES = st.builds(
    lambda kind, channel, payload, length: HEADER.pack(MAGIC, kind, 0, channel, min(len(payload) + length, 0xFFFFFFFF)) + payload,
    st.integers(0x80, 0x8F) | st.integers(0, 255), st.integers(0, 20) | st.integers(0, 65535), st.binary(max_size=60),
    st.just(0) | st.just(0) | st.integers(0, 1 << 31),
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(_FRAMES | st.binary(max_size=40), max_size=12), st.integers(1, 50))
def test_after_anything_the_next_whole_frame_is_heard(pieces: list[bytes], cut: int) -> None:
    """Every sequence of frames and of bytes that are none, in any cut."""

    async def work() -> None:
        one = Attacker()
        edge, _ = await shell_of(one)
        data = b"".join(pieces)
        for at in range(0, len(data), cut):
            one.agent._buffer += data[at : at + cut]
            one.agent._parse()
        one.agent._buffer += bytes(module._FRAME_MAX_OUT + HEADER.size) + frame(OUTPUT, b"heard", 1)
        one.agent._parse()
        assert (1, b"heard") in one.output
        assert len(one.agent._buffer) <= 2 * module._FRAME_MAX_OUT
        edge.close()
        one.close()

    asyncio.run(work())
