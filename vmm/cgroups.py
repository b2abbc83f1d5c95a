"""Limits and readings of control groups, the unified hierarchy or version 1, behind one class.

Of version 1, groups are `torpor-INSTANCE/NAME` under each controller that is there. In the unified hierarchy they lie where they are
ours to make (systemd: CGROUP_DELEGATION): where systemd runs, in a scope of the instance's own beside the service's unit, so that the
unit's end is not theirs; else below a group that was delegated to this process; else below the hierarchy's root. A controller that the
kernel does not offer is left out, and `torpor doctor` says so; one that is offered and cannot limit is an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway.observe.room import existing

from .errors import VmmError

ROOT = Path("/sys/fs/cgroup")
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_SLICE = "system.slice"
_HOLDER = "holder"  # the group of a process that keeps the scope while no microVM is in it
_OTHERS = "others"  # … of what was in a delegated group: one whose children have limits may hold no process (cgroups(7))
_SCOPE_SECONDS = 10.0
# For /bin/sh: $1… files of groups up to "--", then a command, which runs in these groups with all that it starts.
_JOIN = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 1; shift; done; shift; exec "$@"'
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


class NotLimited(VmmError):
    """Control groups cannot limit what they have to."""


class Cgroups:
    """All groups of one instance."""

    def __init__(self, instance: str, storage: Path) -> None:
        """`storage` lies on the disk whose bandwidth is limited."""
        self._name = f"torpor-{instance}"
        self._disk = disk_number(storage)
        self.unified = offers(ROOT, "memory")
        self._scope = f"{self._name}-microvms.scope" if self.unified and SYSTEMD.is_dir() else ""
        if self._scope:
            self._bases = {"": ROOT / _SLICE / self._scope}
        elif self.unified:
            self._bases = {"": delegated() / self._name}
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

    @property
    def unlimited_disk(self) -> bool:
        """Whether what the instance writes lies on no disk whose bandwidth a group can be given a part of."""
        return self._disk is None

    def problems(self) -> list[str]:
        """Why limits cannot be set although the kernel offers them. Before a start it is what can be known without one."""
        if not self.unified:
            return [
                f"{controller}: {base.parent} is mounted read-only" for controller, base in self._bases.items() if _is_sealed(base.parent)
            ]
        base = self._bases[""]
        if not base.exists():
            return [f"{base.parent} is mounted read-only"] if _is_sealed(existing(base)) else []
        enabled = (base / "cgroup.subtree_control").read_text(encoding="ascii").split()
        return [f"{name} is not enabled in {base}" for name in _V2_CONTROLLERS if name not in self.missing and name not in enabled]

    def start(self) -> None:
        """Makes the groups' places. Raises NotLimited."""
        try:
            if self._scope:
                self._hold_scope()
            for base in self._bases.values():
                base.mkdir(exist_ok=True)
            if self.unified:
                self._enable(self._bases[""])
        except (OSError, subprocess.SubprocessError) as error:
            raise NotLimited(f"control groups cannot be made: {error}: see `torpor doctor`") from error

    def _hold_scope(self) -> None:
        """Has a process in the scope, in which systemd makes it where there is none, or an empty one."""
        base = self._bases[""]
        deadline, holder = time.monotonic() + _SCOPE_SECONDS, None
        while not self._held(base):
            if time.monotonic() > deadline:
                raise OSError(f"systemd made no {self._scope} within {_SCOPE_SECONDS:g} s")
            if holder is None or holder.poll() is not None:  # systemd refuses while the scope of before ends
                holder = subprocess.Popen(
                    self._holder(base), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
                )  # fmt: skip
            time.sleep(0.01)

    def _holder(self, base: Path) -> list[str]:
        """Returns the command that holds the scope. systemd makes none beside one in which microVMs run. It ends after the service's unit,
        whose stop suspends what is in it (systemd.scope(5), systemd-run(1))."""
        if _is_populated(base):
            (base / _HOLDER).mkdir(exist_ok=True)
            return [*join([base / _HOLDER / "cgroup.procs"]), "sleep", "infinity"]
        unit = next((part for part in reversed(own_group().parts) if part.endswith(".service")), "")
        return [
            "systemd-run", "--scope", "--quiet", "--collect", f"--unit={self._scope}", f"--slice={_SLICE}", "-p", "Delegate=yes",
            "-p", "TasksMax=infinity", *(["-p", f"Before={unit}"] if unit else []), "sleep", "infinity",
        ]  # fmt: skip

    def _held(self, base: Path) -> bool:
        """Whether a process holds the scope; it is in a group of its own then."""
        try:
            if (base / _HOLDER / "cgroup.procs").exists() and (base / _HOLDER / "cgroup.procs").read_text(encoding="ascii").split():
                return True
            holders = (base / "cgroup.procs").read_text(encoding="ascii").split()
        except FileNotFoundError:
            return False
        if not holders:
            return False
        _move(holders, base / _HOLDER)
        return True

    def _enable(self, base: Path) -> None:
        """Has the children of `base` limited by every controller that is offered. Raises OSError."""
        wanted = [name for name in _V2_CONTROLLERS if name not in self.missing]
        for directory in (base,) if self._scope else (base.parent, base):
            limit_children(directory, wanted, is_ours=directory == base)

    def create(self, name: str, limits: Limits | None = None) -> None:
        """Raises NotLimited."""
        file = Path()
        try:
            for base in self._bases.values():
                self._make(base / name)
            for controller, setting, value in self._settings(limits) if limits is not None else ():
                where = self._bases.get("" if self.unified else controller)
                if where is not None and controller not in self.missing:
                    file = where / name / setting
                    file.write_text(value, encoding="ascii")
        except OSError as error:
            raise NotLimited(f"a control group's limit could not be set: {error.filename or file}: {error.strerror}") from error

    def _make(self, group: Path) -> None:
        """Also where the instance's place is gone: a scope ends with its last process. Raises NotLimited, OSError."""
        try:
            group.mkdir(exist_ok=True)
        except FileNotFoundError:
            self.start()
            group.mkdir(exist_ok=True)

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

    def enter(self, name: str) -> list[str]:
        """Returns what stands before a command that is to run as a member, with all that it starts."""
        return join(self.joins(name))

    def joins(self, name: str) -> list[Path]:
        """Returns the files into which a process writes its id to become a member."""
        return [base / name / "cgroup.procs" for base in self._bases.values()]

    def relative(self, name: str) -> str:
        """Returns the group's path below a hierarchy's root."""
        base = next(iter(self._bases.values()), ROOT / self._name)
        return str((base / name).relative_to(ROOT)) if self.unified else f"{self._name}/{name}"

    def memory_bytes(self, name: str) -> int:
        """Returns what the group's members hold in memory, 0 when unknown."""
        base = self._bases.get("" if self.unified else "memory")
        file = "memory.current" if self.unified else "memory.usage_in_bytes"
        with contextlib.suppress(OSError, ValueError):
            if base is not None:
                return int((base / name / file).read_text(encoding="ascii"))
        return 0

    def oom_kills(self, name: str) -> int:
        """Returns how many of the group's processes the kernel killed for want of memory, 0 when unknown."""
        return self._counted("memory", name, "memory.events" if self.unified else "memory.oom_control", "oom_kill")

    def forks_refused(self, name: str) -> int:
        """Returns how often the group had no process more to give, 0 when unknown."""
        return self._counted("pids", name, "pids.events", "max")

    def _counted(self, controller: str, name: str, file: str, event: str) -> int:
        base = self._bases.get("" if self.unified else controller)
        with contextlib.suppress(OSError, ValueError):
            if base is not None:
                lines = (base / name / file).read_text(encoding="ascii").splitlines()
                return next((int(line.split()[1]) for line in lines if line.startswith(f"{event} ")), 0)
        return 0

    def cpu_seconds(self, name: str) -> float:
        """Returns the processor time that the group has used."""
        with contextlib.suppress(OSError, ValueError):
            if self.unified:
                lines = (self._bases[""] / name / "cpu.stat").read_text(encoding="ascii").splitlines()
                return int(lines[0].split()[1]) / 1e6
            if "cpuacct" in self._bases:
                return int((self._bases["cpuacct"] / name / "cpuacct.usage").read_text(encoding="ascii")) / 1e9
        return 0.0

    def names(self) -> list[str]:
        """Returns the groups of the instance. Of version 1, one that could not be removed everywhere is still there under some
        controllers."""
        found: set[str] = set()
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                found |= {entry.name for entry in base.iterdir() if entry.is_dir() and entry.name != _HOLDER}
        return sorted(found)

    def remove(self, name: str) -> None:
        """Ends what is left in the group and removes it, each of its directories whatever becomes of the others."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for base in self._bases.values():
            group = base / name
            while True:
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        break
                with contextlib.suppress(OSError):  # a moment without a descriptor: it is tried again
                    self._kill(group)
                time.sleep(0.002)

    def _kill(self, group: Path) -> None:
        """Ends the group's processes: by the kernel, which means no others (Linux 5.14), or by their numbers."""
        with contextlib.suppress(FileNotFoundError):
            if (group / "cgroup.kill").exists():
                (group / "cgroup.kill").write_text("1", encoding="ascii")
                return
            for pid in (group / "cgroup.procs").read_text(encoding="ascii").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        """Removes every group of the instance."""
        for name in self.names():
            self.remove(name)
        if self._scope:
            self.remove(_HOLDER)  # with its last process the scope ends
            return
        for base in self._bases.values():
            with contextlib.suppress(OSError):
                base.rmdir()


def join(files: Iterable[Path]) -> list[str]:
    return ["/bin/sh", "-c", _JOIN, "sh", *map(str, files), "--"]


def offers(group: Path, controller: str) -> bool:
    """Of a group in the unified hierarchy."""
    file = group / "cgroup.controllers"
    return file.exists() and controller in file.read_text(encoding="ascii").split()


def limit_children(directory: Path, wanted: Iterable[str], is_ours: bool) -> None:
    """Has the children of a group of the unified hierarchy limited by these controllers. One that is not ours alone has processes in it,
    perhaps, which are moved: it may hold none then. Raises OSError."""
    file = directory / "cgroup.subtree_control"
    if set(wanted) <= set(file.read_text(encoding="ascii").split()):
        return
    if not is_ours and (directory / "cgroup.type").exists():  # any but the root of all
        _move((directory / "cgroup.procs").read_text(encoding="ascii").split(), directory / _OTHERS)
    try:
        file.write_text(" ".join(f"+{name}" for name in wanted), encoding="ascii")
    except OSError as error:
        raise OSError(error.errno, f"{file}: {error.strerror}") from error


def _is_populated(group: Path) -> bool:
    """Whether there is a process in it or below (cgroup-v2, cgroup.events)."""
    try:
        return "populated 1" in (group / "cgroup.events").read_text(encoding="ascii").splitlines()
    except OSError:
        return False


def own_group() -> Path:
    """Returns this process's group in the unified hierarchy (cgroups(7), /proc/PID/cgroup)."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    return ROOT / next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")


def delegated() -> Path:
    """Returns the nearest group around this process that somebody has marked as ours to divide; the hierarchy's root where there is
    none."""
    own = own_group()
    for group in (own, *own.parents):
        if not group.is_relative_to(ROOT):
            break
        for name in ("trusted.delegate", "user.delegate"):
            with contextlib.suppress(OSError):
                if os.getxattr(group, name) == b"1":
                    return group.parent if group.name == _OTHERS else group
        if group.name == _OTHERS:  # we were moved there
            return group.parent
    return ROOT


def _move(pids: Iterable[str], group: Path) -> None:
    """Raises OSError."""
    group.mkdir(exist_ok=True)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(pid, encoding="ascii")


def _is_sealed(directory: Path) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def disk_number(path: Path) -> str | None:
    """Returns MAJOR:MINOR of the whole disk under a path, which need not be there yet; None where there is none (overlayfs, network,
    tmpfs)."""
    device = os.stat(existing(path)).st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        return None
    if (entry / "partition").exists():
        entry = entry.resolve().parent
    return (entry / "dev").read_text(encoding="ascii").strip()
