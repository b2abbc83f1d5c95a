"""Trouble of the host is Unavailable: it says nothing about what was saved. Only a file that is not what was written is Damaged, one whose
name is not there Missing, and a running microVM without a hypervisor Ended."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from test_diffs import make

from gateway.rpc import Connection, RpcError, Server, connect
from vmm import beneath, diffs, manifest, mapping, memory, syscalls
from vmm.driver import DEVICES, Process, Shape
from vmm.errors import Damaged, DiskFull, Ended, Missing, NeverRan, Refused, Unavailable, VmmError, explained, not_loaded
from vmm.network import Link
from vmm.provenance import Provenance
from vmm.qemu import device_state, process
from vmm.qemu.machine import PlaceholderDevices
from vmm.qemu.process import QemuMachine
from vmm.qemu.qmp import QmpError
from vmm.serving import service

PASSING = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.EINTR, errno.EACCES, errno.ETIMEDOUT]


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize(
    ("call", "read"),
    [
        ("manifest", diffs.read_manifest),
        ("runs", lambda snapshot: diffs.runs_of(snapshot / "1.runs")),
        (".pages", lambda snapshot: diffs.verify_all(snapshot, diffs.read_manifest(snapshot))),
        ("manifest", lambda snapshot: manifest.read(snapshot, "qemu")),
    ],
    ids=["manifest", "runs", "checksums", "image"],
)
def test_a_file_that_cannot_be_read_now_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, read: Callable[[Path], object]
) -> None:
    make(tmp_path, [{1, 2, 9}])
    manifest.write(tmp_path, manifest.Manifest(Shape(1, 1, 1, "tcg", 1), 1, 1))

    real = beneath.opened

    def fails(directory: Path, name: str, *given: int) -> int:
        if call == ".pages" and not name.endswith(call):  # the manifest's own is read
            return real(directory, name, *given)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(beneath, "opened", fails)
        with pytest.raises(Unavailable):
            read(tmp_path)
    read(tmp_path)  # nothing became of it


def test_what_is_understood_keeps_its_kind() -> None:
    for kind in (Unavailable, DiskFull, Refused, Damaged, Missing, Ended):
        assert type(explained(kind("why"), "text")) is kind
    for number in PASSING:
        assert type(explained(OSError(number, "x"), "text")) is Unavailable
    assert type(explained(OSError(errno.ENOSPC, "x"), "text")) is DiskFull
    assert type(explained(OSError(errno.EDQUOT, "x"), "text")) is DiskFull
    for error in (
        TimeoutError(),
        LookupError(),
        ValueError(),
        MemoryError(),
        RuntimeError("can't start new thread"),
        QmpError("no answer"),
    ):
        assert type(explained(error, "text")) is Unavailable


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/s/a"), "DiskFull", "No space left on device: /s/a: free some, or move --root"),
        (OSError(errno.EMFILE, "Too many open files", "/s/a"), "Unavailable", "Too many open files: /s/a .this process has all .*LimitNOFILE"),
        (OSError(errno.EIO, "Input/output error"), "Unavailable", "Input/output error$"),
        (TimeoutError("it stands"), "TimeoutError", "it stands"),
        (Damaged("why"), "Damaged", "why"),
    ],
)  # fmt: skip
async def test_an_error_number_that_a_call_meets_has_a_kind_and_says_what_to_do(
    tmp_path: Path, error: Exception, kind: str, text: str
) -> None:
    """A suspend on a full disk failed with `[Errno 28] ...: '/var/lib/torpor/sessions/...'`."""

    class Calls:
        async def rpc_suspend(self, connection: Connection, body: None) -> None:
            raise error

    server = Server(tmp_path / "s", service((Calls(),)), {os.getuid()})
    connection = await connect(tmp_path / "s")
    with pytest.raises(RpcError, match=text) as told:
        await connection.call("suspend")
    assert told.value.kind == kind
    connection.close()
    server.close()


def test_a_name_of_proc_that_is_gone_is_no_missing_file(tmp_path: Path) -> None:
    (tmp_path / "overlay").touch()
    gone = FileNotFoundError(errno.ENOENT, "x", "/proc/1/maps")
    assert type(not_loaded(gone, "text", tmp_path / "overlay")) is Unavailable
    assert type(not_loaded(gone, "text", tmp_path / "overlay", tmp_path / "other")) is Missing


class Network:
    async def tap(self, link: Link) -> int:
        return os.open("/dev/null", os.O_RDONLY)


class Mapper:
    """Takes what it is given."""

    def replace_fd(self, file: int, replaced: int) -> None: ...
    def map(self, file: int, ranges: object) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class Qmp:
    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answers: dict[str, Exception] = {}

    async def run(self, command: str, descriptors: object = (), **arguments: object) -> Any:
        if command in self.answers:
            raise self.answers[command]

    def close(self) -> None: ...


@pytest.fixture
async def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[QemuMachine]:
    """A process, whatever it does, with a session's files in `tmp_path`."""
    for module in (process, device_state):
        monkeypatch.setattr(module, "_ENDING_SECONDS", 0.01)
    make(tmp_path, [{1, 2, 9}])
    (tmp_path / "overlay").touch()
    (tmp_path / "process").mkdir()
    sleeps = await asyncio.create_subprocess_exec("sleep", "60")

    async def remove() -> None:
        pass

    record = Process("vm", sleeps.pid, syscalls.start_time(sleeps.pid) or 0, "image", 1, "session", 2, memory=(0, 1 << 20))
    made = QemuMachine(record, tmp_path / "process", Network(), remove, memory.write_only("state"), Mapper())  # type: ignore[arg-type]
    made._placeholders = PlaceholderDevices(0, 0)
    made._qmp = Qmp()  # type: ignore[assignment]
    made.state._loaded = asyncio.get_running_loop().create_future()
    made.state.note_loaded("completed")
    monkeypatch.setattr(made.state, "_send", lambda path: path.read_bytes())
    yield made
    await made.kill()
    await sleeps.wait()


async def prepared(machine: QemuMachine, files: Path) -> VmmError:
    with pytest.raises(VmmError) as raised:
        await machine.prepare(files, files / "overlay", Link(Path("/link"), ()))
    return raised.value


@pytest.mark.parametrize("number", PASSING)
async def test_a_prepare_that_the_host_cannot_do_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: QemuMachine, number: int
) -> None:
    """EMFILE when the disk is opened, ENOMEM of a mapping: the snapshot is as good as it was."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mapping, "load", fails)
    assert type(await prepared(machine, tmp_path)) is Unavailable


async def test_a_device_state_that_is_not_loaded_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: QemuMachine) -> None:
    machine.state._loaded = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(device_state, "_LOAD_SECONDS", 0.01)
    assert type(await prepared(machine, tmp_path)) is Unavailable


async def test_a_hypervisor_that_ends_while_it_loads(tmp_path: Path, machine: QemuMachine) -> None:
    machine.state._loaded = asyncio.get_running_loop().create_future()
    machine.qmp.closed.set_result(None)
    assert type(await prepared(machine, tmp_path)) is Unavailable


async def test_a_device_state_that_is_refused(tmp_path: Path, machine: QemuMachine) -> None:
    """Whole as it was written, it is for another hypervisor; else it is damaged, and that says more."""
    machine.state._loaded = asyncio.get_running_loop().create_future()
    machine.state.note_loaded("failed")
    assert type(await prepared(machine, tmp_path)) is Refused
    (tmp_path / DEVICES).write_bytes(b"other")
    assert type(await prepared(machine, tmp_path)) is Damaged


@pytest.mark.parametrize(("version", "machine_type"), [("8.2.0", "pc-q35-7.2"), ("7.2.9", "pc-q35-8.2")])
async def test_what_another_version_saved_is_not_even_tried(
    tmp_path: Path, machine: QemuMachine, monkeypatch: pytest.MonkeyPatch, version: str, machine_type: str
) -> None:  # fmt: skip
    """The text names the one that can load it."""
    machine.record.made = Provenance("qemu", "7.2.9", "pc-q35-7.2", "max")
    manifest = diffs.read_manifest(tmp_path)
    manifest.made = Provenance("qemu", version, machine_type, "max")
    diffs.write_manifest(tmp_path, manifest)
    monkeypatch.setattr(mapping, "load", lambda *_: pytest.fail("it was loaded"))
    error = await prepared(machine, tmp_path)
    assert type(error) is Refused and version in str(error) and machine_type in str(error)


@pytest.mark.parametrize("name", ["overlay", DEVICES, "1.pages", "1.runs"])
async def test_a_file_that_is_not_there(tmp_path: Path, machine: QemuMachine, name: str) -> None:
    (tmp_path / name).unlink()
    error = await prepared(machine, tmp_path)
    assert type(error) is Missing and name in str(error)


async def test_a_running_microvm_that_does_not_answer_is_not_gone(machine: QemuMachine) -> None:
    machine.qmp.answers |= {"cont": QmpError("no answer in 20 s"), "stop": QmpError("no answer in 20 s")}  # type: ignore[attr-defined]
    for call in (machine.unpause, machine.pause):
        with pytest.raises(Unavailable):
            await call()
    os.kill(machine.record.pid, 9)
    await machine.wait()
    for call in (machine.unpause, machine.pause):
        with pytest.raises(Ended):
            await call()


async def test_a_hypervisor_that_is_gone_before_its_guest_is_told_to_run(machine: QemuMachine) -> None:
    """Killed a moment before the start: what was saved is good, and was taken for void."""
    ours, theirs = socket.socketpair()
    theirs.close()
    machine._channel, machine.record.phase = ours.detach(), "prepared"
    with pytest.raises(NeverRan, match="gone before its guest was told to run"):
        await machine.resume(bytes(64))
    assert machine.record.phase == "prepared"
