"""Removes files of sessions that nobody needs any more, and folds long chains of diffs, in the background.

It looks under the session's lock whether that is still so: a session that was resumed meanwhile needs other files than a sleeping one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from gateway import executors

from . import disks
from .errors import Unavailable, VmmError
from .snapshots import Snapshots
from .vms import Reader, VmEntry, VmRegistry

log = structlog.get_logger()

_QUIET_SECONDS = 0.6  # after a start: removing files competes with its first requests
_FOLD_SECONDS = 600.0  # and more by bytes, which are read and written
_LONGEST_CHAIN = 24  # a resume costs by it; from there on one waits for the fold


class SnapshotGc:
    def __init__(self, snapshots: Snapshots, vms: VmRegistry, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._snapshots = snapshots
        self._vms = vms
        self._spawn = spawn

    # ---- a session that runs ----

    def started(self, entry: VmEntry) -> None:
        """What `entry` was loaded from is void, and goes once its first requests have been answered."""
        self._spawn(self._started(entry, entry.incarnation))

    async def _started(self, entry: VmEntry, incarnation: int) -> None:
        await asyncio.sleep(_QUIET_SECONDS)
        session = entry.session
        async with self._vms.owned(session, "clearing away what it was loaded from"):
            record = entry.machine.record
            if self._vms.get(session) is not entry or record.incarnation != incarnation:
                return
            if record.phase not in ("starting", "running") or record.unchecked:
                return
            await executors.LATENCY.run(self._snapshots.started, session, incarnation)
        await self._sweep(session)

    # ---- a session without a hypervisor ----

    def collect_later(self, session: str) -> None:
        self._spawn(self.collect(session))

    async def collect(self, session: str) -> None:
        """What only a hypervisor had mapped goes; a long chain is folded, unless the session wakes."""
        async with self._vms.owned(session, "clearing away what it has slept over"):
            if self._vms.get(session) is not None:
                return
            await executors.LATENCY.run(self._snapshots.rest, session)
            length = await executors.LATENCY.run(self._snapshots.foldable, session)
        self._spawn(self._sweep_and_fold(session, length))

    async def _sweep_and_fold(self, session: str, length: int) -> None:
        await self._sweep(session)
        if length:
            await self.fold(session, length)

    async def _sweep(self, session: str) -> None:
        await executors.BULK.run(self._snapshots.sweep, session)

    async def fold(self, session: str, length: int) -> None:
        """Writes the session's chain of `length` diffs as one, beside it, and puts that in its place where nobody has touched it."""
        with contextlib.suppress(Unavailable):  # it does not rest any more
            async with self._vms.reading(session) as reader:
                reader.is_urgent = length >= _LONGEST_CHAIN
                try:
                    await self._fold(session, reader)
                except (VmmError, OSError) as error:
                    if not reader.is_called_off:
                        log.warning("fold.failed", session=session, error=str(error))

    async def _fold(self, session: str, reader: Reader) -> None:
        seconds = executors.seconds_for(2 * await executors.UPKEEP.run(disks.tree_bytes, self._snapshots.of(session)), _FOLD_SECONDS)
        folded = await executors.BULK.run(self._snapshots.write_fold, session, reader.check, seconds=seconds)
        try:
            async with self._vms.owned(session, "exchanging its chain for a folded one"):
                reader.check()
                await executors.LATENCY.run(self._snapshots.put_fold, session, folded)
        finally:
            await executors.BULK.run(self._snapshots.drop_fold, folded)

    def sweep_forgotten_later(self) -> None:
        """Removes the files of sessions that are over."""
        self._spawn(executors.BULK.run(self._snapshots.sweep_forgotten))
