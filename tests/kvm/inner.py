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


# Of the service's tests those that share one instance and one image: to build is what takes an emulated processor longest.
_MAIN_PATH = tuple(
    f"tests/vm/{name}"
    for name in (
        "test_walkthrough.py::test_first_call_sees_the_guest_that_the_service_promises",
        "test_walkthrough.py::test_listener_on_loopback_only_is_reached",
        "test_walkthrough.py::test_sleep_and_wake_keep_memory_disk_clock_and_threads",
        "test_walkthrough.py::test_clones_are_strangers_to_each_other",
        "test_walkthrough.py::test_output_is_in_the_log_store",
        "test_sleep.py::test_hundred_requests_wake_it_once_and_all_are_answered",
        "test_sleep.py::test_idle_microvm_falls_asleep_and_the_next_request_wakes_it",
        "test_sleep.py::test_suspended_window_and_lifetime_end_it",
        "test_sleep.py::test_five_asleep_wake_at_once",
        "test_faults.py::test_killed_process_is_replaced_and_running_microvms_go_on",
        "test_faults.py::test_request_to_a_sleeper_while_its_waker_is_dead_is_answered",
        "test_faults.py::test_killed_in_the_middle_of_suspend_and_resume",
        "test_faults.py::test_killed_hypervisor_ends_its_session_alone",
        "test_faults.py::test_container_exit_ends_the_session_with_its_code",
    )
)
_SERVICE = (*_MAIN_PATH, "tests/vm/test_shell.py", "tests/vm/test_endpoint.py")
PARTS = {
    "drivers, Firecracker": Part((DRIVERS, "--accelerator=kvm", "--firecracker=real", "-k", "firecracker and not boots"), 900),
    "drivers, QEMU with KVM": Part((DRIVERS, "--accelerator=kvm", "-k", "not firecracker"), 1500),
    "service, Firecracker": Part((*_SERVICE, "--setting=HYPERVISOR=firecracker", "--setting=OLDEST_FIRECRACKER=1.12.1"), 2400),
    "service, QEMU with KVM": Part((*_MAIN_PATH, "--setting=HYPERVISOR=qemu", "--setting=ACCELERATOR=kvm"), 1500),
}


def prepare() -> None:
    """Instances and images are on a file system that shares blocks, as operations.md has it for Firecracker."""
    subprocess.run(["mkfs.xfs", "-q", "-f", "/dev/vdc"], check=True)
    subprocess.run(["mount", "/dev/vdc", "/var/tmp"], check=True)
    Path("/var/tmp").chmod(0o1777)
    assert Path("/dev/kvm").exists(), "no KVM"
    subprocess.run([REPO / ".venv/bin/torpor", "assets"], check=True)  # those that a host with Firecracker has


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def run(name: str, part: Part) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kvm.told", "-p", "no:cacheprovider", "-m", "vm", *part.words]
    told_to = os.dup(sys.stdout.fileno())
    environment = os.environ | {"TOLD": name, "TOLD_TO": str(told_to), "TESTS_PATIENCE": "20"}
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
