"""Sessions in motion against a host that a test scripts: what is stored before what is done, deadlines, calls that meet."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import sqlite3
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_host import ScriptedHost, no_services
from waiting import turns, until

from gateway import messages as m
from gateway.config import Settings
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import actions as acting
from gateway.sessions import timers
from gateway.sessions.actions import Arrival
from gateway.sessions.lifecycle import Lifecycle
from gateway.sessions.logs import LogStore
from gateway.sessions.model import Archived, IdlePolicy, Session
from gateway.sessions.recovery import recover
from gateway.sessions.routes import Routes
from gateway.sessions.states import Action, Event, State
from gateway.sessions.store import SetAside, Store, StoreError


class NoWorkers(Routes):
    """Routes without edges: gates close at once."""

    def __init__(self) -> None:
        super().__init__(0, 0.1)


class ScriptedArchive:
    """`fail[call]` raises instead."""

    def __init__(self, host: ScriptedHost) -> None:
        self._host = host
        self.kept: list[str] = []
        self._number = 0
        self.files: dict[str, tuple[int, int, int]] = {}
        self.fail: dict[str, list[Exception]] = {}
        self.may_store = asyncio.Event()
        self.may_store.set()
        self.is_storing = asyncio.Event()

    def key(self, session: Session) -> str:
        self._number += 1
        return session.id if self._number == 1 else f"{session.id}.{self._number}"

    async def store(self, session: Session, key: str) -> Archived:
        self.is_storing.set()
        await self.may_store.wait()
        if self.fail.get("store"):
            raise self.fail["store"].pop(0)
        self.kept.append(key)
        host = self._host
        self.files[session.id] = host.snapshots[session.id], host.memories[session.id], host.disks[session.id]
        return Archived(key, 1, "digest")

    async def fetch(self, session: Session, archived: Archived) -> None:
        assert archived.key in self.kept
        if self.fail.get("fetch"):
            raise self.fail["fetch"].pop(0)
        host = self._host
        host.snapshots[session.id], host.memories[session.id], host.disks[session.id] = self.files[session.id]

    async def remove(self, key: str) -> None:
        if self.fail.get("remove"):
            raise self.fail["remove"].pop(0)
        if key in self.kept:
            self.kept.remove(key)


class Rig:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wall = 1_000_000.0

    async def start(self) -> None:
        self.host = ScriptedHost()
        self.store = Store(self.directory / "state.db")
        await self.store.open()
        self.settings = settings = Settings(root=self.directory, archive={"after_seconds": 3600.0}, object_store={"embedded": False})
        self.archive = ScriptedArchive(self.host)
        self.entered: dict[str, State] = {}
        self.moved = asyncio.Event()
        rig = self

        class Watched(Lifecycle):
            def _entered(self, session: Session, action: Action, event: Event) -> None:
                super()._entered(session, action, event)
                rig.entered[session.id] = session.state
                rig.moved.set()

        self.lifecycle = Watched(
            settings, self.store, self.host, NoWorkers(), LogStore(self.directory / "logs"), no_services,  # type: ignore[arg-type]
            self.archive, clock=lambda: self.wall,  # type: ignore[arg-type]
        )  # fmt: skip
        transaction = self.store._transaction

        def seen(batch: Any, *rest: Any) -> None:
            transaction(batch, *rest)
            self.host.stored |= {values[0]: str(values[1]) for statement, values in batch if "INTO sessions" in statement}

        self.store._transaction = seen  # type: ignore[method-assign]

    async def stop(self) -> None:
        await self.lifecycle.close()
        await self.store.close()
        for guest in self.host.guests:
            guest.close()

    def session(self, **changes: Any) -> Session:
        one = Session("s1", "h1", "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "image", 512, self.wall, 3600, **changes)
        self.store.put_session(one)
        return one

    async def launched(self, **changes: Any) -> Session:
        one = self.session(**changes)
        self.lifecycle.launch(one)
        await self.reach(one, State.RUNNING)
        return one

    async def reach(self, session: Session, state: State) -> None:
        """Returns when the state has been entered: stored, and its action started."""
        async with asyncio.timeout(5):
            while session.state is not state or self.entered.get(session.id) is not state:
                self.moved.clear()
                await self.moved.wait()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    one = Rig(tmp_path)
    await one.start()
    yield one
    await one.stop()


POLICY = IdlePolicy(60, 60, True)


async def test_each_step_is_stored_before_it_is_done(rig: Rig) -> None:
    one = await rig.launched()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.RUNNING)
    await rig.lifecycle.fire(one, Event.TERMINATE, "Success.")
    await rig.reach(one, State.TERMINATED)
    assert rig.host.calls == [
        "prepare -", "start PENDING", "suspend SUSPENDING", "kill SUSPENDED",
        "prepare SUSPENDED", "start RESUMING", "stop signal TERMINATING", "forget TERMINATING",
    ]  # fmt: skip
    events = [(row.event, row.new) for row in await rig.store.events("s1")]
    assert events == [
        ("started", "PENDING"), ("started", "RUNNING"), ("suspend", "SUSPENDING"), ("saved", "SUSPENDED"),
        ("resume", "RESUMING"), ("resumed", "RUNNING"), ("terminate", "TERMINATING"), ("cleaned", "TERMINATED"),
    ]  # fmt: skip
    assert (one.incarnation, one.reason, one.snapshot_bytes) == (2, "Success.", 60)


async def test_an_application_that_heeds_its_stop_signal_ends_by_itself(rig: Rig) -> None:
    one = await rig.launched()
    rig.host.heeds["s1"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.TERMINATE, "Success.")
    await rig.reach(one, State.TERMINATING)
    await until(lambda: "stop signal TERMINATING" in rig.host.calls)
    await turns()
    assert "forget TERMINATING" not in rig.host.calls
    rig.host.heeds["s1"].set()
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "Success."


async def test_a_stop_signal_has_its_time(rig: Rig) -> None:
    rig.settings.sessions.stop_seconds = 0.01
    one = await rig.launched()
    rig.host.heeds["s1"] = asyncio.Event()  # and never ends
    await rig.lifecycle.fire(one, Event.EXPIRED)
    await rig.reach(one, State.TERMINATED)
    assert "stop signal TERMINATING" in rig.host.calls


async def test_no_signal_where_there_is_no_time_for_it(rig: Rig) -> None:
    rig.settings.sessions.stop_seconds = 0
    one = await rig.launched()
    await rig.lifecycle.fire(one, Event.TERMINATE)
    await rig.reach(one, State.TERMINATED)
    assert "stop signal TERMINATING" not in rig.host.calls


async def test_a_snapshot_that_cannot_be_made_leaves_it_running(rig: Rig) -> None:
    one = await rig.launched()
    rig.host.fail["suspend"] = [RpcError("DiskFull", "no room")]
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.RUNNING)
    assert [row.event for row in await rig.store.events("s1")][-1] == "not_saved"


async def test_a_resume_that_cannot_be_prepared_keeps_the_snapshot(rig: Rig) -> None:
    one = await rig.launched()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    rig.host.fail["prepare"] = [RpcError("Unavailable", "no memory")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.SUSPENDED)
    assert rig.host.stored["s1"] == "SUSPENDED" and one.incarnation == 1
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.RUNNING)
    assert one.incarnation == 2


async def test_a_lost_snapshot_ends_it_with_a_reason(rig: Rig) -> None:
    one = await rig.launched()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    rig.host.fail["prepare"] = [RpcError("Damaged", "torn")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "The MicroVM could not be resumed: torn"


async def test_vmm_that_is_away_is_waited_for(rig: Rig) -> None:
    rig.host.fail["prepare"] = [RpcLost("away"), RpcLost("away")]
    await rig.launched()
    assert rig.host.calls.count("prepare -") == 3


async def test_terminate_and_resume_that_come_during_a_suspend_wait_for_it(rig: Rig) -> None:
    one = await rig.launched()
    rig.host.block["suspend"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    for event in (Event.RESUME, Event.TERMINATE):
        assert await rig.lifecycle.fire(one, event) is Action.DEFER
    rig.host.block["suspend"].set()
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "Success."


async def test_a_hundred_requests_are_one_resume(rig: Rig) -> None:
    one = await rig.launched(idle_policy=POLICY)
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await asyncio.gather(*(rig.lifecycle.request(one) for _ in range(100)))
    await rig.reach(one, State.RUNNING)
    assert rig.host.calls.count("prepare SUSPENDED") == 1 and one.incarnation == 2


async def test_request_during_a_suspend_wakes_it_after(rig: Rig) -> None:
    one = await rig.launched(idle_policy=POLICY)
    rig.host.block["suspend"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.host.reached["suspend"].wait()
    await rig.lifecycle.request(one)
    rig.host.block["suspend"].set()
    await rig.reach(one, State.RUNNING)
    assert one.incarnation == 2


async def test_without_auto_resume_requests_do_not_wake_it(rig: Rig) -> None:
    one = await rig.launched(idle_policy=IdlePolicy(60, 60, False))
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.request(one)
    assert one.state is State.SUSPENDED


async def test_a_guest_that_ends_by_itself_is_over(rig: Rig) -> None:
    one = await rig.launched()
    rig.lifecycle.exited(one, 3)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "Container Stopped with Exit Code: 3" and rig.host.calls[-1] == "forget TERMINATING"


async def test_an_old_hypervisors_end_means_nothing(rig: Rig) -> None:
    one = await rig.launched()
    rig.lifecycle.hypervisor_ended(m.Ended("s1", 0, "old"))
    rig.lifecycle.hypervisor_ended(m.Ended("s2", 1, "unknown"))
    await rig.lifecycle.quiet()
    assert one.state is State.RUNNING


async def test_a_call_that_cannot_be_stored_is_refused_and_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await rig.launched()

    def full(batch: Any, asides: list[Callable[[], None]], loop: asyncio.AbstractEventLoop) -> None:
        for aside in asides:
            loop.call_soon_threadsafe(aside)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "_transaction", full)
        with pytest.raises(StoreError):
            await rig.lifecycle.fire(one, Event.SUSPEND)
    route = rig.lifecycle.routes.find("h1")
    assert one.state is State.RUNNING and "suspend SUSPENDING" not in rig.host.calls
    assert route is not None and route.gate == "open", "it was closed beside the commit"
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)


@pytest.mark.parametrize("is_stored", [True, False])
async def test_a_launch_is_prepared_while_its_session_is_stored_and_starts_after_that(rig: Rig, is_stored: bool) -> None:
    one = rig.session()
    stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    rig.lifecycle.launch(one, Arrival(stored))
    await rig.host.reached["prepare"].wait()
    await turns()
    assert rig.host.calls == ["prepare -"] and one.incarnation == 0
    if is_stored:
        stored.set_result(None)
        await rig.reach(one, State.RUNNING)
    else:
        stored.set_exception(StoreError("full"))
        await rig.lifecycle.quiet()
        assert rig.host.calls == ["prepare -", "forget -"] and not rig.host.held and one.state is State.PENDING


@pytest.mark.parametrize(
    ("state", "phase", "snapshot", "expected"),
    [
        (State.RUNNING, None, None, State.TERMINATED),
        (State.SUSPENDED, None, 1, State.SUSPENDED),
        (State.SUSPENDED, None, None, State.TERMINATED),
        (State.SUSPENDING, "stopped", 1, State.SUSPENDED),
        (State.SUSPENDING, None, 1, State.SUSPENDED),
        (State.RESUMING, None, None, State.TERMINATED),
        (State.PENDING, None, None, State.TERMINATED),
        (State.TERMINATING, None, None, State.TERMINATED),
    ],
)
async def test_after_a_crash(rig: Rig, state: State, phase: str | None, snapshot: int | None, expected: State) -> None:
    one = rig.session(state=state, incarnation=1, suspended_by="api")
    await rig.store.commit()
    rig.host.disks["s1"] = rig.host.memories["s1"] = 1
    if phase is not None:
        rig.host.held["s1"] = m.SessionState("s1", 1, phase, 0, 0.0)
    if snapshot is not None:
        rig.host.snapshots["s1"] = snapshot
    rig.lifecycle.settle(one)
    await rig.lifecycle.quiet()
    assert one.state is expected


def test_descriptors_do_not_leak() -> None:
    assert len(os.listdir("/proc/self/fd")) < 200


@pytest.mark.parametrize("is_launch", [True, False])
async def test_vmm_that_dies_while_a_guest_starts_costs_nothing(rig: Rig, is_launch: bool) -> None:
    """Whether the guest runs is seen when vmm is back; here it was prepared and not started."""
    if is_launch:
        rig.host.fail["start"] = [RpcLost("away")]
        one = await rig.launched()
    else:
        one = await rig.launched()
        await rig.lifecycle.fire(one, Event.SUSPEND)
        await rig.reach(one, State.SUSPENDED)
        rig.host.fail["start"] = [RpcLost("away")]
        await rig.lifecycle.fire(one, Event.RESUME)
        await rig.reach(one, State.RUNNING)
    assert one.incarnation == (1 if is_launch else 2) and rig.host.held["s1"].phase == "running"


async def test_what_was_being_prepared_for_nobody_is_forgotten_after_a_restart(rig: Rig) -> None:
    rig.session(state=State.SUSPENDED, incarnation=1)
    await recover(rig.lifecycle, m.HostState([], {"s1": 1}, [], [], ["s1", "unknown"]))
    await rig.lifecycle.close()
    assert rig.host.calls == ["forget -"]


async def test_the_files_of_a_session_whose_row_cannot_be_read_are_kept(rig: Rig) -> None:
    rig.store.set_aside = [SetAside("sessions", one, 0.0, "torn") for one in ("s1", "s2")]
    await recover(rig.lifecycle, m.HostState([], {"s1": 1}, [], [], ["s2"]))
    assert rig.host.calls == []


async def test_an_orphan_that_cannot_be_forgotten_keeps_no_control_from_starting(rig: Rig) -> None:
    rig.host.fail["forget"] = [RpcError("Unavailable", "busy")]
    await recover(rig.lifecycle, m.HostState([], {}, [], [], ["gone", "lost"]))
    assert rig.host.calls == ["forget -", "forget -"], "the others are forgotten all the same"


async def test_a_full_host_resumes_nothing_until_there_is_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request stays held (its worker answers 502 at the deadline); it is tried again by itself."""
    monkeypatch.setattr(timers, "_RETRY_SECONDS", 0.02)
    one = await rig.launched(idle_policy=POLICY)
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    rig.host.memory_available = 1 << 30
    await rig.lifecycle.request(one)
    await until(lambda: rig.host.looks > 3)
    assert one.state is State.SUSPENDED and "prepare SUSPENDED" not in rig.host.calls
    rig.host.memory_available = 64 << 30
    await rig.reach(one, State.RUNNING)


async def test_what_was_just_admitted_counts(rig: Rig) -> None:
    rig.host.memory_available = (1024 + 3 * 96 + 50) << 20  # the reserve, and room for three
    assert [await rig.lifecycle.room.take() for _ in range(5)] == [True, True, True, False, False]


async def test_a_host_with_plenty_of_room_is_not_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def capacity() -> m.Capacity:
        nonlocal asked
        asked += 1
        return m.Capacity(rig.host.memory_available, 1 << 40, 1 << 40, 96 << 20)

    monkeypatch.setattr(rig.host, "reclaim_capacity", capacity)
    rig.host.memory_available = 64 << 30
    assert await rig.lifecycle.room.take() and not asked
    rig.host.memory_available = (1024 + 8 * 96) << 20  # one was promised: not plenty
    assert await rig.lifecycle.room.take() and asked == 1
    rig.host.memory_available = 1 << 30
    assert await rig.lifecycle.room.take() and asked == 1, "what was said a moment ago holds"


async def test_a_session_that_ends_while_it_is_being_loaded_has_rows_that_follow(rig: Rig) -> None:
    """A resume is stored when its guest is about to run: what ends it before that came, for who reads the rows, while it slept."""
    session = await rig.launched(idle_policy=IdlePolicy(600, 600, True))
    await rig.lifecycle.fire(session, Event.SUSPEND)
    await rig.reach(session, State.SUSPENDED)
    rig.host.block["prepare"] = asyncio.Event()
    await rig.lifecycle.fire(session, Event.RESUME)
    assert session.state is State.RESUMING
    await rig.lifecycle.fire(session, Event.TERMINATE)
    await rig.reach(session, State.TERMINATED)
    rows = await rig.store.events(session.id)
    assert [row.new for row in rows][-2:] == ["TERMINATING", "TERMINATED"]
    assert all(after.old == before.new for before, after in itertools.pairwise(rows))


def scripted_drains(rig: Rig, *answers: m.Drained) -> list[bool]:
    """What workers answer to drains; whether each was asked to leave alone what is not quiet."""
    asked: list[bool] = []
    left = list(answers)

    async def drain(session: Session, seconds: float, cut: bool, park: int = 0, if_quiet: bool = False, one_way: bool = False) -> m.Drained:
        if not cut:
            return m.Drained()
        asked.append(if_quiet)
        return left.pop(0)

    rig.lifecycle.routes.drain = drain  # type: ignore[method-assign]
    return asked


async def test_an_idle_suspend_is_called_off_where_a_stream_is_not_quiet(rig: Rig) -> None:
    one = await rig.launched(idle_policy=POLICY)
    asked = scripted_drains(rig, m.Drained(quiet=False), m.Drained(1))
    rig.lifecycle.routes._expected = 0
    await rig.lifecycle.fire(one, Event.IDLE)
    await rig.reach(one, State.RUNNING)
    assert [row.event for row in await rig.store.events("s1")][-2:] == ["idle", "called_off"] and "suspend" not in " ".join(rig.host.calls)
    await rig.lifecycle.fire(one, Event.IDLE)
    await rig.reach(one, State.SUSPENDED)
    assert one.parked == 1 and asked == [True, True]


async def test_who_spoke_while_a_suspend_was_under_way_is_answered_after_it(rig: Rig) -> None:
    one = await rig.launched(idle_policy=POLICY)
    asked = scripted_drains(rig, m.Drained(1, spoken=True))
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.lifecycle.quiet()
    assert (one.incarnation, one.state) == (2, State.RUNNING)
    said = [row.event for row in await rig.store.events("s1")]
    assert asked == [False] and said[-4:] == ["suspend", "saved", "request", "resumed"]


@pytest.mark.parametrize(("setting", "asked"), [("park", (True, False)), ("park-all", (True, True)), ("cut", (False, False))])
async def test_which_streams_are_to_be_parked(rig: Rig, setting: str, asked: tuple[bool, bool]) -> None:
    one = await rig.launched(idle_policy=POLICY)
    seen: list[tuple[bool, bool]] = []

    async def drain(session: Session, seconds: float, cut: bool, park: int = 0, if_quiet: bool = False, one_way: bool = False) -> m.Drained:
        seen.append((park > 0, one_way))
        return m.Drained()

    rig.lifecycle.routes.drain = drain  # type: ignore[method-assign]
    rig.settings.sessions.streams_at_suspend = setting
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    assert set(seen) == {asked}


@pytest.mark.parametrize("parked", [0, 1])
async def test_a_rest_that_was_interrupted_is_finished_before_anybody_wakes_the_session(rig: Rig, parked: int) -> None:
    """Control was killed when the snapshot was stored and its hypervisor not ended yet, which then still holds the session."""
    one = await rig.launched(idle_policy=POLICY)
    scripted_drains(rig, m.Drained(parked))
    rig.host.block["release_vm"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    assert rig.host.held["s1"].phase == "stopped"
    host = rig.host
    await rig.lifecycle.close()
    await rig.store.close()
    await rig.start()
    rig.host.__dict__.update(host.__dict__)
    rig.host.released.clear()
    await recover(rig.lifecycle, await rig.host.state())
    again = rig.store.sessions["s1"]
    rig.lifecycle.post(again, Event.REQUEST)
    await rig.reach(again, State.RESUMING)
    await turns()
    assert again.incarnation == 1, "the request waits"
    rig.host.block.pop("release_vm").set()
    await rig.reach(again, State.RUNNING)
    assert rig.host.released == [("s1", 1, True, parked > 0)] and again.incarnation == 2


class Broken(Exception):
    """Something that nobody expects: an answer of another shape, a mistake of ours."""


@pytest.mark.parametrize("call", ["prepare", "start", "suspend", "release_vm", "forget"])
async def test_no_unexpected_exception_strands_a_session(rig: Rig, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an action raises, the session is compared with its host and goes on; requests are not held for nothing."""
    monkeypatch.setattr(acting, "_SETTLE_RETRY_SECONDS", 0.01)
    one = await rig.launched(idle_policy=POLICY)
    if call in ("prepare", "start"):
        await rig.lifecycle.fire(one, Event.SUSPEND)
        await rig.reach(one, State.SUSPENDED)
    rig.host.fail[call] = [Broken("unexpected"), Broken("and again")]
    await rig.lifecycle.fire(one, Event.TERMINATE if call == "forget" else Event.RESUME if call in ("prepare", "start") else Event.SUSPEND)
    await rig.lifecycle.quiet()
    assert one.state is {
        "prepare": State.SUSPENDED, "start": State.RUNNING, "suspend": State.RUNNING, "release_vm": State.SUSPENDED, "forget": State.TERMINATED
    }[call]  # fmt: skip
    if call != "forget":
        rig.host.fail.clear()
        await rig.lifecycle.fire(one, Event.RESUME)
        await rig.reach(one, State.RUNNING)


async def test_an_unexpected_exception_ends_a_launch_with_a_reason(rig: Rig) -> None:
    one = rig.session()
    rig.host.fail["prepare"] = [Broken("unexpected")]
    rig.lifecycle.launch(one)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "The MicroVM could not be launched: unexpected"


async def test_a_host_that_cannot_end_a_hypervisor_does_not_keep_its_session(rig: Rig) -> None:
    """What came while it was saved is acted on, and its window is watched."""
    one = await rig.launched(idle_policy=POLICY)
    rig.host.fail["release_vm"] = [RpcError("Unavailable", "not now")]
    rig.host.block["suspend"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.lifecycle.fire(one, Event.TERMINATE)
    rig.host.block.pop("suspend").set()
    await rig.reach(one, State.TERMINATED)


async def asleep_with_archive(rig: Rig, parked: int = 0) -> tuple[Session, ScriptedArchive]:
    one = await rig.launched(idle_policy=POLICY)
    scripted_drains(rig, m.Drained(parked))
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.quiet()
    return one, rig.archive


async def test_a_session_that_sleeps_for_long_is_archived_and_fetched(rig: Rig) -> None:
    one, archive = await asleep_with_archive(rig)
    rig.lifecycle._due(timers.Deadline.ARCHIVE, one.id)
    await rig.lifecycle.quiet()
    assert one.archived is not None and archive.kept == ["s1"] and not rig.host.snapshots
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.RUNNING)
    await rig.lifecycle.quiet()
    assert one.archived is None and archive.kept == []


async def test_a_wake_in_the_turn_in_which_an_archive_is_due_does_not_wait_for_itself(rig: Rig) -> None:
    one, archive = await asleep_with_archive(rig)
    wake = asyncio.ensure_future(rig.lifecycle.fire(one, Event.RESUME))
    rig.lifecycle._due(timers.Deadline.ARCHIVE, one.id)
    await wake
    await rig.reach(one, State.RUNNING)
    await rig.lifecycle.quiet()
    assert archive.kept == [] and one.archived is None


@pytest.mark.parametrize("event", [Event.RESUME, Event.TERMINATE])
async def test_what_comes_while_a_session_is_archived_waits_for_it(rig: Rig, event: Event) -> None:
    """Otherwise an archive would stay behind in the object store."""
    one, archive = await asleep_with_archive(rig)
    archive.may_store.clear()
    rig.lifecycle._due(timers.Deadline.ARCHIVE, one.id)
    await archive.is_storing.wait()
    await rig.lifecycle.fire(one, event)
    archive.may_store.set()
    await rig.reach(one, State.RUNNING if event is Event.RESUME else State.TERMINATED)
    await rig.lifecycle.quiet()
    assert archive.kept == []


@pytest.mark.parametrize(("left", "is_archived"), [(0, True), (2, False), (None, False)])
async def test_a_session_is_archived_when_the_last_of_its_parked_streams_has_left(rig: Rig, left: int | None, is_archived: bool) -> None:
    """Its workers are asked; where one is missing, nobody knows."""
    one, archive = await asleep_with_archive(rig, parked=3)

    async def parked_streams(session: Session) -> int | None:
        return left

    rig.lifecycle.routes.parked_streams = parked_streams  # type: ignore[method-assign]
    rig.lifecycle._due(timers.Deadline.ARCHIVE, one.id)
    await rig.lifecycle.quiet()
    assert (archive.kept == ["s1"]) is is_archived and one.parked == (3 if left is None else left)
    assert is_archived or rig.lifecycle.timers.is_set(one, timers.Deadline.ARCHIVE), "it is looked at again"


async def test_an_action_that_is_stopped_before_its_first_step_leaves_nothing_behind(rig: Rig) -> None:
    """A service that stops in the moment of a suspend."""
    one = await rig.launched(idle_policy=POLICY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await rig.lifecycle.fire(one, Event.SUSPEND)
        await rig.lifecycle.close()
        rig.lifecycle._work.clear()
        gc.collect()
    assert not [str(warning.message) for warning in caught]
    assert one.state is State.SUSPENDING
