"""One jailed Firecracker process, and what a session's life asks of it.

Unlike QEMU's, a standby is no process yet: the jailer enters a network namespace before it starts Firecracker, and which one is
known only when a session comes. What can be made ahead is: root, user, control group, links to the image's files.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway import executors
from gateway.observe.steps import Steps

from .. import diffs, sandboxes, syscalls
from ..cgroups import Cgroups
from ..diffs import Sum
from ..driver import DEVICES, VSOCK_PORT, WALL_CLOCK_AT, Process
from ..errors import Ended, Refused, Unavailable, VmmError, explained, not_loaded, not_written, state_refused
from ..network import TAP, Link
from ..sandboxes import VmSandbox
from ..watched import WatchedProcess
from . import memory
from .api import Api, ApiError, Unanswered
from .jail import DISK, MEMORY, OUT, STATE, VSOCK, Jail

NETWORK = "net0"
_START_SECONDS = 20.0
_ENDING_SECONDS = 1.0
_AGENT_SECONDS = 5.0
_RETRY_SECONDS = 0.002
_MEMORY_SECONDS = 300.0


class FirecrackerMachine(WatchedProcess):
    """Implements vmm.driver.Machine."""

    def __init__(
        self, record: Process, sandbox: VmSandbox, jail: Jail, cgroups: Cgroups, remove: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        super().__init__(record, sandbox.directory, remove)
        self.steps = Steps("vmm", "")
        self.jail = jail
        self.sandbox = sandbox
        self._cgroups = cgroups
        self._api: Api | None = None

    @property
    def api(self) -> Api:
        if self._api is None:
            raise Unavailable(f"hypervisor {self.record.vm} does not run")
        return self._api

    @property
    def is_attached(self) -> bool:
        return self._pidfd is not None

    @property
    def _seconds(self) -> float:
        """For work on all of the guest's memory."""
        return executors.seconds_for(self.record.shape.memory_mib << 20 if self.record.shape else 0, _MEMORY_SECONDS)

    # ---- the process ----

    async def spawn(self, link: Link, console: int = asyncio.subprocess.DEVNULL) -> None:
        """Starts the jailer, which becomes the process's parent only until it has written its id. Raises Unavailable."""
        self.record.link = link.name
        try:
            with (self.sandbox.directory / sandboxes.STDERR).open("ab") as log:
                jailer = await asyncio.create_subprocess_exec(
                    *self.jail.command(self._cgroups, link.path), start_new_session=True,
                    stdin=asyncio.subprocess.DEVNULL, stdout=console, stderr=log,
                )  # fmt: skip
            async with asyncio.timeout(_START_SECONDS):
                if code := await jailer.wait():
                    raise ApiError(f"the jailer ended with code {code}")
                pid = self.jail.pid()
                if pid is None:
                    raise ApiError("the jailer left no process id")
                self.attach(pid)
                await self.api.ready(_START_SECONDS)
        except (ApiError, OSError, TimeoutError) as error:
            why = await self.why(error) or f"not within {_START_SECONDS:g} s"
            raise explained(error, f"the hypervisor of image {self.record.image} did not start: {why}") from error

    def attach(self, pid: int) -> None:
        """Watches a process that runs, and talks to it. Raises OSError when it is gone."""
        self._watch(pid)
        self.record.pid, self.record.started = pid, syscalls.start_time(pid) or 0
        self.save_record()
        self._api = Api(self.jail.root)

    async def connect(self) -> None:
        """To a process that another daemon started: its phase is what it says. Raises ApiError, OSError."""
        self.attach(self.record.pid)
        is_running = await self.api.ready(_AGENT_SECONDS) == "Running"
        if self.record.phase == "starting":
            self.record.phase = "running" if is_running else "prepared"
        elif self.record.phase in ("running", "stopped"):
            self.record.phase = "running" if is_running else "stopped"

    # ---- what a session's life asks ----

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        try:
            self.jail.give(overlay, DISK, writable=True)
            self.jail.give(snapshot / DEVICES, STATE)
            await self.spawn(link)
            self.steps.mark("process started")
            await self.api.put(
                "/snapshot/load", self._seconds, snapshot_path=f"/{STATE}",
                mem_backend={"backend_type": "File", "backend_path": f"/{MEMORY}"}, track_dirty_pages=True, resume_vm=False,
                network_overrides=[{"iface_id": NETWORK, "host_dev_name": TAP}],
            )  # fmt: skip
            self.steps.mark("device state loaded")
            if (snapshot / diffs.MANIFEST).exists():
                await self._load_memory(snapshot)
                self.steps.mark("memory written and checked")
        except (ApiError, OSError, LookupError) as error:
            why = await self.why(error)
            text = f"session {self.record.session} could not be loaded from {snapshot}: {why}"
            if isinstance(error, ApiError) and not isinstance(error, Unanswered):
                if not (snapshot / diffs.MANIFEST).exists():
                    raise state_refused(self.record.image, snapshot / DEVICES, why) from error
                # Damage says more than what became of the load of it.
                await executors.LATENCY.run(diffs.verify_whole, snapshot, seconds=self._seconds)
                made = self.record.made  # commit 165a0cb wrote no version
                raise Refused(f"{text} (made by {made.in_words()})" if made is not None and made.version else text) from error
            raise not_loaded(error, text, overlay, snapshot / DEVICES) from error
        self.record.phase = "prepared"
        self.save_record()

    async def _load_memory(self, snapshot: Path) -> None:
        manifest = diffs.read_manifest(snapshot)
        await asyncio.gather(
            executors.LATENCY.run(memory.write_in, self.record.pid, self._regions(), snapshot, manifest, seconds=self._seconds),
            executors.LATENCY.run(diffs.verify_all, snapshot, manifest, seconds=self._seconds),
        )
        self.record.chain = manifest.chain

    def _regions(self) -> list[memory.Region]:
        return memory.regions(self.record.pid, self.jail.root / MEMORY)

    async def resume(self, wake: bytes) -> int:
        """The wake message follows the start here, by some milliseconds: a vsock has nobody who listens before."""
        self.steps.mark("control stored the start")
        try:
            await self._let_run()
            self.steps.mark("resumed")
            channel = await self.agent()
            stamped = bytearray(wake)
            struct.pack_into("<Q", stamped, WALL_CLOCK_AT, time.time_ns())
            try:
                os.write(channel, stamped)
            except OSError:
                os.close(channel)
                raise
        except (ApiError, OSError) as error:
            raise self._failed(error, f"session {self.record.session} could not be started: {await self.why(error)}") from error
        return channel

    async def checked(self) -> None:
        """It was, before it ran."""

    async def _let_run(self) -> None:
        """Raises ApiError, OSError; it may be done again then."""
        self.record.phase = "starting"
        try:
            self.save_record()
            await self.api.patch("/vm", state="Resumed")
        except BaseException as error:
            if isinstance(error, Unanswered):  # it may have run; who asks again sees what became of it
                with contextlib.suppress(ApiError):
                    self.record.phase = "running" if await self.api.ready(_ENDING_SECONDS) == "Running" else "prepared"
            else:
                self.record.phase = "prepared"
            raise
        self.record.phase = "running"
        self.save_record()

    async def agent(self) -> int:
        """A connection to the guest's port, by the Unix socket of its vsock device (docs/vsock.md). A guest that was just restored
        resets the device first, so it is tried again."""
        deadline = asyncio.get_running_loop().time() + _AGENT_SECONDS
        while True:
            try:
                return await self._connect_agent()
            except OSError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise self._failed(error, f"session {self.record.session}: agent channel: {error}") from error
                await asyncio.sleep(_RETRY_SECONDS)

    async def _connect_agent(self) -> int:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(_AGENT_SECONDS):
                await loop.sock_connect(sock, f"{self.api.path}/{VSOCK}")
                await loop.sock_sendall(sock, f"CONNECT {VSOCK_PORT}\n".encode())
                answer = b""
                while not answer.endswith(b"\n"):  # byte by byte: what follows the line is the guest's
                    byte = await loop.sock_recv(sock, 1)
                    if not byte or len(answer) > 64:
                        raise ConnectionResetError(errno.ECONNRESET, "nobody listens in the guest")
                    answer += byte
                if not answer.startswith(b"OK "):
                    raise ConnectionError(answer.decode(errors="replace"))
        except BaseException:
            sock.close()
            raise
        return sock.detach()

    async def save(self, directory: Path) -> list[Sum]:
        """Pages that were dirtied since the load; but all that are the process's own, where a save came before and was called off:
        it emptied the log of dirty pages."""
        number, repeated = self.record.incarnation, self.record.saved
        try:
            await self.api.patch("/vm", state="Paused")
            self.record.phase, self.record.saved = "stopped", True
            self.save_record()
            self.steps.mark("stop")
            await self._create_snapshot("Diff")
            self.jail.take(STATE, directory / DEVICES)
            summed = await executors.LATENCY.run(diffs.checksum, directory / DEVICES)
            written = self.jail.root / OUT / MEMORY
            if repeated:
                self.record.chain = []
                pages = await executors.LATENCY.run(
                    memory.save_private, self.record.pid, self._regions(), directory, number, seconds=self._seconds
                )
            else:
                pages = await executors.LATENCY.run(memory.pack, written, directory, number, seconds=self._seconds)
            written.unlink()
            self.steps.mark("devices and changed pages written")
            return [summed, *pages]
        except (ApiError, OSError, LookupError) as error:
            if self._ended.done():
                raise self._failed(error, f"session {self.record.session} could not be saved: {await self.why(error)}") from error
            raise not_written(error, f"the snapshot in {directory}", f"session {self.record.session} could not be saved") from error

    async def seal(self, state: Path) -> Path:
        """Stops a booted guest and writes all of its memory; returns where that is. Raises ApiError, OSError."""
        await self.api.patch("/vm", state="Paused")
        await self._create_snapshot("Full")
        self.jail.take(STATE, state)
        return self.jail.root / OUT / MEMORY

    async def _create_snapshot(self, kind: str) -> None:
        await self.api.put(
            "/snapshot/create", self._seconds, snapshot_type=kind, snapshot_path=f"/{OUT}/{STATE}", mem_file_path=f"/{OUT}/{MEMORY}"
        )

    async def pause(self) -> None:
        await self._turn("Paused", "prepared")

    async def unpause(self) -> None:
        await self._turn("Resumed", "running")

    async def _turn(self, state: str, phase: str) -> None:
        try:
            await self.api.patch("/vm", state=state)
        except ApiError as error:
            raise self._failed(error, f"session {self.record.session} could not be {state.lower()}: {error}") from error
        self.record.phase = phase
        self.save_record()

    async def why(self, error: Exception) -> str:
        """Why a step failed: what a process that has ended wrote last, which says more than how its connection broke; else `error`."""
        if self._api is None:
            return sandboxes.last_words(self.sandbox.directory) or str(error)
        if isinstance(error, Unanswered):
            await asyncio.wait([self._ended], timeout=_ENDING_SECONDS)
        return self._last_words or str(error)

    def _failed(self, error: Exception, text: str) -> VmmError:
        """Of a microVM that runs."""
        return Ended(text) if self._ended.done() else explained(error, text)

    async def _let_go(self) -> None:
        if self._api is not None:
            await self._api.close()
