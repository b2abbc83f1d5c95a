"""The access log: one JSON line a request, written by the worker in batches. Never a token, never a query string."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .exchange import Exchange

PROTOCOLS = ("HTTP/1.1", "HTTP/2")
_FLUSH_SECONDS = 0.25
_BUFFER_MAX_BYTES = 4 << 20  # a disk that stands still costs lines, not memory


class Line(msgspec.Struct, omit_defaults=True):
    """Times in milliseconds since the request's head was complete."""

    time: float  # seconds since the epoch, of the request's end
    id: str
    client: str
    protocol: str
    host: str
    method: str
    path: str
    status: int
    sent_bytes: int
    total_ms: float
    hold_ms: float = 0.0
    first_byte_ms: float = 0.0
    closed_by: str = ""  # client or origin, where the exchange did not end in its usual way


class AccessLog:
    def __init__(self, path: Path) -> None:
        """Opened for appending; after a rotation, SIGUSR1 has it opened again."""
        self._path = path
        self._file = self._open()
        self._lines: list[bytes] = []
        self._size = 0
        self._due = False
        self.lost = 0
        self._encode = msgspec.json.Encoder().encode

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def add(self, exchange: Exchange, wall: float, now: float, closed_by: str) -> None:
        if self._size > _BUFFER_MAX_BYTES:
            self.lost += 1
            return
        host, method, target = _what(exchange)
        data = self._encode(
            Line(
                wall, exchange.request_id.decode("ascii"), exchange.peer, PROTOCOLS[exchange.protocol],
                host, method.decode("latin-1"), target.partition(b"?")[0].decode("latin-1"), exchange.status, exchange.sent,
                _ms(now - exchange.began), _ms(exchange.held_seconds), _ms(exchange.first_byte - exchange.began), closed_by,
            )
        )  # fmt: skip
        self._lines.append(data)
        self._size += len(data)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        self._due = False
        lines, self._lines, self._size = self._lines, [], 0
        try:
            if lines:
                os.write(self._file, b"\n".join(lines) + b"\n")
        except OSError:
            self.lost += len(lines)

    def reopen(self) -> None:
        self.flush()
        os.close(self._file)
        self._file = self._open()

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def _what(exchange: Exchange) -> tuple[str, bytes, bytes]:
    """Host, method and target."""
    head, again = exchange.head, exchange.again
    if head is not None:
        return head.host, head.method, head.target
    if again is not None:
        method, target, _ = again.rewritten.split(b" ", 2)
        return again.memo.host, method, target
    return "", b"", b""  # a head that could not be read


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
