"""Streams of sessions that sleep: the client's connection stays open here, the application's in the session's own network.

A stream is parked only where nothing is under way in either direction (docs/architecture.md). What the client then sends is kept,
within a bound, and resumes the session; the next incarnation has the same connections, and the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from gateway.config import Edge
from gateway.messages import Route

from ..policy.holds import HoldFull, Holds, Ticket
from ..sides import Parkable


class ParkingContext(Protocol):
    """What Parking needs of the worker."""

    settings: Edge
    holds: Holds

    def route_of_session(self, session: str) -> Route | None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a task whose failure is logged."""

    def guard(self, work: Callable[..., object], *arguments: object) -> bool:
        """Does one step, and returns whether it did not raise: what it raises is logged, and ends itself alone."""

    def report_fault(self, session: str, text: str) -> None:
        """Writes a line into the microVM's log."""


class _Waker:
    """What the holds keep for a session whose parked stream was spoken to."""

    def __init__(self) -> None:
        self.held_for: Ticket | None = None
        self.held_bytes = 0


class Parking:
    """Keeps parked connections by session. `adopt(connection, incarnation)` takes one into the pools of the incarnation that runs."""

    def __init__(self, worker: ParkingContext, adopt: Callable[[Parkable, int], None]) -> None:
        self._worker = worker
        self._adopt = adopt
        self._time = asyncio.get_running_loop().time
        self._parked: dict[str, set[Parkable]] = {}
        self._waking: set[str] = set()

    def add(self, connection: Parkable) -> None:
        self._parked.setdefault(connection.key[0], set()).add(connection)

    def discard(self, connection: Parkable) -> None:
        """Forgets a parked connection that is over, because its client left or it was cut."""
        parked = self._parked.get(connection.key[0])
        if parked is not None:
            parked.discard(connection)
            if not parked:
                del self._parked[connection.key[0]]

    def wake(self, connection: Parkable) -> None:
        """Has the session resumed, once however many clients speak on its parked streams."""
        session = connection.key[0]
        if session not in self._waking:
            self._waking.add(session)
            self._worker.spawn(self._wake(session))

    async def _wake(self, session: str) -> None:
        deadline = self._time() + self._worker.settings.hold_seconds
        try:
            while session in self._parked:
                route = self._worker.route_of_session(session)
                if route is None or route.gate == "refuse":
                    self.over(session)
                elif route.gate == "open":
                    self.opened(route)
                else:
                    await self._worker.holds.wait(route, max(0.0, deadline - self._time()), _Waker())
        except (TimeoutError, HoldFull) as error:
            count = self.streams(session)
            why = str(error) or f"it did not run again within {self._worker.settings.hold_seconds:g} s (edge.hold_seconds)"
            self._worker.report_fault(session, f"{count} streams that waited for the MicroVM were closed: {why}")
            self.over(session)
        finally:
            self._waking.discard(session)

    def opened(self, route: Route) -> None:
        """Gives the session's parked connections to the incarnation that runs now; their streams go on."""
        for connection in self._parked.pop(route.session, ()):
            if not self._worker.guard(self._adopt, connection, route.incarnation):
                self._worker.guard(connection.cut)

    def over(self, session: str) -> None:
        """Cuts the streams of a session that will not run again."""
        for connection in self._parked.pop(session, ()):
            self._worker.guard(connection.cut)

    def close(self) -> None:
        """Cuts everything that is parked, because the worker ends."""
        for session in list(self._parked):
            self.over(session)

    def streams(self, session: str) -> int:
        return sum(connection.stream_count for connection in self._parked.get(session, ()))

    @property
    def count(self) -> int:
        return sum(connection.stream_count for parked in self._parked.values() for connection in parked)
