"""Whose turn it is: so many builds at once, the rest in the order in which they came, each told how many are before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Turns:
    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: list[tuple[asyncio.Future[None], Callable[[int], None]]] = []

    @contextlib.asynccontextmanager
    async def turn(self, say: Callable[[int], None]) -> AsyncIterator[None]:
        """`say` is called with how many builds must end first, once it waits and whenever that changes."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            mine = (asyncio.get_running_loop().create_future(), say)
            self._waiting.append(mine)
            say(len(self._waiting))
            try:
                await mine[0]
            except asyncio.CancelledError:
                if not mine[0].cancelled():  # its turn had come
                    self._next()
                elif mine in self._waiting:
                    self._leave(mine)
                raise
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            self._leave(first)
            if not first[0].done():
                first[0].set_result(None)
                return
        self._free += 1

    def _leave(self, one: tuple[asyncio.Future[None], Callable[[int], None]]) -> None:
        at = self._waiting.index(one)
        del self._waiting[at]
        for number, (_, say) in enumerate(self._waiting[at:], at + 1):
            say(number)
