"""How often something may happen: a number at once, and then so many a second. What a guest can cause for ever has one."""

from __future__ import annotations

from collections.abc import Callable


class Allowance:
    def __init__(self, at_once: float, a_second: float, clock: Callable[[], float]) -> None:
        self._most, self._a_second, self._clock = at_once, a_second, clock
        self._left, self._at = at_once, clock()

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._a_second)
        self._at = now

    def take(self, count: float = 1.0) -> bool:
        """Takes so many where they are there, and none otherwise."""
        self._refill()
        if self._left < count:
            return False
        self._left -= count
        return True

    def spend(self, count: float) -> float:
        """Takes so many, also what is not there; returns in how many seconds there is something again."""
        self._refill()
        self._left -= count
        return max(0.0, -self._left / self._a_second)
