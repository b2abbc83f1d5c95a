"""What control asks of vmm: its calls, typed, with their deadlines. The only place that knows them.

Deadlines of calls that read or write a session's files grow with their bytes. One that passes says nothing of what became of the call
(RpcLost): it is asked again, because every call is idempotent, and never taken for a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from gateway import messages as m
from gateway.executors import seconds_for
from gateway.observe.room import disk_free_bytes, inodes_free, memory_available_bytes
from gateway.rpc import Client, RpcError, RpcLost

_SLOW_BYTES = 8 << 20  # a second: of a disk that many sessions write to at once
_PREPARE_SECONDS = 60.0
_START_SECONDS = 30.0
_SUSPEND_SECONDS = 120.0
_BUILD_SECONDS = 2000.0
_BOOT_SECONDS = 60.0
_SEAL_SECONDS = 180.0
_DELETE_SECONDS = 60.0
_ARCHIVE_SECONDS = 600.0
_AWAY_RETRY_SECONDS = 0.2
_AWAY_SECONDS = 20.0
_ENDS = frozenset({"Damaged", "Missing", "Ended"})
T = TypeVar("T")

__all__ = ["Host", "RpcError", "RpcLost", "ends_session", "grown", "is_refused", "patiently"]


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Asks again while vmm is away: it restarts, and every call is idempotent. Raises RpcLost after a while; a call that itself takes
    longer is asked twice."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _AWAY_SECONDS
    for attempt in itertools.count():
        try:
            return await call()
        except RpcLost as error:
            if attempt and loop.time() > end:
                raise RpcLost(f"the host does not answer ({error})") from error
            await asyncio.sleep(_AWAY_RETRY_SECONDS)
    raise AssertionError


def ends_session(error: Exception) -> bool:
    """Whether an error says that there is no way on for a session (vmm/errors.py): its files are damaged or not there, or the hypervisor
    in which it ran is gone. Every other error, also one that nobody knows, passes."""
    return isinstance(error, RpcError) and error.kind in _ENDS


def is_refused(error: Exception) -> bool:
    """Whether this host's hypervisor cannot load what another one wrote; the text says what could."""
    return isinstance(error, RpcError) and error.kind == "Refused"


def grown(seconds: float, size: int) -> float:
    """Returns a deadline for a call that has so many bytes to read or write."""
    return seconds + size / _SLOW_BYTES


class Host:
    """Calls vmm. Every call raises RpcError with the host's words (its kind is a class of vmm/errors.py), or RpcLost when vmm is away or
    silent. `size`: the bytes that a call may have to read or write."""

    def __init__(self, client: Client, root: Path) -> None:
        """Makes the caller; `root` is where the host keeps what it stores."""
        self._client = client
        self._root = root

    async def info(self) -> m.HostInfo:
        return await self._client.call("host_info", None, m.HostInfo)  # type: ignore[no-any-return]

    async def reclaim_capacity(self) -> m.Capacity:
        """Ends paused hypervisors where memory is wanted, and returns what is free then."""
        return await self._client.call("reclaim_and_report_capacity", None, m.Capacity)  # type: ignore[no-any-return]

    def free(self) -> tuple[int, int, int]:
        """Returns the available memory and the free disk, in bytes, and the free inodes, without asking vmm: the host is this one. Raises
        OSError."""
        return memory_available_bytes(), disk_free_bytes(self._root), inodes_free(self._root)

    async def state(self) -> m.HostState:
        return await self._client.call("state", None, m.HostState)  # type: ignore[no-any-return]

    async def warm(self) -> list[m.SessionState]:
        """Returns the sessions whose paused hypervisors are kept."""
        return await self._client.call("warm", None, list[m.SessionState])  # type: ignore[no-any-return]

    async def counts(self) -> dict[str, int]:
        """Returns what hypervisors have counted since vmm started."""
        return await self._client.call("counts", None, dict[str, int])  # type: ignore[no-any-return]

    async def effort(self, session: str, incarnation: int) -> m.Effort:
        """Returns what a running guest has used, without a look at all the others."""
        return await self._client.call("effort", m.SessionRef(session, incarnation), m.Effort)  # type: ignore[no-any-return]

    async def prepare(
        self, session: str, incarnation: int, image: str, from_snapshot: bool, egress: m.EgressRules | None = None, size: int = 0
    ) -> None:  # fmt: skip
        request = m.PrepareRequest(session, incarnation, image, from_snapshot, egress)
        await self._client.call("prepare", request, timeout=grown(_PREPARE_SECONDS, size))

    async def services(self, session: str, incarnation: int, is_named: bool = False) -> list[socket.socket]:
        """Returns the sockets in the session's network on which the guest asks: for metadata (TCP), for names (UDP, TCP), and, with
        `is_named`, for hosts that are allowed by name (TCP)."""
        _, descriptors = await self._client.call_with_descriptors("services", m.ServicesRequest(session, incarnation, is_named))
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    async def start(self, session: str, incarnation: int, wake: bytes, size: int = 0) -> int:
        """Lets a prepared session run; returns the agent's channel, when its files have been compared with their checksums."""
        return await self._descriptor("start", m.StartRequest(session, incarnation, wake), grown(_START_SECONDS, size))

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

    async def suspend(self, session: str, incarnation: int, size: int = 0) -> m.Suspended:
        seconds = grown(_SUSPEND_SECONDS, size)
        return await self._client.call("suspend", m.SessionRef(session, incarnation), m.Suspended, timeout=seconds)  # type: ignore[no-any-return]

    async def traces(self, session: str) -> list[m.Trace]:
        """Returns the host's part of the last launch or resume, and of the last suspend."""
        return await self._client.call("traces", m.SessionRef(session, 0), list[m.Trace])  # type: ignore[no-any-return]

    async def leave(self) -> None:
        """Ends what is paused and what is kept for parked streams: the service stops, and its workers with it."""
        await self._client.call("leave", None, timeout=_DELETE_SECONDS)

    async def pack(self, session: str, incarnation: int, target: int, size: int = 0) -> m.Packed:
        """Writes to an open file. A duplicate of its descriptor is given away."""
        request, seconds = m.PackRequest(session, incarnation), grown(_ARCHIVE_SECONDS, size)
        return await self._client.call("pack", request, m.Packed, timeout=seconds, descriptors=[os.dup(target)])  # type: ignore[no-any-return]

    async def unpack(self, session: str, digest: str, source: int, size: int = 0) -> None:
        request, seconds = m.UnpackRequest(session, digest), grown(_ARCHIVE_SECONDS, size)
        await self._client.call("unpack", request, timeout=seconds, descriptors=[os.dup(source)])

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

    async def recover(self, session: str, size: int = 0) -> m.Quarantined:
        """Moves a session's files back, where a snapshot of it is whole."""
        seconds = grown(_ARCHIVE_SECONDS, size)
        return await self._client.call("recover", m.QuarantineName(session), m.Quarantined, timeout=seconds)  # type: ignore[no-any-return]

    async def release_quarantined(self, session: str) -> None:
        await self._client.call("release_quarantined", m.QuarantineName(session), timeout=_ARCHIVE_SECONDS)

    async def quarantine_image(self, image: str, reason: str) -> None:
        await self._client.call("quarantine_image", m.ImageQuarantineRequest(image, reason), timeout=_DELETE_SECONDS)

    async def marks(self) -> m.Marks:
        """Returns whose images/ and sessions/ are."""
        return await self._client.call("marks", None, m.Marks, timeout=_DELETE_SECONDS)  # type: ignore[no-any-return]

    async def mark(self, instance: str) -> None:
        await self._client.call("mark", m.MarkRequest(instance), timeout=_DELETE_SECONDS)

    async def build(self, request: m.BuildRequest, context: Path, dockerfile: Path) -> tuple[int, int]:
        """Starts a container build; returns the log and the phases to read."""
        sources = [os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) for path in (context, dockerfile)]
        log, phases = await self._descriptors("build", request, 2, _BOOT_SECONDS, sources)
        return log, phases

    async def build_result(self, build: str) -> m.BuildResult:
        return await self._client.call("build_result", m.BuildName(build), m.BuildResult, timeout=_BUILD_SECONDS)  # type: ignore[no-any-return]

    async def build_cancel(self, build: str) -> None:
        await self._client.call("build_cancel", m.BuildName(build), timeout=_DELETE_SECONDS)

    async def boot(self, session: str, image: str, shape: m.Shape, egress: m.EgressRules | None = None) -> int:
        return await self._descriptor("boot", m.BootRequest(session, image, shape, egress), _BOOT_SECONDS)

    async def give_disk(self, session: str, image: str) -> None:
        await self._client.call("give_disk", m.BootedRequest(session, image), timeout=_SEAL_SECONDS)

    async def seal(self, session: str, image: str, memory_mib: int, account: str) -> m.Sealed:
        """Stores a booted machine, whose memory is written."""
        seconds = seconds_for(memory_mib << 20, _SEAL_SECONDS)
        return await self._client.call("seal", m.SealRequest(session, image, account), m.Sealed, timeout=seconds)  # type: ignore[no-any-return]

    async def image_delete(self, image: str) -> None:
        await self._client.call("image_delete", m.ImageName(image), timeout=_DELETE_SECONDS)

    async def _descriptor(self, method: str, body: object, timeout: float = 30.0) -> int:
        (descriptor,) = await self._descriptors(method, body, 1, timeout)
        return descriptor

    async def _descriptors(self, method: str, body: object, count: int, timeout: float, given: list[int] | None = None) -> list[int]:
        _, descriptors = await self._client.call_with_descriptors(method, body, timeout=timeout, descriptors=given)
        if len(descriptors) != count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise RpcError("Unavailable", f"{method}: {len(descriptors)} descriptors in place of {count}")
        return descriptors
