"""What each hypervisor process has of its own on the host: a directory with its record, a user, a control group."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway import executors

from . import syscalls
from .cgroups import Cgroups, Limits
from .driver import Process, Shape
from .errors import Unavailable

RECORD = "process.json"
STDERR = "stderr"
_RECORD_BYTES = 4096  # a page: always the same length
# The hypervisor's own memory: heap and 64 MiB of translated code, and what grows with the guest, of which it needs a part only: page tables
# (two of 1/512 each) and the emulator's TLB (64 bytes for each page of the guest in use, in each of its modes; QEMU: cputlb.c).
_OVERHEAD_BYTES, _OVERHEAD_SHARE = 256 << 20, 16
_IO_BYTES_PER_SECOND = 128 << 20  # for each 512 MiB of the size asked for
_USERS = 4096
QUOTED_CHARACTERS = 400
_LOG_BYTES, _LOG_KEPT_BYTES = 1 << 20, 64 << 10


@dataclass(frozen=True)
class VmSandbox:
    vm: str
    uid: int
    directory: Path


class SandboxAllocator:
    def __init__(self, directory: Path, cgroups: Cgroups, first_uid: int) -> None:
        self._directory = directory
        self._cgroups = cgroups
        self._first_uid = first_uid
        self._uids: set[int] = set()
        self._numbers = itertools.count(1)

    def allocate(self, shape: Shape) -> VmSandbox:
        """Raises Unavailable, OSError; nothing is left then."""
        uid = next((uid for uid in range(self._first_uid, self._first_uid + _USERS) if uid not in self._uids), None)
        if uid is None:
            raise Unavailable(
                f"all {_USERS} user ids of hypervisors (users.first) are in use: end microVMs, or keep fewer ready (standbys)"
            )
        sandbox = VmSandbox(vm := f"{next(self._numbers)}-{secrets.token_hex(4)}", uid, self._directory / vm)
        self._uids.add(uid)
        try:
            sandbox.directory.mkdir(mode=0o700, parents=True)
            self._cgroups.create(vm, limits(shape))
        except BaseException:
            self._cgroups.remove(vm)
            shutil.rmtree(sandbox.directory, ignore_errors=True)
            self._uids.discard(uid)
            raise
        return sandbox

    def of(self, record: Process) -> VmSandbox:
        """Returns the sandbox of a process that another daemon started."""
        self._uids.add(record.uid)
        return VmSandbox(record.vm, record.uid, self._directory / record.vm)

    async def release(self, sandbox: VmSandbox) -> None:
        """Ends what is left in the control group."""
        await executors.UPKEEP.run(self._cgroups.remove, sandbox.vm)
        shutil.rmtree(sandbox.directory, ignore_errors=True)
        self._uids.discard(sandbox.uid)

    def records(self) -> list[Process]:
        """Returns every process that a daemon of this instance recorded, alive or not. Raises OSError."""
        found = []
        self._directory.mkdir(parents=True, exist_ok=True)
        for directory in sorted(self._directory.iterdir()):
            try:
                found.append(msgspec.json.decode((directory / RECORD).read_bytes(), type=Process))
            except (FileNotFoundError, NotADirectoryError, ValueError):  # any other trouble says nothing about what runs there
                self._cgroups.remove(directory.name)
                shutil.rmtree(directory, ignore_errors=True)
        return found


def save_record(directory: Path, record: Process) -> None:
    """Writes the record where a restarted daemon finds it: over the last one, in one call, since a new file takes ten times as long. A
    daemon that is killed leaves one or the other: the kernel copies within a page without a break. Raises OSError."""
    text = msgspec.json.encode(record).ljust(_RECORD_BYTES)
    if len(text) > _RECORD_BYTES:
        raise OSError(errno.EFBIG, f"the record of hypervisor {record.vm} has {len(text)} bytes")
    target = directory / RECORD
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        temporary = target.with_suffix(".new")
        temporary.write_bytes(text)
        temporary.rename(target)
        return
    try:
        os.pwrite(descriptor, text, 0)
    finally:
        os.close(descriptor)


def last_words(directory: Path) -> str:
    """Returns the end of what the hypervisor wrote on its standard error, as one line; empty when it wrote nothing."""
    try:
        with (directory / STDERR).open("rb") as file:
            file.seek(-min(4 * QUOTED_CHARACTERS, file.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines if line.strip())[-QUOTED_CHARACTERS:]
    except OSError:
        return ""


def cut(log: Path) -> None:
    """Cuts a file that a guest can have written without end, and that its writer appends to: its last lines stay. Raises OSError."""
    if log.stat().st_size <= _LOG_BYTES:
        return
    with log.open("r+b") as file:
        file.seek(-_LOG_KEPT_BYTES, os.SEEK_END)
        kept = file.read(_LOG_KEPT_BYTES)
        file.truncate(0)
    with log.open("ab") as file:
        file.write(kept[kept.find(b"\n") + 1 :])


def is_alive(record: Process) -> bool:
    return record.pid > 0 and syscalls.start_time(record.pid) == record.started


def limits(shape: Shape) -> Limits:
    """Returns a microVM's share of the host: its peak as the bound, its baseline as its weight (reference, section 4)."""
    return Limits(
        memory_bytes=(shape.memory_mib << 20) * (_OVERHEAD_SHARE + 1) // _OVERHEAD_SHARE + _OVERHEAD_BYTES,
        cpus=shape.vcpus,
        weight=max(1, shape.baseline_mib // 20),
        pids=256,
        io_bytes_per_second=_IO_BYTES_PER_SECOND * max(1, shape.baseline_mib // 512),
    )
