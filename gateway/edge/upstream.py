"""Connections to applications: pooled by session, port and incarnation, bounded, reused only when clean.

The worker gets unconnected sockets that live in the session's network namespace from vmm, a few ahead, and connects them
itself: a connect costs no call then, and whoever holds such a socket can reach that one guest and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Final, cast

from gateway.config import Edge
from gateway.messages import Route, ShellRequest, SocketsRequest
from gateway.rpc import Client, RpcError, RpcLost

from . import failures
from .admission import SHELL_PORT
from .dial import Unread, dial
from .parking import Parkable

if TYPE_CHECKING:
    from .exchange import Exchange, OriginSide
    from .head import RequestHead
    from .origin import Origin
    from .origin2 import Http2Origin
    from .shell import ShellOrigin
    from .worker import Worker

GUEST_ADDRESS = "169.254.77.2"
_STOCK = 8
_MOST: Final = 256  # connections to one port of one session; more requests wait in line
# What an application gets at once after a resume. More follows with each answer, and with time for those that answer late:
# a listen queue of the usual 100 or 128 must not overflow, because a lost SYN costs a second.
_FIRST = 64
_RAMP, _RAMP_SECONDS = 16, 0.1
_RETRY_SECONDS = 0.02
_COLUMNS, _ROWS = 80, 24  # of a shell, until its client says
_SYN_SECONDS = 10.0
_VMM_SECONDS = 10.0  # for sockets; a vmm that is restarted is there again within two or three
_FRESH_SECONDS: Final = 0.5  # idle for longer, a connection may have been closed by the application just now: it is looked at
_TLS_SECONDS = 3.0  # for a handshake with an application, which may be emulated; one that has no TLS may just be silent
_H2_SECONDS = 5.0  # an application that was said to speak HTTP/2 sends its SETTINGS within this
_H2_MOST = 16
Key = tuple[str, int, int]  # session, incarnation, port


class ConnectFailed(Exception):
    """The application could not be reached; the client is told 502."""


class SessionGone(Exception):
    """vmm has no such incarnation (any more): the route is stale."""


class Pool:
    """Connections of one (session, incarnation, port)."""

    __slots__ = ("allowed", "idle", "making", "multiplexed", "open", "ramping", "tls", "waiters")

    def __init__(self) -> None:
        self.idle: list[Origin] = []
        self.open: set[Origin] = set()
        self.multiplexed: list[Http2Origin] = []
        self.waiters: deque[asyncio.Future[None]] = deque()
        self.allowed = _FIRST
        self.ramping = False
        self.making = False  # a connection of HTTP/2, which will serve many: they wait for it
        self.tls: bool | None = None  # whether the port speaks TLS; None: not known yet

    def all(self) -> list[Origin | Http2Origin]:
        return [*self.open, *self.multiplexed]


class _ByAlpn(asyncio.Protocol):
    """Makes the protocol that the TLS handshake agreed on."""

    def __init__(self, upstream: Upstream, key: Key, pool: Pool) -> None:
        self._upstream, self._key, self._pool = upstream, key, pool
        self.made: Origin | Http2Origin | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        self.made = self._upstream.new(self._key, self._pool, tls is not None and tls.selected_alpn_protocol() == "h2", b"https")
        cast(asyncio.Transport, transport).set_protocol(cast(asyncio.Protocol, self.made))
        self.made.connection_made(transport)


class Upstream:
    def __init__(self, worker: Worker, vmm: Client, settings: Edge) -> None:
        self._worker = worker
        self._vmm = vmm
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._pools: dict[Key, Pool] = {}
        self._stock: dict[tuple[str, int], deque[int]] = {}
        self._fetching: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ahead: dict[Key, asyncio.Task[Unread]] = {}
        self._shells: dict[tuple[str, int], set[ShellOrigin]] = {}
        self._contexts = {alpn: _client_context(list(alpn)) for alpn in (("h2", "http/1.1"), ("http/1.1",))}

    def take_idle(self, key: Key, now: float) -> Origin | None:
        """A clean connection that waits, if there is one: the fast path."""
        pool = self._pools.get(key)
        while pool is not None and pool.idle:
            origin = pool.idle.pop()
            if not origin.is_closing and (now - origin.idle_since < _FRESH_SECONDS or origin.is_quiet):
                return origin
            origin.close()
        return None

    def give_back(self, origin: Origin) -> None:
        """A connection whose exchange ended cleanly."""
        pool = self._pools.get(origin.key)
        if pool is None or origin.is_closing:
            origin.close()
            return
        assert origin.is_reusable
        origin.idle_since = self._loop.time()
        pool.idle.append(origin)
        if pool.allowed < _MOST:
            pool.allowed += 1
        if pool.waiters:
            self._wake(pool)

    def forget(self, origin: Origin) -> None:
        """A connection that closed."""
        if origin.is_parked:
            self._worker.parking.discard(origin)
        pool = self._pools.get(origin.key)
        if pool is None:
            return
        pool.open.discard(origin)
        with contextlib.suppress(ValueError):
            pool.idle.remove(origin)
        self._wake(pool)

    def forget_multiplexed(self, origin: Http2Origin) -> None:
        if origin.is_parked:
            self._worker.parking.discard(origin)
        pool = self._pools.get(origin.key)
        if pool is not None:
            with contextlib.suppress(ValueError):
                pool.multiplexed.remove(origin)
            self._wake(pool)

    def freed(self, origin: Http2Origin) -> None:
        """A stream of it ended."""
        pool = self._pools.get(origin.key)
        if pool is not None and pool.waiters:
            self._wake(pool)

    # ---- connecting ----

    async def connect(self, route: Route, port: int, opened_at: float, head: RequestHead) -> OriginSide:
        """A connection, or stream, for one exchange. Raises ConnectFailed, SessionGone."""
        key = (route.session, route.incarnation, port)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool()
        while True:
            ready = self._ready(pool, key, head)
            if ready is not None:
                return ready
            if len(pool.open) < pool.allowed and len(pool.multiplexed) < _H2_MOST and not (head.wants_h2 and pool.making):
                break
            await self._turn(pool)
            if self._pools.get(key) is not pool:
                raise ConnectFailed("the MicroVM was suspended")
        pool.making = pool.making or head.wants_h2
        try:
            return await self._connect_patiently(key, pool, head, opened_at + self._settings.connect_seconds)
        finally:
            if head.wants_h2:
                pool.making = False
                for _ in range(len(pool.waiters)):
                    self._wake(pool)

    async def _connect_patiently(self, key: Key, pool: Pool, head: RequestHead, until: float) -> OriginSide:
        """A freshly resumed or launched application may not listen yet; one that has been up for a while is just down."""
        while True:
            try:
                return await self._ready_for_one(await self._connect_once(key, pool, head), pool)
            except ConnectionRefusedError as error:
                if self._loop.time() > until:
                    raise ConnectFailed(f"nothing listens on port {key[2]}") from error
                await asyncio.sleep(_RETRY_SECONDS)
            except (OSError, TimeoutError, ssl.SSLError) as error:
                raise ConnectFailed(str(error) or "no answer") from error

    def _ready(self, pool: Pool, key: Key, head: RequestHead) -> OriginSide | None:
        if head.wants_h2 or (pool.multiplexed and head.upgrade is None):
            for one in pool.multiplexed:
                if one.has_room and one.ready.done():
                    return one.new_stream()
        return None if head.wants_h2 else self.take_idle(key, self._loop.time())

    async def _turn(self, pool: Pool) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        pool.waiters.append(waiter)
        if not pool.ramping and pool.allowed < _MOST:
            pool.ramping = True
            self._loop.call_later(_RAMP_SECONDS, self._ramp, pool)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake(pool)  # it was this one's turn: the next in line takes it
            raise

    def _ramp(self, pool: Pool) -> None:
        pool.ramping = False
        pool.allowed = min(_MOST, pool.allowed + _RAMP)
        for _ in range(_RAMP):
            self._wake(pool)
        if pool.waiters and pool.allowed < _MOST:
            pool.ramping = True
            self._loop.call_later(_RAMP_SECONDS, self._ramp, pool)

    async def _connect_once(self, key: Key, pool: Pool, head: RequestHead) -> Origin | Http2Origin:
        ahead = await self._came_ahead(key)
        if ahead is not None and self._pools.get(key) is not pool:
            ahead.transport.abort()
            raise ConnectFailed("the MicroVM was suspended")
        if ahead is not None and pool.tls:
            ahead.transport.abort()  # it speaks TLS from its first byte on: one that is made for that
        elif ahead is not None:
            taken = self.new(key, pool, head.wants_h2, b"http")
            ahead.hand_over(cast(asyncio.Protocol, taken))
            return taken
        sock = socket.socket(fileno=await self._socket(key[:2]))
        sock.setblocking(False)
        reserved = self.new(key, pool, head.wants_h2, b"http") if not pool.tls else _ByAlpn(self, key, pool)
        try:
            async with asyncio.timeout(_SYN_SECONDS):
                await dial(sock, (GUEST_ADDRESS, key[2]))
                if isinstance(reserved, _ByAlpn):
                    context = self._contexts[("http/1.1",) if head.upgrade is not None else ("h2", "http/1.1")]
                    await self._loop.create_connection(
                        lambda: reserved,
                        sock=sock,
                        ssl=context,
                        server_hostname=head.host or "localhost",
                        ssl_handshake_timeout=_TLS_SECONDS,
                    )
                else:
                    await self._loop.create_connection(lambda: cast(asyncio.Protocol, reserved), sock=sock)
        except BaseException:
            sock.close()
            self._unreserve(reserved)
            raise
        made = reserved.made if isinstance(reserved, _ByAlpn) else reserved
        assert made is not None
        if key not in self._pools:  # the incarnation ended meanwhile
            made.cut()
            raise ConnectFailed("the MicroVM was suspended")
        return made

    def connect_ahead(self, route: Route, port: int) -> None:
        """One connection to a guest that is about to run: its SYN waits in the link. The first request takes it."""
        key = (route.session, route.incarnation, port)
        if port > 0 and key not in self._ahead:
            task = self._ahead[key] = self._loop.create_task(self._knock(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _came_ahead(self, key: Key) -> Unread | None:
        """The connection made ahead; None where there is none, or it failed: nobody was at home yet, which says nothing of now."""
        task = self._ahead.pop(key, None)
        try:
            made = await task if task is not None else None
        except (OSError, TimeoutError, SessionGone):
            return None
        return made if made is not None and not made.transport.is_closing() else None

    async def _knock(self, key: Key) -> Unread:
        sock = socket.socket(fileno=await self._socket(key[:2]))
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_SYN_SECONDS):
                await dial(sock, (GUEST_ADDRESS, key[2]))
                return (await self._loop.create_connection(Unread, sock=sock))[1]
        except BaseException:
            sock.close()
            raise

    def new(self, key: Key, pool: Pool, http2: bool, scheme: bytes) -> Origin | Http2Origin:
        """Counts as open from now on."""
        from .origin import Origin
        from .origin2 import Http2Origin

        if http2:
            multiplexed = Http2Origin(self._worker, self, key, scheme)
            pool.multiplexed.append(multiplexed)
            return multiplexed
        origin = Origin(self._worker, self, key)
        origin.seen = bool(pool.tls)
        pool.open.add(origin)
        return origin

    def _unreserve(self, reserved: Origin | Http2Origin | _ByAlpn) -> None:
        made = reserved.made if isinstance(reserved, _ByAlpn) else reserved
        if made is not None:
            made.forgotten()

    async def _ready_for_one(self, origin: Origin | Http2Origin, pool: Pool) -> OriginSide:
        """A new connection; of HTTP/2, its first stream."""
        from .origin2 import Http2Origin

        if not isinstance(origin, Http2Origin):
            return origin
        try:
            async with asyncio.timeout(_H2_SECONDS):
                if await asyncio.shield(origin.ready):
                    return origin.new_stream()
        except TimeoutError:
            pass
        origin.cut()
        origin.forgotten()
        raise ConnectFailed("the application does not speak HTTP/2")

    def try_tls(self, key: Key, exchange: Exchange) -> bool:
        """The port's first answer was not HTTP. Once for a port and incarnation, and only for a safe request, TLS is tried:
        a handshake that succeeds shows that the application never took the request for one."""
        pool, head = self._pools.get(key), exchange.head
        if pool is None or pool.tls is not None or head is None or not head.is_safe or exchange.response_started:
            return False
        exchange.origin = None
        pool.tls = True  # nobody else tries meanwhile
        exchange.run(self._over_tls(key, pool, head, exchange))
        return True

    async def _over_tls(self, key: Key, pool: Pool, head: RequestHead, exchange: Exchange) -> None:
        try:
            origin = await self._ready_for_one(await self._connect_once(key, pool, head), pool)
        except (OSError, TimeoutError, ssl.SSLError, ConnectFailed):
            pool.tls = False
            exchange.origin_failed(failures.UNANSWERED_FAILURE)
        except BaseException:
            pool.tls = None
            raise
        else:
            exchange.begin_again(origin)

    async def shell(self, route: Route) -> ShellOrigin:
        """A new shell in the session. Raises ConnectFailed."""
        from .shell import ShellOrigin

        session = (route.session, route.incarnation)
        try:
            request = ShellRequest(*session, _COLUMNS, _ROWS)
            _, (descriptor,) = await self._worker.control.call_with_descriptors("shell", request, timeout=5.0)
        except RpcError as error:
            raise ConnectFailed(str(error)) from error
        origin = ShellOrigin(self._worker, (*session, SHELL_PORT), socket.socket(fileno=descriptor))
        self.add_shell(origin)
        return origin

    def add_shell(self, origin: ShellOrigin) -> None:
        shells = self._shells.setdefault(origin.key[:2], set())
        shells -= {one for one in shells if one.is_over}
        shells.add(origin)

    # ---- sockets ----

    async def _socket(self, session: tuple[str, int]) -> int:
        while True:
            stock = self._stock.setdefault(session, deque())
            if len(stock) <= _STOCK // 4:
                task = self._fetching.get(session)
                if task is None:
                    task = self._fetching[session] = self._loop.create_task(self._fetch(session))
                if not stock:
                    await asyncio.shield(task)
                    continue
            return stock.popleft()

    async def _fetch(self, session: tuple[str, int]) -> None:
        request, until = SocketsRequest(*session, _STOCK), self._loop.time() + _VMM_SECONDS
        try:
            while True:
                try:
                    _, descriptors = await self._vmm.call_with_descriptors("sockets", request, timeout=5.0)
                    break
                except RpcLost:  # it is being restarted
                    if self._loop.time() > until:
                        raise
        except RpcError as error:
            if error.kind == "StateLost":
                raise SessionGone(str(error)) from error
            raise OSError(errno.EHOSTDOWN, str(error)) from error
        finally:
            self._fetching.pop(session, None)
        self._stock.setdefault(session, deque()).extend(descriptors)

    def prefetch(self, route: Route) -> None:
        """Sockets are fetched when a route opens, before the first request needs one."""
        session = (route.session, route.incarnation)
        if not self._stock.get(session) and session not in self._fetching:
            task = self._fetching[session] = self._loop.create_task(self._fetch(session))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    # ---- ends ----

    def end(self, session: str, incarnation: int, park: int = 0) -> int:
        """Closes everything of an incarnation that ends, but up to `park` silent streams; how many those are."""
        parked = 0
        for key in [key for key in self._pools if key[:2] == (session, incarnation)]:
            pool = self._pools.pop(key)
            for origin in pool.all():
                parked += self._end(origin, park - parked)
            for waiter in pool.waiters:
                if not waiter.done():
                    waiter.set_result(None)
        for key in [key for key in self._ahead if key[:2] == (session, incarnation)]:
            self._drop_ahead(self._ahead.pop(key))
        for shell in self._shells.pop((session, incarnation), ()):
            parked += self._end(shell, park - parked)
        for descriptor in self._stock.pop((session, incarnation), ()):
            os.close(descriptor)
        return parked

    def close_idle(self, session: str, incarnation: int) -> None:
        """Of a session that is about to fall asleep: what the guest does about their ends it does now, not when it is woken."""
        for key, pool in self._pools.items():
            if key[:2] == (session, incarnation):
                for origin in list(pool.idle):
                    origin.close()

    def _end(self, origin: Parkable, room: int) -> int:
        """Parks it, and says how many streams that were, or cuts it."""
        if not origin.can_park or origin.stream_count > room:
            origin.cut()
            return 0
        origin.park()
        self._worker.parking.add(origin)
        return origin.stream_count

    def is_busy(self, session: str, incarnation: int) -> bool:
        """Whether something is under way on a stream of it, or has yet to be acknowledged by the guest."""
        pools = [pool for key, pool in self._pools.items() if key[:2] == (session, incarnation)]
        origins: list[Parkable] = [one for pool in pools for one in pool.all()]
        return any(one.stream_count and not one.can_park for one in [*origins, *self._shells.get((session, incarnation), ())])

    def _drop_ahead(self, task: asyncio.Task[Unread]) -> None:
        task.cancel()
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result().transport.abort()

    def adopt(self, origin: Parkable, incarnation: int) -> None:
        """A stream that was parked goes on in this incarnation."""
        origin.key = (origin.key[0], incarnation, origin.key[2])
        origin.join(self)
        origin.unpark()

    def pool(self, key: Key) -> Pool:
        return self._pools.setdefault(key, Pool())

    def sweep(self, now: float) -> None:
        """Closes connections that have been idle for long, and those ahead that nobody came for."""
        for key, task in list(self._ahead.items()):
            if task.done() and (task.cancelled() or task.exception() is not None or key in self._pools):
                self._drop_ahead(self._ahead.pop(key))
        for pool in self._pools.values():
            for origin in [one for one in pool.idle if now - one.idle_since > self._settings.origin_idle_seconds]:
                origin.close()
            for multiplexed in list(pool.multiplexed):
                if not multiplexed.streams and now - multiplexed.idle_since > self._settings.origin_idle_seconds:
                    multiplexed.retire()

    def _wake(self, pool: Pool) -> None:
        while pool.waiters:
            waiter = pool.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def pools(self) -> list[Pool]:
        return list(self._pools.values())

    def idle(self) -> list[Origin]:
        """Connections that wait for their next request."""
        return [origin for pool in self._pools.values() for origin in pool.idle]

    def statistics(self) -> dict[str, int]:
        pools = self._pools.values()
        return {
            "open": sum(len(pool.open) for pool in pools),
            "idle": sum(len(pool.idle) for pool in pools),
            "multiplexed": sum(len(pool.multiplexed) for pool in pools),
            "stock": sum(len(stock) for stock in self._stock.values()),
        }


def _client_context(alpn: list[str]) -> ssl.SSLContext:
    """To a guest over its own link: its certificate proves nothing that the link does not, so it is not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(alpn)
    return context
