"""Which agents control understands: all that there ever were, none that is newer than itself."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from pathlib import Path

import pytest

from gateway.messages import AGENT_PROTOCOL
from gateway.sessions.agent import Agent, AgentError
from gateway.sessions.frame import HEADER, frame

GUEST = Path(__file__).parents[2] / "vmm/guest/port.h"
_IS_HELLO = 0x81


async def greeted(rest: bytes) -> tuple[tuple[int, int], int]:
    """What control makes of an agent that answers a hello with its nonce and `rest`."""
    ours, theirs = socket.socketpair()
    agent = Agent(ours.detach(), lambda channel, data: None, lambda code: None)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()

    async def answer() -> None:
        said = b""
        while not re.search(rb"TRPR\x01", said) or len(said) < said.index(b"TRPR\x01") + HEADER.size + 8:
            said += await loop.sock_recv(theirs, 65536)
        at = said.index(b"TRPR\x01") + HEADER.size
        await loop.sock_sendall(theirs, frame(_IS_HELLO, said[at : at + 8] + rest))

    try:
        state, _ = await asyncio.gather(agent.hello(10), answer())
        return state, agent.protocol
    finally:
        agent.close()
        theirs.close()


async def test_what_the_agent_of_commit_165a0cb_answers_is_protocol_1() -> None:
    assert await greeted(struct.pack("<Ii", 2, 137)) == ((2, 137), 1)


async def test_ours_says_its_number() -> None:
    assert await greeted(struct.pack("<IiI", 1, 0, AGENT_PROTOCOL)) == ((1, 0), AGENT_PROTOCOL)


@pytest.mark.parametrize("more", [b"", b"what it says beside that"])
async def test_a_newer_one_is_refused_by_name(more: bytes) -> None:
    with pytest.raises(
        AgentError, match=f"speaks protocol {AGENT_PROTOCOL + 1}, and this version of Torpor knows those up to {AGENT_PROTOCOL}"
    ):
        await greeted(struct.pack("<IiI", 1, 0, AGENT_PROTOCOL + 1) + more)


def test_guest_and_host_have_the_same_number() -> None:
    found = re.search(r"#define AGENT_PROTOCOL (\d+)", GUEST.read_text(encoding="utf-8"))
    assert found is not None and int(found[1]) == AGENT_PROTOCOL
