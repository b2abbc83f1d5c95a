"""What Firecracker asks of a production host (docs/prod-host-setup.md of its repository) and this host does not have. Most of it is as true
of QEMU under KVM. These are recommendations: a host without them serves, and who has tenants that do not trust each other heeds them.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

_NESTED = ("kvm_intel", "kvm_amd")


def recommendations(root: Path = Path("/")) -> Iterator[tuple[str, str]]:
    """What of the host is otherwise, and how that is changed. `root` is where /sys and /proc are."""
    if _text(root / "sys/devices/system/cpu/smt/active") == "1":
        yield "smt", "is on: microVMs on two threads of one core may learn from each other; `nosmt` in the kernel's line turns it off"
    if _text(root / "sys/kernel/mm/ksm/run") not in ("", "0"):
        yield "ksm", "is on: what pages are shared shows what others have in memory; echo 0 > /sys/kernel/mm/ksm/run"
    if swaps := [line.split()[0] for line in _text(root / "proc/swaps").splitlines()[1:]]:
        yield "swap", f"guests' memory may be written to {', '.join(swaps)}, and stay there; swapoff -a, or encrypt it"
    weak = [
        path.name for path in sorted((root / "sys/devices/system/cpu/vulnerabilities").glob("*")) if _text(path).startswith("Vulnerable")
    ]
    if weak:
        yield "processor", f"is not mitigated for {', '.join(weak)}: update microcode and kernel, and leave `mitigations` at its default"
    for module in _NESTED:
        if _text(root / f"sys/module/{module}/parameters/nested") in ("1", "Y"):
            yield "nested kvm", f"is on, and no guest needs it: `options {module} nested=0` in /etc/modprobe.d turns it off"


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
