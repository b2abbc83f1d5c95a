"""A connection of HTTP/2, whichever side is ours: frames in and out, flow control, floods (RFC 9113).

`Flow` (flow.py) is what is kept of a stream. The sides (http2.py towards clients, origin2.py towards applications) say what a field
block, data and an end mean. Output is collected and written once in a turn of the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from . import frames as f
from .flow import STREAM_WINDOW, STREAM_WINDOW_MOST, Budget, Flow
from .frames import Code, Fatal, StreamBroken

CONNECTION_WINDOW: Final = 16 << 20  # credited at once: what bounds memory is the streams' windows
_GROWTH_MOST: Final = 16 << 20  # of all streams' windows beyond their first size
_GROW_MS: Final = 500  # a window that is used up faster than this is doubled
QUEUE_HIGH: Final = 128 << 10
QUEUE_LOW: Final = 32 << 10
_CONTROL_BURST, _CONTROL_PER_SECOND = 1000.0, 50.0  # frames that cost us an answer and the peer nothing
_RESET_BURST, _RESET_PER_SECOND = 200.0, 20.0
_CLOSED_KEPT = 256
_CONTINUATIONS_MOST = 16
BY_PEER: Final = 1
BY_US: Final = 2


class Multiplex:
    __slots__ = (
        "_block",
        "_block_frames",
        "_blocked",
        "_buffer",
        "_closed",
        "_control",
        "_credit",
        "_decoder",
        "_flush_due",
        "_growth",
        "_out",
        "_peer_settled",
        "_receive_window",
        "_resets",
        "frame_bytes",
        "goaway_sent",
        "initial_window",
        "last_number",
        "send_window",
        "streams",
        "time",
        "transport",
        "write_paused",
    )  # fmt: skip

    def __init__(self, time: Callable[[], float], list_bytes: int) -> None:
        self.time = time
        self.transport: asyncio.Transport | None = None
        self.streams: dict[int, Any] = {}
        self.last_number = 0  # of the peer's streams, or of ours
        self.initial_window = f.WINDOW_BYTES
        self.send_window = f.WINDOW_BYTES
        self.frame_bytes = f.FRAME_BYTES
        self.goaway_sent = False
        self._decoder = f.new_decoder(list_bytes)
        self._buffer = b""
        self._block: tuple[int, int, list[bytes]] | None = None  # stream, flags, pieces of a field block that goes on
        self._block_frames = 0
        self._out: list[bytes] = []
        self._flush_due = False
        self.write_paused = False
        self._blocked: dict[Any, None] = {}  # streams with a queue, in the order of their turn
        self._receive_window = f.WINDOW_BYTES
        self._credit = 0
        self._growth = 0
        self._closed: dict[int, int] = {}
        self._peer_settled = False
        self._control = Budget(_CONTROL_BURST, _CONTROL_PER_SECOND)
        self._resets = Budget(_RESET_BURST, _RESET_PER_SECOND)

    # ---- what a side says ----

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        """A complete field block. Raises Fatal, StreamBroken."""
        raise AssertionError("a side says what it means")

    def on_data(self, stream: Any, data: bytes, end: bool) -> None: ...

    def on_reset(self, stream: Any, code: int) -> None: ...

    def on_goaway(self, last: int, code: int) -> None: ...

    def on_ping_ack(self, payload: bytes) -> None: ...

    def on_settings(self) -> None: ...

    def is_idle(self, number: int) -> bool:
        """A stream that was never opened (RFC 9113, 5.1)."""
        return number > self.last_number

    # ---- receiving ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=512 << 10)

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        try:
            self._receive(data)
        except Fatal as error:
            self.fail(error.code, str(error))

    def _receive(self, data: bytes, at: int = 0) -> None:
        end = len(data)
        while end - at >= 9:
            length = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
            kind, flags = data[at + 3], data[at + 4]
            number = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            if length > f.FRAME_BYTES:
                raise Fatal(Code.FRAME_SIZE_ERROR, "frame too long")
            begin = at + 9
            at = begin + length
            if at > end:
                at = begin - 9
                break
            if self._block is not None and kind != f.CONTINUATION:
                raise Fatal(Code.PROTOCOL_ERROR, "a field block was not continued")
            if not self._peer_settled and (kind != f.SETTINGS or flags & f.ACK):
                raise Fatal(Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            try:
                if kind < 10:
                    _HANDLERS[kind](self, flags, number, data, begin, at)
            except StreamBroken as error:
                self.break_stream(error)
            if self.transport is None:
                return
        if at < end:
            self._buffer = data[at:]

    def _on_headers(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise Fatal(Code.PROTOCOL_ERROR, "HEADERS on stream 0")
        at, end = _unpadded(flags, data, at, end)
        if flags & f.PRIORITISED:
            if end - at < 5:
                raise Fatal(Code.FRAME_SIZE_ERROR, "HEADERS too short")
            if int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF == number:
                raise Fatal(Code.PROTOCOL_ERROR, "a stream depends on itself")
            at += 5
        if flags & f.END_HEADERS:
            self.on_headers(number, data[at:end], bool(flags & f.END_STREAM))
        else:
            self._block, self._block_frames = (number, flags, [data[at:end]]), 1

    def _on_continuation(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if self._block is None or self._block[0] != number:
            raise Fatal(Code.PROTOCOL_ERROR, "CONTINUATION out of place")
        _, first, pieces = self._block
        pieces.append(data[at:end])
        self._block_frames += 1
        if self._block_frames > _CONTINUATIONS_MOST:
            raise Fatal(Code.ENHANCE_YOUR_CALM, "field block in too many frames")
        if flags & f.END_HEADERS:
            self._block = None
            self.on_headers(number, b"".join(pieces), bool(first & f.END_STREAM))

    def _on_data(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise Fatal(Code.PROTOCOL_ERROR, "DATA on stream 0")
        size = end - at
        self._receive_window -= size
        if self._receive_window < 0:
            raise Fatal(Code.FLOW_CONTROL_ERROR, "the connection's window is exceeded")
        self._credit += size
        if self._credit > CONNECTION_WINDOW // 4:
            self._receive_window += self._credit
            self.put(f.window_update(0, self._credit))
            self._credit = 0
        at, end = _unpadded(flags, data, at, end)
        stream = self.streams.get(number)
        if stream is None or stream.received_end:
            self.closed_stream(number, stream)
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            raise StreamBroken(number, Code.FLOW_CONTROL_ERROR, "the stream's window is exceeded")
        last = bool(flags & f.END_STREAM)
        if not size and not last and not self._control.spend(self.time()):
            raise Fatal(Code.ENHANCE_YOUR_CALM, "too many empty frames")
        if last:
            stream.received_end = True
        stream._owed += size
        self.on_data(stream, data[at:end], last)
        if not stream.paused and not last:
            self.credit(stream)

    def credit(self, stream: Flow) -> None:
        """What was received is gone on: the peer may send as much again, and more where it is fast."""
        if stream._owed < stream.receive_size // 2 or stream.received_end:
            return
        update, now_ms = stream._owed, int(self.time() * 1000)
        if now_ms - stream._grown_ms < _GROW_MS:
            growth = min(stream.receive_size, STREAM_WINDOW_MOST - stream.receive_size, _GROWTH_MOST - self._growth)
            if growth > 0:
                stream.receive_size += growth
                self._growth += growth
                update += growth
        stream._grown_ms = now_ms
        stream.receive_window += update
        stream._owed = 0
        self.put(f.window_update(stream.number, update))

    def closed_stream(self, number: int, stream: Any) -> None:
        """A frame for a stream on which the peer has nothing more to say (RFC 9113, 5.1)."""
        if stream is not None:
            raise StreamBroken(number, Code.STREAM_CLOSED, "the stream's half is closed")
        if self.is_idle(number):
            raise Fatal(Code.PROTOCOL_ERROR, "frame on an idle stream")
        how = self._closed.get(number)
        if how == BY_US:
            return  # sent before our reset arrived
        if how == BY_PEER:
            raise StreamBroken(number, Code.STREAM_CLOSED, "the stream was reset")
        raise Fatal(Code.STREAM_CLOSED, "the stream is closed")

    def _on_priority(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise Fatal(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if end - at != 5:
            raise StreamBroken(number, Code.FRAME_SIZE_ERROR, "PRIORITY's length")
        if int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF == number:
            raise StreamBroken(number, Code.PROTOCOL_ERROR, "a stream depends on itself")

    def _on_rst_stream(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise Fatal(Code.FRAME_SIZE_ERROR, "RST_STREAM's length")
        if not number or self.is_idle(number):
            raise Fatal(Code.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        stream = self.streams.get(number)
        if stream is None:
            return
        self.drop(stream, BY_PEER)
        self.on_reset(stream, int.from_bytes(data[at:end], "big"))
        if not self._resets.spend(self.time()):
            raise Fatal(Code.ENHANCE_YOUR_CALM, "too many resets")

    def _on_settings(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise Fatal(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & f.ACK:
            if end - at:
                raise Fatal(Code.FRAME_SIZE_ERROR, "SETTINGS with ACK and a payload")
            return
        if (end - at) % 6:
            raise Fatal(Code.FRAME_SIZE_ERROR, "SETTINGS's length")
        self._peer_settled = True
        self._spend_control()
        for place in range(at, end, 6):
            self._setting(int.from_bytes(data[place : place + 2], "big"), int.from_bytes(data[place + 2 : place + 6], "big"))
        self.put(f.frame(f.SETTINGS, f.ACK, 0))
        self.on_settings()
        self._unblock()

    def _setting(self, name: int, value: int) -> None:
        if name == f.INITIAL_WINDOW_SIZE:
            if value > f.WINDOW_MAX_BYTES:
                raise Fatal(Code.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE too large")
            change = value - self.initial_window
            self.initial_window = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > f.WINDOW_MAX_BYTES:
                    raise Fatal(Code.FLOW_CONTROL_ERROR, "a window beyond its bound")
        elif name == f.MAX_FRAME_SIZE:
            if not f.FRAME_BYTES <= value < 1 << 24:
                raise Fatal(Code.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE out of range")
            self.frame_bytes = min(value, 4 * f.FRAME_BYTES)
        elif name in (f.ENABLE_PUSH, f.ENABLE_CONNECT_PROTOCOL) and value > 1:
            raise Fatal(Code.PROTOCOL_ERROR, "a setting that is neither 0 nor 1")
        else:
            self.peer_setting(name, value)

    def peer_setting(self, name: int, value: int) -> None: ...

    def _on_push_promise(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        raise Fatal(Code.PROTOCOL_ERROR, "PUSH_PROMISE is not allowed")

    def _on_ping(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise Fatal(Code.PROTOCOL_ERROR, "PING on a stream")
        if end - at != 8:
            raise Fatal(Code.FRAME_SIZE_ERROR, "PING's length")
        if flags & f.ACK:
            self.on_ping_ack(data[at:end])
            return
        self._spend_control()
        self.put(f.frame(f.PING, f.ACK, 0, data[at:end]))

    def _on_goaway(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise Fatal(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if end - at < 8:
            raise Fatal(Code.FRAME_SIZE_ERROR, "GOAWAY's length")
        self.on_goaway(int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF, int.from_bytes(data[at + 4 : at + 8], "big"))

    def _on_window_update(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise Fatal(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE's length")
        size = int.from_bytes(data[at:end], "big") & 0x7FFFFFFF
        if not number:
            if not size:
                raise Fatal(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            self.send_window += size
            if self.send_window > f.WINDOW_MAX_BYTES:
                raise Fatal(Code.FLOW_CONTROL_ERROR, "the connection's window beyond its bound")
            self._unblock()
            return
        stream = self.streams.get(number)
        if stream is None:
            if self.is_idle(number):
                raise Fatal(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            return
        if not size:
            raise StreamBroken(number, Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        stream.send_window += size
        if stream.send_window > f.WINDOW_MAX_BYTES:
            raise StreamBroken(number, Code.FLOW_CONTROL_ERROR, "a window beyond its bound")
        if stream in self._blocked:
            self._unblock()

    def _spend_control(self) -> None:
        if not self._control.spend(self.time()):
            raise Fatal(Code.ENHANCE_YOUR_CALM, "too many frames that want an answer")

    # ---- sending ----

    def put(self, data: bytes) -> None:
        self._out.append(data)
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        self._flush_due = False
        out, self._out = self._out, []
        if self.transport is not None and out:
            self.transport.write(b"".join(out) if len(out) > 1 else out[0])

    def send_data(self, stream: Flow, data: bytes, end: bool) -> None:
        """Sends what the windows allow and keeps the rest; `end` ends our half of the stream."""
        if not stream.queue:
            sent = self._emit(stream, data, end)
            if sent == len(data):
                if end:
                    if not data:
                        self.put(f.frame(f.DATA, f.END_STREAM, stream.number))
                    self.sent_end(stream)
                return
            data = data[sent:]
            stream.queue = bytearray()
        stream.queue += data
        if end:
            stream.queue_end = b""
        self._blocked[stream] = None
        if len(stream.queue) > QUEUE_HIGH and not stream.source_paused:
            stream.source_paused = True
            stream.pause_source()

    def send_trailers(self, stream: Flow, block: bytes) -> None:
        if stream.queue:
            stream.queue_end = block
        else:
            self.put(f.headers(stream.number, block, True))
            self.sent_end(stream)

    def sent_end(self, stream: Any) -> None:
        """Our half of the stream has ended, with everything sent."""

    def _emit(self, stream: Flow, data: bytes, end: bool) -> int:
        size, at = len(data), 0
        window = 0 if self.write_paused else min(stream.send_window, self.send_window, size)
        while at < window:
            stop = min(window, at + self.frame_bytes)
            self.put(f.frame(f.DATA, f.END_STREAM if end and stop == size else 0, stream.number, data[at:stop]))
            at = stop
        stream.send_window -= at
        self.send_window -= at
        return at

    def _unblock(self) -> None:
        """A frame for each stream that waits, in turn, until the windows are used up."""
        turn = deque(self._blocked)
        while turn and self.send_window > 0 and not self.write_paused:
            stream = turn.popleft()
            step = min(len(stream.queue), stream.send_window, self.send_window, self.frame_bytes)
            if step <= 0 or stream not in self._blocked:
                continue
            piece = bytes(stream.queue[:step])
            del stream.queue[:step]
            stream.send_window -= step
            self.send_window -= step
            self.put(f.frame(f.DATA, f.END_STREAM if not stream.queue and stream.queue_end == b"" else 0, stream.number, piece))
            if stream.queue:
                turn.append(stream)
            else:
                self._emptied(stream)
            if stream.source_paused and len(stream.queue) < QUEUE_LOW:
                stream.source_paused = False
                stream.resume_source()

    def _emptied(self, stream: Any) -> None:
        del self._blocked[stream]
        if stream.queue_end:
            self.put(f.headers(stream.number, stream.queue_end, True))
        if stream.queue_end is not None:
            self.sent_end(stream)

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self._unblock()

    # ---- ends ----

    def drop(self, stream: Any, how: int = 0) -> None:
        """A stream is over; what it had of windows is free again."""
        if self.streams.pop(stream.number, None) is None:
            return
        self._blocked.pop(stream, None)
        self._growth -= stream.receive_size - STREAM_WINDOW
        if how:
            self._closed[stream.number] = how
            if len(self._closed) > _CLOSED_KEPT:
                del self._closed[next(iter(self._closed))]

    def reset(self, stream: Any, code: Code) -> None:
        if stream.number in self.streams:
            self.drop(stream, BY_US)
            self.put(f.rst_stream(stream.number, code))

    def break_stream(self, error: StreamBroken) -> None:
        """The peer's mistake on one stream. Many of them are one way to make us work for nothing."""
        stream = self.streams.get(error.stream)
        if stream is not None:
            self.drop(stream, BY_US)
            self.on_reset(stream, error.code)
        else:
            self._closed[error.stream] = BY_US
        self.put(f.rst_stream(error.stream, error.code))
        if not self._resets.spend(self.time()):
            raise Fatal(Code.ENHANCE_YOUR_CALM, "too many broken streams")

    def fail(self, code: Code, text: str) -> None:
        """GOAWAY, and the end of everything on this connection."""
        self.put(f.goaway(self.last_number, code, text))
        self.goaway_sent = True
        self.flush()
        self.end()

    def end(self) -> None:
        """Closes after what was written."""
        if self.transport is not None:
            self.transport.close()


def _unpadded(flags: int, data: bytes, at: int, end: int) -> tuple[int, int]:
    if not flags & f.PADDED:
        return at, end
    if at == end or data[at] >= end - at:
        raise Fatal(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return at + 1, end - data[at]


_HANDLERS: tuple[Callable[[Multiplex, int, int, bytes, int, int], None], ...] = (
    Multiplex._on_data, Multiplex._on_headers, Multiplex._on_priority, Multiplex._on_rst_stream, Multiplex._on_settings,
    Multiplex._on_push_promise, Multiplex._on_ping, Multiplex._on_goaway, Multiplex._on_window_update, Multiplex._on_continuation,
)  # fmt: skip
