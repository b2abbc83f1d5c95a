"""Directories of a run's own below /var/tmp, where programs may be executed: removed at its end, or by the next run where it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PLACE = Path("/var/tmp")


def remove(directory: Path) -> None:
    """Mounts below it stay as they are."""
    subprocess.run(["rm", "-rf", "--one-file-system", directory], check=True)


@contextlib.contextmanager
def scratch(prefix: str, clear: Callable[[Path], None] = remove) -> Iterator[Path]:
    """`clear` removes a directory and what belongs to it. Those whose owner is gone are known by their lock, which went with it."""
    for old in PLACE.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear(old)
            finally:
                os.close(descriptor)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=PLACE))
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    finally:
        clear(directory)
        os.close(lock)
