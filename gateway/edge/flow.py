"""What an HTTP/2 connection keeps of a stream, and what it lets its peer do for nothing (RFC 9113, 5.2 and 10.5)."""

from __future__ import annotations

from typing import Final

from mypy_extensions import trait

FLOW_SLOTS = (
    "_grown_ms", "_owed", "number", "queue", "queue_end", "receive_window", "receive_size", "received_end", "send_window",
    "paused", "source_paused",
)  # fmt: skip

STREAM_WINDOW: Final = 64 << 10
STREAM_WINDOW_MOST: Final = 8 << 20


@trait
class Flow:
    """A stream's flow control and what waits to be sent on it. Its slots are FLOW_SLOTS, in the classes that have others too."""

    number: int
    send_window: int
    receive_window: int
    receive_size: int
    queue: bytearray
    queue_end: bytes | None  # what is sent after the queue: b"" ends the stream with its last data, else a trailers' block
    received_end: bool
    paused: int  # why the stream is not read (reading.py); while there is a reason, its window is not opened further
    source_paused: bool
    _owed: int
    _grown_ms: int

    def open_flow(self, number: int, send_window: int, now: float) -> None:
        self.number = number
        self.send_window = send_window
        self.receive_window = self.receive_size = STREAM_WINDOW
        self.queue = _NO_QUEUE
        self.queue_end = None
        self.received_end = self.source_paused = False
        self.paused = 0
        self._owed = 0
        self._grown_ms = int(now * 1000)

    def pause_source(self) -> None:
        """Too much waits to be sent: whoever produces it should stop."""

    def resume_source(self) -> None: ...


_NO_QUEUE = bytearray()  # shared: replaced before it is written to


class Budget:
    """What a peer may do for nothing: a burst, refilled with time."""

    __slots__ = ("_at", "_left", "_most", "_rate")

    def __init__(self, most: float, rate: float) -> None:
        self._most, self._rate, self._left, self._at = most, rate, most, 0.0

    def spend(self, now: float) -> bool:
        self._left = min(self._most, self._left + (now - self._at) * self._rate) - 1
        self._at = now
        return self._left > 0
