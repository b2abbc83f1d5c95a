"""What a Firecracker process sees: the folder that its jailer makes the root of (docs/jailer.md of Firecracker's repository).

Everything it is given is a hard link in there, under the same name in every process, because a snapshot's state remembers paths.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.messages import Shape

from ..cgroups import Cgroups
from ..kernel import PROBE_MIB, PROBE_WORDS, WORDS
from ..sandboxes import VmSandbox
from .counts import PIPE

DISK, MEMORY, STATE, OUT, VSOCK = "disk.raw", "memory.raw", "devices.state", "out", "v.sock"
KERNEL, INITRD, CONFIGURATION = "vmlinux", "initrd", "configuration.json"
KERNEL_LINE = f"reboot=k {WORDS}"
_DESCRIPTORS = 512
_FILE_ROOM = 64 << 20  # beyond a guest's memory or disk, of the largest file that a process may write


@dataclass(frozen=True)
class Programs:
    """Both of one release, statically linked, as Firecracker asks for."""

    firecracker: Path
    jailer: Path


class Jail:
    """One process's root. `base` must be on the file system of images and sessions, for hard links. `shape` is None for a process whose
    guest writes nothing."""

    def __init__(self, base: Path, programs: Programs, sandbox: VmSandbox, shape: Shape | None) -> None:
        self._base, self._programs, self._sandbox, self._shape = base, programs, sandbox, shape
        self._top = base / programs.firecracker.name / sandbox.vm
        self.root = self._top / "root"

    def make(self) -> None:
        """What is linked into the root is everybody's to read, as one inode may be in many: so the root is its own process's alone."""
        self.root.mkdir(parents=True)
        for above in (self._base, self._base / self._programs.firecracker.name, self._top):
            above.chmod(0o711)
        os.chown(self.root, 0, self._sandbox.uid)
        self.root.chmod(0o710)
        out = self.root / OUT
        out.mkdir(mode=0o700)
        os.mkfifo(self.root / PIPE, 0o600)
        for path in (out, self.root / PIPE):
            os.chown(path, self._sandbox.uid, self._sandbox.uid)

    def give(self, file: Path, name: str, writable: bool = False) -> None:
        """Links a file into the root; only one that the guest writes becomes the process's own. Raises OSError."""
        target = self.root / name
        target.unlink(missing_ok=True)
        os.link(file, target)
        if writable:
            os.chown(target, self._sandbox.uid, self._sandbox.uid)
        else:
            target.chmod(0o444)

    def give_copy(self, file: Path, name: str) -> None:
        """For files that may lie on another file system. Raises OSError."""
        shutil.copyfile(file, self.root / name)
        (self.root / name).chmod(0o444)

    def take(self, name: str, target: Path) -> None:
        """Moves what the process wrote into its `out` folder to `target`, as ours. Raises OSError."""
        os.replace(self.root / OUT / name, target)
        os.chown(target, 0, 0)

    def command(self, cgroups: Cgroups, namespace: Path) -> list[str]:
        """The jailer enters the session's network namespace; a process cannot be given another one later. It closes every descriptor but
        the first three, and forgets the environment."""
        version = "2" if cgroups.unified else "1"
        return [
            *cgroups.enter(self._sandbox.vm), *self._jailer(), "--netns", str(namespace), "--cgroup-version", version,
            "--parent-cgroup", cgroups.relative(self._sandbox.vm),
            "--", "--api-sock", "/api.sock",
        ]  # fmt: skip

    def probe(self, kernel: Path, initrd: Path) -> list[str]:
        """Returns the command of a process that shows whether guests run: its init says so on standard output (vmm/probe.py). It has no
        network and no control group of its own. Raises OSError."""
        for file, name in ((kernel, KERNEL), (initrd, INITRD)):
            self.give_copy(file, name)
        configuration = {
            "machine-config": {"vcpu_count": 1, "mem_size_mib": PROBE_MIB}, "drives": [],
            "boot-source": {"kernel_image_path": f"/{KERNEL}", "initrd_path": f"/{INITRD}", "boot_args": f"{KERNEL_LINE} {PROBE_WORDS}"},
        }  # fmt: skip
        (self.root / CONFIGURATION).write_text(json.dumps(configuration), encoding="ascii")
        (self.root / CONFIGURATION).chmod(0o444)
        return [*self._jailer(), "--", "--no-api", "--config-file", f"/{CONFIGURATION}"]

    def _jailer(self) -> list[str]:
        sandbox = self._sandbox
        return [
            str(self._programs.jailer), "--id", sandbox.vm, "--exec-file", str(self._programs.firecracker), "--new-pid-ns",
            "--uid", str(sandbox.uid), "--gid", str(sandbox.uid), "--chroot-base-dir", str(self._base),
            "--resource-limit", f"no-file={_DESCRIPTORS}", "--resource-limit", f"fsize={self._largest}",
        ]  # fmt: skip

    @property
    def _largest(self) -> int:
        """Bytes of the largest file: a guest that escapes from Firecracker's own bounds fills no disk (docs/prod-host-setup.md)."""
        shape = self._shape
        return _FILE_ROOM + (max(shape.memory_mib << 20, shape.disk_bytes) if shape is not None else 0)

    def pid(self) -> int | None:
        """Returns the process's id, once the jailer has written it (`<exec file>.pid`, in the root)."""
        try:
            return int((self.root / f"{self._programs.firecracker.name}.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        shutil.rmtree(self._top, ignore_errors=True)


def remove_others(base: Path, programs: Programs, keep: Sequence[str]) -> None:
    """Roots of processes that nobody knows any more."""
    directory = base / programs.firecracker.name
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
