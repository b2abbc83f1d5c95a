"""Limits of a session's endpoint by profile (service reference, 3.5): requests a second, connections, bytes a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.config import Edge

# minimumMemoryInMiB to (connections, requests a second, bytes a second).
_AWS = {
    512: (8, 40, 1_000_000), 1024: (16, 40, 2_000_000), 2048: (32, 40, 4_000_000), 4096: (64, 80, 8_000_000),
    8192: (128, 160, 16_000_000),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bounds:
    connections: int
    requests_per_second: int
    bytes_per_second: int


def bounds_of(settings: Edge, baseline_mib: int) -> Bounds | None:
    """None where nothing is limited. The bounds of one worker: workers share them evenly, at least one of each."""
    if settings.limits == "none":
        return None
    if settings.limits == "aws":
        size = next((size for size in sorted(_AWS) if size >= baseline_mib), 8192)
        found = _AWS[size]
    else:
        found = (settings.limit_connections, settings.limit_requests_per_second, settings.limit_bytes_per_second)
    workers = settings.worker_count
    return Bounds(*(max(1, value // workers) for value in found))


class Limiter:
    """One session's at one worker."""

    __slots__ = ("_at", "_bounds", "_bytes", "_clock", "_requests", "connections")

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._at = clock()
        self._requests = float(bounds.requests_per_second)
        self._bytes = float(bounds.bytes_per_second)
        self.connections = 0

    def _refill(self) -> None:
        now = self._clock()
        bounds, passed = self._bounds, now - self._at
        self._at = now
        self._requests = min(bounds.requests_per_second, self._requests + passed * bounds.requests_per_second)
        self._bytes = min(bounds.bytes_per_second, self._bytes + passed * bounds.bytes_per_second)

    def take(self) -> bool:
        """One request; False when there are too many a second. A burst is a second's worth."""
        self._refill()
        if self._requests < 1:
            return False
        self._requests -= 1
        return True

    def join(self) -> bool:
        """One more connection; False when there are too many."""
        if self.connections >= self._bounds.connections:
            return False
        self.connections += 1
        return True

    def leave(self) -> None:
        self.connections -= 1

    def spend(self, size: int) -> float:
        """Bytes of a body in either direction; the seconds to wait before the next. Nothing is refused (reference, 3.5)."""
        self._refill()
        self._bytes -= size
        return max(0.0, -self._bytes / self._bounds.bytes_per_second)
