"""The vmm daemon: the only process besides the supervisor that is root. It parses nothing from a guest or a network.

Here its parts are put together. Calls come from control and, for sockets, from edges (gateway/messages.py, vmm/rpc/).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Coroutine

import structlog

from gateway import executors
from gateway import messages as m
from gateway.config import Settings
from gateway.observe.room import BUILD_ROOM_BYTES, descriptors_free, descriptors_kept, memory_available_bytes
from gateway.rpc import Connection
from gateway.tasks import Tasks

from . import drivers, sandboxes
from .builds import Builder, BuildSettings
from .cgroups import Cgroups
from .driver import UNSAVED, Driver, Machine, Process
from .encryption import ArchiveKeys
from .images import Images
from .network import Link, Network
from .owed import OwedDisk
from .quarantine import Quarantine
from .rpc.files import FileCalls
from .rpc.host import HostCalls
from .rpc.identity import IdentityCalls
from .rpc.images import ImageCalls
from .rpc.network import NetworkCalls
from .rpc.sessions import SessionCalls
from .snapshot_gc import SnapshotGc
from .snapshots import Snapshots
from .standbys import Standbys
from .vms import VmEntry, VmRegistry
from .warm_pool import WarmPool

log = structlog.get_logger()

_HOUSEKEEPING_SECONDS = 10
_ADOPT_SECONDS = 30.0
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Vmm:
    def __init__(self, settings: Settings, info: m.HostInfo, cgroups: Cgroups) -> None:
        self.settings = settings
        self._cgroups = cgroups
        self._tasks = Tasks()
        self._spawn = self._tasks.spawn
        self._controls: set[Connection] = set()
        runtime, kept = settings.runtime, settings.standbys
        self.network = Network(runtime / "netns", settings.egress, settings.name)
        self.driver = drivers.choose(settings, info.hypervisor, cgroups, self.network)
        self.standbys = Standbys(self.driver, kept.per_image, kept.most_per_image, kept.unused_seconds, self._has_room)
        self.builder = Builder(
            settings.root / "builds", runtime / "build-netns", cgroups,
            BuildSettings(
                settings.cache / "base.tar", settings.cache / "builder", settings.cache / "modules", tuple(settings.images.base_names),
                settings.images.pull, settings.users.builders, settings.images.registry_ca,
                settings.images.build_memory_mib, settings.images.cache_mib,
                settings.images.cache_days, (settings.limits.disk_reserve_mib << 20) + BUILD_ROOM_BYTES,
                settings.images.store_mib, settings.limits.disk_reserve_mib << 20, settings.images.build_seconds,
                settings.images.build_processes,
            ),
        )  # fmt: skip
        self.images = Images(settings.images_dir)
        self.snapshots = Snapshots(settings.sessions_dir)
        self.owed = OwedDisk(settings.sessions_dir, settings.limits.disk_percent)
        self.quarantine = Quarantine(settings.sessions_dir, settings.root / "quarantine", settings.images_dir)
        self.vms = VmRegistry(self.network, self._spawn)
        self.vms.on_end = self._ended
        self.collector = SnapshotGc(self.snapshots, self.vms, self._spawn)
        self.warm = WarmPool(kept.warm, self.network, self.vms, self.collector, self._spawn)
        self.calls = (
            HostCalls(
                settings, info, cgroups, self.network, self.vms, self.warm, self.snapshots, self.images, self.builder, self.driver,
                self.owed,
            ),
            SessionCalls(
                self.images, self.driver, self.network, self.standbys, self.snapshots, self.vms, self.warm, self.collector
            ),
            FileCalls(
                self.network, self.snapshots, self.quarantine, self.vms, self.warm, self.collector, ArchiveKeys(settings.archive)
            ),
            NetworkCalls(self.network, self.vms),
            IdentityCalls(settings, self.images),
            ImageCalls(self.images, self.driver, self.network, self.standbys, self.builder, self.vms),
        )  # fmt: skip

    async def start(self) -> None:
        """Takes running microVMs over from an earlier daemon. Of files nothing is removed but what was nobody's already."""
        self.settings.images_dir.mkdir(parents=True, exist_ok=True)
        self.settings.sessions_dir.mkdir(parents=True, exist_ok=True)
        self._cgroups.start()
        await self.take_all_over()
        for session, name in self.snapshots.parked_links().items():
            link = Link(self.settings.runtime / "netns" / name)
            if self.vms.get(session) is None and link.path.exists():
                self.vms.kept_links[session] = link
        keep = {entry.link.path for entry in self.vms.entries()} | {link.path for link in self.vms.kept_links.values()}
        self.network.start(keep, self.settings.standbys.links, self.driver.takes_taps)
        self.builder.start()
        self.snapshots.forget_unpacked()
        self.collector.sweep_forgotten_later()
        self._spawn(executors.BULK.run(self.images.sweep))
        self._spawn(self._housekeeping())

    async def take_all_over(self) -> None:
        """Of what runs no more it is noted whether its guest had run. Raises OSError."""
        for record, machine in await adopt_all(self.driver):
            if machine is not None:
                await self._take_over(record, machine)
            elif record.session and record.phase in UNSAVED:
                self.vms.note_run(record.session, record.incarnation)

    async def _take_over(self, record: Process, machine: Machine) -> None:
        if not record.session or record.phase == "standby":  # waiting, or half prepared
            await machine.kill()
            return
        entry = self.vms.add(record.session, machine, Link(self.settings.runtime / "netns" / record.link))
        if record.phase == "running":
            self.collector.started(entry)
        if record.phase == "warm":
            entry.keeps_link = self.snapshots.parked_link(record.session) is not None
            self.warm.adopt(entry)

    async def close(self) -> None:
        """Leaves the microVMs running; they are taken over at the next start."""
        await self._tasks.close()
        await self.standbys.close()
        await self.network.close(is_empty=not len(self.vms))

    def connected(self, connection: Connection) -> None:
        if connection.uid == self.settings.users.control:
            self._controls.add(connection)
            connection.closed.add_done_callback(lambda _: self._controls.discard(connection))

    def _ended(self, entry: VmEntry) -> None:
        if entry.is_end_expected:
            if self.warm.discard(entry.session):  # a paused one died: the session is as cold as any
                self.collector.collect_later(entry.session)
            return
        log.warning("hypervisor.ended", session=entry.session, vm=entry.machine.record.vm)
        if self.snapshots.is_saved(entry.session, entry.incarnation):  # nothing is lost: it sleeps, or is about to
            return
        reason, has_run = "The hypervisor of the MicroVM stopped unexpectedly.", self.vms.has_run(entry.session, entry.incarnation)
        ended = m.Ended(entry.session, entry.incarnation, reason, has_run)
        for control in self._controls:
            control.notify("ended", ended)

    async def _housekeeping(self) -> None:
        while True:
            await self._step("disks", self.owed.weigh())
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            records = [entry.machine.record for entry in self.vms.entries()]
            booting = 0  # the incarnation of what will be an image
            held_images = {self.settings.images_dir / one.image for one in records if one.incarnation != booting}
            await self._step("standbys", self.standbys.drop_unused(held_images))
            await self._step("links", self.network.trim())
            self.builder.trim()
            await self._step("logs", executors.UPKEEP.run(self._cut_logs))
            await self._step("paused", self.warm.evict_late(self.settings.standbys.warm_seconds))

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


async def adopt_all(driver: Driver, seconds: float = _ADOPT_SECONDS) -> list[tuple[Process, Machine | None]]:
    """Takes over every hypervisor that answers, all at once: those that do not answer cost the start `seconds` in all, and keep no other
    microVM from being taken over. What is left of one is cleared away by the next start. Raises OSError where the host has no more of
    something: the start is tried again then."""

    async def adopt(record: Process) -> Machine | None:
        try:
            async with asyncio.timeout(seconds):
                return await driver.adopt(record)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SCARCE:
                raise
            log.error("hypervisor.not_adopted", vm=record.vm, session=record.session, error=repr(error))
            return None

    records = driver.records()
    return list(zip(records, await asyncio.gather(*map(adopt, records)), strict=True))
