"""vmm's calls about archives: the files of a session that has slept for long, into and out of one. Made of the daemon's parts."""

from __future__ import annotations

import asyncio
import os

from gateway import messages as m
from gateway.rpc import Connection

from . import archives
from .daemon import Vmm
from .errors import Unavailable, not_written


class ArchiveCalls:
    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm

    async def rpc_pack(self, connection: Connection, body: m.PackRequest, descriptors: list[int]) -> m.Packed:
        """Of a session at rest; one that is warm is not."""
        snapshots = self._vmm.snapshots
        try:
            await self._vmm.folded(body.session)
            snapshot = snapshots.newest(body.session)
            if not self._vmm.is_at_rest(body.session) or snapshot.name != f"snapshot-{body.incarnation}":
                raise Unavailable(f"session {body.session} does not rest with snapshot {body.incarnation}")
            size, digest = await asyncio.to_thread(archives.pack, snapshots.of(body.session), snapshot, descriptors[0])
        except OSError as error:
            raise not_written(error, f"the archive of session {body.session}", f"session {body.session} could not be packed") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return m.Packed(size, digest)

    async def rpc_unpack(self, connection: Connection, body: m.UnpackRequest, descriptors: list[int]) -> None:
        try:
            await asyncio.to_thread(archives.unpack, descriptors[0], body.digest, self._vmm.snapshots.of(body.session))
        except OSError as error:
            raise not_written(error, f"session {body.session}", f"session {body.session} could not be unpacked") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
