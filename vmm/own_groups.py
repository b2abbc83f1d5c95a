"""Memory control groups of the service's own processes, each in one with all that it starts: where it takes more than its bound, the kernel
ends a process of that group and no other.

They lie in `torpor-INSTANCE.own`, beside the microVMs' (vmm/cgroups.py): of version 1 below the memory controller's root, in the unified
hierarchy below the group that was delegated to this process, or its root where systemd does not run. Nobody leaves a group that is bounded
for one that is not. Where none can be made, `why_not` says why, and what bounds these processes is RLIMIT_DATA (gateway/own_walls.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from . import cgroups

_REMOVE_SECONDS = 2.0
_UNBOUNDED = 1 << 62  # what version 1 says of a group without a bound is a number of that size
_PREFIX, _SUFFIX = "torpor-", ".own"


class OwnGroups:
    def __init__(self, instance: str) -> None:
        name = f"{_PREFIX}{instance}{_SUFFIX}"
        root = cgroups.ROOT
        self._is_unified = cgroups.offers(root, "memory")
        if self._is_unified:
            self._base = cgroups.delegated() / name
            self._file, own = "memory.max", cgroups.own_group()
            is_refused = cgroups.SYSTEMD.is_dir() and self._base.parent == root
            self.why_not = "systemd delegates no control group to the service (Delegate=)" if is_refused else ""
        else:
            self._base = root / "memory" / name
            self._file, own = "memory.limit_in_bytes", root / "memory" / _own_v1()
            self.why_not = "" if (root / "memory/cgroup.procs").exists() else "there is no memory controller"
        if not self.why_not and (bounded := next((one for one in _up_to(own, self._base.parent) if self._is_bounded(one)), None)):
            self.why_not = f"the service is in {bounded}, which has a bound of its own"

    def _is_bounded(self, group: Path) -> bool:
        try:
            text = (group / self._file).read_text(encoding="ascii").strip()
        except OSError:
            return False
        return text != "max" and int(text) < _UNBOUNDED

    def enter(self, name: str, memory_bytes: int) -> list[str]:
        """Makes the group and returns what stands before a command that is to run in it, with all that it starts. Raises OSError."""
        self._base.mkdir(exist_ok=True)
        if self._is_unified:
            for directory in (self._base.parent, self._base):
                cgroups.limit_children(directory, ["memory"], is_ours=directory == self._base)
        group = self._base / name
        group.mkdir(exist_ok=True)
        (group / self._file).write_text(str(memory_bytes), encoding="ascii")
        return cgroups.join([group / "cgroup.procs"])

    def holding(self) -> bool:
        """Whether there is a process in any of them."""
        return any(self._processes(group) for group in self._groups())

    def are_left(self) -> bool:
        return self._base.exists() and not self.holding()

    def remove(self) -> None:
        """Removes those in which there is no process any more; it ends none."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for group in [*self._groups(), self._base]:
            while True:
                try:
                    group.rmdir()
                except FileNotFoundError:
                    break
                except OSError:  # one that has just ended may still be counted
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.005)
                else:
                    break

    def _groups(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from sorted(path for path in self._base.iterdir() if path.is_dir())

    @staticmethod
    def _processes(group: Path) -> list[str]:
        try:
            return (group / "cgroup.procs").read_text(encoding="ascii").split()
        except OSError:
            return []


def _own_v1() -> str:
    """Returns this process's group of the memory controller (cgroups(7), /proc/PID/cgroup)."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path.lstrip("/")
    return ""


def _up_to(group: Path, top: Path) -> Iterator[Path]:
    """A group and those above it, below `top`."""
    while group != top and group.is_relative_to(top):
        yield group
        group = group.parent
