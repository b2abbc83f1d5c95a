"""The edge's workers report of running sessions when each was last active, and how many of its requests wait for an answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable


class _Activity:
    __slots__ = ("counts", "last", "waiting")

    def __init__(self, now: float) -> None:
        self.counts: dict[Hashable, int] = {}  # by worker, as last reported
        self.waiting: dict[Hashable, int] = {}
        self.last = now


class Liveness:
    """`time` is the clock of `last_active`: monotonic seconds."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._sessions: dict[str, _Activity] = {}

    def _of(self, session: str) -> _Activity:
        activity = self._sessions.get(session)
        if activity is None:
            activity = self._sessions[session] = _Activity(self._time())
        return activity

    def report(self, worker: Hashable, session: str, count: int, seconds_ago: float, waiting: int) -> None:
        activity = self._of(session)
        activity.counts[worker] = count
        activity.waiting[worker] = waiting
        activity.last = max(activity.last, self._time() - seconds_ago)

    def worker_left(self, worker: Hashable) -> None:
        """Notes that a worker has left: what it has not reported counts as activity now."""
        for activity in self._sessions.values():
            count, waiting = activity.counts.pop(worker, None), activity.waiting.pop(worker, 0)
            if count is not None or waiting:
                activity.last = self._time()

    def touch(self, session: str) -> float:
        """Counts as activity now; the time."""
        activity = self._of(session)
        activity.last = self._time()
        return activity.last

    def last_active(self, session: str) -> float:
        """Returns when the session was last active, which is now while a request waits for its answer."""
        activity = self._of(session)
        return self.touch(session) if any(activity.waiting.values()) else activity.last

    def counts(self, session: str) -> dict[Hashable, int]:
        """Returns a copy of what each worker last reported."""
        return dict(self._of(session).counts)

    def forget(self, session: str) -> None:
        self._sessions.pop(session, None)
