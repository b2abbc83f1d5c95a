"""A stream has flow control (RFC 9113, 5.2), and frames that cost us work and their sender nothing have a budget (10.5)."""

from __future__ import annotations

from typing import Final

from mypy_extensions import trait

FLOW_SLOTS = (
    "_grown_ms", "blocked_ms", "end_after_queue", "number", "paused", "queue", "receive_window", "receive_size", "received_ms",
    "received_end", "send_window", "source_paused", "trailers_after_queue", "uncredited",
)  # fmt: skip

STREAM_WINDOW: Final = 64 << 10
STREAM_WINDOW_MOST: Final = 8 << 20
GROW_MS: Final = 500  # a window that is used up faster than this is doubled


@trait
class Flow:
    """Keeps a stream's windows, and the data that waits to be sent on it. The connection (http2_connection.py) calls the methods; whoever
    carries a stream implements them. A class with this trait names FLOW_SLOTS in its own slots, because mypyc's traits have none. Times are
    milliseconds of the loop's clock, because mypyc does not compile a trait's float."""

    number: int
    # What we send: the peer's windows bound it, and what they do not let through is queued.
    send_window: int
    queue: bytearray | None
    end_after_queue: bool  # our half of the stream ends behind what is queued
    trailers_after_queue: bytes  # a field block that ends it; empty: END_STREAM on the last DATA frame does
    source_paused: bool  # whoever produces the data was asked to stop
    blocked_ms: int  # when something was last sent of what is queued
    # What we receive: it is credited to the peer by WINDOW_UPDATE as soon as it is consumed.
    receive_window: int
    receive_size: int  # the window when all is credited
    uncredited: int  # bytes that were received, and not credited yet
    paused: int  # why the stream is not read (reading.py); while there is a reason, its window is not opened further
    received_end: bool
    received_ms: int  # when the peer last sent data, or was allowed to send on
    _grown_ms: int

    def open_flow(self, number: int, send_window: int, now: float) -> None:
        self.number = number
        self.send_window = send_window
        self.queue = None
        self.end_after_queue = False
        self.trailers_after_queue = b""
        self.source_paused = False
        self.receive_window = self.receive_size = STREAM_WINDOW
        self.uncredited = 0
        self.paused = 0
        self.received_end = False
        self.blocked_ms = self.received_ms = self._grown_ms = int(now * 1000)

    def credit(self, now: float, growth_left: int) -> tuple[int, int]:
        """Returns the WINDOW_UPDATE that is due, and how much of it the window has grown by: it doubles where it is used up fast, within
        `growth_left`. (0, 0) while less than half of the window was consumed."""
        if self.uncredited < self.receive_size // 2 or self.received_end:
            return 0, 0
        growth = 0
        now_ms = int(now * 1000)
        if now_ms - self._grown_ms < GROW_MS:
            growth = max(0, min(self.receive_size, STREAM_WINDOW_MOST - self.receive_size, growth_left))
            self.receive_size += growth
        self._grown_ms = now_ms
        update = self.uncredited + growth
        self.receive_window += update
        self.uncredited = 0
        return update, growth

    def on_data(self, data: bytes, end: bool) -> None:
        """Takes DATA, without its padding. Raises H2StreamError where it may not come."""

    def on_reset(self, code: int) -> None:
        """The stream has ended before its time: by the peer's RST_STREAM, or by ours because of a mistake of the peer's."""

    def on_end_sent(self) -> None:
        """Our half of the stream has ended, and everything on it was sent."""

    def pause_source(self) -> None:
        """Too much is queued: whoever produces the data should stop."""

    def resume_source(self) -> None: ...


class Budget:
    """A token bucket bounds how often a peer may do what costs it nothing."""

    __slots__ = ("_at", "_most", "_rate", "_tokens")

    def __init__(self, most: float, rate: float) -> None:
        self._most, self._rate, self._tokens, self._at = most, rate, most, 0.0

    def spend(self, now: float) -> bool:
        """Takes one token; returns False when none is left."""
        self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        return self._tokens > 0
