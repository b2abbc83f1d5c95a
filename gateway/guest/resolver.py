"""The resolver: a microVM's DNS questions, passed to the host's own servers and back (RFC 1035, RFC 7766).

Nothing in a message is changed or believed. Every question gets an answer: a burst waits for its turn, what a server or the way to it
loses is asked again (RFC 1035, 7.2), and what nobody answers is SERVFAIL. Where the microVM has no way out, every question is REFUSED:
names are a way out too. Where its connector is an allow-list, `reply` answers instead of the servers (gateway/guest/allowed_names.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

_ASKING = 64  # questions under way, of one microVM; the rest wait for their turn
_WAITING = 1024  # … as many as that; beyond, the answer is SERVFAIL at once
_PORT = 53
_WAITS_SECONDS = (1.0, 2.0, 4.0)  # for an answer, before all servers are asked again
_STREAM_SECONDS = 30.0
_CONNECT_SECONDS = 3.0
_MESSAGE_BYTES = 4096
_HEADER_BYTES = 12
_SERVFAIL, _REFUSED = 2, 5
Address = tuple[str, int]
Reply = Callable[[bytes], Awaitable[bytes]]


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[str]:
    """Returns the nameservers of resolv.conf(5)."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [words[1] for line in lines if len(words := line.split()) >= 2 and words[0] == "nameserver"]


def without_answer(question: bytes, code: int = _REFUSED) -> bytes:
    """Returns the reply to a question that has a response code and no answer (RFC 1035, 4.1.1)."""
    flags = bytes([0x80 | question[2] & 0x79, code])
    return question[:2] + flags + question[4:6] + bytes(6) + question[12:]


class Names(asyncio.DatagramProtocol):
    """Questions over UDP. Every one has upstream sockets, and so ports, of its own. `reply` stands for the servers where it is given."""

    def __init__(self, upstream: list[str], tasks: set[asyncio.Task[None]], reply: Reply | None = None) -> None:
        self._upstream = upstream
        self._reply = reply
        self._tasks = tasks
        self._asking = 0
        self._waiting: deque[tuple[bytes, Address]] = deque()
        self._known: set[tuple[bytes, Address]] = set()  # a client that asks again does not take a second turn
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by its class

    def datagram_received(self, data: bytes, address: Address) -> None:
        if len(data) < _HEADER_BYTES or data[2] & 0x80:  # no question
            return
        if not self._upstream:
            self._send(without_answer(data), address)
        elif len(self._waiting) >= _WAITING:
            self._send(without_answer(data, _SERVFAIL), address)
        elif (data, address) not in self._known:
            self._known.add((data, address))
            self._waiting.append((data, address))
            self._turn()

    def _turn(self) -> None:
        while self._waiting and self._asking < _ASKING:
            self._asking += 1
            task = asyncio.get_running_loop().create_task(self._ask(*self._waiting.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, question: bytes, address: Address) -> None:
        try:
            answer = await (ask(self._upstream, question) if self._reply is None else self._reply(question))
            self._send(without_answer(question, _SERVFAIL) if answer is None else answer, address)
        finally:
            self._asking -= 1
            self._known.discard((question, address))
            self._turn()

    def _send(self, data: bytes, address: Address) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(data, address)


async def ask(upstream: list[str], question: bytes) -> bytes | None:
    """Returns the first answer of any server, each asked in turn and then again: a late one counts too. None where none comes."""
    asked: dict[str, asyncio.Task[bytes]] = {}
    try:
        for seconds in _WAITS_SECONDS:
            for server in upstream:
                sock = _connected(server)
                if sock is None:
                    continue
                asked[f"{server} {seconds}"] = asyncio.get_running_loop().create_task(_exchange(sock, question))
                answer = await _first(asked, seconds)
                if answer is not None:
                    return answer
        return None
    finally:
        for task in asked.values():
            task.cancel()


def _connected(server: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect((server, _PORT))
    except OSError:
        sock.close()
        return None
    return sock


async def _exchange(sock: socket.socket, question: bytes) -> bytes:
    """Raises OSError where nobody listens."""
    loop = asyncio.get_running_loop()
    with sock:
        await loop.sock_sendall(sock, question)
        while True:
            answer = await loop.sock_recv(sock, _MESSAGE_BYTES)
            if answer[:2] == question[:2]:
                return answer


async def _first(asked: dict[str, asyncio.Task[bytes]], seconds: float) -> bytes | None:
    """Returns the first that ends with an answer, within these seconds; those that end without one are forgotten."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while asked:
        done, _ = await asyncio.wait(asked.values(), timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        for name in [name for name, task in asked.items() if task in done]:
            task = asked.pop(name)
            if task.exception() is None:
                return task.result()
    return None


class NameStreams:
    """Questions over TCP, for answers that do not fit a datagram: a relay. How many there are at once, who accepts them bounds."""

    def __init__(self, upstream: list[str], reply: Reply | None = None) -> None:
        self._upstream = upstream
        self._reply = reply

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_STREAM_SECONDS):
                opened = await self._open() if self._reply is None else None
                if opened is None:
                    await self._answer(reader, writer)
                    return
                theirs, ours = opened
                try:
                    await asyncio.gather(_pour(reader, ours), _pour(theirs, writer))
                finally:
                    ours.transport.abort()
        except (OSError, TimeoutError, EOFError):
            pass
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), _CONNECT_SECONDS)
            writer.transport.abort()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for server in self._upstream:
            with contextlib.suppress(OSError, TimeoutError):
                return await asyncio.wait_for(asyncio.open_connection(server, _PORT), _CONNECT_SECONDS)
        return None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers each question on the stream (RFC 1035, 4.2.2: two bytes of length before a message)."""
        while True:
            question = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            if len(question) < _HEADER_BYTES:
                return
            if self._reply is not None and self._upstream:
                answer = await self._reply(question)
            else:
                answer = without_answer(question, _SERVFAIL if self._upstream else _REFUSED)
            writer.write(len(answer).to_bytes(2, "big") + answer)
            await writer.drain()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_MESSAGE_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
