"""What Firecracker asks of a production host (docs/prod-host-setup.md of its repository), checked one by one. Most of it is as true of QEMU
under KVM. These are recommendations: a host without them serves, and who has tenants that do not trust each other heeds them. What the
service sees to by itself (its filters, its jails, its control groups) stands in docs/security.md.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_NESTED = ("kvm_intel", "kvm_amd")
_INFORMATION = 6  # a message that a kernel logs for each tap (syslog(2), level)
_FAVOURS_READERS = (6, 0)  # the first Linux in which a process that enters a control group waits for all processors
_KVM = "sys/module/kvm/parameters"


class Finding(NamedTuple):
    """`is_well`: the host is as recommended."""

    what: str
    is_well: bool
    text: str


def findings(root: Path = Path("/"), release: str = "") -> list[Finding]:
    """Returns a line for each recommendation that can be checked on this host. `root` is where /sys and /proc are; `release` the kernel's,
    where it is not the running one."""
    number = _release(release or os.uname().release)
    checks: tuple[Callable[[Path], Finding], ...] = (_smt, _ksm, _swap, _processor, _nested, _console, _timer, _huge_pages, _overcommit)
    return [*(check(root) for check in checks), *_groups(root, number)]


def _smt(root: Path) -> Finding:
    if _text(root / "sys/devices/system/cpu/smt/active") == "1":
        return Finding("smt", False, "it is on: microVMs on two threads of a core may learn from each other; `nosmt` in the kernel's line")
    return Finding("smt", True, "no core runs two threads")


def _ksm(root: Path) -> Finding:
    if _text(root / "sys/kernel/mm/ksm/run") in ("", "0", "2"):
        return Finding("ksm", True, "equal pages of different owners are not merged")
    return Finding("ksm", False, "it is on: what pages are shared shows what others have in memory; echo 2 > /sys/kernel/mm/ksm/run")


def _swap(root: Path) -> Finding:
    if swaps := [line.split()[0] for line in _text(root / "proc/swaps").splitlines()[1:]]:
        return Finding("swap", False, f"guests' memory may be written to {', '.join(swaps)}, and stay there; swapoff -a, or encrypt it")
    return Finding("swap", True, "there is none")


def _processor(root: Path) -> Finding:
    known = {path.name: _text(path) for path in sorted((root / "sys/devices/system/cpu/vulnerabilities").glob("*"))}
    if weak := [name for name, text in known.items() if "Vulnerable" in text]:
        cure = "update microcode and kernel, and leave `mitigations` at its default"
        return Finding("processor", False, f"it is not mitigated for {', '.join(weak)}: {cure}")
    return Finding("processor", True, f"each of the {len(known)} weaknesses that the kernel knows of is mitigated, or not there")


def _nested(root: Path) -> Finding:
    for module in _NESTED:
        if _text(root / f"sys/module/{module}/parameters/nested") in ("1", "Y"):
            cure = f"`options {module} nested=0` in /etc/modprobe.d turns it off"
            return Finding("nested kvm", False, f"it is on, and no guest needs it: {cure}")
    return Finding("nested kvm", True, "guests are lent no virtualisation")


def _console(root: Path) -> Finding:
    level = (_text(root / "proc/sys/kernel/printk").split() or ["0"])[0]
    if level.isdigit() and int(level) > _INFORMATION:
        cure = "`quiet loglevel=1` in the kernel's line"
        return Finding("kernel's console", False, f"messages up to level {level} go there, some for each tap, and are waited for: {cure}")
    return Finding("kernel's console", True, "taps and bridges write nothing to it")


def _timer(root: Path) -> Finding:
    period = _text(root / _KVM / "min_timer_period_us")
    if period and not period.lstrip("0"):
        cure = "`options kvm min_timer_period_us=200` in /etc/modprobe.d"
        return Finding("kvm's timer", False, f"guests may have interrupts without a bound, which no group pays for: {cure}")
    return Finding("kvm's timer", True, f"at most one interrupt each {period} µs" if period else "the kernel names no bound")


def _huge_pages(root: Path) -> Finding:
    fields = {line.split(":")[0]: line.split()[1] for line in _text(root / "proc/meminfo").splitlines() if len(line.split()) > 1}
    mib = int(fields.get("Hugetlb", "0")) // 1024
    if mib:
        return Finding("huge pages", False, f"{mib} MiB are reserved, which no hypervisor here asks for or may use: vm.nr_hugepages=0")
    return Finding("huge pages", True, "none are reserved: hypervisors ask for none, and lock no memory (RLIMIT_MEMLOCK may be 0)")


def _overcommit(root: Path) -> Finding:
    if _text(root / "proc/sys/vm/overcommit_memory") == "2":
        text = "each clone's whole memory counts as taken, though nearly all of it is shared: vm.overcommit_memory=0"
        return Finding("overcommit", False, text)
    return Finding("overcommit", True, "clones' shared memory is counted once")


def _groups(root: Path, release: tuple[int, ...]) -> Iterator[Finding]:
    """Linux 6.0 made entering a control group slower, and KVM enters one with each machine (prod-host-setup, boot time regressions)."""
    mounts = [line.split() for line in _text(root / "proc/mounts").splitlines()]
    kinds = {words[2]: words[3] for words in mounts if len(words) > 3 and words[1].startswith("/sys/fs/cgroup")}
    if "cgroup" in kinds:
        yield Finding("control groups", False, "version 1: Firecracker's snapshots take longer (its issue 2129); boot with version 2")
    else:
        yield Finding("control groups", True, "version 2")
    is_quick = release < _FAVOURS_READERS or _text(root / _KVM / "nx_huge_pages") == "never" or "favordynmods" in kinds.get("cgroup2", "")
    if is_quick:
        yield Finding("kvm's start", True, "a machine that is made waits for no other processor")
    else:
        multihit = _text(root / "sys/devices/system/cpu/vulnerabilities/itlb_multihit")
        other = "; or `options kvm nx_huge_pages=never` in /etc/modprobe.d" if multihit == "Not affected" else ""
        cure = f"mount -o remount,favordynmods /sys/fs/cgroup (version 1: cgroup_favordynmods=true in the kernel's line){other}"
        yield Finding("kvm's start", False, f"since Linux 6.0 each machine that is made waits for all processors: {cure}")


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("-")[0].split(".")[:2] if part.isdigit())


def replaceable(paths: Sequence[Path]) -> list[Path]:
    """Files, or directories on the way to them, that others than root may write: the jailer trusts all that it is given."""
    found = []
    for path in paths:
        for one in (path, *path.parents):
            with contextlib.suppress(OSError):
                status = one.stat()
                is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
                if (status.st_uid or (status.st_mode & 0o022 and not is_sticky)) and one not in found:
                    found.append(one)
    return found


def _text(path: Path) -> str:
    """Empty where the kernel has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
