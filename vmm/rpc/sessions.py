"""Calls that a session's life is made of: prepare, start, suspend, release, and what takes them back. Each is idempotent by session and
incarnation, and holds the session's lock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import structlog

from gateway import executors
from gateway import messages as m
from gateway.observe.room import SESSION_DESCRIPTORS, descriptors_free, descriptors_kept
from gateway.rpc import Connection, Reply

from .. import disks, manifest
from ..diffs import Manifest
from ..driver import Driver, Machine
from ..errors import Damaged, DiskFull, Ended, Missing, NeverRan, Refused, Unavailable, VmmError, not_written, unreadable
from ..images import Images
from ..network import Link, Network
from ..snapshot_gc import SnapshotGc
from ..snapshots import Snapshots
from ..standbys import Standbys
from ..vms import VmEntry, VmRegistry
from ..warm_pool import WarmPool

log = structlog.get_logger()

_PREPARE_TRIES = 2
_SHORT_SECONDS = 8.0  # patience of calls that control gives ten
_SAVES_AT_ONCE = 6  # of the threads that resumes use too (gateway/executors.py)


class SessionCalls:
    def __init__(
        self, images: Images, driver: Driver, network: Network, standbys: Standbys, snapshots: Snapshots, vms: VmRegistry, warm: WarmPool,
        collector: SnapshotGc,
    ) -> None:  # fmt: skip
        self._images, self._driver, self._network, self._standbys = images, driver, network, standbys
        self._snapshots, self._vms, self._warm, self._collector = snapshots, vms, warm, collector
        self._saves = asyncio.Semaphore(_SAVES_AT_ONCE)

    # ---- loading ----

    async def rpc_prepare(self, connection: Connection, body: m.PrepareRequest) -> None:
        await self._vms.urgent_readers(body.session)
        async with self._vms.owned(body.session, "being loaded"):
            entry = self._vms.get(body.session)
            if entry is not None and entry.has_ended:  # and nobody was told yet
                self._vms.remove(entry)
                self._warm.discard(body.session)
                entry = None
            if entry is not None:
                if entry.incarnation == body.incarnation:
                    return
                if body.from_snapshot and self._warm.reuse(entry, body.incarnation):
                    return
                raise Unavailable(f"session {body.session} is held by incarnation {entry.incarnation}")
            if not body.from_snapshot and descriptors_free() < descriptors_kept() + SESSION_DESCRIPTORS:  # what sleeps may still wake
                free, kept = descriptors_free(), descriptors_kept()
                raise Unavailable(f"{free} descriptors are free, {kept} are kept for resumes: raise LimitNOFILE")
            self._vms.call_off_readers(body.session)
            with self._vms.preparing(body.session):
                image = self._images.path(body.image)
                if body.from_snapshot:
                    snapshot = self._snapshots.check(body.session, body.incarnation - 1, self._account_of(body.image))
                else:
                    snapshot = await self._new_disk(body.session, image)
                await self._prepare(body, image, snapshot)

    def _account_of(self, image: str) -> str:
        """Returns whose an image is, and its sessions; empty where nobody can say."""
        with contextlib.suppress(VmmError):
            return manifest.peek(self._images.path(image)).account
        return ""

    async def _new_disk(self, session: str, image: Path) -> Path:
        """A launch has the image itself for a snapshot. Raises VmmError."""
        overlay = self._snapshots.overlay(session)
        template = image / self._driver.disk_template
        try:
            overlay.parent.mkdir(exist_ok=True)
            await executors.LATENCY.run(disks.copy_overlay, template, overlay)
        except FileNotFoundError as error:
            await executors.LATENCY.run(manifest.read, image, self._driver.name)  # another hypervisor's images have another template
            raise unreadable(error, template) from error
        except OSError as error:
            raise not_written(error, f"session {session}", f"the disk of session {session} could not be made") from error
        return image

    async def _prepare(self, body: m.PrepareRequest, image: Path, snapshot: Path) -> None:
        """A try that fails costs a standby; the files are untouched until the guest runs, so one more may follow."""
        for attempt in range(1, _PREPARE_TRIES + 1):
            try:
                await self._try(body, image, snapshot)
                return
            except Unavailable as error:
                if attempt == _PREPARE_TRIES or isinstance(error, DiskFull):
                    raise
                log.warning("prepare.retry", session=body.session, error=str(error))

    async def _try(self, body: m.PrepareRequest, image: Path, snapshot: Path) -> None:
        """Whatever it raises, nothing of it is left: neither the link nor the hypervisor."""
        steps = self._vms.trace(body.session, "resume" if body.from_snapshot else "launch")
        link = parked = self._vms.kept_links.pop(body.session, None)
        machine: Machine | None = None
        try:
            machine = await self._standby(image, body.from_snapshot, parked)
            link = link or machine.take_link() or await self._network.take()
            machine.steps = steps
            steps.mark("standby and link taken")
            machine.record.session, machine.record.incarnation = body.session, body.incarnation
            if body.egress is not None:
                await self._network.enable_egress(link, body.egress)
            await machine.prepare(snapshot, self._snapshots.overlay(body.session), link)
            self._vms.add(body.session, machine, link)
        except BaseException as error:
            try:
                if machine is not None:
                    await machine.kill()
            except TimeoutError:
                log.error("prepare.not_ended", session=body.session, vm=machine.record.vm if machine is not None else "")
            finally:
                if parked is not None:
                    self._vms.kept_links[body.session] = parked
                elif link is not None:
                    await self._network.release(link)
            if isinstance(error, Ended):  # a hypervisor that had not run yet: the session has lost nothing
                raise Unavailable(str(error)) from error
            raise

    async def _standby(self, image: Path, is_resume: bool, parked: Link | None) -> Machine:
        """What is wrong with an image says nothing about the sleeper that needs it: that stays as it is."""
        try:
            if parked is not None and not self._driver.takes_taps:  # one that waits elsewhere cannot come to it
                self._standbys.want(image)
                return await self._driver.standby(image, parked)
            return await self._standbys.take(image)
        except (Damaged, Missing) as error:
            if not is_resume:
                raise
            raise Refused(f"image {image.name}, which the session is loaded over, has to be put back: {error}") from error

    async def rpc_claim(self, connection: Connection, body: m.ClaimRequest) -> None:
        """Its disk moves first, so that a daemon that dies in between finds a session without one, and forgets it."""
        first, second = sorted((body.ahead, body.session))
        async with self._vms.owned(first, "being claimed", _SHORT_SECONDS), self._vms.owned(second, "being claimed", _SHORT_SECONDS):
            done = self._vms.get(body.session)
            if done is not None and done.incarnation == body.incarnation:
                return
            entry = self._vms.require(body.ahead, 1)
            if entry.machine.record.phase != "prepared":
                raise Unavailable(f"{body.ahead} has not run ahead")
            entry.machine.steps = steps = self._vms.trace(body.session, "launch, ran ahead")
            if body.egress is not None:
                await self._network.enable_egress(entry.link, body.egress)
            self._snapshots.rename(body.ahead, body.session)
            self._vms.rename(entry, body.session, body.incarnation)
            entry.machine.save_record()
            steps.mark("one that ran ahead")

    # ---- running ----

    async def rpc_start(self, connection: Connection, body: m.StartRequest) -> Reply:
        """Lets a prepared session run. From here on its snapshot is void."""
        async with self._vms.owned(body.session, "being started"):
            if self._vms.get(body.session) is None and not self._has_run(body):
                raise NeverRan(f"the hypervisor that was prepared for session {body.session} is gone")
            entry = self._vms.require(body.session, body.incarnation)
            record = entry.machine.record
            if record.phase == "running" and not record.unchecked:
                return Reply(None, [await entry.machine.agent()])
            self._vms.note_run(body.session, body.incarnation)
            try:
                channel = await entry.machine.resume(body.wake)
            except VmmError as error:
                if isinstance(error, NeverRan) or record.phase == "prepared":
                    self._vms.take_back_run(body.session, body.incarnation)
                raise
        self._collector.started(entry)
        return Reply(None, [channel])

    def _has_run(self, body: m.StartRequest) -> bool:
        """Also where the daemon that knew it has died, and the disk alone shows it."""
        return self._vms.has_run(body.session, body.incarnation) or self._snapshots.is_outrun(body.session)

    async def rpc_pause(self, connection: Connection, body: m.SessionRef) -> None:
        async with self._vms.owned(body.session, "being paused", _SHORT_SECONDS):
            await self._vms.require(body.session, body.incarnation).machine.pause()

    # ---- suspending ----

    async def rpc_suspend(self, connection: Connection, body: m.SessionRef) -> m.Suspended:
        """Stops the guest and makes its snapshot durable; it stays stopped until kill or unpause. Who asks while that is under way, or
        once it is done, is answered by the same."""
        entry = self._vms.require(body.session, body.incarnation)
        if entry.saving is not None:
            return await asyncio.shield(entry.saving)
        saving = entry.saving = asyncio.get_running_loop().create_future()
        try:
            async with self._saves, self._vms.owned(body.session, "being saved"):
                saved = await self._suspend(self._vms.require(body.session, body.incarnation))
        except BaseException as error:
            entry.saving = None
            saving.set_exception(error if isinstance(error, Exception) else Unavailable("the suspend was called off"))
            saving.exception()  # of which nobody need be waiting
            raise
        saving.set_result(saved)
        return saved

    async def _suspend(self, entry: VmEntry) -> m.Suspended:
        """Raises VmmError; the guest runs on then."""
        started = time.monotonic()
        session, incarnation, machine = entry.session, entry.incarnation, entry.machine
        if machine.record.phase == "stopped":  # by an earlier daemon, perhaps
            made = await executors.LATENCY.run(self._snapshots.made, session, incarnation)
            if made is not None:
                return self._measured(session, made, started)
        steps = machine.steps = self._vms.trace(session, "suspend")
        work = self._snapshots.begin(session)
        try:
            written = await machine.save(work)
            size = sum(one.size for one in written)
            manifest = await executors.LATENCY.run(
                self._snapshots.commit, session, incarnation, work, machine.record.chain, written, machine.record.made,
                self._account_of(machine.record.image),
                seconds=executors.seconds_for(size, 300.0),
            )  # fmt: skip
            steps.mark("synced and renamed")
        except BaseException as error:
            await self._run_on(entry, work)
            if isinstance(error, VmmError) or not isinstance(error, Exception):
                raise
            raise not_written(error, f"the snapshot of session {session}", f"session {session} could not be saved") from error
        return self._measured(session, manifest, started)

    async def _run_on(self, entry: VmEntry, work: Path) -> None:
        """A suspend has failed. Where what it has saved cannot be made void the guest stays stopped, for it would be resumed from there."""
        try:
            await executors.LATENCY.run(self._snapshots.abandon, entry.session, entry.incarnation, work)
            await entry.machine.unpause()
        except (VmmError, OSError) as error:
            log.warning("suspend.not_undone", session=entry.session, error=str(error))

    def _measured(self, session: str, manifest: Manifest, started: float) -> m.Suspended:
        pages = sum(one.size for one in manifest.files if one.name.endswith(".pages"))
        others = sum(one.size for one in manifest.files) - pages
        return m.Suspended(pages, others, disks.stored_bytes(self._snapshots.overlay(session)), time.monotonic() - started)

    async def rpc_unpause(self, connection: Connection, body: m.SessionRef) -> None:
        """Calls a suspend off: the guest runs on, its snapshot is void. One that waits for its turn would stop the guest after all."""
        entry = self._vms.require(body.session, body.incarnation)
        if entry.saving is not None and not (await asyncio.wait([entry.saving], timeout=_SHORT_SECONDS))[0]:
            raise Unavailable(f"session {body.session} is busy: it is being saved")
        async with self._vms.owned(body.session, "being let run on", _SHORT_SECONDS):
            entry = self._vms.require(body.session, body.incarnation)
            await executors.LATENCY.run(self._snapshots.called_off, body.session, body.incarnation)
            entry.saving = None
            await entry.machine.unpause()

    async def rpc_release_vm(self, connection: Connection, body: m.ReleaseVmRequest) -> None:
        """A saved session's hypervisor stays paused where there is room for one more, in place of the one that has waited longest."""
        async with self._vms.owned(body.session, "being released"):
            entry = self._vms.get(body.session)
            if entry is None or entry.incarnation != body.incarnation or body.session in self._warm:
                return
            if entry.machine.record.phase == "running":
                raise Unavailable(f"session {body.session} runs: it has to be saved first")
            entry.keeps_link = body.parked
            await executors.LATENCY.run(self._snapshots.park_link, body.session, entry.link.name if body.parked else None)
            is_kept = body.keep_warm and self._warm.takes_any and self._warm.insert(entry)
            if not is_kept:
                released = await self._vms.end(entry)
        if is_kept:
            await self._warm.shrink()
        else:
            await released
            await self._collector.collect(body.session)

    async def rpc_kill(self, connection: Connection, body: m.SessionRef) -> None:
        async with self._vms.owned(body.session, "being ended"):
            entry = self._vms.get(body.session)
            if entry is None or entry.incarnation != body.incarnation:
                return
            self._warm.discard(body.session)
            released = await self._vms.end(entry)
        await released
        await self._collector.collect(body.session)

    async def rpc_traces(self, connection: Connection, body: m.SessionRef) -> list[m.Trace]:
        return [m.Trace(one.work, one.started_at, one.steps) for one in self._vms.traces(body.session)]
