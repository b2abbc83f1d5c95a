"""The jail of a hypervisor: its own user, no capabilities, no new privileges, namespaces of its own, a read-only root, a filter of calls.

The root holds QEMU, its libraries and firmware and nothing else; there is one for each version (vmm/qemu/roots.py). The jail is a list of
walls (WALLS): tests take one out and see what it kept (tests/security/test_hypervisor_taken_over.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import calls

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

PROGRAMS = ("/usr/bin/qemu-system-x86_64", "/usr/bin/setpriv", "/usr/bin/umount")
MAPPER = Path(__file__).parent / "qemu/mapper.c"
FILTER = tuple(Path(__file__).parent / name for name in ("qemu/calls.c", "qemu/calls.h", "calls.py"))
PRELOADED = "/usr/lib/torpor-mapper.so"  # in a root: the mapper and the filter
DATA = (
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
)


class Wall(NamedTuple):
    """`unshare`, `setpriv`: the words by which those programs raise it, where they do; `{uid}` is the microVM's user."""

    name: str
    text: str
    unshare: tuple[str, ...] = ()
    setpriv: tuple[str, ...] = ()


ROOT, CALLS = "root", "calls"
WALLS = (
    Wall(ROOT, "a mount namespace with a root of its own: read-only, without devices, with QEMU's files and its own /proc", ("-m",)),
    Wall("network", "a network namespace without an interface; its link is a descriptor", ("-n",)),
    Wall("processes", "a process id namespace, in which it is alone", ("-p",)),
    Wall("ipc", "an IPC namespace", ("-i",)),
    Wall("names", "a UTS namespace", ("-u",)),
    Wall("user", "a user and a group that nobody else has, and no other groups", (), ("--reuid={uid}", "--regid={uid}", "--clear-groups")),
    Wall("capabilities", "none, nor any that a program could bring", (), ("--inh-caps=-all", "--bounding-set=-all")),
    Wall("privileges", "no new ones by starting a program (no_new_privs)", (), ("--no-new-privs",)),
    Wall(CALLS, "system calls of a list (vmm/calls.py) alone: another one ends it, or is answered as by a kernel that has it not"),
)
_NAMESPACES = {"network": "net", "processes": "pid", "ipc": "ipc", "names": "uts"}
_FILTERS = 2  # ours and QEMU's own
_WITHOUT_ROOT = "root=$1; shift 3; inside=$root"
_UNFILTERED = "export TORPOR_UNFILTERED=1"
_PRELOAD = f"""\
export LD_PRELOAD="$inside{PRELOADED}"
exec "$@"
"""
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
inside=
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
    target = root / PRELOADED.lstrip("/")
    new = target.with_suffix(".new")
    library = next(root.glob("usr/lib*/**/libc.so.6"))
    flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-nostdlib", "-Wl,-z,defs")
    with tempfile.TemporaryDirectory() as lists:
        (Path(lists) / "calls.inc").write_text(calls.header(), encoding="ascii")
        sources = [f"-I{lists}", str(MAPPER), str(FILTER[0]), str(library)]
        subprocess.run(["gcc", *flags, "-o", str(new), *sources], check=True, capture_output=True, timeout=60)
    new.rename(target)


def command(
    root: Path, enter: Sequence[str], uid: int, has_kvm: bool, inner: Sequence[str], without: Collection[str] = ()
) -> list[str]:  # fmt: skip
    """The prefix that jails `inner` as user `uid`. Its life is tied to the `unshare` parent, not to whoever starts it: so the parent is in
    the microVM's control group too, which it joins by `enter` (Cgroups.enter), and nobody who ends another group's processes ends it.
    `without`: names of walls that are left out, for tests."""
    walls = [wall for wall in WALLS if wall.name not in without]
    setpriv = [word.format(uid=uid) for wall in walls for word in wall.setpriv]
    script = "\n".join([_WITHOUT_ROOT if ROOT in without else _ENTER, *([_UNFILTERED] if CALLS in without else []), _PRELOAD])
    return [
        *enter, "unshare", *(word for wall in walls for word in wall.unshare), "--fork", "--kill-child",
        "/bin/sh", "-c", script, "sh", str(root), str(uid), "kvm" if has_kvm else "",
        "/usr/bin/setpriv", *setpriv, "--pdeathsig=KILL", *inner,
    ]  # fmt: skip


def missing(pid: int, uid: int) -> str:
    """Returns which walls the kernel does not confirm around a hypervisor that runs; empty where all stand. An older kernel, or a program
    that was not told, ignores one in silence. Raises OSError."""
    return ", ".join(name for name, is_so in confirmed(pid, uid).items() if not is_so)


def confirmed(pid: int, uid: int) -> dict[str, bool]:
    """Returns of each wall whether the kernel confirms it around the process. Raises OSError."""
    its, ours = _status(pid), _status(os.getpid())
    # Kernels before 5.9 do not count filters.
    filters = int(its.get("Seccomp_filters", _FILTERS)) - int(ours.get("Seccomp_filters", 0))
    return {
        **_namespaces(pid, _NAMESPACES), ROOT: _namespaces(pid, {ROOT: "mnt"})[ROOT] and _has_a_root(pid, is_read_only=True),
        "user": {*its["Uid"].split(), *its["Gid"].split()} == {str(uid)} and its["Groups"] in ("", str(uid)),
        "capabilities": not _capabilities(its, ("Inh", "Prm", "Eff", "Bnd", "Amb")),
        "privileges": its["NoNewPrivs"] == "1", CALLS: its["Seccomp"] == "2" and filters >= _FILTERS,
    }  # fmt: skip


def confirmed_of_jailer(pid: int, uid: int) -> dict[str, bool]:
    """As `confirmed`, of those that Firecracker and its jailer raise. Raises OSError."""
    its = _status(pid)
    kinds = {ROOT: "mnt", "network": "net", "processes": "pid"}
    return {
        **_namespaces(pid, kinds), ROOT: _namespaces(pid, kinds)[ROOT] and _has_a_root(pid, is_read_only=False),
        "user": {*its["Uid"].split(), *its["Gid"].split()} == {str(uid)} and its["Groups"] in ("", str(uid)),
        "capabilities": not _capabilities(its, ("Inh", "Prm", "Eff", "Amb")),
        "privileges": its["NoNewPrivs"] == "1", CALLS: its["Seccomp"] == "2",
    }  # fmt: skip


def _namespaces(pid: int, kinds: Mapping[str, str]) -> dict[str, bool]:
    return {name: os.stat(f"/proc/{pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino for name, kind in kinds.items()}


def _has_a_root(pid: int, is_read_only: bool) -> bool:
    """Whether its root is another directory than ours, and mounted so (proc_pid_mountinfo(5))."""
    if os.path.samestat(os.stat(f"/proc/{pid}/root/"), os.stat("/")):
        return False
    lines = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return not is_read_only or any((words := line.split())[4] == "/" and "ro" in words[5].split(",") for line in lines)


def _capabilities(its: Mapping[str, str], sets: Iterable[str]) -> bool:
    return any(int(its[f"Cap{name}"], 16) for name in sets)


def _status(pid: int) -> dict[str, str]:
    """Returns the fields of /proc/PID/status (proc_pid_status(5))."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
