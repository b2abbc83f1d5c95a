"""The HTTP/2 machine alone: no socket and no event loop, a clock that is set, and what it says read frame by frame (RFC 9113)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import source

f = source("wire.http2_frames")
flow = source("wire.http2_flow")
multiplex = source("wire.http2_connection")
reading = source("reading")
Code = f.Code
Multiplex: Any = multiplex.Multiplex
Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


def frames_in(data: bytes) -> list[Frame]:
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        found.append((data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), bytes(data[at + 9 : at + 9 + length])))
        at += 9 + length
    assert at == len(data)
    return found


class Wire:
    """A transport. Beyond `room` bytes it asks to pause."""

    def __init__(self) -> None:
        self.machine: Any = None
        self.out = bytearray()
        self.writes = 0
        self.room = 1 << 60
        self.closing = self.reading_paused = False

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.out += data
        if len(self.out) > self.room and not self.machine.write_paused:
            self.machine.pause_writing()

    def take(self) -> list[Frame]:
        data, self.out = bytes(self.out), bytearray()
        return frames_in(data)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high

    def get_write_buffer_size(self) -> int:
        return len(self.out)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Stream(flow.Flow):  # type: ignore[misc,name-defined]
    def __init__(self, machine: Any, number: int) -> None:
        self.machine = machine
        self.open_flow(number, machine.initial_window, machine.time())
        self.received = b""
        self.ended = self.sent_end = False
        self.resets: list[int] = []
        self.sources: list[str] = []

    def on_data(self, data: bytes, end: bool) -> None:
        self.received += data
        self.ended = self.ended or end

    def on_reset(self, code: int) -> None:
        self.resets.append(code)

    def on_end_sent(self) -> None:
        assert not self.sent_end
        self.sent_end = True
        if self.received_end:
            self.machine.drop(self)

    def pause_source(self) -> None:
        self.sources.append("pause")

    def resume_source(self) -> None:
        self.sources.append("resume")


class Server(Multiplex):  # type: ignore[misc]
    """A side that opens a stream for each field block that may open one."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.later: list[Callable[[], None]] = []
        super().__init__(lambda: self.now, self.later.append, 1 << 16)
        self.blocks: list[tuple[int, bytes, bool]] = []
        self.acknowledged: list[bytes] = []
        self.wire = Wire()
        self.wire.machine = self
        self.connection_made(self.wire)
        self._receive_window = multiplex.CONNECTION_WINDOW  # as both sides say at once

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        self.blocks.append((number, block, end))
        if number > self.last_number:
            self.last_number = number
            if number <= self.goaway_last:
                self.streams[number] = Stream(self, number)
                self.streams[number].received_end = end
        else:
            self.closed_stream(number, self.streams.get(number))

    def on_ping_ack(self, payload: bytes) -> None:
        self.acknowledged.append(payload)

    def turn(self) -> None:
        """The loop comes round."""
        later, self.later[:] = list(self.later), []
        for one in later:
            one()

    def hear(self, *data: bytes) -> list[Frame]:
        """What is said to these bytes."""
        self.data_received(b"".join(data))
        self.turn()
        return self.wire.take()

    def stream(self, number: int = 1) -> Stream:
        found = self.streams[number]
        assert isinstance(found, Stream)
        return found


def server() -> Server:
    one = Server()
    assert one.hear(f.settings({})) == [(f.SETTINGS, f.ACK, 0, b"")]
    return one


def data(payload: bytes = b"", number: int = 1, end: bool = False, flags: int = 0) -> bytes:
    return bytes(f.frame(f.DATA, flags | (f.END_STREAM if end else 0), number, payload))


def head(number: int = 1, end: bool = False, block: bytes = b"\x82") -> bytes:
    return bytes(f.headers(number, block, end))


def opened(*numbers: int) -> Server:
    one = server()
    one.hear(*[head(number) for number in numbers or (1,)])
    return one


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


# ---- what is a connection error (5.4.1) ----

PRIORITY = b"\0\0\0\0\0"
CONNECTION_ERRORS: dict[str, tuple[list[bytes], str]] = {
    "4.2 a frame beyond 2^14 octets": ([data(b"x" * 16385)], "FRAME_SIZE_ERROR"),
    "4.3 another frame inside a field block": ([f.frame(f.HEADERS, 0, 3, b""), f.frame(f.PING, 0, 0, bytes(8))], "PROTOCOL_ERROR"),
    "4.3 another stream's CONTINUATION": ([f.frame(f.HEADERS, 0, 3, b""), f.frame(f.CONTINUATION, 4, 5)], "PROTOCOL_ERROR"),
    "5.1 DATA on an idle stream": ([data(b"x", 3)], "PROTOCOL_ERROR"),
    "5.1 RST_STREAM on an idle stream": ([f.rst_stream(3, Code.CANCEL)], "PROTOCOL_ERROR"),
    "5.1 WINDOW_UPDATE on an idle stream": ([f.window_update(3, 1)], "PROTOCOL_ERROR"),
    "5.1 CONTINUATION without HEADERS": ([f.frame(f.CONTINUATION, 4, 1)], "PROTOCOL_ERROR"),
    "6.1 DATA on stream 0": ([data(b"x", 0)], "PROTOCOL_ERROR"),
    "6.1 padding as long as the frame": ([data(b"\4\0\0\0", flags=f.PADDED)], "PROTOCOL_ERROR"),
    "6.1 a padded frame without a length": ([data(b"", flags=f.PADDED)], "PROTOCOL_ERROR"),
    "6.2 HEADERS on stream 0": ([head(0)], "PROTOCOL_ERROR"),
    "6.2 HEADERS too short for its priority": ([f.frame(f.HEADERS, f.END_HEADERS | f.PRIORITY_FLAG, 3, b"\0")], "FRAME_SIZE_ERROR"),
    "6.2 padding longer than HEADERS": ([f.frame(f.HEADERS, f.END_HEADERS | f.PADDED, 3, b"\x05\x82")], "PROTOCOL_ERROR"),
    "6.3 PRIORITY on stream 0": ([f.frame(f.PRIORITY, 0, 0, PRIORITY)], "PROTOCOL_ERROR"),
    "6.4 RST_STREAM on stream 0": ([f.rst_stream(0, Code.CANCEL)], "PROTOCOL_ERROR"),
    "6.4 RST_STREAM of 3 octets": ([f.frame(f.RST_STREAM, 0, 1, bytes(3))], "FRAME_SIZE_ERROR"),
    "6.5 SETTINGS on a stream": ([f.frame(f.SETTINGS, 0, 1)], "PROTOCOL_ERROR"),
    "6.5 SETTINGS of 5 octets": ([f.frame(f.SETTINGS, 0, 0, bytes(5))], "FRAME_SIZE_ERROR"),
    "6.5 an acknowledgement with a payload": ([f.frame(f.SETTINGS, f.ACK, 0, bytes(6))], "FRAME_SIZE_ERROR"),
    "6.5.2 ENABLE_PUSH of 2": ([f.settings({f.ENABLE_PUSH: 2})], "PROTOCOL_ERROR"),
    "6.5.2 an initial window beyond its bound": ([f.settings({f.INITIAL_WINDOW_SIZE: 1 << 31})], "FLOW_CONTROL_ERROR"),
    "6.5.2 a frame size below its bound": ([f.settings({f.MAX_FRAME_SIZE: 16383})], "PROTOCOL_ERROR"),
    "6.5.2 a frame size beyond its bound": ([f.settings({f.MAX_FRAME_SIZE: 1 << 24})], "PROTOCOL_ERROR"),
    "6.6 PUSH_PROMISE": ([f.frame(f.PUSH_PROMISE, 4, 1, bytes(4))], "PROTOCOL_ERROR"),
    "6.7 PING on a stream": ([f.frame(f.PING, 0, 1, bytes(8))], "PROTOCOL_ERROR"),
    "6.7 PING of 7 octets": ([f.frame(f.PING, 0, 0, bytes(7))], "FRAME_SIZE_ERROR"),
    "6.8 GOAWAY on a stream": ([f.frame(f.GOAWAY, 0, 1, bytes(8))], "PROTOCOL_ERROR"),
    "6.8 GOAWAY of 7 octets": ([f.frame(f.GOAWAY, 0, 0, bytes(7))], "FRAME_SIZE_ERROR"),
    "6.9 WINDOW_UPDATE of 3 octets": ([f.frame(f.WINDOW_UPDATE, 0, 0, bytes(3))], "FRAME_SIZE_ERROR"),
    "6.9 WINDOW_UPDATE of nothing": ([f.window_update(0, 0)], "PROTOCOL_ERROR"),
    "6.9.1 the connection's window beyond its bound": ([f.window_update(0, (1 << 31) - 1)], "FLOW_CONTROL_ERROR"),
    "6.9.2 a stream's window beyond its bound by SETTINGS": (
        [f.window_update(1, 1000), f.settings({f.INITIAL_WINDOW_SIZE: (1 << 31) - 1})], "FLOW_CONTROL_ERROR"),
    "6.10 a field block in too many frames": (
        [f.frame(f.HEADERS, 0, 3, b"")] + [f.frame(f.CONTINUATION, 0, 3)] * 16, "ENHANCE_YOUR_CALM"),
    "10.5 many PINGs": ([f.frame(f.PING, 0, 0, bytes(8))] * 1001, "ENHANCE_YOUR_CALM"),
    "10.5 many SETTINGS": ([f.settings({})] * 1001, "ENHANCE_YOUR_CALM"),
    "10.5 many frames of DATA without content": ([data()] * 1001, "ENHANCE_YOUR_CALM"),
    "10.5 many resets": ([head(number) + f.rst_stream(number, Code.CANCEL) for number in range(3, 500, 2)], "ENHANCE_YOUR_CALM"),
    "10.5 many streams that the peer breaks": ([head(number) + f.window_update(number, 0) for number in range(3, 500, 2)], "ENHANCE_YOUR_CALM"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONNECTION_ERRORS)
def test_connection_errors(case: str) -> None:
    said, code = CONNECTION_ERRORS[case]
    one = opened(1)
    heard = one.hear(*said, f.frame(f.PING, 0, 0, b"and then"))
    assert (f.PING, f.ACK, 0, b"and then") not in heard, "nothing is looked at any more"
    kind, _, _, payload = heard[-1]
    assert kind == f.GOAWAY and Code(int.from_bytes(payload[4:8], "big")).name == code and one.wire.closing


@pytest.mark.parametrize("priority", [bytes(4), u32(8) + b"\0"])
def test_an_idle_stream_is_not_reset(priority: bytes) -> None:
    """RFC 9113, 6.4: the connection ends instead."""
    one = opened(1)
    assert [kind for kind, _, _, _ in one.hear(f.frame(f.PRIORITY, 0, 8, priority))] == [f.GOAWAY]


@pytest.mark.parametrize("first", [f.frame(f.PING, 0, 0, bytes(8)), head(), f.frame(f.SETTINGS, f.ACK, 0)])
def test_the_first_frame_is_settings(first: bytes) -> None:
    one = Server()
    assert [kind for kind, _, _, _ in one.hear(first)] == [f.GOAWAY] and one.wire.closing


# ---- what is a stream error (5.4.2) ----

STREAM_ERRORS: dict[str, tuple[list[bytes], str]] = {
    "5.1 DATA behind the end": ([data(b"x", end=True), data(b"y")], "STREAM_CLOSED"),
    "5.1 DATA behind a reset": ([f.rst_stream(1, Code.CANCEL), data(b"y")], "STREAM_CLOSED"),
    "5.3.1 a stream that depends on itself": ([f.frame(f.PRIORITY, 0, 1, u32(1) + b"\0")], "PROTOCOL_ERROR"),
    "6.3 PRIORITY of 4 octets": ([f.frame(f.PRIORITY, 0, 1, bytes(4))], "FRAME_SIZE_ERROR"),
    "6.9 WINDOW_UPDATE of nothing": ([f.window_update(1, 0)], "PROTOCOL_ERROR"),
    "6.9.1 the window beyond its bound": ([f.window_update(1, (1 << 31) - 1)], "FLOW_CONTROL_ERROR"),
    "6.9.1 more than the window": ([data(b"x" * 16384)] * 4 + [data(b"x")], "FLOW_CONTROL_ERROR"),
}


@pytest.mark.parametrize("case", STREAM_ERRORS)
def test_stream_errors_end_one_stream_and_not_the_other(case: str) -> None:
    said, code = STREAM_ERRORS[case]
    one = opened(1, 3)
    one.stream(1).paused = one.stream(3).paused = 1  # no window is opened meanwhile
    broken = one.stream(1)
    heard = one.hear(*said)
    assert [(kind, number, Code(int.from_bytes(payload, "big")).name) for kind, _, number, payload in heard] == [(f.RST_STREAM, 1, code)]
    assert list(one.streams) == [3] and broken.resets and not one.wire.closing
    assert one.hear(data(b"on its way", end=True)) == [], "what was sent before our reset came is ignored"
    one.hear(data(b"on", 3))
    assert one.stream(3).received == b"on"


def test_what_is_ignored() -> None:
    one = opened(1)
    said = [
        f.frame(0x16, 0xFF, 7, b"unknown"), f.frame(f.PRIORITY, 0, 9, PRIORITY), f.settings({0xFF: 1}), f.frame(f.PING, f.ACK, 0, b"12345678"),
        f.frame(f.SETTINGS, f.ACK, 0),
    ]  # fmt: skip
    assert one.hear(*said) == [(f.SETTINGS, f.ACK, 0, b"")] and one.acknowledged == [b"12345678"]
    assert one.hear(f.frame(f.PING, 0xF6, 0, b"87654321")) == [(f.PING, f.ACK, 0, b"87654321")], "flags without a meaning"


def test_closed_streams_are_remembered_within_a_bound() -> None:
    one = server()
    for number in range(1, 2001, 2):
        one.now += 1
        one.hear(head(number), f.window_update(number, 0))
    assert len(one._closed) == 256 and not one.wire.closing


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_any_cut_reads_the_same(cuts: list[int]) -> None:
    said = [
        f.settings({f.INITIAL_WINDOW_SIZE: 5}), head(1), f.frame(f.HEADERS, 0, 3, b"\x82\x84"), f.frame(f.CONTINUATION, 0, 3, b"\x86"),
        f.frame(f.CONTINUATION, f.END_HEADERS, 3, b"\x87"), data(b"\3padded\0\0\0", flags=f.PADDED), data(b"more" * 50, 3, True), data(b"", end=True),
        f.frame(f.HEADERS, f.END_HEADERS | f.PRIORITY_FLAG | f.PADDED | f.END_STREAM, 5, b"\1\0\0\0\0\x10\x82\0"), f.frame(f.PING, 0, 0, bytes(8)),
    ]  # fmt: skip
    whole, at = b"".join(said), 0
    cut, uncut = server(), server()
    expected = uncut.hear(whole)
    heard: list[Frame] = []
    for step in [*cuts * 200, len(whole)]:
        heard += cut.hear(whole[at : at + step])
        at += step
    assert heard == expected and cut.blocks == uncut.blocks == [(1, b"\x82", False), (3, b"\x82\x84\x86\x87", False), (5, b"\x82", True)]
    assert [one.stream(number).received for one in (cut, uncut) for number in (1, 3)] == [b"padded", b"more" * 50] * 2
    assert cut.stream(1).ended and cut.stream(3).ended


# ---- receiving: windows (5.2, 6.9) ----


def updates(frames: list[Frame]) -> dict[int, int]:
    found: dict[int, int] = {}
    for kind, _, number, payload in frames:
        assert kind == f.WINDOW_UPDATE
        found[number] = found.get(number, 0) + int.from_bytes(payload, "big")
    return found


def test_what_is_consumed_is_credited_by_halves_and_what_is_not_is_not() -> None:
    one = opened(1, 3)
    one.now += 10
    one.stream(3).paused = reading.PEER_SLOW
    assert one.hear(data(b"x" * 16_000), data(b"x" * 16_000, 3), data(b"x" * 16_000, 3)) == []
    assert updates(one.hear(data(b"x" * 16_000), data(b"x" * 768))) == {1: 32_768}
    one.stream(3).paused = 0
    one.credit(one.stream(3))
    one.turn()
    assert one.wire.take() == []
    one.hear(data(b"x" * 768, 3))
    assert one.stream(3).receive_window == 65_536 and one.stream(3).uncredited == 0


def test_padding_counts_and_is_not_content() -> None:
    one = opened()
    one.stream().paused = 1
    one.hear(data(b"\x64" + b"x" * 50 + bytes(100), flags=f.PADDED))
    assert one.stream().received == b"x" * 50 and one.stream().uncredited == 151


def test_the_connections_window_is_credited_whatever_its_streams_do() -> None:
    one = server()
    heard, number = [], 1
    for _ in range(300):
        heard += one.hear(head(number), data(b"x" * 16_000, number))
        one.stream(number).paused = 1
        one.now += 1
        one.hear(f.rst_stream(number, Code.CANCEL))
        number += 2
    assert updates([one for one in heard if not one[2]])[0] > 300 * 16_000 - multiplex.CONNECTION_WINDOW // 4 - 16_000


def test_windows_grow_within_a_bound_for_all_streams_and_give_it_back() -> None:
    one = opened(1, 3, 5, 7)
    for _ in range(20):
        for number in one.streams:
            stream = one.stream(number)
            stream.uncredited = stream.receive_size
            one.credit(stream)
    assert sum(one.stream(number).receive_size - flow.STREAM_WINDOW for number in one.streams) == one._growth <= 16 << 20
    for number in (1, 3, 5, 7):
        one.drop(one.stream(number))
    assert one._growth == 0


def test_a_window_that_is_used_slowly_stays_as_it_is() -> None:
    one = opened(1)
    one._receive_window = 1 << 30
    for _ in range(20):
        one.now += 1
        one.hear(data(b"x" * 16_000), data(b"x" * 16_000), data(b"x" * 768))
    assert one.stream().receive_size == flow.STREAM_WINDOW


# ---- receiving: what has begun and not come whole ----


def test_the_clock_of_what_has_begun_runs_from_its_first_byte() -> None:
    one = opened(1)
    assert one.incomplete_since == 0.0
    whole = head(3, block=b"\x82" * 20)
    one.hear(whole[:12])
    began = one.now
    for at in range(12, len(whole) - 1):
        one.now += 1
        one.hear(whole[at : at + 1])
        assert one.incomplete_since == began
    one.now += 1
    one.hear(whole[-1:] + head(5)[:4])
    assert one.incomplete_since == one.now, "another frame's"
    one.hear(head(5)[4:])
    assert one.incomplete_since == 0.0


def test_the_clock_of_a_field_block_is_not_set_back_by_its_continuations() -> None:
    one = opened(1)
    one.hear(f.frame(f.HEADERS, 0, 3, b"\x82"))
    began = one.now
    for _ in range(5):
        one.now += 1
        one.hear(f.frame(f.CONTINUATION, 0, 3, b""))
        one.hear(f.frame(f.CONTINUATION, 0, 3, b"")[:5])
        one.hear(f.frame(f.CONTINUATION, 0, 3, b"")[5:])
        assert one.incomplete_since == began
    one.hear(f.frame(f.CONTINUATION, f.END_HEADERS, 3, b""))
    assert one.incomplete_since == 0.0


def test_half_a_frame_of_data_is_its_streams_progress_alone() -> None:
    one = opened(1, 3)
    one.now += 5
    one.hear(data(b"x" * 100)[:50])
    assert (one.incomplete_since, one.stream(1).received_ms, one.stream(3).received_ms) == (0.0, 1_005_000, 1_000_000)


# ---- sending ----


def content(frames: list[Frame], number: int = 1) -> bytes:
    return b"".join(payload for kind, _, stream, payload in frames if kind == f.DATA and stream == number)


def sent(one: Server) -> list[Frame]:
    one.turn()
    return one.wire.take()


def test_a_whole_answer_is_one_write() -> None:
    one = opened(1)
    stream, writes = one.stream(), one.wire.writes
    stream.received_end = True
    one.send_message(stream, b"\x88", b"hello")
    assert sent(one) == [(f.HEADERS, f.END_HEADERS, 1, b"\x88"), (f.DATA, f.END_STREAM, 1, b"hello")]
    assert one.wire.writes == writes + 1 and stream.sent_end and not one.streams
    assert one.send_window == stream.send_window == 65_535 - 5


def test_a_whole_answer_without_content_ends_with_its_head() -> None:
    one = opened(1)
    one.send_message(one.stream(), b"\x88", b"")
    assert sent(one) == [(f.HEADERS, f.END_HEADERS | f.END_STREAM, 1, b"\x88")] and one.stream().sent_end


def test_what_the_windows_do_not_let_through_waits() -> None:
    one = opened(1)
    stream, body = one.stream(), bytes(range(256)) * 400
    one.send_message(stream, b"\x88", body)
    first = content(sent(one))
    assert first == body[:65_535] and not stream.sent_end
    assert one.hear(f.window_update(1, 1000)) == [], "the connection's is used up, too"
    second = one.hear(f.window_update(0, 500))
    assert content(second) == body[65_535:66_035]
    rest = one.hear(f.window_update(0, 1 << 20), f.window_update(1, 1 << 20))
    assert first + content(second) + content(rest) == body
    assert [flags for _, flags, _, _ in rest][-1] == f.END_STREAM and stream.sent_end
    assert max(len(payload) for _, _, _, payload in rest) <= 16_384


def test_an_end_without_data_comes_behind_the_queue() -> None:
    one = opened(1)
    stream = one.stream()
    one.send_data(stream, b"x" * 70_000, False)
    one.send_data(stream, b"", True)
    assert not stream.sent_end
    sent(one)
    rest = one.hear(f.window_update(0, 1 << 20), f.window_update(1, 1 << 20))
    assert content(rest) == b"x" * 4_465 and rest[-1][1] == f.END_STREAM and stream.sent_end


def test_trailers_come_behind_the_queue() -> None:
    one = opened(1)
    stream = one.stream()
    one.send_data(stream, b"x" * 70_000, False)
    one.send_trailers(stream, b"\x88")
    assert not [one for one in sent(one) if one[0] == f.HEADERS]
    rest = one.hear(f.window_update(0, 1 << 20), f.window_update(1, 1 << 20))
    assert rest[-1] == (f.HEADERS, f.END_HEADERS | f.END_STREAM, 1, b"\x88") and len(content(rest)) == 4_465 and stream.sent_end
    assert not [flags for kind, flags, _, _ in rest if kind == f.DATA and flags & f.END_STREAM]


def test_streams_that_wait_take_turns() -> None:
    one = opened(1, 3, 5)
    one.hear(f.settings({f.INITIAL_WINDOW_SIZE: 1 << 20}))
    one.send_window = 0
    for number in (1, 3, 5):
        one.send_data(one.stream(number), b"x" * 40_000, False)
    heard = one.hear(f.window_update(0, 5 * 16_384))
    assert [number for _, _, number, _ in heard] == [1, 3, 5, 1, 3]


def test_a_full_queue_pauses_its_source_and_an_empty_one_resumes_it() -> None:
    one = opened(1)
    stream = one.stream()
    one.send_data(stream, b"x" * 65_535, False)
    one.send_data(stream, b"x" * multiplex.QUEUE_HIGH, False)
    assert stream.sources == []
    one.send_data(stream, b"x", False)
    one.send_data(stream, b"x", False)
    assert stream.sources == ["pause"]
    one.hear(f.window_update(0, 1 << 20), f.window_update(1, multiplex.QUEUE_HIGH - multiplex.QUEUE_LOW))
    assert stream.sources == ["pause"] and stream.queue is not None and len(stream.queue) == multiplex.QUEUE_LOW + 2
    one.hear(f.window_update(1, 1 << 20))
    assert stream.sources == ["pause", "resume"] and not stream.queue


def test_a_smaller_initial_window_makes_windows_negative() -> None:
    one = opened(1)
    stream = one.stream()
    one.send_data(stream, b"x" * 60_000, False)
    sent(one)
    one.hear(f.settings({f.INITIAL_WINDOW_SIZE: 1000}))
    assert stream.send_window == 1000 - 60_000
    one.send_data(stream, b"y" * 10, False)
    assert sent(one) == [] and one.hear(f.window_update(1, 59_000)) == []
    assert content(one.hear(f.window_update(1, 10))) == b"y" * 10


def test_the_peers_frame_size_is_used_within_reason() -> None:
    one = opened(1)
    one.hear(f.settings({f.MAX_FRAME_SIZE: 1 << 20, f.INITIAL_WINDOW_SIZE: 1 << 20}), f.window_update(0, 1 << 20))
    one.send_data(one.stream(), b"x" * 200_000, False)
    assert [len(payload) for _, _, _, payload in sent(one)] == [65_536] * 3 + [3392]


def test_a_long_field_block_is_continued() -> None:
    one = opened(1)
    block = bytes(range(256)) * 150
    one.send_message(one.stream(), block, b"")
    frames = sent(one)
    assert [kind for kind, _, _, _ in frames] == [f.HEADERS, f.CONTINUATION, f.CONTINUATION]
    assert [flags for _, flags, _, _ in frames] == [f.END_STREAM, 0, f.END_HEADERS] and b"".join(one[3] for one in frames) == block


# ---- a peer that does not read ----


def test_much_output_is_written_before_the_turn_ends() -> None:
    one = opened(1)
    one.hear(f.settings({f.INITIAL_WINDOW_SIZE: 1 << 24}), f.window_update(0, 1 << 24))
    one.wire.room = 100_000
    one.send_data(one.stream(), b"x" * 2_000_000, False)
    assert one.write_paused and len(one.wire.out) < 400_000 and one._out_bytes < 300_000
    assert one.stream().queue is not None and one.stream().sources == ["pause"]
    one.turn()
    one.wire.take()
    one.resume_writing()
    assert one.write_paused, "and again"


def test_while_reading_is_paused_frames_wait_in_order() -> None:
    one = opened(1)
    one.pause_receiving()
    assert one.hear(data(b"a"), f.frame(f.PING, 0, 0, bytes(8)), data(b"b")[:4]) == [] and one.stream().received == b""
    assert one.wire.reading_paused
    one.now += 100
    one.resume_receiving()
    assert not one.wire.reading_paused and one.incomplete_since in (0.0, one.now), "nobody was late meanwhile"
    one.turn()
    one.turn()
    assert [kind for kind, _, _, _ in one.wire.take()] == [f.PING] and one.stream().received == b"a"
    one.hear(data(b"b")[4:])
    assert one.stream().received == b"ab"


def test_a_pause_from_within_stops_at_the_next_frame() -> None:
    one = opened(1)
    one.wire.room = 200
    one.pause_writing = lambda: (Multiplex.pause_writing(one), one.pause_receiving())  # type: ignore[method-assign]
    one.hear(*[f.frame(f.PING, 0, 0, b"%08d" % number) for number in range(40_000 // 17)])
    answered = one.wire.take()
    assert one.write_paused and one.wire.reading_paused
    assert all(payload == b"%08d" % number for number, (_, _, _, payload) in enumerate(answered))


def test_interim_responses_to_a_peer_that_does_not_read_pause_their_source() -> None:
    one = opened(1)
    stream = one.stream()
    one.send_interim(stream, b"\x88")
    assert stream.sources == [] and len(sent(one)) == 1
    one.pause_writing()
    one.now += 1000  # a stream that was opened long ago
    one.send_interim(stream, b"\x88")
    assert stream.sources == ["pause"] and stream.blocked_ms == one.now * 1000, "is blocked since now"
    one.resume_writing()
    assert stream.sources == ["pause", "resume"] and stream not in one._blocked
    one.send_message(stream, b"\x88", b"done")
    assert stream.sent_end


# ---- shutting down (6.8) ----


def test_streams_above_the_last_of_a_goaway_are_ignored() -> None:
    one = opened(1)
    one.goaway(1, Code.NO_ERROR)
    assert sent(one) == [(f.GOAWAY, 0, 0, u32(1) + u32(0))]
    assert one.hear(head(3), data(b"x", 3), f.window_update(3, 1), f.rst_stream(3, Code.CANCEL), data(b"x", 3, True)) == []
    assert list(one.streams) == [1] and one._receive_window == multiplex.CONNECTION_WINDOW - 2
    one.goaway(9, Code.NO_ERROR)
    assert sent(one)[0][3][:4] == u32(1), "the number never grows"
    one.hear(data(b"on"))
    assert one.stream().received == b"on"


def test_nothing_is_looked_at_behind_an_end() -> None:
    one = opened(1)
    one.close()
    one.hear(head(3, True))
    assert 3 not in one.streams


# ---- a model of what is sent ----

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.sampled_from([1, 3, 5]), st.integers(0, 60_000)),
        st.tuples(st.just("end"), st.sampled_from([1, 3, 5]), st.just(0)),
        st.tuples(st.just("trailers"), st.sampled_from([1, 3, 5]), st.just(0)),
        st.tuples(st.just("window"), st.sampled_from([0, 1, 3, 5]), st.integers(1, 40_000)),
        st.tuples(st.just("initial"), st.just(0), st.integers(0, 100_000)),
        st.tuples(st.sampled_from(["stuck", "free", "turn"]), st.just(0), st.just(0)),
    ),
    max_size=40,
)  # fmt: skip


@given(STEPS)
def test_whatever_happens_data_goes_out_in_order_within_the_windows_and_ends_once(steps: list[tuple[str, int, int]]) -> None:
    one = opened(1, 3, 5)
    streams = {number: one.stream(number) for number in (1, 3, 5)}
    given_: dict[int, bytearray] = {number: bytearray() for number in streams}
    finished: dict[int, str] = {}
    allowed = {0: 65_535, 1: 65_535, 3: 65_535, 5: 65_535}
    initial, heard = 65_535, []
    for at, (what, number, size) in enumerate(steps):
        if what == "data" and number not in finished:
            piece = bytes([at]) * size
            given_[number] += piece
            one.send_data(streams[number], piece, False)
        elif what == "end" and number not in finished:
            finished[number] = what
            one.send_data(streams[number], b"", True)
        elif what == "trailers" and number not in finished:
            finished[number] = what
            one.send_trailers(streams[number], b"\x88")
        elif what == "window":
            allowed[number] += size
            one.data_received(f.window_update(number, size))
        elif what == "initial":
            for stream in streams:
                allowed[stream] += size - initial
            initial = size
            one.data_received(f.settings({f.INITIAL_WINDOW_SIZE: size}))
        elif what == "stuck":
            one.pause_writing()
        elif what == "free":
            one.resume_writing()
        else:
            one.turn()
        heard += sent(one)
        out = {number: content(heard, number) for number in streams}
        for number, body in out.items():
            assert given_[number].startswith(body) and len(body) <= max(65_535, allowed[number] + 200_000)
        assert sum(map(len, out.values())) <= allowed[0]
        for number, stream in streams.items():
            assert one.send_window == allowed[0] - sum(map(len, out.values()))
            assert stream.send_window == allowed[number] - len(out[number])
    one.resume_writing()
    one.data_received(
        f.window_update(0, 10_000_000) + b"".join(f.window_update(number, 10_000_000) for number in streams if number in one.streams)
    )
    heard += sent(one)
    for number, stream in streams.items():
        assert content(heard, number) == given_[number] and stream.sent_end == (number in finished)
        ends = [kind for kind, flags, to, _ in heard if to == number and kind in (f.DATA, f.HEADERS) and flags & f.END_STREAM]
        assert ends == ([f.HEADERS] if finished.get(number) == "trailers" else [f.DATA] if number in finished else [])
        assert stream.sources.count("pause") == stream.sources.count("resume")
    assert not one._blocked
