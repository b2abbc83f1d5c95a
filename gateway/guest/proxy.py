"""Connections of guests to hosts that are allowed by name: what control decides, and the process that passes them on (relay.py).

A connection is let through where the client says a name that is allowed at that port (in TLS's ClientHello, or in HTTP's Host), and the
address that it wants is one that the resolver gives for that very name. Control connects, in the microVM's own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from gateway import messages as m
from gateway.peers import RELAY_ASKS_CONTROL
from gateway.reach import dial
from gateway.rpc import Connection, Reply, RpcError, Service
from gateway.sessions.allowance import Allowance

from .allow_list import TCP
from .allowed_names import AllowedNames
from .egress_audit import ALLOWED, ENDED, REFUSED, SessionAudit
from .relay import CONNECTIONS

log = structlog.get_logger()

_CONNECT_SECONDS = 10.0
_AGAIN_SECONDS, _AGAIN_MOST_SECONDS = 0.5, 30.0
_END_SECONDS = 5.0
_LINGER_SECONDS = 60.0
_BURST, _RATE = 256, 50  # connections of a microVM at once, and a second
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LANG")
MakeSocket = Callable[[], Awaitable[socket.socket]]


class Refused(Exception):
    """The text is the reason, as the audit has it."""


class Gate:
    """One microVM's. `make_socket` gives an unconnected TCP socket in its network. Raises RpcError."""

    def __init__(
        self, names: AllowedNames, audit: SessionAudit, make_socket: MakeSocket, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.names = names
        self.audit = audit
        self._make_socket = make_socket
        self._allowance = Allowance(_BURST, _RATE, clock)
        self.open = 0

    async def decide(self, body: m.RelayQuestion) -> tuple[str, socket.socket] | None:
        """Returns the host's name and a connected socket; None where the client has to say more first. Raises Refused, which is in the
        audit."""
        name = body.name
        try:
            if self.open >= CONNECTIONS or not self._allowance.take():
                raise Refused("too many connections")
            try:
                address = ipaddress.IPv4Address(body.address)
            except ValueError:
                raise Refused("no address") from None
            if body.fault:
                raise Refused(body.fault)
            if body.scheme == TCP:
                found = await self._tcp_name(address, body.port)
                if found is None and self.names.allow.schemes(body.port) != {TCP}:
                    return None
                if found is None:
                    raise Refused("no address of a host that a group names at this port")
                name = found
            else:
                await self._check(body.scheme, name, address, body.port)
            sock = await self._connect(body.address, body.port)
        except Refused as refusal:
            self.audit.connection(name, body.address, body.port, REFUSED, str(refusal))
            raise
        self.audit.connection(name, body.address, body.port, ALLOWED, "")
        return name, sock

    async def _tcp_name(self, address: ipaddress.IPv4Address, port: int) -> str | None:
        for name in self.names.allow.tcp_names(port):
            if await self.names.is_address(name, address):
                return name
        return None

    async def _check(self, scheme: str, name: str, address: ipaddress.IPv4Address, port: int) -> None:
        """Raises Refused."""
        if not self.names.allow.takes(scheme, name, port):
            raise Refused(f"no group names it for {scheme} at this port")
        if not await self.names.is_address(name, address):
            raise Refused("no address of the host that the client names")

    async def _connect(self, address: str, port: int) -> socket.socket:
        """Raises Refused."""
        try:
            sock = await self._make_socket()
        except RpcError as error:
            raise Refused(f"no socket: {error}") from error
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await dial(sock, (f"::ffff:{address}" if sock.family == socket.AF_INET6 else address, port))
        except TimeoutError as error:
            sock.close()
            raise Refused(f"no answer in {_CONNECT_SECONDS:g} s") from error
        except OSError as error:
            sock.close()
            raise Refused(f"not reached: {os.strerror(error.errno or 0)}") from error
        except BaseException:
            sock.close()
            raise
        return sock


@dataclass(frozen=True)
class _Open:
    gate: Gate
    name: str
    address: str
    port: int


@dataclass(frozen=True)
class _Served:
    gate: Gate
    listener: socket.socket  # kept, for a relay that takes over


class Proxy:
    """One account's. Keeps the relay's process for as long as a microVM needs it, and a minute longer; starts another one where it dies:
    microVMs' connections end then, and new ones wait until it is there."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}
        self._open: dict[int, _Open] = {}
        self._numbers = itertools.count(1)
        self._relay: Connection | None = None
        self._running: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, session: str, gate: Gate, listener: socket.socket) -> None:
        self._served[session] = _Served(gate, listener)
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._run())
        elif self._relay is not None:
            self._spawn(self._hand_over(self._relay, session))

    def stop(self, session: str) -> None:
        """Ends the session's connections."""
        served = self._served.pop(session, None)
        if served is None:
            return
        served.listener.close()
        if self._relay is not None:
            self._spawn(self._stop(self._relay, session))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self, relay: Connection, session: str) -> None:
        with contextlib.suppress(RpcError):
            ends: list[m.RelayEnd] = await relay.call("stop", m.RelaySession(session), list[m.RelayEnd])
            for end in ends:
                self._end(end)
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._rest, relay)

    def _rest(self, relay: Connection) -> None:
        if not self._served:
            relay.close()

    async def _hand_over(self, relay: Connection, session: str) -> None:
        served = self._served.get(session)
        if served is None:
            return
        allow = served.gate.names.allow
        ports = sorted({rule.port for rule in allow.rules if rule.scheme != TCP})
        blind = sorted({rule.port for rule in allow.rules if rule.scheme == TCP})
        with contextlib.suppress(RpcError):
            await relay.call("serve", m.RelayListen(session, ports, blind), descriptors=[os.dup(served.listener.fileno())])

    async def _run(self) -> None:
        pause = _AGAIN_SECONDS
        while self._served:
            began = asyncio.get_running_loop().time()
            try:
                await self._run_once()
            except (OSError, TimeoutError, RpcError) as error:
                log.error("relay.not_started", error=str(error))
            if not self._served:
                return
            pause = (
                _AGAIN_SECONDS if asyncio.get_running_loop().time() - began > _AGAIN_MOST_SECONDS else min(2 * pause, _AGAIN_MOST_SECONDS)
            )
            log.warning("relay.ended", sessions=len(self._served), again_in=pause)
            await asyncio.sleep(pause)

    async def _run_once(self) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "gateway.guest.relay", str(theirs.fileno()), pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL, env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        relay = Connection(ours, Service(self).only(RELAY_ASKS_CONTROL))
        try:
            self._relay = relay
            for session in list(self._served):
                await self._hand_over(relay, session)
            await asyncio.wait([relay.closed])
        finally:
            self._relay = None
            relay.close()
            for number in list(self._open):
                self._end(m.RelayEnd(number, 0, 0))
            await _ended(process)

    # ---- what the relay calls ----

    async def rpc_decide(self, connection: Connection, body: m.RelayQuestion) -> Reply:
        served = self._served.get(body.session)
        if served is None:
            return Reply(m.RelayVerdict())
        try:
            decided = await served.gate.decide(body)
        except Refused:
            return Reply(m.RelayVerdict())
        if decided is None:
            return Reply(m.RelayVerdict(is_undecided=True))
        name, sock = decided
        number = next(self._numbers)
        self._open[number] = _Open(served.gate, name, body.address, body.port)
        served.gate.open += 1
        return Reply(m.RelayVerdict(number), [sock.detach()])

    async def rpc_ended(self, connection: Connection, body: m.RelayEnd) -> None:
        self._end(body)

    async def rpc_walls(self, connection: Connection, body: m.Walls) -> None:
        if body:
            log.warning("relay.less_confined", missing=body)

    def _end(self, end: m.RelayEnd) -> None:
        one = self._open.pop(end.connection, None)
        if one is not None:
            one.gate.open -= 1
            one.gate.audit.connection(one.name, one.address, one.port, ENDED, "", end.sent, end.received)

    async def close(self) -> None:
        for session in list(self._served):
            self.stop(session)
        for task in list(self._tasks):
            with contextlib.suppress(RpcError, TimeoutError):
                await asyncio.wait_for(task, _END_SECONDS)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
