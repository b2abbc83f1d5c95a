"""No error of the host deletes what was saved: what passes leads back, what does not is set aside, and a lost answer is asked for again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import boto3
import msgspec
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber
from test_lifecycle import POLICY, Rig
from waiting import until

from gateway import config
from gateway import messages as m
from gateway.config import ConfigError
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import actions as acting
from gateway.sessions import hooks, timers
from gateway.sessions import host as hosting
from gateway.sessions.agent import AgentError
from gateway.sessions.archive import Archive, ArchiveDamaged, ArchiveError
from gateway.sessions.model import Archived, Hooks, IdlePolicy, Session
from gateway.sessions.recovery import recover
from gateway.sessions.states import Event, State
from gateway.sessions.store import StoreError


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    for module, name, value in (
        (acting, "_SETTLE_RETRY_SECONDS", 0.01), (acting, "_DESTROY_RETRY_SECONDS", 0.01), (acting, "_RETRY_MOST_SECONDS", 0.01),
        (hosting, "_AWAY_RETRY_SECONDS", 0.005), (hosting, "_AWAY_SECONDS", 0.05), (timers, "_RETRY_SECONDS", 0.01),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    one = Rig(tmp_path)
    await one.start()
    yield one
    assert not one.host.torn, "a snapshot was loaded over a disk that had been written to since"
    await one.stop()


async def asleep(rig: Rig, **changes: Any) -> Session:
    one = await rig.launched(**{"idle_policy": POLICY, **changes})
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.quiet()
    rig.host.calls.clear()
    rig.host.reached.clear()
    return one


def deleted(rig: Rig) -> bool:
    return any(call.startswith("forget") for call in rig.host.calls)


async def resumes(rig: Rig, one: Session) -> bool:
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.lifecycle.quiet()
    return one.state is State.RUNNING and not one.reason


PASSING = [
    RpcError("Unavailable", "Too many open files"), RpcError("DiskFull", "no room"), RpcError("OSError", "[Errno 24]"),
    RpcError("MemoryError", ""), RpcError("KindOfAnotherDay", "?"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=lambda error: error.kind)
async def test_a_resume_that_cannot_be_made_now_leaves_it_asleep_and_is_made_later(rig: Rig, error: RpcError) -> None:
    one = await asleep(rig)
    rig.host.fail["prepare"] = [error]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.lifecycle.quiet()
    assert one.state is State.SUSPENDED and rig.host.snapshots == {"s1": 1} and not deleted(rig)
    assert one.reason == f"The MicroVM could not be resumed: {error}; nothing of it is lost: try again"
    assert await resumes(rig, one)


async def test_a_suspend_that_was_asked_for_during_a_resume_that_failed_undoes_no_later_one(rig: Rig) -> None:
    one = await asleep(rig)
    rig.host.block["prepare"] = asyncio.Event()
    rig.host.fail["prepare"] = [RpcError("Unavailable", "Too many open files")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.host.reached["prepare"].wait()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    rig.host.block.pop("prepare").set()
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.quiet()
    assert await resumes(rig, one)


async def test_who_waits_for_a_resume_that_cannot_be_made_now_has_it_tried_again(rig: Rig) -> None:
    one = await asleep(rig)
    rig.host.fail["prepare"] = [*PASSING]
    await rig.lifecycle.request(one)
    await rig.reach(one, State.RUNNING)
    assert rig.host.calls.count("prepare SUSPENDED") == 1 + len(PASSING)


async def test_what_this_hypervisor_cannot_load_stays_and_says_what_could(rig: Rig) -> None:
    one = await asleep(rig)
    refused = RpcError("Refused", "it was made by QEMU 7.2.1, and this host runs 10.0: start the service with that one")
    rig.host.fail["prepare"] = [refused, refused]
    await rig.lifecycle.request(one)
    await rig.lifecycle.quiet()
    route = rig.lifecycle.routes.find("h1")
    assert one.state is State.SUSPENDED and not deleted(rig) and one.reason and "QEMU 7.2.1" in one.reason
    assert one.reason.endswith("; then `torpor resume s1` or the next start tries again"), "nothing is tried by itself"
    assert route is not None and route.gate == "refuse", "nobody is held for what does not come"
    assert not rig.lifecycle.timers.is_set(one, timers.Deadline.RETRY)
    assert not await resumes(rig, one) and one.state is State.SUSPENDED
    assert await resumes(rig, one), "a call tries again"
    route = rig.lifecycle.routes.find("h1")
    assert route is not None and route.gate == "open"


async def test_a_refusal_is_forgotten_at_a_start(rig: Rig) -> None:
    """The hypervisor may be another one."""
    one = await asleep(rig)
    one.refusal = "made by another one"
    rig.store.put_session(one)
    await rig.store.commit()
    await recover(rig.lifecycle, await rig.host.state())
    route = rig.lifecycle.routes.find("h1")
    assert not one.refusal and route is not None and route.gate == "hold"


@pytest.mark.parametrize("work", ["launched", "resumed", "suspended"])
async def test_what_does_not_get_on_says_what_stands_until_it_does(rig: Rig, work: str) -> None:
    one = rig.session() if work == "launched" else await asleep(rig) if work == "resumed" else await rig.launched(idle_policy=POLICY)
    call = "suspend" if work == "suspended" else "start"
    silent = RpcLost("nothing was heard of the guest in 30 s")
    rig.host.fail |= {call: [silent] * 3, "agent": [silent] * 3}
    if work == "launched":
        rig.lifecycle.launch(one)
    else:
        await rig.lifecycle.fire(one, Event.RESUME if work == "resumed" else Event.SUSPEND)
    said = f"The MicroVM is still being {work}: {silent}; it is tried again"
    await until(lambda: one.reason == said)
    assert one.state is {"launched": State.PENDING, "resumed": State.RESUMING, "suspended": State.SUSPENDING}[work]
    await rig.reach(one, State.RUNNING)
    assert one.reason is None


@pytest.mark.parametrize("kind", ["Damaged", "Missing"])
async def test_what_is_damaged_is_set_aside(rig: Rig, kind: str) -> None:
    one = await asleep(rig)
    rig.host.fail["prepare"] = [RpcError(kind, "checksum of 1.pages")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "The MicroVM could not be resumed: checksum of 1.pages" == rig.host.aside["s1"].reason
    assert one.is_aside and not deleted(rig) and not rig.lifecycle.timers.is_set(one, timers.Deadline.PURGE)


async def test_a_hypervisor_that_dies_leaves_its_disk(rig: Rig) -> None:
    one = await asleep(rig)
    assert await resumes(rig, one)
    del rig.host.held["s1"]
    rig.lifecycle.hypervisor_ended(m.Ended("s1", 2, "it died"))
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "it died" and "s1" in rig.host.aside and not deleted(rig)


async def test_a_hypervisor_that_dies_with_its_vmm_is_missed(rig: Rig) -> None:
    """Its successor finds nothing to tell of: the microVM was RUNNING for as long as nobody asked for it."""
    one = await rig.launched(idle_policy=POLICY)
    rig.host.held.clear()
    rig.host.fail["agent"] = [RpcError("Ended", "session s1 has no hypervisor of incarnation 1")]
    rig.host.guests[-1].shutdown(socket.SHUT_RDWR)
    await rig.reach(one, State.TERMINATED)
    assert one.is_aside and "stopped unexpectedly" in (one.reason or "") and not deleted(rig)


async def test_a_hypervisor_that_dies_before_its_guest_ran_costs_nothing(rig: Rig) -> None:
    one = await asleep(rig)
    rig.host.block["start"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.host.reached["start"].wait()
    del rig.host.held["s1"]
    rig.lifecycle.hypervisor_ended(m.Ended("s1", 2, "it died", has_run=False))
    rig.host.block.pop("start").set()
    await rig.reach(one, State.SUSPENDED)
    assert one.incarnation == 1 and [row.new for row in await rig.store.events("s1")][-2:] == ["RESUMING", "SUSPENDED"]
    assert await resumes(rig, one) and one.incarnation == 2


# ---- answers that are lost, or come late ----


async def test_a_suspend_that_takes_longer_than_its_deadline_is_asked_for_again(rig: Rig) -> None:
    one = await rig.launched(idle_policy=POLICY)
    rig.host.lose["suspend"] = 2
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.SUSPENDED)
    await rig.lifecycle.quiet()
    assert not any(call.startswith("unpause") for call in rig.host.calls), "that would make the snapshot void when it comes late"
    assert await resumes(rig, one)


@pytest.mark.parametrize("call", ["prepare", "start", "kill", "release_vm"])
async def test_no_lost_answer_ends_a_session(rig: Rig, call: str) -> None:
    one = await asleep(rig)
    rig.host.lose[call] = 2
    for _ in range(2):
        await rig.lifecycle.fire(one, Event.RESUME)
        await rig.lifecycle.quiet()
        await rig.lifecycle.fire(one, Event.SUSPEND)
        await rig.lifecycle.quiet()
    rig.host.lose.clear()
    assert await resumes(rig, one) and not deleted(rig)


async def test_deadlines_grow_with_bytes() -> None:
    seen: dict[str, float] = {}

    class Client:
        async def call(self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: Any = None) -> Any:
            seen[method] = timeout

        async def call_with_descriptors(self, method: str, body: Any = None, timeout: float = 10.0, descriptors: Any = None) -> Any:
            seen[method] = timeout
            return None, [0]

    host = hosting.Host(Client(), Path())  # type: ignore[arg-type]
    four_gib = 4 << 30
    await host.suspend("s1", 1, four_gib)
    await host.start("s1", 1, b"", four_gib)
    await host.prepare("s1", 1, "image", True, None, four_gib)
    assert seen["suspend"] > four_gib / 10e6 and min(seen.values()) > four_gib / 10e6, "of a disk that is as slow as 10 MB/s"


# ---- what is taken over ----


@pytest.mark.parametrize("error", [RpcLost("away"), RpcError("Unavailable", "EMFILE"), AgentError("no answer in 30 s")])
async def test_a_guest_that_cannot_be_taken_over_now_is_asked_again(rig: Rig, error: Exception) -> None:
    one = await rig.launched()
    rig.host.fail["agent"] = [error, error]
    rig.lifecycle.settle(one)
    await rig.lifecycle.quiet()
    assert one.state is State.RUNNING and rig.host.calls.count("agent RUNNING") == 3


@pytest.mark.parametrize("phase", ["stopped", "saving", "running"])
async def test_a_control_that_starts_in_the_middle_of_a_suspend_loses_nothing(rig: Rig, phase: str) -> None:
    one = await rig.launched(idle_policy=POLICY)
    one.state = State.SUSPENDING
    rig.host.held["s1"].phase = phase
    rig.host.fail["suspend"] = [RpcLost("busy")]
    rig.lifecycle.settle(one)
    await rig.lifecycle.quiet()
    assert one.state is (State.SUSPENDED if phase != "running" else State.RUNNING) and not deleted(rig)


async def test_a_suspend_that_fails_leaves_no_guest_stopped(rig: Rig) -> None:
    """vmm could not let it run on: it was asked to once, and that failed too."""
    one = await rig.launched()
    rig.host.fail["suspend"] = [RpcError("Unavailable", "EIO")]
    rig.host.held["s1"].phase = "stopped"
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.RUNNING)
    assert rig.host.held["s1"].phase == "running"


@pytest.mark.parametrize("phase", ["running", "stopped"])
async def test_a_guest_whose_channel_a_failed_suspend_has_ended_is_connected_to_again(
    rig: Rig, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot resets Firecracker's vsock; the guest runs on, whoever let it."""
    one = await rig.launched()
    before = rig.lifecycle.channels.agent(one)
    rig.host.fail["suspend"] = [RpcError("Unavailable", "EIO")]
    rig.host.block["suspend"] = asyncio.Event()
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.host.reached["suspend"].wait()
    rig.host.guests[-1].shutdown(socket.SHUT_RDWR)
    await until(before.closed.done)
    rig.host.held["s1"].phase = phase
    rig.host.block["suspend"].set()
    await rig.reach(one, State.RUNNING)
    assert rig.host.held["s1"].phase == "running"
    agent = rig.lifecycle.channels.agent(one)
    assert agent is not before and await agent.hello(5) == (1, 0)


async def test_a_guest_that_may_run_and_was_not_heard_of_is_woken_again(rig: Rig) -> None:
    """vmm was killed between the start and the guest's answer (Firecracker's): the next one finds it starting."""
    one = await asleep(rig)
    rig.host.fail["start"] = [RpcLost("killed")]
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.host.reached["start"].wait()
    rig.host.held["s1"].phase = "starting"
    await rig.reach(one, State.RUNNING)
    assert [call for call in rig.host.calls if call.startswith(("start", "agent"))] == ["start RESUMING"] * 2


async def test_a_chain_that_is_missing_ends_no_guest_that_runs(rig: Rig) -> None:
    one = await rig.launched()
    rig.host.fail["suspend"] = [RpcError("Missing", "diffs 1, 2")]
    await rig.lifecycle.fire(one, Event.SUSPEND)
    await rig.reach(one, State.RUNNING)


# ---- what does not get on ----


async def test_a_start_that_does_not_get_on_is_taken_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "_SETTLE_SECONDS", 0.03)
    one = await asleep(rig)
    rig.host.fail["start"] = [RpcError("Unavailable", "no thread")] * 1000
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.SUSPENDED)
    assert one.incarnation == 1 and one.reason and "no thread" in one.reason and not rig.host.held
    rig.host.fail.clear()
    assert await resumes(rig, one)


async def test_a_guest_that_never_answers_after_its_resume_is_set_aside_with_a_reason(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "_SETTLE_SECONDS", 0.03)
    one = await asleep(rig)
    rig.host.lose["start"] = 1
    rig.host.fail["agent"] = [RpcError("Unavailable", "no answer")] * 1000
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "The MicroVM was resumed, and does not answer: no answer" and not deleted(rig) and "s1" in rig.host.aside


async def test_a_launch_that_vmm_never_answers_ends_with_a_reason(rig: Rig) -> None:
    one = rig.session()
    rig.host.fail["prepare"] = [RpcLost("prepare: no answer in 60 s")] * 1000
    rig.lifecycle.launch(one)
    await rig.reach(one, State.TERMINATED)
    assert one.reason == "The MicroVM could not be launched: the host does not answer (prepare: no answer in 60 s)"


@pytest.mark.parametrize("call", ["prepare", "start", "suspend"])
async def test_work_that_stands_still_is_found(rig: Rig, call: str) -> None:
    """Whatever it waits for: here for a call that has lost its deadline."""
    one = await asleep(rig) if call != "suspend" else await rig.launched()
    rig.host.block[call] = asyncio.Event()
    rig.host.reached[call].clear()
    await rig.lifecycle.fire(one, Event.SUSPEND if call == "suspend" else Event.RESUME)
    await rig.host.reached[call].wait()
    assert rig.lifecycle.timers.is_set(one, timers.Deadline.OVERDUE)
    del rig.host.block[call]
    rig.lifecycle._due(timers.Deadline.OVERDUE, "s1")
    await rig.lifecycle.quiet()
    assert one.state is (State.SUSPENDED if call == "prepare" else State.RUNNING) and not deleted(rig)


async def test_a_launch_that_stands_still_is_found(rig: Rig) -> None:
    one = rig.session()
    rig.host.block["prepare"] = asyncio.Event()
    rig.lifecycle.launch(one)
    await rig.host.reached["prepare"].wait()
    rig.lifecycle._due(timers.Deadline.OVERDUE, "s1")
    await rig.reach(one, State.TERMINATED)
    assert one.reason and one.reason.startswith("The MicroVM could not be launched: nothing was heard after this step: ")


async def test_a_resume_that_cannot_be_stored_leaves_no_hypervisor_behind(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await asleep(rig)

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "_transaction", full)
        await rig.lifecycle.fire(one, Event.RESUME)
        await rig.lifecycle.quiet()
    assert one.state is State.SUSPENDED and one.incarnation == 1 and not rig.host.held
    assert await resumes(rig, one)


# ---- hooks ----


async def test_a_hook_that_fails_leaves_the_files(rig: Rig) -> None:
    one = await asleep(rig, hooks=Hooks(9000, {"resume": 1}))
    one.hooks = Hooks(9000, {"resume": 0})
    await rig.lifecycle.fire(one, Event.RESUME)
    await rig.reach(one, State.TERMINATED)
    assert "s1" in rig.host.aside and not deleted(rig)


async def test_what_the_host_lacks_is_no_fault_of_a_hook() -> None:
    async def connect() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(RpcError) as caught:
        await hooks.call(connect, "resume", 9000, 1.0, "id")
    assert caught.value.kind == "Unavailable"


async def test_what_the_user_or_the_policy_ends_is_deleted(rig: Rig) -> None:
    one = await asleep(rig, idle_policy=IdlePolicy(60, 60, True))
    await rig.lifecycle.fire(one, Event.WINDOW_OVER)
    await rig.reach(one, State.TERMINATED)
    await until(lambda: deleted(rig))
    assert not rig.host.aside and rig.lifecycle.timers.is_set(one, timers.Deadline.PURGE)


# ---- the archive ----


@pytest.mark.parametrize("error", [ArchiveError("the object store: 503"), RpcError("DiskFull", "no room"), StoreError("full")])
async def test_an_archive_that_cannot_be_made_is_tried_again_and_the_files_stay(rig: Rig, error: Exception) -> None:
    one = await asleep(rig)
    rig.archive.fail["store"] = [error]
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    assert rig.lifecycle.timers.is_set(one, timers.Deadline.ARCHIVE) and not deleted(rig) and one.archived is None
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    assert one.archived is not None and await resumes(rig, one)


async def test_an_archive_that_cannot_be_stored_in_its_row_is_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await asleep(rig)

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "_transaction", full)
        rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
        await rig.lifecycle.quiet()
    assert one.archived is None and not rig.archive.kept and rig.host.snapshots and await resumes(rig, one)


async def test_an_archive_that_cannot_be_fetched_now_is_fetched_later(rig: Rig) -> None:
    one = await asleep(rig)
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    rig.archive.fail["fetch"] = [ArchiveError("the object store: away")] * 2
    assert not await resumes(rig, one) and one.state is State.SUSPENDED and one.archived is not None and "away" in str(one.reason)
    await rig.lifecycle.request(one)
    await rig.reach(one, State.RUNNING)


async def test_an_archive_that_is_not_what_was_stored_stays_there(rig: Rig) -> None:
    one = await asleep(rig)
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    rig.archive.fail["fetch"] = [ArchiveDamaged("s3://b/k is not what was stored there")]
    assert not await resumes(rig, one)
    assert one.state is State.SUSPENDED and rig.archive.kept == ["s1"] and not rig.host.aside
    assert not rig.lifecycle.timers.is_set(one, timers.Deadline.RETRY), "it would be fetched again and again"
    assert await resumes(rig, one)


async def test_an_archive_is_in_its_row_before_it_is_in_the_object_store(rig: Rig) -> None:
    """Whatever ends control then, the next one knows what to remove."""
    one = await asleep(rig)
    rig.archive.may_store.clear()
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.archive.is_storing.wait()
    assert (await stored(rig)).litter == ["s1"]
    await rig.lifecycle.actions.archiving.clean(one)
    assert one.litter == ["s1"], "it is on its way"
    rig.archive.may_store.set()
    await rig.lifecycle.quiet()
    row = await stored(rig)
    assert row.litter == [] and row.archived is not None and rig.archive.kept == ["s1"]


@pytest.mark.parametrize("event", [Event.RESUME, Event.TERMINATE])
async def test_an_archive_that_cannot_be_removed_now_is_removed_later(rig: Rig, event: Event) -> None:
    one = await asleep(rig)
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    rig.archive.fail["remove"] = [ArchiveError("the object store: away")] * 2
    await rig.lifecycle.fire(one, event)
    await rig.reach(one, State.RUNNING if event is Event.RESUME else State.TERMINATED)
    await rig.lifecycle.quiet()
    for _ in range(2):
        row = await stored(rig)
        assert row.archived is None and row.litter == ["s1"] and rig.archive.kept == ["s1"]
        assert rig.lifecycle.timers.is_set(one, timers.Deadline.LITTER)
        rig.lifecycle._due(timers.Deadline.PURGE, "s1")
        assert event is Event.RESUME or rig.store.sessions["s1"] is one, "only its row knows"
        rig.lifecycle._due(timers.Deadline.LITTER, "s1")
        await rig.lifecycle.quiet()
        if not rig.archive.kept:
            break
    assert (await stored(rig)).litter == [] and not rig.archive.kept
    if event is Event.TERMINATE:
        rig.lifecycle._due(timers.Deadline.PURGE, "s1")
        assert "s1" not in rig.store.sessions


async def test_what_the_store_cannot_take_off_its_row_is_removed_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await asleep(rig)
    one.litter = ["old"]
    rig.archive.kept = ["old"]

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "_transaction", full)
        rig.lifecycle._due(timers.Deadline.LITTER, "s1")
        await rig.lifecycle.quiet()
    assert one.litter == ["old"] and rig.lifecycle.timers.is_set(one, timers.Deadline.LITTER)
    rig.lifecycle._due(timers.Deadline.LITTER, "s1")
    await rig.lifecycle.quiet()
    assert one.litter == [] and (await stored(rig)).litter == []


async def test_an_archive_stays_whose_fetch_could_not_be_stored(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other archives of the session are removed while the disk is waited for."""
    one = await asleep(rig)
    rig.lifecycle._due(timers.Deadline.ARCHIVE, "s1")
    await rig.lifecycle.quiet()
    archiving, commit = rig.lifecycle.actions.archiving, rig.store.commit

    async def fails(*_: Any) -> None:
        await archiving.clean(one)
        raise StoreError("full")

    monkeypatch.setattr(rig.store, "commit", fails)
    with pytest.raises(StoreError):
        await archiving.drop(one)
    monkeypatch.setattr(rig.store, "commit", commit)
    assert one.archived is not None and one.litter == [] and rig.archive.kept == ["s1"]
    assert await resumes(rig, one)


async def test_what_the_quarantine_has_keeps_all_archives(rig: Rig) -> None:
    one = await asleep(rig)
    one.litter, one.is_aside, rig.archive.kept = ["old"], True, ["old"]
    rig.lifecycle._due(timers.Deadline.LITTER, "s1")
    await rig.lifecycle.quiet()
    assert one.litter == ["old"] and rig.archive.kept == ["old"]


async def test_a_restart_removes_what_is_nobodys(rig: Rig) -> None:
    one = await asleep(rig)
    one.litter, rig.archive.kept = ["old"], ["old"]
    await recover(rig.lifecycle, await rig.host.state())
    assert rig.lifecycle.timers.is_set(one, timers.Deadline.LITTER)
    rig.lifecycle._due(timers.Deadline.LITTER, "s1")
    await rig.lifecycle.quiet()
    assert one.litter == [] and rig.archive.kept == []


async def stored(rig: Rig) -> Session:
    ((body,),) = await rig.store.db.rows("SELECT body FROM sessions WHERE id = 's1'")
    return msgspec.msgpack.decode(body, type=Session)


async def test_archives_that_are_due_at_once_are_made_one_after_the_other(rig: Rig) -> None:
    sessions = []
    for number in range(5):
        one = rig.session()
        rig.store.forget_session(one)
        one.id, one.endpoint, one.idle_policy = f"n{number}", f"h{number}", POLICY
        rig.store.put_session(one)
        rig.lifecycle.launch(one)
        await rig.reach(one, State.RUNNING)
        await rig.lifecycle.fire(one, Event.SUSPEND)
        await rig.reach(one, State.SUSPENDED)
        sessions.append(one)
    await rig.lifecycle.quiet()
    under_way, most, store = 0, 0, rig.archive.store

    async def counted(session: Session, key: str) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        made = await store(session, key)
        under_way -= 1
        return made

    rig.archive.store = counted  # type: ignore[method-assign]
    for one in sessions:
        rig.lifecycle._due(timers.Deadline.ARCHIVE, one.id)
    await rig.lifecycle.quiet()
    assert most == 1 and [one.id for one in sessions if one.archived is None] == []


def test_a_store_that_forgets_takes_no_archives() -> None:
    with pytest.raises(ConfigError, match=r"archive\.after_seconds: the embedded object store forgets .* object_store\.endpoint") as caught:
        config.load(archive={"after_seconds": 60})
    assert "\n" not in str(caught.value)
    kept = {"endpoint": "http://127.0.0.1:9000", "access_key": "a", "secret_key": "b"}
    assert config.load(archive={"after_seconds": 60}, object_store=kept).archive.after_seconds == 60


@pytest.mark.parametrize("bad", [1, 2])
async def test_what_the_object_store_gives_is_compared_and_fetched_once_more_where_it_differs(tmp_path: Path, bad: int) -> None:
    """A download may be cut short by who stands in between; the archive is damaged where it comes so again."""
    given: list[bytes] = []

    class Unpacks:
        async def unpack(self, session: str, digest: str, source: int, size: int = 0) -> None:
            if os.pread(source, 100, 0) != b"archive":
                raise RpcError("Damaged", "its SHA-256 differs")

    class Client:
        def download_fileobj(self, bucket: str, key: str, file: Any, Config: object) -> None:
            given.append(b"arch" if len(given) < bad else b"archive")
            file.write(given[-1])

    archive = Archive(config.load(root=tmp_path), Unpacks(), Client)  # type: ignore[arg-type]
    (tmp_path / "control").mkdir()
    one = Session("s1", "h1", "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "image", 512, 0.0, 3600)
    refused = pytest.raises(ArchiveDamaged, match=r"s3://torpor-archive/key is not what was stored there")
    with refused if bad == 2 else contextlib.nullcontext():
        await archive.fetch(one, Archived("key", 1, "digest"))
    assert len(given) == 2


async def test_a_transfer_starts_no_threads_and_whatever_it_lacks_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that cannot be made for want of memory, say, is one that may be made later."""
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Packs:
        async def pack(self, session: str, incarnation: int, target: int, size: int = 0) -> m.Packed:
            return m.Packed(os.write(target, b"archive"), "digest")

        async def unpack(self, session: str, digest: str, source: int, size: int = 0) -> None:
            assert os.pread(source, 100, 0) == b"archive"

    archive = Archive(config.load(root=tmp_path), Packs(), lambda: client)  # type: ignore[arg-type]
    (tmp_path / "control").mkdir()
    one = Session("s1", "h1", "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "image", 512, 0.0, 3600)
    with Stubber(client) as store:
        store.add_response("list_buckets", {"Buckets": [{"Name": "torpor-archive"}]})
        store.add_response("put_object", {})
        store.add_response("head_object", {"ContentLength": 7, "ETag": "e"})
        store.add_response("get_object", {"Body": StreamingBody(io.BytesIO(b"archive"), 7), "ContentLength": 7, "ETag": "e"})
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            archived = await archive.store(one, "key")
            await archive.fetch(one, archived)

    def short(*_: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(client, "upload_fileobj", short)
    with pytest.raises(ArchiveError):
        await archive.store(one, "key")
