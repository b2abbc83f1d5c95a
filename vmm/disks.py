"""Disks: an image's raw base, the layer that its boot wrote, and one overlay per session.

    disk.raw (the container's files, ext4)  <-  boot.qcow2 (what booting wrote)  <-  overlay (one session)

Firecracker knows raw disks only: there a boot writes into disk.raw, and a session's overlay is a clone of it.

An image's are read-only for ever. The backing names inside the files are never followed: the hypervisor is given every file as a
descriptor and told what lies under what.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from . import programs, syscalls

_FICLONE = 0x40049409  # ioctl_ficlonerange(2)
_DEADLINE_SECONDS = 20
# Of Firecracker's, which are raw.
COPIED = "each launch copies all of its image's disk, because this file system shares no blocks between files: put ROOT on XFS or btrfs"


async def create_overlay(path: Path, size_bytes: int) -> None:
    """Makes an empty overlay (mode 0600). Raises OSError with qemu-img's words."""
    command = ("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes))
    await programs.run(f"qemu-img create {path}", *command, seconds=_DEADLINE_SECONDS)
    path.chmod(0o600)


def copy_overlay(template: Path, target: Path) -> None:
    """Makes a fresh overlay (mode 0600): shared blocks where the file system can (FICLONE: XFS, btrfs), else a copy of what is data:
    of an empty qcow2 file some 200 KB, quicker than starting qemu-img. Raises OSError."""
    target.unlink(missing_ok=True)
    with template.open("rb") as source, os.fdopen(os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        except OSError:
            os.ftruncate(copy.fileno(), os.fstat(source.fileno()).st_size)
            for start, end in syscalls.data_segments(source.fileno()):
                syscalls.copy_range(source.fileno(), start, copy.fileno(), start, end - start)


def shares_blocks(directory: Path) -> bool:
    """Whether a copy of a file in there costs nothing until one of both changes (FICLONE). Raises OSError where none can be made."""
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as copy:
        source.write(bytes(4096))
        source.flush()
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        except OSError:
            return False
    return True


def stored_bytes(path: Path) -> int:
    """Returns what a sparse file really takes on the disk."""
    return os.stat(path).st_blocks * 512


def tree_bytes(directory: Path) -> int:
    """What all files below a directory take on the disk; what goes meanwhile is none of it."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += stored_bytes(Path(folder, name))
    return size


def sync_path(path: Path) -> None:
    """Makes a file durable, or the renames inside a directory (fsync(2)). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
