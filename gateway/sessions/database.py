"""An SQLite database and the one thread that uses it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, Unpack

from gateway.executors import Pool

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_SECONDS = 60.0  # a commit on a slow disk takes one; when it stands, control is replaced


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


class Database:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = Pool("store", 1, _SECONDS)
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises sqlite3.Error, NotStarted."""
        self._connection = await self._thread.run(lambda: sqlite3.connect(self._path, isolation_level=None))

    async def run(self, work: Callable[[sqlite3.Connection, Unpack[Ts]], T], *arguments: *Ts, seconds: float | None = None) -> T:
        """Does work in the database's thread, after what was asked for before. Raises what it raises, and Overdue."""
        assert self._connection is not None, "the database is not open"
        return await self._thread.run(work, self._connection, *arguments, seconds=seconds)

    async def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return await self.run(_fetch, statement, values)

    async def close(self) -> None:
        if self._connection is not None:
            await self.run(sqlite3.Connection.close)
            self._connection = None
        self._thread.close()


def _fetch(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> list[Any]:
    return connection.execute(statement, values).fetchall()
