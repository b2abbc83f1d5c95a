"""What the host has left."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

BUILD_ROOM_BYTES = 1 << 30  # beyond the reserve, for another image
BUILD_INODES, SESSION_INODES = 50_000, 1_000  # of a file system with a number of them: an image's layers have some for each file
_UNBOUNDED = 1 << 62
_HEAD_BYTES = 256  # of /proc/meminfo: what is asked for stands in its third line


def memory_available_bytes() -> int:
    """The kernel's own estimate (Documentation/filesystems/proc.rst, MemAvailable). Asked while a request waits: the file stays open."""
    for line in os.pread(_meminfo(), _HEAD_BYTES, 0).splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@cache
def _meminfo() -> int:
    return os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there: where it would be made."""
    return next(directory for directory in (path.absolute(), *path.absolute().parents) if directory.exists())


def disk_free_bytes(path: Path) -> int:
    """What may still be written where `path` lies. Raises OSError."""
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


def inodes_free(path: Path) -> int:
    """How many files may still be made where `path` lies; very many where the file system has no such number (btrfs). Raises OSError."""
    there = os.statvfs(path)
    return there.f_favail if there.f_files else _UNBOUNDED
