"""An SQLite database and the one thread that uses it, which is aiosqlite's."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

import aiosqlite
import structlog

from gateway import executors

log = structlog.get_logger()
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_SECONDS = 60.0  # a commit on a slow disk takes one; when it stands, control is replaced
_ROWS_AT_ONCE = 64  # aiosqlite asks for a number; no cursor crosses the threads here


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits what is done in it, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself where the disk is full
            connection.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """The file has secrets in it, and is its owner's alone; SQLite makes those beside it (-wal, -shm) under its mode."""
    with contextlib.suppress(OSError):  # another user's, say: SQLite tells what it cannot open
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    for one in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        with contextlib.suppress(OSError):
            one.chmod(0o600)
    return sqlite3.connect(path, isolation_level=None)


class _Call:
    __slots__ = ("is_unwanted", "name", "seconds", "since")

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.since = float("inf")  # the call before it has not ended
        self.is_unwanted = False


class Connection(aiosqlite.Connection):
    """A whole function is one hop to the thread, and each has a deadline, from when its turn comes. Past it the thread is taken for lost:
    it stands in the kernel, or has died of a moment without memory, also where it was about to start, for which `Thread.start()` waits for
    ever. So the watchdog of the pools looks here as well, from a thread of its own."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(lambda: self._done(_connect, path), _ROWS_AT_ONCE)
        self._thread.daemon = True  # what stands in it keeps no process from ending
        self._calls: deque[_Call] = deque()  # in the order of their turns
        self._clock = clock
        self.seconds = _SECONDS
        self.on_stuck: Callable[[], None] = executors.replace_process

    async def open(self) -> None:
        """Raises sqlite3.Error, NotStarted."""
        executors.watch(self)
        self._asked("open", self.seconds)
        try:
            await self
        except RuntimeError as error:
            executors.unwatch(self)
            raise executors.NotStarted(f"the store's thread could not be started: {error}") from error
        except BaseException:
            executors.unwatch(self)
            raise

    async def run(self, work: Callable[[sqlite3.Connection, Unpack[Ts]], T], *arguments: *Ts, seconds: float | None = None) -> T:
        """Does work in the thread, after what was asked for before. Raises what it raises. Where the caller is cancelled, work that has
        begun goes on, and work that has not is not done."""
        call = self._asked(getattr(work, "__qualname__", repr(work)), seconds or self.seconds)
        try:
            done: T = await self._execute(self._done_unless, call, work, *arguments)  # type: ignore[no-untyped-call]
        except BaseException:
            call.is_unwanted = True
            raise
        return done

    async def close(self) -> None:
        try:
            await self.run(sqlite3.Connection.close)
        finally:
            try:
                await super().close()
            finally:
                executors.unwatch(self)

    def look(self) -> None:
        """Has the process replaced when the call whose turn it is has not ended by its deadline, or nobody is there to do the next."""
        if self._connection is not None and not self._thread.is_alive():
            log.error("store.thread_ended")
            self.on_stuck()
        try:
            call = self._calls[0]
        except IndexError:
            return
        seconds = self._clock() - call.since
        if seconds > call.seconds:
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else ""
            log.error("store.stands", work=call.name, seconds=round(seconds, 1), where=where)
            self.on_stuck()

    def _asked(self, name: str, seconds: float) -> _Call:
        call = _Call(name, seconds)
        self._calls.append(call)
        if self._calls[0] is call:
            call.since = self._clock()
        return call

    def _done(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return work(*arguments, **named)
        finally:
            self._calls.popleft()
            if self._calls:
                self._calls[0].since = self._clock()

    def _done_unless(self, call: _Call, work: Callable[..., Any], *arguments: Any) -> Any:
        return self._done(_nothing) if call.is_unwanted else self._done(work, self._conn, *arguments)


def _nothing() -> None:
    pass


class Database:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.connection: Connection | None = None

    async def open(self) -> None:
        """Raises sqlite3.Error, NotStarted."""
        connection = Connection(self._path)
        await connection.open()
        self.connection = connection

    async def run(self, work: Callable[[sqlite3.Connection, Unpack[Ts]], T], *arguments: *Ts, seconds: float | None = None) -> T:
        """Does work in the database's thread, after what was asked for before. Raises what it raises."""
        assert self.connection is not None, "the database is not open"
        return await self.connection.run(work, *arguments, seconds=seconds)

    async def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return await self.run(_fetch, statement, values)

    async def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.close()


def _fetch(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> list[Any]:
    return connection.execute(statement, values).fetchall()
