"""A file system of a test's own, with room for little: on a loop device, as a host's disk that fills."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """The test is skipped where there is no loop device."""
    directory = Path(f"/var/tmp/torpor-small-{os.getpid()}")
    directory.mkdir()
    file = directory.with_suffix(".ext4")
    try:
        with file.open("wb") as made:
            made.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", file], check=True)
        if subprocess.run(["mount", "-o", "loop", file, directory], capture_output=True, check=False).returncode:
            pytest.skip("no loop device")
        try:
            directory.chmod(0o755)
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)
    finally:
        directory.rmdir()
        file.unlink()


def fill(disk: Path) -> Path:
    """Takes all that is left, at once; returns what is to be removed."""
    filler = disk / "filler"
    with filler.open("ab") as file:
        for size in (1 << 28, 1 << 24, 1 << 20, 1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
    assert os.statvfs(disk).f_bavail < 16
    return filler
