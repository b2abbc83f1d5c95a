"""Runs in the machine that tests/machine.py makes: tests of this tree on hypervisors that need KVM. Each test is a line of JSON on
standard output, and so is the end of each part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DRIVERS = "tests/vm/test_drivers.py"


@dataclass(frozen=True)
class Part:
    """Words for pytest(1)."""

    words: tuple[str, ...]
    seconds: int


PARTS = {
    "drivers, Firecracker": Part((DRIVERS, "--accelerator=kvm", "--firecracker=real", "-k", "firecracker and not boots"), 900),
    "drivers, QEMU with KVM": Part((DRIVERS, "--accelerator=kvm", "-k", "not firecracker"), 1200),
}


def prepare() -> None:
    """Instances and images are on a file system that shares blocks, as operations.md has it for Firecracker."""
    subprocess.run(["mkfs.xfs", "-q", "-f", "/dev/vdc"], check=True)
    subprocess.run(["mount", "/dev/vdc", "/var/tmp"], check=True)
    Path("/var/tmp").chmod(0o1777)
    assert Path("/dev/kvm").exists(), "no KVM"


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def run(name: str, part: Part) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kvm.told", "-p", "no:cacheprovider", "-m", "vm", *part.words]
    told_to = os.dup(sys.stdout.fileno())
    environment = os.environ | {"TOLD": name, "TOLD_TO": str(told_to), "TESTS_PATIENCE": "8"}
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=sys.stderr, pass_fds=[told_to]) as process:
        try:
            code = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -1
    os.close(told_to)
    tell(part=name, ended=code, seconds=round(time.monotonic() - started, 1))


def main() -> None:
    prepare()
    for name in json.loads(Path("/lent/parts").read_text(encoding="utf-8")):
        run(name, PARTS[name])


if __name__ == "__main__":
    main()
