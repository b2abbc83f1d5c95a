"""Where the time of one launch, resume or suspend goes, step by step: what `torpor trace` shows."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.messages import Step


class Steps:
    """Each mark ends the step that its name says. `where` is the process that took it."""

    def __init__(self, where: str, work: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._where = where
        self._clock = clock
        self._last = clock()
        self.work = work
        self.started_at = time.time()
        self.steps: list[Step] = []

    def mark(self, what: str) -> None:
        now = self._clock()
        self.steps.append(Step(self._where, what, (now - self._last) * 1e3))
        self._last = now
