"""A connection of HTTP/1.1 to an application: it carries one exchange at a time, and its responses back to a client."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final, cast

from .. import failures
from ..failures import Failure
from ..policy.head_cache import Cache, CachedResponse
from ..policy.keys import Key
from ..reading import HELD, PEER_SLOW, ReadGate
from ..sides import HELD_BYTES, ClientSide, OriginContext, Owner
from ..wire.chunked import ChunkedBody, encode_end
from ..wire.http1_head import CHUNKED, FIXED, NO_BODY, Malformed, RequestHead, ResponseHead, Trailers, find_end, parse_response
from .dial import unacknowledged

_IDLE: Final = 0  # no exchange: the connection is new, or waits in its pool
_AT_HEAD: Final = 1  # a request is under way, and its response's final head is awaited
_IN_FIXED: Final = 2  # in content that Content-Length delimits
_IN_CHUNKED: Final = 3
_TO_CLOSE: Final = 4  # in content that the connection's end delimits
_TUNNEL: Final = 5
_ENDED: Final = 6  # the connection carries nothing any more, and is closed or about to be
# By state, the states that may follow it, as a set of bits. Bytes, because mypyc makes a new tuple of a tuple of
# numbers each time that it is indexed.
_NEXT: Final = bytes(
    (
        1 << _AT_HEAD | 1 << _ENDED,  # idle
        1 << _IDLE | 1 << _IN_FIXED | 1 << _IN_CHUNKED | 1 << _TO_CLOSE | 1 << _TUNNEL | 1 << _ENDED,  # at a head
        1 << _IDLE | 1 << _ENDED,  # in content of a known length
        1 << _IDLE | 1 << _ENDED,  # in chunks
        1 << _ENDED,  # in content that ends with the connection
        1 << _ENDED,  # in a tunnel
        1 << _ENDED,  # ended: whoever closes it is told of that by connection_lost
    )
)
_MEMO_HEAD_MAX_BYTES: Final = 2048
_PROVEN_SECONDS: Final = 1.0  # idle for less, a connection is still open at its application, where that has not said how long it keeps it
BUFFER_HIGH_BYTES: Final = 512 << 10


class Origin:
    """The connection. `exchange` is there from a request's head to the end of its response, and in no other state."""

    __slots__ = (
        "_asks_upgrade", "_body", "_buffer", "_context", "_encodes", "_held", "_in_chunks", "_owner", "_remaining", "_responses",
        "_sent_early", "_state", "exchange", "has_answered", "idle_since", "is_head", "is_parked", "is_paused", "is_secure", "must_close",
        "proven_seconds", "reading", "reuse_seconds", "spoke_first", "transport",
    )  # fmt: skip

    takes_raw = True
    is_shared = False  # by several exchanges at a time

    def __init__(self, context: OriginContext, owner: Owner, is_secure: bool) -> None:
        self._context = context
        self._responses: Cache[bytes, CachedResponse] = context.responses
        self._owner = owner
        self.is_secure = is_secure
        self.transport: asyncio.Transport | None = None
        self.exchange: ClientSide | None = None
        self.idle_since = 0.0
        self.is_head = False  # the request's method is HEAD
        self.reading: ReadGate | None = None  # as long as there is a transport
        self.is_paused = False  # its write buffer is full
        self.is_parked = False  # its session sleeps; what is sent meanwhile is held
        self._held: list[bytes] = []
        self.must_close = False  # the response under way is the last
        self.has_answered = False  # the application has answered on this connection: it speaks HTTP
        self.spoke_first = False  # something came while there was no request
        self.reuse_seconds = context.settings.origin_idle_seconds  # idle for longer, it is not used again
        self.proven_seconds = _PROVEN_SECONDS  # origin/pool.py
        self._state = _IDLE
        self._remaining = 0
        self._buffer = b""
        self._body: ChunkedBody | None = None
        self._in_chunks = False  # the request's body goes on in chunks
        self._encodes = False  # which it did not come in
        self._asks_upgrade = False
        self._sent_early = False  # something was to be sent on an upgrade that had not been answered

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.reading = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=BUFFER_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        exchange, state = self.exchange, self._state
        if exchange is None:
            if state == _IDLE:
                self.spoke_first = True
                self.close()
            return
        if state == _AT_HEAD:
            self._head(exchange, data)
            return
        if state != _TUNNEL or exchange.tunnel_out(data):
            account = exchange.account
            account.count += 1
            account.last = self._context.time()
        if state == _IN_FIXED:
            self._fixed(exchange, data)
        elif state == _IN_CHUNKED:
            self._chunked(exchange, data)
        else:
            exchange.response_data(data)

    def eof_received(self) -> bool:
        if self._state == _TUNNEL and self.exchange is not None:
            self.exchange.tunnel_half_closed()
            return True
        if self._state == _IDLE:
            self._closed_while_idle()
        return False

    def _closed_while_idle(self) -> None:
        """The application closed a connection that waited: where it did so sooner than was to be expected, it may do so again."""
        if self.has_answered and not self.is_closing and self._context.time() - self.idle_since < self.proven_seconds:
            self._owner.closes_early = True

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and self._state == _IDLE:
            self._closed_while_idle()
        if error is not None and self.exchange is not None and not self.is_secure:
            self._read_unread()
        self.transport = self.reading = None
        if self.is_parked:
            self._context.forget_parked(self)
        self._owner.forget(self, self._context.time())
        state, exchange = self._state, self._let_go()
        if exchange is None:
            return
        if state == _TO_CLOSE and error is None:
            exchange.response_done()
        elif state == _TUNNEL:
            exchange.cut()
        elif state != _AT_HEAD:
            exchange.origin_failed(failures.CONTENT_CUT_SHORT)
        elif self._buffer:
            exchange.origin_failed(failures.HEAD_CUT_SHORT)
        else:
            exchange.origin_failed(self._unanswered())

    def _read_unread(self) -> None:
        """A write has met the connection's end, and the transport reads no more. Who answers a request before it has all of it, and
        closes, has its answer in front of that end (RFC 9112, 9.5)."""
        assert self.transport is not None and self.reading is not None
        try:
            with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as own:
                while self.exchange is not None and not self.reading.reasons:
                    data = own.recv(BUFFER_HIGH_BYTES, socket.MSG_DONTWAIT)
                    if not data:
                        return
                    self.data_received(data)
        except OSError:
            pass  # there is nothing more

    def pause_writing(self) -> None:
        self.is_paused = True
        if self.exchange is not None:
            self.exchange.pause_reading(PEER_SLOW)

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.exchange is not None:
            self.exchange.resume_reading(PEER_SLOW)

    def _to(self, state: int) -> None:
        """Sets the connection's state, and alone does so; the table says which one may follow."""
        assert _NEXT[self._state] >> state & 1, (self._state, state)
        self._state = state

    def _let_go(self) -> ClientSide | None:
        """Ends the connection and returns the exchange that was on it: the caller tells that exchange, or knows that it is over."""
        self._to(_ENDED)
        exchange, self.exchange = self.exchange, None
        return exchange

    def _unanswered(self) -> Failure:
        if self.spoke_first:
            return failures.SPOKE_FIRST
        return failures.STALE_FAILURE if self.has_answered else failures.UNANSWERED_FAILURE

    # ---- used by the exchange ----

    @property
    def key(self) -> Key:
        return self._owner.key

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come on it that the loop has not seen yet, an end above all."""
        assert self.transport is not None
        try:
            with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as own:
                own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def begin(self, exchange: ClientSide, is_head: bool) -> None:
        """Begins an exchange without a request body; the caller writes the request's head."""
        self._to(_AT_HEAD)
        self.exchange = exchange
        self.is_head = is_head
        self._buffer = b""

    def open(self, exchange: ClientSide, head: RequestHead) -> None:
        if self.transport is None or self.transport.is_closing():  # since it was taken out of the pool
            exchange.origin_failed(self._unanswered())
            return
        self.begin(exchange, head.method == b"HEAD")
        self._asks_upgrade = head.upgrade is not None
        self._in_chunks = head.framing == CHUNKED
        self._encodes = self._in_chunks and not exchange.is_raw
        self.transport.write(
            b"%b %b HTTP/1.1%b\r\nx-amzn-requestid: %b%b\r\n\r\n"
            % (head.method, head.target, head.block, exchange.request_id, exchange.forwarding_fields)
        )

    def give_back(self) -> None:
        """Returns to the pool that it was taken out of: the request that it was for has not used it."""
        if self.is_closing:
            return
        if self.is_reusable:
            self._owner.release(self, self._context.time())
        else:
            self.close()

    @property
    def stream_count(self) -> int:
        return int(self.exchange is not None)

    def parkable(self, one_way: bool) -> int:
        """Returns 1 for a tunnel, or a request whose client can go on with it; `one_way`: for any exchange."""
        exchange = self.exchange
        return int(exchange is not None and (one_way or self._state == _TUNNEL or not exchange.request_complete))

    def is_silent(self, one_way: bool) -> bool:
        exchange, transport = self.exchange, self.transport
        if exchange is None or transport is None or transport.is_closing() or self.is_paused or self._state == _AT_HEAD:
            return False
        if transport.get_write_buffer_size() or unacknowledged(transport):
            return False
        return exchange.response_started and (self._state == _TUNNEL or exchange.request_complete)

    def park(self, one_way: bool) -> None:
        self.is_parked = True
        if self.exchange is not None:
            self.exchange.parked()

    def move(self, owner: Owner) -> None:
        """Makes `owner`, a pool of the session's next incarnation, its owner."""
        self._owner = owner

    def unpark(self) -> None:
        """Sends what was held to the application, because the session runs again."""
        self.is_parked = False
        held, self._held = self._held, []
        if held:
            self.send(b"".join(held))
        if self.exchange is not None:
            self.exchange.resume_reading(HELD)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        if sum(map(len, self._held)) > HELD_BYTES and self.exchange is not None:
            self.exchange.pause_reading(HELD)
        self._context.wake(self)

    def send(self, data: bytes) -> None:
        if self.is_parked:
            self._hold(data)
        elif self._asks_upgrade and self._state == _AT_HEAD:
            self._sent_early = True  # what is no tunnel yet would be read as the next request (RFC 9110, 7.8)
        elif self.transport is not None:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._encodes else data)

    def finish(self, trailers: Trailers | None) -> None:
        if self.is_parked:  # the client has ended its half: it left, and wakes nobody for that
            exchange = self._let_go()
            self.close()
            if exchange is not None:
                exchange.tunnel_over()
        elif self._state == _TUNNEL:
            if self.transport is not None and self.transport.can_write_eof():
                self.transport.write_eof()
        elif self._in_chunks and self.transport is not None:
            self.transport.write(encode_end(trailers))

    def pause(self, reason: int) -> None:
        if self.reading is not None:
            self.reading.pause(reason)

    def resume(self, reason: int) -> None:
        if self.reading is not None:
            self.reading.resume(reason)

    @property
    def is_reusable(self) -> bool:
        """Whether the connection is in the state of a new one; the pool takes back no other."""
        return self._state == _IDLE and not self.is_paused and not self.must_close and self.reading is not None and not self.reading.reasons

    def cancel(self) -> None:
        self._let_go()
        if self.transport is not None and self.is_parked:
            self.transport.close()  # whose FIN is sent again until the guest runs; a reset would be lost
        elif self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Closes a connection that has no exchange."""
        self._to(_ENDED)
        if self.transport is not None:
            self.transport.close()

    def cut(self) -> None:
        """Ends the connection because its incarnation ends; the exchange on it, if any, fails."""
        exchange = self._let_go()
        if self.transport is not None:
            self.transport.abort()
        if exchange is not None:
            exchange.cut()

    # ---- the response ----

    def _head(self, exchange: ClientSide, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            rest = data.find(b"\r\n\r\n") + 4
            cached = self._responses.get(data[: rest - 4]) if rest > 4 and not self.is_head else None
            if cached is not None:
                head = cached.head
            else:
                end, rest = find_end(data)
                settings = self._context.settings
                try:
                    if (end if end >= 0 else len(data)) > settings.head_bytes:
                        raise Malformed(f"response has a head of more than {settings.head_bytes} bytes (edge.head_bytes)", 502)
                    if end < 0 and data[:5] == b"HTTP/"[: len(data)]:
                        self._buffer = data
                        return
                    head = self._parse(data if end < 0 else data[:end])
                except Malformed as error:
                    not_http = not self.has_answered and not self.is_secure and not data.startswith(b"HTTP/")
                    self._refuse(exchange, failures.NOT_HTTP_FAILURE if not_http else Failure(failures.INVALID, str(error)))
                    return
            data = data[rest:]
            if head.status >= 200 or head.status == 101:
                break
            try:
                exchange.interim(head)
            except Malformed as error:
                self._refuse(exchange, Failure(failures.INVALID, str(error)))
                return
            if not data:
                return
        self.has_answered = True
        self._final(exchange, head, data)

    def _parse(self, raw: bytes) -> ResponseHead:
        head = parse_response(raw, self._context.settings.head_fields, self.is_head)
        if not self.is_head and head.status >= 200 and len(raw) <= _MEMO_HEAD_MAX_BYTES:
            self._responses.put(raw, CachedResponse(head))
        return head

    def _refuse(self, exchange: ClientSide, failure: Failure) -> None:
        """Aborts the connection because of what the application has sent on it, and fails the exchange."""
        self._let_go()
        exchange.origin_failed(failure)
        if self.transport is not None:
            self.transport.abort()

    def _final(self, exchange: ClientSide, head: ResponseHead, data: bytes) -> None:
        if head.status == 101:
            self._switch(exchange, head, data)
            return
        self.must_close = self._sent_early or not head.keep_alive
        if head.idle_seconds >= 0:
            self.keep_alive(head.idle_seconds)
        framing = head.framing
        if framing == FIXED and len(data) == head.length:  # the usual answer: all of it came in one read
            self._complete(exchange, head, data)
        elif framing == NO_BODY:
            self.must_close = self.must_close or bool(data)
            self._complete(exchange, head, b"")
        elif framing == FIXED:
            self._to(_IN_FIXED)
            self._remaining = head.length
            exchange.response_head(head)
            self._fixed(exchange, data)
        elif framing == CHUNKED:
            self._to(_IN_CHUNKED)
            self._body = ChunkedBody()
            exchange.response_head(head)
            if data:
                self._chunked(exchange, data)
        else:
            self._to(_TO_CLOSE)
            exchange.response_head(head)
            if data:
                exchange.response_data(data)

    def keep_alive(self, seconds: float) -> None:
        """Notes that the application keeps an idle connection for so long."""
        self.proven_seconds = max(0.0, seconds - 1)
        self.reuse_seconds = min(self.proven_seconds, self._context.settings.origin_idle_seconds)

    def _switch(self, exchange: ClientSide, head: ResponseHead, data: bytes) -> None:
        asked = exchange.head.upgrade if exchange.head is not None else None
        if asked is None or head.upgrade is None or head.upgrade.lower() != asked:
            self._refuse(exchange, failures.UNASKED_UPGRADE)
            return
        self._to(_TUNNEL)
        self._encodes = False
        exchange.switch(head, data)

    def _fixed(self, exchange: ClientSide, data: bytes) -> None:
        extra = len(data) - self._remaining
        if extra > 0:
            data = data[: self._remaining]
            self.must_close = True
        self._remaining -= len(data)
        if data:
            exchange.response_data(data)
        if not self._remaining:
            self._complete(exchange)

    def _chunked(self, exchange: ClientSide, data: bytes) -> None:
        body = self._body
        assert body is not None
        content: list[bytes] = []
        try:
            used = body.feed(data, content, exchange.is_raw)
        except Malformed as error:
            self._refuse(exchange, Failure(failures.INVALID, str(error)))
            return
        if body.is_complete and exchange.is_raw:
            content.append(encode_end(body.trailers))
        if content:
            exchange.response_data(content[0] if len(content) == 1 else b"".join(content))
        if body.is_complete:
            self.must_close = self.must_close or used < len(data)
            self._body = None
            self._complete(exchange, trailers=body.trailers)

    def _complete(
        self, exchange: ClientSide, head: ResponseHead | None = None, body: bytes = b"", trailers: Trailers | None = None
    ) -> None:
        """Ends the exchange, because the response is complete; `head` is there when all of it came at once. A connection on which a
        request's body is still under way cannot be used again: its rest would be read as the next request."""
        if self.exchange is not exchange:  # cut short meanwhile
            return
        self.exchange = None
        self._to(_IDLE)
        reusable = not self.must_close and exchange.request_complete
        if head is not None:
            exchange.response_whole(head, body)
        else:
            exchange.response_done(trailers)
        if self.reading is not None:
            self.reading.clear()  # its client's slowness was the exchange's
        if reusable and self._state == _IDLE and not self.is_paused:
            self._owner.release(self, self._context.time())
        else:
            self.close()
