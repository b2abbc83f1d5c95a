"""Serves one microVM's metadata and names on the sockets that vmm made in its network."""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from gateway.accounts.directory import Credentials
from gateway.config import Settings
from gateway.messages import EgressRules
from gateway.sessions.egress import has_hosts, rules_of
from gateway.sessions.host import Host
from gateway.sessions.model import Session, Version, account_of
from gateway.sessions.store import Store

from .allowed_names import AllowedNames
from .credentials import Issuer
from .egress_audit import EgressAudit
from .metadata import Metadata, MetadataConnection
from .proxy import Gate, Proxy
from .resolver import Names, NameStreams, Reply, ask, host_resolvers

_CONNECTIONS = 16
_ACCEPT_PAUSE_SECONDS = 0.05


class Services:
    """Keeps what of a microVM is open; `close` lets its network go."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: list[socket.socket] = []
        self._transports: list[asyncio.BaseTransport] = []
        self.on_close: Callable[[], None] = lambda: None

    async def open(
        self, credentials: socket.socket, datagrams: socket.socket, streams: socket.socket, metadata: Metadata, upstream: list[str],
        reply: Reply | None = None,
    ) -> None:  # fmt: skip
        loop = asyncio.get_running_loop()
        self._sockets = [credentials, streams]
        names = NameStreams(upstream, reply)
        transport, _ = await loop.create_datagram_endpoint(lambda: Names(upstream, self._tasks, reply), sock=datagrams)
        self._transports.append(transport)
        self._spawn(self._accept(credentials, lambda sock: self._serve_metadata(sock, metadata)))
        self._spawn(self._accept(streams, lambda sock: _stream(sock, names)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Serves a few connections at once: the rest wait in the guest's own network, not in ours."""
        loop, room = asyncio.get_running_loop(), asyncio.Semaphore(_CONNECTIONS)

        async def serve_in_room(sock: socket.socket) -> None:
            try:
                await serve(sock)
            finally:
                room.release()

        while True:
            await room.acquire()
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:
                room.release()
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._spawn(serve_in_room(sock))

    async def _serve_metadata(self, sock: socket.socket, metadata: Metadata) -> None:
        connection = MetadataConnection(metadata, self._tasks)
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        try:
            await connection.closed
        finally:
            transport.abort()

    def close(self) -> None:
        self.on_close()
        for task in list(self._tasks):
            task.cancel()
        for transport in self._transports:
            transport.close()
        for sock in self._sockets:
            sock.close()
        self._sockets, self._transports = [], []


async def _stream(sock: socket.socket, names: NameStreams) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    await names.serve(reader, writer)


class Guests:
    """Opens services for microVMs and for builds: what the lifecycle and the pipeline need of this package."""

    def __init__(self, settings: Settings, issuer: Issuer, store: Store, host: Host, audit: EgressAudit) -> None:
        self._settings = settings
        self._issuer = issuer
        self._store = store
        self._host = host
        self._audit = audit
        self._proxies: defaultdict[str, Proxy] = defaultdict(Proxy)  # by account: none sees, or takes from, another's connections

    async def for_session(self, session: Session, sockets: list[socket.socket], rules: EgressRules | None) -> Services:
        role = session.execution_role
        return await self._open(sockets, session.id, session.incarnation, session.account, role, rules)

    def egress(self, version: Version) -> EgressRules | None:
        return rules_of(self._settings.egress, self._store, list(version.request.get("egressNetworkConnectors") or []))

    async def open(self, session: str, incarnation: int, version: Version) -> Services:
        """For a build's microVM: with the build role. Raises RpcError."""
        rules, role = self.egress(version), version.request.get("buildRoleArn")
        sockets = await self._host.services(session, incarnation, has_hosts(rules))
        return await self._open(sockets, session, incarnation, account_of(version.image_arn), role, rules)

    async def role(self, version: Version, session: str) -> Credentials:
        """The build role's own, for what a build fetches. Raises botocore's errors where an STS refuses them."""
        return await self._issuer.make(str(version.request["buildRoleArn"]), session)

    async def close(self) -> None:
        for proxy in self._proxies.values():
            await proxy.close()

    async def _open(
        self, sockets: list[socket.socket], session: str, incarnation: int, account: str, role: str | None, rules: EgressRules | None
    ) -> Services:  # fmt: skip
        services = Services()
        upstream = (self._settings.egress.resolvers or host_resolvers()) if rules is not None else []
        metadata = Metadata(self._settings.region, self._issuer.of(role, session) if role else None)
        credentials, datagrams, streams, *listener = sockets
        if rules is None or rules.internet:
            await services.open(credentials, datagrams, streams, metadata, upstream)
            return services
        audit = self._audit.of(account, session)
        names = AllowedNames(rules, lambda question: ask(upstream, question), audit.name)
        await services.open(credentials, datagrams, streams, metadata, upstream, names.reply)
        proxy = self._proxies[account]
        if listener:
            proxy.serve(session, Gate(names, audit, lambda: self._host.socket(session, incarnation)), listener[0])

        def close() -> None:
            names.close()
            proxy.stop(session)

        services.on_close = close
        return services
