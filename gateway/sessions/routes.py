"""Control's side of routing: a numbered log of changes, sent to every worker; gates closed and counted.

A worker takes the whole table, then changes in order; it serves only after its first table.
"""

from __future__ import annotations

import asyncio

import structlog

from gateway.messages import Drained, DrainRequest, GateAnswer, GateRequest, Route, RouteChange, Table, Verifier
from gateway.rpc import Connection, RpcError

from .model import Session
from .states import State

log = structlog.get_logger()

OPEN, HOLD, REFUSE = "open", "hold", "refuse"
_DRAIN_MARGIN_SECONDS = 2.0


def gate(session: Session) -> str:
    """What a request to this session meets."""
    if session.state is State.RUNNING:
        return OPEN
    if session.state in (State.PENDING, State.RESUMING, State.SUSPENDING):
        return HOLD
    if session.state is State.SUSPENDED and session.resumes_on_request:
        return HOLD
    return REFUSE


def route_of(session: Session, gate_now: str = "", is_begun: bool = False) -> Route:
    """`gate_now` replaces the gate that the session's state has. `is_begun`: a resume whose hypervisor is about to run."""
    is_live = is_begun or session.state in (State.PENDING, State.RUNNING, State.SUSPENDING)
    names = {arn.rpartition(":")[2] for arn in session.ingress}
    return Route(
        session.endpoint, session.id, session.incarnation, gate_now or gate(session), is_live, session.minimum_mib,
        opens_http=bool(names & {"HTTP_INGRESS", "ALL_INGRESS"}), opens_shell=bool(names & {"SHELL_INGRESS", "ALL_INGRESS"}),
    )  # fmt: skip


class Routes:
    """`expected` workers must be connected before a gate counts as closed: one that lost its connection, or us, goes on
    serving what it knows."""

    def __init__(self, expected: int, wait_seconds: float) -> None:
        self._expected = expected
        self._wait_seconds = wait_seconds
        self._joined = asyncio.Event()
        self._number = 0
        self._routes: dict[str, Route] = {}
        self._workers: dict[Connection, str] = {}
        self.keys: list[Verifier] = []

    def table(self) -> Table:
        return Table(self._number, list(self._routes.values()), self.keys)

    def add_worker(self, connection: Connection, name: str) -> Table:
        self._workers[connection] = name
        self._joined.set()
        connection.closed.add_done_callback(lambda _: self._workers.pop(connection, None))
        return self.table()

    def worker_name(self, connection: Connection) -> str:
        return self._workers.get(connection, "")

    def find(self, endpoint: str) -> Route | None:
        return self._routes.get(endpoint)

    def publish(self, session: Session, is_begun: bool = False) -> None:
        route = route_of(session, is_begun=is_begun)
        if self._routes.get(session.endpoint) != route:
            self._routes[session.endpoint] = route
            self._broadcast(route)

    def remove(self, session: Session) -> None:
        if self._routes.pop(session.endpoint, None) is not None:
            self._broadcast(Route(session.endpoint, "", 0, REFUSE, is_live=False))

    def publish_keys(self, keys: list[Verifier]) -> None:
        self.keys = keys
        for connection in self._workers:
            connection.notify("keys", keys)

    def _change(self, route: Route) -> RouteChange:
        self._number += 1
        return RouteChange(self._number, route)

    def _broadcast(self, route: Route) -> None:
        change = self._change(route)
        for connection in self._workers:
            connection.notify("route", change)

    async def close_gate(self, session: Session, seconds: float) -> tuple[dict[str, GateAnswer], bool]:
        """Closes the session's gate everywhere; answers by worker, and whether all were there to answer in time.

        A worker that is silent for `seconds` is disconnected: what it knows of activity is unknown.
        """
        complete = await self._all_connected()
        route = route_of(session, HOLD)
        self._routes[session.endpoint] = route
        request = GateRequest(self._change(route))

        async def ask(connection: Connection, name: str) -> tuple[str, GateAnswer] | None:
            try:
                return name, await connection.call("gate", request, GateAnswer, timeout=seconds)
            except RpcError:
                log.warning("gate.silent", worker=name)
                connection.close()
                return None

        answers: dict[str, GateAnswer] = {}
        for answer in await asyncio.gather(*(ask(*item) for item in list(self._workers.items()))):
            if answer is None:
                complete = False
            else:
                answers[answer[0]] = answer[1]
        return answers, complete

    async def _all_connected(self) -> bool:
        try:
            async with asyncio.timeout(self._wait_seconds):
                while len(self._workers) < self._expected:
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            log.warning("gate.workers_missing", connected=len(self._workers), expected=self._expected)
            return False
        return True

    async def drain(self, session: Session, seconds: float, cut: bool, park: int = 0, if_quiet: bool = False) -> Drained:
        """Has every worker do what DrainRequest says; what they answered, together."""
        request = DrainRequest(session.id, session.incarnation, seconds, cut, park, if_quiet)

        async def ask(connection: Connection) -> Drained:
            try:
                return await connection.call("drain", request, Drained, timeout=seconds + _DRAIN_MARGIN_SECONDS)
            except RpcError:
                connection.close()
                return Drained(quiet=False)

        done = await asyncio.gather(*(ask(connection) for connection in list(self._workers)))
        return Drained(sum(one.parked for one in done), any(one.spoken for one in done), all(one.quiet for one in done))
