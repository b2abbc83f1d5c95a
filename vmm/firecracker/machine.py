"""One jailed Firecracker process, and what a session's life asks of it.

The jailer enters a network namespace before it starts Firecracker, and no other one after. So a standby waits in a link of its own, which
becomes its session's; a session that sleeps with streams has kept its own, and gets a process that is started there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from gateway import descriptors, executors
from gateway.config import Devices
from gateway.observe.steps import Steps

from .. import diffs, sandboxes, syscalls
from ..cgroups import Cgroups
from ..diffs import Sum
from ..driver import DEVICES, VSOCK_PORT, WALL_CLOCK_AT, Process, hello
from ..errors import Ended, NeverRan, Refused, Unavailable, VmmError, explained, not_loaded, not_written, state_refused
from ..network import TAP, Link
from ..provenance import Provenance
from ..sandboxes import VmSandbox
from ..watched import WatchedProcess
from . import limits, memory
from .api import Api, ApiError, Unanswered
from .counts import PIPE, CountsPipe
from .jail import DISK, MEMORY, OUT, STATE, VSOCK, Jail

NETWORK, DRIVE = "net0", "disk"
_START_SECONDS = 20.0
_ENDING_SECONDS = 1.0
_READY_SECONDS = 5.0
# To hear of a guest, within the deadlines of the calls that ask for it (gateway/sessions/host.py, gateway/rpc.py).
_BOOTED_SECONDS, _WOKEN_SECONDS, _AGENT_SECONDS = 50.0, 20.0, 8.0
# A try waits for so long, and the next one for twice as long: a guest on a busy host has time in the later ones. One that boots may lose
# any of them, so that none waits for more than the second number. What was refused is tried again at once.
_PATIENCE_SECONDS, _PATIENCE_BOOTING_SECONDS = 0.1, 2.0
_RETRY_SECONDS, _RETRY_MOST_SECONDS = 0.002, 0.05
_TRACKS = (1, 13)  # from which release on a load knows `track_dirty_pages`
_MEMORY_SECONDS = 300.0
_FLUSH_SECONDS = 1.0


class FirecrackerMachine(WatchedProcess):
    """Implements vmm.driver.Machine."""

    def __init__(
        self, record: Process, sandbox: VmSandbox, jail: Jail, cgroups: Cgroups, remove: Callable[[], Awaitable[None]],
        devices: Devices, counts: Counter[str],
    ) -> None:  # fmt: skip
        super().__init__(record, sandbox.directory, remove)
        self.steps = Steps("vmm", "")
        self.jail = jail
        self.sandbox = sandbox
        self._cgroups = cgroups
        self._devices = devices
        self._counts = counts
        self._pipe: CountsPipe | None = None
        self._api: Api | None = None
        self.own_link: Link | None = None  # in which a standby waits for its session
        self.boots = False  # and has not been heard of yet
        self._image_made: Provenance | None = None

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
                self.steps.mark("jailed")
                await self.api.ready(_START_SECONDS)
                await self.api.put("/metrics", metrics_path=f"/{PIPE}")
                if self.record.made is not None:  # what this process writes, it writes as itself
                    self._image_made = self.record.made
                    self.record.made = msgspec.structs.replace(self.record.made, version=self.api.version)
        except (ApiError, OSError, TimeoutError) as error:
            why = await self.why(error) or f"not within {_START_SECONDS:g} s"
            raise explained(error, f"the hypervisor of image {self.record.image} did not start: {why}") from error

    def attach(self, pid: int) -> None:
        """Watches a process that runs, and talks to it. Raises OSError when it is gone."""
        self._watch(pid)
        self.record.pid, self.record.started = pid, syscalls.start_time(pid) or 0
        self.save_record()
        self._api = Api(self.jail.root)
        with contextlib.suppress(OSError):  # one that an earlier version of this daemon started has none
            self._pipe = CountsPipe(self.jail.root / PIPE, self._counts)

    async def connect(self) -> None:
        """To a process that another daemon started: its phase is what it says. Raises ApiError, OSError."""
        self.attach(self.record.pid)
        is_running = await self.api.ready(_READY_SECONDS) == "Running"
        if self.record.phase == "starting":  # where it runs, whoever let it has not heard of it: it is woken again
            self.record.phase = "starting" if is_running else "prepared"
        elif self.record.phase in ("running", "stopped"):
            self.record.phase = "running" if is_running else "stopped"

    # ---- what a session's life asks ----

    def take_link(self) -> Link | None:
        link, self.own_link = self.own_link, None
        return link

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        try:
            self.jail.give(overlay, DISK, writable=True)
            self.jail.give(snapshot / DEVICES, STATE)
            if self._api is None:
                await self.spawn(link)
                self.steps.mark("process started")
            await self.api.put(
                "/snapshot/load", self._seconds, snapshot_path=f"/{STATE}",
                mem_backend={"backend_type": "File", "backend_path": f"/{MEMORY}"}, resume_vm=False,
                network_overrides=[{"iface_id": NETWORK, "host_dev_name": TAP}], **tracking(self.api.version),
            )  # fmt: skip
            self.steps.mark("device state loaded")
            is_image = not (snapshot / diffs.MANIFEST).exists()
            if not is_image:
                await self._load_memory(snapshot)
                self.steps.mark("memory written and checked")
            if not is_image or self._devices != Devices():  # an image's devices have no limits
                await self._limit()
        except (ApiError, OSError, LookupError) as error:
            why = await self.why(error)
            text = f"session {self.record.session} could not be loaded from {snapshot}: {why}"
            if isinstance(error, ApiError) and not isinstance(error, Unanswered):
                raise await self._refused(snapshot, text, why) from error
            raise not_loaded(error, text, overlay, snapshot / DEVICES) from error
        self.record.phase = "prepared"
        self.save_record()

    async def _limit(self) -> None:
        """The state brought the limits that its devices had when it was saved. Raises ApiError."""
        disk, link = limits.disk(self._devices), limits.link(self._devices)
        await self.api.patch(f"/drives/{DRIVE}", drive_id=DRIVE, rate_limiter=disk)
        await self.api.patch(f"/network-interfaces/{NETWORK}", iface_id=NETWORK, rx_rate_limiter=link, tx_rate_limiter=link)

    async def _refused(self, snapshot: Path, text: str, why: str) -> VmmError:
        """What a state is that Firecracker did not take: another release's, as a rule, for a format is loaded by those releases alone that
        write it (docs/snapshotting/versioning.md). Raises Damaged, Missing, Unavailable: damage says more than what became of its load."""
        is_image = not (snapshot / diffs.MANIFEST).exists()
        if not is_image:
            await executors.LATENCY.run(diffs.verify_whole, snapshot, seconds=self._seconds)
        made = self._image_made if is_image else diffs.read_manifest(snapshot).made
        ours = self.record.made
        if made is not None and ours is not None and made.version != ours.version:  # commit 165a0cb wrote no version
            return Refused(
                f"{text} (made by {made.in_words()}, and this host has {ours.in_words()}: install the former, or build a new version)"
            )
        return state_refused(self.record.image, snapshot / DEVICES, why) if is_image else Refused(text)

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
        """The wake message follows the start here, by some milliseconds: a vsock has nobody who listens before. It counts as running
        when it has answered: until then it is starting, and whoever asks again wakes it again."""
        self.steps.mark("control stored the start")

        def stamped() -> bytes:
            message = bytearray(wake)
            struct.pack_into("<Q", message, WALL_CLOCK_AT, time.time_ns())
            return bytes(message)

        try:
            await self._let_run()
            self.steps.mark("resumed")
            channel = await self._join(stamped, _WOKEN_SECONDS)
        except (ApiError, OSError) as error:
            is_prepared = self.record.phase == "prepared"
            failed = self._failed(error, f"session {self.record.session} could not be started: {await self.why(error)}")
            raise (NeverRan(str(failed)) if is_prepared and isinstance(failed, Ended) else failed) from error
        self.record.phase = "running"
        self.save_record()
        self.steps.mark("the guest answered")
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
            # One that did not answer may have let it run.
            self.record.phase = "starting" if isinstance(error, Unanswered) else "prepared"
            raise

    async def agent(self) -> int:
        seconds = _BOOTED_SECONDS if self.boots else _AGENT_SECONDS
        try:
            channel = await self._join(hello, seconds)
        except (ApiError, OSError) as error:
            text = f"session {self.record.session}: agent channel: {await self.why(error)}"
            raise self._failed(error, text) from error
        self.boots = False
        return channel

    async def _join(self, message: Callable[[], bytes], seconds: float) -> int:
        """A connection on which the guest has answered a message, of which nothing is read here.

        A load, and a snapshot that was taken, reset the vsock device (docs/snapshotting/snapshot-support.md): a connection that the guest
        accepts before it has handled that is closed, or never heard of again, with what was written to it; a guest that still boots lets
        one wait for ever. So each try is a short one, on a connection of its own. Raises OSError, ApiError.
        """
        loop = asyncio.get_running_loop()
        deadline, patience, pause = loop.time() + seconds, _PATIENCE_SECONDS, _RETRY_SECONDS
        while True:
            try:
                async with asyncio.timeout(min(patience, max(deadline - loop.time(), 0))):
                    return await self._try_to_join(message())
            except TimeoutError:
                error: OSError = TimeoutError(f"the guest did not answer in {seconds:g} s")
                patience = min(2 * patience, _PATIENCE_BOOTING_SECONDS if self.boots else seconds)
            except OSError as refused:
                error = refused
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RETRY_MOST_SECONDS)
            if self._ended.done() or loop.time() > deadline:
                raise error

    async def _try_to_join(self, message: bytes) -> int:
        """By the Unix socket of the guest's vsock device (docs/vsock.md). Raises OSError."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
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
            await loop.sock_sendall(sock, message)
            await descriptors.readable(sock.fileno())
            if not sock.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError(errno.ECONNRESET, "the guest reset the connection")
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
            self.steps.mark("snapshot created")
            flushed = asyncio.get_running_loop().create_task(self._flush())  # beside what follows
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
            await flushed
            return [summed, *pages]
        except (ApiError, OSError, LookupError) as error:
            if self._ended.done():
                raise self._failed(error, f"session {self.record.session} could not be saved: {await self.why(error)}") from error
            raise not_written(error, f"the snapshot in {directory}", f"session {self.record.session} could not be saved") from error

    async def _flush(self) -> None:
        """It may be ended at any time from now on: what it has counted since the last minute is written."""
        with contextlib.suppress(ApiError):
            await self.api.put("/actions", _FLUSH_SECONDS, action_type="FlushMetrics")

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
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._api is not None:
            await self._api.close()


def tracking(version: str) -> dict[str, bool]:
    """Returns what a load is told so that KVM's log of dirty pages is kept: 1.13 has another name for it, and older ones refuse what they
    do not know."""
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return {"track_dirty_pages" if number >= _TRACKS else "enable_diff_snapshots": True}
