"""What `torpor doctor --security` reads back of a Firecracker that runs in its jailer's root: a stand-in, in the same namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from gateway.cli import security
from gateway.config import Settings
from vmm import jail, sandboxes, syscalls
from vmm.driver import Process
from vmm.qemu.process import child_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a jail is root's to make")
UID = 700_000 + 3 * 65_536 - 3
SOURCE = Path(__file__).with_name("jailed.c")
NAMESPACES = {"root": "--mount", "network": "--net", "processes": "--pid"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jailer")
    for parent in (root, *root.parents):
        if parent.stat().st_uid == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(["musl-gcc", "-static", "-idirafter", "/usr/include", "-idirafter", f"/usr/include/{os.uname().machine}-linux-gnu",
                    "-o", root / "firecracker", SOURCE], check=True, timeout=60)  # fmt: skip
    return root


@pytest.mark.parametrize(
    ("without", "named"),
    [
        ("", set()), ("root", {"root"}), ("network", {"network"}), ("calls", {"calls"}), ("chroot", {"root"}),
        ("user", {"user", "capabilities"}),
    ],
)  # fmt: skip
def test_a_wall_that_does_not_stand_around_firecracker_is_named(place: Path, tmp_path: Path, without: str, named: set[str]) -> None:
    namespaces = [word for name, word in NAMESPACES.items() if name != without]
    user = "0:0" if without == "user" else f"{UID}:{UID}"
    root, program = ("/", str(place / "firecracker")) if without == "chroot" else (str(place), "/firecracker")
    command = ["unshare", *namespaces, "--fork", "--kill-child", "chroot", f"--userspec={user}", "--groups=", root, program, without]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        pid = None
        try:
            assert process.stdout is not None and process.stdout.readline() == b"waits\n"
            pid = child_of(process.pid)
            assert pid
            settings = Settings(run=tmp_path, name="walls")
            directory = settings.runtime / "vms/1-stand-in"
            directory.mkdir(parents=True)
            sandboxes.save_record(directory, Process("1-stand-in", pid, syscalls.start_time(pid) or 0, "image", UID))
            rows = list(security.jails(settings))
            assert {name for name, ok, _ in rows if not ok} == {f"jail: {name}" for name in named}
            assert set(jail.confirmed_of_jailer(pid, UID)) < set(jail.confirmed(pid, UID)), "walls of fewer names"
        finally:
            if pid:  # another user's: unshare's end is no longer its end (PR_SET_PDEATHSIG(2const))
                os.kill(pid, signal.SIGKILL)
            process.kill()
