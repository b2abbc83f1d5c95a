"""vmm without machines: its real registry, calls, collector and files, over hypervisors that are simulated down to the diffs that they write.

Whatever waits, for a pool's thread, a hypervisor or a link, passes a point. Who holds a point forces an order; a scheduler with a seed
chooses at each moment who goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from gateway import executors
from gateway import messages as m
from gateway.config import Settings
from gateway.observe.steps import Steps
from vmm import daemon, diffs, disks, drivers, snapshot_gc, snapshots
from vmm.daemon import Vmm
from vmm.driver import DEVICES, Process
from vmm.errors import VmmError
from vmm.network import Link
from vmm.syscalls import PAGE

IMAGE = "image"
PAGES = 6
COUNT_AT = PAGES  # the page that counts incarnations
QUIET_TURNS = 12  # of the loop, after which everybody waits


class Points:
    """Where work waits. `held`: names whose passers wait until `free`; with `chooser` everybody waits until `run` picks one."""

    def __init__(self) -> None:
        self.chooser: random.Random | None = None
        self.passed: list[str] = []
        self._held: dict[str, asyncio.Event] = {}
        self._reached: dict[str, asyncio.Event] = {}
        self._waiting: list[asyncio.Future[None]] = []

    async def point(self, name: str) -> None:
        self.passed.append(name)
        if name in self._held:
            self._reached[name].set()
            await self._held[name].wait()
        elif self.chooser is not None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
        else:
            await asyncio.sleep(0)

    def hold(self, name: str) -> None:
        self._held[name], self._reached[name] = asyncio.Event(), asyncio.Event()

    async def reached(self, name: str) -> None:
        async with asyncio.timeout(5):
            await self._reached[name].wait()

    def free(self, name: str) -> None:
        self._held.pop(name).set()

    async def run(self, *work: Coroutine[Any, Any, Any]) -> list[Any]:
        """Until all of `work` has ended; what each returned, or raised."""
        tasks = [asyncio.ensure_future(one) for one in work]
        for _ in range(3_000):
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
            if all(task.done() for task in tasks):
                return [task.exception() or task.result() if not task.cancelled() else asyncio.CancelledError() for task in tasks]
            if self._waiting and self.chooser is not None:
                chosen = self._waiting.pop(self.chooser.randrange(len(self._waiting)))
                if not chosen.done():
                    chosen.set_result(None)
        raise AssertionError(f"everybody waits: {self.passed[-20:]}")


class Pool:
    """Does what a pool's thread does, at once, between two points."""

    def __init__(self, points: Points) -> None:
        self._points = points

    async def run(self, call: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        name = getattr(call, "__name__", "work")
        await self._points.point(name)
        result = call(*arguments)
        await self._points.point(f"{name} done")
        return result


class Network:
    def __init__(self, *_: object) -> None:
        self.points = Points()
        self.links: set[Path] = set()
        self._count = 0

    def start(self, *_: object) -> None: ...

    async def close(self, is_empty: bool) -> None: ...

    async def take(self) -> Link:
        await self.points.point("link")
        self._count += 1
        link = Link(Path(f"/links/{self._count}"))
        self.links.add(link.path)
        return link

    async def release(self, link: Link) -> None:
        await self.points.point("release link")
        assert link.path in self.links, "a link goes once"
        self.links.discard(link.path)

    async def restock(self, link: Link) -> None:
        await self.points.point("restock")

    async def enable_egress(self, link: Link, rules: object) -> None: ...

    async def trim(self) -> None: ...


class Machine:
    """A hypervisor: its guest counts its incarnations in memory and on its disk, and changes a page in each."""

    def __init__(self, host: Host, vm: str) -> None:
        self.host = host
        self.record = Process(vm, 1, 1, IMAGE, 1)
        self.steps = Steps("vmm", "")
        self.memory: dict[int, int] = {}
        self._dirty: set[int] = set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._overlay = Path()
        self.own_link: Link | None = None
        self.waits_in: Link | None = None

    def save_record(self) -> None: ...

    def take_link(self) -> Link | None:
        link, self.own_link = self.own_link, None
        return link

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        await self.host.points.point("load")
        self.host.fail("load")
        self.record.link, self._overlay = link.name, overlay
        if (snapshot / diffs.MANIFEST).exists():
            manifest = diffs.read_manifest(snapshot)
            diffs.verify_all(snapshot, manifest)
            self.memory, self.record.chain = load(snapshot, manifest), manifest.chain
        await self.host.points.point("loaded")
        self.record.phase = "prepared"

    async def resume(self, wake: bytes) -> int:
        assert self.record.phase == "prepared", self.record.phase
        self.record.phase = "starting"
        await self.host.points.point("cont")
        assert self._overlay.read_bytes() == b"%d" % self.memory.get(COUNT_AT, 0), "memory and disk are of one instant"
        count = self.memory.get(COUNT_AT, 0) + 1
        for page in (COUNT_AT, count % PAGES):
            self.memory[page] = count
            self._dirty.add(page)
        self._overlay.write_bytes(b"%d" % count)
        self.host.counted[self.record.session] = count
        self.record.phase = "running"
        return self.host.descriptor()

    async def checked(self) -> None: ...

    async def agent(self) -> int:
        return self.host.descriptor()

    async def save(self, directory: Path) -> list[diffs.Sum]:
        await self.host.points.point("save")
        self.host.fail("save")
        self.record.phase = "stopped"
        number = self.record.incarnation
        runs = [(page, page + 1) for page in sorted(self._dirty)]
        (directory / DEVICES).write_bytes(b"devices")
        diffs.write_runs(directory / f"{number}.runs", runs)
        (directory / f"{number}.pages").write_bytes(b"".join(bytes([self.memory[page] % 256]) * PAGE for page, _ in runs))
        await self.host.points.point("saved")
        return [diffs.checksum(directory / name) for name in (DEVICES, f"{number}.runs", f"{number}.pages")]

    async def pause(self) -> None:
        self.record.phase = "prepared"

    async def unpause(self) -> None:
        await self.host.points.point("unpause")
        self.record.phase = "running"

    async def kill(self) -> None:
        await self.host.points.point("kill")
        if self.host.failing.get("kill"):
            self.host.failing["kill"] -= 1
            raise TimeoutError
        if self.host.failing.get("kill in time"):
            self.host.failing["kill in time"] -= 1
            asyncio.get_running_loop().call_soon(self.die)
            raise TimeoutError
        self.die()
        if (link := self.take_link()) is not None and self.host.network is not None:
            await self.host.network.release(link)
        await self.wait()

    def die(self) -> None:
        self.host.alive.discard(self)
        self.record.phase = "ended"
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait(self) -> None:
        await asyncio.shield(self._ended)


def load(snapshot: Path, manifest: diffs.Manifest) -> dict[int, int]:
    """A chain's memory: by page, what it says."""
    memory: dict[int, int] = {}
    for number in manifest.chain:
        data, at = (snapshot / f"{number}.pages").read_bytes(), 0
        for first, after in diffs.runs_of(snapshot / f"{number}.runs"):
            for page in range(first, after):
                memory[page] = data[at * PAGE]
                at += 1
    return memory


class Host:
    """The driver, and what all its machines share."""

    name = "qemu"
    disk_template = "overlay"
    takes_taps = True

    def __init__(self, points: Points) -> None:
        self.points = points
        self.alive: set[Machine] = set()
        self.failing: dict[str, int] = {}
        self.counted: dict[str, int] = {}  # by session, what its guest has counted to last
        self._made = 0
        self.network: Network | None = None  # where standbys wait

    def fail(self, step: str) -> None:
        if self.failing.get(step):
            self.failing[step] -= 1
            raise OSError(24, "Too many open files")

    def descriptor(self) -> int:
        return 0

    async def standby(self, image: Path, link: Link | None = None) -> Machine:
        await self.points.point("standby")
        self._made += 1
        made = Machine(self, f"vm-{self._made}")
        self.alive.add(made)
        if self.network is not None and link is None:
            made.own_link = link = await self.network.take()
        made.waits_in = link
        return made

    def counts(self) -> dict[str, int]:
        return {}

    def records(self) -> list[Process]:
        return []

    async def forget_image(self, image: str) -> None: ...


class NoCgroups:
    def start(self) -> None: ...

    def memory_bytes(self, name: str) -> int:
        return 0

    def cpu_seconds(self, name: str) -> float:
        return 0.0


class Rig:
    """A vmm with one image, and no standbys: each start makes its hypervisor."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, warm: int = 1) -> None:
        self.points = Points()
        self._under_way = 0  # of what nobody waits for
        self.host = Host(self.points)
        for pool in ("LATENCY", "BULK", "UPKEEP"):
            monkeypatch.setattr(executors, pool, Pool(self.points))
        monkeypatch.setattr(snapshots, "sync", lambda paths: None)
        monkeypatch.setattr(disks, "sync_path", lambda path: None)
        monkeypatch.setattr(disks, "copy_overlay", lambda template, target: target.write_bytes(template.read_bytes()))
        monkeypatch.setattr(snapshot_gc, "_QUIET_SECONDS", 0.0)
        monkeypatch.setattr(daemon, "Network", Network)
        monkeypatch.setattr(drivers, "choose", lambda *_: self.host)
        self.settings = Settings(
            root=directory / "root", run=directory / "run", standbys={"warm": warm, "per_image": 0, "most_per_image": 0}  # type: ignore[arg-type]
        )  # fmt: skip
        (self.settings.images_dir / IMAGE).mkdir(parents=True)
        (self.settings.images_dir / IMAGE / "overlay").write_bytes(b"0")
        self.settings.sessions_dir.mkdir(parents=True)
        self.vmm = Vmm(self.settings, m.HostInfo("kvm", "", "qemu", 1, 1, "x86_64"), NoCgroups())  # type: ignore[arg-type]
        self.network: Network = self.vmm.network  # type: ignore[assignment]
        self.network.points = self.points
        spawn = self.vmm._tasks.spawn
        later = lambda work: spawn(self._later(work))  # noqa: E731
        self.vmm.vms._spawn = spawn
        self.vmm.collector._spawn = self.vmm.warm._spawn = later
        for calls in self.vmm.calls:
            for name in dir(calls):
                if name.startswith("rpc_"):
                    setattr(self, name[4:], self._caller(getattr(calls, name)))

    async def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        """What nobody waits for begins whenever it likes."""
        self._under_way += 1
        try:
            await self.points.point("begin")
            with contextlib.suppress(VmmError):
                await work
        finally:
            self._under_way -= 1

    def _caller(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def called(*body: Any) -> Any:
            return await call(None, *(body or (None,)))

        return called

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)

    def counted(self, session: str) -> int:
        return self.host.counted.get(session, 0)

    def asleep(self, session: str) -> int:
        """What the newest snapshot of a session counts to. Raises VmmError."""
        snapshot = self.vmm.snapshots.newest(session)
        manifest = diffs.read_manifest(snapshot)
        diffs.verify_all(snapshot, manifest)
        return load(snapshot, manifest).get(COUNT_AT, 0)

    # ---- what control does ----

    async def launch(self, session: str) -> None:
        await self.prepare(m.PrepareRequest(session, 1, IMAGE, False))
        await self.start(m.StartRequest(session, 1, b""))

    async def sleep(self, session: str, incarnation: int, keep_warm: bool = False) -> None:
        await self.suspend(m.SessionRef(session, incarnation))
        await self.release_vm(m.ReleaseVmRequest(session, incarnation, keep_warm))

    async def wake(self, session: str, incarnation: int) -> None:
        """`incarnation` is the next one."""
        await self.prepare(m.PrepareRequest(session, incarnation, IMAGE, True))
        await self.start(m.StartRequest(session, incarnation, b""))

    async def settled(self) -> None:
        """Until nothing is under way in the background."""
        await self.points.run(self._quiet())

    async def _quiet(self) -> None:
        turns = 0
        while turns < QUIET_TURNS:
            turns = 0 if self._under_way else turns + 1
            await asyncio.sleep(0)
