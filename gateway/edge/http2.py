"""A client's HTTP/2 connection: every stream is an exchange (RFC 9113; WebSocket by RFC 8441)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import frames as f
from . import head2, multiplex, replies
from .admission import Refuse
from .exchange import Exchange, peer_of
from .flow import FLOW_SLOTS, Flow
from .frames import Code, Fatal, StreamBroken
from .head import FIXED, MARKER, Malformed, ResponseHead, Trailers, split_block
from .memo import Admitted, Repeated
from .multiplex import Multiplex
from .websocket import GOING_AWAY, FrameCounter, accept_of

if TYPE_CHECKING:
    from .limits import Limiter
    from .worker import Worker

_STREAMS_MOST = 128
_LIST_SLACK = 2  # a field list this many times too large is still decoded, to be answered with 431
_BLOCKS_MOST = 256
_INDEXED = bytes(range(0x80, 0x100))
_REQUEST_ID = b"\0\x10x-amzn-requestid\x24"  # a literal without indexing; a value of 36 bytes follows
_DRAIN_PING = b"draining"
_LAST_POSSIBLE = 2**31 - 1
Key = tuple[f.Field, ...]


class Request(Exchange, Flow):
    """One stream."""

    __slots__ = ("_ahead", "_expected", "_frames", "_key", "connection", *FLOW_SLOTS)

    protocol = replies.HTTP2
    is_raw = False

    def __init__(self, connection: Http2, number: int, now: float) -> None:
        super().__init__(connection.worker)
        self.connection = connection
        self.open_flow(number, connection.initial_window, now)
        self._ahead: list[bytes] = []  # body that was read while there is no origin
        self._expected = -1  # bytes of the body that are still to come by Content-Length
        self._frames: FrameCounter | None = None
        self._key: Key = ()

    # ---- the request ----

    @property
    def joined(self) -> dict[str, Limiter]:
        return self.connection.joined

    @property
    def peer(self) -> str:
        return peer_of(self.connection.transport)

    @property
    def request_complete(self) -> bool:
        return self.received_end

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self._ahead))

    def remember(self, memo: Admitted) -> None:
        head = self.head
        assert head is not None
        rewritten = b"%b %b HTTP/1.1%b\r\nx-amzn-requestid: " % (head.method, head.target, head.block)
        self.worker.streams.put(self._key, Repeated(memo, rewritten, head.method == b"HEAD"))

    def body(self, data: bytes, end: bool) -> None:
        """DATA of the client. Raises StreamBroken where it is not what Content-Length says."""
        if self._expected >= 0:
            self._expected -= len(data)
            if self._expected < 0 or (end and self._expected):
                raise StreamBroken(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        account = self.account
        account.count += 1
        account.last = self.worker.time()
        if self.origin is None:
            if data and not self.response_started:
                self._ahead.append(data)
                if self.held_for is not None:
                    self.worker.holds.grow(self.held_for, len(data))
            return
        if data:
            if self._limiter is not None:
                self.throttle(len(data))
            self.origin.send(data)
        if end:
            self.origin.finish(None)

    def trailers(self, trailers: Trailers) -> None:
        if self._expected > 0:
            raise StreamBroken(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        if self.origin is not None:
            self.origin.finish(trailers)

    def send_ahead(self) -> None:
        origin = self.origin
        if origin is None:
            return
        ahead, self._ahead = self._ahead, []
        if self.head is not None and self.head.upgrade is not None:
            self._ahead = ahead  # for the tunnel, once there is one
            return
        if ahead:
            origin.send(b"".join(ahead))
        if self.received_end and self.head is not None and self.head.framing != 0:
            origin.finish(None)
        elif not origin.is_paused:
            self.resume_reading()

    def pause_reading(self) -> None:
        self.taken = False

    def resume_reading(self) -> None:
        self.taken = True
        self.connection.credit(self)

    # ---- the answer ----

    def _fields(self, head: ResponseHead) -> bytes:
        block = head2.response_block(head) + _REQUEST_ID + self.request_id
        if self._timing and self.worker.settings.server_timing:
            block += f.encode([(b"server-timing", self._timing.encode("ascii"))])
        return block

    def interim(self, head: ResponseHead) -> None:
        if self.number in self.connection.streams:
            self.connection.put(f.headers(self.number, head2.response_block(head), False))

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        connection, size = self.connection, len(body)
        if not size or size > min(self.send_window, connection.send_window, connection.frame_bytes) or connection._write_paused:
            self.response_head(head)
            self.response_done(body=body)
            return
        self._answered()
        self.response_started = True
        self.status = head.status
        self.sent = size
        if self.worker.access is not None:
            self.first_byte = self.worker.time()
        self.origin = None
        if self.number not in connection.streams:
            return
        connection.send_window -= size
        self.send_window -= size
        connection.put(f.headers(self.number, self._fields(head), False) + f.frame(f.DATA, f.END_STREAM, self.number, body))
        self.worker.count(self)
        connection.sent_end(self)

    def response_head(self, head: ResponseHead) -> None:
        self._answered()
        self.response_started = True
        self.status = head.status
        if self.worker.access is not None:
            self.first_byte = self.worker.time()
        if self.number in self.connection.streams:
            self.connection.put(f.headers(self.number, self._fields(head), False))

    @property
    def is_stuck(self) -> bool:
        return self.source_paused

    def response_data(self, data: bytes) -> None:
        self.sent += len(data)
        if self._limiter is not None:
            self.throttle(len(data))
        if self._frames is not None:
            self._frames.feed(data)
        if self.number in self.connection.streams:
            self.connection.send_data(self, data, False)

    def response_done(self, trailers: Trailers | None = None, body: bytes = b"") -> None:
        self.origin = None
        self.sent += len(body)
        self.worker.count(self)
        if self.number not in self.connection.streams:
            return
        if trailers:
            self.connection.send_trailers(self, f.encode(trailers))
        else:
            self.connection.send_data(self, body, True)

    def pause_source(self) -> None:
        if self.origin is not None:
            self.origin.pause()

    def resume_source(self) -> None:
        if self.origin is not None:
            self.origin.resume()

    def origin_failed(self, head_sent: bool) -> None:
        self.origin = None
        self._answered()
        if head_sent or self.response_started:
            self.worker.count(self, "origin")
            self.connection.reset(self, Code.INTERNAL_ERROR)
        else:
            self.refuse(replies.UNAVAILABLE)

    def refuse(self, refusal: Refuse) -> None:
        self._answered()
        self.status = refusal.status
        self.response_started = True
        if self.number not in self.connection.streams:
            return
        fields = [(b"x-amzn-requestid", self.request_id), *replies.fields(refusal)]
        block = f.encode_status(refusal.status) + f.encode(fields)
        body = b"" if self.head is not None and self.head.method == b"HEAD" else refusal.body
        if not body:
            self.connection.put(f.headers(self.number, block, True))
            self.connection.sent_end(self)
            self.worker.count(self)
            return
        self.connection.put(f.headers(self.number, block, False))
        self.response_done(body=body)

    # ---- tunnels ----

    def switch(self, head: ResponseHead, data: bytes) -> None:
        request = self.head
        assert request is not None
        accept = [value for name, value in split_block(head.block) if name == b"sec-websocket-accept"]
        if accept != [accept_of(request.websocket_key)]:
            origin = self.origin
            if origin is not None:
                origin.abandon()
            self.origin_failed(head_sent=False)
            return
        self._answered()
        self.response_started = True
        self.status = 200
        self._frames = FrameCounter()
        block = self._fields(head)
        if request.subprotocol_auth and b"sec-websocket-protocol" not in head.names:
            block += f.encode([(b"sec-websocket-protocol", MARKER)])
        self.connection.put(f.headers(self.number, block, False))
        if data:
            self.response_data(data)
        ahead, self._ahead = self._ahead, []
        if self.origin is not None:
            if ahead:
                self.origin.send(b"".join(ahead))
            if self.received_end:
                self.origin.finish(None)
            elif not self.origin.is_paused:
                self.resume_reading()

    def tunnel_half_closed(self) -> None:
        if self.number in self.connection.streams:
            self.connection.send_data(self, b"", True)

    def response_over(self) -> None:
        self.response_done()

    def cut(self) -> None:
        """The client learns that this connection is no good for the session any more, and of a WebSocket why."""
        if not self.response_started:
            self.origin_failed(head_sent=False)
            return
        self.origin = None
        self.worker.count(self, "origin")
        connection = self.connection
        if self._frames is not None and self._frames.at_boundary and not self.queue:
            connection.send_data(self, GOING_AWAY, True)
        connection.reset(self, Code.CANCEL)
        connection.go_away()


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
        """Nothing more will come: what waits is forgotten, what runs is answered."""
        for stream in list(self.streams.values()):
            if stream.origin is None and not stream.response_started:
                self.drop(stream)
                stream.leave()
        if not self.streams:
            self.end()
        self.goaway_sent = True  # the last stream's end closes
        return bool(self.streams)

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.clients.discard(self)
        self.transport = None
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.leave()
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
        if again is not None and not self.goaway_sent and (origin := request.admitted(again.memo)) is not None:
            request.forward_now(origin, again.rewritten, again.is_head, again.memo.account, now)
        else:
            self._parsed(request, key or tuple(f.decode(self._decoder, block)), end, now)

    def _parsed(self, request: Request, key: Key, end: bool, now: float) -> None:
        settings = self.worker.settings
        request._key = key
        fields = list(key)
        try:
            if head2.list_size(fields) > settings.head_bytes + 32 * len(fields):
                raise Malformed("Request header fields too large", 431)
            head = head2.parse_request(fields, end, settings.head_fields)
        except Malformed as error:
            if error.status == 400:
                raise StreamBroken(request.number, Code.PROTOCOL_ERROR, str(error)) from error
            request.request_id = self.worker.request_id()
            request.refuse(Refuse(error.status, str(error).encode()))
            return
        if not end and head.framing == FIXED:
            request._expected = head.length
        request.taken = end
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
        stream.status = stream.status or 499
        self.worker.count(stream, "client")
        stream.leave()
        self._maybe_end()

    def on_goaway(self, last: int, code: int) -> None:
        """The client opens no more streams."""
        self.goaway_sent = True
        self._maybe_end()

    def on_ping_ack(self, payload: bytes) -> None:
        if payload == _DRAIN_PING:
            self.go_away()

    # ---- ends ----

    def sent_end(self, stream: Request) -> None:
        """RFC 9113, 8.1: an answer that comes before the whole request asks for no more of it."""
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
            for stream in [one for one in self.streams.values() if one.origin is not None and not one.received_end and one.taken]:
                if not stream.response_started:
                    stream.leave()
                    stream.refuse(Refuse(408, b"The request's body did not come in time"))

    @property
    def is_quiet(self) -> bool:
        return not self.streams

    @property
    def is_tunnelling(self) -> bool:
        return any(stream._frames is not None for stream in self.streams.values())

    def close_idle(self) -> None:
        self.go_away()
