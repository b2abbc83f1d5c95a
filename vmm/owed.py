"""What of the disk is kept for the microVMs that there are, running or asleep: a part of each one's disk, less what it has written.

A disk's file is sparse, and grows to its size at most. Who has written more than its part is owed nothing, and takes nothing from what
the others are owed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gateway import executors

from .snapshots import OVERLAY

_MAGIC, _SIZE_AT, _SIZE_BYTES = b"QFI\xfb", 24, 8  # QEMU, docs/interop/qcow2.txt


class OwedDisk:
    def __init__(self, directory: Path, percent: int) -> None:
        """`directory` has sessions' directories."""
        self._directory = directory
        self._percent = percent
        self._sizes: dict[str, tuple[int, bool]] = {}  # by session: the disk's bytes, and whether its file has what it has written alone
        self.bytes = 0

    async def weigh(self) -> None:
        """Looks at all disks. Raises OSError."""
        if self._percent:
            self.bytes = await executors.UPKEEP.run(self._weigh)

    def _weigh(self) -> int:
        owed, known = 0, self._sizes
        self._sizes = {}
        for entry in os.scandir(self._directory) if self._directory.exists() else []:
            if entry.name.startswith("."):
                continue
            overlay = Path(entry.path, OVERLAY)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                size, is_own = self._sizes[entry.name] = known.get(entry.name) or _size(overlay)
                written = os.stat(overlay).st_blocks * 512 if is_own else 0
                owed += max(0, size * self._percent // 100 - written)
        return owed


def _size(overlay: Path) -> tuple[int, bool]:
    """A raw disk is a clone of its image's, of whose blocks nobody can tell whether they are its own."""
    with overlay.open("rb") as file:
        head = file.read(_SIZE_AT + _SIZE_BYTES)
        if head.startswith(_MAGIC):
            return int.from_bytes(head[_SIZE_AT:], "big"), True
        return os.fstat(file.fileno()).st_size, False
