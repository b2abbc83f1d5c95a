"""Limits and readings of control groups, the unified hierarchy or version 1, behind one class.

Groups are `torpor-INSTANCE/NAME` under each controller that is there; a controller that is missing is left out (and
`torpor doctor` says so). Nothing requires memory.high, PSI or systemd.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from gateway.observe.room import existing

ROOT = Path("/sys/fs/cgroup")
_V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "blkio", "pids")
_V2_CONTROLLERS = ("memory", "cpu", "io", "pids")
_REMOVE_SECONDS = 5


@dataclass(frozen=True)
class Limits:
    """What a group may use. CPUs in whole processors, weight 1 to 10,000 (100 is the middle)."""

    memory_bytes: int
    cpus: float
    weight: int
    pids: int
    io_bytes_per_second: int


class Cgroups:
    """All groups of one instance."""

    def __init__(self, instance: str, storage: Path) -> None:
        """`storage` lies on the disk whose bandwidth is limited."""
        self._name = f"torpor-{instance}"
        self._disk = disk_number(storage)
        self.unified = (ROOT / "cgroup.controllers").exists() and "memory" in (ROOT / "cgroup.controllers").read_text(
            encoding="ascii"
        ).split()
        if self.unified:
            self._bases = {"": ROOT / self._name}
        else:
            self._bases = {
                controller: ROOT / controller / self._name
                for controller in _V1_CONTROLLERS
                if (ROOT / controller / "cgroup.procs").exists()
            }

    @property
    def missing(self) -> list[str]:
        """Controllers that this host does not offer."""
        if self.unified:
            offered = (ROOT / "cgroup.controllers").read_text(encoding="ascii").split()
            return [name for name in _V2_CONTROLLERS if name not in offered]
        return [name for name in _V1_CONTROLLERS if name not in self._bases]

    def start(self) -> None:
        for base in self._bases.values():
            base.mkdir(exist_ok=True)
        if self.unified:
            wanted = " ".join(f"+{name}" for name in _V2_CONTROLLERS if name not in self.missing)
            for directory in (ROOT, ROOT / self._name):
                with contextlib.suppress(OSError):
                    (directory / "cgroup.subtree_control").write_text(wanted, encoding="ascii")

    def create(self, name: str, limits: Limits | None = None) -> None:
        for base in self._bases.values():
            (base / name).mkdir(exist_ok=True)
        if limits is not None:
            for controller, file, value in self._settings(limits):
                where = self._bases.get("" if self.unified else controller)
                if where is not None and (where / name / file).exists():
                    (where / name / file).write_text(value, encoding="ascii")

    def _settings(self, limits: Limits) -> list[tuple[str, str, str]]:
        period = 100_000
        quota, bps = int(limits.cpus * period), limits.io_bytes_per_second
        if self.unified:
            return [
                ("memory", "memory.max", str(limits.memory_bytes)),
                ("cpu", "cpu.max", f"{quota} {period}"),
                ("cpu", "cpu.weight", str(limits.weight)),
                ("pids", "pids.max", str(limits.pids)),
                *([("io", "io.max", f"{self._disk} rbps={bps} wbps={bps}")] if self._disk else []),
            ]
        return [
            ("memory", "memory.limit_in_bytes", str(limits.memory_bytes)),
            ("cpu", "cpu.cfs_period_us", str(period)),
            ("cpu", "cpu.cfs_quota_us", str(quota)),
            ("cpu", "cpu.shares", str(max(2, limits.weight * 1024 // 100))),
            ("pids", "pids.max", str(limits.pids)),
            *(("blkio", f"blkio.throttle.{way}_bps_device", f"{self._disk} {bps}") for way in ("read", "write") if self._disk),
        ]

    def joins(self, name: str) -> list[Path]:
        """The files into which a process writes its id to become a member."""
        return [base / name / "cgroup.procs" for base in self._bases.values()]

    def relative(self, name: str) -> str:
        """The group's path below a hierarchy's root."""
        return f"{self._name}/{name}"

    def processes(self, name: str) -> list[int]:
        for file in self.joins(name):
            with contextlib.suppress(OSError):
                return [int(line) for line in file.read_text(encoding="ascii").split()]
        return []

    def memory_bytes(self, name: str) -> int:
        """What the group's members hold in memory, 0 when unknown."""
        base = self._bases.get("" if self.unified else "memory")
        file = "memory.current" if self.unified else "memory.usage_in_bytes"
        with contextlib.suppress(OSError, ValueError):
            if base is not None:
                return int((base / name / file).read_text(encoding="ascii"))
        return 0

    def oom_kills(self, name: str) -> int:
        """How many of the group's processes the kernel killed for want of memory, 0 when unknown."""
        base = self._bases.get("" if self.unified else "memory")
        file = "memory.events" if self.unified else "memory.oom_control"
        with contextlib.suppress(OSError, ValueError):
            if base is not None:
                lines = (base / name / file).read_text(encoding="ascii").splitlines()
                return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        return 0

    def cpu_seconds(self, name: str) -> float:
        """Processor time that the group has used."""
        with contextlib.suppress(OSError, ValueError):
            if self.unified:
                lines = (self._bases[""] / name / "cpu.stat").read_text(encoding="ascii").splitlines()
                return int(lines[0].split()[1]) / 1e6
            if "cpuacct" in self._bases:
                return int((self._bases["cpuacct"] / name / "cpuacct.usage").read_text(encoding="ascii")) / 1e9
        return 0.0

    def names(self) -> list[str]:
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                return [entry.name for entry in base.iterdir() if entry.is_dir()]
        return []

    def remove(self, name: str) -> None:
        """Ends what is left in the group and removes it."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for base in self._bases.values():
            group = base / name
            while group.exists():
                try:
                    group.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        break
                    for pid in self.processes(name):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    time.sleep(0.002)

    def close(self) -> None:
        """Removes every group of the instance."""
        for name in self.names():
            self.remove(name)
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                base.rmdir()


def disk_number(path: Path) -> str | None:
    """MAJOR:MINOR of the whole disk under a path, which need not be there yet; None where there is none (overlayfs, network, tmpfs)."""
    device = os.stat(existing(path)).st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        return None
    if (entry / "partition").exists():
        entry = entry.resolve().parent
    return (entry / "dev").read_text(encoding="ascii").strip()
