"""Boots that are kept: the memory and devices of a guest whose kernel runs and whose init waits for its disk.

They are the same for every image of a shape: nothing of an image was there yet. The first build of a shape keeps its boot, the next
ones go on from it; under emulation that is most of a build's wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import xxhash

from .. import memory, syscalls
from ..driver import DEVICES, Shape
from . import machine as topology

MEMORY = "memory.raw"
_NEW = "new-"
_SUM = "checksum"
_CHUNK = 4 << 20


class BootSnapshotCache:
    def __init__(self, directory: Path, root: str, kernel: Path, initrd: Path) -> None:
        """`root`: the name of the root whose QEMU runs them, which is a digest of what is in it."""
        self._directory = directory
        for unfinished in directory.glob(f"{_NEW}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._checked: set[Path] = set()
        self._root = root
        self._made_of = (Path(topology.__file__), kernel, initrd)

    def find(self, shape: Shape) -> Path | None:
        """Returns a kept boot of this shape, made with these very programs and undamaged; what is damaged goes."""
        kept = self._place(shape)
        if not kept.is_dir():
            return None
        if kept not in self._checked:  # once: nothing is synced, and a power cut may have left anything
            try:
                is_whole = (kept / _SUM).read_text(encoding="ascii") == _checksum(kept)
            except (OSError, ValueError):
                is_whole = False
            if not is_whole:
                self.drop(kept)
                return None
            self._checked.add(kept)
        return kept

    def begin(self) -> Path:
        """Makes an empty directory for a new one's device state. Raises OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_NEW, dir=self._directory))

    def keep(self, work: Path, shape: Shape, memory_file: int) -> None:
        """Keeps a boot, and removes those of other programs. It is not synced, which would wait for all that builds write. Raises
        OSError."""
        kept = self._place(shape)
        of_these = kept.name.rpartition("-")[2]
        for old in self._directory.iterdir():
            if not old.name.startswith(_NEW) and not old.name.endswith(of_these):
                self.drop(old)
        memory.store_memory(memory_file, work / MEMORY)
        (work / _SUM).write_text(_checksum(work), encoding="ascii")
        with contextlib.suppress(OSError):  # another build was first
            work.rename(kept)
            self._checked.add(kept)

    def drop(self, kept: Path) -> None:
        """Removes one that is of no use."""
        self._checked.discard(kept)
        shutil.rmtree(kept, ignore_errors=True)

    def _place(self, shape: Shape) -> Path:
        programs = hashlib.sha256(f"{self._root} {topology.KERNEL_LINE}".encode())
        for path in self._made_of:
            found = path.stat()
            programs.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
        of_shape = hashlib.sha256(msgspec.json.encode(shape) + topology.processor(shape.accelerator).encode()).hexdigest()[:16]
        return self._directory / f"{of_shape}-{programs.hexdigest()[:16]}"


def _checksum(kept: Path) -> str:
    """Of both files' data; holes, most of the memory, are not read. Raises OSError."""
    state = xxhash.xxh3_64()
    for name in (DEVICES, MEMORY):
        with (kept / name).open("rb", buffering=0) as file:
            for start, end in syscalls.data_segments(file.fileno()):
                state.update(f"{name} {start} {end} ".encode())
                while start < end and (data := os.pread(file.fileno(), min(end - start, _CHUNK), start)):
                    state.update(data)
                    start += len(data)
    return state.hexdigest()
