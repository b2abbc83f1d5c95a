"""Frames of HTTP/2 and what HPACK makes of field blocks (gateway/edge/wire/http2_*.py): compiled or not, in any cut, the same is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpack import Decoder
from hpack.exceptions import HPACKError
from sources import source
from written import Written

from gateway.edge.wire import http2_frames as f
from gateway.edge.wire import http2_head
from gateway.edge.wire.http1_head import Malformed

flow, multiplex = source("wire.http2_flow"), source("wire.http2_connection")
written_frames, written_head, written_http1 = source("wire.http2_frames"), source("wire.http2_head"), source("wire.http1_head")
TRACED = (
    "edge_sources.wire.http2_connection",
    "edge_sources.wire.http2_flow",
    "edge_sources.wire.http2_frames",
    "edge_sources.wire.http2_head",
)
_BLOCK = f.encode(
    [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/x"), (b":authority", b"a.example"), (b"cookie", b"a=b"), (b"x-y", b"z")]
)
_INDEXED = b"\x82\x87\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff\x40\x03x-y\x01z"
_RESPONSE = f.encode_status(200) + f.encode([(b"content-length", b"5"), (b"date", b"x")])
WORDS = (*(f.frame(kind, flags, stream, bytes(size)) for kind in range(11) for flags in (0, 1, 4, 8, 0x25) for stream in (0, 1) for size in (0, 4, 8)),
         f.headers(1, _INDEXED, True), f.headers(3, _BLOCK, False), f.frame(f.HEADERS, 0, 5, _BLOCK[:9]) + f.frame(f.CONTINUATION, 4, 5, _BLOCK[9:]),
         f.settings({f.INITIAL_WINDOW_SIZE: 0}), f.settings({f.INITIAL_WINDOW_SIZE: 2**31 - 1}), f.window_update(1, 2**31 - 1), f.frame(f.DATA, 8, 1, b"\3abc\0\0\0"),
         _INDEXED, _RESPONSE, b"\x3f\xe1\x1f", b"\x20", b"\xbe", b"\x80", b"\x7f\xff\xff\xff\xff\xff")  # fmt: skip
_SETTINGS = f.settings({})


def seeds() -> list[bytes]:
    return [
        _SETTINGS + f.headers(1, _INDEXED, True) + f.headers(3, _BLOCK, False) + f.frame(f.DATA, 1, 3, b"hello"), _SETTINGS + f.frame(f.PING, 0, 0, b"12345678") + f.goaway(0, f.Code.NO_ERROR, "bye"),
        _SETTINGS + f.frame(f.HEADERS, 0, 5, _BLOCK[:9]) + f.frame(f.CONTINUATION, 4, 5, _BLOCK[9:]) + f.rst_stream(5, f.Code.CANCEL) + f.window_update(0, 9),
        _SETTINGS + f.frame(f.HEADERS, 0x2C, 1, b"\2" + bytes(5) + _BLOCK + bytes(2)) + f.frame(f.DATA, 8, 1, b"\3abc\0\0\0") + f.frame(f.PRIORITY, 0, 1, bytes(5)) + f.window_update(1, 10),
        f.settings({f.INITIAL_WINDOW_SIZE: 10, f.MAX_FRAME_SIZE: 20000}) + f.headers(1, _RESPONSE, False) + f.headers(1, f.encode([(b"x-sum", b"5")]), True), _INDEXED, _BLOCK, _RESPONSE,
    ]  # fmt: skip


class Wire(Written):
    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return len(self.data)


class Stream(flow.Flow):  # type: ignore[misc,name-defined]
    def __init__(self, machine: Any, number: int) -> None:
        self.machine = machine
        self.open_flow(number, machine.initial_window, machine.time())

    def on_data(self, data: bytes, end: bool) -> None:
        self.machine.heard.append((self.number, data, end))

    def on_reset(self, code: int) -> None:
        self.machine.heard.append((self.number, "reset", code))

    def on_end_sent(self) -> None: ...

    def pause_source(self) -> None: ...

    def resume_source(self) -> None: ...


class Side(multiplex.Multiplex):  # type: ignore[misc,name-defined]
    """Opens a stream for each field block that may open one, and reads each block."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        super().__init__(lambda: 1000.0, self.later.append, 1 << 16)
        self.heard: list[tuple[Any, ...]] = []
        self.wire = Wire()
        self.connection_made(self.wire)

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        fields = written_frames.decode(self._decoder, block)
        self.heard.append((number, fields, end))
        if number > self.last_number:
            self.last_number = number
            self.streams[number] = Stream(self, number)
            self.streams[number].received_end = end
        else:
            self.closed_stream(number, self.streams.get(number))

    def on_goaway(self, last: int, code: int) -> None:
        self.heard.append(("goaway", last, code))


def _spoken(data: bytes, cut: int) -> tuple[list[tuple[Any, ...]], bytes]:
    side = Side()
    for at in range(0, len(data), cut):
        side.data_received(data[at : at + cut])
        assert len(side._buffer) <= f.FRAME_BYTES + 9
    for _ in range(3):
        later, side.later[:] = list(side.later), []
        for one in later:
            one()
    assert len(side.wire.data) <= 64 * len(data) + 1000, "much is said for little"
    return side.heard, side.wire.data


def check(data: bytes) -> None:
    whole = _spoken(data, len(data) or 1)
    assert whole[0] == _spoken(data, 1 + len(data) // 5)[0], "a cut changes what is heard"
    _fields(data)


def _fields(block: bytes) -> None:
    try:
        fields = f.decode(f.new_decoder(1 << 16), block)
    except f.H2ConnectionError:
        return
    other = Decoder(max_header_list_size=1 << 16)
    try:
        assert [(bytes(name), bytes(value)) for name, value in other.decode(block, raw=True)] == [
            (name, value) for name, value, _ in fields
        ], "two readings of a field block"
    except HPACKError:  # jh2 takes a change of the table's size in a block's middle, and padding of Huffman's code that is none
        return
    plain = [(name, value) for name, value, _ in fields]
    assert [(name, value) for name, value, _ in f.decode(f.new_decoder(1 << 17), f.encode(plain))] == plain
    for end in (False, True):
        for name, more in (("parse_request", (end, 50)), ("parse_response", (end, 50, False)), ("parse_trailers", (50,))):
            assert _told(http2_head, Malformed, name, fields, more) == _told(written_head, written_http1.Malformed, name, fields, more), (
                f"two readings: {name}"
            )


def _told(module: Any, malformed: Any, name: str, fields: Any, more: tuple[Any, ...]) -> Any:
    try:
        head = getattr(module, name)(fields, *more)
    except malformed as error:
        return str(error), error.status
    if isinstance(head, list):
        return head
    return [
        getattr(head, field)
        for field in ("block", "framing", "length", "keep_alive", "upgrade")
        if field != "block" or not getattr(head, "websocket_key", b"")
    ]
