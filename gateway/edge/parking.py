"""Streams of sessions that sleep: the client's connection stays open here, the application's in the session's own network.

A stream is parked only where nothing is under way in either direction (docs/architecture.md). What the client then sends is kept,
within a bound, and resumes the session; the next incarnation has the same connections, and the stream goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.messages import Route

from .hold import HoldFull

if TYPE_CHECKING:
    from .origin import Origin
    from .worker import Worker

HELD_BYTES = 64 << 10  # of what a client says to a parked stream; then it is not read further


class _Waker:
    """What the holds keep for a session whose parked stream was spoken to."""

    def __init__(self) -> None:
        self.held_for: str | None = None
        self.held_bytes = 0


class Parking:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._parked: dict[str, set[Origin]] = {}
        self._waking: set[str] = set()

    def add(self, origin: Origin) -> None:
        self._parked.setdefault(origin.key[0], set()).add(origin)

    def discard(self, origin: Origin) -> None:
        """A parked connection is over: its client left, or it was cut."""
        parked = self._parked.get(origin.key[0])
        if parked is not None:
            parked.discard(origin)
            if not parked:
                del self._parked[origin.key[0]]

    def wake(self, origin: Origin) -> None:
        """Somebody spoke: the session is resumed, once."""
        session = origin.key[0]
        if session not in self._waking:
            self._waking.add(session)
            self._worker.spawn(self._wake(session))

    async def _wake(self, session: str) -> None:
        worker = self._worker
        deadline = worker.time() + worker.settings.hold_seconds
        try:
            while session in self._parked:
                route = worker.route_of_session(session)
                if route is None or route.gate == "refuse":
                    self.over(session)
                elif route.gate == "open":
                    self.opened(route)
                else:
                    await worker.holds.wait(route, max(0.0, deadline - worker.time()), _Waker())
        except (TimeoutError, HoldFull):
            self.over(session)
        finally:
            self._waking.discard(session)

    def opened(self, route: Route) -> None:
        """The session runs (again): its streams go on, as connections of this incarnation."""
        for origin in self._parked.pop(route.session, ()):
            self._worker.upstream.adopt(origin, route.incarnation)

    def over(self, session: str) -> None:
        """The session will not run again: its streams are cut."""
        for origin in self._parked.pop(session, ()):
            origin.cut()

    def close(self) -> None:
        """The worker ends, and with it what it has parked."""
        for session in list(self._parked):
            self.over(session)

    @property
    def count(self) -> int:
        return sum(map(len, self._parked.values()))
