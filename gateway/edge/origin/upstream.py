"""Connections to applications: made for the pools (origin/pool.py) of each incarnation, over TLS where the port speaks it, and ended with
their incarnation."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Protocol, cast

import structlog

from gateway.messages import NOTHING_LISTENS, Route, ShellRequest
from gateway.reach import reach
from gateway.rpc import Client, RpcError

from ..policy.admission import SHELL_PORT
from ..policy.head_cache import HeadCache
from ..policy.holds import Held, HoldFull, Ticket
from ..policy.keys import Key
from ..sides import OriginContext, Parkable
from ..wire.http1_head import RequestHead
from .dial import UnclaimedConnection
from .http1 import Origin
from .http2 import Http2Origin, OriginStream
from .parking import Parking, ParkingContext
from .pool import CONNECTIONS_MOST, PLAIN, TLS, TLS_PROBING, TLS_UNKNOWN, Pool, Slot, Waiter
from .shell import ShellOrigin
from .sockets import SessionGone, Sockets

log = structlog.get_logger()

_RAMP_SECONDS = 0.1
_RETRY_SECONDS = 0.02
_ASK_AGAIN_SECONDS = 0.1  # of an application that is starting
_PORTS_ASKED = 8  # at once, of one incarnation: each question takes sockets from vmm
_COLUMNS, _ROWS = 80, 24  # of a shell, until its client says
_SYN_SECONDS = 10.0
_TLS_SECONDS = 3.0  # for a handshake with an application, which may be emulated; one that has no TLS may just be silent
_H2_SECONDS = 5.0  # an application that was said to speak HTTP/2 sends its SETTINGS within this


class ConnectFailed(Exception):
    """The application could not be reached; the client is told 502."""


class UpstreamContext(ParkingContext, Protocol):
    """What Upstream needs of the worker."""

    heads: HeadCache

    async def open_shell(self, request: ShellRequest) -> int:
        """Asks control for a shell, and returns our end of its socket. Raises RpcError."""


class _ByAlpn(asyncio.Protocol):
    """Makes the protocol that the TLS handshake agreed on."""

    def __init__(self, upstream: Upstream, pool: Pool) -> None:
        self._upstream, self._pool = upstream, pool
        self.made: Origin | Http2Origin | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        self.made = self._upstream.new(self._pool, tls is not None and tls.selected_alpn_protocol() == "h2", is_secure=True)
        cast(asyncio.Transport, transport).set_protocol(cast(asyncio.Protocol, self.made))
        self.made.connection_made(transport)


class Incarnation:
    """Keeps what this worker has of one incarnation of a session: its pools, sockets and shells. All of it ends with the incarnation
    (`Upstream.incarnation_ended`)."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets
        self.pools: dict[int, Pool] = {}  # by port
        self.preconnected: dict[int, asyncio.Task[UnclaimedConnection]] = {}  # by port: one connection, made before the first request came
        self.askers = asyncio.Semaphore(_PORTS_ASKED)
        self.listened: set[int] = set()  # ports, as any worker has seen
        self.shells: set[ShellOrigin] = set()

    @property
    def connections(self) -> list[Parkable]:
        return [*[connection for pool in self.pools.values() for connection in pool.connections], *self.shells]


class Upstream:
    def __init__(self, worker: UpstreamContext, vmm: Client) -> None:
        self._worker = worker
        self._settings = worker.settings
        self._vmm = vmm
        self._loop = asyncio.get_running_loop()
        self.parking = Parking(worker, self.adopt)
        self._context = OriginContext(self._settings, self._loop.time, worker.heads.responses, self.parking.wake, self.parking.discard)
        self._incarnations: dict[tuple[str, int], Incarnation] = {}
        self._pools: dict[Key, Pool] = {}  # those of all incarnations, for the fast path
        self._spoke_tls: dict[str, dict[int, bool | None]] = {}  # by session and port, through its sleep: whether HTTP/2 was agreed on
        self._seen: list[Key] = []  # ports that have listened, and that the other workers are not told of yet
        self._contexts = {alpn: _client_context(list(alpn)) for alpn in (("h2", "http/1.1"), ("http/1.1",))}

    def take_idle(self, key: Key, now: float, is_safe: bool) -> Origin | None:
        """Returns a connection that waits, if there is one: the fast path. `is_safe`: the request can be sent once more (RFC 9110,
        9.2.1)."""
        pool = self._pools.get(key)
        return pool.take(now, is_safe) if pool is not None else None

    def ready(self, key: Key, head: RequestHead, now: float) -> Origin | OriginStream | None:
        """Returns a connection or stream that is there already, or None."""
        pool = self._pools.get(key)
        return pool.ready(head, now) if pool is not None else None

    def incarnation(self, session: str, incarnation: int) -> Incarnation:
        found = self._incarnations.get((session, incarnation))
        if found is None:
            found = self._incarnations[session, incarnation] = Incarnation(Sockets(self._vmm, session, incarnation))
        return found

    def pool(self, key: Key) -> Pool:
        pool = self._pools.get(key)
        if pool is None:
            incarnation = self.incarnation(key[0], key[1])
            pool = self._pools[key] = incarnation.pools[key[2]] = Pool(key)
            pool.has_listened = key[2] in incarnation.listened
            spoke_tls = self._spoke_tls.get(key[0])
            if spoke_tls is not None and key[2] in spoke_tls:
                pool.tls, pool.speaks_h2 = TLS, spoke_tls[key[2]]
        return pool

    # ---- connecting ----

    async def connect(
        self, route: Route, port: int, opened_at: float, head: RequestHead, fresh: bool, deadline: float, request: Held
    ) -> Origin | OriginStream:
        """Returns a connection, or stream, for one exchange; `fresh`: none that was used before. A request that waits for the
        application's first listen is held, and counted as such. Raises ConnectFailed, SessionGone, HoldFull."""
        pool = self.pool((route.session, route.incarnation, port))
        lease = None if pool.must_wait(head) else pool.acquire(head, fresh, self._loop.time())
        if lease is None:
            ticket = None if pool.has_listened else self._worker.holds.enter(route, request, port)
            try:
                lease = await self._wait(pool, head, fresh, deadline)
            finally:
                if ticket is not None:
                    self._worker.holds.leave(route, request, ticket)
        if not isinstance(lease, Slot):
            return lease
        try:
            return await self._connect_patiently(pool, lease, head, opened_at + self._settings.connect_seconds, deadline, route, request)
        finally:
            pool.free(lease, self._loop.time())

    async def _wait(self, pool: Pool, head: RequestHead, fresh: bool, deadline: float) -> Origin | OriginStream | Slot:
        """Waits in the queue for a connection, which is served in order and bounded, and no longer than until `deadline`."""
        if pool.waiting >= self._settings.held_requests:
            raise HoldFull("more requests wait for a connection than are held (edge.held_requests)")
        waiter = Waiter(head, fresh, self._loop.create_future())
        pool.wait(waiter)
        self._ramp_later(pool)
        try:
            async with asyncio.timeout_at(deadline):
                lease = await waiter.lease
        except BaseException as error:
            pool.withdraw(waiter, self._loop.time())
            if isinstance(error, TimeoutError):
                if not pool.has_listened:
                    raise ConnectFailed(NOTHING_LISTENS) from error
                in_use = f"{len(pool.open)} of at most {CONNECTIONS_MOST} connections are in use"
                raise ConnectFailed(f"no connection came free in {self._settings.hold_seconds:g} s: {in_use}") from error
            raise
        if lease is None:
            raise ConnectFailed("the MicroVM was suspended")
        return lease

    def _ramp_later(self, pool: Pool) -> None:
        if not pool.ramping and pool.allowed < CONNECTIONS_MOST:
            pool.ramping = True
            self._loop.call_later(_RAMP_SECONDS, self._ramp, pool)

    def _ramp(self, pool: Pool) -> None:
        pool.ramping = False
        if pool.waiting and not pool.has_ended:
            pool.ramp(self._loop.time())
            self._ramp_later(pool)

    async def _connect_patiently(
        self, pool: Pool, slot: Slot, head: RequestHead, until: float, deadline: float, route: Route, request: Held
    ) -> Origin | OriginStream:  # fmt: skip
        """Tries until `until` where an application refuses, because a freshly resumed one may not listen yet; one that has listened and
        refuses later is just down. One that has not listened in this incarnation is starting: it is waited for until `deadline`."""
        turn: asyncio.Semaphore | None = None
        ticket: Ticket | None = None
        try:
            while True:
                made = await self._connect_or_none(pool, slot, head)
                if made is not None:
                    return made
                now = self._loop.time()
                if now <= until and now <= deadline:
                    await asyncio.sleep(_RETRY_SECONDS)
                elif pool.has_listened or now > deadline:
                    raise ConnectFailed(NOTHING_LISTENS)
                elif turn is not None:
                    await asyncio.sleep(_ASK_AGAIN_SECONDS)
                else:
                    ticket = self._worker.holds.enter(route, request, pool.key[2])
                    turn = await self._until_turn(pool, deadline)
        finally:
            if ticket is not None:
                self._worker.holds.leave(route, request, ticket)
            if turn is not None:
                turn.release()
                pool.asking.release()

    async def _until_turn(self, pool: Pool, deadline: float) -> asyncio.Semaphore:
        """Waits for the right to ask an application that is starting, and returns what gives it back, beside `pool.asking`: one request
        asks for all of its port, so that they do not take the processor from the application, and no more than a few ports are asked at
        once, however many a client tries. Raises ConnectFailed."""
        incarnation = self._incarnations.get(pool.key[:2])
        if incarnation is None:
            raise ConnectFailed("the MicroVM was suspended")
        try:
            async with asyncio.timeout_at(deadline):
                await pool.asking.acquire()
                try:
                    await incarnation.askers.acquire()
                except BaseException:
                    pool.asking.release()
                    raise
        except TimeoutError as error:
            raise ConnectFailed(NOTHING_LISTENS) from error
        return incarnation.askers

    async def _connect_or_none(self, pool: Pool, slot: Slot, head: RequestHead) -> Origin | OriginStream | None:
        """Tries to connect; returns None where the application refuses. Raises ConnectFailed, SessionGone."""
        try:
            return await self._connect_once(pool, slot, head)
        except ConnectionRefusedError:
            return None
        except TimeoutError as error:
            raise ConnectFailed("the application does not answer connects") from error
        except ssl.SSLError as error:
            raise ConnectFailed(f"the TLS handshake failed: {error.reason or error}") from error
        except OSError as error:
            raise ConnectFailed(f"the application could not be connected to: {error.strerror or error}") from error

    async def _connect_once(self, pool: Pool, slot: Slot, head: RequestHead) -> Origin | OriginStream:
        """Tries to connect once. Raises OSError, TimeoutError, ConnectFailed, SessionGone."""
        incarnation = self._incarnations.get(pool.key[:2])
        if pool.has_ended or incarnation is None:
            raise ConnectFailed("the MicroVM was suspended")
        made = await self._preconnected(incarnation, pool, head) or await self._dial(incarnation, pool, head)
        try:
            if isinstance(made, Http2Origin):
                await self._until_settings(made)
            if pool.has_ended:
                raise ConnectFailed("the MicroVM was suspended")
            if made.is_closing:
                raise ConnectFailed("the application closed the connection at once")
        except BaseException:
            made.cut()
            raise
        now = self._loop.time()
        if not isinstance(made, Http2Origin):
            pool.add(slot, made, now)
            return made
        stream = made.reserve()
        pool.add_shared(slot, made, now)
        return stream

    async def _until_settings(self, connection: Http2Origin) -> None:
        """An application that speaks HTTP/2 begins with SETTINGS (RFC 9113, 3.4)."""
        try:
            async with asyncio.timeout(_H2_SECONDS):
                if await asyncio.shield(connection.ready):
                    return
        except TimeoutError:
            pass
        raise ConnectFailed("the application does not speak HTTP/2: no SETTINGS came first (RFC 9113, 3.4)")

    async def _dial(self, incarnation: Incarnation, pool: Pool, head: RequestHead) -> Origin | Http2Origin:
        is_secure = pool.tls in (TLS_PROBING, TLS)
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(_SYN_SECONDS):
                sock = await reach(incarnation.sockets.take, pool.key[2])
                self._saw(pool)
                if is_secure:
                    made = await self._handshake(sock, pool, head)
                else:
                    made = self.new(pool, head.wants_h2, is_secure=False)
                    await self._loop.create_connection(lambda: cast(asyncio.Protocol, made), sock=sock)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if pool.tls == TLS_PROBING:
                pool.tls = PLAIN if isinstance(error, OSError) else TLS_UNKNOWN
            raise
        if is_secure:
            pool.tls = TLS
        return made

    async def _handshake(self, sock: socket.socket, pool: Pool, head: RequestHead) -> Origin | Http2Origin:
        """Shakes hands in TLS. A WebSocket's handshake is one of HTTP/1.1 (RFC 6455, 4.1), so for that no other is offered."""
        by_alpn = _ByAlpn(self, pool)
        alpn = ("http/1.1",) if head.upgrade is not None else ("h2", "http/1.1")
        try:
            await self._loop.create_connection(
                lambda: by_alpn,
                sock=sock,
                ssl=self._contexts[alpn],
                server_hostname=head.host or "localhost",
                ssl_handshake_timeout=_TLS_SECONDS,
            )
        except OSError:
            if pool.tls == TLS:
                pool.tls = TLS_UNKNOWN  # another application listens there now
            raise
        assert by_alpn.made is not None
        if head.upgrade is None:
            pool.speaks_h2 = by_alpn.made.is_shared
        return by_alpn.made

    def _saw(self, pool: Pool) -> None:
        """Notes that the application listens. That it refuses from now on means that it is down, also to the other workers."""
        if not pool.has_listened:
            pool.has_listened = True
            self._seen.append(pool.key)

    def take_seen(self) -> list[Key]:
        """Returns the ports that have listened since it was called last."""
        seen, self._seen = self._seen, []
        return seen

    def others_saw(self, key: Key) -> None:
        self.incarnation(key[0], key[1]).listened.add(key[2])
        if (pool := self._pools.get(key)) is not None:
            pool.has_listened = True

    def new(self, pool: Pool, http2: bool, is_secure: bool) -> Origin | Http2Origin:
        return Http2Origin(self._context, pool, is_secure) if http2 else Origin(self._context, pool, is_secure)

    def try_tls(self, key: Key) -> bool:
        """Makes the port's next connection try TLS, because its first answer was not HTTP; returns False where TLS is known to fail. It is
        tried once for a port and incarnation: a handshake that succeeds shows that the application never took the request for one."""
        pool = self._pools.get(key)
        if pool is None or pool.tls == PLAIN:
            return False
        if pool.tls == TLS_UNKNOWN:
            pool.tls = TLS_PROBING
        return True

    # ---- ahead of the first request ----

    def preconnect(self, route: Route, port: int) -> None:
        """Begins one connection to a guest that is about to run: its SYN waits in the link, and the first request takes it."""
        incarnation = self.incarnation(route.session, route.incarnation)
        if port > 0 and port not in incarnation.preconnected:
            task = incarnation.preconnected[port] = self._loop.create_task(self._preconnect(incarnation, port))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _preconnect(self, incarnation: Incarnation, port: int) -> UnclaimedConnection:
        async with asyncio.timeout(_SYN_SECONDS):
            sock = await reach(incarnation.sockets.take, port)
            try:
                return (await self._loop.create_connection(UnclaimedConnection, sock=sock))[1]
            except BaseException:
                sock.close()
                raise

    async def _preconnected(self, incarnation: Incarnation, pool: Pool, head: RequestHead) -> Origin | Http2Origin | None:
        """Returns the preconnected connection, or None where there is none. One that failed is None, too: an application that refused
        it then may listen by now."""
        task = incarnation.preconnected.pop(pool.key[2], None)
        if task is None:
            return None
        try:
            unread = await task
        except (OSError, TimeoutError, SessionGone):
            return None
        if unread.transport.is_closing():
            return None
        if pool.has_ended or pool.tls in (TLS_PROBING, TLS):  # which begins with the first byte
            unread.transport.abort()
            return None
        self._saw(pool)
        made = self.new(pool, head.wants_h2, is_secure=False)
        unread.hand_over(cast(asyncio.Protocol, made))
        return made

    def prefetch(self, route: Route) -> None:
        """Fetches sockets when a route opens, before the first request needs one."""
        self.incarnation(route.session, route.incarnation).sockets.prefetch()

    # ---- shells ----

    async def shell(self, route: Route, token: str) -> ShellOrigin:
        """Opens a new shell in the session for whoever has this token, which control checks again. Raises ConnectFailed."""
        try:
            descriptor = await self._worker.open_shell(ShellRequest(route.session, route.incarnation, _COLUMNS, _ROWS, token))
        except RpcError as error:
            raise ConnectFailed(str(error)) from error
        origin = ShellOrigin(self._context, (route.session, route.incarnation, SHELL_PORT), socket.socket(fileno=descriptor))
        self.add_shell(origin)
        return origin

    def add_shell(self, origin: ShellOrigin) -> None:
        shells = self.incarnation(origin.key[0], origin.key[1]).shells
        shells -= {shell for shell in shells if shell.is_closed}
        shells.add(origin)

    # ---- ends ----

    def incarnation_ended(self, session: str, incarnation: int, park: int = 0, one_way: bool = False) -> int:
        """Closes everything of an incarnation that ends, but up to `park` silent streams; returns how many those are. `one_way`: also
        streams on which only the server speaks."""
        ended = self._incarnations.pop((session, incarnation), None)
        if ended is None:
            return 0
        connections = ended.connections
        for pool in ended.pools.values():
            del self._pools[pool.key]
            pool.incarnation_ended()
        self._remember_tls(session, ended)
        parked = 0
        for connection in connections:
            parked += self._park_or_cut(connection, park - parked, one_way)
        for task in ended.preconnected.values():
            _drop(task)
        ended.sockets.close()
        return parked

    def _remember_tls(self, session: str, ended: Incarnation) -> None:
        """Remembers which ports spoke TLS: the application is the same when it is woken, and a request with content that wakes it cannot be
        sent once more to find out."""
        spoke_tls = self._spoke_tls.get(session, {})
        for port, pool in ended.pools.items():
            if pool.tls == TLS:
                spoke_tls[port] = pool.speaks_h2
            else:
                spoke_tls.pop(port, None)
        if spoke_tls:
            self._spoke_tls[session] = spoke_tls
        else:
            self.forget(session)

    def forget(self, session: str) -> None:
        """Forgets what is remembered of a session, which will not run again."""
        self._spoke_tls.pop(session, None)

    def _park_or_cut(self, connection: Parkable, room: int, one_way: bool) -> int:
        """Parks a connection, and returns how many streams that were, or cuts it. What fails here is this connection's alone."""
        try:
            count = connection.parkable(one_way)
            if 0 < count <= room and connection.is_silent(one_way):
                connection.park(one_way)
                self.parking.add(connection)
                return count
            connection.cut()
        except Exception:
            log.exception("edge.connection_not_ended", session=connection.key[0])
        return 0

    def close_idle(self, session: str, incarnation: int) -> None:
        """Closes idle connections of a session that is about to fall asleep: what the guest does about their ends it does now, not when it
        is woken."""
        found = self._incarnations.get((session, incarnation))
        if found is not None:
            for pool in found.pools.values():
                for origin in list(pool.idle):
                    pool.close(origin)

    def is_busy(self, session: str, incarnation: int, one_way: bool) -> bool:
        """Whether something is under way on a stream that may be parked, or has yet to be acknowledged by the guest."""
        found = self._incarnations.get((session, incarnation))
        return found is not None and any(
            connection.parkable(one_way) and not connection.is_silent(one_way) for connection in found.connections
        )

    def adopt(self, connection: Parkable, incarnation: int) -> None:
        """Takes a parked connection into the pools of this incarnation, where its streams go on."""
        session, _, port = connection.key
        if isinstance(connection, ShellOrigin):
            connection.key = (session, incarnation, port)
            self.add_shell(connection)
        elif isinstance(connection, Origin | Http2Origin):
            self.pool((session, incarnation, port)).adopt(connection)
        connection.unpark()

    def close(self) -> None:
        """Closes everything, because the worker ends."""
        for (session, incarnation), found in list(self._incarnations.items()):
            found.sockets.abort()
            self.incarnation_ended(session, incarnation)
        self._vmm.close()

    def sweep(self, now: float) -> None:
        """Closes connections that have been idle for long, and those ahead that nobody came for; forgets ports that were asked for and on
        which nothing has listened."""
        for found in self._incarnations.values():
            for port, task in list(found.preconnected.items()):
                if task.done() and (task.cancelled() or task.exception() is not None or port in found.pools):
                    _drop(found.preconnected.pop(port))
            for pool in list(found.pools.values()):
                pool.sweep(now)
                if pool.is_unused:
                    del found.pools[pool.key[2]], self._pools[pool.key]
                for connection in list(pool.shared):
                    if not connection.stream_count and now - connection.idle_since > self._settings.origin_idle_seconds:
                        connection.shut_down()

    # ---- what there is ----

    def pools(self) -> list[Pool]:
        return list(self._pools.values())

    def idle(self) -> list[Origin]:
        """Returns the connections that wait for their next request."""
        return [origin for pool in self._pools.values() for origin in pool.idle]

    def statistics(self) -> dict[str, int]:
        pools = self._pools.values()
        return {
            "open": sum(len(pool.open) for pool in pools),
            "idle": sum(len(pool.idle) for pool in pools),
            "multiplexed": sum(len(pool.shared) for pool in pools),
            "stock": sum(len(incarnation.sockets) for incarnation in self._incarnations.values()),
        }


def _drop(task: asyncio.Task[UnclaimedConnection]) -> None:
    """Closes a preconnected connection that no request has taken."""
    task.cancel()
    if task.done() and not task.cancelled() and task.exception() is None:
        task.result().transport.abort()


def _client_context(alpn: list[str]) -> ssl.SSLContext:
    """Makes the context towards a guest over its own link: its certificate proves nothing that the link does not, so it is not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(alpn)
    return context
