"""A request's body in HTTP/1.1 is followed as it is received: where it ends, what goes on, and how fast it comes (RFC 9112, 6)."""

from __future__ import annotations

from typing import Final

from .chunked import ChunkedBody
from .http1_head import CHUNKED, Trailers

PUNCTUAL: Final = 0
STANDS_STILL: Final = 1
TOO_SLOW: Final = 2


class Pace:
    """Measures how fast a body comes, over spans of time: what drips does not keep its request open. Both protocols ask it."""

    __slots__ = ("_counted", "_since")

    def __init__(self) -> None:
        self._counted = 0  # bytes that had come when the current span began
        self._since = 0.0  # when that was; 0: no span has begun

    def check(self, received: int, now: float, is_paused: bool, seconds: float, bytes_per_second: int) -> bool:
        """Returns whether the body comes too slowly, of which `received` bytes have come in all. A body that is not read (`is_paused`)
        cannot be late."""
        if is_paused or not self._since:
            self._counted, self._since = received, now
            return False
        if now - self._since <= seconds:
            return False
        is_slow = received - self._counted < bytes_per_second * seconds
        self._counted, self._since = received, now
        return is_slow


class RequestBody:
    """Bytes go through `take` in any cut, until `is_complete`. `check` is asked about once a second whether the client is late."""

    __slots__ = ("_chunks", "_pace", "_received", "_remaining", "last_at")

    def __init__(self, framing: int, length: int, now: float) -> None:
        self._chunks: ChunkedBody | None = ChunkedBody() if framing == CHUNKED else None
        self._remaining = length  # of a body with Content-Length: bytes that are still to come
        self._received = 0
        self._pace: Pace | None = None  # since it was first asked for
        self.last_at = now  # when bytes came last

    @property
    def is_complete(self) -> bool:
        return self._chunks.is_complete if self._chunks is not None else not self._remaining

    @property
    def trailers(self) -> Trailers | None:
        """Returns the trailers of a complete body that may go on."""
        return self._chunks.trailers if self._chunks is not None else None

    def take(self, data: bytes, in_chunks: bool, now: float) -> tuple[int, bytes]:
        """Returns how many leading bytes of `data` are the body's, and what of them goes on: the content or, with `in_chunks`, a chunked
        body as chunks without its end. Raises Malformed."""
        self.last_at = now
        if self._chunks is None:
            used = min(self._remaining, len(data))
            self._remaining -= used
            content = data if used == len(data) else data[:used]
        else:
            pieces: list[bytes] = []
            used = self._chunks.feed(data, pieces, in_chunks)
            content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._received += used
        return used, content

    def check(self, now: float, is_paused: bool, seconds: float, bytes_per_second: int) -> int:
        """Returns whether the body stands still for `seconds`, or comes more slowly than it may over a span of them. A body that is not
        read (`is_paused`) cannot be late."""
        pace = self._pace
        if pace is None:
            pace = self._pace = Pace()
        is_slow = pace.check(self._received, now, is_paused, seconds, bytes_per_second)
        if is_paused:
            self.last_at = max(self.last_at, now)
        elif now - self.last_at > seconds:
            return STANDS_STILL
        return TOO_SLOW if is_slow else PUNCTUAL
