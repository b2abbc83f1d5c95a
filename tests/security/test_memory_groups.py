"""Memory of the service's own processes: one that takes too much is ended, alone, and started again. Real processes and control groups."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from gateway.children import Child, Process
from gateway.config import Settings
from gateway.supervisor import Supervisor
from vmm import leftovers
from vmm.own_groups import OwnGroups

NAME = f"groups-{os.getpid()}"
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or bool(OwnGroups(NAME).why_not), reason="no memory control group can be made here")
# When told to, it takes 256 MiB of what RLIMIT_DATA does not count: memory that it could share (mmap(2), MAP_SHARED).
STAND_IN = """
import mmap, os, pathlib, resource, signal, sys
resource.setrlimit(resource.RLIMIT_DATA, (64 << 20, 64 << 20))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.write(int(os.environ["TORPOR_PROCESS_READY"]), b"1")
signal.sigwait({signal.SIGUSR1})
taken = mmap.mmap(-1, 256 << 20)
for at in range(0, len(taken), 4096):
    taken[at] = 1
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Supervisor]:
    settings = Settings.model_validate({"root": tmp_path / "root", "run": tmp_path / "run", "name": NAME, "service": {"memory_mib": 64}})
    settings.runtime.mkdir(parents=True)
    made = Supervisor(settings)
    made._children = [Child(f"edge-{slot}", [sys.executable, "-c", STAND_IN, str(tmp_path / "taken")], 0) for slot in range(2)]
    try:
        for child in made._children:
            await made._processes.start(child)
        yield made
    finally:
        await made.stop_started()


def serving(child: Child) -> Process:
    assert child.serving is not None
    return child.serving


def group_of(process: Process) -> str:
    return Path(f"/proc/{process.pid}/cgroup").read_text()


async def test_one_that_takes_too_much_is_ended_alone_and_started_again(one: Supervisor, tmp_path: Path) -> None:
    eater, neighbour = one._children
    first, other = serving(eater), serving(neighbour)
    assert f"torpor-{NAME}.own/edge-0" in group_of(first) and f"torpor-{NAME}.own/edge-1" in group_of(other)
    first.send_signal(signal.SIGUSR1)
    second = await until(lambda: eater.serving if eater.serving is not first and eater.serves else None, 20)
    assert first.returncode == -signal.SIGKILL and not (tmp_path / "taken").exists()
    assert f"torpor-{NAME}.own/edge-0" in group_of(second) and neighbour.serving is other and other.returncode is None

    one._groups.why_not = "taken away"
    await one._processes.start(eater)
    third = serving(eater)
    assert f"torpor-{NAME}.own" not in group_of(third)
    third.send_signal(signal.SIGUSR1)
    await until((tmp_path / "taken").exists, 20)  # it goes on, with four times its bound
    assert third.returncode is None


async def test_nothing_is_left_at_a_stop_and_of_a_crash_it_is_found(one: Supervisor) -> None:
    settings = one._settings
    assert OwnGroups(NAME).holding() and not leftovers.find(settings, [], [])
    base = one._groups._base
    await one.stop_started()
    assert not base.exists()

    OwnGroups(NAME).enter("control", 64 << 20)  # as after the end of all by a signal
    (left,) = leftovers.find(settings, [], [])
    leftovers.mend(settings, left)
    assert not base.exists() and not leftovers.find(settings, [], [])


async def test_where_no_group_can_be_made_a_process_starts_without(one: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: OwnGroups, name: str, memory_bytes: int) -> list[str]:
        raise OSError("read-only file system")

    monkeypatch.setattr(OwnGroups, "enter", refused)
    child = one._children[0]
    before = serving(child)
    await one._processes.start(child)
    assert serving(child) is not before and f"torpor-{NAME}.own" not in group_of(serving(child))
