"""The resolver: a microVM's DNS questions, passed to the host's own servers and back (RFC 1035, RFC 7766).

Nothing in a message is changed or believed. Where the microVM has no way out, every question is REFUSED: names are a way
out too.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import cast

_ASKING = 64  # questions under way, of one microVM
_STREAMS = 4
_SECONDS = 5.0
_STREAM_SECONDS = 30.0
_MESSAGE_BYTES = 4096
_HEADER_BYTES = 12
_REFUSED = 5


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The nameservers of resolv.conf(5)."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [words[1] for line in lines if len(words := line.split()) >= 2 and words[0] == "nameserver"]


def refused(question: bytes) -> bytes:
    """The answer REFUSED to a question (RFC 1035, 4.1.1)."""
    flags = bytes([0x80 | question[2] & 0x79, _REFUSED])
    return question[:2] + flags + question[4:6] + bytes(6) + question[12:]


class Names(asyncio.DatagramProtocol):
    """Questions over UDP. Every one has an upstream socket, and so a port, of its own."""

    def __init__(self, upstream: list[str], tasks: set[asyncio.Task[None]]) -> None:
        self._upstream = upstream
        self._tasks = tasks
        self._asking = 0
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by its class

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        if len(data) < _HEADER_BYTES or data[2] & 0x80 or self._asking >= _ASKING:
            return
        if not self._upstream:
            self._send(refused(data), address)
            return
        self._asking += 1
        task = asyncio.get_running_loop().create_task(self._ask(data, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, question: bytes, address: tuple[str, int]) -> None:
        try:
            for server in self._upstream:
                answer = await _exchange(server, question)
                if answer is not None:
                    self._send(answer, address)
                    return
        finally:
            self._asking -= 1

    def _send(self, data: bytes, address: tuple[str, int]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(data, address)


async def _exchange(server: str, question: bytes) -> bytes | None:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            async with asyncio.timeout(_SECONDS):
                sock.connect((server, 53))
                await loop.sock_sendall(sock, question)
                while True:
                    answer = await loop.sock_recv(sock, _MESSAGE_BYTES)
                    if answer[:2] == question[:2]:
                        return answer
        except (OSError, TimeoutError):
            return None


class NameStreams:
    """Questions over TCP, for answers that do not fit a datagram: a relay, for a few streams at once."""

    def __init__(self, upstream: list[str]) -> None:
        self._upstream = upstream
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._upstream or self._open >= _STREAMS:
            writer.transport.abort()
            return
        self._open += 1
        try:
            async with asyncio.timeout(_STREAM_SECONDS):
                theirs, ours = await asyncio.open_connection(self._upstream[0], 53)
                try:
                    await asyncio.gather(_pour(reader, ours), _pour(theirs, writer))
                finally:
                    ours.transport.abort()
        except (OSError, TimeoutError):
            pass
        finally:
            self._open -= 1
            writer.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_MESSAGE_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
