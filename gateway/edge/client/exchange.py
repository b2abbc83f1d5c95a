"""One request and its answer, whichever protocol carries them: admitted, held, forwarded, answered.

A connection of HTTP/1.1 has one exchange after another (client/http1.py), a stream of HTTP/2 is one (client/http2.py). What a request
may do is decided here; how it is read and answered, there. What has to wait (a session that sleeps, a connect, a host that is not
known yet) is a coroutine, `_slow`, of which an exchange has at most one; everything else happens inside `data_received`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Final

import structlog

from gateway.messages import Route
from gateway.tokens import Grant

from .. import failures
from ..failures import Failure
from ..origin.sockets import SessionGone
from ..origin.upstream import ConnectFailed
from ..policy import replies
from ..policy.admission import NOT_RUNNING, SHELL_PORT, Decision, Forward, Hold, Lookup, Refuse, admit, admit_again, check_token
from ..policy.head_cache import CachedAdmission, CachedRequest
from ..policy.holds import TOO_MANY_BYTES, HoldFull, Ticket
from ..policy.keys import Key
from ..policy.limits import Limiter
from ..policy.routes import Account, RouteEntry
from ..reading import PEER_SLOW, THROTTLED
from ..records.record import HTTP1, HTTP2, RequestRecord
from ..sides import ClientSide, OriginSide
from ..wire.http1_head import NO_BODY, Malformed, RequestHead, ResponseHead
from ..wire.websocket import PING, PONG, FrameCounter, pong
from .context import Context

log = structlog.get_logger()

_STALE_SECONDS = 0.1
_INTERIMS_MOST: Final = 64  # of one exchange: progress (102) and hints (103) come in a few, a flood would cost memory
_TRACEPARENT = re.compile(rb"\r\ntraceparent: *([^\r]{1,128})", re.I)


class Handles:
    """What each request of a connection needs of the worker, kept with its type: a look at the worker, which is not compiled, costs as
    much as ten of these."""

    __slots__ = ("counters", "routes", "time", "upstream")

    def __init__(self, worker: Context) -> None:
        self.counters = worker.counters
        self.routes = worker.routes
        self.time = worker.time
        self.upstream = worker.upstream


class Exchange(ClientSide):
    """Origins call the methods under "the answer"; a protocol implements them. Each request has one of its own, so that whatever
    outlives a request (a timer, a shell, a connection that is cut) cannot mean another one."""

    __slots__ = (
        "_held_since", "_interims", "_limiter", "_routes", "_task", "_throttle", "_timing", "_tried_again", "_upstream", "_waiting",
        "began", "cached", "client_frames", "counted", "counters", "first_byte", "held_for", "held_seconds", "origin", "reason", "sent",
        "status", "unanswered_pings", "worker",
    )  # fmt: skip

    protocol: ClassVar[int] = HTTP1

    def __init__(self, worker: Context, handles: Handles) -> None:
        super().__init__()
        self.worker = worker
        self.counters = handles.counters
        self._routes, self._upstream = handles.routes, handles.upstream
        self.origin: OriginSide | None = None
        self.cached: CachedRequest | None = None  # in place of a head, where the request is one that was seen before
        self.counted = True  # whatever ends an exchange counts it; the first that does so sets this
        self.status = 0
        self.reason = ""  # why the answer is ours and not the application's, for the access log
        self.sent = 0  # bytes of bodies towards the client
        self.began = 0.0
        self.first_byte = 0.0
        self._interims = 0
        self._waiting = False
        self._task: asyncio.Task[None] | None = None
        self._limiter: Limiter | None = None
        self._tried_again = False
        self._throttle: asyncio.TimerHandle | None = None  # while the bytes a second are spent
        self._timing = ""
        self._held_since = self.held_seconds = 0.0
        self.held_for: Ticket | None = None
        self.client_frames: FrameCounter | None = None
        self.unanswered_pings: list[tuple[int, bytes]] = []  # forwarded to the application, and not answered by a pong

    # ---- the answer: the rest is implemented by a protocol ----

    def send_interim(self, head: ResponseHead) -> None:
        """Passes on a 1xx response."""

    def origin_failed(self, failure: Failure) -> None:
        """Ends the exchange without a whole answer from the application. Before its head this is a 502, or the request is sent once more;
        after it, the client must see that it is cut short. Both are written into the microVM's log."""
        origin, self.origin = self.origin, None
        key: Key = origin.key if origin is not None else ("", 0, 0)
        if not self.response_started and self._tries_again(failure, key):
            return
        if failure.kind != failures.ENDED or not self.response_started:
            self.fault(key, failure.reason)
        if self.response_started:
            self._stop_waiting()
            self.cut_short()
        else:
            self.refuse(replies.UNAVAILABLE)

    def _tries_again(self, failure: Failure, key: Key) -> bool:
        """Sends the request once more, on a new connection, and only where the application cannot have acted on the request: it is safe and
        has no content (RFC 9110, 9.2.2), or its application has said that it was not looked at. Over TLS, where the answer was not HTTP.
        Not behind an interim response, which says that the application has begun."""
        if (
            self._tried_again
            or self._interims
            or failure.kind not in (failures.NOT_HTTP, failures.STALE, failures.REFUSED, failures.UNANSWERED)
        ):
            return False
        head = self.head or self._head_of_cached()
        if head is None or head.framing != NO_BODY or not (head.is_safe or failure.kind == failures.REFUSED):
            return False
        if failure.kind in (failures.NOT_HTTP, failures.UNANSWERED) and not self.worker.upstream.try_tls(key):
            return False
        self._tried_again = True
        self.head = head
        self.run(self._slow(head, key[0], lambda route, is_known: admit_again(key[0], key[2], route), failure))
        return True

    def _head_of_cached(self) -> RequestHead | None:
        cached = self.cached
        if cached is None:
            return None
        method, target, _ = cached.rewritten.split(b" ", 2)
        admission = cached.admission
        return RequestHead(method, target, 1, admission.host, keep_alive=admission.keep_alive, block=admission.block)

    def cut_short(self) -> None:
        """Ends the answer so that its client sees that it is not complete."""

    def cut(self) -> None:
        self.origin_failed(failures.SUSPENDED)

    @property
    def server_frames(self) -> FrameCounter | None:
        """Says where a WebSocket's frames from the application end; None in other tunnels."""
        raise AssertionError

    def tunnel_write(self, data: bytes) -> None:
        """Writes a whole frame of ours to the client, where the application's last frame has ended."""

    def refuse(self, refusal: Refuse) -> None:
        """Answers the client with a response of ours; the application has no part in it."""

    # ---- implemented by a protocol, called from here ----

    @property
    def peer(self) -> str:
        """Returns the client's address, for the access log."""
        raise AssertionError

    def remember(self, admission: CachedAdmission) -> None:
        """Keeps an admission for requests with the same fields."""

    def send_read_ahead(self) -> None:
        """Sends what was read of the body meanwhile, because the origin is there."""

    @property
    def held_bytes(self) -> int:
        """Returns how many bytes of the body were read while there is no origin."""
        return 0

    # ---- what an answer may cost ----

    def interim(self, head: ResponseHead) -> None:
        """Passes on an interim (1xx) response. Raises Malformed where the application sends too many of them."""
        self._interims += 1
        if self._interims > _INTERIMS_MOST:
            raise Malformed(f"response has more than {_INTERIMS_MOST} interim responses before it (RFC 9110 15.2)", 502)
        self.send_interim(head)

    # ---- the fast path ----

    def try_cached(self, cached: CachedRequest, now: float) -> bool:
        """Forwards a request without a body that was seen before, where what was remembered still holds and a connection waits."""
        admission, worker = cached.admission, self.worker
        entry = self._routes.get(admission.host)
        if entry is None or entry.route is not admission.route:
            return False
        if admission.checker is not worker.checker or admission.expires <= worker.wall():
            return False
        if entry.limiter is not None:
            return False
        origin = self._upstream.take_idle(admission.key, now, cached.is_safe)
        if origin is None:
            return False
        self.cached = cached
        self.account = account = admission.account
        account.count += 1
        account.waiting += 1
        account.last = self.began = now
        self._waiting = True
        self.counted = False
        self.origin = origin
        self.request_id = request_id = self.counters.request_id()
        origin.begin(self, cached.is_head)
        assert origin.transport is not None
        origin.transport.write(b"%b%b%b\r\n\r\n" % (cached.rewritten, request_id, self.forwarding_fields))
        return True

    # ---- what was parsed ----

    def decide(self, head: RequestHead, now: float) -> None:
        """Admits, refuses or forwards the request at once where that is possible; where it has to wait, `_slow` goes on with it."""
        worker = self.worker
        self.head = head
        self.began = now
        self.counted = False
        self.request_id = self.counters.request_id()
        if worker.forwarding.is_on:
            head.block = worker.forwarding.of_block(head.block, b"2" if self.protocol == HTTP2 else b"1.%d" % head.minor)
        wall = worker.wall()
        grant = check_token(head, worker.checker, wall)
        entry = worker.routes.get(head.host)
        decision = admit(head, grant, entry.route if entry else None, False, wall)
        if isinstance(decision, Refuse):
            self._refuse_decided(decision, entry)
        elif entry is not None and entry.limiter is not None and not self._count_request(entry.route.session, entry.limiter):
            if isinstance(decision, Forward | Hold):
                limited = "more requests or connections than the endpoint's limits allow (edge.limits)"
                self.fault((entry.route.session, entry.route.incarnation, decision.port), limited)
            self.refuse(replies.LIMITED)
        elif isinstance(decision, Forward) and entry is not None and not isinstance(grant, Refuse):
            self._forward(decision.port, entry, head, grant, wall)
        else:
            session = "" if isinstance(grant, Refuse) else grant.session
            self.run(self._slow(head, session, lambda route, is_known: admit(head, grant, route, is_known, wall)))

    def _forward(self, port: int, entry: RouteEntry, head: RequestHead, grant: Grant, wall: float) -> None:
        route = entry.route
        key = (route.session, route.incarnation, port)
        if head.is_memorable and not head.wants_h2:
            self.remember(
                CachedAdmission(head.host, route, self.worker.checker, grant.expires, key, entry.account, head.block, head.keep_alive)
            )
        origin = self.worker.upstream.ready(key, head, self.began) if port != SHELL_PORT else None
        if origin is None:
            self.run(self._slow(head, grant.session, lambda route, is_known: admit(head, grant, route, is_known, wall)))
        else:
            self._start(origin, entry)

    # ---- tunnels: what counts ----

    def tunnel_in(self, data: bytes) -> None:
        """Takes what the client sends in a tunnel. Pings and pongs are no activity, and to a stream that is parked we answer a ping
        ourselves: background tabs and keep-alives do not wake a session."""
        frames, origin = self.client_frames, self.origin
        if frames is None and self.server_frames is not None:
            frames = self.client_frames = FrameCounter()
        control = frames.only_control(data) if frames is not None else None
        if control is None:
            if frames is not None:
                frames.feed(data)
            self.account.count += 1
            self.account.spoken += 1
            self.account.last = self.worker.time()
        elif self.is_parked and self._answer_pings(control):
            return  # nothing for the application
        else:
            # The latest alone: a pong answers those before it too (RFC 6455, 5.5.3).
            self.unanswered_pings = [frame for frame in control if frame[0] == PING] or self.unanswered_pings
        if origin is not None:
            if self._limiter is not None:
                self.throttle(len(data))
            origin.send(data)

    @property
    def is_parked(self) -> bool:
        """Whether the session sleeps, so that the stream goes on when it wakes."""
        return self.origin is not None and self.origin.is_parked

    def _answer_pings(self, control: list[tuple[int, bytes]]) -> bool:
        server = self.server_frames
        if server is not None and server.is_closed:
            return True  # the application has ended its half, and so has nothing to say
        if server is None or not server.at_boundary:
            return False
        pongs = b"".join(pong(payload) for opcode, payload in control if opcode == PING)
        if pongs:
            self.tunnel_write(pongs)
        return True

    def tunnel_out(self, data: bytes) -> bool:
        """Looks at what the application sends in a tunnel, and returns whether it is activity: nothing but pings and pongs is none. A
        pong answers the PINGs that were forwarded."""
        server = self.server_frames
        control = server.only_control(data) if server is not None else None
        if control is not None and self.unanswered_pings and any(opcode == PONG for opcode, _ in control):
            self.unanswered_pings = []
        return control is None

    def parked(self) -> None:
        """Answers the PINGs that the application has left unanswered, because it is about to freeze and its client would give up."""
        unanswered_pings, self.unanswered_pings = self.unanswered_pings, []
        if unanswered_pings:
            self._answer_pings(unanswered_pings)

    # ---- limits ----

    @property
    def joined(self) -> dict[str, Limiter]:
        """Returns the limiters that count this connection, by session; it leaves them when it closes."""
        raise AssertionError

    def _count_request(self, session: str, limiter: Limiter) -> bool:
        """Counts this connection, once, and this request for the session; returns False where either is one too many."""
        self._limiter = limiter
        if session not in self.joined:
            if not limiter.join():
                return False
            self.joined[session] = limiter
        return limiter.take()

    def throttle(self, size: int) -> None:
        """Bytes of a body, or of a tunnel, pass in either direction: where they are too many a second, both sides wait. An answer over
        HTTP/2 that came whole waits itself (`Request.response_whole`)."""
        delay = self._limiter.spend(size) if self._limiter is not None else 0.0
        if delay and self.origin is not None:
            self.origin.pause(THROTTLED)
            self.hold_back(delay)

    def hold_back(self, delay: float) -> None:
        """Reads neither the client nor the application for so many seconds."""
        if self._throttle is None:
            self._throttle = asyncio.get_running_loop().call_later(delay, self._unthrottle)
            self.pause_reading(THROTTLED)

    def _unthrottle(self) -> None:
        self._throttle = None
        self.resume_reading(THROTTLED)
        if self.origin is not None:
            self.origin.resume(THROTTLED)

    # ---- what has to wait ----

    async def _slow(
        self, head: RequestHead, session: str, decide: Callable[[Route | None, bool], Decision], first: Failure | None = None
    ) -> None:
        """Decides again after each wait, because the route may have changed meanwhile; the token was checked when the request opened,
        and one that expires while its request is held is still good. `first` is what became of the request before this attempt."""
        worker = self.worker
        deadline = worker.time() + worker.settings.hold_seconds
        is_known = False
        key: Key = ("", 0, 0)
        try:
            while True:
                entry = worker.routes.get(head.host)
                decision = decide(entry.route if entry else None, is_known)
                if isinstance(decision, Lookup):
                    is_known = await worker.lookup(head.host, session)
                    if not is_known:
                        self.refuse(replies.NOT_KNOWN_NOW)
                        return
                    continue
                if isinstance(decision, Refuse) or entry is None:
                    self._refuse_decided(decision if isinstance(decision, Refuse) else replies.UNAVAILABLE, entry)
                    return
                key = (entry.route.session, entry.route.incarnation, decision.port)
                if isinstance(decision, Hold):
                    await self._wait(entry, deadline, decision.port)
                elif await self._connect(entry, decision.port, head, deadline):
                    return
        except HoldFull as error:
            self.fault(key, str(error))
            self.refuse(replies.TOO_MANY)
        except TimeoutError:
            self.fault(key, f"the MicroVM could not take the request within {worker.settings.hold_seconds:g} s (edge.hold_seconds)")
            self.refuse(replies.NOT_IN_TIME)
        except (ConnectFailed, SessionGone) as error:
            self.fault(key, first.reason if first is not None else str(error))
            self.refuse(replies.UNAVAILABLE)
        except Exception:
            log.exception("edge.exchange_failed", session=key[0])
            self.fault(key, "the service failed; its own log says more")
            self.refuse(replies.FAILED)
        finally:
            if self._task is asyncio.current_task():  # and not one that tries again
                self._task = None

    async def _wait(self, entry: RouteEntry, deadline: float, port: int) -> None:
        worker = self.worker
        now = worker.time()
        self._held_since = self._held_since or now
        entry.account.count += 1
        entry.account.last = now
        resume = await worker.holds.wait(entry.route, max(0.0, deadline - now), self, port)
        self.held_seconds = worker.time() - self._held_since
        if worker.spans.is_on:
            worker.spans.hold(self.held_seconds, entry.route.session, self._traceparent())
        self._timing = f"hold;dur={self.held_seconds * 1000:.1f}, resume;dur={resume * 1000:.1f}"

    def _traceparent(self) -> str:
        """Returns the request's own trace context (W3C Trace Context, 3.2)."""
        match = _TRACEPARENT.search(self.head.block) if self.head is not None else None
        return match[1].decode("latin-1") if match is not None else ""

    async def _connect(self, entry: RouteEntry, port: int, head: RequestHead, deadline: float) -> bool:
        """Connects and starts the exchange; returns False when the route changed meanwhile and must be looked at again."""
        worker, route = self.worker, entry.route
        self._start_waiting(entry.account)
        started = worker.time()
        gone: SessionGone | None = None
        try:
            if port == SHELL_PORT:
                origin: OriginSide = await worker.upstream.shell(route, head.token or "")
            else:
                origin = await worker.upstream.connect(route, port, entry.opened_at, head, self._tried_again, deadline, self)
        except SessionGone as error:
            # Not waited for here: while a compiled coroutine waits inside `except`, whatever is raised elsewhere gets this for a context.
            gone = error
        except ConnectFailed:
            self._stop_waiting()
            current = worker.routes.get(route.endpoint)
            if current is None or current.route is route:
                raise
            return False
        if gone is not None:
            # vmm knows more than our table: control will tell us, or has to be asked again.
            self._stop_waiting()
            if worker.time() > deadline:
                raise gone
            await asyncio.sleep(_STALE_SECONDS)
            return False
        if self._held_since:
            self._timing += f", connect;dur={(worker.time() - started) * 1000:.1f}"
        self._start(origin, entry)
        return True

    def _refuse_decided(self, refusal: Refuse, entry: RouteEntry | None) -> None:
        """Refuses, and tells the microVM's log where no request may wake it: whatever else admission refuses is the client's fault."""
        if entry is not None and refusal is NOT_RUNNING:
            self.worker.report_fault(entry.route.session, f"a request was refused: {refusal.why}")
        self.refuse(refusal)

    def held_too_much(self, ticket: Ticket) -> None:
        """Refuses a request of whose body more came than may be held with it."""
        self.fault(ticket.key, TOO_MANY_BYTES)
        self.cancel()
        self.refuse(replies.TOO_MANY)

    def fault(self, key: Key, text: str) -> None:
        """Has the access log and the microVM's log say why the answer is ours and not that of the application at `key`."""
        self.reason = text
        port = f"port {key[2]}" if key[2] != SHELL_PORT else "shell"
        self.worker.report_fault(key[0], f"{port}: {text}")

    # ---- forwarding ----

    def _start_waiting(self, account: Account) -> None:
        self.account = account
        account.count += 1
        account.last = self.worker.time()
        if not self._waiting:
            account.waiting += 1
            self._waiting = True

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            account = self.account
            account.waiting -= 1
            if account.when_answered is not None and not account.waiting:
                account.when_answered.set()
            account.count += 1
            account.last = self.worker.time()

    def _start(self, origin: OriginSide, entry: RouteEntry) -> None:
        """Sends the head, and whatever of the body is here, to the application."""
        head = self.head
        assert head is not None
        self._start_waiting(entry.account)
        self.origin = origin
        origin.open(self, head)
        if origin.is_paused:
            self.pause_reading(PEER_SLOW)
        self.send_read_ahead()

    def unread(self, now: float) -> None:
        """Begins a request whose head could not be read, or did not come in time: it has an id and an answer, and names nothing."""
        self.began = now
        self.counted = False
        self.request_id = self.counters.request_id()

    def record(self, closed_by: str = "") -> None:
        """Counts the exchange, which has ended, once. `closed_by` is client or origin where this is not its usual end."""
        if self.counted:
            return
        self.counted = True
        counters = self.counters
        counters.count(self.protocol, self.status)
        if counters.access is not None:
            counters.access.add(self._record(closed_by))

    def _record(self, closed_by: str) -> RequestRecord:
        head, cached = self.head, self.cached
        host, method, target = "", b"", b""
        if head is not None:
            host, method, target = head.host, head.method, head.target
        elif cached is not None:
            host = cached.admission.host
            method, target, _ = cached.rewritten.split(b" ", 2)
        return RequestRecord(
            self.request_id, self.peer, self.protocol, host, method, target, self.status, self.sent, self.began, self.first_byte,
            self.worker.time(), self.held_seconds, closed_by, self.reason,
        )  # fmt: skip

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs the exchange's one task, which ends with the exchange."""
        self._task = self.worker.spawn(work)

    def cancel(self) -> None:
        """Stops whatever waits or runs for a client that is gone, or has reset its stream."""
        if self._task is not None:
            self._task.cancel()
        self._stop_waiting()
        origin, self.origin = self.origin, None
        if origin is not None:
            origin.cancel()
