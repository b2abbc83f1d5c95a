"""Control's side of routing: the routes, sent to every worker; gates closed, and activity counted.

A worker takes the whole table, then each change; it serves only after its first table. Each change is sent in the turn of the loop in
which it is made, and a connection keeps its order (gateway/rpc.py), so that a worker's table is always one that was control's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, TypeVar

import structlog

from gateway.messages import Drained, DrainRequest, GateAnswer, KeySet, Listened, Revoked, Route, SessionName, Table
from gateway.rpc import Connection

from .model import Session
from .states import State

log = structlog.get_logger()

OPEN, HOLD, REFUSE = "open", "hold", "refuse"
Gate = tuple[dict[Connection, GateAnswer], bool]  # what each worker answered, and whether all workers did
T = TypeVar("T")
_DRAIN_MARGIN_SECONDS = 2.0
_PARKED_SECONDS = 1.0
_KEYS_SECONDS = 2.0
_OTHERS_SECONDS = 0.01  # after those that hold requests


def gate(session: Session) -> str:
    """Returns the gate that a request to this session meets."""
    if session.state is State.RUNNING:
        return OPEN
    if session.state in (State.PENDING, State.RESUMING, State.SUSPENDING):
        return HOLD
    if session.state is State.SUSPENDED and session.resumes_on_request and not session.refusal:
        return HOLD
    return REFUSE


def route_of(session: Session, gate_now: str = "", is_begun: bool = False) -> Route:
    """Returns the session's route. `gate_now` replaces the gate that its state has; `is_begun` says that its hypervisor is about to run."""
    is_live = is_begun or session.state in (State.PENDING, State.RUNNING, State.SUSPENDING)
    names = {arn.rpartition(":")[2] for arn in session.ingress}
    return Route(
        session.endpoint, session.id, session.incarnation, gate_now or gate(session), is_live, session.minimum_mib,
        opens_http=bool(names & {"HTTP_INGRESS", "ALL_INGRESS"}), opens_shell=bool(names & {"SHELL_INGRESS", "ALL_INGRESS"}),
        account=session.account,
    )  # fmt: skip


class Routes:
    """`expected` workers must be connected before a gate counts as closed: one that lost its connection goes on serving the routes that it
    knows."""

    def __init__(self, expected: int, wait_seconds: float) -> None:
        self._expected = expected
        self._wait_seconds = wait_seconds
        self._joined = asyncio.Event()
        self._routes: dict[str, Route] = {}
        self._workers: dict[Connection, str] = {}
        self._holders: dict[str, set[Connection]] = {}  # by session: who said that requests wait for it
        self.keys = KeySet([], Revoked())

    def table(self) -> Table:
        return Table(list(self._routes.values()), self.keys.keys, self.keys.revoked)

    def add_worker(self, connection: Connection, name: str) -> Table:
        self._workers[connection] = name
        self._joined.set()
        connection.closed.add_done_callback(lambda _: self._left(connection))
        return self.table()

    def _left(self, connection: Connection) -> None:
        self._workers.pop(connection, None)
        for session, holders in list(self._holders.items()):
            holders.discard(connection)
            if not holders:
                del self._holders[session]

    def find(self, endpoint: str) -> Route | None:
        return self._routes.get(endpoint)

    def holds(self, connection: Connection, session: Session) -> None:
        """Notes that a worker holds requests for this session."""
        if connection in self._workers:
            self._holders.setdefault(session.id, set()).add(connection)

    def publish(self, session: Session, is_begun: bool = False) -> None:
        """Sends the session's route where it has changed. Workers with held requests are notified first that the session runs, and only
        they are notified that its guest is about to: the others would compete with them for the processor."""
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

    def listened(self, worker: Connection, ports: Listened) -> None:
        """Tells the other workers what one has seen: an application that has listened, and refuses, is waited for no longer."""
        for connection in self._workers:
            if connection is not worker:
                connection.notify("listened", ports)

    async def publish_keys(self, keys: KeySet) -> bool:
        """Returns whether every worker verifies by these. Those that are connected hear first; one that does not say so is disconnected,
        and one that is away, and goes on verifying by what it knows, is waited for."""
        self.keys = keys
        were_connected = self._are_connected()
        if await self._take(keys) and were_connected:
            return True
        return await self._all_connected() and await self._take(keys)

    async def _take(self, keys: KeySet) -> bool:
        answers = await self._ask_workers("tokens", keys, bool, _KEYS_SECONDS)
        for connection, answer in answers.items():
            if not answer:
                connection.close()
        return all(answers.values())

    def _tell(self, route: Route, workers: Collection[Connection]) -> None:
        for connection in workers:
            connection.notify("route", route)

    def _tell_others(self, endpoint: str, workers: Collection[Connection]) -> None:
        """Sends the route that the endpoint has by now."""
        route = self._routes.get(endpoint)
        if route is not None:
            self._tell(route, workers)

    async def close_gate(self, session: Session, seconds: float) -> Gate:
        """Closes the gate of a session that is SUSPENDING at every worker; the answers, and whether every worker confirmed it in time.

        A worker that is silent for `seconds`, or whose gate is not closed, is disconnected: its activity is unknown, and it takes the
        whole table when it is back. A session that has left SUSPENDING while workers were waited for keeps the gate that it has.
        """
        complete = await self._all_connected()
        if session.state is not State.SUSPENDING:
            return {}, False
        route = route_of(session, HOLD)
        self._routes[session.endpoint] = route
        answers: dict[Connection, GateAnswer] = {}
        for connection, answer in (await self._ask_workers("gate", route, GateAnswer, seconds)).items():
            if answer is not None and answer.is_closed:
                answers[connection] = answer
            else:
                complete = False
                connection.close()
        return answers, complete

    async def _ask_workers(self, method: str, body: Any, kind: type[T], seconds: float) -> dict[Connection, T | None]:
        """Calls every worker in this turn of the loop; returns the answers, None for those that gave none."""
        workers = dict(self._workers)
        calls = [connection.start_call(method, body, kind, seconds) for connection in workers]
        answers: dict[Connection, T | None] = {}
        for connection, answer in zip(workers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            answers[connection] = None if isinstance(answer, BaseException) else answer[0]
            if isinstance(answer, BaseException):
                log.warning("worker.no_answer", worker=workers[connection], method=method, error=str(answer))
        return answers

    def _are_connected(self) -> bool:
        """So many names, because a worker that is being replaced has its successor's."""
        return len(set(self._workers.values())) >= self._expected

    async def _all_connected(self) -> bool:
        """Waits until the expected workers are connected."""
        try:
            async with asyncio.timeout(self._wait_seconds):
                while not self._are_connected():
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            log.warning("workers.missing", connected=sorted(self._workers.values()), expected=self._expected)
            return False
        return True

    async def parked_streams(self, session: Session) -> int | None:
        """Returns how many streams the workers hold parked for a session; None where one is missing or does not answer."""
        answers = await self._ask_workers("parked", SessionName(session.id), int, _PARKED_SECONDS)
        if not self._are_connected() or None in answers.values():
            return None
        return sum(answer or 0 for answer in answers.values())

    async def drain(
        self, session: Session, seconds: float, cut: bool, park: int = 0, if_quiet: bool = False, one_way: bool = False
    ) -> Drained:
        """Has every worker do what DrainRequest says; returns their answers as one."""
        request = DrainRequest(session.id, session.incarnation, seconds, cut, park, if_quiet, one_way)
        answers = await self._ask_workers("drain", request, Drained, seconds + _DRAIN_MARGIN_SECONDS)
        done = []
        for connection, answer in answers.items():
            if answer is None:
                connection.close()
            done.append(answer or Drained(quiet=False))
        return Drained(
            sum(drained.parked for drained in done), any(drained.spoken for drained in done), all(drained.quiet for drained in done)
        )
