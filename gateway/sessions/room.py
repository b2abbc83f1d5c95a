"""Whether the host has room for one more microVM: by what is really used, never by adding sizes up."""

from __future__ import annotations

import asyncio
import contextlib

from gateway.config import Limits
from gateway.messages import Capacity
from gateway.observe.room import SESSION_DESCRIPTORS, SESSION_INODES, descriptors_free, descriptors_kept
from gateway.tasks import Tasks

from .host import Host, RpcError

_SHOWS_SECONDS = 2.0  # until what an admitted microVM uses shows in the host's figures
_KNOWN_SECONDS = 0.1  # a herd asks once
_PLENTY = 8  # microVMs for which there is room: one more is admitted by a look at the host's memory
_PLENTY_SECONDS = 10.0  # then the host is asked behind the answer


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

    async def take(self, is_new: bool = False) -> bool:
        """Takes room for one more, and returns False when there is none: `lack` says of what. Raises RpcError. One that is new, and wakes
        nobody, is refused first where descriptors are short."""
        if not await self._find() or (is_new and not self._has_descriptors()):
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
