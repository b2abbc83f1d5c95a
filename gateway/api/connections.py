"""Connections to the API and to metrics: bounds on their number, deadlines for who says nothing, TLS.

Who has shown no credentials goes first. A connection that comes when all are taken is let in, and the one that has been here longest
without a verified request is closed for it; then one that waits between requests; never one whose call is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import structlog
from aiohttp import web

from gateway import executors, files, suites
from gateway.config import ConfigError, is_loopback

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEPT_SECONDS = 75.0  # between two requests of a connection
_AT_ONCE = 64
_PAUSE_SECONDS = 0.1  # where no descriptor is left


@dataclass(eq=False)
class Visit:
    """One connection. `close` ends it, whatever it is doing."""

    peer: str
    close: Callable[[], None]
    is_verified: bool = False
    deadline: asyncio.TimerHandle | None = None


class Connections:
    def __init__(self, most: int, most_per_peer: int, head_seconds: float) -> None:
        self._most = most
        self._most_per_peer = most_per_peer
        self.head_seconds = head_seconds
        self._of_peer: Counter[str] = Counter()
        self._unverified: dict[Visit, None] = {}  # the oldest first, as in the next
        self._idle: dict[Visit, None] = {}
        self._busy: set[Visit] = set()
        self._visits: dict[asyncio.Protocol, Visit] = {}

    def __len__(self) -> int:
        return len(self._unverified) + len(self._idle) + len(self._busy)

    def admit(self, peer: str, close: Callable[[], None]) -> Visit | None:
        """Returns None where neither there is room nor a connection that could make some."""
        is_peer_full = self._of_peer[peer] >= self._most_per_peer
        if (is_peer_full or len(self) >= self._most) and not self.make_room(peer if is_peer_full else ""):
            return None
        visit = Visit(peer, close)
        self._of_peer[peer] += 1
        self._unverified[visit] = None
        self._wait(visit, self.head_seconds)
        return visit

    def make_room(self, peer: str = "") -> bool:
        """Closes a connection that can go: of the peer, where one is given."""
        for among in (self._unverified, self._idle):
            visit = next((one for one in among if not peer or one.peer == peer), None)
            if visit is not None:
                self.end(visit)
                return True
        return False

    def leave(self, visit: Visit) -> None:
        """The connection has ended, or is to. A second time says nothing new."""
        if visit not in self._unverified and visit not in self._idle and visit not in self._busy:
            return
        self._drop(visit)
        self._stop_waiting(visit)
        self._of_peer[visit.peer] -= 1
        if not self._of_peer[visit.peer]:
            del self._of_peer[visit.peer]

    def _drop(self, visit: Visit) -> None:
        self._unverified.pop(visit, None)
        self._idle.pop(visit, None)
        self._busy.discard(visit)

    def _wait(self, visit: Visit, seconds: float) -> None:
        self._stop_waiting(visit)
        visit.deadline = asyncio.get_running_loop().call_later(seconds, self.end, visit)

    def end(self, visit: Visit) -> None:
        self.leave(visit)
        visit.close()

    def _stop_waiting(self, visit: Visit) -> None:
        if visit.deadline is not None:
            visit.deadline.cancel()
            visit.deadline = None

    # ---- what a request changes ----

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """An application's middleware: its head has come."""
        visit = self._visits.get(request.protocol)
        if visit is None:
            return await handler(request)
        self._stop_waiting(visit)
        if visit in self._idle:
            self._drop(visit)
            self._busy.add(visit)
        try:
            return await handler(request)
        finally:
            self._answered(visit)

    def _answered(self, visit: Visit) -> None:
        if visit in self._busy:
            self._drop(visit)
            self._idle[visit] = None
        if visit in self._idle or visit in self._unverified:
            self._wait(visit, KEPT_SECONDS if visit.is_verified else self.head_seconds)

    def verified(self, request: web.Request) -> None:
        """Who asks has shown who he is."""
        visit = self._visits.get(request.protocol)
        if visit is not None:
            self.shown(visit)

    def shown(self, visit: Visit) -> None:
        if visit in self._unverified:
            self._drop(visit)
            self._stop_waiting(visit)
            self._busy.add(visit)
            visit.is_verified = True

    # ---- sockets ----

    def protocol(self, server: web.Server, visit: Visit) -> asyncio.Protocol:
        inner = server()
        self._visits[inner] = visit
        return _Watched(inner, visit, lambda: self._lost(inner, visit))

    def _lost(self, inner: asyncio.Protocol, visit: Visit) -> None:
        self._visits.pop(inner, None)
        self.leave(visit)


class _Watched(asyncio.Protocol):
    """Passes all on to the protocol that reads HTTP, and says when the connection has ended."""

    def __init__(self, inner: asyncio.Protocol, visit: Visit, lost: Callable[[], None]) -> None:
        self._inner = inner
        self._visit = visit
        self._lost = lost
        self.data_received = inner.data_received  # type: ignore[method-assign]
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._visit.close = cast(asyncio.Transport, transport).abort  # uvloop's are of no class of asyncio's
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self._lost()


class Listener:
    """Accepts connections on a socket of the supervisor's for an application's server. Raises ConfigError for one that others reach and
    that would speak without TLS: its address was chosen under other settings."""

    def __init__(self, sock: socket.socket, server: web.Server, connections: Connections, tls: ssl.SSLContext | None) -> None:
        address = str(sock.getsockname()[0])
        if tls is None and not is_loopback(address):
            raise ConfigError(f"the API's socket is at {address}, beyond loopback, and api.tls is off: stop the service, and start it")
        self._sock = sock
        self._server = server
        self._connections = connections
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._accepted: dict[asyncio.Task[None], Visit] = {}  # and not yet with a protocol of its own
        self._again: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("api.not_accepted", error=str(error))
                self._connections.make_room()
                self._loop.remove_reader(self._sock.fileno())
                self._again = self._loop.call_later(_PAUSE_SECONDS, self._loop.add_reader, self._sock.fileno(), self._accept)
                return
            sock.setblocking(False)
            visit = self._connections.admit(holder(str(address[0])), functools.partial(shut, sock))
            if visit is None:
                sock.close()
                continue
            task = self._loop.create_task(self._serve(sock, visit))
            self._accepted[task] = visit
            task.add_done_callback(self._accepted.pop)

    async def _serve(self, sock: socket.socket, visit: Visit) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._connections.protocol(self._server, visit), sock, ssl=self._tls,
                ssl_handshake_timeout=self._connections.head_seconds if self._tls else None,
            )  # fmt: skip
        except OSError:  # of TLS too: what is no handshake is its sender's affair
            self._connections.leave(visit)
            sock.close()

    async def close(self) -> None:
        """Connections that are being taken in are ended, not called off: a protocol that has been told of its connection would never
        be told of its end, and a server waits for that when it stops."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for visit in list(self._accepted.values()):
            self._connections.end(visit)
        await asyncio.gather(*self._accepted, return_exceptions=True)


def holder(address: str) -> str:
    """Returns whose connections are counted together: an IPv4 address's, and a network's of IPv6, in which one host has any number."""
    one = ipaddress.ip_address(address)
    if isinstance(one, ipaddress.IPv4Address):
        return str(one)
    return str(one.ipv4_mapped or f"{ipaddress.IPv6Address(int(one) >> 64 << 64)}/64")


def shut(sock: socket.socket) -> None:
    """Of a connection that somebody else reads, its handshake under way say: he sees its end."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Certificate:
    """A TLS context whose certificate is read again when its files have changed."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises OSError, ssl.SSLError."""
        self._chain, self._key = chain, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_ciphers(suites.TLS12)
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        self.context.set_alpn_protocols(["http/1.1"])
        self._read = self._state()
        self.context.load_cert_chain(chain, key)

    def _state(self) -> list[tuple[int, int]]:
        return [(one.st_mtime_ns, one.st_ino) for one in (self._chain.stat(), self._key.stat())]

    async def renew(self) -> None:
        """Raises OSError, ssl.SSLError, and serves what it has then."""
        await executors.UPKEEP.run(self._renew)

    def _renew(self) -> None:
        state = self._state()
        if state != self._read:  # first elsewhere: OpenSSL drops the key that it has for a certificate that does not go with it
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
            self.context.load_cert_chain(self._chain, self._key)
            self._read = state


class Scrapers:
    """Who may read metrics: whoever has the token of this file, where there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def may_read(self, request: web.Request) -> bool:
        if self._path is None:
            return True
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        try:  # each time: another token counts at once
            wanted = files.read(self._path)
        except OSError:
            return False
        return kind.lower() == "bearer" and bool(wanted) and hmac.compare_digest(given.strip().encode("utf-8", "replace"), wanted)
