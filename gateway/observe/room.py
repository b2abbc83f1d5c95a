"""What the host has left."""

from __future__ import annotations

import os
from pathlib import Path


def memory_available_bytes() -> int:
    """The kernel's own estimate (Documentation/filesystems/proc.rst, MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def disk_free_bytes(path: Path) -> int:
    """What may still be written where `path` lies. Raises OSError."""
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize
