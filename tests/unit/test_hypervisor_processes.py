"""A hypervisor's process, on a bad day: what fails leaves nothing, and what runs is not given up because it was slow to answer."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from vmm import diffs, memory, syscalls
from vmm.driver import WALL_CLOCK_AT, Process, Shape
from vmm.errors import Refused, Unavailable
from vmm.network import Link
from vmm.provenance import Provenance
from vmm.qemu import driver as driver_module
from vmm.qemu import process as process_module
from vmm.qemu.device_state import StateRefused
from vmm.qemu.driver import QemuDriver
from vmm.qemu.process import QemuMachine, listen
from vmm.qemu.qmp import QmpError
from vmm.sandboxes import VmSandbox

SHAPE = Shape(64, 1, 1, "tcg", 64)
WAKE = bytes(WALL_CLOCK_AT + 16)


class Qemu:
    """A process that runs, and somebody who answers for it on QMP and listens on its agent's channel."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.heard: list[str] = []
        self.slow: set[str] = set()  # commands whose answers come when all is `answered`
        self.refused: set[str] = set()
        self.status = "running"
        self._late: list[bytes] = []
        self._connections: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.agent = listen(directory / "agent.sock")

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.directory / "qmp.sock")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(writer)
        writer.write(b'{"QMP": {}}\n')
        buffer = b""
        while data := await reader.read(4096):
            buffer += data
            while buffer:
                try:
                    asked, end = json.JSONDecoder().raw_decode(buffer.decode())
                except ValueError:
                    break
                buffer = buffer[end:]
                self.heard.append(asked["execute"])
                said: dict[str, Any] = (
                    {"error": {"desc": "no"}} if asked["execute"] in self.refused else {"return": {"status": self.status}}
                )
                answer = json.dumps(said).encode() + b"\n"
                if asked["execute"] in self.slow:
                    self._late.append(answer)
                else:
                    writer.write(answer)

    def answered(self) -> None:
        self.slow.clear()
        self._connections[-1].write(b"".join(self._late))

    def hang_up(self) -> None:
        while self._connections:
            self._connections.pop().close()

    async def close(self) -> None:
        self.hang_up()
        self.agent.close()
        if self._server is not None:
            self._server.close()


@pytest.fixture
async def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Qemu]:
    monkeypatch.setattr("vmm.qemu.qmp.COMMAND_SECONDS", 0.2)
    monkeypatch.setattr(process_module, "_ENDING_SECONDS", 0.01)
    monkeypatch.setattr(process_module, "_RECONNECT_SECONDS", 0.01)
    made = Qemu(tmp_path)
    yield made
    await made.close()


class Sandboxes:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.released: list[str] = []

    def allocate(self, shape: Shape) -> VmSandbox:
        return VmSandbox("vm", 1, self.directory)

    def of(self, record: Process) -> VmSandbox:
        return VmSandbox(record.vm, record.uid, self.directory)

    async def release(self, sandbox: VmSandbox) -> None:
        self.released.append(sandbox.vm)


def driver(directory: Path) -> QemuDriver:
    made = QemuDriver.__new__(QemuDriver)
    made._sandboxes = Sandboxes(directory)  # type: ignore[assignment]
    made._machines = set()
    made._network = None  # type: ignore[assignment]
    return made


async def sleeper() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec("sleep", "60")


async def adopted(directory: Path, phase: str) -> tuple[QemuMachine | None, asyncio.subprocess.Process]:
    runs = await sleeper()
    record = Process("vm", runs.pid, syscalls.start_time(runs.pid) or 0, "image", 1, "session", 2, phase=phase)
    return await driver(directory).adopt(record), runs


# ---- adoption and QMP ----


async def test_a_guest_that_runs_is_kept_by_a_daemon_that_gets_no_answer_from_its_hypervisor(tmp_path: Path, qemu: Qemu) -> None:
    """It was killed: what it had is nowhere else. It is connected to when it answers."""
    machine, runs = await adopted(tmp_path, "starting")
    assert machine is not None and runs.returncode is None
    with pytest.raises(Unavailable):
        await machine.unpause()
    await qemu.start()
    await until(lambda: machine.record.phase == "running")
    await machine.unpause()
    await machine.kill()
    await runs.wait()


@pytest.mark.parametrize("phase", ["standby", "prepared", "warm"])
async def test_what_is_durable_elsewhere_is_ended_then(tmp_path: Path, qemu: Qemu, phase: str) -> None:
    machine, runs = await adopted(tmp_path, phase)
    assert machine is None and await asyncio.wait_for(runs.wait(), 5) == -9


async def test_a_connection_that_breaks_is_made_again(tmp_path: Path, qemu: Qemu) -> None:
    await qemu.start()
    machine, runs = await adopted(tmp_path, "starting")
    assert machine is not None
    for _ in range(2):
        qemu.hang_up()
        qemu.heard.clear()
        await until(lambda: "add-fd" in qemu.heard)
        await machine.unpause()
    await machine.kill()
    await runs.wait()
    assert machine.record.phase == "ended"


async def test_a_start_that_is_not_answered_is_asked_for_again(tmp_path: Path, qemu: Qemu) -> None:
    await qemu.start()
    machine, runs = await adopted(tmp_path, "prepared")
    assert machine is not None
    machine.record.phase = "prepared"
    qemu.slow.add("cont")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable, match="no answer"):
        await machine.resume(WAKE)
    assert machine.record.phase == "starting", "nobody knows"
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "the guest's end alone waits to be accepted"
    qemu.answered()
    channel = await machine.resume(WAKE)
    assert machine.record.phase == "running"
    os.close(channel)
    await machine.kill()
    await runs.wait()


@pytest.mark.parametrize(("status", "phase"), [("paused", "prepared"), ("running", "running")])
async def test_a_start_that_failed_is_known_to_have_run_or_not(tmp_path: Path, qemu: Qemu, status: str, phase: str) -> None:
    """One that may have run is no prepared one: its snapshot would be resumed over a disk that is newer."""
    await qemu.start()
    machine, runs = await adopted(tmp_path, "prepared")
    assert machine is not None
    qemu.refused.add("cont")
    qemu.status = status
    with pytest.raises(Unavailable, match="could not be started: cont: no"):
        await machine.resume(WAKE)
    assert machine.record.phase == phase
    await machine.kill()
    await runs.wait()


@pytest.mark.parametrize("size", [0, (256 << 20) + 1])
async def test_a_device_state_that_is_none_is_not_stored(tmp_path: Path, qemu: Qemu, size: int) -> None:
    """The hypervisor has the file open: an empty one would be a snapshot that nothing loads, an endless one would fill vmm's memory."""
    await qemu.start()
    machine, runs = await adopted(tmp_path, "starting")
    assert machine is not None and machine.state._file is not None
    os.ftruncate(machine.state._file, size)
    with pytest.raises(QmpError, match=f"a device state of {size} bytes"):
        machine.state.store(tmp_path / "devices.state")
    assert not (tmp_path / "devices.state").exists()
    await machine.kill()
    await runs.wait()


# ---- starts that fail ----


def no_more(*_: object, **__: object) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (socket, "socketpair"), (memory, "write_only"), (driver_module, "listen"), (asyncio, "create_subprocess_exec"),
        (os, "pidfd_open"), (process_module.Qmp, "connect"),
    ],
    ids=["socketpair", "memfd", "listen", "fork", "pidfd", "qmp"],
)  # fmt: skip
async def test_a_start_that_fails_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: Qemu, owner: object, name: str
) -> None:
    """Neither descriptors nor a sandbox, with its user id, group and directory, nor a process."""
    one = driver(tmp_path)
    started: list[asyncio.subprocess.Process] = []

    async def execute(*_: object) -> asyncio.subprocess.Process:
        driver_module.listen(tmp_path / "other.sock").close()
        started.append(await asyncio.create_subprocess_exec("sh", "-c", "sleep 5 & wait"))
        return started[-1]

    monkeypatch.setattr(one, "_execute", execute)
    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_more)
        with pytest.raises(Unavailable, match=r"did not start: .*Too many open files"):
            await one._spawn("image", SHAPE, tmp_path, Provenance(), lambda ends: None)  # type: ignore[arg-type, return-value]
    assert one._sandboxes.released == ["vm"]  # type: ignore[attr-defined]
    for process in started:
        await asyncio.wait_for(process.wait(), 5)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= len(before))


# ---- what is refused ----


@pytest.mark.parametrize("is_image", [True, False])
async def test_a_device_state_that_is_not_taken_is_named_with_what_to_do(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, is_image: bool
) -> None:
    """QEMU says no more than that an input or output error was met."""
    await qemu.start()
    machine, runs = await adopted(tmp_path, "running")
    assert machine is not None
    source = tmp_path / "source"
    source.mkdir()
    if not is_image:
        (source / diffs.MANIFEST).touch()

    async def refused(*_: object) -> None:
        raise StateRefused("the hypervisor refused the device state")

    monkeypatch.setattr(machine, "_prepare", refused)
    try:
        with pytest.raises(Refused) as said:
            await machine.prepare(source, tmp_path / "overlay", Link(tmp_path / "link"))
        names_the_file = f"image image cannot be launched: {source}/devices.state is not what was written" in str(said.value)
        assert names_the_file == is_image and ("build a new version of the image" in str(said.value)) == is_image
        assert "refused the device state" in str(said.value)
    finally:
        runs.kill()
        await machine.wait()
