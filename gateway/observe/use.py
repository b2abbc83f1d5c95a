"""How often something was taken lately: what is kept ready is sized by it."""

from __future__ import annotations

from collections import deque

USE_SECONDS = 120.0


class Use:
    """How often something was taken lately; the time is the caller's."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def note(self, now: float) -> None:
        self._times.append(now)

    def recent(self, now: float) -> int:
        while self._times and self._times[0] < now - USE_SECONDS:
            self._times.popleft()
        return len(self._times)
