"""A connection of HTTP/2 goes to applications that are gRPC servers, or are spoken to with prior knowledge otherwise (RFC 9113, 3.3)."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from .. import failures
from ..failures import Failure
from ..policy.keys import Key
from ..reading import HELD, PEER_SLOW
from ..sides import HELD_BYTES, ClientSide, OriginContext, Owner
from ..wire import http2_connection, http2_head
from ..wire import http2_frames as f
from ..wire.chunked import encode_end
from ..wire.http1_head import CHUNKED, FIXED, NO_BODY, Malformed, RequestHead, ResponseHead, Trailers, split_block
from ..wire.http2_connection import Multiplex
from ..wire.http2_flow import FLOW_SLOTS, Flow
from ..wire.http2_frames import Code, H2StreamError
from .dial import unacknowledged

_STREAMS_MOST = 100  # until the application says how many it takes
_LIST_BYTES = 128 << 10
_NUMBER_MOST = 2**30  # numbers cannot be used again: a connection ends before they do


_TOO_LITTLE: Final = "the content is shorter than content-length says (RFC 9113, 8.1.1)"


class OriginStream(Flow):
    """A stream carries one exchange, and lets go of it when that has ended."""

    __slots__ = ("_chunks", "_head", "_remaining", "connection", "exchange", "is_head", "sent_end", *FLOW_SLOTS)

    takes_raw = False

    def __init__(self, connection: Http2Origin) -> None:
        self.connection = connection
        self.exchange: ClientSide | None = None
        self.is_head = False
        self.open_flow(0, connection.initial_window, connection.time())
        self._head: ResponseHead | None = None
        self._chunks = False
        self.sent_end = False  # our half of the stream has ended
        self._remaining = -1  # of the content that the head announces; -1: of any length

    # ---- used by the exchange ----

    @property
    def key(self) -> Key:
        return self.connection.key

    @property
    def is_paused(self) -> bool:
        return self.source_paused

    @property
    def is_parked(self) -> bool:
        return self.connection.is_parked

    def open(self, exchange: ClientSide, head: RequestHead) -> None:
        if not self.connection.register(self):
            exchange.origin_failed(failures.STREAM_REFUSED)
            return
        self.exchange = exchange
        self.is_head = head.method == b"HEAD"
        block = http2_head.request_block(head, exchange.request_id, self.connection.scheme)
        if exchange.forwarding_fields:
            block += f.encode(split_block(exchange.forwarding_fields))
        bodyless = head.framing == NO_BODY or (exchange.request_complete and head.framing != CHUNKED and not head.length)
        self.connection.put(f.headers(self.number, block, bodyless))
        if bodyless:
            self.on_end_sent()

    def give_back(self) -> None:
        """Gives back the reservation of a stream that was not opened."""
        self.connection.unreserve()

    def send(self, data: bytes) -> None:
        if self.number in self.connection.streams:
            self.connection.send_data(self, data, False)
            self.connection.spoken_to(self)

    def finish(self, trailers: Trailers | None) -> None:
        if self.number not in self.connection.streams or self.sent_end or self.end_after_queue:
            return
        if trailers:
            self.connection.send_trailers(self, f.encode(trailers))
        else:
            self.connection.send_data(self, b"", True)
        self.connection.spoken_to(self)

    def pause(self, reason: int) -> None:
        self.paused |= reason

    def resume(self, reason: int) -> None:
        self.paused &= ~reason
        if not self.paused and self.number in self.connection.streams:
            self.connection.credit(self)

    def cancel(self) -> None:
        self.exchange = None
        self.connection.reset(self, Code.CANCEL)
        self.connection.freed()

    def pause_source(self) -> None:
        if self.exchange is not None:
            self.exchange.pause_reading(PEER_SLOW)

    def resume_source(self) -> None:
        if self.exchange is not None:
            self.exchange.resume_reading(PEER_SLOW)

    # ---- the answer ----

    def headers(self, block: list[f.Field], end: bool) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        settings = self.connection.context.settings
        if http2_head.size_of(block) > settings.head_bytes:
            raise Malformed(f"response has more than {settings.head_bytes} bytes of fields (edge.head_bytes)", 502)
        if self._head is not None:
            self._complete(http2_head.parse_trailers(block, settings.head_fields), end)
            return
        head = http2_head.parse_response(block, end, settings.head_fields, self.is_head)
        if head.status < 200:
            if end:
                raise Malformed("an interim response ends the stream (RFC 9113, 8.1)", 502)
            exchange.interim(head)
            return
        self._remaining = head.length if head.framing == FIXED else 0 if head.framing == NO_BODY else -1
        if end and self._remaining > 0:
            raise Malformed(_TOO_LITTLE, 502)
        self._head = head
        self.connection.has_answered = True
        self._chunks = head.framing == CHUNKED and exchange.is_raw
        if end:  # as gRPC says that a call failed at once: to its clients it must stay one frame
            self.exchange = None
            exchange.response_whole(head, b"")
            self.connection.response_complete(self)
        else:
            exchange.response_head(head)

    def on_data(self, data: bytes, end: bool) -> None:
        try:
            self._data(data, end)
        except Malformed as error:
            self.connection.malformed(self, error)

    def _data(self, data: bytes, end: bool) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if self._head is None:
            raise Malformed("content comes before the response's head (RFC 9113, 8.1)", 502)
        account = exchange.account
        account.count += 1
        account.last = self.connection.time()
        if self._remaining >= 0:
            self._remaining -= len(data)
            if self._remaining < 0:
                raise Malformed("the content is longer than content-length says, or not allowed (RFC 9113, 8.1.1)", 502)
            if end and self._remaining:
                raise Malformed(_TOO_LITTLE, 502)
        if data:
            exchange.response_data(b"%x\r\n%b\r\n" % (len(data), data) if self._chunks else data)
        if end:
            self._complete(None, True)

    def _complete(self, trailers: Trailers | None, end: bool) -> None:
        exchange = self.exchange
        if not end or exchange is None:
            raise Malformed("trailers do not end the stream (RFC 9113, 8.1)", 502)
        if self._remaining > 0:
            raise Malformed(_TOO_LITTLE, 502)
        self.exchange = None
        if self._chunks:
            exchange.response_data(encode_end(trailers))
        exchange.response_done(trailers)
        self.connection.response_complete(self)

    @property
    def has_head(self) -> bool:
        """Whether the response's final head has come."""
        return self._head is not None

    @property
    def is_silent(self) -> bool:
        """Whether its head is out, and nothing is under way."""
        return self.exchange is not None and self._head is not None and not self.queue and not self.source_paused and not self.paused

    def on_reset(self, code: int) -> None:
        """Fails the exchange. NO_ERROR after an answer only says that the rest of the request is not wanted."""
        self.fail(failures.STREAM_REFUSED if code == Code.REFUSED_STREAM and not self.has_head else failures.STREAM_RESET)
        self.connection.freed()

    def on_end_sent(self) -> None:
        self.sent_end = True
        if self.received_end:
            self.connection.drop(self)
            self.connection.freed()

    def fail(self, failure: Failure) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.origin_failed(failure)


class Http2Origin(Multiplex):
    """The connection gives streams to exchanges: reserved first, for whoever waits for one in the pool, and numbered when they
    are opened, because numbers must come in order (RFC 9113, 5.1.1)."""

    __slots__ = ("_most", "_owner", "_reserved", "context", "has_answered", "idle_since", "is_parked", "is_secure", "ready", "scheme")

    is_shared = True  # by several exchanges at a time

    def __init__(self, context: OriginContext, owner: Owner, is_secure: bool) -> None:
        super().__init__(context.time, asyncio.get_running_loop().call_soon, _LIST_BYTES)
        self.context = context
        self._owner = owner
        self._reserved = 0
        self.has_answered = False  # a response has come on it
        self.is_secure = is_secure
        self.scheme = b"https" if is_secure else b"http"
        self.is_parked = False  # its session sleeps; what is to be sent waits in `_out`
        self.idle_since = context.time()
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # the application speaks HTTP/2, or not
        self._most = _STREAMS_MOST
        self.last_number = -1

    def connection_made(self, transport: object) -> None:
        super().connection_made(transport)
        self.put(f.PREFACE + f.settings({f.ENABLE_PUSH: 0}) + f.window_update(0, http2_connection.CONNECTION_WINDOW - f.WINDOW_BYTES))
        self._receive_window = http2_connection.CONNECTION_WINDOW

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.is_shutting_down = True
        if not self.ready.done():
            self.ready.set_result(False)
        if self.is_parked:
            self.context.forget_parked(self)
        self._owner.forget_shared(self, self.time())
        unanswered = failures.STALE_FAILURE if self.has_answered else failures.UNANSWERED_FAILURE
        streams = self._origin_streams()
        self.streams = {}
        for stream in streams:
            stream.fail(failures.CONTENT_CUT_SHORT if stream.has_head else unanswered)

    # ---- streams ----

    @property
    def has_room(self) -> bool:
        return self.is_open and len(self.streams) + self._reserved < self._most

    @property
    def is_open(self) -> bool:
        return not self.is_shutting_down and self.transport is not None and self.last_number < _NUMBER_MOST

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    @property
    def key(self) -> Key:
        return self._owner.key

    def reserve(self) -> OriginStream:
        self._reserved += 1
        return OriginStream(self)

    def unreserve(self) -> None:
        self._reserved -= 1
        self.freed()

    def register(self, stream: OriginStream) -> bool:
        """Gives a reserved stream its number; returns False where the connection has stopped to take streams since it was reserved."""
        self._reserved -= 1
        if not self.is_open:
            return False
        self.last_number += 2
        stream.open_flow(self.last_number, self.initial_window, self.time())
        self.streams[self.last_number] = stream
        return True

    def is_idle(self, number: int) -> bool:
        return not number & 1 or number > self.last_number

    def on_settings(self) -> None:
        if not self.ready.done():
            self.ready.set_result(True)
        self.freed()

    def peer_setting(self, name: int, value: int) -> None:
        if name == f.MAX_CONCURRENT_STREAMS:
            self._most = min(value, 1000)

    def _origin_streams(self) -> list[OriginStream]:
        return [cast(OriginStream, stream) for stream in self.streams.values()]

    @property
    def last_peer_stream(self) -> int:
        """It is always 0: an application opens no streams, because push is switched off (RFC 9113, 8.4)."""
        return 0

    def on_headers(self, number: int, block: bytes, end: bool) -> None:
        fields = f.decode(self._decoder, block)
        stream = cast("OriginStream | None", self.streams.get(number))
        if stream is None or stream.received_end:
            self.closed_stream(number, stream)
            return
        stream.received_end = end
        try:
            stream.headers(fields, end)
        except Malformed as error:
            self.malformed(stream, error)

    def malformed(self, stream: OriginStream, error: Malformed) -> None:
        """A malformed response is a stream error (RFC 9113, 8.1.1). The connection takes no further streams: an application that
        frames one response wrongly is not trusted with the next."""
        self.is_shutting_down = True
        stream.fail(Failure(failures.INVALID, str(error)))
        raise H2StreamError(stream.number, Code.PROTOCOL_ERROR, str(error)) from error

    def on_goaway(self, last: int, code: int) -> None:
        """Fails the streams beyond the last, which the application has not processed (RFC 9113, 6.8): their requests may be sent again."""
        self.is_shutting_down = True
        for stream in [opened for opened in self._origin_streams() if opened.number > last]:
            self.drop(stream)
            stream.fail(failures.STREAM_REFUSED)
        self._close_if_unused()

    def response_complete(self, stream: OriginStream) -> None:
        """Ends a stream whose answer is complete. A request that is not complete is reset, because nobody reads its rest."""
        self.idle_since = self.time()
        if stream.sent_end:
            self.drop(stream)
        else:
            self.reset(stream, Code.CANCEL)
        self.freed()

    def freed(self) -> None:
        if self._owner.waiting:
            self._owner.serve(self.time())
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self.is_shutting_down and not self.streams:
            self.close()

    def shut_down(self) -> None:
        """Shuts down a connection that has been idle for long: it opens no more streams, and closes after its last one."""
        self.is_shutting_down = True
        self.goaway(0, Code.NO_ERROR)
        self.flush()
        self._close_if_unused()

    # ---- through a suspend ----

    def _to_park(self, one_way: bool) -> list[OriginStream]:
        return [stream for stream in self._origin_streams() if one_way or not stream.sent_end]

    def parkable(self, one_way: bool) -> int:
        """Counts the streams whose client has not ended its half, or all with `one_way`."""
        return len(self._to_park(one_way))

    def is_silent(self, one_way: bool) -> bool:
        """Whether nothing is under way on those streams, nor on the connection itself."""
        transport = self.transport
        if transport is None or transport.is_closing() or self.is_shutting_down or self._buffer or self._block is not None:
            return False
        if self._out or transport.get_write_buffer_size() or unacknowledged(cast(asyncio.Transport, transport)):
            return False
        return all(stream.is_silent for stream in self._to_park(one_way))

    def park(self, one_way: bool) -> None:
        """Parks the connection, and ends the streams that are not to be parked: the application gets their RST_STREAM when it runs
        again."""
        self.is_parked = True
        for stream in [] if one_way else self._origin_streams():
            if stream.sent_end:
                exchange, stream.exchange = stream.exchange, None
                self.reset(stream, Code.CANCEL)
                if exchange is not None:
                    exchange.cut()

    @property
    def stream_count(self) -> int:
        return len(self.streams)

    def move(self, owner: Owner) -> None:
        """Makes `owner`, a pool of the session's next incarnation, its owner."""
        self._owner = owner

    def unpark(self) -> None:
        self.is_parked = False
        self.flush()
        for stream in self._origin_streams():
            if stream.exchange is not None:
                stream.exchange.resume_reading(HELD)

    def flush(self) -> None:
        """Writes what is due, but nothing while the connection is parked: then it is kept, a RST_STREAM of a client that has left
        included, and a connection without streams is closed."""
        if not self.is_parked:
            super().flush()
        elif not self.streams and self.transport is not None:
            self.transport.close()  # whose FIN is sent again until the guest runs
        else:
            self._flush_due = False

    def spoken_to(self, stream: OriginStream) -> None:
        """Wakes the session of a parked connection, because a client has sent something on a stream."""
        if self.is_parked:
            self.context.wake(self)
            if self._out_bytes > HELD_BYTES and stream.exchange is not None:
                stream.exchange.pause_reading(HELD)

    def cut(self) -> None:
        """Aborts the connection because its incarnation ends, and tells the exchanges on it."""
        self.is_shutting_down = True
        streams = self._origin_streams()
        self.streams = {}
        if self.transport is not None:
            self.transport.abort()
        for stream in streams:
            exchange, stream.exchange = stream.exchange, None
            if exchange is not None:
                exchange.cut()
