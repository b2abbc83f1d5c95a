"""An event loop whose clock goes on by itself when nothing is left to do, and whose threads do their work at once, in turn.

A deadline of two minutes is met in no time, and each run of a test takes the same steps in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from gateway import executors
from gateway.sessions import database

_STILL_SECONDS = 5.0  # of the wall's clock, for what comes from outside: there is nothing of the kind


class Stalled(AssertionError):
    """Somebody waits for what never comes."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            ready = super().select(_STILL_SECONDS)
            if not ready:
                raise Stalled("nothing is ready, and nobody waits for the clock")
            return ready
        self.now += timeout
        return []


class TimeWarp(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._warped = _Selector()
        super().__init__(self._warped)

    def time(self) -> float:
        return self._warped.now


async def _run(self: executors.Pool, call: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    await asyncio.sleep(0)  # where a thread would be asked, others go on
    try:
        return call(*arguments)
    finally:
        await asyncio.sleep(0)


def _map(self: executors.Pool, call: Callable[[Any], Any], items: Iterable[Any], seconds: float | None = None) -> list[Any]:
    return [call(item) for item in items]


class _Connection(database.Connection):
    async def open(self) -> None:
        await asyncio.sleep(0)
        self._asked("open", self.seconds)
        self._connection = self._connector()

    async def run(self, work: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        await asyncio.sleep(0)
        try:
            return work(self._conn, *arguments)
        finally:
            await asyncio.sleep(0)

    async def close(self) -> None:
        connection, self._connection = self._conn, None
        connection.close()


async def _to_thread(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    await asyncio.sleep(0)
    return call(*arguments, **named)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Work for threads is done in the loop's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors.Pool, "run", _run)
        patch.setattr(executors.Pool, "map", _map)
        patch.setattr(executors.Pool, "start", lambda self: None)
        patch.setattr(database, "Connection", _Connection)
        patch.setattr(asyncio, "to_thread", _to_thread)
        yield
