"""Runs in the machine that tests/machine.py makes: tests of this tree on hypervisors that need KVM. Each test is a line of JSON on
standard output, and so is the end of each part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DRIVERS = "tests/vm/test_drivers.py"
_TELLING_SECONDS, _BEAT_SECONDS = 30, 20
_LARGE_MIB = 13_312  # for a guest of 8 GiB


@dataclass(frozen=True)
class Part:
    """Words for pytest(1). `seconds` are all that it may take, `each` what one test may, with what is made for it."""

    words: tuple[str, ...]
    seconds: int
    each: int = 600
    memory_mib: int = 8192  # of the machine


def _of(name: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"tests/vm/test_{name}.py::test_{test}" for test in tests)


# Of the service's tests those that share one instance and one image: to build is what takes an emulated processor longest.
_LIFE = (
    *_of(
        "walkthrough",
        "first_call_sees_the_guest_that_the_service_promises",
        "listener_on_loopback_only_is_reached",
        "sleep_and_wake_keep_memory_disk_clock_and_threads",
        "clones_are_strangers_to_each_other",
        "output_is_in_the_log_store",
    ),
    *_of(
        "sleep",
        "hundred_requests_wake_it_once_and_all_are_answered",
        "suspends_that_race_with_requests_lose_none",
        "idle_microvm_falls_asleep_and_the_next_request_wakes_it",
        "suspended_window_and_lifetime_end_it",
        "five_asleep_wake_at_once",
    ),
    *_of("herds", "ten_microvms_are_launched_at_once"),
)
_KILLS = _of(
    "faults",
    "killed_process_is_replaced_and_running_microvms_go_on",
    "request_to_a_sleeper_while_its_waker_is_dead_is_answered",
    "killed_in_the_middle_of_suspend_and_resume",
    "killed_hypervisor_ends_its_session_alone",
    "container_exit_ends_the_session_with_its_code",
)
_CLIENTS = (
    *_of("edge_operation", "http2_wakes_a_sleeping_microvm_once"),
    *_of(
        "guest_services",
        "internet_egress_reaches_the_outside_by_tcp_and_name",
        "nothing_else_is_reached",
        "a_vpc_connector_is_an_allow_list",
        "the_way_out_is_there_again_after_a_sleep",
        "credentials_need_a_token_and_are_the_roles",
        "nothing_of_the_way_out_stays",
    ),
    "tests/vm/test_endpoint.py",
    "tests/vm/test_shell.py",
)
# Those of an instance that keeps one hypervisor warm, and archives: with an image of its own.
_ASLEEP = _of(
    "warm",
    "it_wakes_in_the_same_process_and_sleeps_again",
    "a_stop_of_the_service_ends_what_is_paused",
    "what_the_other_hypervisor_made_is_refused_and_not_lost",
    "a_long_sleep_is_in_the_object_store_and_comes_back",
)
_FIRECRACKER = ("--setting=HYPERVISOR=firecracker", "--setting=OLDEST_FIRECRACKER=1.12.1")
_QEMU = ("--setting=HYPERVISOR=qemu", "--setting=ACCELERATOR=kvm")
_HOST = "tests/vm/test_kvm_of_the_host.py"
PARTS = {
    "drivers-firecracker": Part(
        (DRIVERS, _HOST, "--accelerator=kvm", "--firecracker=real", "-k", "(firecracker or of_the_host) and not boots"),
        2700,
        memory_mib=_LARGE_MIB,
    ),
    "drivers-qemu": Part((DRIVERS, "--accelerator=kvm", "-k", "not firecracker"), 2700, memory_mib=_LARGE_MIB),
    "devices": Part(("tests/vm/test_devices.py", "--accelerator=kvm", "--firecracker=real"), 1800),
    "service-firecracker": Part((*_LIFE, *_FIRECRACKER), 2700, 1200),
    "kills-firecracker": Part((*_KILLS, *_FIRECRACKER), 2700, 1200),
    "clients-firecracker": Part((*_CLIENTS, *_FIRECRACKER), 2700, 1200),
    "archive-firecracker": Part((*_ASLEEP, *_FIRECRACKER), 2400, 1200),
    "service-qemu": Part((*_LIFE, *_QEMU), 2700, 1200),
    "kills-qemu": Part((*_KILLS, *_QEMU), 2700, 1200),
    "clients-qemu": Part((*_CLIENTS, *_QEMU), 2700, 1200),
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


def run(name: str, part: Part, words: list[str], told: list[str]) -> None:
    """All of a part but those that were told of before."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kvm.told", "-p", "no:cacheprovider", "-m", "vm", *part.words, *words]
    told_to = os.dup(sys.stdout.fileno())
    environment = os.environ | {
        "TOLD": name, "TOLD_TO": str(told_to), "TOLD_SECONDS": str(part.each), "TOLD_BEFORE": json.dumps(told), "TESTS_PATIENCE": "20",
    }  # fmt: skip
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=sys.stderr, pass_fds=[told_to]) as process:
        try:
            code = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGALRM)  # the test that it is at tells where it stands (told.py)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TELLING_SECONDS)
            process.kill()
            code = -1
    os.close(told_to)
    if told and code == pytest.ExitCode.NO_TESTS_COLLECTED:
        code = 0
    kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout[-3000:] if code < 0 else ""  # memory ran out?
    tell(part=name, ended=code, seconds=round(time.monotonic() - started, 1), error=kernel)


def beat() -> None:
    """That the machine still works is told, too."""
    while True:
        tell(beat=round(time.monotonic()))
        time.sleep(_BEAT_SECONDS)


def main() -> None:
    threading.Thread(target=beat, daemon=True).start()
    prepare()
    job = json.loads(Path("/lent/job").read_text(encoding="utf-8"))
    for name in job["parts"]:
        run(name, PARTS[name], job["words"], job["told"][name])


if __name__ == "__main__":
    main()
