"""Deadlines are kept in one heap, which one timer checks. An entry of the heap counts only while it is the one registered for its key."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Protocol

import structlog

log = structlog.get_logger()


class Timer(Protocol):
    """A clock that can call back: asyncio's loop, or a test's."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], None]) -> Cancellable: ...


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Deadlines:
    """`due(key)` is called once for each key whose time has come; what it raises for one key keeps no other's from being called."""

    def __init__(self, timer: Timer, due: Callable[[Hashable], None]) -> None:
        self._timer = timer
        self._due = due
        self._heap: list[tuple[float, int, Hashable]] = []
        self._registered: dict[Hashable, tuple[float, int]] = {}
        self._number = 0
        self._handle: Cancellable | None = None
        self._armed = float("inf")

    def set(self, key: Hashable, when: float) -> None:
        """Replaces the key's deadline; `when` is in the timer's seconds."""
        self._number += 1
        self._registered[key] = (when, self._number)
        heapq.heappush(self._heap, (when, self._number, key))
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._registered):
            self._heap = [(at, number, name) for name, (at, number) in self._registered.items()]
            heapq.heapify(self._heap)
        self._arm()

    def clear(self, key: Hashable) -> None:
        self._registered.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._registered

    def __len__(self) -> int:
        return len(self._registered)

    def _arm(self) -> None:
        while self._heap and self._registered.get(self._heap[0][2], (0, 0))[1] != self._heap[0][1]:
            heapq.heappop(self._heap)
        when = self._heap[0][0] if self._heap else float("inf")
        if when == self._armed:
            return
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._armed = when
        if when != float("inf"):
            self._handle = self._timer.call_at(when, self._fire)

    def _fire(self) -> None:
        self._armed = float("inf")
        self._handle = None
        now = self._timer.time()
        ready = []
        while self._heap and self._heap[0][0] <= now:
            _, number, key = heapq.heappop(self._heap)
            if self._registered.get(key, (0, 0))[1] == number:
                del self._registered[key]
                ready.append(key)
        self._arm()
        for key in ready:
            try:
                self._due(key)
            except Exception:
                log.exception("deadline.failed", key=key)
