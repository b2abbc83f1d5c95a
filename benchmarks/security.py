"""`make bench-security`: what each flood costs another account's session, on one service with real microVMs.

The neighbour is a small static server in a guest of its own, asked 100 times a second (asked.py) in turn without and with each flood: a
quiet window, then one under the flood, ROUNDS times. `ratio` is the flood's to the quiet windows', and of the calmest round the least of
all rounds': other work of the machine adds to either. `guest_spin`, `host_spin` and `host_disk` are no floods of the service's: a guest,
and a process beside the service, that compute or write; what they cost is the machine's, whose processors and disk everybody shares.
ROUNDS, SECONDS and ONLY (names of floods, separated by commas) may be set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from floods import FLOODS, LASTS, SECONDS, Attack, Attacker  # noqa: E402
from floor import cpu_seconds  # noqa: E402
from idle import service_processes  # noqa: E402
from outside import NAME_SERVER, outside  # noqa: E402
from report import figure, note, percentile  # noqa: E402
from service import Instance  # noqa: E402

from vmm.cgroups import Cgroups  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "2"))
ONLY = [one for one in os.environ.get("ONLY", "").split(",") if one]
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
WHO = ("generator", "attacker", "service", "neighbour")


@dataclass
class Windows:
    """Of one flood: the windows' milliseconds, how many requests had no answer, what it did, and processors used under it."""

    quiet: list[list[float]] = field(default_factory=list)
    flood: list[list[float]] = field(default_factory=list)
    failed: int = 0
    done: int = 0
    used: dict[str, list[float]] = field(default_factory=lambda: {who: [] for who in WHO})


class Bench:
    def __init__(self, instance: Instance, priority: int) -> None:
        self._instance, self._priority = instance, priority
        with tempfile.TemporaryDirectory() as work:
            self._attacker = self._launched(instance, "flood", Path(work))
            self._neighbour = self._launched(instance.other_account("neighbour"), "server", Path(work))
        self._groups = Cgroups(instance.name, instance.root)

    def _launched(self, account: Instance, program: str, work: Path) -> Attacker:
        """A microVM of the account's with one of guest/'s programs in it."""
        subprocess.run(
            ["musl-gcc", "-static", "-O2", "-Wall", "-o", str(work / program), str(REPO / f"benchmarks/guest/{program}.c")], check=True
        )  # fmt: skip
        files = {"server": (work / program).read_bytes(), "Dockerfile": (REPO / "benchmarks/guest/Dockerfile").read_bytes()}
        arn = account.create(program, account.upload(files))
        built = account.built(arn)
        assert built["buildState"] == "SUCCESSFUL", built
        vm = account.launch(arn, idlePolicy=POLICY)
        return Attacker(account, vm, account.token(vm["microvmId"]))

    def _window(self) -> tuple[list[float], int]:
        """The neighbour's milliseconds, and failures."""
        vm, ca = self._neighbour.vm, self._instance.root / "tls/ca.crt"
        script = str(Path(__file__).with_name("asked.py"))
        words = [
            "nice",
            "-n",
            str(self._priority - 19),
            sys.executable,
            script,
            vm["endpoint"],
            str(ca),
            self._neighbour.token,
            str(SECONDS),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=4 * SECONDS + 60)
        said = json.loads(done.stdout)
        return said["ms"], said["failed"]

    def _used(self, attack: Attack) -> dict[str, float]:
        """Processor seconds so far. Of groups, all that are not the neighbour's are the attacker's: its guest, its build."""
        records: dict[str, dict[str, Any]] = self._instance.hypervisors()
        mine = records[self._neighbour.vm["microvmId"]]["vm"]
        groups = {name: self._groups.cpu_seconds(name) for name in self._groups.names()}
        neighbour = groups.pop(mine)
        service = sum(cpu_seconds(pid) for pid in service_processes(self._instance))
        generator = cpu_seconds(attack.pid) if attack.pid else 0.0
        return {"generator": generator, "attacker": sum(groups.values()), "service": service, "neighbour": neighbour}

    def run(self, name: str, windows: Windows) -> None:
        quiet, failed = self._window()
        windows.quiet.append(quiet)
        with FLOODS[name](self._attacker) as attack:
            before, started = self._used(attack), os.times().elapsed
            flood, failed_then = self._window()
            seconds = os.times().elapsed - started
            after = self._used(attack)
        windows.flood.append(flood)
        windows.failed += failed + failed_then
        windows.done += attack.done
        for who in WHO:
            windows.used[who].append((after[who] - before[who]) / seconds)
        said = [f"p50 {percentile(one, 0.5):.2f} p99 {percentile(one, 0.99):.2f} ms" for one in (quiet, flood)]
        shares = ", ".join(f"{who} {windows.used[who][-1]:.2f}" for who in WHO)
        note(f"{name}: quiet {said[0]}; flood {said[1]}, {attack.done / LASTS:.0f} a second, processors: {shares}")


def report(name: str, windows: Windows) -> None:
    quiet, flood = ([one for window in found for one in window] for found in (windows.quiet, windows.flood))
    for suffix, share in (("p50", 0.5), ("p99", 0.99)):
        figure(f"neighbour_{name}_{suffix}", percentile(flood, share), "ms", "quiet", percentile(quiet, share))
    rounds = [(percentile(under, 0.99), percentile(before, 0.99)) for under, before in zip(windows.flood, windows.quiet, strict=True)]
    under, before = min(rounds, key=lambda one: one[0] / one[1])
    figure(f"neighbour_{name}_p99_calmest_round", under, "ms", "quiet", before)
    figure(f"neighbour_{name}_failed", windows.failed, "requests")
    if windows.done:
        figure(f"flood_{name}_rate", windows.done / ROUNDS / LASTS, "1/s")
    for who in WHO:
        figure(f"flood_{name}_processors_{who}", sum(windows.used[who]) / ROUNDS, "processors")


def give_way() -> int:
    """This process, where the outside of the guests is and where clients' generators come from, goes behind all others. Returns the
    priority that it had."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in os.listdir("/proc/self/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), 19)
    return before


def main() -> None:
    names = ONLY or list(FLOODS)
    seen = {name: Windows() for name in names}
    with outside() as world:
        instance = Instance(
            "bench-security", 700_000 + 8 * 262_144, LIMITS__GUEST_MIB="512", EGRESS__CLOSED="false", EGRESS__UPLINK=world.path,
            EGRESS__RESOLVERS=json.dumps([NAME_SERVER]),
        )  # fmt: skip
        try:
            instance.start()
            note("building two images")
            bench = Bench(instance, give_way())
            for _ in range(ROUNDS):
                for name in names:
                    bench.run(name, seen[name])
        finally:
            if instance.process is not None:
                instance.stop()
            instance.remove()
    for name in names:
        report(name, seen[name])


if __name__ == "__main__":
    main()
