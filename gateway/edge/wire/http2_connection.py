"""A connection of HTTP/2, whichever side is ours, takes and sends frames, keeps flow control and withstands floods (RFC 9113).

`Flow` (http2_flow.py) is what is kept of a stream. The sides (client/http2.py towards clients, origin/http2.py towards applications) say
what a field block means, and their streams what data, a reset and an end mean. The machine knows no event loop: the clock and the
scheduling of a flush are given to it, and bytes come in by `data_received` and go out by the transport. Output is collected and written
once in a turn of the loop, earlier where it is much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from ..reading import PEER_SLOW, ReadGate
from . import http2_frames as f
from .http2_flow import STREAM_WINDOW, Budget, Flow
from .http2_frames import Code, H2ConnectionError, H2StreamError

CONNECTION_WINDOW: Final = 16 << 20  # credited at once: what bounds memory is the streams' windows
_GROWTH_MOST: Final = 16 << 20  # of all streams' windows beyond their first size
WRITE_HIGH_BYTES: Final = 512 << 10  # of the transport's buffer: beyond, nothing more is given to it
_OUT_BYTES: Final = 256 << 10  # collected output beyond this is written at once
QUEUE_HIGH: Final = 128 << 10
QUEUE_LOW: Final = 32 << 10
_CONTROL_BURST, _CONTROL_PER_SECOND = 1000.0, 50.0  # frames that cost us an answer and the peer nothing
_RESET_BURST, _RESET_PER_SECOND = 200.0, 20.0  # CVE-2023-44487, CVE-2025-8671
_CLOSED_KEPT = 256
_CONTINUATIONS_MOST = 16
_SETTINGS_MOST = 32  # parameters of a frame, each of which can move the windows of all streams
BY_PEER: Final = 1
BY_US: Final = 2


class Transport(Protocol):
    """The part of asyncio.Transport that is used."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...
    def write_eof(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


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
        "_out_bytes",
        "_peer_settled",
        "_receive_window",
        "_resets",
        "call_soon",
        "frame_bytes",
        "goaway_last",
        "has_closed",
        "incomplete_since",
        "initial_window",
        "is_shutting_down",
        "last_number",
        "reading",
        "send_window",
        "streams",
        "time",
        "touched",
        "transport",
        "write_paused",
    )  # fmt: skip

    def __init__(self, time: Callable[[], float], call_soon: Callable[[Callable[[], None]], object], list_bytes: int) -> None:
        """Makes the machine. `call_soon` calls a function later, once what was received in this turn is done; `list_bytes` bounds a decoded
        field list."""
        self.time = time
        self.call_soon = call_soon
        self.transport: Transport | None = None
        self.touched = time()  # when something was last received
        self.streams: dict[int, Flow] = {}
        self.last_number = 0  # of the peer's streams, or of ours
        self.initial_window = f.WINDOW_BYTES
        self.send_window = f.WINDOW_BYTES
        self.frame_bytes = f.FRAME_BYTES
        self.has_closed = False  # all was said: what comes is not looked at, and nothing more is sent
        self.is_shutting_down = False  # no stream begins any more, and the connection closes with its last one
        self.goaway_last = f.LAST_POSSIBLE  # of the peer's streams, which our GOAWAY has named: later ones are ignored (RFC 9113, 6.8)
        self._decoder = f.new_decoder(list_bytes)
        self._buffer = b""
        self.incomplete_since = 0.0  # a field block, or a frame other than DATA, has begun and not come whole
        self._block: tuple[int, int, list[bytes]] | None = None  # stream, flags, pieces of a field block that goes on
        self._block_frames = 0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._flush_due = False
        self.write_paused = False  # the peer does not read, and the transport's buffer is full
        self.reading: ReadGate | None = None  # while it is closed, frames that have come wait in the buffer
        self._blocked: dict[Flow, None] = {}  # streams with a queue, in the order of their turn
        self._receive_window = f.WINDOW_BYTES
        self._credit = 0
        self._growth = 0
        self._closed: dict[int, int] = {}
        self._peer_settled = False
        self._control = Budget(_CONTROL_BURST, _CONTROL_PER_SECOND)
        self._resets = Budget(_RESET_BURST, _RESET_PER_SECOND)

    # ---- what a side says ----

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        """Takes a complete field block. Raises H2ConnectionError, H2StreamError."""
        raise AssertionError("a side says what it means")

    def on_goaway(self, last: int, code: int) -> None: ...

    def on_ping_ack(self, payload: bytes) -> None: ...

    def on_settings(self) -> None: ...

    def is_idle(self, number: int) -> bool:
        """Whether the stream was never opened (RFC 9113, 5.1)."""
        return number > self.last_number

    @property
    def last_peer_stream(self) -> int:
        """Returns the last stream of the peer's that we have acted on."""
        return min(self.last_number, self.goaway_last)

    # ---- receiving ----

    def connection_made(self, transport: object) -> None:
        self.transport = cast(Transport, transport)
        self.reading = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.has_closed:
            return
        self.touched = self.time()
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        try:
            self._receive(data)
        except H2ConnectionError as error:
            self.fail(error.code, str(error))

    def _receive(self, data: bytes) -> None:
        at, end, reading = 0, len(data), self.reading
        assert reading is not None
        while end - at >= 9 and not reading.reasons:
            length = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
            kind, flags = data[at + 3], data[at + 4]
            number = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            if length > f.FRAME_BYTES:
                raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "frame too long")
            begin = at + 9
            at = begin + length
            if at > end:
                at = begin - 9
                break
            if self._block is not None and kind != f.CONTINUATION:
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "a field block was not continued")
            if not self._peer_settled and (kind != f.SETTINGS or flags & f.ACK):
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            try:
                if kind < 10:
                    _HANDLERS[kind](self, flags, number, data, begin, at)
            except H2StreamError as error:
                self.break_stream(error)
            if self.transport is None or self.has_closed:
                return
        if at < end:
            self._buffer = data[at:]
            if at and self._block is None:
                self.incomplete_since = 0.0  # another frame has begun
            self._incomplete()
        elif self._block is None:
            self.incomplete_since = 0.0

    def incomplete_of(self, number: int) -> int:
        """Returns how many bytes have come of a DATA frame of this stream that is not whole yet."""
        buffer = self._buffer
        if len(buffer) < 9 or buffer[3] != f.DATA or int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF != number:
            return 0
        return len(buffer) - 9

    def _incomplete(self) -> None:
        """Notes what has begun and not come whole. Of a DATA frame, what has come is its stream's progress. Whatever else has begun has to
        end: its clock runs from its first byte, whatever trickles in meanwhile."""
        buffer = self._buffer
        stream = None
        if self._block is None and len(buffer) >= 9 and buffer[3] == f.DATA:
            stream = self.streams.get(int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF)
        if stream is not None:
            stream.received_ms = int(self.touched * 1000)
            self.incomplete_since = 0.0
        else:
            self.incomplete_since = self.incomplete_since or self.touched

    @property
    def read_paused(self) -> bool:
        return self.reading is not None and self.reading.is_paused

    def pause_receiving(self) -> None:
        """Reads no further, because the peer does not read; frames that are here already wait."""
        if self.reading is not None:
            self.reading.pause(PEER_SLOW)

    def resume_receiving(self) -> None:
        if self.reading is None or not self.reading.is_paused:
            return
        if self.incomplete_since:
            self.incomplete_since = self.time()
        self.reading.resume(PEER_SLOW)
        if self._buffer:
            self.call_soon(self._receive_on)

    def _receive_on(self) -> None:
        if self._buffer and not self.read_paused and self.transport is not None and not self.transport.is_closing():
            self.data_received(b"")

    def _on_headers(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "HEADERS on stream 0")
        at, end = _unpadded(flags, data, at, end)
        if flags & f.PRIORITY_FLAG:
            if end - at < 5:
                raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "HEADERS too short")
            if int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF == number:
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "a stream depends on itself")
            at += 5
        if flags & f.END_HEADERS:
            self.on_headers(number, data[at:end], bool(flags & f.END_STREAM))
        else:
            self._block, self._block_frames = (number, flags, [data[at:end]]), 1
            self.incomplete_since = self.touched

    def _on_continuation(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if self._block is None or self._block[0] != number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "CONTINUATION out of place")
        _, first, pieces = self._block
        pieces.append(data[at:end])
        self._block_frames += 1
        if self._block_frames > _CONTINUATIONS_MOST:
            raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "field block in too many frames")
        if flags & f.END_HEADERS:
            self._block = None
            self.incomplete_since = 0.0
            self.on_headers(number, b"".join(pieces), bool(first & f.END_STREAM))

    def _on_data(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "DATA on stream 0")
        size = end - at
        self._receive_window -= size
        if self._receive_window < 0:
            raise H2ConnectionError(Code.FLOW_CONTROL_ERROR, "the connection's window is exceeded")
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
            raise H2StreamError(number, Code.FLOW_CONTROL_ERROR, "the stream's window is exceeded")
        last = bool(flags & f.END_STREAM)
        if not size and not last and not self._control.spend(self.touched):
            raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "too many empty frames")
        if last:
            stream.received_end = True
        stream.uncredited += size
        stream.received_ms = int(self.touched * 1000)
        stream.on_data(data[at:end], last)
        if not stream.paused and not last:
            self.credit(stream)

    def credit(self, stream: Flow) -> None:
        """Lets the peer send as much again as was consumed, and more where it is fast."""
        update, growth = stream.credit(self.time(), _GROWTH_MOST - self._growth)
        if update:
            self._growth += growth
            self.put(f.window_update(stream.number, update))

    def closed_stream(self, number: int, stream: Flow | None) -> None:
        """Judges a frame for a stream on which the peer has nothing more to say (RFC 9113, 5.1)."""
        if stream is None and number > self.goaway_last:
            return
        if stream is not None:
            raise H2StreamError(number, Code.STREAM_CLOSED, "the stream's half is closed")
        if self.is_idle(number):
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "frame on an idle stream")
        how = self._closed.get(number)
        if how == BY_US:
            return  # sent before our reset arrived
        if how == BY_PEER:
            raise H2StreamError(number, Code.STREAM_CLOSED, "the stream was reset")
        raise H2ConnectionError(Code.STREAM_CLOSED, "the stream is closed")

    def _on_priority(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if not number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if end - at != 5:
            raise H2StreamError(number, Code.FRAME_SIZE_ERROR, "PRIORITY's length")
        if int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF == number:
            raise H2StreamError(number, Code.PROTOCOL_ERROR, "a stream depends on itself")

    def _on_rst_stream(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "RST_STREAM's length")
        if not number or self.is_idle(number):
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        stream = self.streams.get(number)
        if stream is None:
            return
        self.drop(stream, BY_PEER)
        stream.on_reset(int.from_bytes(data[at:end], "big"))
        self.spend_reset()

    def _on_settings(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & f.ACK:
            if end - at:
                raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "SETTINGS with ACK and a payload")
            return
        if (end - at) % 6:
            raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "SETTINGS's length")
        if end - at > 6 * _SETTINGS_MOST:
            raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "SETTINGS with too many parameters")
        self._peer_settled = True
        self._spend_control()
        for place in range(at, end, 6):
            self._setting(int.from_bytes(data[place : place + 2], "big"), int.from_bytes(data[place + 2 : place + 6], "big"))
        self.put(f.frame(f.SETTINGS, f.ACK, 0))
        self.on_settings()
        self._unblock(deque(self._blocked))

    def _setting(self, name: int, value: int) -> None:
        if name == f.INITIAL_WINDOW_SIZE:
            if value > f.WINDOW_MAX_BYTES:
                raise H2ConnectionError(Code.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE too large")
            change = value - self.initial_window
            self.initial_window = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > f.WINDOW_MAX_BYTES:
                    raise H2ConnectionError(Code.FLOW_CONTROL_ERROR, "a window beyond its bound")
        elif name == f.MAX_FRAME_SIZE:
            if not f.FRAME_BYTES <= value < 1 << 24:
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE out of range")
            self.frame_bytes = min(value, 4 * f.FRAME_BYTES)
        elif name in (f.ENABLE_PUSH, f.ENABLE_CONNECT_PROTOCOL) and value > 1:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "a setting that is neither 0 nor 1")
        else:
            self.peer_setting(name, value)

    def peer_setting(self, name: int, value: int) -> None: ...

    def _on_push_promise(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        raise H2ConnectionError(Code.PROTOCOL_ERROR, "PUSH_PROMISE is not allowed")

    def _on_ping(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "PING on a stream")
        if end - at != 8:
            raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "PING's length")
        if flags & f.ACK:
            self.on_ping_ack(data[at:end])
            return
        self._spend_control()
        self.put(f.frame(f.PING, f.ACK, 0, data[at:end]))

    def _on_goaway(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if number:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if end - at < 8:
            raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "GOAWAY's length")
        self.on_goaway(int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF, int.from_bytes(data[at + 4 : at + 8], "big"))

    def _on_window_update(self, flags: int, number: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise H2ConnectionError(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE's length")
        size = int.from_bytes(data[at:end], "big") & 0x7FFFFFFF
        if not number:
            if not size:
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            self.send_window += size
            if self.send_window > f.WINDOW_MAX_BYTES:
                raise H2ConnectionError(Code.FLOW_CONTROL_ERROR, "the connection's window beyond its bound")
            self._unblock(deque(self._blocked))
            return
        stream = self.streams.get(number)
        if stream is None:
            if self.is_idle(number):
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            return
        if not size:
            raise H2StreamError(number, Code.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        stream.send_window += size
        if stream.send_window > f.WINDOW_MAX_BYTES:
            raise H2StreamError(number, Code.FLOW_CONTROL_ERROR, "a window beyond its bound")
        if stream in self._blocked:
            self._unblock(deque((stream,)))

    def _spend_control(self) -> None:
        if not self._control.spend(self.touched):
            raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "too many frames that want an answer")

    # ---- sending ----

    def put(self, data: bytes) -> None:
        """Sends frames that flow control does not bound, or that it has let through."""
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > _OUT_BYTES:
            self.flush()
        elif not self._flush_due:
            self._flush_due = True
            self.call_soon(self.flush)

    def flush(self) -> None:
        self._flush_due = False
        out, self._out, self._out_bytes = self._out, [], 0
        if self.transport is not None and out and not self.has_closed:
            self.transport.write(b"".join(out) if len(out) > 1 else out[0])

    def send_message(self, stream: Flow, block: bytes, content: bytes) -> None:
        """Sends all of an answer. Where the windows let it through, as usual, it is one write."""
        size = len(content)
        if size and size <= self._window(stream) and size <= self.frame_bytes:
            self._spend(stream, size)
            self.put(f.headers(stream.number, block, False) + f.frame(f.DATA, f.END_STREAM, stream.number, content))
            stream.on_end_sent()
            return
        self.put(f.headers(stream.number, block, not size))
        if size:
            self.send_data(stream, content, True)
        else:
            stream.on_end_sent()

    def send_data(self, stream: Flow, data: bytes, end: bool) -> None:
        """Sends what the windows allow and keeps the rest; `end` ends our half of the stream."""
        if not stream.queue:
            sent = self._emit(stream, data, end)
            if sent == len(data):
                if end:
                    if not data:
                        self.put(f.frame(f.DATA, f.END_STREAM, stream.number))
                    stream.on_end_sent()
                return
            data = data[sent:]
            stream.blocked_ms = int(self.time() * 1000)
            stream.queue = bytearray(data)
        else:
            stream.queue += data
        stream.end_after_queue = stream.end_after_queue or end
        self._blocked[stream] = None
        if len(stream.queue) > QUEUE_HIGH:
            self._pause_source(stream)

    def send_trailers(self, stream: Flow, block: bytes) -> None:
        if stream.queue:
            stream.end_after_queue, stream.trailers_after_queue = True, block
        else:
            self.put(f.headers(stream.number, block, True))
            stream.on_end_sent()

    def send_interim(self, stream: Flow, block: bytes) -> None:
        """Sends a field block that flow control does not bound, and behind which more may come: while the peer does not read, no more
        of them are taken from their source."""
        self.put(f.headers(stream.number, block, False))
        if self.write_paused:
            if stream not in self._blocked:
                stream.blocked_ms = int(self.time() * 1000)
                self._blocked[stream] = None
            self._pause_source(stream)

    def _pause_source(self, stream: Flow) -> None:
        if not stream.source_paused:
            stream.source_paused = True
            stream.pause_source()

    def _window(self, stream: Flow) -> int:
        """Returns how many bytes may be sent on a stream now."""
        return 0 if self.write_paused else min(stream.send_window, self.send_window)

    def _spend(self, stream: Flow, size: int) -> None:
        stream.send_window -= size
        self.send_window -= size

    def _emit(self, stream: Flow, data: bytes, end: bool) -> int:
        """Sends DATA frames of as much as the windows allow, and returns how much that was. `end` puts END_STREAM on the last byte."""
        size, at = len(data), 0
        while (step := min(size - at, self._window(stream), self.frame_bytes)) > 0:
            self._spend(stream, step)
            piece = data[at : at + step]
            at += step
            self.put(f.frame(f.DATA, f.END_STREAM if end and at == size else 0, stream.number, piece))
        return at

    def _unblock(self, turn: deque[Flow]) -> None:
        """Sends a frame for each of these streams that waits, in turn, until the windows are used up."""
        while turn and not self.write_paused:
            stream = turn.popleft()
            if stream not in self._blocked:
                continue
            queue = stream.queue
            if queue:
                step = min(len(queue), self.frame_bytes, self._window(stream))
                if self.send_window <= 0:
                    return  # the others are not looked at: a peer may open the window byte by byte (CVE-2019-9511)
                if step <= 0:
                    continue
                is_last = step == len(queue) and stream.end_after_queue and not stream.trailers_after_queue
                self._emit(stream, bytes(queue[:step]), is_last)
                del queue[:step]
                stream.blocked_ms = int(self.time() * 1000)
                if queue:
                    turn.append(stream)
            if not queue:
                self._emptied(stream)
            if stream.source_paused and (not queue or len(queue) < QUEUE_LOW):
                stream.source_paused = False
                stream.resume_source()

    def _emptied(self, stream: Flow) -> None:
        self._blocked.pop(stream, None)
        if stream.trailers_after_queue:
            self.put(f.headers(stream.number, stream.trailers_after_queue, True))
        if stream.end_after_queue:
            stream.on_end_sent()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        """Goes on with all streams that wait: first with those that wait for no window, which may be used up."""
        self.write_paused = False
        turn = deque(self._blocked)
        for stream in self._blocked:
            if not stream.queue:
                turn.appendleft(stream)
        self._unblock(turn)

    # ---- ends ----

    def drop(self, stream: Flow, how: int = 0) -> None:
        """Drops a stream from the table; what it had of the windows' growth is free again."""
        if self.streams.pop(stream.number, None) is None:
            return
        self._blocked.pop(stream, None)
        self._growth -= stream.receive_size - STREAM_WINDOW
        if how:
            self._remember_closed(stream.number, how)

    def _remember_closed(self, number: int, how: int) -> None:
        self._closed[number] = how
        if len(self._closed) > _CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]

    def reset(self, stream: Flow, code: Code) -> None:
        if stream.number in self.streams:
            self.drop(stream, BY_US)
            self.put(f.rst_stream(stream.number, code))

    def break_stream(self, error: H2StreamError) -> None:
        """Resets a stream for a stream error of the peer's (RFC 9113, 5.4.2). It counts against the budget of resets (CVE-2023-44487,
        CVE-2025-8671)."""
        stream = self.streams.get(error.stream)
        if stream is not None:
            self.drop(stream, BY_US)
            stream.on_reset(error.code)
        elif self.is_idle(error.stream):
            raise H2ConnectionError(error.code, str(error))  # an idle stream may not be reset (RFC 9113, 6.4)
        else:
            self._remember_closed(error.stream, BY_US)
        self.put(f.rst_stream(error.stream, error.code))
        self.spend_reset()

    def spend_reset(self) -> None:
        """Counts a stream that cost us work, and was worth nothing to the peer. Raises H2ConnectionError."""
        if not self._resets.spend(self.touched):
            raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "too many broken streams")

    def goaway(self, last: int, code: Code, text: str = "") -> None:
        """Tells the peer that its streams beyond `last` will not be looked at; the number never grows again (RFC 9113, 6.8)."""
        self.goaway_last = min(last, self.goaway_last)
        self.put(f.goaway(self.goaway_last, code, text))

    def fail(self, code: Code, text: str) -> None:
        """Tells the peer of its error (GOAWAY), and closes with everything on this connection."""
        self.goaway(self.last_peer_stream, code, text)
        self.is_shutting_down = True
        self.flush()
        self.close()

    def close(self) -> None:
        """Closes after what was written; what has come behind it is not looked at."""
        self.has_closed = True
        if self.transport is not None:
            self.transport.close()


def _unpadded(flags: int, data: bytes, at: int, end: int) -> tuple[int, int]:
    if not flags & f.PADDED:
        return at, end
    if at == end or data[at] >= end - at:
        raise H2ConnectionError(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return at + 1, end - data[at]


_HANDLERS: tuple[Callable[[Multiplex, int, int, bytes, int, int], None], ...] = (
    Multiplex._on_data, Multiplex._on_headers, Multiplex._on_priority, Multiplex._on_rst_stream, Multiplex._on_settings,
    Multiplex._on_push_promise, Multiplex._on_ping, Multiplex._on_goaway, Multiplex._on_window_update, Multiplex._on_continuation,
)  # fmt: skip
