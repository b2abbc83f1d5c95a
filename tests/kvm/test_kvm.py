"""This tree's tests on KVM, with QEMU and with the real Firecracker, in a machine that has both (tests/machine.py). `make test-kvm` runs it."""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from inner import PARTS
from machine import Job, machine
from programs import programs
from scratch import scratch

pytestmark = [pytest.mark.vm, pytest.mark.long]
BOOT_SECONDS, SECONDS_EXTRA = 180, 120
WANTED = [name for name in PARTS if os.environ.get("KVM_PARTS", "") in name]  # KVM_PARTS=firecracker: those alone
WORDS = shlex.split(os.environ.get("KVM_WORDS", ""))  # for pytest(1) inside: KVM_WORDS="-k race"


@pytest.fixture(scope="module")
def told() -> dict[str, list[dict[str, Any]]]:
    """What was told of each part; they run one after the other, in one machine."""
    cache = Path(os.environ.get("TORPOR_CACHE", "/var/cache/torpor"))
    job = Job(
        ".venv/bin/python tests/kvm/inner.py", max(PARTS[name].memory_mib for name in WANTED), programs(cache), first=True, room_mib=40_960,
        files={"job": json.dumps({"parts": WANTED, "words": WORDS})},
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WANTED}
    with scratch(".torpor-kvm-") as directory:
        log = directory / "console.log"
        with machine(directory, cache, log, job) as (lines, end):
            timer = threading.Timer(BOOT_SECONDS + sum(PARTS[name].seconds + SECONDS_EXTRA for name in WANTED), end)
            timer.start()
            for line in lines:
                found[line["part"]].append(line)
                what = line.get("test") or f"ended with status {line['ended']}"
                print(
                    f"{line['part']}: {line.get('outcome', '')} {what} ({line['seconds']} s)",
                    line["error"] if line.get("outcome") != "skipped" else "",
                    flush=True,
                )
            timer.cancel()
        if not all(lines and "ended" in lines[-1] for lines in found.values()):
            print(log.read_text(errors="replace")[-6000:], flush=True)
    return found


@pytest.mark.parametrize("part", WANTED)
def test_under_kvm(told: dict[str, list[dict[str, Any]]], part: str) -> None:
    lines = [line for line in told[part] if "test" in line]
    counts = Counter(line["outcome"] for line in lines)
    print(f"{part}: {dict(counts)}")
    assert told[part] and told[part][-1].get("ended") == 0, "\n\n".join(
        [f"{part} did not pass: {dict(counts)}", *(f"{line['test']}\n{line['error']}" for line in lines if line["outcome"] == "failed")]
    )
    assert counts["passed"], "nothing was tried"
