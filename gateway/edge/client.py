"""A client's HTTP/1.1 connection: requests in order, each admitted, forwarded and answered; tunnels after an upgrade.

What can go at once goes at once, inside `data_received`: no task, no await. What has to wait (a session that sleeps, a
connect, a host that is not known yet) is a coroutine, `_slow`, of which a connection has at most one.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, cast

from . import replies
from .admission import Forward, Hold, Lookup, Refuse, admit, check_token
from .chunked import ChunkedBody
from .head import CHUNKED, FIXED, MARKER, NO_BODY, UNTIL_CLOSE, Malformed, RequestHead, ResponseHead, parse_request
from .hold import HoldFull
from .memo import Admitted
from .table import Account, RouteEntry
from .upstream import ConnectFailed, SessionGone

if TYPE_CHECKING:
    from .origin import Origin
    from .worker import Worker

_AT_HEAD, _IN_BODY, _WAITING, _TUNNEL, _ENDING = range(5)
_FAST_LINE = re.compile(rb"(?:GET|POST|PUT|DELETE|HEAD|OPTIONS|PATCH) /[\x21-\x7e\x80-\xff]* HTTP/1\.1\Z").match
_AHEAD_MAX_BYTES = 64 << 10  # read beyond the request under way, or while it is held
_BUFFER_HIGH_BYTES = 512 << 10
_LINGER_SECONDS = 1.0
_STALE_SECONDS = 0.1
_NOBODY = Account()


class Client(asyncio.Protocol):
    __slots__ = (
        "_ahead", "_body", "_buffer", "_held_since", "_keep", "_left", "_paused", "_request_id", "_response_started",
        "_state", "_task", "_timing", "_waiting", "_worker", "account", "head", "origin", "touched", "transport",
    )  # fmt: skip

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.transport: asyncio.Transport | None = None
        self.touched = worker.time()
        self._state = _AT_HEAD
        self._buffer = b""  # of a head that is not complete
        self._ahead = b""  # read, but not looked at yet: the next requests, or a body whose origin is not there yet
        self._paused = False
        # the request under way
        self.head: RequestHead | None = None
        self.origin: Origin | None = None
        self.account = _NOBODY
        self._keep = True
        self._left = 0
        self._body: ChunkedBody | None = None
        self._request_id = b""
        self._response_started = False
        self._waiting = False
        self._task: asyncio.Task[None] | None = None
        self._timing = ""
        self._held_since = 0.0

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_HIGH_BYTES)
        self._worker.clients.add(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _AT_HEAD:
            self._on_head(data)
        elif state == _TUNNEL:
            account = self.account
            account.count += 1
            account.last = self._worker.time()
            if self.origin is not None and self.origin.transport is not None:
                self.origin.transport.write(data)
        elif state == _IN_BODY:
            self._on_body(data)
        elif state == _WAITING:
            self._ahead += data
            if len(self._ahead) > _AHEAD_MAX_BYTES:
                self.pause_reading()

    def eof_received(self) -> bool:
        origin = self.origin.transport if self.origin is not None else None
        if self._state == _TUNNEL and origin is not None and origin.can_write_eof():
            origin.write_eof()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._worker.clients.discard(self)
        self.transport = None
        self._state = _ENDING
        if self._task is not None:
            self._task.cancel()
        self._answered()
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.client = None
            origin.unclean = True
            origin.cut() if origin.transport is not None else None

    def pause_writing(self) -> None:
        if self.origin is not None and self.origin.transport is not None:
            self.origin.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.origin is not None and self.origin.transport is not None:
            self.origin.transport.resume_reading()

    # ---- the head ----

    def _on_head(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        elif data[:1] in b"\r\n":
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2: an empty line before a request is ignored
        worker = self._worker
        self.touched = now = worker.time()
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > worker.settings.head_bytes:
            self._incomplete(data, end)
            return
        at = data.find(b"\r\n")
        line, block = data[:at], data[at:end]
        memo = worker.memo.get(block)
        if memo is not None and _FAST_LINE(line):
            entry = worker.table.get(memo.host)
            if (
                entry is not None
                and entry.route is memo.route
                and memo.checker is worker.checker
                and memo.expires > worker.wall()
                and (origin := worker.upstream.take_idle(memo.key)) is not None
            ):
                self._keep = memo.keep_alive
                self._forward_now(origin, line, memo.block, memo.account, now)
                if len(data) > end + 4:
                    self._ahead = data[end + 4 :]
                return
        self._parsed(line, block, data[end + 4 :])

    def _incomplete(self, data: bytes, end: int) -> None:
        if len(data) > self._worker.settings.head_bytes:
            self._fail(431, b"Request header fields too large")
        elif data:
            self._buffer = data

    def _forward_now(self, origin: Origin, line: bytes, block: bytes, account: Account, now: float) -> None:
        """The fast path: an admitted request without a body, on a connection that waits."""
        self.account = account
        account.count += 1
        account.waiting += 1
        account.last = now
        self._waiting = True
        self._response_started = False
        self._state = _WAITING
        self.head = None
        self.origin = origin
        self._request_id = request_id = self._worker.request_id()
        origin.begin(self, line.startswith(b"HEAD "))
        assert origin.transport is not None
        origin.transport.write(b"%b%b\r\nx-amzn-requestid: %b\r\n\r\n" % (line, block, request_id))

    def _parsed(self, line: bytes, block: bytes, rest: bytes) -> None:
        try:
            head = parse_request(line, block, self._worker.settings.head_fields)
        except Malformed as error:
            self._fail(error.status, str(error).encode())
            return
        self.head = head
        self._keep = head.keep_alive and head.minor == 1
        self._response_started = False
        self._timing = ""
        self._held_since = 0.0
        self._request_id = self._worker.request_id()
        self._left = head.length
        self._body = ChunkedBody() if head.framing == CHUNKED else None
        self._state = _WAITING if head.framing == NO_BODY or (head.framing == FIXED and not head.length) else _IN_BODY
        self._ahead = rest
        grant = check_token(head, self._worker.checker, self._worker.wall())
        entry = self._worker.table.get(head.host)
        decision = admit(head, grant, entry.route if entry else None, False, self._worker.wall())
        if isinstance(decision, Refuse):
            self._refuse(decision)
        elif isinstance(decision, Forward) and entry is not None and not isinstance(grant, Refuse):
            self._forward(decision.port, entry, head, block, grant.expires)
        else:
            self._task = self._worker.spawn(self._slow(head))

    def _forward(self, port: int, entry: RouteEntry, head: RequestHead, block: bytes, expires: float) -> None:
        route = entry.route
        key = (route.session, route.incarnation, port)
        if head.is_memorable:
            memo = Admitted(head.host, route, self._worker.checker, expires, key, entry.account, head.block, self._keep)
            self._worker.memo.put(block, memo)
        origin = self._worker.upstream.take_idle(key)
        if origin is None:
            self._task = self._worker.spawn(self._slow(head))
        else:
            self._start(origin, entry)

    # ---- what has to wait ----

    async def _slow(self, head: RequestHead) -> None:
        """Decides again after each wait, because everything may have changed meanwhile."""
        worker = self._worker
        deadline = worker.time() + worker.settings.hold_seconds
        is_known = False
        try:
            while True:
                entry = worker.table.get(head.host)
                grant = check_token(head, worker.checker, worker.wall() if not self._held_since else 0.0)
                # A token is checked when the request opens: one that expires while its request is held is still good.
                decision = admit(head, grant, entry.route if entry else None, is_known, 0.0 if self._held_since else worker.wall())
                if isinstance(decision, Lookup):
                    await worker.lookup(head.host)
                    is_known = True
                elif isinstance(decision, Refuse) or entry is None:
                    self._refuse(decision if isinstance(decision, Refuse) else replies.UNAVAILABLE)
                    return
                elif isinstance(decision, Hold):
                    await self._wait(entry, deadline)
                elif await self._connect(entry, decision.port, deadline):
                    return
        except HoldFull:
            self._refuse(replies.TOO_MANY)
        except (TimeoutError, ConnectFailed, SessionGone):
            self._refuse(replies.UNAVAILABLE)
        finally:
            self._task = None

    async def _wait(self, entry: RouteEntry, deadline: float) -> None:
        worker = self._worker
        self._held_since = self._held_since or worker.time()
        entry.account.count += 1
        entry.account.last = worker.time()
        await worker.holds.wait(entry.route, max(0.0, deadline - worker.time()), len(self._ahead))
        self._timing = f"hold;dur={(worker.time() - self._held_since) * 1000:.1f}"

    async def _connect(self, entry: RouteEntry, port: int, deadline: float) -> bool:
        """Connects and starts the exchange; False when the route changed meanwhile and must be looked at again."""
        worker, route = self._worker, entry.route
        self._enter(entry.account)
        started = worker.time()
        try:
            origin = await worker.upstream.connect(route, port, entry.opened_at)
        except SessionGone:
            # vmm knows more than our table: control will tell us, or has to be asked again.
            self._answered()
            if worker.time() > deadline:
                raise
            await asyncio.sleep(_STALE_SECONDS)
            return False
        except ConnectFailed:
            self._answered()
            current = worker.table.get(route.endpoint)
            if current is None or current.route is route:
                raise
            return False
        if self._held_since:
            self._timing += f", connect;dur={(worker.time() - started) * 1000:.1f}"
        self._start(origin, entry)
        return True

    # ---- forwarding ----

    def _enter(self, account: Account) -> None:
        self.account = account
        account.count += 1
        account.last = self._worker.time()
        if not self._waiting:
            account.waiting += 1
            self._waiting = True

    def _answered(self) -> None:
        if self._waiting:
            self._waiting = False
            self.account.waiting -= 1
            self.account.count += 1
            self.account.last = self._worker.time()

    def _start(self, origin: Origin, entry: RouteEntry) -> None:
        """Sends the head, and whatever of the body is here, to the application."""
        head = self.head
        assert head is not None and origin.transport is not None
        self._enter(entry.account)
        self.origin = origin
        origin.begin(self, head.method == b"HEAD")
        if origin.is_paused:
            self.pause_reading()
        origin.transport.write(
            b"%b %b HTTP/1.%d%b\r\nx-amzn-requestid: %b\r\n\r\n" % (head.method, head.target, head.minor, head.block, self._request_id)
        )
        if self._state == _IN_BODY:
            ahead, self._ahead = self._ahead, b""
            if ahead:
                self._on_body(ahead)
            if not origin.is_paused:
                self.resume_reading()

    def _on_body(self, data: bytes) -> None:
        """Body bytes: on to the origin, or kept, within a bound, until there is one."""
        self.touched = self._worker.time()
        origin = self.origin
        if origin is None:
            self._ahead += data
            if len(self._ahead) > _AHEAD_MAX_BYTES:
                self.pause_reading()
            return
        if self._body is not None:
            try:
                used = self._body.feed(data)
            except Malformed as error:
                self._fail(error.status, str(error).encode())
                return
            complete = self._body.is_complete
        else:
            used = min(self._left, len(data))
            self._left -= used
            complete = not self._left
        if complete:
            self._state = _WAITING
            self._ahead = data[used:]
        self.account.count += 1
        self.account.last = self.touched
        if origin.transport is not None:
            origin.transport.write(data if used == len(data) else data[:used])

    # ---- what the origin's side calls ----

    @property
    def wants_upgrade(self) -> bool:
        return self.head is not None and self.head.upgrade is not None

    @property
    def is_reading_paused_by_origin(self) -> bool:
        return self._paused and self.origin is not None and self.origin.is_paused

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def interim(self, head: ResponseHead) -> None:
        """A 1xx response; clients of HTTP/1.0 do not know them."""
        if self.head is None or self.head.minor == 1:
            self.write(head.status_line + head.block + b"\r\n\r\n")

    def response_head(self, head: ResponseHead, body: bytes) -> None:
        self._answered()
        self._response_started = True
        if head.framing == UNTIL_CLOSE or self._state == _IN_BODY or self._worker.is_draining:
            self._keep = False
        extra = b"" if self._keep else b"\r\nConnection: close"
        if self._timing and self._worker.settings.server_timing:
            extra += b"\r\nServer-Timing: " + self._timing.encode("ascii")
        if self.transport is not None:
            self.transport.write(
                b"%b\r\nx-amzn-requestid: %b%b%b\r\n\r\n%b" % (head.status_line, self._request_id, extra, head.block, body)
            )

    def response_done(self, reusable: bool) -> None:
        """The response is complete. An upload that still runs ends with it: its rest has no reader."""
        self.origin = None
        if self._state == _IN_BODY or not self._keep:
            if self._state == _IN_BODY:
                self._linger()
            else:
                self._close()
            return
        self._state = _AT_HEAD
        if self._paused:
            self.resume_reading()
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            # Not at once: a long pipeline must neither recurse nor keep the loop from others.
            asyncio.get_running_loop().call_soon(self._next, ahead)
            self._state = _WAITING

    def _next(self, ahead: bytes) -> None:
        if self.transport is None or self._state != _WAITING:
            return
        data, self._ahead = ahead + self._ahead, b""
        self._state = _AT_HEAD
        self._on_head(data)

    def origin_failed(self, head_sent: bool) -> None:
        """The application went away. Before its head this is a 502; after it, the client must see that it is cut short."""
        self.origin = None
        self._answered()
        if head_sent or self._response_started:
            if self.transport is not None:
                self.transport.abort()
        else:
            self._refuse(replies.UNAVAILABLE)

    def switch(self, head: ResponseHead, data: bytes) -> None:
        """101: from here on bytes go both ways as they are; those that came early belong to the tunnel."""
        self._answered()
        extra = b"\r\nConnection: upgrade\r\nUpgrade: " + (head.upgrade or b"")
        request = self.head
        if request is not None and request.subprotocol_auth and b"sec-websocket-protocol" not in head.names:
            extra += b"\r\nSec-WebSocket-Protocol: " + MARKER
        self.write(head.status_line + b"\r\nx-amzn-requestid: " + self._request_id + extra + head.block + b"\r\n\r\n" + data)
        self._state = _TUNNEL
        ahead, self._ahead = self._ahead, b""
        if ahead:
            self.data_received(ahead)
        if self._paused:
            self.resume_reading()

    def tunnel_half_closed(self) -> None:
        """The application has nothing more to say; TLS has no half-close that clients agree on, so the tunnel ends."""
        self._close()

    def finish_tunnel(self) -> None:
        self.origin = None
        self._close()

    # ---- answers of our own, and ends ----

    def _refuse(self, decision: Refuse) -> None:
        """An answer without the application. The connection stays usable where the request's end is known."""
        self._answered()
        if self.transport is None:
            return
        if self._worker.is_draining:
            self._keep = False
        head_only = self.head is not None and self.head.method == b"HEAD"
        in_body = self._state == _IN_BODY
        keep = self._keep and not in_body
        self.transport.write(replies.make(decision, self._request_id, keep, head_only))
        self._keep = keep
        if in_body:
            self._linger()
        else:
            self.response_done(reusable=False)

    def _fail(self, status: int, body: bytes) -> None:
        """What follows cannot be understood: say so, and close."""
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.client = None
            origin.cut()
        self._answered()
        if self.transport is not None and not self._response_started:
            self.transport.write(replies.make(Refuse(status, body), self._worker.request_id(), False, False))
        self._linger()

    def _linger(self) -> None:
        """Closes a little later, reading meanwhile: data that comes into a closed socket would reset the answer away."""
        self._state = _ENDING
        if self._paused:
            self.resume_reading()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._close)

    def _close(self) -> None:
        self._state = _ENDING
        if self.transport is not None:
            self.transport.close()

    def pause_reading(self) -> None:
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    # ---- the sweeper ----

    def sweep(self, now: float) -> None:
        """Called about once a second."""
        settings, quiet = self._worker.settings, now - self.touched
        if self._state == _AT_HEAD:
            if self._buffer and quiet > settings.head_seconds:
                self._fail(408, b"The request's head did not come in time")
            elif not self._buffer and quiet > settings.idle_seconds:
                self._close()
        elif self._state == _IN_BODY and self.origin is not None and quiet > settings.idle_seconds:
            self._fail(408, b"The request's body did not come in time")

    @property
    def is_idle(self) -> bool:
        return self._state == _AT_HEAD and not self._buffer

    def close_idle(self) -> None:
        self._close()
