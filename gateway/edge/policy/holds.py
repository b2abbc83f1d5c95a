"""Requests that wait while their session sleeps or changes state: bounded, oldest first, one resume however many come.

What a worker holds is bounded in total, and shared: the sessions of an account may hold together three times what is still free, and one
of them no more than what is left of that (dynamic thresholds, as switches share their buffers). So who holds much always leaves room for
accounts and sessions that hold nothing, however many hold much.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from gateway.config import Edge
from gateway.messages import Route

from .keys import Key

log = structlog.get_logger()

_TOTAL = 4  # times a session's bounds: what a worker holds in all
_ACCOUNT = 3  # times what is free in all: what the sessions of one account may hold together


TOO_MANY_BYTES = "more of requests' bodies waits for the MicroVM than its share of what is held (edge.held_bytes)"


class HoldFull(Exception):
    """Too many requests, or too many bytes of their bodies, are held; the text says which."""


class Usage:
    """Counts what is held for a session, for an account, or in all."""

    __slots__ = ("held_bytes", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.held_bytes = 0


class Ticket:
    """One held request's part of the bounds; `key` is the application that it waits for."""

    __slots__ = ("account", "held_bytes", "key", "session")

    def __init__(self, key: Key, session: Usage, account: Usage, held_bytes: int) -> None:
        self.key = key
        self.session = session
        self.account = account
        self.held_bytes = held_bytes


class Held(Protocol):
    """A request that is held. `held_for` is set while it is, and goes to `Holds.grow` with what more is read of the body."""

    held_for: Ticket | None

    @property
    def held_bytes(self) -> int:
        """Returns the bytes of the body that were read when the wait begins."""


class _Queue:
    """The requests held for one session, in order of arrival; `usage` counts those, too, that wait for its application's first listen."""

    __slots__ = ("asked", "asked_at", "ports", "usage", "waiters")

    def __init__(self) -> None:
        self.usage = Usage()
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.ports: set[int] = set()
        self.asked: tuple[int, str] | None = None  # incarnation and gate for which control was asked to resume the session
        self.asked_at = 0.0


class Holds:
    """Holds the requests of a worker. `ask(route)` tells control that a request waits."""

    def __init__(self, settings: Edge, ask: Callable[[Route], None]) -> None:
        self._settings = settings
        self._ask = ask
        self._queues: dict[str, _Queue] = {}
        self._accounts: dict[str, Usage] = {}
        self._total = Usage()

    async def wait(self, route: Route, seconds: float, request: Held, port: int = 0) -> float:
        """Waits until the route has changed; returns the seconds since its change was asked for. Raises HoldFull, TimeoutError.
        `port` is the application's, where the request needs a connection to it."""
        ticket = self.enter(route, request, port)
        queue = self._queues[route.session]
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        queue.waiters.append(waiter)
        try:
            if port:
                queue.ports.add(port)
            if queue.asked != (route.incarnation, route.gate):
                self._ask(route)
                queue.asked = (route.incarnation, route.gate)
                queue.asked_at = loop.time()
            async with asyncio.timeout(seconds):
                await waiter
            return loop.time() - queue.asked_at
        finally:
            if not waiter.done() or waiter.cancelled():
                with contextlib.suppress(ValueError):  # the route changed while its client left
                    queue.waiters.remove(waiter)
            if not queue.waiters:  # the next asks anew, also where others wait for the application
                queue.asked = None
                queue.ports.clear()
            self.leave(route, request, ticket)

    def enter(self, route: Route, request: Held, port: int) -> Ticket:
        """Counts a request that waits, for its session or for its application's first listen, until `leave`. Raises HoldFull."""
        queue = self._queues.get(route.session) or _Queue()
        account = self._accounts.get(route.account) or Usage()
        size = request.held_bytes
        if not self._has_room(queue.usage.requests, account.requests):
            raise HoldFull("more requests wait for the MicroVM than its share of what is held (edge.held_requests)")
        if not self._has_room_for_bytes(queue.usage.held_bytes + size, account.held_bytes + size):
            raise HoldFull(TOO_MANY_BYTES)
        self._queues[route.session], self._accounts[route.account] = queue, account
        request.held_for = ticket = Ticket((route.session, route.incarnation, port), queue.usage, account, size)
        self._add(ticket, 1, size)
        return ticket

    def leave(self, route: Route, request: Held, ticket: Ticket) -> None:
        """Ends what `enter` began."""
        request.held_for = None
        self._add(ticket, -1, -ticket.held_bytes)
        if not ticket.session.requests:
            del self._queues[route.session]
        if not ticket.account.requests:
            del self._accounts[route.account]

    def grow(self, ticket: Ticket, size: int) -> bool:
        """Counts more of a held request's body. Returns False where that is more than may be held: the request is then refused, for what
        has been read, or is on its way within a window that was granted, cannot be kept waiting elsewhere."""
        ticket.held_bytes += size
        self._add(ticket, 0, size)
        return self._has_room_for_bytes(ticket.session.held_bytes, ticket.account.held_bytes)

    def _add(self, ticket: Ticket, requests: int, size: int) -> None:
        for usage in (ticket.session, ticket.account, self._total):
            usage.requests += requests
            usage.held_bytes += size

    def _has_room(self, session: int, account: int) -> bool:
        """Whether there is room for one request more than these."""
        most = self._settings.held_requests
        free = _TOTAL * most - self._total.requests
        return session < min(most, _ACCOUNT * free - account)

    def _has_room_for_bytes(self, session: int, account: int) -> bool:
        """Whether there is room for these bytes, of which some may be counted in the total already."""
        most = self._settings.held_bytes
        free = _TOTAL * most - self._total.held_bytes
        return session <= max(0, min(most, _ACCOUNT * free - account))

    def ports(self, session: str) -> set[int]:
        """Returns the ports that the session's held requests will connect to."""
        queue = self._queues.get(session)
        return queue.ports if queue is not None else set()

    def changed(self, session: str) -> None:
        """Lets the session's held requests decide anew, oldest first, because its route has changed."""
        queue = self._queues.get(session)
        if queue is None:
            return
        queue.asked = None
        while queue.waiters:
            waiter = queue.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def ask_again(self, find: Callable[[str], Route | None]) -> None:
        """Asks anew for whatever is held, because control was away."""
        for session, queue in list(self._queues.items()):
            try:
                route = find(session)
                if route is not None and queue.waiters:
                    self._ask(route)
                    queue.asked = (route.incarnation, route.gate)
            except Exception:
                log.exception("edge.not_asked", session=session)

    def statistics(self) -> dict[str, int]:
        return {"sessions": len(self._queues), "requests": self._total.requests, "bytes": self._total.held_bytes}
