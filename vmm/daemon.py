"""The vmm daemon: the only process besides the supervisor that is root. It parses nothing from a guest or a network.

Calls come from control and, for sockets, from edges (gateway/messages.py). All are idempotent by session and incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gateway import executors
from gateway import messages as m
from gateway.config import Settings
from gateway.observe.room import (
    BUILD_ROOM_BYTES,
    SESSION_DESCRIPTORS,
    descriptors_free,
    descriptors_kept,
    disk_free_bytes,
    inodes_free,
    memory_available_bytes,
)  # fmt: skip
from gateway.observe.steps import Steps
from gateway.rpc import Connection, Reply
from gateway.tasks import Tasks

from . import disks, drivers, sandboxes, syscalls
from .builds import Builder, BuildSettings
from .cgroups import Cgroups
from .diffs import Manifest
from .driver import Driver, Machine, Process
from .errors import Damaged, Ended, Missing, NeverRan, Refused, Unavailable, VmmError, not_written, unreadable
from .network import Link, Network
from .quarantine import Quarantine
from .snapshots import Snapshots
from .standbys import Standbys

log = structlog.get_logger()

_HOUSEKEEPING_SECONDS = 10
_PREPARE_TRIES = 2
_ADOPT_SECONDS = 30.0
_QUIET_SECONDS = 0.6  # after a start


@dataclass
class _Held:
    """A session whose hypervisor is here."""

    machine: Machine
    link: Link
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    expected: bool = False  # its end was asked for
    has_run: bool = True  # its guest was told to run, as this incarnation
    parked: bool = False  # edges hold connections in its link, which outlives it


class Vmm:
    def __init__(self, settings: Settings, info: m.HostInfo, cgroups: Cgroups) -> None:
        self.settings = settings
        self._info = info
        self._cgroups = cgroups
        runtime = settings.runtime
        self.network = Network(runtime / "netns", settings.egress, settings.name)
        self.driver = drivers.choose(settings, info.hypervisor, cgroups, self.network)
        kept = settings.standbys
        self.standbys = Standbys(self.driver, kept.per_image, kept.most_per_image, kept.unused_seconds, self._has_room)
        self.builder = Builder(
            settings.root / "builds", runtime / "build-netns", cgroups,
            BuildSettings(
                settings.cache / "base.tar", settings.cache / "builder", settings.cache / "modules", tuple(settings.images.base_names),
                settings.images.pull, settings.users.builders, settings.images.registry_ca,
                settings.images.build_memory_mib, settings.images.cache_mib,
                settings.images.cache_days, (settings.limits.disk_reserve_mib << 20) + BUILD_ROOM_BYTES,
            ),
        )  # fmt: skip
        self.snapshots = Snapshots(settings.sessions_dir)
        self.quarantine = Quarantine(settings.sessions_dir, settings.root / "quarantine")
        self._folds: dict[str, asyncio.Task[None]] = {}
        self._warm: dict[str, float] = {}  # sessions whose hypervisors are paused, and since when; oldest first
        self._parked: dict[str, Link] = {}  # links of sessions that sleep with streams
        self._traces: dict[str, dict[str, Steps]] = {}
        self._sessions: dict[str, _Held] = {}
        self._preparing: dict[str, asyncio.Task[object]] = {}
        self._tasks = Tasks()
        self._spawn = self._tasks.spawn
        self._controls: set[Connection] = set()

    async def start(self) -> None:
        """Takes running microVMs over from an earlier daemon, then clears away what nobody needs."""
        self.settings.images_dir.mkdir(parents=True, exist_ok=True)
        self.settings.sessions_dir.mkdir(parents=True, exist_ok=True)
        self._cgroups.start()
        for record, machine in await adopt_all(self.driver):
            if not record.session or record.phase == "standby":  # waiting, or half prepared
                await machine.kill()
                continue
            held = self.hold(record.session, machine, Link(self.settings.runtime / "netns" / record.link))
            if record.phase == "running":
                self._spawn(self._void(held, record.incarnation))
            if record.phase == "warm":
                held.parked = self.snapshots.parked_link(record.session) is not None
                self._keep_warm(record.session, held)
        for session, name in self.snapshots.parked_links().items():
            link = Link(self.settings.runtime / "netns" / name)
            if session not in self._sessions and link.path.exists():
                self._parked[session] = link
        keep = {held.link.path for held in self._sessions.values()} | {link.path for link in self._parked.values()}
        self.network.start(keep, self.settings.standbys.links, self.driver.takes_taps)
        self.builder.start()
        for leftover in self.settings.images_dir.glob(".*"):
            if leftover.name[1:] not in {held.machine.record.image for held in self._sessions.values()}:
                shutil.rmtree(leftover, ignore_errors=True)
        self._spawn(self._housekeeping())

    async def close(self) -> None:
        """Leaves the microVMs running; they are taken over at the next start."""
        await self._tasks.close()
        await self.standbys.close()
        await self.network.close(is_empty=not self._sessions)

    def connected(self, connection: Connection) -> None:
        if connection.uid == self.settings.users.control:
            self._controls.add(connection)
            connection.closed.add_done_callback(lambda _: self._controls.discard(connection))

    # ---- host ----

    async def rpc_host_info(self, connection: Connection, body: None) -> m.HostInfo:
        return self._info

    async def rpc_reclaim_and_report_capacity(self, connection: Connection, body: None) -> m.Capacity:
        """What is warm is given up where its memory is wanted."""
        wanted = (self.settings.limits.reserve_mib + 2 * self.settings.limits.growth_mib) << 20
        while self._warm and memory_available_bytes() < wanted:
            await self._cool(next(iter(self._warm)))
        running = [self._cgroups.memory_bytes(held.machine.record.vm) for held in self._sessions.values()]
        expected = self.settings.limits.growth_mib << 20
        return m.Capacity(
            memory_available=memory_available_bytes(),
            disk_free=disk_free_bytes(self.settings.root),
            inodes_free=inodes_free(self.settings.root),
            expected_growth=max(expected, sum(running) // len(running)) if running else expected,
            descriptors_free=descriptors_free(),
        )

    async def rpc_state(self, connection: Connection, body: None) -> m.HostState:
        return m.HostState(
            sessions=[self._state(name, held) for name, held in self._sessions.items()],
            preparing=list(self._preparing),
            snapshots=self.snapshots.held(),
            images=[path.name for path in self.settings.images_dir.iterdir() if (path / "manifest.json").exists()],
            builds=self.builder.names,
        )

    async def rpc_warm(self, connection: Connection, body: None) -> list[m.SessionState]:
        """Sessions whose paused hypervisors are kept: a few, told without a look at everybody's files."""
        return [self._state(name, held) for name in self._warm if (held := self._sessions.get(name)) is not None]

    async def rpc_effort(self, connection: Connection, body: m.SessionRef) -> m.Effort:
        record = self.held(body.session, body.incarnation).machine.record
        return m.Effort(self._cgroups.cpu_seconds(record.vm), syscalls.waited_seconds(record.pid), syscalls.read_bytes(record.pid))

    def _state(self, name: str, held: _Held) -> m.SessionState:
        record = held.machine.record
        return m.SessionState(
            name, record.incarnation, record.phase,
            self._cgroups.memory_bytes(record.vm), self._cgroups.cpu_seconds(record.vm),
        )  # fmt: skip

    # ---- sessions ----

    async def rpc_prepare(self, connection: Connection, body: m.PrepareRequest) -> None:
        if (under_way := self._preparing.get(body.session)) is not None:  # asked for by a control that has gone since
            await asyncio.wait([under_way])
        held = self._sessions.get(body.session)
        if held is not None and held.machine.record.phase == "cooling":
            await held.machine.wait()
            held = self._sessions.get(body.session)
        if held is not None:
            if held.machine.record.incarnation == body.incarnation:
                return
            if body.from_snapshot and self._warm.pop(body.session, None) is not None:
                self._warm_up(held, body.incarnation)
                return
            raise Unavailable(f"session {body.session} is held by incarnation {held.machine.record.incarnation}")
        if not body.from_snapshot and descriptors_free() < descriptors_kept() + SESSION_DESCRIPTORS:  # what sleeps may still wake
            raise Unavailable(f"{descriptors_free()} descriptors are free, {descriptors_kept()} are kept for resumes: raise LimitNOFILE")
        image = self.settings.images_dir / body.image
        overlay = self.snapshots.overlay(body.session)
        if body.from_snapshot:
            await self.folded(body.session)
            snapshot = self.snapshots.newest(body.session)
        else:
            snapshot = image
            overlay.parent.mkdir(exist_ok=True)
            try:
                await asyncio.to_thread(disks.copy_overlay, image / self.driver.disk_template, overlay)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise unreadable(error, image / self.driver.disk_template) from error
                raise not_written(error, f"session {body.session}", f"the disk of session {body.session} could not be made") from error
        with self.preparing(body.session):
            await self._prepare(body, image, snapshot, overlay)

    @contextlib.contextmanager
    def preparing(self, session: str) -> Iterator[None]:
        """What is under way for a session is called off by `forget`."""
        task = asyncio.current_task()
        assert task is not None
        self._preparing[session] = task
        try:
            yield
        finally:
            del self._preparing[session]

    async def _prepare(self, body: m.PrepareRequest, image: Path, snapshot: Path, overlay: Path) -> None:
        """A try that fails costs a standby; the files are untouched until the guest runs, so one more may follow."""
        steps = self._trace(body.session, "resume" if body.from_snapshot else "launch")
        for attempt in range(1, _PREPARE_TRIES + 1):
            parked = self._parked.pop(body.session, None)
            link = parked or await self.network.take()
            machine: Machine | None = None
            try:
                machine = await self._standby(image, body.from_snapshot)
                machine.steps = steps
                steps.mark("standby and link taken")
                machine.record.session, machine.record.incarnation = body.session, body.incarnation
                if body.egress is not None:
                    await self.network.enable_egress(link, body.egress)
                await machine.prepare(snapshot, overlay, link)
                self.hold(body.session, machine, link)
                return
            except BaseException as error:
                try:
                    if machine is not None:
                        await machine.kill()
                finally:
                    if parked is not None:
                        self._parked[body.session] = parked
                    else:
                        await self.network.release(link)
                if attempt == _PREPARE_TRIES or not isinstance(error, VmmError):
                    raise
                log.warning("prepare.retry", session=body.session, error=str(error))

    async def _standby(self, image: Path, is_resume: bool) -> Machine:
        """What is wrong with an image says nothing about the sleeper that needs it: that stays as it is."""
        try:
            return await self.standbys.take(image)
        except (Damaged, Missing) as error:
            if not is_resume:
                raise
            raise Refused(f"image {image.name}, which the session is loaded over, has to be put back: {error}") from error

    async def rpc_pause(self, connection: Connection, body: m.SessionRef) -> None:
        held = self.held(body.session, body.incarnation)
        async with held.lock:
            await held.machine.pause()

    async def rpc_claim(self, connection: Connection, body: m.ClaimRequest) -> None:
        """Its disk moves first, so that a daemon that dies in between finds a session without one, and forgets it."""
        done = self._sessions.get(body.session)
        if done is not None and done.machine.record.incarnation == body.incarnation:
            return
        held = self.held(body.ahead, 1)
        if held.machine.record.phase != "prepared":
            raise Unavailable(f"{body.ahead} has not run ahead")
        held.machine.steps = self._trace(body.session, "launch, ran ahead")
        async with held.lock:
            if body.egress is not None:
                await self.network.enable_egress(held.link, body.egress)
            self.snapshots.rename(body.ahead, body.session)
            held.machine.record.session, held.machine.record.incarnation = body.session, body.incarnation
            held.machine.save_record()
            self._sessions[body.session] = self._sessions.pop(body.ahead)
        held.machine.steps.mark("one that ran ahead")

    async def rpc_start(self, connection: Connection, body: m.StartRequest) -> Reply:
        """Lets a prepared session run. From here on its snapshot is void."""
        if body.session not in self._sessions:
            raise NeverRan(f"the hypervisor that was prepared for session {body.session} is gone")
        held = self.held(body.session, body.incarnation)
        async with held.lock:
            if held.machine.record.phase == "running":
                return Reply(None, [await held.machine.agent()])
            held.has_run = True
            channel = await held.machine.resume(body.wake)
        self._spawn(self._void(held, body.incarnation))
        return Reply(None, [channel])

    async def _void(self, held: _Held, incarnation: int) -> None:
        """What `incarnation` was loaded from goes once its first requests have been answered: removing files competes with them."""
        await asyncio.sleep(_QUIET_SECONDS)
        async with held.lock:
            record = held.machine.record
            if record.incarnation == incarnation and record.phase in ("starting", "running"):
                await asyncio.to_thread(self.snapshots.started, record.session, incarnation)

    async def rpc_agent(self, connection: Connection, body: m.SessionRef) -> Reply:
        held = self.held(body.session, body.incarnation)
        return Reply(None, [await held.machine.agent()])

    async def rpc_sockets(self, connection: Connection, body: m.SocketsRequest) -> Reply:
        held = self.held(body.session, body.incarnation)
        return Reply(None, [sock.detach() for sock in await self.network.sockets(held.link, max(1, min(body.count, 32)))])

    async def rpc_services(self, connection: Connection, body: m.SessionRef) -> Reply:
        """The sockets on which the guest asks for metadata (TCP) and names (UDP, TCP): control answers there."""
        held = self.held(body.session, body.incarnation)
        return Reply(None, await self.network.services(held.link))

    async def rpc_suspend(self, connection: Connection, body: m.SessionRef) -> m.Suspended:
        """Stops the guest and makes its snapshot durable; it stays stopped until kill or unpause."""
        held = self.held(body.session, body.incarnation)
        async with held.lock:
            started = time.monotonic()
            overlay = self.snapshots.overlay(body.session)
            if held.machine.record.phase == "stopped":  # asked again: the answer may have come too late
                made = await asyncio.to_thread(self.snapshots.made, body.session, body.incarnation)
                if made is not None:
                    return _suspended(made, overlay, started)
            steps = held.machine.steps = self._trace(body.session, "suspend")
            work = self.snapshots.begin(body.session)
            try:
                written = await held.machine.save(work)
                manifest = await asyncio.to_thread(
                    self.snapshots.commit, body.session, body.incarnation, work, held.machine.record.chain, written,
                    held.machine.record.made,
                )  # fmt: skip
                steps.mark("synced and renamed")
            except (VmmError, OSError) as error:
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(VmmError):
                    await held.machine.unpause()
                if isinstance(error, OSError):
                    what = f"the snapshot of session {body.session}"
                    raise not_written(error, what, f"session {body.session} could not be saved") from error
                raise
            return _suspended(manifest, overlay, started)

    async def rpc_leave(self, connection: Connection, body: None) -> None:
        """The service stops: what is paused ends, what is parked is let go. Everything of it is on the disk."""
        for held in self._sessions.values():
            held.parked = False
        for session in list(self._warm):
            await self._cool(session)
        while self._parked:
            session, link = self._parked.popitem()
            await asyncio.to_thread(self.snapshots.park_link, session, None)
            await self.network.release(link)

    async def rpc_unpause(self, connection: Connection, body: m.SessionRef) -> None:
        """Calls a suspend off: the guest runs on, its snapshot is void."""
        held = self.held(body.session, body.incarnation)
        async with held.lock:
            await asyncio.to_thread(self.snapshots.called_off, body.session, body.incarnation)
            await held.machine.unpause()

    async def rpc_kill(self, connection: Connection, body: m.SessionRef) -> None:
        held = self._sessions.get(body.session)
        if held is not None and held.machine.record.incarnation == body.incarnation:
            held.expected = True
            await held.machine.kill()
            await self.let_go(body.session, held)
            await self._rest(body.session)

    async def rpc_release_vm(self, connection: Connection, body: m.ReleaseVmRequest) -> None:
        """The paused hypervisor stays where there is room for one more; the one that rested longest goes for it."""
        held = self._sessions.get(body.session)
        if held is None or held.machine.record.incarnation != body.incarnation or body.session in self._warm:
            return
        held.parked = body.parked
        await asyncio.to_thread(self.snapshots.park_link, body.session, held.link.name if body.parked else None)
        if not body.keep_warm or not self.settings.standbys.warm:
            await self.rpc_kill(connection, m.SessionRef(body.session, body.incarnation))
            return
        held.machine.record.phase = "warm"
        held.machine.save_record()
        self._keep_warm(body.session, held)
        while len(self._warm) > self.settings.standbys.warm:
            await self._cool(next(iter(self._warm)))

    def _keep_warm(self, session: str, held: _Held) -> None:
        held.expected = True  # its end is no loss: the snapshot is durable
        self._warm[session] = asyncio.get_running_loop().time()
        self._spawn(self._restock(session, held))

    async def _restock(self, session: str, held: _Held) -> None:
        if session in self._warm:
            with contextlib.suppress(OSError):
                await self.network.restock(held.link)

    def _warm_up(self, held: _Held, incarnation: int) -> None:
        """The paused process becomes the session's next incarnation, as if it had been loaded from the snapshot."""
        held.machine.steps = self._trace(held.machine.record.session, "resume, warm")
        held.expected = held.parked = held.has_run = False
        held.machine.record.incarnation = incarnation
        held.machine.record.phase = "prepared"
        held.machine.save_record()
        held.machine.steps.mark("still there, paused")

    async def _cool(self, session: str) -> None:
        self._warm.pop(session, None)
        held = self._sessions.get(session)
        if held is not None:
            held.machine.record.phase = "cooling"
            try:
                await held.machine.kill()
            except TimeoutError:  # it is tried again, and let go of whenever it ends
                if self.is_at_rest(session):
                    return
                self._warm[session] = asyncio.get_running_loop().time()
                raise
            await self.let_go(session, held)
            await self._rest(session)

    async def rpc_forget(self, connection: Connection, body: m.SessionRef) -> None:
        """Ends whatever is left of a session, or under way for it, and removes its files."""
        await self._end(body.session)
        await asyncio.to_thread(self.snapshots.forget, body.session)

    async def rpc_quarantine(self, connection: Connection, body: m.QuarantineRequest) -> m.Quarantined:
        """Ends whatever is left of a session, or under way for it, and sets its files aside."""
        await self._end(body.session)
        return await asyncio.to_thread(self.quarantine.put, body)

    async def rpc_quarantined(self, connection: Connection, body: None) -> list[m.Quarantined]:
        return await asyncio.to_thread(self.quarantine.list)

    async def rpc_recover(self, connection: Connection, body: m.QuarantineName) -> m.Quarantined:
        """Moves a session's files back where a snapshot of it is whole; it sleeps with the incarnation that is answered."""
        return await asyncio.to_thread(self.quarantine.recover, body.session)

    async def rpc_release_quarantined(self, connection: Connection, body: m.QuarantineName) -> None:
        """Removes what was set aside: by its age, for room, or because its owner says so."""
        await asyncio.to_thread(self.quarantine.release, body.session)

    async def _end(self, name: str) -> None:
        preparing = self._preparing.get(name)
        if preparing is not None:
            preparing.cancel()
            await asyncio.wait([preparing])
        self._warm.pop(name, None)
        held = self._sessions.get(name)
        if held is not None:
            held.expected, held.parked = True, False
            await held.machine.kill()
            await self.let_go(name, held)
        parked = self._parked.pop(name, None)
        if parked is not None:
            await self.network.release(parked)
        await self.folded(name)
        self._traces.pop(name, None)

    async def rpc_traces(self, connection: Connection, body: m.SessionRef) -> list[m.Trace]:
        return [m.Trace(one.work, one.started_at, one.steps) for one in self._traces.get(body.session, {}).values()]

    def _trace(self, session: str, work: str) -> Steps:
        kind = "suspend" if work == "suspend" else "wake"
        made = self._traces.setdefault(session, {})[kind] = Steps("vmm", work)
        return made

    # ---- inside ----

    def held(self, session: str, incarnation: int) -> _Held:
        held = self._sessions.get(session)
        if held is None or held.machine.record.incarnation != incarnation:
            raise Ended(f"session {session} has no hypervisor of incarnation {incarnation}")
        return held

    def hold(self, session: str, machine: Machine, link: Link) -> _Held:
        held = _Held(machine, link, has_run=machine.record.phase != "prepared")
        self._sessions[session] = held
        self._spawn(self._watch(held))
        return held

    async def _watch(self, held: _Held) -> None:
        await held.machine.wait()
        session = held.machine.record.session
        if held.expected:
            if self._warm.pop(session, None) is not None:  # a paused one died: the session is as cold as any
                await self.let_go(session, held)
            return
        log.warning("hypervisor.ended", session=session, vm=held.machine.record.vm)
        reason = "The hypervisor of the MicroVM stopped unexpectedly."
        ended = m.Ended(session, held.machine.record.incarnation, reason, held.has_run)
        try:
            await self.let_go(session, held)
        finally:
            for control in self._controls:
                control.notify("ended", ended)

    async def let_go(self, session: str, held: _Held) -> None:
        if self._sessions.get(session) is held:
            del self._sessions[session]
            if held.parked:
                self._parked[session] = held.link
            else:
                await self.network.release(held.link)

    async def _rest(self, session: str) -> None:
        """A session without a hypervisor: what only that had mapped goes; a long chain of diffs is folded, unless it wakes."""
        await asyncio.to_thread(self.snapshots.rest, session)
        if session not in self._folds and await asyncio.to_thread(self.snapshots.needs_fold, session):
            self._folds[session] = asyncio.get_running_loop().create_task(self._fold(session))

    async def _fold(self, session: str) -> None:
        try:
            await asyncio.to_thread(self.snapshots.fold, session)
        except (VmmError, OSError) as error:
            log.warning("fold.failed", session=session, error=str(error))
        finally:
            self._folds.pop(session, None)

    def is_at_rest(self, session: str) -> bool:
        """It has no hypervisor, not even a paused one."""
        return session not in self._sessions

    async def folded(self, session: str) -> None:
        """Waits until the session's files are not being folded."""
        task = self._folds.get(session)
        if task is not None:
            await asyncio.wait([task])

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            records = [held.machine.record for held in self._sessions.values()]
            booting = 0  # the incarnation of what will be an image
            held_images = {self.settings.images_dir / one.image for one in records if one.incarnation != booting}
            await self._step("standbys", self.standbys.drop_unused(held_images))
            await self._step("links", self.network.trim())
            self.builder.trim()
            await self._step("logs", executors.UPKEEP.run(self._cut_logs))
            late = asyncio.get_running_loop().time() - self.settings.standbys.warm_seconds
            for session in [session for session, since in self._warm.items() if since < late]:
                await self._step(f"cool {session}", self._cool(session))

    def _cut_logs(self) -> None:
        """What guests can make grow: their hypervisors' words, and the consoles of those that boot for an image."""
        for log in (*(self.settings.runtime / "vms").glob(f"*/{sandboxes.STDERR}"), *self.settings.images_dir.glob(".*/console.log")):
            with contextlib.suppress(FileNotFoundError):
                sandboxes.cut(log)

    async def _step(self, name: str, work: Coroutine[object, object, None]) -> None:
        """Does one step of what goes on for ever: what it raises ends that step alone."""
        try:
            await work
        except Exception:
            log.exception("housekeeping.failed", step=name)

    def _has_room(self) -> bool:
        """Enough memory and descriptors for hypervisors that only wait."""
        wanted = (2 * self.settings.limits.reserve_mib + 4 * self.settings.limits.growth_mib) << 20
        return descriptors_free() > 2 * descriptors_kept() and memory_available_bytes() > wanted


async def adopt_all(driver: Driver, seconds: float = _ADOPT_SECONDS) -> list[tuple[Process, Machine]]:
    """Takes over every hypervisor that answers, all at once: those that do not cost the start `seconds` together, and nobody else his
    microVM. What is left of such a one is cleared away by the next start."""

    async def adopt(record: Process) -> Machine | None:
        try:
            async with asyncio.timeout(seconds):
                return await driver.adopt(record)
        except Exception as error:
            log.error("hypervisor.not_adopted", vm=record.vm, session=record.session, error=repr(error))
            return None

    records = driver.records()
    machines = await asyncio.gather(*map(adopt, records))
    return [(record, machine) for record, machine in zip(records, machines, strict=True) if machine is not None]


def _suspended(manifest: Manifest, overlay: Path, started: float) -> m.Suspended:
    pages = sum(one.size for one in manifest.files if one.name.endswith(".pages"))
    rest = sum(one.size for one in manifest.files) - pages
    return m.Suspended(pages, rest, disks.stored_bytes(overlay), time.monotonic() - started)
