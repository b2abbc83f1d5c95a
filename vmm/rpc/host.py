"""Calls about the host as a whole: what it offers, what it has free, what it holds; and the service's end."""

from __future__ import annotations

from gateway import executors
from gateway import messages as m
from gateway.config import Settings
from gateway.observe.room import descriptors_free, disk_free_bytes, inodes_free, memory_available_bytes
from gateway.rpc import Connection

from .. import syscalls
from ..builds import Builder
from ..cgroups import Cgroups
from ..driver import Driver
from ..images import Images
from ..network import Network
from ..owed import OwedDisk
from ..snapshots import Snapshots
from ..vms import VmEntry, VmRegistry
from ..warm_pool import WarmPool


class HostCalls:
    def __init__(
        self, settings: Settings, info: m.HostInfo, cgroups: Cgroups, network: Network, vms: VmRegistry, warm: WarmPool,
        snapshots: Snapshots, images: Images, builder: Builder, driver: Driver, owed: OwedDisk,
    ) -> None:  # fmt: skip
        self._settings, self._info, self._cgroups, self._network = settings, info, cgroups, network
        self._vms, self._warm, self._snapshots, self._images, self._builder = vms, warm, snapshots, images, builder
        self._driver, self._owed = driver, owed

    async def rpc_host_info(self, connection: Connection, body: None) -> m.HostInfo:
        return self._info

    async def rpc_reclaim_and_report_capacity(self, connection: Connection, body: None) -> m.Capacity:
        """Paused hypervisors are given up where their memory is wanted."""
        limits = self._settings.limits
        wanted = (limits.reserve_mib + 2 * limits.growth_mib) << 20
        await self._warm.evict_while(lambda: memory_available_bytes() < wanted)
        running = [self._cgroups.memory_bytes(entry.machine.record.vm) for entry in self._vms.entries()]
        expected = limits.growth_mib << 20
        return m.Capacity(
            memory_available=memory_available_bytes(),
            disk_free=disk_free_bytes(self._settings.root),
            inodes_free=inodes_free(self._settings.root),
            expected_growth=max(expected, sum(running) // len(running)) if running else expected,
            descriptors_free=descriptors_free(),
            disk_owed=self._owed.bytes,
        )

    async def rpc_state(self, connection: Connection, body: None) -> m.HostState:
        return m.HostState(
            sessions=[self._state(entry) for entry in self._vms.entries()],
            preparing=self._vms.in_preparation,
            snapshots=self._snapshots.held(),
            images=self._images.names(),
            builds=self._builder.names,
        )

    async def rpc_warm(self, connection: Connection, body: None) -> list[m.SessionState]:
        """Sessions whose paused hypervisors are kept: a few, told without a look at everybody's files."""
        return [self._state(entry) for entry in self._vms.entries() if entry.session in self._warm]

    async def rpc_counts(self, connection: Connection, body: None) -> dict[str, int]:
        """What hypervisors have counted since this daemon started."""
        return dict(self._driver.counts())

    async def rpc_effort(self, connection: Connection, body: m.SessionRef) -> m.Effort:
        record = self._vms.require(body.session, body.incarnation).machine.record
        return m.Effort(self._cgroups.cpu_seconds(record.vm), syscalls.waited_seconds(record.pid), syscalls.read_bytes(record.pid))

    def _state(self, entry: VmEntry) -> m.SessionState:
        record = entry.machine.record
        return m.SessionState(
            entry.session, record.incarnation, "saving" if entry.is_being_saved else record.phase,
            self._cgroups.memory_bytes(record.vm), self._cgroups.cpu_seconds(record.vm),
        )  # fmt: skip

    async def rpc_leave(self, connection: Connection, body: None) -> None:
        """The service stops: what is paused ends, what is parked is let go. Everything of it is on the disk."""
        for entry in self._vms.entries():
            entry.keeps_link = False
        await self._warm.evict_while(lambda: True)
        while self._vms.kept_links:
            session, link = self._vms.kept_links.popitem()
            await executors.LATENCY.run(self._snapshots.park_link, session, None)
            await self._network.release(link)
