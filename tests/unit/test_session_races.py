"""A session's files have one owner at a time: whatever comes between a sleep and a wake, what was counted is there, in memory and on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from vmm_rig import IMAGE, Rig

from gateway import executors
from gateway import messages as m
from vmm import diffs, disks, manifest, syscalls, vms
from vmm.driver import Process
from vmm.errors import Damaged, DiskFull, Ended, Missing, NeverRan, Refused, Unavailable, VmmError
from vmm.rpc.sessions import _SAVES_AT_ONCE
from vmm.snapshots import Folded, Snapshots

ONE = "microvm-1"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


async def asleep(rig: Rig, times: int = 1, keep_warm: bool = False) -> int:
    """Launched, and put to sleep so often; returns the incarnation that sleeps."""
    await rig.launch(ONE)
    for incarnation in range(1, times + 1):
        if incarnation > 1:
            await rig.wake(ONE, incarnation)
            await rig.settled()
        await rig.sleep(ONE, incarnation, keep_warm and incarnation == times)
        if incarnation < times:
            await rig.settled()
    return times


async def nothing_left(rig: Rig) -> None:
    await rig.settled()
    await rig.forget(m.SessionRef(ONE, 0))
    await rig.settled()
    assert not rig.host.alive and not rig.network.links and not len(rig.vmm.vms) and not rig.vmm.vms._locks and not rig.vmm.vms._readers
    assert not any(rig.settings.sessions_dir.iterdir())


async def runs_and_sleeps_again(rig: Rig, incarnation: int) -> None:
    """Nothing of it is lost, and nothing of it left."""
    await rig.settled()
    await rig.sleep(ONE, incarnation)
    await rig.settled()
    assert rig.asleep(ONE) == rig.counted(ONE) == incarnation
    await nothing_left(rig)


async def test_vmm_keeps_nothing_of_sessions_that_went(rig: Rig) -> None:
    """Also where one ran ahead under another name, and of an image that nobody uses any more."""

    def kept() -> dict[str, int]:
        owners = (rig.vmm.vms, rig.vmm.snapshots, rig.vmm.warm, rig.vmm.collector, rig.vmm.standbys)
        return {
            f"{type(owner).__name__}.{name}": len(table)
            for owner in owners for name, table in vars(owner).items() if isinstance(table, dict | set | list)
        }  # fmt: skip

    before = kept()
    assert len(before) > 12
    ahead = "ahead-1"
    await rig.prepare(m.PrepareRequest(ahead, 1, IMAGE, False))
    await rig.start(m.StartRequest(ahead, 1, b""))
    await rig.pause(m.SessionRef(ahead, 1))
    await rig.claim(m.ClaimRequest(ahead, ONE, 1))
    (machine,) = rig.host.alive
    machine._overlay = rig.vmm.snapshots.overlay(ONE)  # which a hypervisor has open
    await rig.start(m.StartRequest(ONE, 1, b""))
    await rig.sleep(ONE, 1, keep_warm=True)
    await rig.wake(ONE, 2)
    await nothing_left(rig)
    await rig.vmm.standbys.forget(rig.settings.images_dir / IMAGE)
    assert kept() == before


# ---- forced orders ----


@pytest.mark.parametrize("point", ["write_fold", "write_fold done", "put_fold", "put_fold done", "drop_fold"])
async def test_a_resume_in_the_middle_of_a_fold(rig: Rig, point: str) -> None:
    """It waits for the exchange alone, and the next sleep finds what its memory is made of."""
    rig.points.hold(point)
    sleeps = await asleep(rig, diffs.FOLD_AT)
    await rig.points.reached(point)
    wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))
    for _ in range(50):
        await asyncio.sleep(0)
    assert wakes.done() is (not point.startswith("put_fold")), "only the exchange holds it up"
    rig.points.free(point)
    await wakes
    await runs_and_sleeps_again(rig, sleeps + 1)


async def test_a_fold_that_waits_for_a_resume_exchanges_nothing(rig: Rig) -> None:
    """It was written when nothing ran yet, and its turn comes when a hypervisor has the chain mapped, whose snapshot is the newest still."""
    rig.points.hold("write_fold done")
    sleeps = await asleep(rig, diffs.FOLD_AT)
    await rig.points.reached("write_fold done")
    rig.points.hold("loaded")
    wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))
    await rig.points.reached("loaded")
    rig.points.free("write_fold done")
    for _ in range(20):
        await asyncio.sleep(0)
    rig.points.free("loaded")
    await wakes
    await runs_and_sleeps_again(rig, sleeps + 1)


@pytest.mark.parametrize("point", ["rest", "rest done", "foldable done", "sweep", "kill", "release link"])
async def test_a_resume_in_the_middle_of_an_eviction(rig: Rig, point: str) -> None:
    """The window of a cool-down: the hypervisor's end, the removal of what it had mapped, the begin of a fold."""
    sleeps = await asleep(rig, diffs.FOLD_AT, keep_warm=True)
    rig.points.hold(point)
    cools = asyncio.ensure_future(rig.vmm.warm.evict(ONE))
    await rig.points.reached(point)
    wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))
    for _ in range(50):
        await asyncio.sleep(0)
    rig.points.free(point)
    await asyncio.gather(cools, wakes)
    await runs_and_sleeps_again(rig, sleeps + 1)


async def test_files_that_a_later_incarnation_runs_from_are_not_cleared_away_late(rig: Rig) -> None:
    """The removal of what an incarnation was loaded from comes when the next one runs already."""
    sleeps = await asleep(rig, 2)
    await rig.wake(ONE, sleeps + 1)  # whose clearing away waits to begin
    rig.points.hold("started")
    for _ in range(20):
        await asyncio.sleep(0)
    suspends = asyncio.ensure_future(rig.sleep(ONE, sleeps + 1))
    for _ in range(20):
        await asyncio.sleep(0)
    rig.points.free("started")
    await suspends
    await rig.settled()
    assert rig.asleep(ONE) == rig.counted(ONE) == sleeps + 1
    await nothing_left(rig)


async def test_deadlines_of_work_on_large_files_grow_with_their_bytes(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive, and a look at all that was set aside: a disk that is slow and works is waited for."""
    sleeps = await asleep(rig)
    await rig.settled()
    given: dict[str, float | None] = {}

    async def run(call: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        given[call.__name__] = seconds
        return call(*arguments)

    monkeypatch.setattr(executors.BULK, "run", run)
    monkeypatch.setattr(executors, "_BYTES_PER_SECOND", 1)
    size = disks.tree_bytes(rig.vmm.snapshots.of(ONE))
    target = os.open(tmp_path / "archive", os.O_RDWR | os.O_CREAT)
    await rig.pack(m.PackRequest(ONE, sleeps), [target])
    await rig.vmm.collector.fold(ONE, diffs.FOLD_AT)
    await rig.quarantine(m.QuarantineRequest(ONE, sleeps, IMAGE, "why"))
    await rig.recover(m.QuarantineName(ONE))
    for work in ("pack", "recover", "write_fold"):
        assert (given[work] or 0) > size > 4096, work


async def test_a_fold_whose_time_is_up_leaves_nothing_when_it_ends_after_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread goes on until it looks whether anybody waits: what it had written was nobody's until the daemon's end."""
    sleeps = await asleep(rig, 2)
    await rig.settled()
    late: list[Callable[[], Any]] = []

    async def run(call: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        if call.__name__ != "write_fold":
            return call(*arguments)
        late.append(lambda: call(*arguments))
        raise executors.Overdue("write_fold has not ended")

    monkeypatch.setattr(executors.BULK, "run", run)
    await rig.vmm.collector.fold(ONE, sleeps)
    with pytest.raises(Unavailable):
        late[0]()
    assert not list(rig.vmm.snapshots.of(ONE).glob("fold-*")) and not rig.vmm.snapshots._folding


async def test_a_clearing_away_that_comes_late_takes_nothing_of_what_runs(rig: Rig) -> None:
    """It was to follow an eviction, and its turn comes when the session runs again."""
    sleeps = await asleep(rig, 2)
    await rig.settled()
    await rig.wake(ONE, sleeps + 1)
    await rig.settled()
    await rig.vmm.collector.collect(ONE)
    await runs_and_sleeps_again(rig, sleeps + 1)


async def test_a_resume_calls_an_archive_off(rig: Rig, tmp_path: Path) -> None:
    sleeps = await asleep(rig)
    await rig.settled()
    with (tmp_path / "archive").open("wb") as target:
        rig.points.hold("pack done")
        packs = asyncio.ensure_future(rig.pack(m.PackRequest(ONE, sleeps), [os.dup(target.fileno())]))
        await rig.points.reached("pack done")
        await rig.wake(ONE, sleeps + 1)  # at once
        rig.points.free("pack done")
        with pytest.raises(Unavailable, match="does not rest any more"):
            await packs
    await rig.sleep(ONE, sleeps + 1)
    assert rig.asleep(ONE) == sleeps + 1
    await nothing_left(rig)


async def test_work_of_minutes_never_takes_a_thread_that_a_resume_waits_for(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Folds, archives, looks at all that was set aside, and removals; and of archives one at a time, which leaves the other thread."""
    done: dict[str, set[str]] = {"LATENCY": set(), "BULK": set()}
    for name, work in done.items():
        pool, run = getattr(executors, name), getattr(executors, name).run

        async def noted(
            call: Callable[..., Any], *arguments: Any, seconds: float | None = None, work: set[str] = work, run: Any = run
        ) -> Any:  # fmt: skip
            work.add(call.__name__)
            return await run(call, *arguments, seconds=seconds)

        monkeypatch.setattr(pool, "run", noted)
    sleeps = await asleep(rig, diffs.FOLD_AT)
    await rig.settled()
    rig.points.hold("pack")
    targets = [os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT) for number in range(2)]
    first = asyncio.ensure_future(rig.pack(m.PackRequest(ONE, sleeps), targets[:1]))
    await rig.points.reached("pack")
    second = asyncio.ensure_future(rig.pack(m.PackRequest(ONE, sleeps), targets[1:]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert rig.points.passed.count("pack") == 1
    rig.points.free("pack")
    await asyncio.gather(first, second)
    for _ in range(2):
        await rig.quarantine(m.QuarantineRequest(ONE, sleeps, IMAGE, "why"))
        await rig.recover(m.QuarantineName(ONE))
    await nothing_left(rig)
    await rig.release_quarantined(m.QuarantineName(ONE))
    heavy = {"write_fold", "drop_fold", "pack", "recover", "sweep", "sweep_forgotten", "release"}
    assert heavy <= done["BULK"] and not heavy & done["LATENCY"]


async def test_an_archive_of_a_sleeper_comes_back(rig: Rig, tmp_path: Path) -> None:
    sleeps = await asleep(rig, 3)
    await rig.settled()
    with (tmp_path / "archive").open("w+b") as file:
        packed = await rig.pack(m.PackRequest(ONE, sleeps), [os.dup(file.fileno())])
        await rig.forget(m.SessionRef(ONE, 0))
        await rig.settled()
        rig.points.hold("unpack")
        unpacks = asyncio.ensure_future(rig.unpack(m.UnpackRequest(ONE, packed.digest), [os.dup(file.fileno())]))
        await rig.points.reached("unpack")
        wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))  # which waits for it
        rig.points.free("unpack")
        await asyncio.gather(unpacks, wakes)
    await rig.sleep(ONE, sleeps + 1)
    assert rig.asleep(ONE) == sleeps + 1
    await nothing_left(rig)


@pytest.mark.parametrize(("phase", "is_written", "expected"), [
    ("prepared", False, NeverRan), ("starting", False, Ended), ("running", False, Ended),
    ("prepared", True, Ended),  # a daemon has died in between as well, and its successor has cleared away what said more
])  # fmt: skip
async def test_a_hypervisor_that_died_with_its_daemon_has_run_or_not(
    rig: Rig, phase: str, is_written: bool, expected: type[VmmError]
) -> None:  # fmt: skip
    """Where its guest had not run, the snapshot before it is woken again: over a disk that a guest has written to that loses both."""
    sleeps = await asleep(rig)
    await rig.settled()
    record = Process("vm-9", 2, 1, IMAGE, 1, ONE, sleeps + 1, phase=phase)

    async def adopt(record: Process) -> None:
        return None

    rig.host.records, rig.host.adopt = lambda: [record], adopt  # type: ignore[method-assign,attr-defined]
    if is_written:
        at = (rig.vmm.snapshots.newest(ONE) / diffs.MANIFEST).stat().st_mtime_ns + 1
        os.utime(rig.vmm.snapshots.overlay(ONE), ns=(at, at))
    await rig.vmm.take_all_over()
    with pytest.raises(VmmError) as raised:
        await rig.start(m.StartRequest(ONE, sleeps + 1, b""))
    assert type(raised.value) is expected


@pytest.mark.parametrize("call", ["quarantine", "forget"])
@pytest.mark.parametrize("point", ["link", "standby", "load", "loaded", "write_fold"])
async def test_an_end_in_the_middle_of_a_resume(rig: Rig, call: str, point: str) -> None:
    """The resume is called off and leaves nothing; what was set aside is whole."""
    if point == "write_fold":
        rig.points.hold(point)
    sleeps = await asleep(rig, diffs.FOLD_AT)
    if point == "write_fold":
        await rig.points.reached(point)
    else:
        await rig.settled()
        rig.points.hold(point)
    wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))
    await rig.points.reached(point)
    body = m.QuarantineRequest(ONE, sleeps, "image", "why") if call == "quarantine" else m.SessionRef(ONE, 0)
    ends = asyncio.ensure_future(getattr(rig, call)(body))
    for _ in range(50):
        await asyncio.sleep(0)
    rig.points.free(point)
    await ends
    await asyncio.wait([wakes])
    await rig.settled()
    assert not rig.host.alive and not rig.network.links and not len(rig.vmm.vms)
    if call == "quarantine":
        assert (await rig.recover(m.QuarantineName(ONE))).snapshot == sleeps
        assert rig.asleep(ONE) == sleeps
        await rig.points.run(rig.wake(ONE, sleeps + 1))
        assert rig.counted(ONE) >= sleeps
    await nothing_left(rig)


@pytest.mark.parametrize("call", ["quarantine", "forget"])
@pytest.mark.parametrize("point", ["rest", "kill", "foldable done"])
async def test_an_end_in_the_middle_of_an_eviction(rig: Rig, call: str, point: str) -> None:
    sleeps = await asleep(rig, diffs.FOLD_AT, keep_warm=True)
    await rig.settled()
    rig.points.hold(point)
    cools = asyncio.ensure_future(rig.vmm.warm.evict(ONE))
    await rig.points.reached(point)
    body = m.QuarantineRequest(ONE, sleeps, "image", "why") if call == "quarantine" else m.SessionRef(ONE, 0)
    ends = asyncio.ensure_future(getattr(rig, call)(body))
    for _ in range(50):
        await asyncio.sleep(0)
    rig.points.free(point)
    await asyncio.gather(cools, ends)
    await rig.settled()
    assert not rig.host.alive and not rig.network.links and not len(rig.vmm.vms) and not len(rig.vmm.warm)
    if call == "quarantine":
        assert (await rig.recover(m.QuarantineName(ONE))).snapshot == sleeps and rig.asleep(ONE) == sleeps
    await nothing_left(rig)


async def test_a_second_suspend_is_answered_by_the_first(rig: Rig) -> None:
    """As after a lost reply: while it is under way, and once it is done."""
    await rig.launch(ONE)
    rig.points.hold("commit")
    calls = [asyncio.ensure_future(rig.suspend(m.SessionRef(ONE, 1))) for _ in range(3)]
    await rig.points.reached("commit")
    rig.points.free("commit")
    answers = [await call for call in calls]
    assert answers.count(answers[0]) == 3 and await rig.suspend(m.SessionRef(ONE, 1)) == answers[0]
    assert rig.points.passed.count("save") == 1
    await rig.unpause(m.SessionRef(ONE, 1))
    assert not rig.vmm.snapshots.held()
    await rig.suspend(m.SessionRef(ONE, 1))
    assert rig.points.passed.count("save") == 2 and rig.asleep(ONE) == 1
    await nothing_left(rig)


def dies(rig: Rig) -> None:
    entry = rig.vmm.vms.get(ONE)
    assert entry is not None
    entry.machine.die()  # type: ignore[attr-defined]


class Control:
    """Hears of hypervisors that have ended with what was nowhere else."""

    def __init__(self, rig: Rig) -> None:
        self.told: list[str] = []
        rig.vmm._controls.add(self)  # type: ignore[arg-type]

    def notify(self, method: str, ended: m.Ended) -> None:
        self.told.append(ended.session)


@pytest.mark.parametrize("point", ["commit", "commit done"])
async def test_a_hypervisor_that_dies_once_its_guest_is_saved_takes_nothing_with_it(rig: Rig, point: str) -> None:
    """The session was ended, and its files set aside, although its snapshot was whole, or about to be."""
    control = Control(rig)
    await rig.launch(ONE)
    rig.points.hold(point)
    suspends = asyncio.ensure_future(rig.suspend(m.SessionRef(ONE, 1)))
    await rig.points.reached(point)
    dies(rig)
    for _ in range(10):
        await asyncio.sleep(0)
    rig.points.free(point)
    await suspends
    await rig.settled()
    assert not control.told and rig.vmm.snapshots.held() == {ONE: 1}
    await rig.wake(ONE, 2)
    await nothing_left(rig)


async def test_a_hypervisor_that_dies_before_its_guest_is_saved_is_told_of(rig: Rig) -> None:
    control = Control(rig)
    await rig.launch(ONE)
    rig.host.failing["save"] = 1
    rig.points.hold("save")
    suspends = asyncio.ensure_future(rig.suspend(m.SessionRef(ONE, 1)))
    await rig.points.reached("save")
    dies(rig)
    rig.points.free("save")
    with pytest.raises(VmmError):
        await suspends
    await rig.settled()
    assert control.told == [ONE] and not rig.vmm.snapshots.held()
    await nothing_left(rig)


async def test_a_suspend_that_waits_for_its_turn_is_told_and_not_run_after_it_was_called_off(rig: Rig) -> None:
    """Who saw a guest that runs took the suspend for one that had ended, and the guest stood still soon after for a session that ran."""
    await rig.launch(ONE)
    await rig.launch("microvm-2")
    turns = next(calls._saves for calls in rig.vmm.calls if hasattr(calls, "_saves"))
    for _ in range(_SAVES_AT_ONCE):
        await turns.acquire()
    suspends = asyncio.ensure_future(rig.suspend(m.SessionRef(ONE, 1)))
    await asyncio.sleep(0)
    assert {one.session: one.phase for one in (await rig.state(None)).sessions} == {ONE: "saving", "microvm-2": "running"}
    off = asyncio.ensure_future(rig.unpause(m.SessionRef(ONE, 1)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not off.done()
    for _ in range(_SAVES_AT_ONCE):
        turns.release()
    await suspends
    await off
    entry = rig.vmm.vms.get(ONE)
    assert entry is not None and entry.machine.record.phase == "running" and not rig.vmm.snapshots.held()
    await rig.forget(m.SessionRef("microvm-2", 0))
    await nothing_left(rig)


async def test_what_waits_for_a_long_suspend_is_told_that_it_is_busy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.rpc.sessions._SHORT_SECONDS", 0.01)
    await rig.launch(ONE)
    rig.points.hold("commit")
    suspends = asyncio.ensure_future(rig.suspend(m.SessionRef(ONE, 1)))
    await rig.points.reached("commit")
    with pytest.raises(Unavailable, match="busy: it is being saved"):
        await rig.unpause(m.SessionRef(ONE, 1))
    rig.points.free("commit")
    await suspends
    await nothing_left(rig)


@pytest.mark.parametrize("step", ["save", "commit"])
async def test_a_suspend_that_fails_leaves_a_guest_that_runs_and_no_snapshot(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """In whatever way, and though its files were in place already: else a later crash would resume it from there."""
    await rig.launch(ONE)
    if step == "save":
        rig.host.failing["save"] = 1
    else:
        real, failing = rig.vmm.snapshots.commit, [KeyError("1.pages"), OSError(28, "No space left on device")]

        def commit(*given: Any) -> Any:
            real(*given)
            raise failing.pop()

        monkeypatch.setattr(rig.vmm.snapshots, "commit", commit)
        with pytest.raises(DiskFull):
            await rig.suspend(m.SessionRef(ONE, 1))
    with pytest.raises(Unavailable):
        await rig.suspend(m.SessionRef(ONE, 1))
    entry = rig.vmm.vms.get(ONE)
    assert entry is not None and entry.machine.record.phase == "running" and not rig.vmm.snapshots.held()
    await nothing_left(rig)


@pytest.mark.parametrize("is_paused", [False, True])
async def test_a_hypervisor_that_does_not_end_in_time_goes_whenever_it_does(rig: Rig, is_paused: bool) -> None:
    await asleep(rig, 1, keep_warm=is_paused)
    if not is_paused:
        await rig.wake(ONE, 2)
    rig.host.failing["kill"] = 1
    with pytest.raises(Unavailable, match="ask again"):
        await rig.kill(m.SessionRef(ONE, 1 if is_paused else 2))
    (machine,) = rig.host.alive
    machine.die()
    await rig.settled()
    assert not len(rig.vmm.vms) and not rig.network.links and not len(rig.vmm.warm)
    await nothing_left(rig)


async def test_a_paused_one_that_has_died_wakes_from_its_files(rig: Rig) -> None:
    """In the same turn of the loop, before anybody was told."""
    sleeps = await asleep(rig, 2, keep_warm=True)
    (machine,) = rig.host.alive
    machine.die()
    await rig.wake(ONE, sleeps + 1)
    assert rig.counted(ONE) == sleeps + 1
    await nothing_left(rig)


async def test_a_chain_that_has_become_long_is_folded_before_it_is_loaded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is woken at each fold would resume more and more slowly."""
    monkeypatch.setattr("vmm.snapshot_gc._LONGEST_CHAIN", diffs.FOLD_AT)
    rig.points.hold("write_fold")
    sleeps = await asleep(rig, diffs.FOLD_AT)
    await rig.points.reached("write_fold")
    wakes = asyncio.ensure_future(rig.wake(ONE, sleeps + 1))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not wakes.done()
    rig.points.free("write_fold")
    await wakes
    entry = rig.vmm.vms.get(ONE)
    assert entry is not None and entry.machine.record.chain == [sleeps]
    await nothing_left(rig)


async def test_what_is_damaged_is_not_folded_into_what_looks_whole(rig: Rig) -> None:
    rig.points.hold("write_fold")
    await asleep(rig, diffs.FOLD_AT)
    await rig.points.reached("write_fold")
    pages = rig.vmm.snapshots.newest(ONE) / "1.pages"
    pages.write_bytes(bytes([9]) * pages.stat().st_size)
    rig.points.free("write_fold")
    await rig.settled()
    with pytest.raises(Damaged, match=r"1\.pages is damaged"):
        await rig.wake(ONE, diffs.FOLD_AT + 1)
    await nothing_left(rig)


# ---- any order ----


class Life:
    """One session's life in random order: what control does one after another, some of it twice as after a lost reply, beside what vmm does
    by itself; now and then a step of the host fails. `incarnation` is the last one that ran."""

    def __init__(self, rig: Rig, choose: random.Random, directory: Path) -> None:
        self.rig, self.choose, self.directory = rig, choose, directory
        self.incarnation, self.is_asleep = 0, False
        self.losses: list[str] = []

    async def live(self, steps: int) -> None:
        rig = self.rig
        await self.do(lambda: rig.launch(ONE))
        self.incarnation = 1
        for _ in range(steps):
            if not self.is_asleep:
                keep = self.choose.random() < 0.5
                await self.do(lambda: rig.suspend(m.SessionRef(ONE, self.incarnation)))
                await self.do(lambda keep=keep: rig.release_vm(m.ReleaseVmRequest(ONE, self.incarnation, keep)))  # type: ignore[misc]
                self.is_asleep = True
                continue
            act = self.choose.choice(["wake", "wake", "wake", "fetch", "quarantine"])
            if act == "fetch":
                await self.fetch()
            elif act == "quarantine":
                await self.do(lambda: rig.quarantine(m.QuarantineRequest(ONE, self.incarnation, "image", "why")))
                await self.do(lambda: rig.recover(m.QuarantineName(ONE)))
                await self.check()
            await self.do(lambda: rig.wake(ONE, self.incarnation + 1), twice=False)
            self.incarnation, self.is_asleep = self.incarnation + 1, False
            if rig.counted(ONE) != self.incarnation:
                self.losses.append(f"incarnation {self.incarnation} counts {rig.counted(ONE)}")

    async def fetch(self) -> None:
        path = self.directory / "archive"
        with path.open("w+b") as file:
            rig, request = self.rig, m.PackRequest(ONE, self.incarnation)
            for _ in range(20):
                (packed,) = await rig.points.run(rig.pack(request, [os.dup(file.fileno())]))
                if not isinstance(packed, Unavailable):
                    break
                await rig.points.run(rig.kill(m.SessionRef(ONE, self.incarnation)))  # it was warm
                file.truncate(0)
                file.seek(0)
            if not isinstance(packed, m.Packed):
                self.losses.append(f"never packed: {packed!r}")
                return
            await self.do(lambda: rig.forget(m.SessionRef(ONE, 0)))
            await self.do(lambda: rig.unpack(m.UnpackRequest(ONE, packed.digest), [os.dup(file.fileno())]), twice=False)
        await self.check()

    async def check(self) -> None:
        if self.rig.asleep(ONE) != self.incarnation:
            self.losses.append(f"incarnation {self.incarnation} sleeps with {self.rig.asleep(ONE)}")

    async def do(self, call: Callable[[], Any], twice: bool = True) -> None:
        """With what may come beside it; and again for as long as it is told to come again."""
        rig = self.rig
        beside: list[Any] = []
        for _ in range(self.choose.randrange(3)):
            beside.append(
                self.choose.choice(
                    [
                        lambda: rig.vmm.warm.evict(ONE),
                        lambda: rig.vmm.collector.collect(ONE),
                        lambda: rig.vmm.collector.fold(ONE, 6),
                        rig.state,
                    ]
                )()
            )
        if self.choose.random() < 0.15:
            rig.host.failing[self.choose.choice(["load", "save", "kill in time"])] = 1
        for _ in range(20):
            calls = [call() for _ in range(1 + (twice and self.choose.random() < 0.2))]
            done, *_ = answers = await rig.points.run(*calls, *beside)
            beside = []
            self.losses += [repr(one) for one in answers if isinstance(one, Ended | Missing | Damaged | AssertionError | KeyError)]
            if not isinstance(done, BaseException):
                return
        self.losses.append(f"never done: {done!r}")


def interleave(first: int, count: int) -> list[str]:
    """What was lost in so many lives, by seed."""
    lost = []
    for seed in range(first, first + count):
        choose = random.Random(seed)
        with tempfile.TemporaryDirectory(dir=_memory()) as directory, pytest.MonkeyPatch.context() as patch:
            losses = asyncio.run(_one(Path(directory), patch, choose))
        lost += [f"seed {seed}: {one}" for one in losses]
    return lost


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


async def _one(directory: Path, patch: pytest.MonkeyPatch, choose: random.Random) -> list[str]:
    rig = Rig(directory, patch)
    patch.setattr(vms, "_PATIENCE_SECONDS", 60.0)
    patch.setattr(diffs, "FOLD_AT", 3)
    rig.points.chooser = choose
    life = Life(rig, choose, directory)
    try:
        await life.live(12)
    except (VmmError, OSError) as error:
        life.losses.append(repr(error))
    rig.points.chooser = None
    rig.host.failing.clear()
    for future in rig.points._waiting:
        if not future.done():
            future.set_result(None)
    try:
        await nothing_left(rig)
    except AssertionError as error:
        life.losses.append(f"left over: {error}")
    return life.losses


def test_random_orders_lose_nothing() -> None:
    assert interleave(0, 40) == []


@pytest.mark.long
def test_a_thousand_random_orders_lose_nothing() -> None:
    assert interleave(40, 1000) == []


def test_with_nobody_kept_out_something_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before: a fold takes no lock and does not look again. So that lives in which nothing could be lost are found."""

    def put(self: Snapshots, session: str, folded: Folded) -> None:
        syscalls.exchange(folded.work, folded.snapshot)

    @contextlib.asynccontextmanager
    async def unowned(*_: object) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(vms.VmRegistry, "owned", unowned)
    monkeypatch.setattr(vms.Reader, "check", lambda self: None)
    monkeypatch.setattr(Snapshots, "put_fold", put)
    assert any(interleave(seed, 1) for seed in range(20))


async def test_a_launch_from_another_hypervisors_image_says_so(rig: Rig) -> None:
    """Which has another template for disks: what was said was that this hypervisor's is not there."""

    async def launch() -> None:
        image = rig.settings.images_dir / IMAGE
        (image / "overlay").unlink()
        manifest.write(image, manifest.Manifest(m.Shape(512, 1, 1 << 30, "kvm", 512), 0, 0, "firecracker"))
        with pytest.raises(Refused, match="was made with firecracker, and this host runs qemu"):
            await rig.prepare(m.PrepareRequest("a", 1, IMAGE, False))

    (error,) = await rig.points.run(launch())
    assert error is None
    assert not rig.host.alive
