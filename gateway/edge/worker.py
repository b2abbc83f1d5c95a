"""An edge worker is one process with one loop and its own listeners. It has no privileges and no key that signs."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import structlog

from gateway.config import Edge
from gateway.observe.spans import Spans
from gateway.rpc import Client as RpcClient
from gateway.tasks import Tasks
from gateway.tokens import Checker

from .client import tls
from .client.certificates import Certificates
from .client.forwarding import Forwarding
from .client.http1 import Http1
from .client.http2 import Http2
from .client.https_redirect import HttpsRedirect
from .client.proxy_protocol import ProxyProtocol
from .client.tls import TlsServer
from .link import Link
from .origin.upstream import Upstream
from .policy.fairness import FairQueue
from .policy.head_cache import HeadCache
from .policy.holds import Holds
from .policy.routes import RouteTable
from .records.access_log import AccessLog
from .records.counters import Counters

log = structlog.get_logger()

_REPORT_SECONDS = 0.25
_SWEEP_SECONDS = 1.0
_KEEPALIVE_IDLE_SECONDS, _KEEPALIVE_SECONDS, _KEEPALIVE_PROBES = 60, 15, 4  # of clients' connections


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
        self.tasks = Tasks()
        self.spawn = self.tasks.spawn
        self.link = Link(self, name, control)
        self.lookup, self.open_shell = self.link.lookup, self.link.open_shell
        self.report_fault, self.route_of_session = self.link.report_fault, self.link.route_of_session
        self.settings = settings
        self.time = loop.time
        self.wall = time.time
        self.clients: set[Http1 | Http2] = set()
        self.counters = Counters(AccessLog(Path(settings.access_log), time.time) if settings.access_log else None)
        self.checker = Checker([])
        self.routes = RouteTable(loop.time, self.link.route_changed, settings)
        self.forwarding = Forwarding(settings)
        self.heads = HeadCache(settings.head_bytes, settings.head_fields, self.forwarding.of_block if self.forwarding.is_on else None)
        self.fairness = FairQueue()
        self.holds = Holds(settings, self.link.ask_for)
        self.spans = Spans("", name)
        self.is_draining = False
        self._certificates: Certificates | None = None
        self._balancers = [ipaddress.ip_network(network) for network in settings.proxy_protocol_from]
        self._servers: list[asyncio.Server] = []
        self.upstream = Upstream(self, RpcClient(vmm))
        self.parking = self.upstream.parking

    # ---- serving ----

    async def serve(self, sockets: list[socket.socket], certificates: Certificates | None, redirects: Sequence[socket.socket] = ()) -> None:
        """Accepts once the first table is here. Without certificates it serves plain HTTP/1.1, as tests want it."""
        await self.link.ready.wait()
        self._certificates = certificates
        for sock in sockets:
            await self._listen(sock, self._accept)
        for sock in redirects:
            await self._listen(sock, lambda: HttpsRedirect(self.settings.port))
        self.spawn(self._report())
        self.spawn(self._sweep())
        log.info("edge.ready", worker=self.link.name, routes=len(self.routes), compiled=tls.__file__.endswith(".so"))

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
            return ProxyProtocol(self._balancers, self._behind)
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
        self.guard(self.link.report)
        self.link.close()

    # ---- in the background ----

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self.guard(self.link.report)

    def guard(self, work: Callable[..., object], *arguments: object) -> bool:
        """Does one step among several that do not depend on each other, and returns False where it raised: that is logged, and ends the
        step alone."""
        try:
            work(*arguments)
        except Exception:
            log.exception("edge.step_failed", step=getattr(work, "__qualname__", ""))
            return False
        return True

    def _each_client(self, step: str, *arguments: object, only_quiet: bool = False) -> None:
        """Does a step for each client. A client whose step raises is aborted: nobody could say what state it is in."""
        for client in [accepted for accepted in self.clients if not only_quiet or accepted.is_quiet]:
            if not self.guard(getattr(client, step), *arguments):
                self.clients.discard(client)
                if client.transport is not None:
                    client.transport.abort()

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
    """Serves until SIGTERM, then drains. SIGUSR1 opens the access log again. `traces` is where spans go."""
    worker = Worker(name, settings, control, vmm)
    worker.spans = Spans(traces, name)
    await worker.serve(sockets["edge"], certificates, sockets.get("redirect", ()))
    ready()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if worker.counters.access is not None:
        loop.add_signal_handler(signal.SIGUSR1, worker.counters.access.reopen)
    await stop.wait()
    await worker.drain()
    if worker.counters.access is not None:
        worker.counters.access.close()
