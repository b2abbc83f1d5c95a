"""Requests that wait while their session sleeps or changes state: bounded, oldest first, one resume however many come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.config import Edge
from gateway.messages import Route


class HoldFull(Exception):
    """Too many requests, or too many bytes, are held for this session or in total."""


class _Line:
    """The requests held for one session, in order of arrival."""

    __slots__ = ("asked", "held_bytes", "waiters")

    def __init__(self) -> None:
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.held_bytes = 0
        self.asked: tuple[int, str] | None = None


class Holds:
    """`ask(route)` tells control that a request waits. The bounds hold for a session, and fourfold in total."""

    def __init__(self, settings: Edge, ask: Callable[[Route], None]) -> None:
        self._settings = settings
        self._ask = ask
        self._lines: dict[str, _Line] = {}
        self._total = 0

    async def wait(self, route: Route, seconds: float, size: int) -> None:
        """Returns when the route has changed. Raises HoldFull, TimeoutError."""
        line = self._lines.get(route.session) or _Line()
        if (
            len(line.waiters) >= self._settings.held_requests
            or line.held_bytes + size > self._settings.held_bytes
            or self._total >= 4 * self._settings.held_requests
        ):
            raise HoldFull(route.session)
        self._lines[route.session] = line
        if line.asked != (route.incarnation, route.gate):
            line.asked = (route.incarnation, route.gate)
            self._ask(route)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiters.append(waiter)
        line.held_bytes += size
        self._total += 1
        try:
            async with asyncio.timeout(seconds):
                await waiter
        finally:
            self._total -= 1
            line.held_bytes -= size
            if not waiter.done() or waiter.cancelled():
                line.waiters.remove(waiter)
            if not line.waiters and self._lines.get(route.session) is line:
                del self._lines[route.session]

    def changed(self, session: str) -> None:
        """The session's route is another now: everyone decides anew, oldest first."""
        line = self._lines.get(session)
        if line is None:
            return
        line.asked = None
        while line.waiters:
            waiter = line.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def ask_again(self, find: Callable[[str], Route | None]) -> None:
        """After control was away: whatever is held is asked for anew."""
        for session, line in self._lines.items():
            route = find(session)
            if route is not None and line.waiters:
                line.asked = (route.incarnation, route.gate)
                self._ask(route)

    def statistics(self) -> dict[str, int]:
        return {"sessions": len(self._lines), "requests": self._total}
