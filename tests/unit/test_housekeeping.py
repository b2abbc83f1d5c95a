"""What vmm does now and then, for ever: a step that fails costs that step alone."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import until

from gateway import executors
from gateway import messages as m
from gateway.config import Egress, Settings
from vmm import daemon, diffs, drivers, network, sparse, standbys
from vmm.daemon import Vmm
from vmm.diffs import Manifest, Sum
from vmm.driver import Process
from vmm.errors import Ended, NeverRan, Unavailable
from vmm.network import Link, Network
from vmm.qemu import process as qemu
from vmm.qemu.driver import QemuDriver
from vmm.qemu.process import QemuMachine
from vmm.qemu.qmp import QmpError
from vmm.rpc.sessions import SessionCalls
from vmm.standbys import Standbys


class Machine:
    def __init__(self, session: str, can_be_killed: bool = True) -> None:
        self.record = Process(session, 1, 1, "image", 1)
        self.record.session, self.record.incarnation, self.record.phase = session, 1, "warm"
        self.can_be_killed = can_be_killed
        self.killed = 0
        self.ended = asyncio.Event()

    def save_record(self) -> None:
        pass

    async def kill(self) -> None:
        self.killed += 1
        if not self.can_be_killed:
            raise TimeoutError
        self.ended.set()

    async def wait(self) -> None:
        await self.ended.wait()


class Host:
    """What the daemon's parts do, each of which may be told to fail."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: set[str] = set()

    def step(self, name: str) -> Any:
        async def work(*arguments: object) -> None:
            self.done.append(name)
            if name in self.failing:
                raise IndexError(name)

        return work


@pytest.fixture
async def host() -> Host:
    return Host()


@pytest.fixture
async def vmm(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Vmm]:
    monkeypatch.setattr(drivers, "choose", lambda *arguments: None)
    monkeypatch.setattr(daemon, "_HOUSEKEEPING_SECONDS", 0.001)
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run", standbys={"warm_seconds": 1.0})  # type: ignore[arg-type]
    settings.sessions_dir.mkdir(parents=True)
    made = Vmm(settings, m.HostInfo("kvm", "", "qemu", 1, 1, "x86_64"), None)  # type: ignore[arg-type]
    monkeypatch.setattr(made.standbys, "drop_unused", host.step("standbys"))
    monkeypatch.setattr(made.network, "trim", host.step("links"))
    monkeypatch.setattr(made.network, "release", host.step("release"))
    yield made
    host.failing.clear()
    await made.close()


def keep_warm(vmm: Vmm, machine: Machine, tmp_path: Path) -> None:
    vmm.warm.adopt(vmm.vms.add(machine.record.session, machine, Link(tmp_path / machine.record.session)))  # type: ignore[arg-type]
    vmm.warm._since[machine.record.session] = float("-inf")


def calls(vmm: Vmm) -> SessionCalls:
    return next(one for one in vmm.calls if isinstance(one, SessionCalls))


async def test_steps_that_fail_keep_no_other_from_being_done(vmm: Vmm, host: Host, tmp_path: Path) -> None:
    host.failing |= {"standbys", "links"}
    stuck, other = Machine("stuck", can_be_killed=False), Machine("other")
    keep_warm(vmm, stuck, tmp_path)
    keep_warm(vmm, other, tmp_path)
    vmm._spawn(vmm._housekeeping())
    await until(lambda: other.killed and host.done.count("standbys") > 2 and host.done.count("links") > 2)


async def test_a_hypervisor_that_does_not_end_in_time_is_let_go_of_when_it_does(vmm: Vmm, tmp_path: Path) -> None:
    stuck = Machine("stuck", can_be_killed=False)
    keep_warm(vmm, stuck, tmp_path)
    with pytest.raises(Unavailable):
        await vmm.warm.evict("stuck")
    assert vmm.vms.get("stuck") and "stuck" in vmm.warm
    stuck.ended.set()
    await until(lambda: not vmm.vms.get("stuck"))
    assert not len(vmm.warm)


@pytest.mark.parametrize(("phase", "has_run"), [("prepared", False), ("running", True)])
async def test_control_is_told_whether_a_guest_had_run(vmm: Vmm, tmp_path: Path, phase: str, has_run: bool) -> None:
    """Where it had not, its session's snapshot is as good as it was."""
    told: list[bool] = []

    class Control:
        def notify(self, method: str, body: m.Ended) -> None:
            told.append(body.has_run)

    vmm._controls.add(Control())  # type: ignore[arg-type]
    machine = Machine("one")
    machine.record.phase = phase
    vmm.vms.add("one", machine, Link(tmp_path / "one"))  # type: ignore[arg-type]
    machine.ended.set()
    await until(lambda: told)
    assert told == [has_run]
    with pytest.raises(Ended if has_run else NeverRan):
        await calls(vmm).rpc_start(None, m.StartRequest("one", 1, b""))  # type: ignore[arg-type]


@pytest.mark.parametrize(("phase", "error"), [("ended", NeverRan("gone")), ("prepared", Unavailable("a full disk"))])
async def test_a_guest_that_could_not_be_told_to_run_has_not_run(
    vmm: Vmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, error: Exception
) -> None:
    machine = Machine("one")
    machine.record.phase = "prepared"
    vmm.vms.add("one", machine, Link(tmp_path / "one"))  # type: ignore[arg-type]

    async def resume(wake: bytes) -> int:
        machine.record.phase = phase
        raise error

    monkeypatch.setattr(machine, "resume", resume, raising=False)
    with pytest.raises(type(error)):
        await calls(vmm).rpc_start(None, m.StartRequest("one", 1, b""))  # type: ignore[arg-type]
    assert not vmm.vms.has_run("one", 1)
    machine.ended.set()


async def test_a_suspend_is_asked_for_twice_and_made_once(vmm: Vmm, tmp_path: Path) -> None:
    """The answer came too late: what is asked again must not write over what is there."""
    machine = Machine("one")
    machine.record.phase = "stopped"
    vmm.vms.add("one", machine, Link(tmp_path / "one"))  # type: ignore[arg-type]
    snapshot = vmm.snapshots.of("one") / "snapshot-1"
    snapshot.mkdir(parents=True)
    vmm.snapshots.overlay("one").write_bytes(b"disk")
    diffs.write_manifest(snapshot, Manifest([1], [Sum("1.pages", 10, ""), Sum("devices.state", 3, "")], 4, session="one"))
    made = await calls(vmm).rpc_suspend(None, m.SessionRef("one", 1))  # type: ignore[arg-type]
    assert (made.memory_bytes, made.state_bytes) == (10, 3)
    machine.ended.set()


async def test_control_is_told_of_an_end_though_its_link_cannot_be_destroyed(vmm: Vmm, host: Host, tmp_path: Path) -> None:
    told: list[str] = []

    class Control:
        def notify(self, method: str, body: m.Ended) -> None:
            told.append(f"{method} {body.session}")

    vmm._controls.add(Control())  # type: ignore[arg-type]
    host.failing.add("release")
    machine = Machine("one")
    vmm.vms.add("one", machine, Link(tmp_path / "one"))  # type: ignore[arg-type]
    machine.ended.set()
    await until(lambda: told)
    assert told == ["ended one"] and not vmm.vms.get("one")


@pytest.mark.parametrize("parked", [False, True])
async def test_a_prepare_that_fails_in_whatever_way_keeps_neither_link_nor_hypervisor(
    vmm: Vmm, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parked: bool
) -> None:
    """As without a free descriptor, which is an OSError of whatever step it is."""
    machine, link = Machine("one"), Link(tmp_path / "link")

    async def prepare(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    async def take(*arguments: object) -> Any:
        return machine if arguments else link

    machine.prepare, machine.take_link = prepare, lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(calls(vmm), "_driver", SimpleNamespace(takes_taps=True))
    monkeypatch.setattr(vmm.standbys, "take", take)
    monkeypatch.setattr(vmm.network, "take", take)
    if parked:
        vmm.vms.kept_links["one"] = link
    with pytest.raises(OSError, match="Too many open files"):
        await calls(vmm)._prepare(m.PrepareRequest("one", 1, "image", True), tmp_path, tmp_path)
    assert machine.killed == 1 and not vmm.vms.get("one")
    assert host.done == ([] if parked else ["release"]) and vmm.vms.kept_links == ({"one": link} if parked else {})


async def test_an_image_that_could_not_be_loaded_once_is_loaded_by_who_asks_next(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = QemuDriver.__new__(QemuDriver)
    driver._shared = {}
    tries: list[str] = []

    async def load(image: Path) -> str:
        tries.append(image.name)
        if len(tries) == 1:
            raise RuntimeError("can't start new thread")
        return "loaded"

    monkeypatch.setattr(driver, "_load", load)
    with pytest.raises(RuntimeError):
        await driver._share(Path("a"))
    assert [await driver._share(Path("a")) for _ in range(2)] == ["loaded", "loaded"] and tries == ["a", "a"]


async def test_an_image_that_could_not_be_loaded_leaves_nothing_of_it_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred MiB for each try, for as long as the daemon lived."""
    driver = QemuDriver.__new__(QemuDriver)
    driver._shared = {}
    (tmp_path / "overlay.qcow2").write_bytes(b"disk")

    async def load(image: Path) -> int:
        return os.memfd_create("image")

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(driver, "_load_memory", load)
    monkeypatch.setattr(sparse, "holes", fails)
    executors.start()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable):
        await driver._share(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_standbys_of_an_image_all_end_though_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standbys, "_QUIET_SECONDS", 0.0)
    machines = [Machine("stuck", can_be_killed=False), Machine("other")]

    class Driver:
        async def standby(self, image: Path) -> Machine:
            return machines[len(made._ready[image])]

    made = Standbys(Driver(), 2, 2, 900.0, lambda: True)  # type: ignore[arg-type]
    made.want(Path("a"))
    await asyncio.gather(*made._refills.values())
    await made.drop(Path("a"))
    assert [machine.killed for machine in machines] == [1, 1]


async def test_a_link_that_cannot_be_made_ends_neither_its_refill_nor_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_QUIET_SECONDS", 0.0)
    links = Network(tmp_path, Egress(closed=True), "test")
    links._wanted, tries = 1, []

    def create() -> Link:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("can't start new thread")
        return Link(tmp_path / "one")

    released: list[Link] = []

    async def release(link: Link) -> None:
        released.append(link)

    monkeypatch.setattr(links, "_create", create)
    monkeypatch.setattr(links, "release", release)
    links._refill()
    assert links._filling is not None
    await asyncio.wait([links._filling])
    links._refill()
    await until(lambda: links._ready)
    links._wanted = 2
    tries.clear()  # it fails again, and then vmm stops
    links._refill()
    await asyncio.wait([links._filling])
    await links.close(is_empty=False)
    assert len(released) == 1


async def test_a_guest_that_waits_for_room_goes_on_though_its_hypervisor_was_slow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_STARVED_RETRY_SECONDS", 0.001)
    machine = QemuMachine.__new__(QemuMachine)
    machine.record = Process("vm", 1, 1, "a", 1)
    machine.record.phase = "running"
    machine._ended = asyncio.get_running_loop().create_future()
    asked: list[str] = []

    class Slow:
        closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def run(self, command: str) -> dict[str, str]:
            asked.append(command)
            if len(asked) == 1:
                raise QmpError("query-status: no answer in time")
            return {"status": "running" if "cont" in asked else "io-error"}

    machine._qmp = Slow()  # type: ignore[assignment]
    await asyncio.wait_for(machine._retry_io(), 5)
    assert asked == ["query-status", "query-status", "cont", "query-status"]


def test_what_a_guest_can_make_grow_is_cut(tmp_path: Path) -> None:
    """A hypervisor's standard error lies in memory, a booting guest's console on the disk. Whoever writes goes on at the end."""
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run")
    stderr, short = (settings.runtime / "vms" / name / "stderr" for name in ("a", "b"))
    console, kept = (settings.images_dir / name / "console.log" for name in (".making-image", "image"))
    for log, count in ((stderr, 300_000), (console, 300_000), (kept, 300_000), (short, 10)):
        log.parent.mkdir(parents=True)
        log.write_bytes(b"".join(b"line %d\n" % number for number in range(count)))
    whole, untouched = kept.stat().st_size, short.read_bytes()
    with stderr.open("ab", buffering=0) as writer:
        Vmm._cut_logs(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
        writer.write(b"more\n")
    for log in (stderr, console):
        assert log.stat().st_size <= (64 << 10) + 5 and log.read_bytes().startswith(b"line 29")
    assert stderr.read_bytes().endswith(b"line 299999\nmore\n")
    assert short.read_bytes() == untouched and kept.stat().st_size == whole > 1 << 20, "an image's was cut when it was published"
