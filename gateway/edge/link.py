"""The link to control: routes and gates come from it; resumes, look-ups, shells and reports go to it (messages.py has their shapes)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from gateway import messages as m
from gateway.rpc import Client, Connection, RpcError, Service
from gateway.tokens import Checker

from .origin.parking import Parking
from .origin.upstream import Upstream
from .policy.head_cache import HeadCache
from .policy.holds import Holds
from .policy.routes import RouteTable
from .records.counters import Counters
from .records.faults import FaultLines
from .records.record import PROTOCOLS

_MISS_SECONDS = 1.0
_PREFETCH_SECONDS = 0.1  # after a route opens: whoever holds requests for it has sockets already, and goes first
_MISSES_MAX = 10_000
_ACKNOWLEDGE_SECONDS = 0.05


class Served(Protocol):
    """What of a worker control's word acts on, and its reports are made of."""

    checker: Checker
    clients: set[Any]  # connections that are open
    heads: HeadCache
    holds: Holds
    counters: Counters
    parking: Parking
    routes: RouteTable
    time: Callable[[], float]  # the loop's clock
    upstream: Upstream

    def guard(self, work: Callable[..., object], *arguments: object) -> bool:
        """Does one step; what it raises is logged and ends itself alone."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs a task; the worker logs its failure."""


class Link:
    """Methods named rpc_… are control's calls."""

    def __init__(self, worker: Served, name: str, control: Path) -> None:
        self.name = name
        self.ready = asyncio.Event()  # the first table is here
        self._worker = worker
        self._endpoints: dict[str, str] = {}  # by session
        self._misses: dict[str, float] = {}
        self._lookups: dict[str, asyncio.Task[bool]] = {}
        self._faults = FaultLines(asyncio.get_running_loop().time)
        self._counted: list[list[int]] = []
        self._control = Client(control, Service(self), self._connected)

    @property
    def is_connected(self) -> bool:
        return self._control.connection is not None

    def close(self) -> None:
        self._control.close()

    async def _connected(self, connection: Connection) -> None:
        table: m.Table = await connection.call("hello", m.Hello(self.name), m.Table)
        self._worker.checker = Checker(table.keys, table.revoked)
        self._worker.heads.clear()
        self._worker.routes.replace(table)
        self.ready.set()
        self._worker.holds.ask_again(self.route_of_session)

    async def rpc_route(self, connection: Connection, body: m.Route) -> None:
        self._worker.routes.change(body)

    async def rpc_tokens(self, connection: Connection, body: m.KeySet) -> bool:
        """From the answer on no token is taken that these do not verify: what was remembered of one was remembered with other keys."""
        self._worker.checker = Checker(body.keys, body.revoked)
        return True

    async def rpc_listened(self, connection: Connection, body: m.Listened) -> None:
        """Takes in what other workers have seen, of incarnations that run."""
        for session, incarnation, port in body.ports:
            route = self.route_of_session(session)
            if route is not None and route.incarnation == incarnation:
                self._worker.upstream.others_saw((session, incarnation, port))

    async def rpc_gate(self, connection: Connection, body: m.Route) -> m.GateAnswer:
        """Closes a session's gate: from this answer on no request is forwarded to it."""
        answer = self._worker.routes.close_gate(body)
        self._worker.upstream.close_idle(body.session, body.incarnation)
        return answer

    async def rpc_drain(self, connection: Connection, body: m.DrainRequest) -> m.Drained:
        account = self._worker.routes.account(body.session)
        deadline = self._worker.time() + max(body.seconds, _ACKNOWLEDGE_SECONDS if body.park else 0)

        def is_busy() -> bool:
            return account.waiting > 0 or (body.park > 0 and self._worker.upstream.is_busy(body.session, body.incarnation, body.one_way))

        while is_busy() and self._worker.time() < deadline:
            if account.waiting:
                await account.until_answered(deadline - self._worker.time())
            else:
                await asyncio.sleep(0.001)  # nothing tells when the guest has acknowledged what was sent (dial.unacknowledged)
        route = self.route_of_session(body.session)
        if route is None or route.incarnation != body.incarnation or route.gate == "open":
            return m.Drained(quiet=False)  # another control has opened it again meanwhile
        if body.if_quiet and (account.count != account.gated[0] or is_busy()):
            return m.Drained(quiet=False)
        if body.cut or account.waiting:
            return m.Drained(
                self._worker.upstream.incarnation_ended(body.session, body.incarnation, body.park, body.one_way),
                account.spoken != account.gated[1],
            )
        return m.Drained()

    async def rpc_parked(self, connection: Connection, body: m.SessionName) -> int:
        """Answers how many streams of a sleeping session clients still hold here."""
        return self._worker.parking.streams(body.session)

    async def open_shell(self, request: m.ShellRequest) -> int:
        """Asks control for a shell, and returns our end of its socket. Raises RpcError."""
        _, (descriptor,) = await self._control.call_with_descriptors("shell", request, timeout=5.0)
        return descriptor

    def ask_for(self, route: m.Route) -> None:
        """Asks control to resume this session, for which a request waits."""
        self._control.notify("resume", m.ResumeRequest(route.session, route.incarnation))

    def route_of_session(self, session: str) -> m.Route | None:
        """Returns the session's route as the table has it now."""
        entry = self._worker.routes.get(self._endpoints.get(session, ""))
        return entry.route if entry is not None else None

    def route_changed(self, old: m.Route | None, new: m.Route) -> None:
        """The table has taken a route: connections of an incarnation that is over end, and what is held is decided again."""
        session = new.session or (old.session if old is not None else "")
        if new.session:
            self._endpoints[session] = new.endpoint
        else:
            self._endpoints.pop(session, None)
        if old is not None and (old.incarnation != new.incarnation or not new.is_live):
            self._worker.guard(self._worker.upstream.incarnation_ended, old.session, old.incarnation)
        if new.gate == "hold" and new.is_live and old is not None and old.incarnation < new.incarnation:
            # The guest is about to run: what is held goes on waiting, and its connections are made meanwhile.
            for port in self._worker.holds.ports(session):
                self._worker.guard(self._worker.upstream.preconnect, new, port)
            return
        if new.gate == "open":
            asyncio.get_running_loop().call_later(_PREFETCH_SECONDS, self._prefetch, new)
            self._worker.guard(self._worker.parking.opened, new)
        elif new.gate == "refuse":
            self._worker.guard(self._worker.parking.over, session)
            self._worker.guard(self._worker.upstream.forget, session)
        self._worker.holds.changed(session)

    def _prefetch(self, route: m.Route) -> None:
        if self.route_of_session(route.session) == route:
            self._worker.upstream.prefetch(route)

    async def lookup(self, host: str, session: str) -> bool:
        """Whether what the table says of the host is final: where it says nothing, control is asked for it. False where control does not
        answer. `session` is the one that the client's token is for: if that has its endpoint here, it is not this host's, and control
        is not asked, so that while it is away the answer does not show which hosts exist. Misses are remembered for a second."""
        if session in self._endpoints or self._misses.get(host, 0.0) > self._worker.time():
            return True
        task = self._lookups.get(host)
        if task is None:
            task = self._lookups[host] = self._worker.spawn(self._look_up(host))
        return await asyncio.shield(task)

    async def _look_up(self, host: str) -> bool:
        try:
            route = await self._control.call("lookup", m.LookupRequest(host), m.Route | None, timeout=2.0)
        except RpcError:
            return False
        finally:
            self._lookups.pop(host, None)
        if route is not None:
            self._worker.routes.add(route)
            return True
        if len(self._misses) >= _MISSES_MAX:
            self._misses.clear()
        self._misses[host] = self._worker.time() + _MISS_SECONDS
        return True

    def report_fault(self, session: str, text: str) -> None:
        """Something was wrong with the session's application, and its client was told no more than 502: a line for the microVM's log.
        `text` names the port, the rule that was broken, and its clause; nothing that the application or a client sent."""
        self._faults.add(session, text)

    def report(self) -> None:
        """Reports what has happened since the last report: activity, ports that have listened, faults, counters."""
        connection = self._control.connection
        if connection is None:
            return
        if (report := self._worker.routes.report()) is not None:
            connection.notify("activity", report)
        if ports := self._worker.upstream.take_seen():
            connection.notify("listened", m.Listened(ports))
        if lines := self._faults.take():
            connection.notify("faults", m.Faults(lines))
        if self._worker.counters.answers != self._counted:
            counted = [list(by_digit) for by_digit in self._worker.counters.answers]
            held, access = self._worker.holds.statistics()["requests"], self._worker.counters.access
            answers = dict(zip(PROTOCOLS, counted, strict=True))
            connection.notify(
                "counters",
                m.Counters(
                    answers,
                    len(self._worker.clients),
                    held,
                    self._worker.upstream.statistics(),
                    self._worker.parking.count,
                    access.lost if access else 0,
                    access.not_reopened if access else 0,
                ),
            )
            self._counted = counted
