"""What the host has left."""

from __future__ import annotations

import contextlib
import os
import resource
from functools import cache
from pathlib import Path

BUILD_ROOM_BYTES = 1 << 30  # beyond the reserve, for another image
BUILD_INODES, SESSION_INODES = 50_000, 1_000  # of a file system with a number of them: an image's layers have some for each file
_UNBOUNDED = 1 << 62
# Descriptors of one microVM in vmm, counted in a running one: its link's sockets and tap, its hypervisor's ends. Control has fewer.
SESSION_DESCRIPTORS = 24
_KEPT_DESCRIPTORS = 256  # for resumes, and for what runs
_MOST_DESCRIPTORS = 1 << 19  # as systemd allows by itself: programs that close all they might have, one by one, take long beyond
_HEAD_BYTES = 256  # of /proc/meminfo: what is asked for stands in its third line


def memory_available_bytes() -> int:
    """Returns the kernel's own estimate (Documentation/filesystems/proc.rst, MemAvailable). Asked while a request waits: the file stays
    open."""
    for line in os.pread(_meminfo(), _HEAD_BYTES, 0).splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@cache
def _meminfo() -> int:
    return os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)


def existing(path: Path) -> Path:
    """Returns the path, or the nearest directory above it that is there: where it would be made."""
    return next(directory for directory in (path.absolute(), *path.absolute().parents) if directory.exists())


def disk_free_bytes(path: Path) -> int:
    """Returns what may still be written where `path` lies. Raises OSError."""
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


def inodes_free(path: Path) -> int:
    """Returns how many files may still be made where `path` lies; very many where the file system has no such number (btrfs). Raises
    OSError."""
    there = os.statvfs(path)
    return there.f_favail if there.f_files else _UNBOUNDED


def allow_descriptors() -> None:
    """Raises this process's limit to the most that it may have, and that where it may. A login and systemd begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (max(hard, _MOST_DESCRIPTORS), hard):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, _MOST_DESCRIPTORS)), most))
            return


def descriptors_free() -> int:
    """Returns how many more this process may have, at least: the kernel gives the lowest number that is free."""
    try:
        lowest = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return 0
    os.close(lowest)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - lowest


def descriptors_kept() -> int:
    """Returns how many nothing new may take: a launch, or what only waits. Resumes may."""
    return min(_KEPT_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
