"""The jail of a hypervisor: its own user, no capabilities, no new privileges, namespaces of its own, a read-only root.

The root holds QEMU, its libraries and firmware and nothing else; there is one for each version (vmm/qemu/roots.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

PROGRAMS = ("/usr/bin/qemu-system-x86_64", "/usr/bin/setpriv", "/usr/bin/umount")
MAPPER = Path(__file__).parent / "qemu/mapper.c"
DATA = (
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
)

# $1 the root, $2 the user, $3 "kvm" where it may use it; then the command. The root directory's bind
# is private to this process. So is its /dev/kvm, a node that only its user may open: the host's belongs to root, or to a group that may
# open more than this (10 and 232: Documentation/admin-guide/devices.txt of the kernel; Firecracker's jailer makes the same).
_ENTER = """\
set -e
root=$1 user=$2 kvm=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro,nosuid,nodev "$root"
if [ -n "$kvm" ]; then
    mount -t tmpfs -o mode=755,nosuid,noexec,size=4k,nr_inodes=4 devices "$root/dev"
    mknod -m 600 "$root/dev/kvm" c 10 232
    chown "$user:$user" "$root/dev/kvm"
    : > "$root/dev/null"
    mount -o remount,ro "$root/dev"
fi
mount --bind /dev/null "$root/dev/null"
mount -t proc -o nosuid,nodev,noexec,hidepid=2,subset=pid proc "$root/proc"
cd "$root"
pivot_root . .
/usr/bin/umount -l .
if [ -n "$TORPOR_MAPPER" ]; then export LD_PRELOAD=/usr/lib/torpor-mapper.so; fi
exec "$@"
"""


def files() -> set[str]:
    """What QEMU needs of the host. Raises OSError, SubprocessError."""
    found = {path for path in (*PROGRAMS, *DATA) if os.path.exists(path)}
    for program in found.intersection(PROGRAMS):
        listing = subprocess.run(["ldd", program], check=True, capture_output=True, text=True, timeout=20).stdout
        found.update(word for line in listing.splitlines() for word in line.split() if word.startswith("/"))
    return found


def make_root(work: Path) -> None:
    """Copies what QEMU needs to `work`, a new directory. Raises OSError, SubprocessError."""
    for directory in ("proc", "dev", "usr/lib", "usr/bin"):
        (work / directory).mkdir(parents=True, exist_ok=True)
    for link in ("lib", "lib64", "bin", "sbin"):
        if os.path.islink(f"/{link}"):
            (work / link).symlink_to(os.readlink(f"/{link}"))
    for file in sorted(files()):
        copy = work / os.path.realpath(os.path.dirname(file)).lstrip("/") / os.path.basename(file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (work / "dev/null").touch()


def make_mapper(root: Path) -> None:
    """Compiles the mapper for a root. Linked with the root's own C library: the host's may be newer and offer functions that the root's has
    not. Raises OSError, SubprocessError."""
    new = root / "usr/lib/torpor-mapper.new"
    library = next(root.glob("usr/lib*/**/libc.so.6"))
    flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-nostdlib", "-Wl,-z,defs")
    subprocess.run(["gcc", *flags, "-o", str(new), str(MAPPER), str(library)], check=True, capture_output=True, timeout=60)
    new.rename(root / "usr/lib/torpor-mapper.so")


def command(root: Path, enter: Sequence[str], uid: int, has_kvm: bool, inner: Sequence[str]) -> list[str]:
    """The prefix that jails `inner` as user `uid`. Its life is tied to the `unshare` parent, not to whoever starts it: so the parent is in
    the microVM's control group too, which it joins by `enter` (Cgroups.enter), and nobody who ends another group's processes ends it."""
    return [
        *enter, "unshare", "-m", "-n", "-p", "-i", "-u", "--fork", "--kill-child",
        "/bin/sh", "-c", _ENTER, "sh", str(root), str(uid), "kvm" if has_kvm else "",
        "/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all",
        "--bounding-set=-all", "--no-new-privs", "--pdeathsig=KILL", *inner,
    ]  # fmt: skip
