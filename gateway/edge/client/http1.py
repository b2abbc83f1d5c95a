"""A client's HTTP/1.1 connection: requests in order, each admitted, forwarded and answered; tunnels after an upgrade."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from .. import failures
from ..policy import replies
from ..policy.admission import Refuse
from ..policy.head_cache import CachedAdmission, CachedRequest
from ..policy.limits import Limiter
from ..reading import HELD, PEER_SLOW, READ_AHEAD, UNREAD, ReadGate
from ..records.record import peer_of
from ..wire.http1_head import CHUNKED, FIXED, MARKER, NO_BODY, UNTIL_CLOSE, Malformed, ResponseHead, Trailers, parse_request
from ..wire.read_ahead import ReadAhead
from ..wire.request_body import STANDS_STILL, TOO_SLOW, RequestBody
from ..wire.websocket import GOING_AWAY, FrameCounter
from .context import Context
from .exchange import Exchange

_AT_HEAD: Final = 0  # the next request's head is awaited
_IN_BODY: Final = 1  # a request is under way, and its body has not come whole
_WAITING: Final = 2  # a request is under way, and has come whole
_TUNNEL: Final = 3
_ENDING: Final = 4
_QUEUED: Final = 5  # the next request may be here, and waits: for a turn of the loop or its session's, or for the client to read
# By state, the states that may follow it, as a set of bits.
_NEXT: Final = (
    1 << _QUEUED | 1 << _IN_BODY | 1 << _WAITING | 1 << _ENDING,  # at a head
    1 << _WAITING | 1 << _ENDING,  # in a body
    1 << _AT_HEAD | 1 << _TUNNEL | 1 << _ENDING,  # waiting
    1 << _ENDING,  # in a tunnel
    1 << _ENDING,  # ending: who lingers may close, and who closes is told when that is done
    1 << _AT_HEAD | 1 << _QUEUED | 1 << _ENDING,  # queued
)
_AHEAD_MAX_BYTES: Final = 64 << 10  # read beyond the request under way, or while it is held
_BUFFER_HIGH_BYTES: Final = 512 << 10
_LINGER_SECONDS = 1.0
_NONE: dict[str, Limiter] = {}  # shared: replaced before it is written to


class Http1(Exchange):
    __slots__ = (
        "_ahead", "_block", "_body", "_buffer", "_frames", "_half_closed_at", "_head_bytes", "_heads", "_joined", "_keep",
        "_origin_ended", "_reading", "_state", "_stuck_since", "_time", "_via", "is_raw", "touched", "transport",
    )  # fmt: skip

    def __init__(self, worker: Context) -> None:
        super().__init__(worker)
        self.transport: asyncio.Transport | None = None
        self.touched = worker.time()
        self.is_raw = True
        self._state = _AT_HEAD
        self._buffer = b""  # of a head that is not complete
        self._ahead = ReadAhead()
        self._head_bytes = worker.settings.head_bytes
        self._time, self._heads = worker.time, worker.heads
        self._reading: ReadGate | None = None
        self._half_closed_at = 0.0  # when the client ended its half; 0: it has not
        self._origin_ended = False  # the tunnel's application has ended its half
        self._stuck_since = 0.0  # when the client stopped reading so much that the write buffer is full; 0: it reads
        self._via = b""  # what we add to responses
        # the request under way
        self._joined: dict[str, Limiter] = _NONE
        self._keep = True
        self._block = b""
        self._body: RequestBody | None = None
        self._frames: FrameCounter | None = None

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._reading = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_HIGH_BYTES)
        hops = self.worker.hops
        if hops.is_on:
            self._via = hops.via_line(b"1.1")
            self.hop_fields = hops.of_connection(transport)
        self.worker.clients.add(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _AT_HEAD:
            self._on_head(data)
        elif state == _TUNNEL:
            self.touched = self._time()
            self.tunnel_in(data)
        elif state == _IN_BODY:
            self._on_body(data)
        elif state in (_WAITING, _QUEUED):
            self._keep_ahead(data)

    def close_notified(self) -> None:
        """TLS: the client sends nothing more, and may still read. What it asked for completely is answered, while it can be
        believed to be there: most clients that end their half have left. `sweep` gives it up after a while without a byte; on a
        parked stream, where none comes, that is now."""
        if self._half_closed_at:
            return
        self._half_closed_at = self._time()
        origin = self.origin
        if origin is not None and getattr(origin, "is_parked", False):
            self._give_up()
        elif self._state == _TUNNEL and origin is not None:
            origin.finish(None)
            if self._origin_ended:
                self._tunnel_over()
        elif self._state in (_AT_HEAD, _IN_BODY) and not self._ahead.size:
            self._close()

    def eof_received(self) -> bool:
        """TCP: the client is gone, or has closed its half. Nothing is begun for it any more; what runs is answered."""
        if (self.origin is None and self._state != _QUEUED) or self._state == _IN_BODY:
            return False
        self.close_notified()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.clients.discard(self)
        self.transport = self._reading = None
        if not self.counted:  # the client left in the middle
            self.status = self.status if self.response_started else 499
            self.record("client")
        self._to(_ENDING)
        self.leave()
        for limiter in self._joined.values():
            limiter.leave()

    def pause_writing(self) -> None:
        self._stuck_since = self._time()
        if self.origin is not None:
            self.origin.pause(PEER_SLOW)

    def resume_writing(self) -> None:
        self._stuck_since = 0.0
        if self.origin is not None:
            self.origin.resume(PEER_SLOW)
        if self._reading is not None and self._reading.reasons & UNREAD:
            if self._state == _QUEUED:
                self._next_request()
            else:
                self.resume_reading(UNREAD)

    def _to(self, state: int) -> None:
        """The connection's next state: nothing else sets it."""
        assert _NEXT[self._state] >> state & 1, (self._state, state)
        self._state = state

    # ---- the head ----

    def _on_head(self, data: bytes, begin: int = 0, is_due: bool = False) -> None:
        """The head of a request begins in `data` at `begin`, or before, in what came of it until now."""
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
        self.touched = now = self._time()
        raw = data[begin:end] if begin else data[:end]
        again = self._heads.heads.get(raw)
        if again is not None:
            if not is_due and not worker.fairness.admit(again.admission.account, now):
                self._defer(again, data, begin)
                return
            if self._try_cached(again, data, end, now):
                return
            is_due = True
        at = raw.find(b"\r\n")
        line, block = (raw, b"") if at < 0 else (raw[:at], raw[at:])
        again = self._heads.of_parts(line, block)
        if again is not None:
            if not is_due and not worker.fairness.admit(again.admission.account, now):
                self._defer(again, data, begin)
                return
            if self._try_cached(again, data, end, now):
                if not again.is_new:
                    self._heads.heads.put(raw, again)
                return
        self._parsed(line, block, data, end, now)

    def _try_cached(self, again: CachedRequest, data: bytes, end: int, now: float) -> bool:
        """Forwards a request that was seen before; its head ends at `end`."""
        if not self.try_cached(again, now):
            return False
        self._to(_WAITING)
        self._keep = again.admission.keep_alive
        self.is_raw = True
        if len(data) > end + 4:
            self._ahead.keep(data, end + 4)
        return True

    def _defer(self, again: CachedRequest, data: bytes, begin: int) -> None:
        self._to(_QUEUED)
        self._ahead.keep(data, begin)
        self.worker.fairness.defer(again.admission.account, self._due)

    def _due(self) -> None:
        """The turn has come of a head that had to wait for it."""
        self._go_on(True)

    def _incomplete(self, data: bytes) -> None:
        if len(data) > self._head_bytes:
            self._buffer = b""
            self._fail(431, b"Request header fields too large")
            return
        if not self._buffer:
            self.touched = self._time()
        self._buffer = data

    def _parsed(self, line: bytes, block: bytes, data: bytes, end: int, now: float) -> None:
        try:
            head = parse_request(line, block, self.worker.settings.head_fields)
        except Malformed as error:
            self._fail(error.status, str(error).encode())
            return
        self._keep = head.keep_alive
        self.is_raw = head.minor == 1
        self._body = (
            None if head.framing == NO_BODY or (head.framing == FIXED and not head.length) else RequestBody(head.framing, head.length, now)
        )
        self._to(_WAITING if self._body is None else _IN_BODY)
        self._ahead.keep(data, end + 4)
        self._block = block
        self.decide(head, now)

    @property
    def joined(self) -> dict[str, Limiter]:
        if self._joined is _NONE:
            self._joined = {}
        return self._joined

    @property
    def peer(self) -> str:
        return peer_of(self.transport)

    def remember(self, admission: CachedAdmission) -> None:
        self._heads.remember_block(self._block, admission)

    # ---- the body ----

    @property
    def request_complete(self) -> bool:
        return self._state != _IN_BODY

    @property
    def held_bytes(self) -> int:
        return self._ahead.size

    def _keep_ahead(self, data: bytes) -> None:
        self._ahead.append(data)
        if self.held_for is not None and not self.worker.holds.grow(self.held_for, len(data)):
            self.held_too_much(self.held_for)
        elif self._ahead.size > _AHEAD_MAX_BYTES:
            self.pause_reading(READ_AHEAD)

    def send_ahead(self) -> None:
        if self._state == _IN_BODY:
            data, at = self._ahead.take()
            if data:
                self._on_body(data[at:])
            self.resume_reading(READ_AHEAD)

    def _on_body(self, data: bytes) -> None:
        """Body bytes: on to the origin, or kept, within a bound, until there is one."""
        self.touched = now = self.account.last = self._time()
        origin, body = self.origin, self._body
        if origin is None or body is None:
            self._keep_ahead(data)
            return
        try:
            used, content = body.take(data, origin.takes_raw, now)
        except Malformed as error:
            self._fail(error.status, str(error).encode())
            return
        self.account.count += 1
        if self._limiter is not None:
            self.throttle(used)
        is_complete = body.is_complete
        if is_complete:
            self._to(_WAITING)
            self._ahead.keep(data, used)
        if content:
            origin.send(content)
        if is_complete:
            origin.finish(body.trailers)

    # ---- the answer ----

    def send_interim(self, head: ResponseHead) -> None:
        """Clients of HTTP/1.0 do not know them."""
        if self.transport is not None and self.is_raw:
            self.transport.write(head.status_line + head.block + b"\r\n\r\n")

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        self.sent = len(body)
        worker = self.worker
        if self._keep and self._state == _WAITING and self.is_raw and not worker.is_draining and not self._timing:
            # The usual case, said once more without its questions.
            self._answered()
            self.response_started = True
            self.status = head.status
            if self.ledger.access is not None:
                self.first_byte = self._time()
            block = head.block if head.is_dated else head.block + replies.date_line()
            if self.transport is not None:
                self.transport.write(
                    b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n%b" % (head.status_line, self.request_id, block, self._via, body)
                )
        else:
            self._head_out(head, body)
        self.response_done()

    def response_head(self, head: ResponseHead) -> None:
        self._head_out(head, b"")

    def _head_out(self, head: ResponseHead, body: bytes) -> None:
        self._answered()
        self.response_started = True
        self.status = head.status
        worker = self.worker
        if head.framing == UNTIL_CLOSE or self._state == _IN_BODY or worker.is_draining or (head.framing == CHUNKED and not self.is_raw):
            self._keep = False
        extra = self._via
        if not self._keep:
            extra += b"\r\nConnection: close"
        elif not self.is_raw:
            extra += b"\r\nConnection: keep-alive"  # RFC 9112, C.2.2: a client of HTTP/1.0 must be told
        if self._timing and worker.settings.server_timing:
            extra += b"\r\nServer-Timing: " + self._timing.encode("ascii")
        block = head.block
        if not self.is_raw and b"transfer-encoding" in head.names:  # RFC 9112, 6.1: never to HTTP/1.0
            block = b"".join(b"\r\n" + line for line in block.split(b"\r\n")[1:] if not line.lower().startswith(b"transfer-encoding:"))
        if not head.is_dated:
            block += replies.date_line()
        self.touched = now = self._time()
        if self.ledger.access is not None:
            self.first_byte = now
        if self.transport is not None:
            self.transport.write(b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n%b" % (head.status_line, self.request_id, block, extra, body))

    @property
    def is_paused(self) -> bool:
        """The client is not read at the moment, so it cannot be late."""
        return self._reading is not None and self._reading.is_paused

    def response_data(self, data: bytes) -> None:
        self.sent += len(data)
        if self._limiter is not None:
            self.throttle(len(data))
        self.touched = self._time()
        if self.transport is not None:
            self.transport.write(data)
        if self._frames is not None:
            self._frames.feed(data)

    def response_done(self, trailers: Trailers | None = None) -> None:
        """The response is complete. An upload that still runs ends with it: its rest has no reader."""
        self.origin = None
        self.record()
        if self._state == _IN_BODY:
            self._linger()
        elif not self._keep or (self._half_closed_at and not self._ahead.size):
            if self._ahead.size:  # more is on its way, perhaps, and nobody reads it
                self._linger()
            else:
                self._close()
        else:
            self._next_request()

    def _next_request(self) -> None:
        """Looks at what has come behind the request that is over. Whoever does not read its answers is asked for no more: what they
        take is bounded by the write buffer's limit."""
        self._to(_AT_HEAD)
        if self._reading is not None and self._reading.reasons:
            self._reading.resume(PEER_SLOW | HELD)  # reasons of the exchange that is over
            if not self._stuck_since:
                self._reading.resume(UNREAD if self._ahead.size else UNREAD | READ_AHEAD)
        if self._stuck_since:
            self._to(_QUEUED)
            self.pause_reading(UNREAD)
        elif self._ahead.size:
            # Not at once: a long pipeline must neither recurse nor keep the loop from others.
            self._to(_QUEUED)
            asyncio.get_running_loop().call_soon(self._go_on, False)

    def _go_on(self, is_due: bool) -> None:
        """Takes up the request that was queued."""
        if self.transport is None or self._state != _QUEUED:
            return
        data, begin = self._ahead.take()
        self._to(_AT_HEAD)
        self._on_head(data, begin, is_due)
        if self._ahead.size <= _AHEAD_MAX_BYTES:
            self.resume_reading(READ_AHEAD)
        if self._half_closed_at and self._state == _AT_HEAD:  # half a request, whose other half will not come
            self._close()

    def cut_short(self) -> None:
        self.record("origin")
        self._to(_ENDING)
        if self.transport is not None:
            self.transport.abort()

    # ---- tunnels ----

    def switch(self, head: ResponseHead, data: bytes) -> None:
        """Bytes that came early belong to the tunnel."""
        self._answered()
        self.response_started = True
        self.status = 101
        request = self.head
        assert request is not None and head.upgrade is not None
        extra = b"\r\nConnection: upgrade\r\nUpgrade: " + head.upgrade
        if request.subprotocol_auth and b"sec-websocket-protocol" not in head.names:
            extra += b"\r\nSec-WebSocket-Protocol: " + MARKER
        if self._timing and self.worker.settings.server_timing:
            extra += b"\r\nServer-Timing: " + self._timing.encode("ascii")
        extra += self._via
        if head.upgrade.lower() == b"websocket":
            self._frames = FrameCounter()
        if self.transport is not None:
            self.transport.write(b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n" % (head.status_line, self.request_id, extra, head.block))
        if data:
            self.response_data(data)
        self._to(_TUNNEL)
        ahead, at = self._ahead.take()
        if ahead:
            self.data_received(ahead[at:])
        self.resume_reading(READ_AHEAD)
        if self._half_closed_at and self.origin is not None:  # before the application had agreed
            self.origin.finish(None)

    @property
    def server_frames(self) -> FrameCounter | None:
        return self._frames

    def tunnel_write(self, data: bytes) -> None:
        """Whoever asks for frames of ours and does not read them is not asked for more."""
        if data and self.transport is not None:
            self.transport.write(data)
            if self._stuck_since:
                self.pause_reading(UNREAD)

    def tunnel_half_closed(self) -> None:
        if self._frames is not None:
            self._frames.end()
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
            self._origin_ended = True
            if self._half_closed_at:
                self._tunnel_over()
        else:
            self._close()

    def _tunnel_over(self) -> None:
        """Both sides have ended their halves, in whatever order."""
        self.record()
        self._close()

    def response_over(self) -> None:
        self.origin = None
        self.record()
        self._linger()

    def cut(self) -> None:
        if self._state != _TUNNEL:
            self.origin_failed(failures.SUSPENDED)
            return
        self.origin = None
        self.record("origin")
        if self._frames is not None and self._frames.at_boundary and self.transport is not None:
            self.transport.write(GOING_AWAY)
            self._linger()
        else:
            self._close()

    # ---- answers of our own, and ends ----

    def refuse(self, refusal: Refuse) -> None:
        """The connection stays usable where the request's end is known."""
        self._answered()
        if self.transport is None:
            return
        self.status = refusal.status
        self.reason = self.reason or refusal.why
        in_body = self._state == _IN_BODY
        self._keep = self._keep and not in_body and not self.worker.is_draining
        head_only = self.head is not None and self.head.method == b"HEAD"
        self.transport.write(replies.make(refusal, self.request_id, self._keep, head_only, int(self.is_raw)))
        self.response_done()

    def _fail(self, status: int, body: bytes) -> None:
        """What follows cannot be understood: say so, and close."""
        if self._state == _AT_HEAD:
            self.unread(self._time())
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.abandon()
        elif self._task is not None:
            self._task.cancel()
        self._answered()
        self.status = status
        if self.transport is not None and not self.response_started:
            self.transport.write(replies.make(Refuse(status, body), self.request_id, False, False))
        self.reason = body.decode("latin-1")
        self.record("client")
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

    def _give_up(self) -> None:
        """The client has left: `connection_lost` ends what runs for it."""
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
        """Called about once a second."""
        settings, quiet = self.worker.settings, now - self.touched
        if self._stuck_since and now - self._stuck_since > settings.idle_seconds:
            self._give_up()  # it reads nothing of what it asked for
        elif self._state == _AT_HEAD:
            if self._buffer and quiet > settings.head_seconds:
                self._fail(408, b"The request's head did not come in time")
            elif not self._buffer and quiet > settings.idle_seconds:
                self._close()
        elif self._half_closed_at and self._state != _ENDING:
            if now - max(self._half_closed_at, self.touched) > settings.half_close_seconds:
                self._give_up()
        elif self._state == _IN_BODY and self.origin is not None and self._body is not None:
            late = self._body.check(now, self.is_paused, settings.body_seconds, settings.body_bytes_per_second)
            if late == STANDS_STILL:
                self._fail(408, b"The request's body did not come in time")
            elif late == TOO_SLOW and not self.response_started:
                self._fail(408, b"The request's body comes too slowly")

    @property
    def is_quiet(self) -> bool:
        return self._state == _AT_HEAD and not self._buffer

    def begin_drain(self) -> None:
        """The answer under way, or the next, says that it is the last."""

    def press_drain(self) -> None: ...

    def close_idle(self) -> None:
        self._close()
