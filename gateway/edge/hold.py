"""Requests that wait while their session sleeps or changes state: bounded, oldest first, one resume however many come."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gateway.config import Edge
from gateway.messages import Route


class HoldFull(Exception):
    """Too many requests, or too many bytes, are held for this session or in total."""


class Held(Protocol):
    """What is held. `held_for` is the session while it is, and `held_bytes`, read meanwhile, are then reported to `grow`."""

    held_for: str | None

    @property
    def held_bytes(self) -> int: ...


class _Line:
    """The requests held for one session, in order of arrival."""

    __slots__ = ("asked", "asked_at", "held_bytes", "ports", "waiters")

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.held_bytes = 0
        self.ports: set[int] = set()
        self.asked: tuple[int, str] | None = None


class Holds:
    """`ask(route)` tells control that a request waits. The bounds hold for a session, and fourfold in total."""

    def __init__(self, settings: Edge, ask: Callable[[Route], None]) -> None:
        self._settings = settings
        self._ask = ask
        self._lines: dict[str, _Line] = {}
        self._total = 0

    async def wait(self, route: Route, seconds: float, request: Held, port: int = 0) -> float:
        """Returns when the route has changed; the seconds since its change was asked for. Raises HoldFull, TimeoutError.
        `port` is the application's, where the request needs a connection to it."""
        size = request.held_bytes
        loop = asyncio.get_running_loop()
        line = self._lines.get(route.session) or _Line()
        if (
            len(line.waiters) >= self._settings.held_requests
            or line.held_bytes + size > self._settings.held_bytes
            or self._total >= 4 * self._settings.held_requests
        ):
            raise HoldFull("more requests, or bytes of bodies, wait for the MicroVM than are held (edge.held_requests, edge.held_bytes)")
        self._lines[route.session] = line
        if line.asked != (route.incarnation, route.gate):
            line.asked = (route.incarnation, route.gate)
            line.asked_at = loop.time()
            self._ask(route)
        if port:
            line.ports.add(port)
        waiter: asyncio.Future[None] = loop.create_future()
        line.waiters.append(waiter)
        line.held_bytes += size
        self._total += 1
        request.held_for = route.session
        try:
            async with asyncio.timeout(seconds):
                await waiter
            return loop.time() - line.asked_at
        finally:
            request.held_for = None
            self._total -= 1
            line.held_bytes -= request.held_bytes
            if not waiter.done() or waiter.cancelled():
                with contextlib.suppress(ValueError):  # the route changed while its client left
                    line.waiters.remove(waiter)
            if not line.waiters and self._lines.get(route.session) is line:
                del self._lines[route.session]

    def grow(self, session: str, size: int) -> bool:
        """More of a held request's body was read; False when that is enough."""
        line = self._lines[session]
        line.held_bytes += size
        return line.held_bytes < self._settings.held_bytes

    def ports(self, session: str) -> set[int]:
        """Where the session's held requests will connect to."""
        line = self._lines.get(session)
        return line.ports if line is not None else set()

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
