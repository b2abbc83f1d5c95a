"""An SQLite database and the one thread that uses it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises sqlite3.Error."""
        self._thread = ThreadPoolExecutor(1, "store")
        self._connection = await self._submit(lambda: sqlite3.connect(self._path, isolation_level=None))

    async def run(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Does work in the database's thread, after what was asked for before. Raises what it raises."""
        connection = self._connection
        assert connection is not None, "the database is not open"
        return await self._submit(lambda: work(connection, *args, **kwargs))

    async def rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return await self.run(lambda connection: connection.execute(statement, values).fetchall())

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        if self._connection is not None:
            await self.run(sqlite3.Connection.close)
            self._connection = None
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None
