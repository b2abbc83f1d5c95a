"""`make bench-idle`: what 1,000 suspended sessions cost: processes, namespaces, processor time, memory, disk.

Real sessions of the small server, launched, asked and suspended, beside the same service with a few. A session that sleeps has a row,
its files, and nothing else. SESSIONS and SECONDS may be set.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from floor import cpu_seconds
from lifecycle import Bench
from report import figure, note, percentile
from service import Instance, until

SESSIONS = int(os.environ.get("SESSIONS", "1000"))
SECONDS = float(os.environ.get("SECONDS", "20"))
FEW, AT_ONCE, ROUNDS = 20, 4, 15
_QUIET_SECONDS = 140.0  # what is kept ready is sized by the use of the last two minutes


class Cost(NamedTuple):
    hypervisors: int
    namespaces: int
    cpu: float  # milliseconds a second
    memory: float  # KiB, each shared page in equal parts
    disk: float  # KiB


def service_processes(instance: Instance) -> list[int]:
    """The supervisor and all that it started, without hypervisors."""
    assert instance.process is not None
    found, waiting = [], [instance.process.pid]
    while waiting:
        pid = waiting.pop()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"python" in command.split(b"\0")[0]:
            found.append(pid)
            waiting += [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found


def memory_kib(pids: list[int]) -> int:
    found = [re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE) for pid in pids]
    return sum(int(one[1]) for one in found if one)


def cost(bench: Bench) -> Cost:
    time.sleep(_QUIET_SECONDS)
    pids = service_processes(bench.instance)
    before, started = sum(map(cpu_seconds, pids)), time.perf_counter()
    time.sleep(SECONDS)
    used = (sum(map(cpu_seconds, pids)) - before) / (time.perf_counter() - started)
    run = bench.instance.run / bench.instance.name
    disk = sum(path.stat().st_blocks for path in (bench.instance.root / "sessions").rglob("*")) / 2
    return Cost(len(list((run / "vms").iterdir())), len(list((run / "netns").iterdir())), used * 1e3, memory_kib(pids), disk)


def sleeping(bench: Bench) -> dict[str, Any]:
    vm = dict(bench.launch())
    bench.api.suspend_microvm(microvmIdentifier=vm["microvmId"])
    bench.instance.state(vm["microvmId"], "SUSPENDED")
    return vm


def asleep(bench: Bench, count: int) -> list[dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        vms = list(threads.map(lambda _: sleeping(bench), range(count)))
    until(lambda: not set(bench.instance.hypervisors()) & {vm["microvmId"] for vm in vms})
    return vms


def resumes(bench: Bench, vm: dict[str, Any]) -> float:
    seen = []
    for _ in range(ROUNDS):
        seen.append(bench.first_byte(vm) * 1e3)
        bench.suspend(vm)
    return percentile(seen, 0.5)


def main() -> None:
    bench = Bench(512, 700_000 + 3 * 262_144)
    try:
        note("building the image")
        bench.start()
        first = asleep(bench, FEW)
        few_ms, few = resumes(bench, first[0]), cost(bench)
        note(f"{FEW} sleep: {few}; launching {SESSIONS - FEW} more")
        asleep(bench, SESSIONS - FEW)
        many_ms, many = resumes(bench, first[0]), cost(bench)
        note(f"{SESSIONS} sleep: {many}")
        more, name = SESSIONS - FEW, f"idle_{SESSIONS}"
        figure(f"{name}_hypervisors", many.hypervisors, "processes", f"idle_{FEW}", few.hypervisors)
        figure(f"{name}_namespaces", many.namespaces, "namespaces", f"idle_{FEW}", few.namespaces)
        figure(f"{name}_cpu", many.cpu, "ms/s", f"idle_{FEW}", few.cpu)
        figure(f"{name}_memory_each", (many.memory - few.memory) / more, "KiB")
        figure(f"{name}_disk_each", (many.disk - few.disk) / more, "KiB")
        figure(f"{name}_resume", many_ms, "ms", f"idle_{FEW}", few_ms)
    finally:
        bench.close()


if __name__ == "__main__":
    main()
