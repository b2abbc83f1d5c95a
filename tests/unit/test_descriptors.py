"""Descriptors: how many are left, who may take the last ones, and what doctor says of their limit."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway import messages as m
from gateway.config import Settings
from gateway.observe import room
from gateway.rpc import Connection
from gateway.sessions import room as admission
from gateway.tasks import Tasks

REPO = Path(__file__).resolve().parents[2]

LIMITED = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from gateway.observe import room
free = room.descriptors_free()
held = [os.dup(0) for _ in range(10)]
assert room.descriptors_free() == free - 10, (free, room.descriptors_free())
while room.descriptors_free():
    held.append(os.dup(0))
print(len(held) == free, room.descriptors_kept())
"""


def test_how_many_are_left_is_known_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=30, cwd=REPO, check=False)
    assert done.stdout == "True 16\n", done.stderr


async def test_a_launch_is_refused_by_vmm_where_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway import messages as m
    from vmm.errors import Unavailable
    from vmm.rpc import sessions
    from vmm.vms import VmRegistry

    monkeypatch.setattr(sessions, "descriptors_free", lambda: 100)
    connection: Connection = None  # type: ignore[assignment]
    nobody: Any = None
    calls = sessions.SessionCalls(Path("/images"), nobody, nobody, nobody, nobody, VmRegistry(nobody, nobody), nobody, nobody)
    with pytest.raises(Unavailable, match="100 descriptors are free, 256 are kept for resumes"):
        await calls.rpc_prepare(connection, m.PrepareRequest("s", 1, "image", False))


@pytest.mark.parametrize("whose", ["control's", "vmm's"])
async def test_control_refuses_a_launch_and_no_resume_where_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    kept = room.descriptors_kept()

    class Host:
        def free(self) -> tuple[int, int, int]:
            return 1 << 40, 1 << 40, 1 << 40

        async def reclaim_capacity(self) -> m.Capacity:
            return m.Capacity(1 << 40, 1 << 40, 1 << 40, 1, descriptors_free=kept + 5 if whose == "vmm's" else 1 << 20)

    if whose == "control's":
        monkeypatch.setattr(admission, "descriptors_free", lambda: kept + 5)
    one = admission.Room(Host(), config.Limits(), Tasks())  # type: ignore[arg-type]
    await one._ask()
    assert not await one.take(is_new=True)
    assert one.lack.startswith(f"descriptors: {kept + 5} are free") and "LimitNOFILE" in one.lack
    assert await one.take(), "what sleeps may wake"


@pytest.mark.parametrize(("limit", "is_enough"), [(1024, False), (65_536, True)])
def test_doctor_checks_the_limit_against_the_need(monkeypatch: pytest.MonkeyPatch, limit: int, is_enough: bool) -> None:
    from gateway.cli import host

    monkeypatch.setattr(host, "allow_descriptors", lambda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    ok, text = host._descriptors(Settings(), "qemu")
    assert ok is is_enough and str(limit) in text


def test_every_process_has_as_many_as_it_may(tmp_path: Path) -> None:
    from gateway.process import SETTINGS_VARIABLE, passed

    child = "import resource\nfrom gateway import process\nasync def main(settings): print(*resource.getrlimit(resource.RLIMIT_NOFILE))\nprocess.run('test', main)"
    with passed(Settings(root=tmp_path)) as number:
        done = subprocess.run(
            ["prlimit", "--nofile=256:9000", sys.executable, "-c", child], env={SETTINGS_VARIABLE: str(number), "PATH": os.environ["PATH"]},
            capture_output=True, text=True, timeout=60, cwd=REPO, pass_fds=[number], check=False,
        )  # fmt: skip
    assert done.stdout in ("9000 9000\n", f"{room._MOST_DESCRIPTORS} {room._MOST_DESCRIPTORS}\n"), done.stderr
