"""Shells at control: by credit, and through a suspend, where the channel goes and what is said meanwhile waits."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from waiting import until

from gateway.sessions.agent import Agent
from gateway.sessions.frame import HEADER, frame

OPEN, INPUT, RESIZE, CREDIT, CLOSE, HELLO = 0x05, 0x06, 0x07, 0x08, 0x09, 0x01
IS_HELLO, OUTPUT, TAKEN, EXIT = 0x81, 0x85, 0x86, 0x87


class Guest:
    """The other end of an agent's channel; one after another, as incarnations have them."""

    def __init__(self) -> None:
        self.channel: socket.socket | None = None
        self.buffer = b""

    def connect(self) -> int:
        """A new channel; the host's end."""
        ours, self.channel = socket.socketpair()
        self.channel.setblocking(False)
        return ours.detach()

    def say(self, *frames: bytes) -> None:
        assert self.channel is not None
        self.channel.sendall(b"".join(frames))

    async def hear(self) -> tuple[int, int, bytes]:
        """(kind, shell, payload) of the next frame."""
        assert self.channel is not None
        async with asyncio.timeout(5):
            while True:
                if len(self.buffer) >= HEADER.size:
                    _, kind, _, channel, length = HEADER.unpack_from(self.buffer)
                    if len(self.buffer) >= HEADER.size + length:
                        payload = self.buffer[HEADER.size : HEADER.size + length]
                        self.buffer = self.buffer[HEADER.size + length :]
                        return kind, channel, payload
                self.buffer += await asyncio.get_running_loop().sock_recv(self.channel, 65536)


class Edge:
    """The edge's end of one shell."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def hear(self) -> bytes:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(self.sock, 65536)


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    one = Guest()
    yield one
    if one.channel is not None:
        one.channel.close()


def agent_of(guest: Guest) -> Agent:
    return Agent(guest.connect(), lambda channel, data: None, lambda code: None)


async def opened(agent: Agent, guest: Guest) -> tuple[Edge, int]:
    edge = Edge(agent.shells.open(80, 24))
    kind, number, size = await guest.hear()
    assert (kind, size) == (OPEN, struct.pack("<HH", 80, 24))
    assert (await guest.hear())[0] == CREDIT
    return edge, number


async def test_typing_output_and_the_end(guest: Guest) -> None:
    agent = agent_of(guest)
    edge, number = await opened(agent, guest)
    edge.sock.send(b"ils\n")
    assert await guest.hear() == (INPUT, number, b"ls\n")
    guest.say(frame(OUTPUT, b"a b c", number))
    assert await edge.hear() == b"oa b c"
    assert await guest.hear() == (CREDIT, number, struct.pack("<I", 5))
    edge.sock.send(b"r" + struct.pack("<HH", 100, 50))
    assert await guest.hear() == (RESIZE, number, struct.pack("<HH", 100, 50))
    guest.say(frame(EXIT, struct.pack("<i", 3), number))
    assert await edge.hear() == b"x" + struct.pack("<i", 3) and await edge.hear() == b""
    assert not agent.shells.count
    agent.close()


async def test_a_shell_sleeps_and_goes_on_over_another_channel(guest: Guest) -> None:
    agent = agent_of(guest)
    edge, number = await opened(agent, guest)
    quiet = asyncio.ensure_future(agent.quiet(5))
    _, _, nonce = await guest.hear()
    half = frame(OUTPUT, b"said before", number)
    guest.say(frame(IS_HELLO, nonce + bytes(8)), half[:9])  # and in the middle of a frame the guest is stopped
    await quiet
    agent.detach()
    assert guest.channel is not None and guest.channel.recv(1) == b""
    edge.sock.send(b"itoo early\n")
    await until(lambda: agent._out)
    agent.attach(guest.connect())
    assert await guest.hear() == (INPUT, number, b"too early\n")
    guest.say(half[9:])
    assert await edge.hear() == b"osaid before"
    assert agent.shells.count == 1 and not agent.closed.done()
    agent.close()
    assert await edge.hear() == b""


async def test_what_was_said_last_is_read_before_the_channel_goes(guest: Guest) -> None:
    agent = agent_of(guest)
    edge, number = await opened(agent, guest)
    guest.say(frame(OUTPUT, b"last words", number))
    agent.detach()
    assert await edge.hear() == b"olast words"
    agent.attach(guest.connect())
    assert await guest.hear() == (CREDIT, number, struct.pack("<I", 10))
    agent.close()


async def test_a_client_that_leaves_a_sleeping_shell_hangs_up_when_the_guest_wakes(guest: Guest) -> None:
    agent = agent_of(guest)
    edge, number = await opened(agent, guest)
    agent.detach()
    edge.sock.close()
    await until(lambda: not agent.shells.count)
    agent.attach(guest.connect())
    assert await guest.hear() == (CLOSE, number, b"")
    agent.close()


async def test_a_session_that_ends_asleep_ends_its_shells(guest: Guest) -> None:
    agent = agent_of(guest)
    edge, _ = await opened(agent, guest)
    agent.detach()
    agent.close()
    assert await edge.hear() == b"" and agent.closed.done()
    edge.sock.close()


async def test_a_channel_that_ended_is_over_and_not_asleep(guest: Guest) -> None:
    """A hypervisor that is killed ends its channel: nothing waits for another one, and nothing is read any more."""
    agent = agent_of(guest)
    assert guest.channel is not None
    guest.channel.close()
    async with asyncio.timeout(5):
        await agent.closed
    assert not agent.is_detached
    agent.send(b"to nobody")
    agent.close()


async def test_a_shell_goes_on_where_a_snapshot_that_is_called_off_has_ended_the_channel(guest: Guest) -> None:
    """Firecracker's vsock is reset by it. Once the guest is quiet, the end of its channel is not the end of its shells."""
    agent = agent_of(guest)
    edge, number = await opened(agent, guest)
    quiet = asyncio.ensure_future(agent.quiet(5))
    _, _, nonce = await guest.hear()
    guest.say(frame(IS_HELLO, nonce + bytes(8)))
    await quiet
    assert guest.channel is not None
    guest.channel.close()
    await until(lambda: agent.is_detached)
    assert not await agent.is_heard(5)
    edge.sock.send(b"iafter\n")
    agent.attach(guest.connect())
    assert await guest.hear() == (INPUT, number, b"after\n")
    agent.close()


@pytest.mark.parametrize("holds", [False, True])
async def test_a_channel_is_asked_whether_the_guest_hears_while_what_is_said_waits(guest: Guest, holds: bool) -> None:
    agent = agent_of(guest)
    if holds:
        quiet = asyncio.ensure_future(agent.quiet(5))
        _, _, nonce = await guest.hear()
        guest.say(frame(IS_HELLO, nonce + bytes(8)))
        await quiet
        agent.send(frame(INPUT, b"later", 1))
    heard = asyncio.ensure_future(agent.is_heard(5))
    kind, _, nonce = await guest.hear()
    assert kind == HELLO
    guest.say(frame(IS_HELLO, nonce + bytes(8)))
    assert await heard
    assert not await agent.is_heard(0.01)
    agent.close()
    assert not await agent.is_heard(5)


async def test_a_frame_whose_handling_fails_is_taken_once(guest: Guest) -> None:
    """What came after it is read, and it does not come again."""
    seen: list[bytes] = []
    told = asyncio.Event()

    def output(channel: int, data: bytes) -> None:
        seen.append(data)
        told.set()
        if data == b"broken":
            raise ValueError

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    agent = Agent(guest.connect(), output, lambda code: None)
    for data in (b"broken", b"next", b"last"):
        told.clear()
        guest.say(frame(0x83, data, 1))
        await told.wait()
    assert seen == [b"broken", b"next", b"last"]
    agent.close()
