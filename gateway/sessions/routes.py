"""Control's side of routing: a numbered log of changes, sent to every worker; gates closed and counted.

A worker takes the whole table, then changes in order; it serves only after its first table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from gateway.messages import Drained, DrainRequest, GateAnswer, GateRequest, Route, RouteChange, Table, Verifier
from gateway.rpc import Connection, RpcError

from .model import Session
from .states import State

log = structlog.get_logger()

OPEN, HOLD, REFUSE = "open", "hold", "refuse"
Gate = tuple[dict[str, GateAnswer], bool]  # what each worker said, and whether all were there to say it
_DRAIN_MARGIN_SECONDS = 2.0
_OTHERS_SECONDS = 0.01  # after those that hold requests


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
        self._holders: dict[str, set[Connection]] = {}  # by session: who said that requests wait for it
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

    def holds(self, connection: Connection, session: Session) -> None:
        """A worker holds requests for this session."""
        if connection in self._workers:
            self._holders.setdefault(session.id, set()).add(connection)

    def publish(self, session: Session, is_begun: bool = False) -> None:
        """Who holds requests hears first that they may go on, and alone that their guest is about to run: the others' looks at it would
        take a processor from them."""
        route = route_of(session, is_begun=is_begun)
        if self._routes.get(session.endpoint) == route:
            return
        self._routes[session.endpoint] = route
        if is_begun:
            self._tell(route, self._holders.get(session.id, ()))
            return
        holders = self._holders.pop(session.id, set()) if route.gate != HOLD else set()
        if route.gate != OPEN or not holders:
            self._tell(route, self._workers)
            return
        self._tell(route, holders)
        others = [connection for connection in self._workers if connection not in holders]
        asyncio.get_running_loop().call_later(_OTHERS_SECONDS, self._tell_others, session.endpoint, others)

    def remove(self, session: Session) -> None:
        self._holders.pop(session.id, None)
        if self._routes.pop(session.endpoint, None) is not None:
            self._tell(Route(session.endpoint, "", 0, REFUSE, is_live=False), self._workers)

    def publish_keys(self, keys: list[Verifier]) -> None:
        self.keys = keys
        for connection in self._workers:
            connection.notify("keys", keys)

    def _change(self, route: Route) -> RouteChange:
        self._number += 1
        return RouteChange(self._number, route)

    def _tell(self, route: Route, workers: Collection[Connection]) -> None:
        change = self._change(route)
        for connection in workers:
            connection.notify("route", change)

    def _tell_others(self, endpoint: str, workers: Collection[Connection]) -> None:
        """What the route is by now."""
        route = self._routes.get(endpoint)
        if route is not None:
            self._tell(route, workers)

    async def close_gate(self, session: Session, seconds: float) -> Gate:
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
