"""A client's HTTP/2 connection: every stream is an exchange (stream.py; RFC 9113, WebSocket by RFC 8441)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import frames as f
from . import head2, multiplex
from .admission import Refuse
from .frames import Code, Fatal, StreamBroken
from .head import FIXED, Malformed
from .memo import Repeated
from .multiplex import Multiplex
from .reading import READ_AHEAD
from .stream import Key, Request

if TYPE_CHECKING:
    from .limits import Limiter
    from .worker import Worker

_STREAMS_MOST = 128
_LIST_SLACK = 2  # a field list this many times too large is still decoded, to be answered with 431
_BLOCKS_MOST = 256
_INDEXED = bytes(range(0x80, 0x100))
_DRAIN_PING = b"draining"
_LAST_POSSIBLE = 2**31 - 1


class Http2(Multiplex):
    """The connection. `clients` of the worker hold it until it is closed."""

    __slots__ = ("_blocks", "draining", "joined", "opened", "touched", "worker", "write_stuck_since")

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker.time, _LIST_SLACK * worker.settings.head_bytes)
        self.worker = worker
        self.touched = worker.time()
        self.write_stuck_since = 0.0
        self._blocks: dict[bytes, Repeated] = {}  # blocks of indexed fields only, as this connection's table has them
        self._buffer = b""
        self.draining = False
        self.joined: dict[str, Limiter] = {}
        self.opened = False  # the preface is here

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.worker.clients.add(self)
        self.put(
            f.settings({
                f.MAX_CONCURRENT_STREAMS: _STREAMS_MOST, f.MAX_HEADER_LIST_SIZE: self.worker.settings.head_bytes,
                f.ENABLE_CONNECT_PROTOCOL: 1,
            })
            + f.window_update(0, multiplex.CONNECTION_WINDOW - f.WINDOW_BYTES)
        )  # fmt: skip
        self._receive_window = multiplex.CONNECTION_WINDOW

    def data_received(self, data: bytes) -> None:
        self.touched = self.worker.time()
        if self.opened:
            super().data_received(data)
            return
        data = self._buffer + data
        self._buffer = b""
        if not data.startswith(f.PREFACE[: len(data)]):
            self.fail(Code.PROTOCOL_ERROR, "not the preface of HTTP/2")
        elif len(data) < len(f.PREFACE):
            self._buffer = data
        else:
            self.opened = True
            super().data_received(data[len(f.PREFACE) :])

    def close_notified(self) -> None:
        self.eof_received()

    def eof_received(self) -> bool:
        """Nothing more will come: what waits, or has not come whole, is forgotten; what runs is answered."""
        for stream in list(self.streams.values()):
            if not stream.received_end or (stream.origin is None and not stream.response_started):
                self.drop(stream)
                self._left(stream)
        if not self.streams:
            self.end()
        self.goaway_sent = True  # the last stream's end closes
        return bool(self.streams)

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.clients.discard(self)
        self.transport = None
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            self._left(stream)
        for limiter in self.joined.values():
            limiter.leave()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_stuck_since = self.worker.time()

    def resume_writing(self) -> None:
        self.write_stuck_since = 0.0
        super().resume_writing()

    # ---- frames ----

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None or not number & 1 or number <= self.last_number:
            self._late_headers(number, stream, block, end)
            return
        self.last_number = number
        worker = self.worker
        again = self._blocks.get(block) if end else None
        key: Key = ()
        if again is None:
            fields = f.decode(self._decoder, block)
            indexed = not block.translate(None, _INDEXED)
            if not indexed:
                self._blocks.clear()  # the table may be another now
            key = tuple(fields)
            again = worker.streams.get(key) if end else None
            if again is not None and indexed and len(self._blocks) < _BLOCKS_MOST:
                self._blocks[block] = again
        if len(self.streams) >= _STREAMS_MOST:
            raise StreamBroken(number, Code.REFUSED_STREAM, "too many streams")
        now = self.touched
        request = self.streams[number] = Request(self, number, now)
        request.received_end = end
        if again is None:
            self._parsed(request, key, end, now)
        elif worker.turns.is_over(again.memo.account, now):
            known = key or tuple(f.decode(self._decoder, block))  # now, because the table goes on
            worker.turns.wait(again.memo.account, lambda: self._due(request, again, known))
        elif not self.goaway_sent and (origin := request.admitted(again.memo, now)) is not None:
            request.forward_now(origin, again, now)
        else:
            self._parsed(request, key or tuple(f.decode(self._decoder, block)), end, now)

    def _due(self, request: Request, again: Repeated, key: Key) -> None:
        """The turn has come of a request that had to wait for it."""
        if self.streams.get(request.number) is not request:
            return  # its client has given it up
        now = self.worker.time()
        if (origin := request.admitted(again.memo, now)) is not None:
            request.forward_now(origin, again, now)
        else:
            self._parsed(request, key, True, now)
            self.flush()

    def _parsed(self, request: Request, key: Key, end: bool, now: float) -> None:
        settings = self.worker.settings
        request.key = key
        fields = list(key)
        try:
            if head2.list_size(fields) > settings.head_bytes + 32 * len(fields):
                raise Malformed("Request header fields too large", 431)
            head = head2.parse_request(fields, end, settings.head_fields)
        except Malformed as error:
            if error.status == 400:
                raise StreamBroken(request.number, Code.PROTOCOL_ERROR, str(error)) from error
            request.unread(now)
            request.refuse(Refuse(error.status, str(error).encode()))
            return
        if not end and head.framing == FIXED:
            request.expected = head.length
        request.paused = 0 if end else READ_AHEAD
        request.decide(head, now)

    def _late_headers(self, number: int, stream: Request | None, block: bytes, end: bool) -> None:
        """A block on a stream that was opened before: trailers, or a mistake. It is decoded in any case, for the table."""
        fields = f.decode(self._decoder, block)
        self._blocks.clear()
        if not number & 1:
            raise Fatal(Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        if stream is None:
            if self._closed.get(number) is None and self.is_idle(number):
                raise Fatal(Code.PROTOCOL_ERROR, "stream numbers must grow")
            self.closed_stream(number, None)
            return
        if stream.received_end:
            raise StreamBroken(number, Code.STREAM_CLOSED, "HEADERS after the end")
        if not end:
            raise StreamBroken(number, Code.PROTOCOL_ERROR, "trailers must end the stream")
        try:
            trailers = head2.parse_trailers(fields)
        except Malformed as error:
            raise StreamBroken(number, Code.PROTOCOL_ERROR, str(error)) from error
        stream.received_end = True
        stream.trailers(trailers)

    def on_data(self, stream: Request, data: bytes, end: bool) -> None:
        stream.body(data, end)

    def on_reset(self, stream: Request, code: int) -> None:
        self._left(stream)
        self._maybe_end()

    def _left(self, stream: Request) -> None:
        """The client gave it up."""
        stream.status = stream.status or 499
        stream.sent -= len(stream.queue)
        stream.record("client")
        stream.leave()

    def on_goaway(self, last: int, code: int) -> None:
        """The client opens no more streams."""
        self.goaway_sent = True
        self._maybe_end()

    def on_ping_ack(self, payload: bytes) -> None:
        if payload == _DRAIN_PING:
            self.go_away()

    # ---- ends ----

    def sent_end(self, stream: Request) -> None:
        """All of the answer has been sent. RFC 9113, 8.1: one that comes before the whole request asks for no more of it."""
        stream.record()
        if stream.received_end:
            self.drop(stream)
        else:
            self.reset(stream, Code.NO_ERROR)
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self.draining and not self.streams and not self.goaway_sent:
            self.goaway_sent = True
            self.put(f.goaway(self.last_number, Code.NO_ERROR))
        if self.goaway_sent and not self.streams and self.transport is not None and not self.transport.is_closing():
            self.flush()
            self.end()

    def begin_drain(self) -> None:
        """The connection ends together with its last stream: a client that has an answer has the GOAWAY, too, and sends
        nothing into the end."""
        self.draining = True

    def press_drain(self) -> None:
        """A connection that is never without streams is told to open no more; the last number is said only when the client
        has seen that, so that no stream on its way is lost."""
        self.put(f.goaway(_LAST_POSSIBLE, Code.NO_ERROR) + f.frame(f.PING, 0, 0, _DRAIN_PING))

    def go_away(self) -> None:
        if not self.goaway_sent:
            self.goaway_sent = True
            self.put(f.goaway(self.last_number, Code.NO_ERROR))
        self._maybe_end()

    def sweep(self, now: float) -> None:
        settings = self.worker.settings
        quiet = now - self.touched
        if self.write_stuck_since and now - self.write_stuck_since > settings.idle_seconds:
            if self.transport is not None:
                self.transport.abort()
            return
        if (self._block is not None or not self._peer_settled) and quiet > settings.head_seconds:
            self.fail(Code.PROTOCOL_ERROR, "not continued in time")
        elif not self.streams and quiet > settings.idle_seconds:
            self.go_away()
        elif quiet > settings.body_seconds:
            for stream in [one for one in self.streams.values() if one.origin is not None and not one.received_end and not one.paused]:
                if not stream.response_started:
                    stream.leave()
                    stream.refuse(Refuse(408, b"The request's body did not come in time"))

    @property
    def is_quiet(self) -> bool:
        return not self.streams

    def close_idle(self) -> None:
        self.go_away()
