"""A guest can use all the memory that it sees, in whatever way, in any clone of its image, asleep and awake; and the host has of it, when
the clone is gone, what it had before."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from service import Instance, until
from wire import Answer, get

from vmm.cgroups import Cgroups

pytestmark = pytest.mark.vm

SOURCES = Path(__file__).parents[1] / "memory"
IDLE = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
ROLE = "arn:aws:iam::123456789012:role/test"
CLONES = 5
MIB = 1 << 20


@dataclass
class Held:
    """What the host keeps for an image: bytes in its memory's file, and in its control group."""

    file: int
    group: int


class Guests:
    """MicroVMs of one image whose application holds memory (tests/memory/hold.c), one at a time."""

    def __init__(self, instance: Instance, arn: str) -> None:
        self.instance, self.arn = instance, arn

    def launched(self) -> Guest:
        return Guest(self.instance, self.instance.launch(self.arn, idlePolicy=IDLE, executionRoleArn=ROLE))


class Guest:
    def __init__(self, instance: Instance, vm: dict[str, Any]) -> None:
        self.instance, self.id, self.endpoint = instance, str(vm["microvmId"]), str(vm["endpoint"])
        self.token = instance.token(self.id)

    def request(self, path: str) -> Answer:
        return get(self.endpoint, self.instance.root / "tls/ca.crt", self.token, path, timeout=240.0)

    def ask(self, path: str) -> str:
        """Again where the answer says so: gigabytes may take longer to read than a request is held (edge.hold_seconds)."""
        deadline = time.monotonic() + 240
        while (answer := self.request(path)).status == 502 and "retry-after" in answer.fields and time.monotonic() < deadline:
            time.sleep(float(answer.fields["retry-after"]))
        if answer.status != 200:
            print(self.instance.describe(self.id), self.instance.log.read_text()[-6000:])
        assert answer.status == 200, (path, answer.status)
        return answer.body.decode()

    def hold(self, kind: str, percent: int) -> None:
        answer = self.ask(f"/hold/{kind}/{percent}")
        assert answer.startswith("held "), answer

    def sleep(self) -> None:
        self.instance.client().suspend_microvm(microvmIdentifier=self.id)
        self.instance.state(self.id, "SUSPENDED", seconds=120)

    def end(self) -> None:
        self.instance.terminate(self.id)

    @property
    def record(self) -> dict[str, Any]:
        return self.instance.hypervisors()[self.id]

    def image(self) -> Held:
        """As the hypervisor that runs this guest shows it."""
        name = f"/memfd:torpor-{self.record['image']} "
        entry = next(entry for entry in Path(f"/proc/{self.record['pid']}/fd").iterdir() if os.readlink(entry).startswith(name))
        return Held(entry.stat().st_blocks * 512, group_memory(self.instance, f"image-{self.record['image']}"))


def group_memory(instance: Instance, name: str) -> int:
    """Wherever its group lies: below the hierarchy's root, or in a scope of systemd's (vmm/cgroups.py)."""
    base = Cgroups(instance.name, instance.root)
    files = [path.with_name(file) for path in base.joins(name) for file in ("memory.current", "memory.usage_in_bytes")]
    return int(next(file for file in files if file.exists()).read_text())


@pytest.fixture(scope="module")
def program() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "hold"
        subprocess.run(["musl-gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", made, SOURCES / "hold.c"], check=True)
        yield made.read_bytes()


@pytest.fixture(scope="module")
def guests(instance: Instance, program: bytes) -> Iterator[Callable[[int], Guests]]:
    """Of the image in one size, built when it is asked for first."""
    uri = instance.upload({"Dockerfile": (SOURCES / "Dockerfile").read_bytes(), "hold": program}, "hold.zip")
    made: dict[int, str] = {}

    def of(size: int) -> Guests:
        if size not in made:
            made[size] = instance.create(f"hold-{size}", uri, resources=[{"minimumMemoryInMiB": size}])
            build = instance.built(made[size], seconds=240)
            assert build["buildState"] == "SUCCESSFUL", build
        return Guests(instance, made[size])

    yield of
    for arn in made.values():
        instance.client().delete_microvm_image(imageIdentifier=arn)


def used_up(guest: Guest, kind: str, sleeps: bool) -> None:
    """The guest takes 95 % of its memory and has it, whole, also after a sleep."""
    before = guest.image()
    guest.hold(kind, 95)
    if sleeps:
        guest.sleep()
    assert guest.ask("/check") == "whole"
    after = guest.image()
    assert after.file == before.file, "the image's memory on the host has grown by what a clone wrote"
    assert after.group <= before.group + MIB
    assert guest.ask("/free") == "freed"


# In the first clone of an image and in the fifth: what is held, and whether over a sleep.
SHORT = {1: [("process", True)], CLONES: [("tmpfs", True), ("file", False)]}
SHORTER = {1: [("process", True)], CLONES: [("file", False)]}
ALL = {number: [(kind, True) for kind in ("process", "tmpfs", "file")] for number in (1, CLONES)}
AWAKE = {1: [(kind, False) for kind in ("process", "tmpfs", "file")]}


@pytest.mark.parametrize(
    ("size", "uses"),
    [
        (512, SHORT),
        (1024, SHORTER),
        *(pytest.param(size, ALL, marks=pytest.mark.long) for size in (512, 1024, 2048)),
        pytest.param(4096, AWAKE, marks=pytest.mark.long),
    ],
)
def test_a_guest_uses_all_its_memory(guests: Callable[[int], Guests], size: int, uses: dict[int, list[tuple[str, bool]]]) -> None:
    pool, seen = guests(size), set()
    for number in range(1, max(uses) + 1):
        guest = pool.launched()
        try:
            seen.add(guest.image().file)
            for kind, sleeps in uses.get(number, ()):
                used_up(guest, kind, sleeps)
        finally:
            guest.end()
    assert len(seen) == 1, "what clones wrote has stayed on the host when they were gone"


def test_a_guest_that_runs_out_of_memory_kills_a_process_and_says_so(guests: Callable[[int], Guests], instance: Instance) -> None:
    guest = guests(512).launched()
    counted = killed_so_far(instance)
    try:
        assert guest.ask("/hold/process/120").startswith("killed 9 ")
        assert guest.ask("/available").endswith(" MiB"), "the application answers on"
        found = until(lambda: lines(guest))
        assert len(found) == 1 and re.fullmatch(r"torpor: out of memory: the guest's kernel killed hold, which held 1\d\d\d MiB", found[0])
        assert killed_so_far(instance) == counted + 1
        assert guest.request("/hold/self/120").status == 502, "it is the application itself that is killed now"
        ended = instance.state(guest.id, "TERMINATED")
        assert "137" in ended["stateReason"], ended
        assert len(until(lambda: lines(guest)[1:])) == 1
    finally:
        guest.end()


def lines(guest: Guest) -> list[str]:
    shown = guest.instance.command("torpor", "logs", guest.id).stdout.splitlines()
    return [line for line in shown if "out of memory" in line]


def killed_so_far(instance: Instance) -> float:
    port = instance.environment["TORPOR_API__METRICS_PORT"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(r"^torpor_out_of_memory_total (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
