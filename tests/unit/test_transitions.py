"""Transitions: what is stored before what, what a store that fails takes back, and what waits for its turn."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import turns

from gateway.sessions import transitions as module
from gateway.sessions.model import Session
from gateway.sessions.routes import Gate, Routes
from gateway.sessions.states import Action, Event, State
from gateway.sessions.store import Store, StoreError
from gateway.sessions.transitions import Observer, Transitions
from gateway.tasks import Tasks


class Rig:
    def __init__(self, directory: Path) -> None:
        self.store = Store(directory / "state.db")
        self.routes = Routes(0, 0.0)
        self.entered: list[tuple[State, Action, Event]] = []
        self.tasks = Tasks()
        self.seen: list[Event] = []
        self.transitions = Transitions(
            self.store, self.routes, self.tasks, 1.0, self._entered, Observer(transition=self.seen.append), lambda: 7.0
        )  # fmt: skip
        self.fails = 0  # so many commits
        self.published: list[str] = []
        publish, transaction = self.routes.publish, self.store._transaction

        def noted(session: Session, is_begun: bool = False) -> None:
            publish(session, is_begun)
            route = self.routes.find(session.endpoint)
            assert route is not None
            self.published.append(f"{route.incarnation} {route.gate}{' begun' if is_begun else ''}")

        def failing(*arguments: object) -> None:
            if self.fails:
                self.fails -= 1
                raise sqlite3.OperationalError("disk is full")
            transaction(*arguments)  # type: ignore[arg-type]

        self.routes.publish = noted  # type: ignore[method-assign]
        self.store._transaction = failing  # type: ignore[method-assign]

    def _entered(self, session: Session, action: Action, event: Event) -> None:
        self.entered.append((session.state, action, event))

    def session(self, state: State, incarnation: int = 1) -> Session:
        arn = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
        one = Session("s1", "h1", arn, "1.0", "image", 512, 0.0, 3600, state=state, incarnation=incarnation)
        self.store.put_session(one)
        return one

    async def rows(self) -> list[tuple[str, str, str]]:
        return [(row.event, row.old, row.new) for row in await self.store.events("s1")]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    one = Rig(tmp_path)
    await one.store.open()
    yield one
    await one.tasks.close()
    await one.store.close()


async def test_an_event_is_stored_before_its_action_starts(rig: Rig) -> None:
    one = rig.session(State.RUNNING)
    before = asyncio.ensure_future(rig.transitions.fire(one, Event.IDLE))
    await asyncio.sleep(0)
    assert one.state is State.SUSPENDING and rig.entered == []
    assert await before is Action.SAVE
    assert rig.entered == [(State.SUSPENDING, Action.SAVE, Event.IDLE)] and rig.seen == [Event.IDLE]
    assert await rig.rows() == [("idle", "RUNNING", "SUSPENDING")]


async def test_events_of_one_session_take_turns(rig: Rig) -> None:
    one = rig.session(State.SUSPENDED)
    actions = await asyncio.gather(*(rig.transitions.fire(one, Event.REQUEST) for _ in range(20)))
    assert sorted(actions) == sorted([Action.WAKE, *[Action.NONE] * 19]) and len(rig.entered) == 1


async def test_a_resume_is_stored_when_its_guest_is_about_to_run(rig: Rig) -> None:
    one = rig.session(State.SUSPENDED)
    await rig.transitions.fire(one, Event.RESUME)
    assert await rig.rows() == []
    await rig.transitions.begin(one, Event.RESUME)
    assert one.incarnation == 2 and await rig.rows() == [("resume", "SUSPENDED", "RESUMING")]
    await rig.transitions.fire(one, Event.RESUMED)
    assert (await rig.rows())[-1] == ("resumed", "RESUMING", "RUNNING")
    assert rig.published == ["1 hold", "2 hold begun", "2 open"]


async def test_an_incarnation_that_cannot_be_stored_is_not_there(rig: Rig) -> None:
    one = rig.session(State.SUSPENDED)
    await rig.transitions.fire(one, Event.RESUME)
    rig.fails = 1
    with pytest.raises(StoreError):
        await rig.transitions.begin(one, Event.RESUME)
    assert one.incarnation == 1
    await rig.transitions.fire(one, Event.NOT_RESUMED)
    await rig.transitions.fire(one, Event.TERMINATE)
    assert await rig.rows() == [("terminate", "SUSPENDED", "TERMINATING")]


async def test_a_call_that_cannot_be_stored_is_taken_back(rig: Rig) -> None:
    one = rig.session(State.RUNNING)
    rig.routes.publish(one)
    rig.fails = 1
    with pytest.raises(StoreError):
        await rig.transitions.fire(one, Event.TERMINATE, "Success.")
    assert one.state is State.RUNNING and rig.entered == [] and rig.published[-1] == "1 open"


async def test_what_has_happened_is_stored_as_soon_as_that_works(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STORE_RETRY_SECONDS", 0.0)
    one = rig.session(State.RUNNING)
    rig.fails = 3
    await rig.transitions.fire(one, Event.EXITED, "it ended")
    assert one.reason == "it ended" and await rig.rows() == [("exited", "RUNNING", "TERMINATING")]


@pytest.mark.parametrize("is_stored", [True, False])
async def test_the_gate_of_a_calls_suspend_is_closed_beside_its_commit(rig: Rig, is_stored: bool) -> None:
    one = rig.session(State.RUNNING)
    rig.routes.publish(one)
    closed = asyncio.Event()
    close = rig.routes.close_gate

    async def noted(session: Session, seconds: float) -> Gate:
        closed.set()
        return await close(session, seconds)

    rig.routes.close_gate = noted  # type: ignore[method-assign]
    transaction = rig.store._transaction

    def slow(batch: object, during: list[object], loop: asyncio.AbstractEventLoop, connection: object) -> None:
        for meanwhile in during:
            loop.call_soon_threadsafe(meanwhile)  # type: ignore[arg-type]
        asyncio.run_coroutine_threadsafe(closed.wait(), loop).result(5)
        if not is_stored:
            raise sqlite3.OperationalError("disk is full")
        transaction(batch, [], loop, connection)  # type: ignore[arg-type]

    rig.store._transaction = slow  # type: ignore[method-assign,assignment]
    if is_stored:
        await rig.transitions.fire(one, Event.SUSPEND)
        assert await rig.transitions.close_gate(one) == ({}, True) and one.state is State.SUSPENDING
        route = rig.routes.find("h1")
        assert route is not None and route.gate == "hold"
    else:
        with pytest.raises(StoreError):
            await rig.transitions.fire(one, Event.SUSPEND)
        assert rig.published[-1] == "1 open" and one.state is State.RUNNING


async def test_deferred_events_wait_until_they_are_taken(rig: Rig) -> None:
    one = rig.session(State.SUSPENDING)
    for event in (Event.REQUEST, Event.TERMINATE):
        assert await rig.transitions.fire(one, event) is Action.DEFER
    assert rig.transitions.is_wake_deferred(one) and rig.transitions.is_request_deferred(one)
    rig.transitions.drop_wakes(one)
    assert not rig.transitions.is_wake_deferred(one) and rig.transitions.has_deferred(one)
    assert rig.transitions.take_deferred(one) == [Event.TERMINATE] and not rig.transitions.has_deferred(one)


async def test_a_terminated_session_says_when(rig: Rig) -> None:
    one = rig.session(State.TERMINATING)
    await rig.transitions.fire(one, Event.CLEANED)
    assert one.terminated_at == 7.0 and rig.entered[-1] == (State.TERMINATED, Action.NONE, Event.CLEANED)


async def test_tasks_end_with_their_owner_and_log_what_they_raise(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = Tasks()

    async def fails() -> None:
        raise ValueError("of a task")

    async def starts_another() -> None:
        tasks.spawn(turns())

    tasks.spawn(fails())
    tasks.spawn(starts_another())
    await tasks.quiet()
    assert "of a task" in capsys.readouterr().out
    waiting = tasks.spawn(asyncio.Event().wait())
    await tasks.close()
    assert waiting.cancelled()
