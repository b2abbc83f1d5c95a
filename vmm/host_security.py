"""What a host owes to walls that the service cannot raise by itself: `torpor doctor --security`. Beside what Firecracker recommends
(vmm/host_setup.py) it is versions, and what is left of before.

A version says what its authors mended in it; a distribution mends older numbers too, so a version is never more than a reason to look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .host_setup import Finding

_VULNERABILITIES = "sys/devices/system/cpu/vulnerabilities"
_SMT_AND_MEMORY = ("smt", "ksm", "swap", "processor", "nested kvm")
Release = tuple[int, ...]
# Of KVM, by the first release of each line of stable kernels that has the cure; lines between them have it from their first release on.
_KERNEL_CURES: dict[str, tuple[str, tuple[Release, ...]]] = {
    "CVE-2026-23401": (
        "a guest leaves stale entries in KVM's page tables",
        ((5, 15, 203), (6, 1, 168), (6, 6, 131), (6, 12, 80), (6, 18, 21), (6, 19, 11)),
    ),
}
# Of devices that a microVM has, by the first releases with the cure.
_QEMU_CURES: dict[str, tuple[str, tuple[Release, ...]]] = {
    "CVE-2024-3446": ("a guest frees memory of virtio-serial's twice", ((7, 2, 11), (8, 2, 3), (9, 0, 0))),
}


def number(text: str) -> Release:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def is_cured(release: Release, cures: Iterable[Release]) -> bool:
    """A line of releases has its cure from a number on, and lines that began after the newest one that had to be cured from the start."""
    known = sorted(cures)
    own = [cure for cure in known if cure[:2] == release[:2]]
    return release >= own[0] if own else release >= known[-1]


def findings(root: Path, release: str, qemu: str, firecracker: str, landlock: int, loaded: Iterable[Finding]) -> list[Finding]:
    """`root` is where /sys and /proc are, `release` the kernel's, `qemu` and `firecracker` their versions (empty: not there), `landlock`
    its version (0: not there); `loaded` is what vmm/host_setup.py found."""
    return [
        *(one for one in loaded if one.what in _SMT_AND_MEMORY),
        _vmscape(root),
        _microcode(root),
        *_versions("kernel", number(release), release, _KERNEL_CURES, "update the kernel"),
        *(_versions("qemu", number(qemu), qemu, _QEMU_CURES, "update QEMU's package") if qemu else ()),
        *([] if not firecracker else [_firecracker(firecracker)]),
        _modules(root, landlock),
    ]


def at_rest(root: Path, place: Path, device: int) -> Finding:
    """Whether the kernel encrypts all that lies on the device (its number) below the data directory `place`: by dm-crypt, itself or in
    each of the devices that it is made of."""
    block = root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        return Finding("data at rest", False, f"{place} lies on no block device that the kernel names: it may be encrypted or not")
    if _is_encrypted(block):
        return Finding("data at rest", True, f"{place} lies on dm-crypt")
    return Finding("data at rest", False, f"{place} is not encrypted on its disk: put it on dm-crypt (LUKS)")


def _is_encrypted(block: Path) -> bool:
    if _text(block / "dm/uuid").startswith("CRYPT-"):
        return True
    below = list((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
    return bool(below) and all(_is_encrypted(one) for one in below)


def _vmscape(root: Path) -> Finding:
    """Of guests that train the branch predictor of the process that runs them (CVE-2025-40300)."""
    text = _text(root / _VULNERABILITIES / "vmscape")
    if not text:
        return Finding("vmscape", False, "the kernel does not know of it, so it is older than the cure: update it")
    return Finding("vmscape", "Vulnerable" not in text, text)


def _microcode(root: Path) -> Finding:
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in _lines(root / "proc/cpuinfo"))}
    if "hypervisor" in fields.get("flags", "").split():
        return Finding("microcode", True, "this host is a guest itself: its processor's microcode is its own host's")
    if "microcode" not in fields:
        return Finding("microcode", False, "the kernel names none: load it early, by the packages intel-microcode or amd64-microcode")
    return Finding("microcode", True, f"{fields['microcode']}; whether there is a newer one, the packages know: apt upgrade")


def _versions(
    what: str, release: Release, text: str, cures: Mapping[str, tuple[str, tuple[Release, ...]]], cure: str
) -> Iterator[Finding]:  # fmt: skip
    open_ones = [f"{name}: {fault}" for name, (fault, cured) in cures.items() if release and not is_cured(release, cured)]
    if open_ones:
        yield Finding(
            what, False, f"{text}, by its version, has {'; '.join(open_ones)}: {cure}, unless its distribution says that it is mended"
        )
    else:
        yield Finding(what, True, f"{text} has none of the faults that are listed here ({', '.join(cures)})")


def _firecracker(version: str) -> Finding:
    from .probe import firecracker_faults

    if faults := firecracker_faults(version):
        return Finding("firecracker", False, f"{version}: {faults}")
    return Finding("firecracker", True, f"{version} has none of the faults that are listed here")


def _modules(root: Path, landlock: int) -> Finding:
    """Of Linux, which decide beside a file's mode."""
    found = _text(root / "sys/kernel/security/lsm").split(",")
    names = [f"landlock (version {landlock})", *(name for name in found if name in ("apparmor", "selinux", "smack", "tomoyo"))]
    if not landlock:
        return Finding(
            "security modules",
            False,
            "Landlock is not among them, by which our processes give files up: lsm=landlock,… in the kernel's line",
        )
    if len(names) == 1:
        return Finding(
            "security modules", True, f"{names[0]}; neither AppArmor nor SELinux is seen, which would be a second layer around the service"
        )
    return Finding("security modules", True, ", ".join(names))


def _lines(path: Path) -> list[str]:
    """Of the first processor: the others say the same."""
    return _text(path).partition("\n\n")[0].splitlines()


def _text(path: Path) -> str:
    """Empty where the kernel has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
