"""An edge worker: one process, one loop, its own listeners. It has no privileges and no key that signs."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import structlog

from gateway import messages as m
from gateway.config import Edge
from gateway.observe.spans import Spans
from gateway.rpc import Client as RpcClient
from gateway.rpc import Connection, RpcError, Service
from gateway.tokens import Checker

from . import tls
from .access import AccessLog
from .certificates import Certificates
from .doors import ProxyDoor, RedirectDoor
from .fairness import FairQueue
from .faults import FaultLines
from .head_cache import HeadCache
from .hold import Holds
from .hops import Hops
from .http1 import Http1
from .http2 import Http2
from .ledger import Ledger
from .record import PROTOCOLS
from .table import RouteTable
from .tls import TlsServer
from .upstream import Upstream

log = structlog.get_logger()

_REPORT_SECONDS = 0.25
_SWEEP_SECONDS = 1.0
_KEEPALIVE_IDLE_SECONDS, _KEEPALIVE_SECONDS, _KEEPALIVE_PROBES = 60, 15, 4  # of clients' connections
_MISS_SECONDS = 1.0
_PREFETCH_SECONDS = 0.1  # after a route opens: whoever holds requests for it has sockets already, and goes first
_MISSES_MAX = 10_000
_ACKNOWLEDGE_SECONDS = 0.05


def find_vanished_peers(listener: socket.socket, unread_seconds: float) -> None:
    """Has the kernel end the connections that are accepted here (tcp(7); they inherit it): of a peer that is silent and no longer
    there, and of one that takes nothing of what was written to it for `unread_seconds`, however little that is."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_seconds * 1000))


class Worker:
    def __init__(self, name: str, settings: Edge, control: Path, vmm: Path) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.settings = settings
        self.time = loop.time
        self.wall = time.time
        self.clients: set[Http1 | Http2] = set()
        self.ledger = Ledger(AccessLog(Path(settings.access_log), time.time) if settings.access_log else None)
        self._counted: list[list[int]] = []
        self.checker = Checker([])
        self.table = RouteTable(loop.time, self._route_changed, settings)
        self.hops = Hops(settings)
        self.heads = HeadCache(settings.head_bytes, settings.head_fields, self.hops.of_block if self.hops.is_on else None)
        self.fairness = FairQueue()
        self.holds = Holds(settings, self._ask_for)
        self.spans = Spans("", name)
        self.is_draining = False
        self._faults = FaultLines(loop.time)
        self._endpoints: dict[str, str] = {}  # by session
        self._misses: dict[str, float] = {}
        self._lookups: dict[str, asyncio.Task[bool]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._certificates: Certificates | None = None
        self._balancers = [ipaddress.ip_network(one) for one in settings.proxy_protocol_from]
        self._ready = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self.upstream = Upstream(self, RpcClient(vmm))
        self.parking = self.upstream.parking
        self.control = RpcClient(control, Service(self), self._connected)

    # ---- serving ----

    async def serve(self, sockets: list[socket.socket], certificates: Certificates | None, redirects: Sequence[socket.socket] = ()) -> None:
        """Accepts once the first table is here. Without certificates it serves plain HTTP/1.1, as tests want it."""
        await self._ready.wait()
        self._certificates = certificates
        for sock in sockets:
            await self._listen(sock, self._accept)
        for sock in redirects:
            await self._listen(sock, lambda: RedirectDoor(self.settings.port))
        self.spawn(self._report())
        self.spawn(self._sweep())
        log.info("edge.ready", worker=self.name, routes=len(self.table), compiled=tls.__file__.endswith(".so"))

    async def _listen(self, sock: socket.socket, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        loop = asyncio.get_running_loop()
        if sock.family != socket.AF_UNIX:
            find_vanished_peers(sock, self.settings.idle_seconds)
        if sock.family == socket.AF_UNIX:
            server = await loop.create_unix_server(factory, sock=sock, backlog=4096)
        else:
            server = await loop.create_server(factory, sock=sock, backlog=4096)
        self._servers.append(server)

    def _accept(self) -> asyncio.BaseProtocol:
        if self._certificates is None:
            return cast(asyncio.BaseProtocol, self._application(None))
        if self._balancers:
            return ProxyDoor(self._balancers, self._behind)
        return self._behind(None)

    def _behind(self, peer: str | None) -> asyncio.BaseProtocol:
        assert self._certificates is not None
        return cast(asyncio.BaseProtocol, TlsServer(self._certificates.context, self._application, peer))

    def _application(self, protocol: str | None) -> Http1 | Http2:
        return Http2(self) if protocol == "h2" else Http1(self)

    async def drain(self) -> None:
        """Stops accepting; finishes what is under way. Idle connections may still bring a request: it is answered with
        Connection: close, so that no client sends into a closed connection."""
        self.is_draining = True
        for server in self._servers:
            server.close()
        self.guard(self.parking.close)
        self._each_client("begin_drain")
        deadline = self.time() + self.settings.drain_seconds
        quiet_until = self.time() + min(2.0, self.settings.drain_seconds)
        press_at = self.time() + self.settings.drain_seconds / 2
        while self.clients and self.time() < deadline:
            if self.time() > press_at:
                press_at = deadline
                self._each_client("press_drain")
            if self.time() > quiet_until:
                self._each_client("close_idle", only_quiet=True)
            await asyncio.sleep(0.05)
        self.guard(self._send_report)
        self.control.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("edge.task_failed", exc_info=task.exception())

    # ---- control ----

    async def _connected(self, connection: Connection) -> None:
        table: m.Table = await connection.call("hello", m.Hello(self.name), m.Table)
        self.checker = Checker(table.keys)
        self.heads.clear()
        self.table.replace(table)
        self._ready.set()
        self.holds.ask_again(self.route_of_session)

    async def rpc_route(self, connection: Connection, body: m.Route) -> None:
        self.table.change(body)

    async def rpc_keys(self, connection: Connection, body: list[m.Verifier]) -> None:
        self.checker = Checker(body)

    async def rpc_gate(self, connection: Connection, body: m.Route) -> m.GateAnswer:
        """Closes a session's gate: from this answer on no request is forwarded to it."""
        answer = self.table.close_gate(body)
        self.upstream.close_idle(body.session, body.incarnation)
        return answer

    async def rpc_drain(self, connection: Connection, body: m.DrainRequest) -> m.Drained:
        account = self.table.account(body.session)
        deadline = self.time() + max(body.seconds, _ACKNOWLEDGE_SECONDS if body.park else 0)

        def is_busy() -> bool:
            return account.waiting > 0 or (body.park > 0 and self.upstream.is_busy(body.session, body.incarnation, body.one_way))

        while is_busy() and self.time() < deadline:
            if account.waiting:
                await account.until_answered(deadline - self.time())
            else:
                await asyncio.sleep(0.001)  # nothing tells when the guest has acknowledged what was sent (dial.unacknowledged)
        route = self.route_of_session(body.session)
        if route is None or route.incarnation != body.incarnation or route.gate == "open":
            return m.Drained(quiet=False)  # another control has opened it again meanwhile
        if body.if_quiet and (account.count != account.gated[0] or is_busy()):
            return m.Drained(quiet=False)
        if body.cut or account.waiting:
            return m.Drained(self.upstream.end(body.session, body.incarnation, body.park, body.one_way), account.spoken != account.gated[1])
        return m.Drained()

    async def rpc_parked(self, connection: Connection, body: m.SessionName) -> int:
        """How many streams of a sleeping session clients still hold here."""
        return self.parking.streams(body.session)

    async def open_shell(self, request: m.ShellRequest) -> int:
        """Raises RpcError."""
        _, (descriptor,) = await self.control.call_with_descriptors("shell", request, timeout=5.0)
        return descriptor

    def _ask_for(self, route: m.Route) -> None:
        self.control.notify("resume", m.ResumeRequest(route.session, route.incarnation))

    def route_of_session(self, session: str) -> m.Route | None:
        entry = self.table.get(self._endpoints.get(session, ""))
        return entry.route if entry is not None else None

    def _route_changed(self, old: m.Route | None, new: m.Route) -> None:
        session = new.session or (old.session if old is not None else "")
        if new.session:
            self._endpoints[session] = new.endpoint
        else:
            self._endpoints.pop(session, None)
        if old is not None and (old.incarnation != new.incarnation or not new.is_live):
            self.guard(self.upstream.end, old.session, old.incarnation)
        if new.gate == "hold" and new.is_live and old is not None and old.incarnation < new.incarnation:
            # The guest is about to run: what is held goes on waiting, and its connections are made meanwhile.
            for port in self.holds.ports(session):
                self.guard(self.upstream.preconnect, new, port)
            return
        if new.gate == "open":
            asyncio.get_running_loop().call_later(_PREFETCH_SECONDS, self._prefetch, new)
            self.guard(self.parking.opened, new)
        elif new.gate == "refuse":
            self.guard(self.parking.over, session)
        self.holds.changed(session)

    def _prefetch(self, route: m.Route) -> None:
        if self.route_of_session(route.session) == route:
            self.upstream.prefetch(route)

    async def lookup(self, host: str, session: str) -> bool:
        """Whether what the table says of the host is final: where it says nothing, control is asked for it. False where control does not
        answer. `session` is the one that the client's token is for: if that has its endpoint here, it is not this host's, and control
        is not asked, so that while it is away the answer does not show which hosts exist. Misses are remembered for a second."""
        if session in self._endpoints or self._misses.get(host, 0.0) > self.time():
            return True
        task = self._lookups.get(host)
        if task is None:
            task = self._lookups[host] = self.spawn(self._look_up(host))
        return await asyncio.shield(task)

    async def _look_up(self, host: str) -> bool:
        try:
            route = await self.control.call("lookup", m.LookupRequest(host), m.Route | None, timeout=2.0)
        except RpcError:
            return False
        finally:
            self._lookups.pop(host, None)
        if route is not None:
            self.table.add(route)
            return True
        if len(self._misses) >= _MISSES_MAX:
            self._misses.clear()
        self._misses[host] = self.time() + _MISS_SECONDS
        return True

    # ---- in the background ----

    def report_fault(self, session: str, text: str) -> None:
        """Something was wrong with the session's application, and its client was told no more than 502: a line for the microVM's log.
        `text` names the port, the rule that was broken, and its clause; nothing that the application or a client sent."""
        self._faults.add(session, text)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self.guard(self._send_report)

    def guard(self, work: Callable[..., object], *arguments: object) -> bool:
        """One step among several that do not depend on each other; False where it raised. What raises is logged, and ends itself alone."""
        try:
            work(*arguments)
        except Exception:
            log.exception("edge.step_failed", step=getattr(work, "__qualname__", ""))
            return False
        return True

    def _each_client(self, step: str, *arguments: object, only_quiet: bool = False) -> None:
        """A client whose step raises is ended: nobody could say what state it is in."""
        for client in [one for one in self.clients if not only_quiet or one.is_quiet]:
            if not self.guard(getattr(client, step), *arguments):
                self.clients.discard(client)
                if client.transport is not None:
                    client.transport.abort()

    def _send_report(self) -> None:
        connection = self.control.connection
        if connection is None:
            return
        if (report := self.table.report()) is not None:
            connection.notify("activity", report)
        if lines := self._faults.take():
            connection.notify("faults", m.Faults(lines))
        if self.ledger.answers != self._counted:
            self._counted = [list(one) for one in self.ledger.answers]
            held, access = self.holds.statistics()["requests"], self.ledger.access
            answers = dict(zip(PROTOCOLS, self._counted, strict=True))
            connection.notify(
                "counters",
                m.Counters(
                    answers,
                    len(self.clients),
                    held,
                    self.upstream.statistics(),
                    self.parking.count,
                    access.lost if access else 0,
                    access.not_reopened if access else 0,
                ),
            )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = self.time()
            self._each_client("sweep", now)
            self.guard(self.upstream.sweep, now)
            if self._certificates is not None:
                self.guard(self._certificates.refresh)


async def run(
    name: str, settings: Edge, control: Path, vmm: Path, sockets: dict[str, list[socket.socket]], certificates: Certificates, ready: Any,
    traces: str = "",
) -> None:  # fmt: skip
    """Until SIGTERM, then drains. SIGUSR1 opens the access log again. `traces` is where spans go."""
    worker = Worker(name, settings, control, vmm)
    worker.spans = Spans(traces, name)
    await worker.serve(sockets["edge"], certificates, sockets.get("redirect", ()))
    ready()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if worker.ledger.access is not None:
        loop.add_signal_handler(signal.SIGUSR1, worker.ledger.access.reopen)
    await stop.wait()
    await worker.drain()
    if worker.ledger.access is not None:
        worker.ledger.access.close()
