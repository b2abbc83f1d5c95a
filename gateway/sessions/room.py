"""Whether the host has room for one more microVM: memory by what is really used, never by adding sizes up; disk by that, and by a part
of what each microVM that there is may still write (`limits.disk_percent`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from gateway.config import Limits
from gateway.messages import Capacity
from gateway.observe.room import SESSION_DESCRIPTORS, SESSION_INODES, descriptors_free, descriptors_kept
from gateway.tasks import Tasks

from .host import Host, RpcError

_SHOWS_SECONDS = 2.0  # until what an admitted microVM uses shows in the host's figures
_KNOWN_SECONDS = 0.1  # a herd asks once
_PLENTY = 8  # microVMs for which there is room: one more is admitted by a look at the host's memory
_PLENTY_SECONDS = 10.0  # then the host is asked behind the answer
_OWED_SECONDS = 2 * _PLENTY_SECONDS + _SHOWS_SECONDS  # until a new disk is surely among those that the host has told of (vmm/owed.py)


class Room:
    """Admits launches and resumes. What was admitted a moment ago counts as expected to grow."""

    def __init__(self, host: Host, limits: Limits, tasks: Tasks) -> None:
        self._host = host
        self._limits = limits
        self._tasks = tasks
        self._promised = 0
        self.lack = ""  # what there was not enough of, the last time
        self._capacity = Capacity(0, 0, 0, limits.growth_mib << 20)
        self._asked = -_PLENTY_SECONDS
        self._is_asking = False
        self._new_disks: deque[tuple[float, int]] = deque()  # until when, and how many bytes they are owed

    async def take(self, is_new: bool = False, disk: int = 0) -> bool:
        """Takes room for one more, and returns False when there is none: `lack` says of what. Raises RpcError. One that is new, with a disk
        of so many bytes, and wakes nobody, is refused first where descriptors or disk are short."""
        if not await self._find() or (is_new and not (self._has_descriptors() and self._has_disk(disk))):
            return False
        self._promised += 1
        asyncio.get_running_loop().call_later(_SHOWS_SECONDS, self._shown)
        return True

    async def _find(self) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self._asked > _KNOWN_SECONDS:
            if self._has(*self._host.free(), count=_PLENTY):
                if now - self._asked > _PLENTY_SECONDS and not self._is_asking:
                    self._is_asking = True
                    asyncio.get_running_loop().call_later(_SHOWS_SECONDS, lambda: self._tasks.spawn(self._ask_behind()))
                return True
            await self._ask()
        known = self._capacity
        return self._has(known.memory_available, known.disk_free, known.inodes_free, count=1)

    def _has(self, memory: int, disk: int, inodes: int, count: int) -> bool:
        """Whether so much memory and disk, in bytes, and so many inodes have room for `count` more."""
        growth, limits = self._capacity.expected_growth, self._limits
        if memory - (limits.reserve_mib << 20) - self._promised * growth < count * growth:
            self.lack = f"memory: {memory >> 20} MiB are available, limits.reserve_mib is {limits.reserve_mib}"
        elif disk < limits.disk_reserve_mib << 20:
            self.lack = f"disk: {disk >> 20} MiB are free, limits.disk_reserve_mib is {limits.disk_reserve_mib}"
        elif inodes < SESSION_INODES:
            self.lack = f"inodes: {inodes} are free on the disk"
        else:
            return True
        return False

    def _has_disk(self, size: int) -> bool:
        """Whether there is room for a part of what each microVM's disk may grow by, that of a new one included."""
        now = asyncio.get_running_loop().time()
        while self._new_disks and self._new_disks[0][0] < now:
            self._new_disks.popleft()
        free, share = self._host.free()[1], size * self._limits.disk_percent // 100
        owed = self._capacity.disk_owed + sum(bytes_owed for _, bytes_owed in self._new_disks)
        if free - (self._limits.disk_reserve_mib << 20) < owed + share:
            self.lack = f"disk: {free >> 20} MiB are free, of which {owed >> 20} are kept for disks that grow (limits.disk_percent)"
            return False
        self._new_disks.append((now + _OWED_SECONDS, share))
        return True

    def _has_descriptors(self) -> bool:
        """Control's own, and vmm's as last told."""
        wanted = descriptors_kept() + (1 + self._promised) * SESSION_DESCRIPTORS
        left = min(self._capacity.descriptors_free, descriptors_free())
        if left < wanted:
            self.lack = f"descriptors: {left} are free, {wanted} are wanted (LimitNOFILE, ulimit -Hn)"
        return left >= wanted

    async def _ask(self) -> None:
        self._capacity, self._asked = await self._host.reclaim_capacity(), asyncio.get_running_loop().time()

    async def _ask_behind(self) -> None:
        """Learns what microVMs have grown to lately. Nothing is raised: whoever has to know asks again."""
        try:
            with contextlib.suppress(RpcError):
                await self._ask()
        finally:
            self._is_asking = False

    def _shown(self) -> None:
        self._promised -= 1
