"""Sessions that sleep with their hypervisors paused: the snapshot is durable, and the process stays while there is room for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from .errors import VmmError
from .network import Network
from .snapshot_gc import SnapshotGc
from .vms import VmEntry, VmRegistry

log = structlog.get_logger()


class WarmPool:
    def __init__(
        self, most: int, network: Network, vms: VmRegistry, collector: SnapshotGc,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:  # fmt: skip
        self._most = most
        self._network = network
        self._spawn = spawn
        self._vms = vms
        self._collector = collector
        self._since: dict[str, float] = {}  # by session, the one that has waited longest first

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, session: object) -> bool:
        return session in self._since

    @property
    def takes_any(self) -> bool:
        return self._most > 0

    def insert(self, entry: VmEntry) -> bool:
        """Keeps a saved session's hypervisor; False where that cannot be recorded, and it has to end. The caller holds the session's lock,
        and shrinks the pool when it does not any more."""
        record = entry.machine.record
        before, record.phase = record.phase, "warm"
        try:
            entry.machine.save_record()
        except OSError as error:
            log.warning("warm.not_kept", session=entry.session, error=str(error))
            record.phase = before
            return False
        self.adopt(entry)
        return True

    def adopt(self, entry: VmEntry) -> None:
        """Takes in what is recorded as paused."""
        entry.is_end_expected = True  # no loss: the snapshot is durable
        self._since[entry.session] = asyncio.get_running_loop().time()
        self._spawn(self._restock(entry.session, entry))

    async def _restock(self, session: str, entry: VmEntry) -> None:
        """Makes sockets for the next resume."""
        if session in self._since:
            with contextlib.suppress(OSError):
                await self._network.restock(entry.link)

    def reuse(self, entry: VmEntry, incarnation: int) -> bool:
        """Makes the paused hypervisor the session's next incarnation, as if it had been loaded from the snapshot, where it is one of
        these. The caller holds the session's lock. Raises OSError; the pool has it still then."""
        if entry.session not in self._since:
            return False
        record = entry.machine.record
        before = (record.incarnation, record.phase)
        steps = self._vms.trace(entry.session, "resume, warm")
        record.incarnation, record.phase = incarnation, "prepared"
        try:
            entry.machine.save_record()
        except OSError:
            record.incarnation, record.phase = before
            raise
        del self._since[entry.session]
        entry.machine.steps, entry.saving = steps, None
        entry.is_end_expected = entry.keeps_link = False
        steps.mark("still there, paused")
        return True

    def discard(self, session: str) -> bool:
        """Whether it was here."""
        return self._since.pop(session, None) is not None

    async def evict(self, session: str) -> None:
        """Ends a paused hypervisor, unless its session has been resumed meanwhile. Raises Unavailable; it is tried again later."""
        async with self._vms.owned(session, "cooling down"):
            entry = self._vms.get(session)
            if entry is None or session not in self._since:
                return
            del self._since[session]
            try:
                await self._vms.end(entry)
            except VmmError:
                if self._vms.get(session) is entry:
                    self._since[session] = asyncio.get_running_loop().time()
                raise
        self._collector.collect_later(session)

    async def evict_while(self, wanted: Callable[[], bool]) -> None:
        """Ends paused hypervisors, those that have waited longest first, while `wanted`. One that does not end stops no other."""
        for session in list(self._since):
            if not wanted():
                return
            try:
                await self.evict(session)
            except VmmError as error:
                log.warning("warm.not_ended", session=session, error=str(error))

    async def shrink(self) -> None:
        await self.evict_while(lambda: len(self._since) > self._most)

    async def evict_late(self, seconds: float) -> None:
        """Ends those that have been paused for longer than `seconds`."""
        late = asyncio.get_running_loop().time() - seconds
        await self.evict_while(lambda: bool(self._since) and next(iter(self._since.values())) < late)
