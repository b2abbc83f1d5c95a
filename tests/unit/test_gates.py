"""Routes at control and tables at workers, wired to each other: a gate that was confirmed is closed, and in the end all know the same.

Connections keep the order of what is sent (test_rpc.py); everything else may come in any order: changes of other sessions, gates,
workers that are killed, connect again or are replaced, confirmations that are late or never come.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from edge_rig import OK, Rig
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway import messages as m
from gateway.edge.policy.routes import RouteTable
from gateway.rpc import Client, Connection, RpcLost, Server, Service
from gateway.sessions.model import Session
from gateway.sessions.routes import HOLD, OPEN, Gate, Routes
from gateway.sessions.states import State

WORKERS = 3  # two that are expected, and the successor of one of them
NAMES = ("edge-0", "edge-1", "edge-1")


def session_of(name: str, state: State = State.RUNNING) -> Session:
    arn = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
    return Session(name, f"host-{name}", arn, "1.0", "image", 512, 0.0, 3600, state=state, incarnation=1)


# ---- through real sockets ----


class Worker:
    """What a worker does with its routes."""

    def __init__(self, path: Path) -> None:
        self.routes = RouteTable(lambda: 0.0, lambda old, new: None)
        self.is_up = asyncio.Event()
        self.client = Client(path, Service(self), self._connected)

    async def _connected(self, connection: Connection) -> None:
        self.routes.replace(await connection.call("hello", m.Hello("edge-0"), m.Table))
        self.is_up.set()

    async def rpc_route(self, connection: Connection, body: m.Route) -> None:
        self.routes.change(body)

    async def rpc_gate(self, connection: Connection, body: m.Route) -> m.GateAnswer:
        return self.routes.close_gate(body)


class Control:
    def __init__(self, routes: Routes) -> None:
        self.routes = routes

    async def rpc_hello(self, connection: Connection, body: m.Hello) -> m.Table:
        return self.routes.add_worker(connection, body.worker)


@pytest.mark.parametrize("is_removed", [False, True])
async def test_a_gate_closes_though_another_session_changes_in_the_same_turn(tmp_path: Path, is_removed: bool) -> None:
    routes = Routes(1, 5.0)
    one, other = session_of("one"), session_of("other")
    routes.publish(one)
    routes.publish(other)
    server = Server(tmp_path / "c", Service(Control(routes)), {os.getuid()})
    worker = Worker(tmp_path / "c")
    async with asyncio.timeout(5):
        await worker.is_up.wait()
    one.state = State.SUSPENDING
    gate = asyncio.ensure_future(routes.close_gate(one, 5.0))
    await asyncio.sleep(0)  # it is under way
    if is_removed:
        routes.remove(other)
    else:
        other.state = State.TERMINATED
        routes.publish(other)
    answers, is_complete = await gate
    entry = worker.routes.get(one.endpoint)
    assert entry is not None and entry.route.gate == HOLD and is_complete and len(answers) == 1
    worker.client.close()
    server.close()


async def test_a_worker_whose_gate_is_not_closed_is_no_confirmation(tmp_path: Path) -> None:
    """It is disconnected, and takes the whole table again."""
    routes = Routes(1, 5.0)
    one = session_of("one")
    routes.publish(one)
    server = Server(tmp_path / "c", Service(Control(routes)), {os.getuid()})

    class Deaf(Worker):
        async def rpc_gate(self, connection: Connection, body: m.Route) -> m.GateAnswer:
            self.is_up.clear()
            return m.GateAnswer(0, 0, False)

    worker = Deaf(tmp_path / "c")
    async with asyncio.timeout(5):
        await worker.is_up.wait()
        one.state = State.SUSPENDING
        assert await routes.close_gate(one, 5.0) == ({}, False)
        await worker.is_up.wait()
    entry = worker.routes.get(one.endpoint)
    assert entry is not None and entry.route.gate == HOLD
    worker.client.close()
    server.close()


async def test_a_session_that_ends_while_workers_are_waited_for_keeps_its_gate() -> None:
    """A gate that closes late would hold requests to a session that nobody wakes any more."""
    routes = Routes(1, 5.0)
    one = session_of("one", State.SUSPENDING)
    gate = asyncio.ensure_future(routes.close_gate(one, 5.0))
    await asyncio.sleep(0)
    one.state = State.TERMINATING
    routes.publish(one)
    link = Link()
    routes.add_worker(link, "edge-0")  # type: ignore[arg-type]
    assert await gate == ({}, False)
    route = routes.find(one.endpoint)
    assert route is not None and route.gate == "refuse" and not link.to_worker


async def test_a_worker_that_is_being_replaced_does_not_stand_in_for_another_slots() -> None:
    routes = Routes(2, 0.0)
    one = session_of("one", State.SUSPENDING)
    for _ in range(2):
        routes.add_worker(Link(), "edge-0")  # type: ignore[arg-type]
    _, is_complete = await routes.close_gate(one, 0.0)
    assert not is_complete


async def test_a_drain_that_ends_when_the_gate_is_open_again_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control was killed, and its successor let the session go on."""
    rig = Rig(tmp_path, monkeypatch)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        asked.set()
        await may_answer.wait()
        writer.write(OK)

    rig.script = slow
    await rig.start()
    answer = asyncio.ensure_future(rig.ask(rig.request()))
    await asked.wait()
    await rig.control.change("hold")
    (connection,) = rig.control.connections
    drained = connection.start_call("drain", m.DrainRequest("s1", 1, 0.1, cut=True), m.Drained)
    await rig.control.change("open")
    assert (await drained)[0] == m.Drained(quiet=False)
    may_answer.set()
    assert [status for status, _, _ in await answer] == [200]
    await rig.stop()


# ---- in any order ----


class Link:
    """One connection, whose every message is delivered when the test says so."""

    def __init__(self) -> None:
        self.to_worker: deque[tuple[str, Any, asyncio.Future[Any] | None]] = deque()
        self.to_control: deque[Callable[[], None]] = deque()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls: list[asyncio.Future[Any]] = []

    def notify(self, method: str, body: Any) -> None:
        if not self.closed.done():
            self.to_worker.append((method, body, None))

    def start_call(self, method: str, body: Any, kind: Any, timeout: float) -> Coroutine[Any, Any, tuple[Any, list[int]]]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed.done():
            future.set_exception(RpcLost("not connected"))
        else:
            self._calls.append(future)
            self.to_worker.append((method, body, future))
        return self._answer(future, timeout)

    async def _answer(self, future: asyncio.Future[Any], timeout: float) -> tuple[Any, list[int]]:
        try:
            async with asyncio.timeout(timeout):
                return await future, []
        except TimeoutError as error:
            raise RpcLost("no answer") from error

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
            for future in self._calls:
                if not future.done():
                    future.set_exception(RpcLost("closed"))


class ManualLoop(asyncio.SelectorEventLoop):
    """Time passes when the test says so."""

    now = 0.0

    def time(self) -> float:
        return self.now


class RoutesAndTables(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = ManualLoop()
        self.count = 2
        self.sessions = [session_of("s1"), session_of("s2")]
        self.gates: dict[str, asyncio.Task[Gate]] = {}  # of sessions that are SUSPENDING
        self.links: list[Link | None] = [None] * WORKERS
        self.routess: list[RouteTable] = [self._table() for _ in range(WORKERS)]

    @initialize()
    def all_connect(self) -> None:
        self.routes = self._call(lambda: Routes(2, 3.0))
        for session in self.sessions:
            self._call(lambda session=session: self.routes.publish(session))
        for worker in range(WORKERS - 1):
            self.connects(worker)
            self._flush(worker)

    def teardown(self) -> None:
        """Whatever was lost is connected again and everything arrives: all tables are control's then."""
        for worker, link in enumerate(self.links):
            if link is None or link.closed.done():
                self.loses(worker)
                self.connects(worker)
        for _ in range(4):
            for worker in range(WORKERS):
                self._flush(worker)
            self.time_passes(5.0)
        for session in self.sessions:
            if session.state is State.RESUMING:
                self.moves(session, State.RUNNING)
        self.time_passes(1.0)
        for worker in range(WORKERS):
            if self.links[worker] is None or self.links[worker].closed.done():  # type: ignore[union-attr]
                self.loses(worker)
                self.connects(worker)
            self._flush(worker)
        for table in self.routess:
            assert {name: entry.route for name in self._endpoints() if (entry := table.get(name)) is not None} == self.routes._routes
        for gate in self.gates.values():
            gate.cancel()
        self.time_passes(0.0)
        self.loop.close()

    # ---- helpers ----

    def _table(self) -> RouteTable:
        return RouteTable(lambda: 0.0, lambda old, new: None)

    def _endpoints(self) -> list[str]:
        return [session_of(f"s{number}").endpoint for number in range(1, self.count + 1)]

    def _call(self, work: Callable[[], Any]) -> Any:
        """As a callback of the loop would, while none of what is scheduled runs."""
        asyncio._set_running_loop(self.loop)
        try:
            return work()
        finally:
            asyncio._set_running_loop(None)

    def _flush(self, worker: int) -> None:
        link = self.links[worker]
        while link is not None and (link.to_worker or (link.to_control and not link.closed.done())):
            self.worker_hears(worker)
            self.control_hears(worker)

    # ---- what may happen ----

    @rule(which=st.integers(0, 1))
    def suspends(self, which: int) -> None:
        if self.sessions[which].state is State.RUNNING:
            self.moves(self.sessions[which], State.SUSPENDING)

    @rule(which=st.integers(0, 1), state=st.sampled_from([State.RUNNING, State.SUSPENDED, State.RESUMING]))
    def goes_on(self, which: int, state: State) -> None:
        self.moves(self.sessions[which], state)

    @rule(which=st.integers(0, 1))
    def ends(self, which: int) -> None:
        self.moves(self.sessions[which], State.TERMINATING)

    def moves(self, session: Session, state: State) -> None:
        """As the lifecycle does: a gate is closed by a task of its own, every other state is published."""
        if session.state is State.TERMINATING or state is session.state:
            return
        if session.id in self.gates and not self.gates[session.id].done() and state is not State.TERMINATING:
            return  # a suspend under way is not left before its gate is answered, but by an end
        self.gates.pop(session.id, None)
        session.state = state
        if state is State.SUSPENDING:
            self.gates[session.id] = self.loop.create_task(self.routes.close_gate(session, 0.25))
        else:
            self._call(lambda: self.routes.publish(session))

    @rule(which=st.integers(0, 1))
    def guest_is_about_to_run(self, which: int) -> None:
        session = self.sessions[which]
        if session.state is State.RESUMING:
            session.incarnation += 1
            self._call(lambda: self.routes.publish(session, is_begun=True))

    @rule(which=st.integers(0, 1))
    def is_purged(self, which: int) -> None:
        """And another one is launched."""
        session = self.sessions[which]
        if session.state is State.TERMINATING:
            self._call(lambda: self.routes.remove(session))
            self.count += 1
            self.sessions[which] = session_of(f"s{self.count}")
            self._call(lambda: self.routes.publish(self.sessions[which]))

    @rule(which=st.integers(0, 1), worker=st.integers(0, WORKERS - 1))
    def holds_requests(self, which: int, worker: int) -> None:
        link = self.links[worker]
        if link is not None:
            self._call(lambda: self.routes.holds(link, self.sessions[which]))  # type: ignore[arg-type]

    @rule(worker=st.integers(0, WORKERS - 1))
    def connects(self, worker: int) -> None:
        if self.links[worker] is not None:
            return
        link = self.links[worker] = self._call(Link)

        def hello() -> None:
            link.to_worker.append(("table", self.routes.add_worker(link, NAMES[worker]), None))

        link.to_control.append(hello)

    @rule(worker=st.integers(0, WORKERS - 1), is_killed=st.booleans())
    def loses(self, worker: int, is_killed: bool = False) -> None:
        link = self.links[worker]
        if link is None:
            return
        self._call(link.close)
        self.links[worker] = None
        if is_killed:
            self.routess[worker] = self._table()  # and does not serve before its first table

    @rule(worker=st.integers(0, WORKERS - 1))
    def worker_hears(self, worker: int) -> None:
        """Also what was sent before its connection was closed."""
        link = self.links[worker]
        if link is None or not link.to_worker:
            return
        method, body, future = link.to_worker.popleft()
        table = self.routess[worker]
        if method == "table":
            table.replace(body)
        elif method == "route":
            table.change(body)
        else:
            answer = table.close_gate(body)
            link.to_control.append(lambda: None if future.done() else future.set_result(answer))  # type: ignore[union-attr]

    @rule(worker=st.integers(0, WORKERS - 1))
    def control_hears(self, worker: int) -> None:
        link = self.links[worker]
        if link is not None and link.to_control and not link.closed.done():
            self._call(link.to_control.popleft())

    @rule(seconds=st.sampled_from([0.0, 0.02, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now += seconds
        for _ in range(8):
            self.a_turn_passes()

    @rule()
    def a_turn_passes(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    # ---- what must hold ----

    @precondition(lambda self: self.gates)
    @invariant()
    def a_confirmed_gate_is_closed(self) -> None:
        for session in self.sessions:
            gate = self.gates.get(session.id)
            if gate is None or not gate.done() or session.state is not State.SUSPENDING:
                continue
            answers, is_complete = gate.result()
            for worker, link in enumerate(self.links):
                if link in answers:
                    entry = self.routess[worker].get(session.endpoint)
                    assert entry is not None and entry.route.gate != OPEN, (session.id, worker)
            assert not is_complete or len(answers) >= 2


RoutesAndTables.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRoutesAndTables = RoutesAndTables.TestCase


@pytest.mark.long
class TestRoutesAndTablesForLong(RoutesAndTables.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=80, deadline=None)
