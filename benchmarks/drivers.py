"""`make bench-drivers`: QEMU and Firecracker under KVM, and Firecracker by hand, interleaved, in the machine of `make test-kvm`.

Its processor is emulated, and KVM in it too: absolute times mean nothing there, and ratios are of sequences that spend their time in the
same places. Launch and resume end with the first byte of a small server's answer; a suspend with its snapshot on the disk.
ROUNDS may be set.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests/kvm")]

from report import note  # noqa: E402
from scratch import scratch  # noqa: E402

machine, programs = (importlib.import_module(name) for name in ("machine", "programs"))  # tests, which are not checked for types

SECONDS = float(os.environ.get("BENCH_SECONDS", "1700"))
# As tests/kvm/inner.py has it.
SET_UP = "mkfs.xfs -q -f /dev/vdc && mount /dev/vdc /var/tmp && chmod 1777 /var/tmp && .venv/bin/torpor assets >&2"


def main() -> int:
    cache = Path(os.environ.get("TORPOR_CACHE", "/var/cache/torpor"))
    rounds = os.environ.get("ROUNDS", "7")
    command = f"sh -c '{SET_UP} && ROUNDS={rounds} exec .venv/bin/python benchmarks/drivers_host.py'"
    job = machine.Job(command, 7168, programs.programs(cache), first=True, room_mib=16_384)
    count = 0
    with scratch(".torpor-bench-") as directory:
        log = directory / "console.log"
        with machine.machine(directory, cache, log, job) as (lines, end):
            timer = threading.Timer(SECONDS, end)
            timer.start()
            for line in lines:
                count += 1
                print(json.dumps(line), flush=True)
            timer.cancel()
        note(log.read_text(errors="replace")[-6000:])
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
