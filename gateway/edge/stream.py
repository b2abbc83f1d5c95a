"""A stream of a client's HTTP/2 connection: one exchange, and its flow control."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import failures, head2, replies
from . import frames as f
from .admission import Refuse
from .exchange import Exchange, peer_of
from .failures import Failure
from .flow import FLOW_SLOTS, Flow
from .frames import Code, StreamBroken
from .head import MARKER, ResponseHead, Trailers, split_block
from .memo import Admitted, Repeated
from .reading import PEER_SLOW, READ_AHEAD
from .record import HTTP2
from .websocket import GOING_AWAY, FrameCounter, accept_of

if TYPE_CHECKING:
    from .http2 import Http2
    from .limits import Limiter

_REQUEST_ID = b"\0\x10x-amzn-requestid\x24"  # a literal without indexing; a value of 36 bytes follows
Key = tuple[f.Field, ...]


class Request(Exchange, Flow):
    """One stream."""

    __slots__ = ("_ahead", "_trailers", "expected", "frames", "key", "connection", *FLOW_SLOTS)

    protocol = HTTP2
    is_raw = False

    def __init__(self, connection: Http2, number: int, now: float) -> None:
        super().__init__(connection.worker)
        self.counted = False
        self.began = now
        self.connection = connection
        self.open_flow(number, connection.initial_window, now)
        self._ahead: list[bytes] = []  # body that was read while there is no origin
        self._trailers: Trailers | None = None  # which may come before there is an origin
        self.expected = -1  # bytes of the body that are still to come by Content-Length
        self.frames: FrameCounter | None = None
        self.key: Key = ()

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
        self.worker.streams.put(self.key, Repeated(memo, rewritten, head.method == b"HEAD"))

    def body(self, data: bytes, end: bool) -> None:
        """DATA of the client. Raises StreamBroken where it is not what Content-Length says."""
        if self.expected >= 0:
            self.expected -= len(data)
            if self.expected < 0 or (end and self.expected):
                raise StreamBroken(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        if self.frames is not None and self.origin is not None:
            if data:
                self.tunnel_in(data)
            if end:
                self.origin.finish(None)
            return
        account = self.account
        account.count += 1
        account.spoken += self.response_started  # a stream that goes on both ways, not a request's body
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
        if self.expected > 0:
            raise StreamBroken(self.number, Code.PROTOCOL_ERROR, "not the length that was said")
        self._trailers = trailers
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
            origin.finish(self._trailers)
        else:
            self.resume_reading(READ_AHEAD)

    def pause_reading(self, reason: int) -> None:
        self.paused |= reason

    def resume_reading(self, reason: int) -> None:
        self.paused &= ~reason
        if not self.paused and self.number in self.connection.streams:
            self.connection.credit(self)

    # ---- the answer ----

    def _fields(self, head: ResponseHead) -> bytes:
        block = head2.response_block(head) + _REQUEST_ID + self.request_id
        if not head.is_dated:
            block += f.encode([(b"date", replies.date())])
        if self._timing and self.worker.settings.server_timing:
            block += f.encode([(b"server-timing", self._timing.encode("ascii"))])
        return block

    def send_interim(self, head: ResponseHead) -> None:
        if self.number in self.connection.streams:
            self.connection.put(f.headers(self.number, head2.response_block(head), False))

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        connection, size = self.connection, len(body)
        if size > min(self.send_window, connection.send_window, connection.frame_bytes) or connection.write_paused:
            self.response_head(head)
            self.response_done(body=body)
            return
        self._answered()
        self.response_started = True
        self.status = head.status
        self.sent = size
        if self.worker.ledger.access is not None:
            self.first_byte = self.worker.time()
        self.origin = None
        if self.number not in connection.streams:
            return
        connection.send_window -= size
        self.send_window -= size
        data = f.frame(f.DATA, f.END_STREAM, self.number, body) if size else b""
        connection.put(f.headers(self.number, self._fields(head), not size) + data)
        connection.sent_end(self)

    def response_head(self, head: ResponseHead) -> None:
        self._answered()
        self.response_started = True
        self.status = head.status
        if self.worker.ledger.access is not None:
            self.first_byte = self.worker.time()
        if self.number in self.connection.streams:
            self.connection.put(f.headers(self.number, self._fields(head), False))

    def response_data(self, data: bytes) -> None:
        self.sent += len(data)
        if self._limiter is not None:
            self.throttle(len(data))
        if self.frames is not None:
            self.frames.feed(data)
        if self.number in self.connection.streams:
            self.connection.send_data(self, data, False)

    def response_done(self, trailers: Trailers | None = None, body: bytes = b"") -> None:
        self.origin = None
        self.sent += len(body)
        if self.number not in self.connection.streams:
            return
        if trailers:
            self.connection.send_trailers(self, f.encode(trailers))
        else:
            self.connection.send_data(self, body, True)

    def pause_source(self) -> None:
        if self.origin is not None:
            self.origin.pause(PEER_SLOW)

    def resume_source(self) -> None:
        if self.origin is not None:
            self.origin.resume(PEER_SLOW)

    def cut_short(self) -> None:
        self.record("origin")
        self.connection.reset(self, Code.INTERNAL_ERROR)

    def refuse(self, refusal: Refuse) -> None:
        self._answered()
        self.status = refusal.status
        self.reason = self.reason or refusal.why
        self.response_started = True
        if self.number not in self.connection.streams:
            return
        fields = [(b"x-amzn-requestid", self.request_id), *replies.fields(refusal)]
        block = f.encode_status(refusal.status) + f.encode(fields)
        body = b"" if self.head is not None and self.head.method == b"HEAD" else refusal.body
        if not body:
            self.connection.put(f.headers(self.number, block, True))
            self.connection.sent_end(self)
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
            self.origin_failed(Failure(failures.INVALID, "Sec-WebSocket-Accept does not answer the request's key (RFC 6455, 4.2.2)"))
            return
        self._answered()
        self.response_started = True
        self.status = 200
        self.frames = FrameCounter()
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
            else:
                self.resume_reading(READ_AHEAD)

    @property
    def server_frames(self) -> FrameCounter | None:
        return self.frames

    def tunnel_write(self, data: bytes) -> None:
        if data and self.number in self.connection.streams:
            self.connection.send_data(self, data, False)

    def tunnel_half_closed(self) -> None:
        if self.frames is not None:
            self.frames.end()
        if self.number in self.connection.streams:
            self.connection.send_data(self, b"", True)

    def response_over(self) -> None:
        self.response_done()

    def cut(self) -> None:
        """The client learns that this connection is no good for the session any more, and of a WebSocket why."""
        if not self.response_started:
            self.origin_failed(failures.SUSPENDED)
            return
        self.origin = None
        self.record("origin")
        connection = self.connection
        if self.frames is not None and self.frames.at_boundary and not self.queue:
            connection.send_data(self, GOING_AWAY, True)
        connection.reset(self, Code.CANCEL)
        # After the resets of all streams that are cut now: clients built on h2 take nothing that follows a GOAWAY.
        asyncio.get_running_loop().call_soon(connection.go_away)
