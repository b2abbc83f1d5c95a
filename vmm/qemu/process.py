"""One jailed QEMU process: starting it, finding it again, and what a session's life asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from gateway import executors
from gateway.observe.steps import Steps

from .. import diffs, mapping, memory
from ..diffs import Manifest, Sum
from ..driver import DEVICES, WALL_CLOCK_AT, Process
from ..errors import Ended, NeverRan, Refused, Unavailable, VmmError, explained, not_loaded, state_refused
from ..network import Link, Network
from ..watched import WatchedProcess
from . import machine as topology
from .device_state import DeviceState, StateRefused
from .machine import PlaceholderDevices
from .qmp import Qmp, QmpError

log = structlog.get_logger()

_ENDING_SECONDS = 1.0
_STARVED = "io-error"
_STARVED_RETRY_SECONDS = 1
_RECONNECT_SECONDS, _RECONNECT_MOST_SECONDS = 0.1, 5.0
_CHECK_SECONDS = 300.0


def listen(path: Path) -> socket.socket:
    """A listening socket for the hypervisor to accept on, so that a restarted daemon can connect again."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(4)
    return sock


class QemuMachine(WatchedProcess):
    """Implements vmm.driver.Machine."""

    def __init__(
        self, record: Process, directory: Path, network: Network, remove: Callable[[], Awaitable[None]], state: int,
        mapper: mapping.Mapper | None = None,
    ) -> None:  # fmt: skip
        super().__init__(record, directory, remove)
        self.steps = Steps("vmm", "")
        self.image_memory: int | None = None  # of a machine that boots: what will be the image's memory
        self.restored_from: Path | None = None  # the kept boot of a machine that has yet to be given its disk
        self._network = network
        self._qmp: Qmp | None = None
        self.state = DeviceState(state)
        self._mapper = mapper
        self._placeholders: PlaceholderDevices | None = None
        self._channel: int | None = None  # the agent's, connected before it is asked for
        self._starving: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._watch(record.pid)

    async def connect(self) -> None:
        """Raises QmpError."""
        self._qmp = await Qmp.connect(self._directory / "qmp.sock")
        self._qmp.on_event = self._event
        self._qmp.closed.add_done_callback(lambda _: self.reconnect())
        await self._qmp.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        status = await self.status()
        if status == _STARVED:
            self._starve()
        self._correct_phase(is_running=status in ("running", _STARVED))

    def reconnect(self) -> None:
        """Connects again, for as long as the process runs: a connection that is lost says nothing about the guest."""
        if self._pidfd is not None and (self._reconnecting is None or self._reconnecting.done()):
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        pause = _RECONNECT_SECONDS
        while True:
            await asyncio.sleep(pause)
            if self._pidfd is None or (self._qmp is not None and not self._qmp.closed.done()):
                return
            try:
                await self.connect()
                await self.state.give_file(self.qmp)
                log.warning("qmp.connected_again", vm=self.record.vm)
            except (QmpError, OSError):
                pause = min(2 * pause, _RECONNECT_MOST_SECONDS)

    def _correct_phase(self, is_running: bool) -> None:
        """A daemon that died between a command and its record left a question; the hypervisor has the answer."""
        phase = self.record.phase
        if phase == "starting":
            self.record.phase = "running" if is_running else "prepared"
        elif phase in ("running", "stopped"):
            self.record.phase = "running" if is_running else "stopped"

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise Unavailable(f"hypervisor {self.record.vm} is not connected")
        return self._qmp

    async def processor(self) -> list[str]:
        """Returns the words of CPUID that the guest sees. Raises QmpError."""
        (first, *_) = await self.qmp.run("query-cpus-fast")
        words = await self.qmp.run("qom-get", path=first["qom-path"], property="feature-words")
        return [
            f"{one['cpuid-input-eax']:x}.{one.get('cpuid-input-ecx', 0):x}.{one['cpuid-register']}={one['features']:x}"
            for one in words if one["features"]
        ]  # fmt: skip

    async def status(self) -> str:
        answer = await self.qmp.run("query-status")
        return str(answer["status"])

    def clear(self, holes: list[tuple[int, int]]) -> None:
        """A standby gets memory of its own where its image has none. Raises Unavailable, OSError."""
        if self._mapper is None:
            raise Unavailable(f"hypervisor {self.record.vm} waits for no session")
        mapping.clear(self.mapping(), self._mapper, holes)

    async def await_session(self, placeholders: PlaceholderDevices) -> None:
        """A standby: from now on what a session brings is put in without a word of QMP, which QEMU reads byte by byte, 5 µs each.
        Raises QmpError, Unavailable."""
        self._placeholders = placeholders
        await self.state.await_load(self.qmp)
        self._channel = await self.agent()

    def take_link(self) -> Link | None:
        """It is given a tap, whatever namespace that is from."""
        return None

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        self.record.link = link.name
        try:
            self.save_record()
            await self._prepare(snapshot, overlay, link)
            self.record.phase = "prepared"
            self.save_record()
        except (QmpError, OSError, ValueError, LookupError) as error:
            why = await self.why(error)
            text = f"session {self.record.session} could not be loaded from {snapshot}: {why}"
            if isinstance(error, StateRefused):
                is_image = not (snapshot / diffs.MANIFEST).exists()
                raise (state_refused(self.record.image, snapshot / DEVICES, why) if is_image else Refused(text)) from error
            raise not_loaded(error, text, overlay, snapshot / DEVICES) from error

    async def _prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        tap = await self._network.tap(link)
        try:
            manifest = diffs.read_manifest(snapshot) if (snapshot / diffs.MANIFEST).exists() else None
            self._check_maker(manifest)
            await executors.LATENCY.run(self._put_in, tap, snapshot, overlay, manifest)
        finally:
            os.close(tap)
        self.steps.mark("network, disk and memory put in")
        self.record.unchecked = str(snapshot)
        try:
            await self.state.load(self.qmp, snapshot / DEVICES)
        except BaseException:
            await self.checked()  # damage says more than what became of the load of it
            raise
        self.steps.mark("device state loaded")
        self.record.chain = manifest.chain if manifest is not None else []

    async def checked(self) -> None:
        """Compares the files that were loaded, beside the guest's first steps: large diffs take longer than all the rest of a resume. Who
        let it run hears of it when this is done. Raises Damaged, Missing, Unavailable."""
        if self.record.unchecked:
            seconds = executors.seconds_for(self.record.shape.memory_mib << 20 if self.record.shape else 0, _CHECK_SECONDS)
            await executors.LATENCY.run(diffs.verify_whole, Path(self.record.unchecked), seconds=seconds)
            self.record.unchecked = ""

    def _check_maker(self, manifest: Manifest | None) -> None:
        """A sleeper was saved by a hypervisor of its image's version, unless it came from elsewhere. Raises Refused."""
        made, ours = manifest.made if manifest is not None else None, self.record.made
        if made is not None and ours is not None and (made.version, made.machine) != (ours.version, ours.machine):
            raise Refused(
                f"session {self.record.session} was saved by {made.in_words()} ({made.machine}), which alone can load it, "
                f"and its image runs under {ours.in_words()} ({ours.machine})"
            )

    def _put_in(self, tap: int, snapshot: Path, overlay: Path, manifest: Manifest | None) -> None:
        """Raises VmmError, OSError."""
        if self._mapper is None or self._placeholders is None:
            raise Unavailable(f"hypervisor {self.record.vm} waits for no session")
        self._mapper.replace_fd(tap, self._placeholders.tap)
        disk = os.open(overlay, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapper.replace_fd(disk, self._placeholders.disk)
        finally:
            os.close(disk)
        if manifest is not None:
            mapping.load(self.mapping(), self._mapper, snapshot, manifest)
        self._mapper.finish()

    async def resume(self, wake: bytes) -> int:
        self.steps.mark("control stored the start")
        channel, self._channel = self._channel if self._channel is not None else await self.agent(), None
        try:
            if self.record.phase != "running":  # else this is asked for again
                await self._wake(channel, wake)
            await self.checked()
            self.steps.mark("files checked")
        except BaseException as error:
            os.close(channel)
            if self.record.phase == "starting":
                await self._ask_phase()
            if not isinstance(error, QmpError | OSError | VmmError):
                raise
            raise await self._failed(error, f"session {self.record.session} could not be started") from error
        return channel

    async def _ask_phase(self) -> None:
        """After a start that failed: whether the guest runs. Where nobody says, it may have run, and is not taken to be prepared still."""
        with contextlib.suppress(QmpError, OSError, VmmError):
            self.record.phase = "running" if await self.status() == "running" else "prepared"

    async def _wake(self, channel: int, wake: bytes) -> None:
        """Raises QmpError, OSError, and it may be done again then; NeverRan, at once: before anybody hears of the hypervisor's end."""
        self.record.phase = "starting"
        self.save_record()
        stamped = bytearray(wake)
        struct.pack_into("<Q", stamped, WALL_CLOCK_AT, time.time_ns())
        try:
            os.write(channel, stamped)
        except ConnectionError as error:
            self.record.phase = "prepared"
            raise NeverRan("its hypervisor was gone before its guest was told to run") from error
        await self.qmp.run("cont")
        self.record.phase = "running"  # not written: who reads "starting" asks the hypervisor
        self._close_mapper()
        self.steps.mark("cont")

    async def agent(self) -> int:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(5):
                await asyncio.get_running_loop().sock_connect(sock, str(self._directory / "agent.sock"))
        except (OSError, TimeoutError) as error:
            sock.close()
            raise await self._failed(error, f"session {self.record.session}: agent channel") from error
        return sock.detach()

    def _event(self, message: dict[str, Any]) -> None:
        if message["event"] == "MIGRATION" and message["data"]["status"] in ("completed", "failed"):
            self.state.note_loaded(message["data"]["status"])
        elif message["event"] == "BLOCK_IO_ERROR" and message["data"].get("action") == "stop":
            self._starve()

    def _starve(self) -> None:
        if self._starving is None or self._starving.done():
            self._starving = asyncio.get_running_loop().create_task(self._retry_io())

    async def _retry_io(self) -> None:
        """QEMU stops a guest whose disk cannot grow (werror=enospc, its default). It goes on when there is room again."""
        while True:
            await asyncio.sleep(_STARVED_RETRY_SECONDS)
            try:
                if self.record.phase != "running" or await self.status() != _STARVED:
                    return
                await self.qmp.run("cont")
            except QmpError as error:  # a host this short of room may be slow as well: no other event would make the guest go on
                if self._ended.done() or self.qmp.closed.done():
                    return
                log.warning("starved.retry", vm=self.record.vm, error=str(error))

    async def save(self, directory: Path) -> list[Sum]:
        try:
            stopped, saved = self._stop_and_save()
            await stopped
            self.steps.mark("stop")
            seconds = executors.seconds_for(self.record.memory[1] - self.record.memory[0], _CHECK_SECONDS)
            written = await executors.LATENCY.run(self._save_memory, directory, seconds=seconds)
            await saved
            devices = await executors.LATENCY.run(self.state.store, directory / DEVICES)
            self.steps.mark("devices and changed pages written")
            return [devices, *written]
        except (QmpError, OSError, LookupError) as error:
            raise await self._failed(error, f"session {self.record.session} could not be saved") from error

    async def load_devices(self, path: Path) -> None:
        """Raises QmpError, OSError."""
        await self.state.await_load(self.qmp)
        await self.state.load(self.qmp, path)

    async def give_disk(self, base: Path, overlay: Path) -> None:
        """A booted guest, which has not looked at its disk, gets it in place of the placeholder. Raises QmpError, OSError."""
        for number, path, flags in ((1, base, os.O_RDONLY), (2, overlay, os.O_RDWR)):
            await self.qmp.give("add-fd", os.open(path, flags | os.O_CLOEXEC), fdset_id=number)
        for node in topology.boot_disk():
            await self.qmp.run("blockdev-add", (), **node)
        await self.qmp.run("qom-set", path="/machine/peripheral/vd0", property="drive", value="d1")
        await self.qmp.run("blockdev-del", node_name="d0")

    def _save_memory(self, directory: Path) -> list[Sum]:
        record = self.record
        image = memory.adopt_image_memory(record.pid, record.image_memory, True) if not record.chain else None
        try:
            return memory.save_diff(self.mapping(), directory, record.incarnation, image)
        finally:
            if image is not None:
                os.close(image)

    async def save_devices(self, path: Path) -> None:
        """Stops the guest and writes its devices' state. Raises QmpError, OSError."""
        _, saved = self._stop_and_save()
        await saved
        await executors.LATENCY.run(self.state.store, path)

    def _stop_and_save(self) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        """Returns what is answered when the guest has stopped, and when its devices' state is written. Raises QmpError, OSError."""
        self.state.empty()
        self.record.phase = "stopped"  # not written: a daemon that finds "running" asks the hypervisor
        return self.state.save(self.qmp)

    async def unpause(self) -> None:
        try:
            await self.qmp.run("cont")
        except QmpError as error:
            raise await self._failed(error, f"session {self.record.session} does not run on") from error
        self.record.phase = "running"
        self.save_record()

    async def pause(self) -> None:
        try:
            await self.stop()
        except QmpError as error:
            raise await self._failed(error, f"session {self.record.session} could not be stopped") from error
        self.record.phase = "prepared"
        self.save_record()

    async def stop(self) -> None:
        await self.qmp.run("stop")

    async def why(self, error: Exception) -> str:
        """Why a step failed: what a hypervisor that has ended wrote last, which says more than how its connection broke; else `error`."""
        if self._qmp is None or self._qmp.closed.done():
            await asyncio.wait([self._ended], timeout=_ENDING_SECONDS)
        return self._last_words or str(error)

    @property
    def _has_ended(self) -> bool:
        return self._pidfd is None

    async def _failed(self, error: Exception, what: str) -> VmmError:
        """Of a microVM that runs: what was understood is told as such, else whether its hypervisor is gone."""
        if isinstance(error, VmmError):
            return explained(error, f"{what}: {error}")
        text = f"{what}: {await self.why(error)}"
        return Ended(text) if self._has_ended else explained(error, text)

    def mapping(self) -> memory.Mapping:
        """Found before anything is mapped over it, and then kept in the record."""
        if self.record.memory == (0, 0):
            found = memory.find_mapping(self.record.pid, self.record.image)
            self.record.memory = (found.start, found.end)
        return memory.Mapping(self.record.pid, *self.record.memory)

    def _close_mapper(self) -> None:
        """The guest runs: nothing is mapped any more."""
        if self._mapper is not None:
            self._mapper.close()
            self._mapper = None

    async def _let_go(self) -> None:
        self._close_mapper()
        if self._channel is not None:
            os.close(self._channel)
            self._channel = None
        self.state.close()
        if self._qmp is not None:
            self._qmp.close()
        if self.image_memory is not None:
            os.close(self.image_memory)
            self.image_memory = None


def child_of(pid: int) -> int | None:
    """Returns the one child of a process, None while there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0])
    return None
