"""Calls about the files of a session that has no hypervisor, or must not have one any more: their removal, the quarantine, archives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from gateway import executors
from gateway import messages as m
from gateway.rpc import Connection

from .. import archives, beneath, disks
from ..encryption import ArchiveKeys
from ..errors import Unavailable, not_written
from ..network import Network
from ..quarantine import Quarantine
from ..snapshot_gc import SnapshotGc
from ..snapshots import Snapshots
from ..vms import VmRegistry
from ..warm_pool import WarmPool

_BULK_SECONDS = 600.0  # and more by bytes
_UNPACKS_AT_ONCE = 2  # of the threads that resumes use too: a resume waits for its archive
T = TypeVar("T")


class FileCalls:
    def __init__(
        self,
        network: Network,
        snapshots: Snapshots,
        quarantine: Quarantine,
        vms: VmRegistry,
        warm: WarmPool,
        collector: SnapshotGc,
        keys: ArchiveKeys,
    ) -> None:
        self._keys = keys
        self._network, self._snapshots, self._quarantine = network, snapshots, quarantine
        self._vms, self._warm, self._collector = vms, warm, collector
        self._packs = asyncio.Semaphore(1)  # one of the two threads for what takes minutes is left for others
        self._unpacks = asyncio.Semaphore(_UNPACKS_AT_ONCE)

    # ---- the end of a session ----

    async def rpc_forget(self, connection: Connection, body: m.SessionRef) -> None:
        """Ends whatever is left of a session, or under way for it, and removes its files."""
        await self._end(body.session, "being removed", lambda: self._snapshots.forget(body.session))
        self._collector.sweep_forgotten_later()

    async def rpc_quarantine(self, connection: Connection, body: m.QuarantineRequest) -> m.Quarantined:
        """Ends whatever is left of a session, or under way for it, and sets its files aside."""
        return await self._end(body.session, "being set aside", lambda: self._set_aside(body))

    def _set_aside(self, body: m.QuarantineRequest) -> m.Quarantined:
        try:
            return self._quarantine.put(body)
        finally:
            self._snapshots.look(body.session)

    async def _end(self, session: str, doing: str, work: Callable[[], T]) -> T:
        """`work` is done on the files of a session for which nothing runs here any more. Raises Unavailable, OSError."""
        self._vms.call_off_preparation(session)
        async with self._vms.owned(session, doing):
            self._vms.call_off_readers(session)
            self._warm.discard(session)
            entry = self._vms.get(session)
            released = None
            if entry is not None:
                entry.keeps_link = False
                released = await self._vms.end(entry)
            kept = self._vms.kept_links.pop(session, None)
            self._vms.forget(session)
            done = await executors.LATENCY.run(work)
        if released is not None:
            await released
        if kept is not None:
            await self._network.release(kept)
        return done

    # ---- the quarantine ----

    async def rpc_quarantined(self, connection: Connection, body: None) -> list[m.Quarantined]:
        return await executors.UPKEEP.run(self._quarantine.list)

    async def rpc_recover(self, connection: Connection, body: m.QuarantineName) -> m.Quarantined:
        """Moves a session's files back where a snapshot of it is whole; it sleeps with the incarnation that is answered."""
        async with self._vms.owned(body.session, "being recovered"):
            if self._vms.get(body.session) is not None:
                raise Unavailable(f"session {body.session} has a hypervisor")
            seconds = executors.seconds_for(await executors.UPKEEP.run(self._quarantine.size, body.session), _BULK_SECONDS)
            try:
                return await executors.BULK.run(self._quarantine.recover, body.session, seconds=seconds)
            finally:
                self._snapshots.look(body.session)

    async def rpc_release_quarantined(self, connection: Connection, body: m.QuarantineName) -> None:
        """Removes what was set aside: by its age, for room, or because its owner says so."""
        async with self._vms.owned(body.session, "being removed"):
            await executors.BULK.run(self._quarantine.release, body.session)

    # ---- archives ----

    async def rpc_pack(self, connection: Connection, body: m.PackRequest, descriptors: list[int]) -> m.Packed:
        """Packs the files of a session at rest; one that is warm is not. Whoever wakes it calls this off."""
        try:
            beneath.given(descriptors, 1, os.O_WRONLY)
            async with self._packs, self._vms.reading(body.session) as reader:
                snapshot = self._snapshots.newest(body.session)
                if snapshot.name != f"snapshot-{body.incarnation}":
                    raise Unavailable(f"session {body.session} does not rest with snapshot {body.incarnation}")
                files = self._snapshots.of(body.session)
                seconds = executors.seconds_for(await executors.UPKEEP.run(disks.tree_bytes, files), _BULK_SECONDS)
                size, digest = await executors.BULK.run(
                    archives.pack, files, snapshot, descriptors[0], reader.check, self._keys, seconds=seconds
                )
                reader.check()
        except OSError as error:
            what = f"the archive of session {body.session}"
            raise not_written(error, what, f"session {body.session} could not be packed") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return m.Packed(size, digest)

    async def rpc_unpack(self, connection: Connection, body: m.UnpackRequest, descriptors: list[int]) -> None:
        """A resume waits for it, so it is no bulk work."""
        try:
            beneath.given(descriptors, 1, os.O_RDONLY)
            async with self._unpacks, self._vms.owned(body.session, "being unpacked"):
                if self._vms.get(body.session) is not None:
                    raise Unavailable(f"session {body.session} has a hypervisor")
                self._vms.call_off_readers(body.session)
                size = os.fstat(descriptors[0]).st_size
                files = self._snapshots.of(body.session)
                seconds = executors.seconds_for(8 * size, 300.0)
                await executors.LATENCY.run(archives.unpack, descriptors[0], body.digest, files, self._keys, seconds=seconds)
                self._snapshots.look(body.session)
        except OSError as error:
            raise not_written(error, f"session {body.session}", f"session {body.session} could not be unpacked") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
