"""A request's body in HTTP/1.1 as it is received: where it ends, what goes on, and how fast it comes (RFC 9112, 6)."""

from __future__ import annotations

from typing import Final

from .chunked import ChunkedBody
from .head import CHUNKED, Trailers

PUNCTUAL: Final = 0
STANDS_STILL: Final = 1
TOO_SLOW: Final = 2


class RequestBody:
    """Bytes go through `take` in any cut, until `is_complete`. `check` is asked about once a second whether the client is late."""

    __slots__ = ("_chunks", "_left", "_received", "_since", "last_at")

    def __init__(self, framing: int, length: int, now: float) -> None:
        self._chunks: ChunkedBody | None = ChunkedBody() if framing == CHUNKED else None
        self._left = length  # of a body with Content-Length: bytes that are still to come
        self._received = 0  # bytes in the current span of time
        self._since = 0.0  # when that span began; 0: none has
        self.last_at = now  # when bytes came last

    @property
    def is_complete(self) -> bool:
        return self._chunks.is_complete if self._chunks is not None else not self._left

    @property
    def trailers(self) -> Trailers | None:
        """Of a complete body, those that may go on."""
        return self._chunks.trailers if self._chunks is not None else None

    def take(self, data: bytes, in_chunks: bool, now: float) -> tuple[int, bytes]:
        """How many leading bytes of `data` are the body's, and what of them goes on: the content or, with `in_chunks`, a chunked body
        as chunks without its end. Raises Malformed."""
        self.last_at = now
        if self._chunks is None:
            used = min(self._left, len(data))
            self._left -= used
            content = data if used == len(data) else data[:used]
        else:
            pieces: list[bytes] = []
            used = self._chunks.feed(data, pieces, in_chunks)
            content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._received += used
        return used, content

    def check(self, now: float, is_paused: bool, seconds: float, bytes_per_second: int) -> int:
        """Whether the body stands still for `seconds`, or comes more slowly than it may over a span of them. A body that is not read
        (`is_paused`) cannot be late."""
        if is_paused or not self._since:
            self._received, self._since = 0, now
            self.last_at = max(self.last_at, now) if is_paused else self.last_at
            return PUNCTUAL
        if now - self.last_at > seconds:
            return STANDS_STILL
        if now - self._since > seconds:
            is_slow = self._received < bytes_per_second * seconds
            self._received, self._since = 0, now
            return TOO_SLOW if is_slow else PUNCTUAL
        return PUNCTUAL
