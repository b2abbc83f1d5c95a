"""What control asks of vmm: its calls, typed, with their deadlines. The only place that knows them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from gateway import messages as m
from gateway.observe.room import disk_free_bytes, memory_available_bytes
from gateway.rpc import Client, RpcError, RpcLost

_PREPARE_SECONDS = 60.0
_SUSPEND_SECONDS = 120.0
_BUILD_SECONDS = 2000.0
_BOOT_SECONDS = 60.0
_SEAL_SECONDS = 180.0
_DELETE_SECONDS = 60.0
_ARCHIVE_SECONDS = 600.0
_AWAY_RETRY_SECONDS = 0.2
_AWAY_TRIES = 100
T = TypeVar("T")

__all__ = ["Host", "RpcError", "RpcLost", "patiently"]


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Asks again while vmm is away: it restarts, and every call is idempotent."""
    for _ in range(_AWAY_TRIES):
        try:
            return await call()
        except RpcLost:
            await asyncio.sleep(_AWAY_RETRY_SECONDS)
    raise RpcLost("vmm did not come back")


class Host:
    """Calls vmm. Every call raises RpcError with the host's words (kind: a class of vmm/errors.py), or
    RpcLost when vmm is away."""

    def __init__(self, client: Client, root: Path) -> None:
        """Makes the caller; `root` is where the host keeps what it stores."""
        self._client = client
        self._root = root

    async def info(self) -> m.HostInfo:
        return await self._client.call("host_info", None, m.HostInfo)  # type: ignore[no-any-return]

    async def reclaim_capacity(self) -> m.Capacity:
        """Ends paused hypervisors where memory is wanted, and returns what is free then."""
        return await self._client.call("reclaim_and_report_capacity", None, m.Capacity)  # type: ignore[no-any-return]

    def free(self) -> tuple[int, int]:
        """Returns the available memory and the free disk, in bytes, without asking vmm: the host is this one. Raises OSError."""
        return memory_available_bytes(), disk_free_bytes(self._root)

    async def state(self) -> m.HostState:
        return await self._client.call("state", None, m.HostState)  # type: ignore[no-any-return]

    async def effort(self, session: str, incarnation: int) -> m.Effort:
        """Returns what a running guest has used, without a look at all the others."""
        return await self._client.call("effort", m.SessionRef(session, incarnation), m.Effort)  # type: ignore[no-any-return]

    async def prepare(
        self, session: str, incarnation: int, image: str, from_snapshot: bool, egress: m.EgressRules | None = None
    ) -> None:  # fmt: skip
        request = m.PrepareRequest(session, incarnation, image, from_snapshot, egress)
        await self._client.call("prepare", request, timeout=_PREPARE_SECONDS)

    async def services(self, session: str, incarnation: int) -> list[socket.socket]:
        """Returns the sockets in the session's network on which the guest asks: for metadata (TCP), for names (UDP, TCP)."""
        _, descriptors = await self._client.call_with_descriptors("services", m.SessionRef(session, incarnation))
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    async def start(self, session: str, incarnation: int, wake: bytes) -> int:
        """Lets a prepared session run; returns the agent's channel."""
        return await self._descriptor("start", m.StartRequest(session, incarnation, wake))

    async def claim(self, ahead: str, session: str, incarnation: int, egress: m.EgressRules | None) -> None:
        """Makes a microVM that ran ahead this session, prepared."""
        await self._client.call("claim", m.ClaimRequest(ahead, session, incarnation, egress))

    async def pause(self, session: str, incarnation: int) -> None:
        """Stops a guest; its session is prepared then, as it was before its start."""
        await self._client.call("pause", m.SessionRef(session, incarnation))

    async def agent(self, session: str, incarnation: int) -> int:
        return await self._descriptor("agent", m.SessionRef(session, incarnation))

    async def socket(self, session: str, incarnation: int) -> socket.socket:
        """Returns an unconnected, non-blocking TCP socket inside the session's network."""
        return socket.socket(fileno=await self._descriptor("sockets", m.SocketsRequest(session, incarnation, 1)))

    async def suspend(self, session: str, incarnation: int) -> m.Suspended:
        return await self._client.call("suspend", m.SessionRef(session, incarnation), m.Suspended, timeout=_SUSPEND_SECONDS)  # type: ignore[no-any-return]

    async def traces(self, session: str) -> list[m.Trace]:
        """Returns the host's part of the last launch or resume, and of the last suspend."""
        return await self._client.call("traces", m.SessionRef(session, 0), list[m.Trace])  # type: ignore[no-any-return]

    async def leave(self) -> None:
        """Ends what is paused and what is kept for parked streams: the service stops, and its workers with it."""
        await self._client.call("leave", None, timeout=_DELETE_SECONDS)

    async def pack(self, session: str, incarnation: int, target: int) -> m.Packed:
        """Writes to an open file. A duplicate of its descriptor is given away."""
        request = m.PackRequest(session, incarnation)
        return await self._client.call("pack", request, m.Packed, timeout=_ARCHIVE_SECONDS, descriptors=[os.dup(target)])  # type: ignore[no-any-return]

    async def unpack(self, session: str, digest: str, source: int) -> None:
        request = m.UnpackRequest(session, digest)
        await self._client.call("unpack", request, timeout=_ARCHIVE_SECONDS, descriptors=[os.dup(source)])

    async def unpause(self, session: str, incarnation: int) -> None:
        await self._client.call("unpause", m.SessionRef(session, incarnation))

    async def release_vm(self, session: str, incarnation: int, keep_warm: bool, parked: bool) -> None:
        """Ends the hypervisor of a session that was saved, or lets the host keep it paused."""
        await self._client.call("release_vm", m.ReleaseVmRequest(session, incarnation, keep_warm, parked), timeout=_DELETE_SECONDS)

    async def kill(self, session: str, incarnation: int) -> None:
        await self._client.call("kill", m.SessionRef(session, incarnation), timeout=_DELETE_SECONDS)

    async def forget(self, session: str) -> None:
        await self._client.call("forget", m.SessionRef(session, 0), timeout=_DELETE_SECONDS)

    async def quarantine(self, session: str, incarnation: int, image: str, reason: str) -> m.Quarantined:
        """Ends what is left of a session, and sets its files aside."""
        request = m.QuarantineRequest(session, incarnation, image, reason)
        return await self._client.call("quarantine", request, m.Quarantined, timeout=_ARCHIVE_SECONDS)  # type: ignore[no-any-return]

    async def quarantined(self) -> list[m.Quarantined]:
        return await self._client.call("quarantined", None, list[m.Quarantined], timeout=_DELETE_SECONDS)  # type: ignore[no-any-return]

    async def recover(self, session: str) -> m.Quarantined:
        """Moves a session's files back, where a snapshot of it is whole."""
        return await self._client.call("recover", m.QuarantineName(session), m.Quarantined, timeout=_ARCHIVE_SECONDS)  # type: ignore[no-any-return]

    async def release_quarantined(self, session: str) -> None:
        await self._client.call("release_quarantined", m.QuarantineName(session), timeout=_ARCHIVE_SECONDS)

    async def build(self, request: m.BuildRequest) -> tuple[int, int]:
        """Starts a container build; returns the log and the phases to read."""
        log, phases = await self._descriptors("build", request, 2, _BOOT_SECONDS)
        return log, phases

    async def build_result(self, build: str) -> m.BuildResult:
        return await self._client.call("build_result", m.BuildName(build), m.BuildResult, timeout=_BUILD_SECONDS)  # type: ignore[no-any-return]

    async def build_cancel(self, build: str) -> None:
        await self._client.call("build_cancel", m.BuildName(build), timeout=_DELETE_SECONDS)

    async def boot(self, session: str, image: str, shape: m.Shape, egress: m.EgressRules | None = None) -> int:
        return await self._descriptor("boot", m.BootRequest(session, image, shape, egress), _BOOT_SECONDS)

    async def give_disk(self, session: str, image: str) -> None:
        await self._client.call("give_disk", m.BootedRequest(session, image), timeout=_SEAL_SECONDS)

    async def seal(self, session: str, image: str) -> m.Sealed:
        return await self._client.call("seal", m.BootedRequest(session, image), m.Sealed, timeout=_SEAL_SECONDS)  # type: ignore[no-any-return]

    async def image_delete(self, image: str) -> None:
        await self._client.call("image_delete", m.ImageName(image), timeout=_DELETE_SECONDS)

    async def _descriptor(self, method: str, body: object, timeout: float = 30.0) -> int:
        (descriptor,) = await self._descriptors(method, body, 1, timeout)
        return descriptor

    async def _descriptors(self, method: str, body: object, count: int, timeout: float) -> list[int]:
        _, descriptors = await self._client.call_with_descriptors(method, body, timeout=timeout)
        if len(descriptors) != count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise RpcError("Unavailable", f"{method}: {len(descriptors)} descriptors in place of {count}")
        return descriptors
