"""A client's HTTP/2 connection carries streams, each of which is an exchange (RFC 9113; WebSocket by RFC 8441)."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from .. import failures
from ..failures import Failure
from ..policy import replies
from ..policy.admission import Refuse
from ..policy.head_cache import CachedAdmission, CachedRequest
from ..policy.keys import FieldList
from ..policy.limits import Limiter
from ..reading import PEER_SLOW, READ_AHEAD, UNREAD
from ..records.record import HTTP2, peer_of
from ..sides import OriginSide
from ..wire import http2_connection, http2_head
from ..wire import http2_frames as f
from ..wire.http1_head import FIXED, MARKER, Malformed, ResponseHead, Trailers, split_block
from ..wire.http2_connection import Multiplex
from ..wire.http2_flow import FLOW_SLOTS, Flow
from ..wire.http2_frames import Code, H2ConnectionError, H2StreamError
from ..wire.request_body import Pace
from ..wire.websocket import GOING_AWAY, FrameCounter, accept_of
from .context import Context
from .exchange import Exchange, Handles

_STREAMS_MOST: Final = 128
_LIST_SLACK = 2  # a field list this many times too large is still decoded, to be answered with 431
_BLOCKS_MOST = 256
_INDEXED = bytes(range(0x80, 0x100))
_DRAIN_PING = b"draining"
_LINGER_SECONDS: Final = 1.0
_REQUEST_ID = b"\0\x10x-amzn-requestid\x24"  # a literal without indexing; a value of 36 bytes follows


class Http2(Multiplex):
    """The connection stands in the worker's `clients` from `connection_made` to `connection_lost`."""

    __slots__ = (
        "_blocks",
        "_closing_since",
        "draining",
        "forwarding_fields",
        "handles",
        "idle_since",
        "joined",
        "opened",
        "via",
        "worker",
        "write_paused_since",
    )

    def __init__(self, worker: Context) -> None:
        super().__init__(worker.time, asyncio.get_running_loop().call_soon, _LIST_SLACK * worker.settings.head_bytes)
        self.worker = worker
        self.handles = Handles(worker)
        self.write_paused_since = 0.0
        self._closing_since = 0.0  # our half was ended then, and may still have something to write
        self.idle_since = self.touched  # without streams since then, or since the sweep that last saw one
        self._blocks: dict[bytes, CachedRequest] = {}  # blocks of indexed fields only, as this connection's table has them
        self.draining = False
        self.via = b""  # a field that each answer gets
        self.forwarding_fields = b""  # lines that each request of this client gets (client/forwarding.py)
        self.joined: dict[str, Limiter] = {}
        self.opened = False  # the preface is here

    # ---- asyncio ----

    def connection_made(self, transport: object) -> None:
        super().connection_made(transport)
        forwarding = self.worker.forwarding
        if forwarding.is_on:
            self.forwarding_fields = forwarding.of_connection(cast(asyncio.BaseTransport, transport))
            self.via = f.encode([(b"via", b"1.1 " + forwarding.via)]) if forwarding.via else b""
        self.worker.clients.add(self)
        self.put(
            f.settings({
                f.MAX_CONCURRENT_STREAMS: _STREAMS_MOST, f.MAX_HEADER_LIST_SIZE: self.worker.settings.head_bytes,
                f.ENABLE_CONNECT_PROTOCOL: 1,
            })
            + f.window_update(0, http2_connection.CONNECTION_WINDOW - f.WINDOW_BYTES)
        )  # fmt: skip
        self._receive_window = http2_connection.CONNECTION_WINDOW

    def data_received(self, data: bytes) -> None:
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
        """Closes, because the client will send nothing more, not even a window: it is gone, and so is what runs for it."""
        self.close()
        if self.transport is not None:
            self.transport.close()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.clients.discard(self)
        self.transport = None
        self.close()
        for limiter in self.joined.values():
            limiter.leave()

    def pause_writing(self) -> None:
        """Reads no further while the client does not read, for whatever it asks is answered with something."""
        super().pause_writing()
        self.write_paused_since = self.time()
        self.pause_receiving()

    def resume_writing(self) -> None:
        self.write_paused_since = 0.0
        super().resume_writing()
        if not self.write_paused:
            self.resume_receiving()

    # ---- frames ----

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None or not number & 1 or number <= self.last_number:
            self._late_headers(number, cast("Request | None", stream), block, end)
            return
        self.last_number = number
        if number > self.goaway_last:
            self._ignore(block)
            return
        worker = self.worker
        cached = self._blocks.get(block) if end else None
        key: FieldList = ()
        if cached is None:
            fields = f.decode(self._decoder, block)
            indexed = not block.translate(None, _INDEXED)
            if not indexed:
                self._blocks.clear()  # the table may be another now
            key = tuple(fields)
            cached = worker.heads.of_list(key) if end else None
            if cached is not None and indexed and len(self._blocks) < _BLOCKS_MOST:
                self._blocks[block] = cached
        if len(self.streams) >= _STREAMS_MOST:
            raise H2StreamError(number, Code.REFUSED_STREAM, "too many streams")
        self.idle_since = now = self.touched
        request = self.streams[number] = Request(self, number, now)
        request.received_end = end
        if cached is None:
            self._parsed(request, key, end, now)
        elif not worker.fairness.admit(cached.admission.account, now):
            known = key or tuple(f.decode(self._decoder, block))  # now, because the table goes on
            worker.fairness.defer(cached.admission.account, lambda: self._due(request, cached, known))
        elif not request.try_cached(cached, now):
            self._blocks.pop(block, None)
            self._parsed(request, key or tuple(f.decode(self._decoder, block)), end, now)

    def _due(self, request: Request, cached: CachedRequest, key: FieldList) -> None:
        """Takes up a request that fairness had deferred."""
        if self.streams.get(request.number) is not request:
            return  # its client has given it up
        now = self.worker.time()
        if not request.try_cached(cached, now):
            self._parsed(request, key, True, now)
            self.flush()

    def _parsed(self, request: Request, key: FieldList, end: bool, now: float) -> None:
        settings = self.worker.settings
        request.key = key
        fields = list(key)
        try:
            if http2_head.size_of(fields) > settings.head_bytes:
                raise Malformed("Request header fields too large", 431)
            head = http2_head.parse_request(fields, end, settings.head_fields)
        except Malformed as error:
            if error.status == 400:
                raise H2StreamError(request.number, Code.PROTOCOL_ERROR, str(error)) from error
            request.unread(now)
            request.refuse(Refuse(error.status, str(error).encode()))
            return
        if not end and head.framing == FIXED:
            request.expected = head.length
        request.paused = 0 if end else READ_AHEAD
        request.decide(head, now)

    def _ignore(self, block: bytes) -> None:
        """Ignores a stream that our GOAWAY has refused: its client sends it again elsewhere (RFC 9113, 6.8). The block is decoded,
        because the table goes on."""
        f.decode(self._decoder, block)
        self._blocks.clear()
        self.spend_reset()

    def _late_headers(self, number: int, stream: Request | None, block: bytes, end: bool) -> None:
        """Takes a block on a stream that was opened before: trailers, or a mistake. It is decoded in any case, for the table."""
        fields = f.decode(self._decoder, block)
        self._blocks.clear()
        if not number & 1:
            raise H2ConnectionError(Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        if stream is None:
            if self._closed.get(number) is None and self.is_idle(number):
                raise H2ConnectionError(Code.PROTOCOL_ERROR, "stream numbers must grow")
            self.closed_stream(number, None)
            return
        if stream.received_end:
            raise H2StreamError(number, Code.STREAM_CLOSED, "HEADERS after the end")
        if not end:
            raise H2StreamError(number, Code.PROTOCOL_ERROR, "trailers must end the stream")
        settings = self.worker.settings
        try:
            if http2_head.size_of(fields) > settings.head_bytes:
                raise Malformed("Request header fields too large", 431)
            trailers = http2_head.parse_trailers(fields, settings.head_fields)
        except Malformed as error:
            raise H2StreamError(number, Code.PROTOCOL_ERROR, str(error)) from error
        stream.received_end = True
        stream.on_trailers(trailers)

    def on_goaway(self, last: int, code: int) -> None:
        """Shuts down: the client takes no more streams of ours, of which there are none, and is about to leave."""
        self.is_shutting_down = True
        self.close_if_unused()

    def on_ping_ack(self, payload: bytes) -> None:
        if payload == _DRAIN_PING:
            self.shut_down()

    # ---- ends ----

    def _requests(self) -> list[Request]:
        return [cast(Request, stream) for stream in self.streams.values()]

    def close_if_unused(self) -> None:
        """Closes where no stream is left, and none may come."""
        if self.streams:
            return
        if self.draining and not self.is_shutting_down:
            self.is_shutting_down = True
            self.goaway(self.last_peer_stream, Code.NO_ERROR)
        if self.is_shutting_down and not self.has_closed:
            self.flush()
            self.close()

    def close(self) -> None:
        """Ends our half and what runs, and reads on for a while without looking at it: bytes that come into a closed socket would
        reset away what was written (as in RFC 9112, 9.6). The sweep closes, if the client has not done so."""
        if self.has_closed:
            return
        self.is_shutting_down = self.has_closed = True
        self._closing_since = self.time()
        self._buffer = b""
        for stream in self._requests():
            self.drop(stream)
            stream.on_reset(Code.CANCEL)
        if self.transport is not None and not self.transport.is_closing():
            self.resume_receiving()
            self.transport.write_eof()

    def begin_drain(self) -> None:
        """The connection ends together with its last stream: a client that has an answer has the GOAWAY, too, and sends
        nothing into the end."""
        self.draining = True

    def press_drain(self) -> None:
        """Tells the client of a connection that is never without streams to open no more; the last number is said only when the client
        has seen that, so that no stream on its way is lost."""
        self.goaway(f.LAST_POSSIBLE, Code.NO_ERROR)
        self.put(f.frame(f.PING, 0, 0, _DRAIN_PING))

    def shut_down_unless_parked(self) -> None:
        """Shuts down a connection of which streams were cut, but not while others are parked: they go on after the sleep, which some
        clients do not allow after a GOAWAY."""
        if not any(cast(Request, stream).is_parked for stream in self.streams.values()):
            self.shut_down()

    def shut_down(self) -> None:
        """Begins a graceful shutdown: what runs is answered, and later streams are ignored (RFC 9113, 6.8)."""
        if not self.is_shutting_down:
            self.is_shutting_down = True
            self.goaway(self.last_peer_stream, Code.NO_ERROR)
        self.close_if_unused()

    def sweep(self, now: float) -> None:
        """Ends what has stood still for too long. Nothing that one stream does, and no PING, keeps
        another one alive, or an idle connection."""
        settings = self.worker.settings
        long_ago = now - settings.idle_seconds
        if 0 < self.write_paused_since < long_ago or 0 < self._closing_since < long_ago:
            if self.transport is not None:
                self.transport.abort()  # it reads nothing of what it asked for
            return
        for stream in [blocked for blocked in self._blocked if blocked.blocked_ms < long_ago * 1000]:
            self.reset(stream, Code.CANCEL)  # whose window the client does not open
            stream.on_reset(Code.CANCEL)
        if self.streams:
            self.idle_since = now
        if self._closing_since:
            if now - self._closing_since > _LINGER_SECONDS:
                self._end_linger()
            return
        if self.read_paused:
            return
        begun = self.incomplete_since if self._peer_settled else self.idle_since
        if 0 < begun < now - settings.head_seconds:
            self.fail(Code.PROTOCOL_ERROR, "not continued in time")
        elif not self.streams and self.idle_since < long_ago:
            self.shut_down()
        else:
            for request in self._requests():
                request.sweep(now)

    def _end_linger(self) -> None:
        if self.transport is not None and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:  # a client that does not read either: it is not listened to for ever
            self.pause_receiving()

    @property
    def is_quiet(self) -> bool:
        return not self.streams

    def close_idle(self) -> None:
        self.shut_down()


class Request(Exchange, Flow):
    """A stream is one exchange, and its flow control."""

    __slots__ = (
        "_read_ahead",
        "_end_sent",
        "_frames",
        "_remaining",
        "_pace",
        "_received",
        "_trailers",
        "connection",
        "expected",
        "key",
        *FLOW_SLOTS,
    )

    protocol = HTTP2
    is_raw = False

    def __init__(self, connection: Http2, number: int, now: float) -> None:
        super().__init__(connection.worker, connection.handles)
        self.counted = False
        self.began = now
        self.connection = connection
        self.open_flow(number, connection.initial_window, now)
        self._read_ahead: bytearray | None = None  # of the body, or for the tunnel, read while there is neither application nor 101
        self.forwarding_fields = connection.forwarding_fields
        self._received = 0  # bytes of the request's body
        self._pace: Pace | None = None  # since it was first asked for
        self._trailers: Trailers | None = None  # which may come before there is an application
        self._remaining = -1  # bytes of the answer that Content-Length has promised, and that are still to come
        self._frames: FrameCounter | None = None
        self._end_sent = False  # the tunnel's application has ended its half
        self.expected = -1  # bytes of the request's body that are still to come by Content-Length
        self.key: FieldList = ()

    # ---- the request ----

    @property
    def joined(self) -> dict[str, Limiter]:
        return self.connection.joined

    @property
    def peer(self) -> str:
        return peer_of(cast(asyncio.BaseTransport, self.connection.transport))

    @property
    def request_complete(self) -> bool:
        """Whether all of the request has been read. That of a handshake that has led to no tunnel never is: what its client sent behind
        it has no reader."""
        return self.received_end and (self.head is None or self.head.upgrade is None)

    @property
    def held_bytes(self) -> int:
        return len(self._read_ahead) if self._read_ahead is not None else 0

    def remember(self, admission: CachedAdmission) -> None:
        head = self.head
        assert head is not None
        self.worker.heads.remember_list(self.key, b"%b %b HTTP/1.1" % (head.method, head.target), admission)

    def on_data(self, data: bytes, end: bool) -> None:
        """Takes a piece of the body. Raises H2StreamError where the body is not as long as Content-Length says."""
        self._received += len(data)
        if self.expected >= 0:
            self.expected -= len(data)
            if self.expected < 0 or (end and self.expected):
                raise H2StreamError(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        origin = self.origin
        if origin is None or self._awaits_switch:
            self._keep_read_ahead(data)
            return
        if self._frames is not None:
            if data:
                self.tunnel_in(data)
        else:
            account = self.account
            account.count += 1
            account.spoken += self.response_started  # a stream that goes on both ways, not a request's body
            account.last = self.worker.time()
            if data:
                if self._limiter is not None:
                    self.throttle(len(data))
                origin.send(data)
        if end:
            self._finish(origin, None)

    def _finish(self, origin: OriginSide, trailers: Trailers | None) -> None:
        """Sends the origin the end of the client's half."""
        origin.finish(trailers)
        if self._end_sent:
            self._complete()

    @property
    def _awaits_switch(self) -> bool:
        """Whether this is an extended CONNECT that the application has not agreed to: nothing of a tunnel goes out (RFC 8441, 5)."""
        return self._frames is None and self.head is not None and self.head.upgrade is not None

    def _keep_read_ahead(self, data: bytes) -> None:
        """Keeps what has nowhere to go yet. The stream's window, which is not credited meanwhile, and the session's share of what is held
        bound it."""
        if self.response_started or not data:
            return  # it was refused: nobody will read this
        if self._read_ahead is None:
            self._read_ahead = bytearray()
        self._read_ahead += data
        if self.held_for is not None and not self.worker.holds.grow(self.held_for, len(data)):
            self.held_too_much(self.held_for)

    def on_trailers(self, trailers: Trailers) -> None:
        if self.expected > 0:
            raise H2StreamError(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        if self.origin is None:
            self._trailers = trailers
        elif not self._awaits_switch:
            self._finish(self.origin, trailers)

    def send_read_ahead(self) -> None:
        origin = self.origin
        if origin is None or self._awaits_switch:
            return
        ahead, self._read_ahead = self._read_ahead, None
        if ahead:
            self.throttle(len(ahead))
            origin.send(bytes(ahead))
        if self.received_end and self.head is not None and self.head.framing != 0:
            origin.finish(self._trailers)
        else:
            self.resume_reading(READ_AHEAD)

    def pause_reading(self, reason: int) -> None:
        self.paused |= reason

    def resume_reading(self, reason: int) -> None:
        self.paused &= ~reason
        if not self.paused and self._is_open:
            self.received_ms = int(self.worker.time() * 1000)
            self.connection.credit(self)

    def sweep(self, now: float) -> None:
        """Fails an upload that stands still or drips, though it is read."""
        if self.origin is None or self.received_end or self.response_started:
            return
        settings, pace = self.worker.settings, self._pace
        if pace is None:
            pace = self._pace = Pace()
        received = self._received + self.connection.incomplete_of(self.number)
        is_slow = pace.check(received, now, self.paused != 0, settings.body_seconds, settings.body_bytes_per_second)
        if self.paused:
            return
        if self.received_ms <= (now - settings.body_seconds) * 1000:
            self._late(b"The request's body did not come in time")
        elif is_slow:
            self._late(b"The request's body comes too slowly")

    def _late(self, text: bytes) -> None:
        self.cancel()
        self.refuse(Refuse(408, text))

    # ---- the answer ----

    def _begin_answer(self, status: int) -> None:
        self._stop_waiting()
        self.response_started = True
        self.status = status
        if self.counters.access is not None:
            self.first_byte = self.worker.time()

    def _fields(self, head: ResponseHead) -> bytes:
        block = http2_head.response_block(head) + _REQUEST_ID + self.request_id + self.connection.via
        if not head.is_dated:
            block += replies.date_block()
        if self._timing and self.worker.settings.server_timing:
            block += f.encode([(b"server-timing", self._timing.encode("ascii"))])
        return block

    @property
    def _is_open(self) -> bool:
        return self.number in self.connection.streams

    def send_interim(self, head: ResponseHead) -> None:
        if self._is_open:
            self.connection.send_interim(self, http2_head.response_block(head))

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        if head.framing == FIXED and head.length != len(body):
            self._inconsistent()
            return
        self._begin_answer(head.status)
        self.origin = None
        delay = self._limiter.spend(len(body)) if body and self._limiter is not None else 0.0
        if delay:  # and no request comes behind it on its stream that could wait in its place
            if self._throttle is not None:  # of its request, of which nothing more is read
                self._throttle.cancel()
            self._throttle = asyncio.get_running_loop().call_later(delay, self._send_whole, head, body)
        else:
            self._send_whole(head, body)

    def _send_whole(self, head: ResponseHead, body: bytes) -> None:
        if self._is_open:
            self.sent = len(body)
            self.connection.send_message(self, self._fields(head), body)

    def response_head(self, head: ResponseHead) -> None:
        self._begin_answer(head.status)
        self._remaining = head.length if head.framing == FIXED else -1
        if self._is_open:
            self.connection.put(f.headers(self.number, self._fields(head), False))

    def response_data(self, data: bytes) -> None:
        if self._remaining >= 0:
            self._remaining -= len(data)
            if self._remaining < 0:
                self._inconsistent()
                return
        self.sent += len(data)
        if self._limiter is not None:
            self.throttle(len(data))
        if self._frames is not None:
            self._frames.feed(data)
        if self._is_open:
            self.connection.send_data(self, data, False)

    def response_done(self, trailers: Trailers | None = None) -> None:
        if self._remaining > 0:
            self._inconsistent()
            return
        self.origin = None
        if not self._is_open:
            return
        if trailers:
            self.connection.send_trailers(self, f.encode(trailers))
        else:
            self.connection.send_data(self, b"", True)

    def _inconsistent(self) -> None:
        """Fails an answer that is not as long as its Content-Length says, which an intermediary must not pass on (RFC 9113, 8.1.1)."""
        origin = self.origin
        if origin is not None:
            origin.cancel()
        self.origin_failed(Failure(failures.INVALID, "the content is not as long as content-length says (RFC 9113, 8.1.1)"))

    def pause_source(self) -> None:
        if self.origin is not None:
            self.origin.pause(PEER_SLOW)

    def resume_source(self) -> None:
        if self.origin is not None:
            self.origin.resume(PEER_SLOW)
        self.resume_reading(UNREAD)

    def cut_short(self) -> None:
        self.record("origin")
        self.connection.reset(self, Code.INTERNAL_ERROR)
        self.connection.close_if_unused()

    def refuse(self, refusal: Refuse) -> None:
        self._begin_answer(refusal.status)
        self.reason = self.reason or refusal.why
        if not self._is_open:
            return
        fields = [(b"x-amzn-requestid", self.request_id), *replies.fields(refusal)]
        body = b"" if self.head is not None and self.head.method == b"HEAD" else refusal.body
        self.sent = len(body)
        self.connection.send_message(self, f.encode_status(refusal.status) + f.encode(fields), body)

    # ---- ends ----

    def on_end_sent(self) -> None:
        """Our half of the stream has ended. An answer that comes before the whole request asks for no more of it (RFC 9113, 8.1); in a
        tunnel the client may speak on (RFC 8441, 5)."""
        if self._frames is not None and not self.received_end:
            self._end_sent = True
        else:
            self._complete()

    def _complete(self) -> None:
        """Drops the stream, because both sides of a tunnel have ended, or the answer is complete."""
        self.record()
        if self._frames is not None:
            self.cancel()
        if self.received_end:
            self.connection.drop(self)
        else:
            self.connection.reset(self, Code.NO_ERROR)
        self.connection.close_if_unused()

    def on_reset(self, code: int) -> None:
        """Cancels what runs for the stream: the client has reset it, or was made to."""
        self.status = self.status or 499
        self.sent -= len(self.queue) if self.queue is not None else 0
        self.record("client")
        self.cancel()
        if self._throttle is not None:  # which would keep the stream, and an answer that waits for it
            self._throttle.cancel()
        self.connection.close_if_unused()

    # ---- tunnels ----

    def switch(self, head: ResponseHead, data: bytes) -> None:
        """Begins the tunnel, because the application agrees to the handshake that we made; what came early belongs to it (RFC 8441, 5)."""
        request, origin = self.head, self.origin
        assert request is not None and origin is not None
        accept = [value for name, value in split_block(head.block) if name == b"sec-websocket-accept"]
        if accept != [accept_of(request.websocket_key)]:
            origin.cancel()
            self.origin_failed(Failure(failures.INVALID, "Sec-WebSocket-Accept does not answer the request's key (RFC 6455, 4.2.2)"))
            return
        self._begin_answer(200)
        self._frames = FrameCounter()
        block = self._fields(head)
        if request.subprotocol_auth and b"sec-websocket-protocol" not in head.names:
            block += f.encode([(b"sec-websocket-protocol", MARKER)])
        if self._is_open:
            self.connection.put(f.headers(self.number, block, False))
        if data:
            self.response_data(data)
        ahead, self._read_ahead = self._read_ahead, None
        if ahead:
            self.tunnel_in(bytes(ahead))
        if self.received_end:
            origin.finish(None)
        else:
            self.resume_reading(READ_AHEAD)

    @property
    def server_frames(self) -> FrameCounter | None:
        return self._frames

    def tunnel_write(self, data: bytes) -> None:
        """Sends frames of ours. A client that asks for them and does not read them is read no further."""
        if data and self._is_open:
            self.connection.send_data(self, data, False)
            if self.source_paused:
                self.pause_reading(UNREAD)

    def tunnel_half_closed(self) -> None:
        if self._frames is not None:
            self._frames.end()
        if self._is_open:
            self.connection.send_data(self, b"", True)

    def tunnel_over(self) -> None:
        self.response_done()

    def cut(self) -> None:
        """Ends the stream with its incarnation; the client of a WebSocket is told why."""
        if not self.response_started:
            self.origin_failed(failures.SUSPENDED)
            return
        self.origin = None
        self.record("origin")
        connection = self.connection
        if self._frames is not None and self._frames.at_boundary and not self.queue and self._is_open:
            connection.send_data(self, GOING_AWAY, True)
        connection.reset(self, Code.CANCEL)
        # After the resets of all streams that are cut now: clients built on h2 take nothing that follows a GOAWAY.
        connection.call_soon(connection.shut_down_unless_parked)
