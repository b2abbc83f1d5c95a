"""A connection to an application: it carries one exchange at a time, and its responses back to a client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from .chunked import ChunkedBody
from .head import CHUNKED, FIXED, NO_BODY, UNTIL_CLOSE, Malformed, ResponseHead, parse_response
from .memo import Memo

if TYPE_CHECKING:
    from .client import Client
    from .upstream import Key, Upstream
    from .worker import Worker

_AT_HEAD, _IN_FIXED, _IN_CHUNKED, _TO_CLOSE, _TUNNEL = range(5)
_MEMO_HEAD_MAX_BYTES = 2048
_BUFFER_HIGH_BYTES = 512 << 10

_responses: Memo[bytes, ResponseHead] = Memo(2048)


class Origin(asyncio.Protocol):
    __slots__ = (
        "_body", "_buffer", "_left", "_state", "_upstream", "_worker", "client", "idle_since", "is_head", "is_paused", "key",
        "transport", "unclean",
    )  # fmt: skip

    def __init__(self, worker: Worker, upstream: Upstream, key: Key) -> None:
        self._worker = worker
        self._upstream = upstream
        self.key = key
        self.transport: asyncio.Transport | None = None
        self.client: Client | None = None
        self.idle_since = 0.0
        self.is_head = False  # the request's method is HEAD
        self.is_paused = False
        self.unclean = False  # not to be used again
        self._state = _AT_HEAD
        self._left = 0
        self._buffer = b""
        self._body: ChunkedBody | None = None

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        client = self.client
        if client is None:
            self.close()  # nobody asked
            return
        state = self._state
        if state == _AT_HEAD:
            self._head(client, data)
            return
        client.account.count += 1
        client.account.last = self._worker.time()
        if state == _IN_FIXED:
            self._fixed(client, data)
        elif state == _IN_CHUNKED:
            self._chunked(client, data)
        else:
            client.write(data)

    def eof_received(self) -> bool:
        if self._state == _TUNNEL and self.client is not None:
            self.client.tunnel_half_closed()
            return True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._upstream.forget(self)
        client, self.client = self.client, None
        if client is None:
            return
        if self._state == _TO_CLOSE and error is None:
            client.response_done(reusable=False)
        elif self._state == _TUNNEL:
            client.finish_tunnel()
        else:
            client.origin_failed(head_sent=self._state != _AT_HEAD)

    def pause_writing(self) -> None:
        self.is_paused = True
        if self.client is not None:
            self.client.pause_reading()

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.client is not None:
            self.client.resume_reading()

    # ---- used by the client's side ----

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def begin(self, client: Client, is_head: bool) -> None:
        """Takes an exchange; what it writes comes from the client's side."""
        self.client = client
        self.is_head = is_head
        self._state = _AT_HEAD
        self._buffer = b""

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def cut(self) -> None:
        """Ends the connection because its incarnation ends; the exchange on it, if any, fails."""
        if self.transport is not None:
            self.transport.abort()
        else:
            self.unclean = True

    # ---- the response ----

    def _head(self, client: Client, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > self._worker.settings.head_bytes:
                    self._refuse(client)
                    return
                self._buffer = data
                return
            raw = data[:end]
            head = _responses.get(raw) if not self.is_head else None
            if head is None:
                try:
                    head = self._parse(raw)
                except Malformed:
                    self._refuse(client)
                    return
            data = data[end + 4 :]
            if head.status >= 200 or head.status == 101:
                break
            client.interim(head)
            if not data:
                return
        self._final(client, head, data)

    def _parse(self, raw: bytes) -> ResponseHead:
        at = raw.find(b"\r\n")
        line, block = (raw, b"") if at < 0 else (raw[:at], raw[at:])
        head = parse_response(line, block, self._worker.settings.head_fields, self.is_head)
        if not self.is_head and head.status >= 200 and len(raw) <= _MEMO_HEAD_MAX_BYTES:
            _responses.put(raw, head)
        return head

    def _refuse(self, client: Client) -> None:
        """What the application said is not HTTP: the client is told 502."""
        self.client = None
        client.origin_failed(head_sent=False)
        self.cut()

    def _final(self, client: Client, head: ResponseHead, data: bytes) -> None:
        if head.status == 101:
            self._switch(client, head, data)
            return
        self.unclean = not head.keep_alive
        framing = head.framing
        if framing == FIXED and len(data) == head.length:  # the usual answer: all of it came in one read
            client.response_head(head, data)
            self._finish(client)
        elif framing == NO_BODY:
            self.unclean = self.unclean or bool(data)
            client.response_head(head, b"")
            self._finish(client)
        elif framing == FIXED:
            self._state, self._left = _IN_FIXED, head.length
            client.response_head(head, b"")
            self._fixed(client, data)
        elif framing == CHUNKED:
            self._state, self._body = _IN_CHUNKED, ChunkedBody()
            client.response_head(head, b"")
            if data:
                self._chunked(client, data)
        else:
            assert framing == UNTIL_CLOSE
            self._state = _TO_CLOSE
            client.response_head(head, data)

    def _switch(self, client: Client, head: ResponseHead, data: bytes) -> None:
        if head.upgrade is None or not client.wants_upgrade:
            self._refuse(client)
            return
        self._state = _TUNNEL
        client.switch(head, data)

    def _fixed(self, client: Client, data: bytes) -> None:
        extra = len(data) - self._left
        if extra > 0:
            data = data[: self._left]
            self.unclean = True
        self._left -= len(data)
        if data:
            client.write(data)
        if not self._left:
            self._finish(client)

    def _chunked(self, client: Client, data: bytes) -> None:
        assert self._body is not None
        try:
            used = self._body.feed(data)
        except Malformed:
            self.client = None
            client.origin_failed(head_sent=True)
            self.cut()
            return
        client.write(data if used == len(data) else data[:used])
        if self._body.is_complete:
            self.unclean = self.unclean or used < len(data)
            self._body = None
            self._finish(client)

    def _finish(self, client: Client) -> None:
        self.client = None
        self._state = _AT_HEAD
        reusable = not self.unclean
        if self.transport is not None and client.is_reading_paused_by_origin:
            client.resume_reading()
        client.response_done(reusable)
        if reusable and not self.unclean:
            self._upstream.give_back(self)
        else:
            self.close()
