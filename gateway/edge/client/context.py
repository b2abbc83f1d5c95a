"""What an exchange, and the connection that carries it, needs of the worker that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from gateway.config import Edge
from gateway.observe.spans import Spans
from gateway.tokens import Checker

from ..origin.upstream import Upstream
from ..policy.fairness import FairQueue
from ..policy.head_cache import HeadCache
from ..policy.holds import Holds
from ..policy.routes import RouteTable
from ..records.counters import Counters
from .forwarding import Forwarding


class Context(Protocol):
    settings: Edge
    time: Callable[[], float]  # the loop's clock
    wall: Callable[[], float]  # seconds since the epoch
    clients: set[Any]  # connections that are open
    heads: HeadCache
    checker: Checker
    routes: RouteTable
    fairness: FairQueue
    holds: Holds
    forwarding: Forwarding
    counters: Counters
    spans: Spans
    upstream: Upstream
    is_draining: bool

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a task; the worker logs its failure."""

    async def lookup(self, host: str, session: str) -> bool:
        """Asks control for a host that is not in the table; whether its answer is known."""

    def report_fault(self, session: str, text: str) -> None:
        """Writes a line into the microVM's log."""
