"""The access log: one JSON line a request. Never a token, never a query string.

Lines are collected by the loop and written by a thread of their own, one batch at a time: a disk that stands still costs lines, neither the
loop nor memory. The thread alone opens, writes and closes the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from .record import PROTOCOLS, RequestRecord

log = structlog.get_logger()

_FLUSH_SECONDS = 0.25
_BATCH_MAX_BYTES = 4 << 20  # collected while another batch is being written; lines beyond are lost
_CLOSE_SECONDS = 2.0  # what the last batch gets at the end


class Line(msgspec.Struct, omit_defaults=True):
    """A line of the log. Times are milliseconds since the request's head was complete."""

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
    hold_ms: float | UnsetType = UNSET
    first_byte_ms: float | UnsetType = UNSET
    closed_by: str = ""  # client or origin, where the exchange did not end in its usual way
    reason: str = ""  # why the edge answered itself, or cut the exchange short


class AccessLog:
    def __init__(self, path: Path, wall: Callable[[], float]) -> None:
        """Opens the file. Raises OSError where it cannot be opened for appending. After a rotation, SIGUSR1 has it opened again."""
        self._wall = wall
        self._writer = Writer(path)
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._flush: asyncio.TimerHandle | None = None
        self._encode = msgspec.json.Encoder().encode

    @property
    def lost(self) -> int:
        """Returns the number of lines that are not in the file."""
        return self._dropped + self._writer.lost

    @property
    def not_reopened(self) -> int:
        """Returns how often the file could not be opened again."""
        return self._writer.not_reopened

    def add(self, record: RequestRecord) -> None:
        if self._size > _BATCH_MAX_BYTES:
            self._dropped += 1
            return
        path = record.target.partition(b"?")[0].decode("latin-1")
        held, first_byte = _ms(record.held) or UNSET, _ms(record.first_byte - record.began) or UNSET
        data = self._encode(
            Line(
                self._wall(), record.request_id.decode("ascii"), record.client, PROTOCOLS[record.protocol], record.host,
                record.method.decode("latin-1"), path, record.status, record.sent, _ms(record.ended - record.began), held, first_byte,
                record.closed_by, record.reason,
            )
        )  # fmt: skip
        self._lines.append(data)
        self._size += len(data)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Gives what was collected to the thread, if that has written the batch before; otherwise tries again later."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        if not self._lines:
            return
        if self._writer.is_busy:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
            return
        lines, self._lines, self._size = self._lines, [], 0
        self._writer.write(lines)

    def reopen(self) -> None:
        """Opens the file again. What is being written still goes to the file that was open until now."""
        self.flush()
        self._writer.reopen()

    def settle(self, seconds: float) -> bool:
        """Blocks until all lines and orders are carried out; False when the disk takes longer."""
        if not self._writer.wait(seconds):
            return False
        self.flush()
        return self._writer.wait(seconds)

    def close(self) -> None:
        """Closes the log, and blocks for a bounded time: a worker that ends has nothing else to do."""
        self.settle(_CLOSE_SECONDS)
        self._writer.close()
        self._writer.wait(_CLOSE_SECONDS)


class Writer:
    """Owns the file and its thread. `write`, `reopen` and `close` are orders, which the thread carries out one after another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()
        self._is_torn = False  # the file's last line is not complete
        self.lost = 0
        self.not_reopened = 0
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given = self._done = 0
        self._progress = threading.Condition()
        # A daemon: a write that never returns does not keep the process from its end.
        threading.Thread(target=self._run, name="access log", daemon=True).start()

    @property
    def is_busy(self) -> bool:
        return self._done < self._given

    def write(self, lines: list[bytes]) -> None:
        self._order(lambda: self._write(lines))

    def reopen(self) -> None:
        self._order(self._reopen)

    def close(self) -> None:
        self._order(None)

    def wait(self, seconds: float) -> bool:
        """Blocks until every order is carried out; False when that takes longer."""
        with self._progress:
            return self._progress.wait_for(lambda: not self.is_busy, seconds)

    def _order(self, order: Callable[[], None] | None) -> None:
        self._given += 1
        self._orders.put(order)

    # ---- in the thread ----

    def _run(self) -> None:
        is_open = True
        while is_open:
            order = self._orders.get()
            if order is not None:
                order()
            else:
                os.close(self._file)
                is_open = False
            with self._progress:
                self._done += 1
                self._progress.notify_all()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def _reopen(self) -> None:
        """Opens the file again. The old one stays open until the new one is: a descriptor's number that was closed is soon a
        connection's."""
        try:
            new = self._open()
        except OSError as error:
            self.not_reopened += 1
            log.error("access_log.not_reopened", path=str(self._path), error=str(error))
            return
        old, self._file = self._file, new
        self._is_torn = False
        os.close(old)

    def _write(self, lines: list[bytes]) -> None:
        """Writes lines. A disk that is full takes a part: lines that it did not take whole are lost, and the next begins on a line of its
        own."""
        start = b"\n" if self._is_torn else b""
        data = start + b"\n".join(lines) + b"\n"
        at = 0
        with contextlib.suppress(OSError):
            while at < len(data):
                at += os.write(self._file, data[at:] if at else data)
        self.lost += data.count(b"\n", max(at, len(start)))
        if at:
            self._is_torn = not data.endswith(b"\n", 0, at)


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
