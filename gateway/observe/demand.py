"""How many of something are wanted all at once: what is kept ready is sized by it.

What waits serves bursts: so many takes, one behind the other, before another one can be made. Takes that flow, as those of busy clients
do, are served by what is made meanwhile, and a stock sized by their number would be filled for nobody as soon as they leave. So a burst is
what came within a few seconds beyond what came in most of the time before it, or after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

KEPT_SECONDS = 120  # a burst may come again so long
_BURST_SECONDS = 4  # launches at once are spread so far by a host that is busy with the first of them
_FLOW_SECONDS = 16
_RECORD_SECONDS = KEPT_SECONDS + _BURST_SECONDS + _FLOW_SECONDS


def largest_burst(counts: Sequence[int]) -> int:
    """`counts` are takes by second, the newest last: the largest burst of the last KEPT_SECONDS."""
    padded = [0] * (_BURST_SECONDS - 1) + list(counts)
    sums = [sum(padded[at : at + _BURST_SECONDS]) for at in range(len(counts))]
    largest = 0
    for at in sorted(range(max(0, len(sums) - KEPT_SECONDS), len(sums)), key=lambda at: -sums[at]):
        if sums[at] <= largest:  # so are the rest
            break
        before = sums[: max(0, at - _BURST_SECONDS + 1)][-_FLOW_SECONDS:]
        after = sums[at + _BURST_SECONDS :][:_FLOW_SECONDS]
        largest = max(largest, sums[at] - max(_flow(before), _flow(after)))
    return largest


def _flow(sums: Sequence[int]) -> int:
    """Returns what came in most of the time; nothing where less is known."""
    return median_low(sums) if len(sums) == _FLOW_SECONDS else 0


class Demand:
    """Takes by second; the time is the caller's."""

    def __init__(self) -> None:
        self._counts = [0] * _RECORD_SECONDS
        self._second = 0
        self._burst: int | None = 0

    def note(self, now: float) -> None:
        self._go_on(now)
        self._counts[-1] += 1
        self._burst = None

    def burst(self, now: float) -> int:
        """Returns how many may be wanted at once. It costs up to a millisecond: not for what somebody waits for."""
        self._go_on(now)
        if self._burst is None:
            self._burst = largest_burst(self._counts)
        return self._burst

    def _go_on(self, now: float) -> None:
        passed = int(now) - self._second
        if passed > 0:
            self._second += passed
            del self._counts[:passed]
            self._counts += [0] * (_RECORD_SECONDS - len(self._counts))
            self._burst = None
