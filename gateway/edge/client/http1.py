"""A client's HTTP/1.1 connection takes one request after another; each is admitted, forwarded and answered, and an upgrade leads to a
tunnel."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from .. import failures
from ..policy import replies
from ..policy.admission import Refuse
from ..policy.head_cache import CachedAdmission, CachedRequest
from ..policy.limits import Limiter
from ..reading import HELD, PEER_SLOW, READ_AHEAD, THROTTLED, UNREAD, ReadGate
from ..records.record import peer_of
from ..wire.http1_head import CHUNKED, FIXED, MARKER, NO_BODY, UNTIL_CLOSE, Malformed, ResponseHead, Trailers, parse_request
from ..wire.read_ahead import ReadAhead
from ..wire.request_body import STANDS_STILL, TOO_SLOW, RequestBody
from ..wire.websocket import GOING_AWAY, FrameCounter
from .context import Context
from .exchange import Exchange, Handles

_AT_HEAD: Final = 0  # the next request's head is awaited
_IN_BODY: Final = 1  # a request is under way, and its body has not come whole
_WAITING: Final = 2  # a request is under way, and has come whole
_TUNNEL: Final = 3
_ENDING: Final = 4
_QUEUED: Final = 5  # the next request may be here, and waits: for a turn of the loop or its session's, or for the client to read
# By state, the states that may follow it, as a set of bits. Bytes, because mypyc makes a new tuple of a tuple of
# numbers each time that it is indexed.
_NEXT: Final = bytes(
    (
        1 << _QUEUED | 1 << _IN_BODY | 1 << _WAITING | 1 << _ENDING,  # at a head
        1 << _WAITING | 1 << _ENDING,  # in a body
        1 << _AT_HEAD | 1 << _TUNNEL | 1 << _ENDING,  # waiting
        1 << _ENDING,  # in a tunnel
        1 << _ENDING,  # ending: who lingers may close, and who closes is told when that is done
        1 << _AT_HEAD | 1 << _QUEUED | 1 << _ENDING,  # queued
    )
)
_AHEAD_MAX_BYTES: Final = 64 << 10  # read beyond the request under way, or while it is held
_BUFFER_HIGH_BYTES: Final = 512 << 10
_LINGER_SECONDS = 1.0
_NO_LIMITERS: Final[dict[str, Limiter]] = {}  # shared, always empty: `joined` replaces it before anything is written


class Http1:
    """The connection reads what comes in order, one request at a time. `exchange` is the request under way: whatever is about a
    single request is kept there, and ends with it."""

    __slots__ = (
        "_buffer", "_half_closed_at", "_head_bytes", "_joined", "_read_ahead", "_reading", "_state", "_stuck_since", "_throttle",
        "exchange", "forwarding_fields", "handles", "heads", "touched", "transport", "via", "worker",
    )  # fmt: skip

    def __init__(self, worker: Context) -> None:
        self.worker = worker
        self.handles = Handles(worker)
        self.heads = worker.heads
        self.transport: asyncio.Transport | None = None
        self.exchange: Http1Exchange | None = None
        self.touched = worker.time()
        self.forwarding_fields = b""  # lines that each request of this client gets (client/forwarding.py)
        self.via = b""  # what we add to responses
        self._state = _AT_HEAD
        self._buffer = b""  # of a head that is not complete
        self._read_ahead = ReadAhead()
        self._head_bytes = worker.settings.head_bytes
        self._reading: ReadGate | None = None
        self._half_closed_at = 0.0  # when the client ended its half; 0: it has not
        self._stuck_since = 0.0  # when the client stopped reading so much that the write buffer is full; 0: it reads
        self._throttle: asyncio.TimerHandle | None = None  # while the bytes a second of a session are spent
        self._joined: dict[str, Limiter] = _NO_LIMITERS

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._reading = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_HIGH_BYTES)
        forwarding = self.worker.forwarding
        if forwarding.is_on:
            self.via = forwarding.via_line(b"1.1")
            self.forwarding_fields = forwarding.of_connection(transport)
        self.worker.clients.add(self)

    def data_received(self, data: bytes) -> None:
        state, exchange = self._state, self.exchange
        if state == _AT_HEAD:
            self._on_head(data)
        elif state == _TUNNEL and exchange is not None:
            self.touched = self.handles.time()
            exchange.tunnel_in(data)
        elif state == _IN_BODY and exchange is not None:
            self._on_body(exchange, data)
        elif state in (_WAITING, _QUEUED):
            self._keep_read_ahead(data)

    def close_notified(self) -> None:
        """The client has ended its half of TLS: it sends nothing more, and may still read. What it asked for completely is answered, while
        it can be believed to be there: most clients that end their half have left. `sweep` aborts it after a while without a byte; on a
        parked stream, where none comes, that is now."""
        if self._half_closed_at:
            return
        self._half_closed_at = self.handles.time()
        exchange = self.exchange
        origin = exchange.origin if exchange is not None else None
        if exchange is not None and exchange.is_parked:
            self._abort()
        elif self._state == _TUNNEL and exchange is not None and origin is not None:
            origin.finish(None)
            if exchange.origin_ended:
                exchange.both_halves_ended()
        elif self._state in (_AT_HEAD, _IN_BODY) and not self._read_ahead.size:
            self._close()

    def eof_received(self) -> bool:
        """The client has ended its half of the TCP connection, or is gone. Nothing is begun for it any more; what runs is answered."""
        has_origin = self.exchange is not None and self.exchange.origin is not None
        if (not has_origin and self._state != _QUEUED) or self._state == _IN_BODY:
            return False
        self.close_notified()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.clients.discard(self)
        self.transport = self._reading = None
        exchange, self.exchange = self.exchange, None
        self._to(_ENDING)
        if exchange is not None:
            if not exchange.response_started:
                exchange.status = 499
            exchange.record("client")  # it left in the middle
            exchange.cancel()
        for limiter in self._joined.values():
            limiter.leave()

    def pause_writing(self) -> None:
        self._stuck_since = self.handles.time()
        if self.exchange is not None and self.exchange.origin is not None:
            self.exchange.origin.pause(PEER_SLOW)

    def resume_writing(self) -> None:
        self._stuck_since = 0.0
        if self.exchange is not None and self.exchange.origin is not None:
            self.exchange.origin.resume(PEER_SLOW)
        if self._reading is not None and self._reading.reasons & UNREAD:
            if self._state == _QUEUED:
                self._next_request()
            else:
                self.resume_reading(UNREAD)

    def _to(self, state: int) -> None:
        """Sets the connection's state, and alone does so; the table says which one may follow."""
        assert _NEXT[self._state] >> state & 1, (self._state, state)
        self._state = state

    # ---- the head ----

    def _on_head(self, data: bytes, begin: int = 0, is_due: bool = False) -> None:
        """Reads a head that begins in `data` at `begin`, or before, in what came of it until now (`_buffer`)."""
        worker = self.worker
        if self._buffer:
            data, begin = self._buffer + data[begin:], 0
        elif data[begin] in (13, 10):
            data, begin = data[begin:].lstrip(b"\r\n"), 0  # RFC 9112, 2.2: an empty line before a request is ignored
            if not data:  # and is no activity: it would keep a connection without requests open for ever
                return
        end = data.find(b"\r\n\r\n", begin) if begin else data.find(b"\r\n\r\n")
        if end < 0 or end - begin > self._head_bytes:
            self._incomplete(data[begin:])
            return
        self._buffer = b""
        self.touched = now = self.handles.time()
        raw = data[begin:end] if begin else data[:end]
        cached = self.heads.heads.get(raw)
        if cached is not None:
            if not is_due and not worker.fairness.admit(cached.admission.account, now):
                self._defer(cached, data, begin)
                return
            if self._try_cached(cached, data, end, now):
                return
            is_due = True
        at = raw.find(b"\r\n")
        line, block = (raw, b"") if at < 0 else (raw[:at], raw[at:])
        cached = self.heads.of_parts(line, block)
        if cached is not None:
            if not is_due and not worker.fairness.admit(cached.admission.account, now):
                self._defer(cached, data, begin)
                return
            if self._try_cached(cached, data, end, now):
                if not cached.is_new:
                    self.heads.heads.put(raw, cached)
                return
        self._parsed(line, block, data, end, now)

    def _try_cached(self, cached: CachedRequest, data: bytes, end: int, now: float) -> bool:
        """Forwards a request that was seen before, and returns whether it could; its head ends at `end`."""
        exchange = Http1Exchange(self)
        exchange.keep = cached.admission.keep_alive
        if not exchange.try_cached(cached, now):
            return False
        self.exchange = exchange
        self._to(_WAITING)
        if len(data) > end + 4:
            self._read_ahead.keep(data, end + 4)
        return True

    def _defer(self, cached: CachedRequest, data: bytes, begin: int) -> None:
        self._to(_QUEUED)
        self._read_ahead.keep(data, begin)
        self.worker.fairness.defer(cached.admission.account, self._due)

    def _due(self) -> None:
        """Takes up the request that fairness had deferred."""
        self._go_on(True)

    def _incomplete(self, data: bytes) -> None:
        if len(data) > self._head_bytes:
            self._buffer = b""
            self._fail(431, b"Request header fields too large")
            return
        if not self._buffer:
            self.touched = self.handles.time()
        self._buffer = data

    def _parsed(self, line: bytes, block: bytes, data: bytes, end: int, now: float) -> None:
        try:
            head = parse_request(line, block, self.worker.settings.head_fields)
        except Malformed as error:
            self._fail(error.status, str(error).encode())
            return
        self.exchange = exchange = Http1Exchange(self)
        exchange.keep = head.keep_alive
        exchange.is_raw = head.minor == 1
        if head.framing != NO_BODY and (head.framing != FIXED or head.length):
            exchange.body = RequestBody(head.framing, head.length, now)
        self._to(_WAITING if exchange.body is None else _IN_BODY)
        self._read_ahead.keep(data, end + 4)
        exchange.block = block
        exchange.decide(head, now)

    @property
    def joined(self) -> dict[str, Limiter]:
        """Returns the limiters that count this connection, by session; it leaves them when it closes."""
        if self._joined is _NO_LIMITERS:
            self._joined = {}
        return self._joined

    # ---- the body ----

    @property
    def is_in_body(self) -> bool:
        return self._state == _IN_BODY

    @property
    def read_ahead_bytes(self) -> int:
        """Returns the number of bytes that were read beyond the request's head, or beyond the request, and are not parsed yet."""
        return self._read_ahead.size

    def _keep_read_ahead(self, data: bytes) -> None:
        self._read_ahead.append(data)
        exchange = self.exchange
        ticket = exchange.held_for if exchange is not None else None
        if exchange is not None and ticket is not None and not self.worker.holds.grow(ticket, len(data)):
            exchange.held_too_much(ticket)
        elif self._read_ahead.size > _AHEAD_MAX_BYTES:
            self.pause_reading(READ_AHEAD)

    def send_read_ahead(self, exchange: Http1Exchange) -> None:
        """Sends what was read of the body meanwhile, because the request's application is there."""
        if self._state == _IN_BODY:
            data, at = self._read_ahead.take()
            if data:
                self._on_body(exchange, data[at:])
            self.resume_reading(READ_AHEAD)

    def _on_body(self, exchange: Http1Exchange, data: bytes) -> None:
        """Sends body bytes on to the origin, or keeps them, within a bound, until there is one."""
        account = exchange.account
        self.touched = now = account.last = self.handles.time()
        origin, body = exchange.origin, exchange.body
        if origin is None or body is None:
            self._keep_read_ahead(data)
            return
        try:
            used, content = body.take(data, origin.takes_raw, now)
        except Malformed as error:
            self._fail(error.status, str(error).encode())
            return
        account.count += 1
        exchange.throttle(used)
        is_complete = body.is_complete
        if is_complete:
            self._to(_WAITING)
            self._read_ahead.keep(data, used)
        if content:
            origin.send(content)
        if is_complete:
            origin.finish(body.trailers)

    def throttle(self, delay: float) -> None:
        """Pauses reading of the client for so many seconds."""
        if self._throttle is None:
            self._throttle = asyncio.get_running_loop().call_later(delay, self._unthrottle)
            self.pause_reading(THROTTLED)

    def _unthrottle(self) -> None:
        """Ends the throttle. Another exchange may be under way by now: it was throttled with the first."""
        self._throttle = None
        self.resume_reading(THROTTLED)
        if self.exchange is not None and self.exchange.origin is not None:
            self.exchange.origin.resume(THROTTLED)

    # ---- what becomes of the connection when its exchange has ended ----

    def exchange_over(self, keep: bool) -> None:
        """Goes on to the next request, or closes, because the answer is complete. An upload that still runs ends with it: its rest
        has no reader."""
        self.exchange = None
        if self._state == _IN_BODY:
            self._linger()
        elif not keep or (self._half_closed_at and not self._read_ahead.size):
            if self._read_ahead.size:  # more is on its way, perhaps, and nobody reads it
                self._linger()
            else:
                self._close()
        else:
            self._next_request()

    def cut_short(self) -> None:
        """Aborts the connection, so that the client sees that its answer is not complete."""
        self.exchange = None
        self._to(_ENDING)
        if self.transport is not None:
            self.transport.abort()

    def tunnel_over(self, politely: bool) -> None:
        """Closes, because nothing of the tunnel is left; `politely`: what was written last must arrive, whatever the client still sends."""
        self.exchange = None
        if politely:
            self._linger()
        else:
            self._close()

    def tunnel_begins(self, exchange: Http1Exchange) -> None:
        """Begins a tunnel, because the application has agreed to an upgrade; bytes that came early belong to it."""
        self._to(_TUNNEL)
        ahead, at = self._read_ahead.take()
        if ahead:
            self.data_received(ahead[at:])
        self.resume_reading(READ_AHEAD)
        if self._half_closed_at and exchange.origin is not None:  # before the application had agreed
            exchange.origin.finish(None)

    @property
    def is_tunnel(self) -> bool:
        return self._state == _TUNNEL

    @property
    def has_half_closed(self) -> bool:
        return self._half_closed_at > 0

    @property
    def takes_nothing(self) -> bool:
        """The client stopped reading so much that the write buffer is full."""
        return self._stuck_since > 0

    def _next_request(self) -> None:
        """Looks at what has come behind the request that is over. Whoever does not read its answers is asked for no more: what they
        take is bounded by the write buffer's limit."""
        self._to(_AT_HEAD)
        if self._reading is not None and self._reading.reasons:
            self._reading.resume(PEER_SLOW | HELD)  # reasons of the exchange that is over
            if not self._stuck_since:
                self._reading.resume(UNREAD if self._read_ahead.size else UNREAD | READ_AHEAD)
        if self._stuck_since:
            self._to(_QUEUED)
            self.pause_reading(UNREAD)
        elif self._read_ahead.size:
            # Not at once: a long pipeline must neither recurse nor keep the loop from others.
            self._to(_QUEUED)
            asyncio.get_running_loop().call_soon(self._go_on, False)

    def _go_on(self, is_due: bool) -> None:
        """Takes up the request that was queued."""
        if self.transport is None or self._state != _QUEUED:
            return
        data, begin = self._read_ahead.take()
        self._to(_AT_HEAD)
        self._on_head(data, begin, is_due)
        if self._read_ahead.size <= _AHEAD_MAX_BYTES:
            self.resume_reading(READ_AHEAD)
        if self._half_closed_at and self._state == _AT_HEAD:  # half a request, whose other half will not come
            self._close()

    # ---- ends ----

    def _fail(self, status: int, body: bytes) -> None:
        """Tells the client that what follows cannot be understood, or does not come, and closes the connection."""
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            exchange = Http1Exchange(self)
            exchange.unread(self.handles.time())
        exchange.fail(status, body)
        self._linger()

    def _linger(self) -> None:
        """Ends our half, and closes a little later, reading meanwhile: data that comes into a closed socket would reset the answer
        away (RFC 9112, 9.6)."""
        self._to(_ENDING)
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
        if self._reading is not None:
            self._reading.clear()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._end_linger)

    def _end_linger(self) -> None:
        if self.transport is not None and self.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._end_linger)
        else:
            self._close()

    def _close(self) -> None:
        self._to(_ENDING)
        if self.transport is not None:
            self.transport.close()

    def _abort(self) -> None:
        """Aborts the connection of a client that has left; `connection_lost` cancels what runs for it."""
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self, reason: int) -> None:
        if self._reading is not None:
            self._reading.pause(reason)

    def resume_reading(self, reason: int) -> None:
        if self._reading is not None:
            self._reading.resume(reason)

    # ---- the sweeper ----

    def sweep(self, now: float) -> None:
        """Ends what has stood still for too long; the worker calls it about once a second."""
        settings, quiet = self.worker.settings, now - self.touched
        if self._stuck_since and now - self._stuck_since > settings.idle_seconds:
            self._abort()  # it reads nothing of what it asked for
        elif self._state == _AT_HEAD:
            if self._buffer and quiet > settings.head_seconds:
                self._fail(408, b"The request's head did not come in time")
            elif not self._buffer and quiet > settings.idle_seconds:
                self._close()
        elif self._half_closed_at and self._state != _ENDING:
            if now - max(self._half_closed_at, self.touched) > settings.half_close_seconds:
                self._abort()
        elif self._state == _IN_BODY and self.exchange is not None:
            self._sweep_body(self.exchange, now)

    def _sweep_body(self, exchange: Http1Exchange, now: float) -> None:
        """Fails a request whose body is late. A client that is not read at the moment cannot be late."""
        if exchange.origin is None or exchange.body is None:
            return
        settings = self.worker.settings
        is_paused = self._reading is not None and self._reading.is_paused
        late = exchange.body.check(now, is_paused, settings.body_seconds, settings.body_bytes_per_second)
        if late == STANDS_STILL:
            self._fail(408, b"The request's body did not come in time")
        elif late == TOO_SLOW and not exchange.response_started:
            self._fail(408, b"The request's body comes too slowly")

    @property
    def is_quiet(self) -> bool:
        return self._state == _AT_HEAD and not self._buffer

    def begin_drain(self) -> None:
        """Has the answer under way, or the next, say that it is the last: `is_draining` tells each exchange."""

    def press_drain(self) -> None: ...

    def close_idle(self) -> None:
        self._close()


class Http1Exchange(Exchange):
    """A request of an HTTP/1.1 connection. It writes while it is the request under way, and never after: `_transport` sees to that."""

    __slots__ = ("block", "body", "connection", "frames", "is_raw", "keep", "origin_ended")

    def __init__(self, connection: Http1) -> None:
        super().__init__(connection.worker, connection.handles)
        self.connection = connection
        self.forwarding_fields = connection.forwarding_fields
        self.is_raw = True
        self.keep = True  # the connection is for further requests
        self.block = b""  # the head's fields, as they came
        self.body: RequestBody | None = None
        self.frames: FrameCounter | None = None
        self.origin_ended = False  # the tunnel's application has ended its half

    @property
    def _transport(self) -> asyncio.Transport | None:
        """Returns the client's transport while this is the exchange under way."""
        connection = self.connection
        return connection.transport if connection.exchange is self else None

    # ---- the request ----

    @property
    def joined(self) -> dict[str, Limiter]:
        return self.connection.joined

    @property
    def peer(self) -> str:
        return peer_of(self.connection.transport)

    def remember(self, admission: CachedAdmission) -> None:
        self.connection.heads.remember_block(self.block, admission)

    @property
    def request_complete(self) -> bool:
        return not self.connection.is_in_body

    @property
    def held_bytes(self) -> int:
        return self.connection.read_ahead_bytes

    def send_read_ahead(self) -> None:
        self.connection.send_read_ahead(self)

    def pause_reading(self, reason: int) -> None:
        if self.connection.exchange is self:
            self.connection.pause_reading(reason)

    def resume_reading(self, reason: int) -> None:
        if self.connection.exchange is self:
            self.connection.resume_reading(reason)

    def hold_back(self, delay: float) -> None:
        self.connection.throttle(delay)  # whose timer outlives the exchange

    # ---- the answer ----

    def send_interim(self, head: ResponseHead) -> None:
        """Passes on an interim response, but not to a client of HTTP/1.0, which does not know them (RFC 9110, 15.2)."""
        transport = self._transport
        if transport is not None and self.is_raw:
            transport.write(head.status_line + head.block + b"\r\n\r\n")

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self.sent = len(body)
        connection = self.connection
        is_usual = self.keep and self.is_raw and not self._timing and self._limiter is None and not connection.is_in_body
        if is_usual and not self.worker.is_draining:
            self._stop_waiting()
            self.response_started = True
            self.status = head.status
            if self.counters.access is not None:
                self.first_byte = connection.handles.time()
            block = head.block if head.is_dated else head.block + replies.date_line()
            transport = self._transport
            if transport is not None:
                transport.write(
                    b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n%b" % (head.status_line, self.request_id, block, connection.via, body)
                )
        else:
            self._head_out(head, body)
            self.throttle(len(body))
        self.response_done()

    def response_head(self, head: ResponseHead) -> None:
        self._head_out(head, b"")

    def _head_out(self, head: ResponseHead, body: bytes) -> None:
        self._stop_waiting()
        self.response_started = True
        self.status = head.status
        connection, is_draining = self.connection, self.worker.is_draining
        if head.framing == UNTIL_CLOSE or connection.is_in_body or is_draining or (head.framing == CHUNKED and not self.is_raw):
            self.keep = False
        extra = connection.via
        if not self.keep:
            extra += b"\r\nConnection: close"
        elif not self.is_raw:
            extra += b"\r\nConnection: keep-alive"  # RFC 9112, C.2.2: a client of HTTP/1.0 must be told
        if self._timing and self.worker.settings.server_timing:
            extra += b"\r\nServer-Timing: " + self._timing.encode("ascii")
        block = head.block
        if not self.is_raw and b"transfer-encoding" in head.names:  # RFC 9112, 6.1: never to HTTP/1.0
            block = b"".join(b"\r\n" + line for line in block.split(b"\r\n")[1:] if not line.lower().startswith(b"transfer-encoding:"))
        if not head.is_dated:
            block += replies.date_line()
        connection.touched = now = connection.handles.time()
        if self.counters.access is not None:
            self.first_byte = now
        transport = self._transport
        if transport is not None:
            transport.write(b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n%b" % (head.status_line, self.request_id, block, extra, body))

    def response_data(self, data: bytes) -> None:
        self.sent += len(data)
        if self._limiter is not None:
            self.throttle(len(data))
        connection = self.connection
        connection.touched = connection.handles.time()
        transport = self._transport
        if transport is not None:
            transport.write(data)
        if self.frames is not None:
            self.frames.feed(data)

    def response_done(self, trailers: Trailers | None = None) -> None:
        self.origin = None
        self.record()
        if self.connection.exchange is self:
            self.connection.exchange_over(self.keep)

    def cut_short(self) -> None:
        self.record("origin")
        if self.connection.exchange is self:
            self.connection.cut_short()

    def refuse(self, refusal: Refuse) -> None:
        """Answers in place of the application; the connection stays usable where the request's end is known."""
        self._stop_waiting()
        transport = self._transport
        if transport is None:
            return
        self.status = refusal.status
        self.reason = self.reason or refusal.why
        self.keep = self.keep and not self.connection.is_in_body and not self.worker.is_draining
        head_only = self.head is not None and self.head.method == b"HEAD"
        transport.write(replies.make(refusal, self.request_id, self.keep, head_only, int(self.is_raw)))
        self.response_done()

    def fail(self, status: int, body: bytes) -> None:
        """Ends a request that cannot be understood, or does not come whole; its connection has let go of it, and closes."""
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.cancel()
        elif self._task is not None:
            self._task.cancel()
        self._stop_waiting()
        self.status = status
        if self.connection.transport is not None and not self.response_started:
            self.connection.transport.write(replies.make(Refuse(status, body), self.request_id, False, False))
        self.reason = body.decode("latin-1")
        self.record("client")

    # ---- tunnels ----

    def switch(self, head: ResponseHead, data: bytes) -> None:
        """Passes on the application's 101, behind which `data` came, and begins the tunnel."""
        self._stop_waiting()
        self.response_started = True
        self.status = 101
        request = self.head
        assert request is not None and head.upgrade is not None
        extra = b"\r\nConnection: upgrade\r\nUpgrade: " + head.upgrade
        if request.subprotocol_auth and b"sec-websocket-protocol" not in head.names:
            extra += b"\r\nSec-WebSocket-Protocol: " + MARKER
        if self._timing and self.worker.settings.server_timing:
            extra += b"\r\nServer-Timing: " + self._timing.encode("ascii")
        extra += self.connection.via
        if head.upgrade.lower() == b"websocket":
            self.frames = FrameCounter()
        transport = self._transport
        if transport is None:
            return
        transport.write(b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n" % (head.status_line, self.request_id, extra, head.block))
        if data:
            self.response_data(data)
        self.connection.tunnel_begins(self)

    @property
    def server_frames(self) -> FrameCounter | None:
        return self.frames

    def tunnel_write(self, data: bytes) -> None:
        """Writes frames of ours. A client that asks for them and does not read them is read no further."""
        transport = self._transport
        if data and transport is not None:
            transport.write(data)
            if self.connection.takes_nothing:
                self.connection.pause_reading(UNREAD)

    def tunnel_half_closed(self) -> None:
        if self.frames is not None:
            self.frames.end()
        transport = self._transport
        if transport is None:
            return
        if transport.can_write_eof():
            transport.write_eof()
            self.origin_ended = True
            if self.connection.has_half_closed:
                self.both_halves_ended()
        else:
            self.connection.tunnel_over(politely=False)

    def both_halves_ended(self) -> None:
        """Ends the tunnel, because both sides have ended their halves, in whatever order."""
        self.record()
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.cancel()
        self.connection.tunnel_over(politely=False)

    def tunnel_over(self) -> None:
        self.origin = None
        self.record()
        if self.connection.exchange is self:
            self.connection.tunnel_over(politely=True)

    def cut(self) -> None:
        connection = self.connection
        if connection.exchange is not self or not connection.is_tunnel:
            self.origin_failed(failures.SUSPENDED)
            return
        self.origin = None
        self.record("origin")
        is_polite = self.frames is not None and self.frames.at_boundary
        if is_polite and connection.transport is not None:
            connection.transport.write(GOING_AWAY)
        connection.tunnel_over(politely=is_polite)
