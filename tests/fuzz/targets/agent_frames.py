"""Frames of a guest's agent (gateway/sessions/agent.py), by a real socket pair, in any cut."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from gateway.sessions import agent as module
from gateway.sessions import listeners, out_of_memory
from gateway.sessions.frame import HEADER, MAGIC_BYTES, frame

TRACED = ("gateway.sessions.agent", "gateway.sessions.shells", "gateway.sessions.listeners", "gateway.sessions.out_of_memory")
WORDS = (
    MAGIC_BYTES,
    *(bytes([kind, 0, channel, 0, 4, 0, 0, 0]) for kind in range(0x81, 0x8A) for channel in (1, 2)),
    frame(0x85, b"$ ", 1),
)
_KILLED = b"Out of memory: Killed process 7 (python3) total-vm:10kB, anon-rss:2048kB, file-rss:0kB, shmem-rss:0kB"
_NONCE = 7
_loop = asyncio.new_event_loop()


def seeds() -> list[bytes]:
    return [
        frame(0x81, struct.pack("<QIiI", _NONCE, 1, 0, 4)), frame(0x82, struct.pack("<Q", _NONCE)), frame(0x83, b"a line\n", 1) + frame(0x83, b"another\n", 2),
        frame(0x84, struct.pack("<i", 137)), frame(0x85, b"$ ", 1) + frame(0x86, struct.pack("<I", 2), 1) + frame(0x87, struct.pack("<i", 0), 1),
        frame(0x88, _KILLED), frame(0x88, b"Memory cgroup o" + _KILLED[1:]), frame(0x89, struct.pack("<QHH", _NONCE, 4, 8080) + bytes(16)), bytes(100) + frame(0x83, b"x", 3),
    ]  # fmt: skip


def check(data: bytes) -> None:
    whole, pieces = _loop.run_until_complete(_heard(data, len(data) or 1)), _loop.run_until_complete(_heard(data, 1 + len(data) // 7))
    assert whole == pieces, "a cut changes what is heard"
    listeners.in_words(listeners.parse(data))
    out_of_memory.line_of(data)


async def _heard(data: bytes, cut: int) -> list[tuple[object, ...]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    found: list[tuple[object, ...]] = []
    one = module.Agent(
        os.dup(ours.fileno()),
        lambda *output: found.append(output),
        lambda code: found.append((code,)),
        lambda line: found.append(("killed", line)),
    )
    ours.close()
    edge = one.shells.open(80, 24)
    edge.setblocking(False)
    answer = one.expect(_NONCE)
    try:
        for at in range(0, len(data), cut):
            theirs.send(data[at : at + cut])
            one._read()
            assert len(one._buffer) <= module._FRAME_MAX_OUT + HEADER.size
        assert not one._has_failed, "a frame has raised something"
        assert sum(len(some) == 1 for some in found) <= 1, "it has exited twice"
        assert all(some[0] in (1, 2, 3, "killed") for some in found if len(some) == 2)
        theirs.send(bytes(module._FRAME_MAX_OUT + HEADER.size) + frame(0x83, b"heard", 1))
        one._read()
        assert (1, b"heard") in found, "what follows is not heard"
        return [*found, (answer.result() if answer.done() else None, 0, 0), (one.shells.count, 0, 0)]
    finally:
        one.close()
        edge.close()
        theirs.close()
