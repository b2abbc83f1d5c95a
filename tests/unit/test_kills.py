"""Root's signals reach the process that was meant, and nobody who has its number by now."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway import supervisor
from gateway.config import Devices
from gateway.status import Recorded
from vmm import syscalls
from vmm.driver import Process
from vmm.firecracker.machine import FirecrackerMachine
from vmm.qemu.process import QemuMachine


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
async def other() -> AsyncIterator[subprocess.Popen[bytes]]:
    """Who has the number afterwards."""
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process
        process.kill()


async def removed() -> None:
    pass


async def not_removed() -> None:
    raise OSError(16, "Device or resource busy")


def qemu(pid: int, directory: Path) -> QemuMachine:
    return QemuMachine(Process("vm", pid, 1, "a", 1), directory, None, removed, os.open("/dev/null", os.O_WRONLY))  # type: ignore[arg-type]


def prepared(pid: int, directory: Path) -> FirecrackerMachine:
    class Place:
        pass

    class Jail:
        root = directory

    place = Place()
    place.directory = directory  # type: ignore[attr-defined]
    return FirecrackerMachine(Process("vm", pid, 1, "a", 1), place, Jail(), None, removed, Devices(), Counter())  # type: ignore[arg-type]


def firecracker(pid: int, directory: Path) -> FirecrackerMachine:
    made = prepared(pid, directory)
    made.attach(pid)
    return made


@pytest.mark.parametrize("make", [qemu, firecracker])
async def test_a_hypervisor_that_has_ended_is_not_killed_by_number(
    make: type, living: subprocess.Popen[bytes], other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    machine = make(living.pid, tmp_path)
    await asyncio.wait_for(machine.kill(), 5)
    assert living.wait() == -signal.SIGKILL and machine.record.phase == "ended"
    machine.record.pid = other.pid
    await asyncio.wait_for(machine.kill(), 5)
    other.terminate()
    assert other.wait(5) == -signal.SIGTERM, "it was another process by then"


@pytest.mark.parametrize("make", [qemu, firecracker])
async def test_a_hypervisor_has_ended_though_something_of_it_stays(make: type, living: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A session that waits for its end would wait for ever."""
    machine = make(living.pid, tmp_path)
    machine._remove = not_removed
    await asyncio.wait_for(machine.kill(), 5)
    assert living.wait() == -signal.SIGKILL


async def test_a_hypervisor_whose_record_cannot_be_written_is_ended_all_the_same(
    living: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for one that had not been started, and ran on for nobody."""
    machine = prepared(living.pid, tmp_path)
    with monkeypatch.context() as full:
        full.setattr(machine, "save_record", not_saved)
        with pytest.raises(OSError, match="No space left"):
            machine.attach(living.pid)
    await asyncio.wait_for(machine.kill(), 5)
    assert living.poll() == -signal.SIGKILL and machine.record.phase == "ended"


def not_saved() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_earlier_supervisors_process_is_signalled_and_no_later_one(living: subprocess.Popen[bytes]) -> None:
    """Between the state file and the signal lies the whole start of an instance."""
    started = syscalls.start_time(living.pid)
    assert started is not None
    supervisor._signal(Recorded("edge-0", living.pid, started - 1, True, {}), signal.SIGKILL)
    supervisor._signal(Recorded("edge-0", living.pid, None, True, {}), signal.SIGKILL)
    supervisor._signal(Recorded("edge-0", living.pid, started, True, {}), signal.SIGTERM)
    assert living.wait(5) == -signal.SIGTERM
    supervisor._signal(Recorded("edge-0", living.pid, started, True, {}), signal.SIGTERM)  # nobody is there any more
