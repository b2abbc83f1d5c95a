"""What a hypervisor says on QMP is bounded and parsed, or the connection ends: a guest may have taken the hypervisor over."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from vmm.qemu import qmp as module
from vmm.qemu.qmp import Qmp, QmpError


class Pair:
    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.qmp = Qmp(ours)

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.theirs, data)


@pytest.mark.parametrize("said", [b"no json\n", b"[]\n", b"3\n", b'{"error": 1}\n', b'{"return": {}', b'{"event": 4}\n'])
async def test_what_is_no_answer_ends_the_connection_and_no_more(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised into the event loop, and whoever waits is told."""
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.3)
    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    pair = Pair()
    waits = pair.qmp.send("stop")
    await pair.say(said)
    pair.theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(QmpError):
        await asyncio.wait_for(waits, 5)
    assert pair.qmp.closed.done() and not raised


async def test_a_line_without_an_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE_MOST_BYTES", 1 << 16)
    pair = Pair()
    waits = pair.qmp.send("stop")

    async def talk() -> None:
        while not pair.qmp.closed.done():
            await pair.say(b"x" * 4096)

    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(talk(), 5)
        await pair.say(b"x")
    with pytest.raises(QmpError, match="longer than"):
        await asyncio.wait_for(waits, 5)
    assert len(pair.qmp._buffer) <= (1 << 16) + 65536


async def test_events_and_answers_come_in_their_order() -> None:
    pair, events = Pair(), []
    pair.qmp.on_event = events.append
    waits = [pair.qmp.send("stop"), pair.qmp.send("cont")]
    lines = [{"event": "STOP", "data": {}}, {"return": {"a": 1}}, {"error": {"class": "GenericError", "desc": "not now"}}]
    await pair.say(b"".join(json.dumps(line).encode() + b"\r\n" for line in lines))
    assert await waits[0] == {"a": 1}
    with pytest.raises(QmpError, match="not now"):
        await waits[1]
    assert [one["event"] for one in events] == ["STOP"] and not pair.qmp.closed.done()
    pair.qmp.close()


@pytest.mark.parametrize("answer", [None, b"", b"no greeting\n"], ids=["nobody", "silent", "nonsense"])
async def test_a_connection_that_cannot_be_made_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.05)
    path = tmp_path / "s"
    server = None
    if answer is not None:
        said = answer

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(said)

        server = await asyncio.start_unix_server(serve, path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(QmpError):
            await Qmp.connect(path)
    for _ in range(10):
        await asyncio.sleep(0.01)
    if server is not None:
        server.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 5 * (server is not None), "ours are closed; the server's ends follow"
