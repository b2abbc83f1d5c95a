"""This tree's tests on KVM, with QEMU and with the real Firecracker, in a machine that has both (tests/machine.py). `make test-kvm` runs it."""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inner import PARTS
from machine import Job, machine
from programs import programs
from scratch import scratch

pytestmark = [pytest.mark.vm, pytest.mark.long]
BOOT_SECONDS, SILENT_SECONDS = 300, 240
MACHINES, PANIC = 3, "Kernel panic"
WANTED = [name for name in PARTS if os.environ.get("KVM_PARTS", "") in name]  # KVM_PARTS=firecracker: those alone
WORDS = shlex.split(os.environ.get("KVM_WORDS", ""))  # for pytest(1) inside: KVM_WORDS="-k race"


@pytest.fixture(scope="module")
def told() -> dict[str, list[dict[str, Any]]]:
    """What was told of each part; they run one after the other, in one machine. QEMU's emulation of SVM loses a host's kernel now and then (it
    panics at the instructions around VMRUN, or spins on both processors): then what is left runs in another one."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WANTED}
    for _ in range(MACHINES):
        log, is_silent = in_a_machine([name for name in WANTED if not has_ended(found[name])], found)
        if all(map(has_ended, found.values())):
            break
        print(log[-6000:], flush=True)
        if PANIC not in log and not is_silent:
            break
        print(f"the emulated host {'says nothing' if is_silent else 'panicked'}: what is left runs in another machine", flush=True)
    return found


class Silence:
    """Ends the machine when it has told nothing for so long."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end, self.was_too_long = end, False
        self._timer = threading.Timer(0, lambda: None)
        self.begin(BOOT_SECONDS)

    def begin(self, seconds: float) -> None:
        self.end()
        self._timer = threading.Timer(seconds, self._too_long)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        self._timer.cancel()

    def _too_long(self) -> None:
        self.was_too_long = True
        self._end()


def has_ended(lines: list[dict[str, Any]]) -> bool:
    return bool(lines) and "ended" in lines[-1]


def in_a_machine(parts: list[str], found: dict[str, list[dict[str, Any]]]) -> tuple[str, bool]:
    """Adds what is told of these parts, but for the tests that were told of before; returns what the machine's console said, and whether it
    was ended because it told nothing any more, not even that it is there."""
    cache = Path(os.environ.get("TORPOR_CACHE", "/var/cache/torpor"))
    before = {name: [line["test"] for line in found[name]] for name in parts}
    job = Job(
        ".venv/bin/python tests/kvm/inner.py", max(PARTS[name].memory_mib for name in parts), programs(cache), first=True, room_mib=40_960,
        files={"job": json.dumps({"parts": parts, "words": WORDS, "told": before})},
    )  # fmt: skip
    with scratch(".torpor-kvm-") as directory:
        log = directory / "console.log"
        with machine(directory, cache, log, job) as (lines, end):
            silence = Silence(end)
            for line in lines:
                silence.begin(SILENT_SECONDS)
                if "beat" in line:
                    continue
                found[line["part"]].append(line)
                what = line.get("test") or f"ended with status {line['ended']}"
                print(f"{line['part']}: {line.get('outcome', '')} {what} ({line['seconds']} s)", line["error"], flush=True)
            silence.end()
        return log.read_text(errors="replace"), silence.was_too_long


@pytest.mark.parametrize("part", WANTED)
def test_under_kvm(told: dict[str, list[dict[str, Any]]], part: str) -> None:
    lines = [line for line in told[part] if "test" in line]
    counts = Counter(line["outcome"] for line in lines)
    print(f"{part}: {dict(counts)}")
    assert told[part] and told[part][-1].get("ended") == 0 and not counts["failed"], "\n\n".join(
        [f"{part} did not pass: {dict(counts)}", *(f"{line['test']}\n{line['error']}" for line in lines if line["outcome"] == "failed")]
    )
    assert counts["passed"], "nothing was tried"
