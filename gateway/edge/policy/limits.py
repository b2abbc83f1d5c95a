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
    """Returns the bounds of one worker, or None where nothing is limited. Workers share a session's bounds evenly, and each has at
    least one of everything."""
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
    """Token buckets of one session at one worker: each holds at most a second's worth, so that is the largest burst. Its exchanges
    count their requests, connections and bytes here."""

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
        """Counts a request; returns False when it is one too many in this second."""
        self._refill()
        if self._requests < 1:
            return False
        self._requests -= 1
        return True

    def join(self) -> bool:
        """Counts a connection, until `leave`; returns False when it is one too many."""
        if self.connections >= self._bounds.connections:
            return False
        self.connections += 1
        return True

    def leave(self) -> None:
        self.connections -= 1

    def spend(self, size: int) -> float:
        """Counts bytes of a body in either direction, and returns how many seconds their sender has to wait before the next: bytes are
        delayed, never refused (service reference, 3.5)."""
        self._refill()
        self._bytes -= size
        return max(0.0, -self._bytes / self._bounds.bytes_per_second)
