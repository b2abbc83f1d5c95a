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
from collections import deque
from typing import TYPE_CHECKING

from gateway.config import Edge
from gateway.messages import Route, SocketsRequest
from gateway.rpc import Client, RpcError

if TYPE_CHECKING:
    from .origin import Origin
    from .worker import Worker

GUEST_ADDRESS = "169.254.77.2"
_STOCK = 8
_MOST = 256  # connections to one port of one session; more requests wait in line
_RETRY_SECONDS = 0.02
_SYN_SECONDS = 10.0
Key = tuple[str, int, int]  # session, incarnation, port


class ConnectFailed(Exception):
    """The application could not be reached; the client is told 502."""


class SessionGone(Exception):
    """vmm has no such incarnation (any more): the route is stale."""


class Pool:
    """Connections of one (session, incarnation, port)."""

    __slots__ = ("idle", "open", "waiters")

    def __init__(self) -> None:
        self.idle: list[Origin] = []
        self.open: set[Origin] = set()
        self.waiters: deque[asyncio.Future[None]] = deque()


class Upstream:
    def __init__(self, worker: Worker, vmm: Client, settings: Edge) -> None:
        self._worker = worker
        self._vmm = vmm
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._pools: dict[Key, Pool] = {}
        self._stock: dict[tuple[str, int], deque[int]] = {}
        self._fetching: dict[tuple[str, int], asyncio.Task[None]] = {}

    def take_idle(self, key: Key) -> Origin | None:
        """A clean connection that waits, if there is one: the fast path."""
        pool = self._pools.get(key)
        while pool is not None and pool.idle:
            origin = pool.idle.pop()
            if not origin.is_closing:
                return origin
        return None

    def give_back(self, origin: Origin) -> None:
        """A connection whose exchange ended cleanly."""
        pool = self._pools.get(origin.key)
        if pool is None or origin.is_closing:
            origin.close()
            return
        origin.idle_since = self._loop.time()
        pool.idle.append(origin)
        self._wake(pool)

    def forget(self, origin: Origin) -> None:
        """A connection that closed."""
        pool = self._pools.get(origin.key)
        if pool is None:
            return
        pool.open.discard(origin)
        with contextlib.suppress(ValueError):
            pool.idle.remove(origin)
        self._wake(pool)

    async def connect(self, route: Route, port: int, opened_at: float) -> Origin:
        """A connection for one exchange. Raises ConnectFailed, SessionGone."""
        key = (route.session, route.incarnation, port)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool()
        while len(pool.open) >= _MOST:
            waiter: asyncio.Future[None] = self._loop.create_future()
            pool.waiters.append(waiter)
            await waiter
            origin = self.take_idle(key)
            if origin is not None:
                return origin
        # A freshly resumed or launched application may not listen yet; one that has been up for a while is just down.
        until = opened_at + self._settings.connect_seconds
        while True:
            try:
                return await self._connect_once(key, pool)
            except ConnectionRefusedError as error:
                if self._loop.time() > until:
                    raise ConnectFailed(f"nothing listens on port {port}") from error
                await asyncio.sleep(_RETRY_SECONDS)
            except (OSError, TimeoutError) as error:
                raise ConnectFailed(str(error) or "no answer") from error

    async def _connect_once(self, key: Key, pool: Pool) -> Origin:
        from .origin import Origin

        sock = socket.socket(fileno=await self._socket(key[:2]))
        sock.setblocking(False)
        reserved = Origin(self._worker, self, key)
        pool.open.add(reserved)
        try:
            async with asyncio.timeout(_SYN_SECONDS):
                await self._loop.sock_connect(sock, (GUEST_ADDRESS, key[2]))
                await self._loop.create_connection(lambda: reserved, sock=sock)
        except BaseException:
            sock.close()
            self.forget(reserved)
            raise
        if key not in self._pools:  # the incarnation ended meanwhile
            reserved.close()
            raise ConnectFailed("the MicroVM was suspended")
        return reserved

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
        try:
            _, descriptors = await self._vmm.call_with_descriptors("sockets", SocketsRequest(session[0], session[1], _STOCK), timeout=5.0)
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

    def end(self, session: str, incarnation: int) -> None:
        """Closes everything of an incarnation that ends."""
        for key in [key for key in self._pools if key[:2] == (session, incarnation)]:
            pool = self._pools.pop(key)
            for origin in list(pool.open):
                origin.cut()
            for waiter in pool.waiters:
                if not waiter.done():
                    waiter.set_result(None)
        for descriptor in self._stock.pop((session, incarnation), ()):
            os.close(descriptor)

    def sweep(self, now: float) -> None:
        """Closes connections that have been idle for long."""
        for pool in self._pools.values():
            for origin in [one for one in pool.idle if now - one.idle_since > self._settings.origin_idle_seconds]:
                origin.close()

    def _wake(self, pool: Pool) -> None:
        while pool.waiters:
            waiter = pool.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def statistics(self) -> dict[str, int]:
        return {
            "open": sum(len(pool.open) for pool in self._pools.values()),
            "idle": sum(len(pool.idle) for pool in self._pools.values()),
            "stock": sum(len(stock) for stock in self._stock.values()),
        }
