"""Guest memory: the image's, shared by its clones as one sealed memfd, and what a clone changed, read out as a diff.

Diffs are files of vmm/diffs.py. Pages of zeros are not stored in an image's file: they stay holes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway import executors
from gateway.observe.room import disk_free_bytes

from . import diffs, programs, seals, syscalls
from .diffs import Sum

PAGE = syscalls.PAGE
_CHUNK = 4 << 20
_F_ADD_SEALS, _F_GET_SEALS, _SEALS = 1033, 1034, 1 | 2 | 4 | 8  # F_SEAL_SEAL, SHRINK, GROW, WRITE
_FILL_LEAST_SECONDS = 120.0
_LOOKED_AT_PAGES, _WORTH = 8192, 32  # one in so many must be as the image has it, or comparing is given up


@dataclass(frozen=True)
class Mapping:
    """Where the guest's memory lies in a hypervisor's address space."""

    pid: int
    start: int
    end: int


def memfd_name(image: str) -> str:
    return f"torpor-{image}"


def find_mapping(pid: int, image: str) -> Mapping:
    """Raises LookupError when the process has no such mapping."""
    marker = f"/memfd:{memfd_name(image)}"
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            if marker in line:
                start, end = line.split(" ", 1)[0].split("-")
                found.append((int(start, 16), int(end, 16)))
    if not found:
        raise LookupError(f"process {pid} maps no memory of image {image}")
    return Mapping(pid, found[0][0], found[-1][1])


def new_memory(image: str, size_bytes: int) -> int:
    """Makes an empty memfd for a guest that boots: shared, so that what the guest writes is in it."""
    descriptor = os.memfd_create(memfd_name(image), os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sealed(name: str, data: bytes) -> int:
    """Makes a file in memory that nobody can change (memfd_create(2), F_ADD_SEALS)."""
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_only(name: str) -> int:
    """Makes an empty file in memory, opened to write: QEMU takes from a descriptor set only what has the very access that it wants."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.close(descriptor)


def store_memory(descriptor: int, target: Path) -> int:
    """Writes a guest's memory to a sparse file, without its zero pages, and does not sync; returns the bytes stored."""
    size = os.fstat(descriptor).st_size
    zeros, stored = bytes(PAGE), 0
    with target.open("wb") as file, mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        os.ftruncate(file.fileno(), size)
        for at, end in syscalls.data_segments(descriptor):
            while at < end:
                run = at
                while at < end and at - run < _CHUNK and memory[at : at + PAGE] != zeros:
                    at += PAGE
                if at > run:
                    os.pwrite(file.fileno(), memory[run:at], run)
                    stored += at - run
                else:
                    at += PAGE
    return stored


async def load_image_memory(image: str, source: Path, disk: list[Path], cgroup_files: list[Path]) -> int:
    """Returns the image's memory as a sealed memfd; `disk` is read ahead with it. Raises OSError."""
    descriptor = new_memory(image, source.stat().st_size)
    try:
        await fill_apart(source, descriptor, cgroup_files, disk)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def fill_apart(source: Path, descriptor: int, cgroup_files: list[Path], disk: Sequence[Path] = ()) -> None:
    """Has a helper process fill the memory, in a cgroup of its own: pages are charged to whoever touches them first, and clones must not
    pay for what they share. Raises OSError."""
    command = (sys.executable, "-S", "-m", "vmm.sparse", str(source), str(descriptor), *map(str, disk), "--", *map(str, cgroup_files))
    await programs.run(
        f"memory from {source}", *command, seconds=executors.seconds_for(source.stat().st_size, _FILL_LEAST_SECONDS),
        pass_fds=[descriptor], cwd=Path(__file__).parents[1],
    )  # fmt: skip


def identity(descriptor: int) -> tuple[int, int]:
    """Returns which file it is: numbers that no other has while it lives (inode(7))."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def adopt_image_memory(pid: int, which: tuple[int, int], is_shared: bool) -> int | None:
    """Returns the image's memory, taken from a process that has it open (a clone outlives this daemon). `which` was written down when we
    gave it: the process may have other files of the same name by now, made by whoever has taken it over. What clones share was sealed."""
    entries: list[str] = []
    with contextlib.suppress(OSError):
        entries = os.listdir(f"/proc/{pid}/fd")
    for entry in entries:
        path = f"/proc/{pid}/fd/{entry}"
        with contextlib.suppress(OSError):  # it may have been closed just now, which says nothing about the others
            found = os.stat(path)
            if (found.st_dev, found.st_ino) != which:
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if identity(descriptor) == which and (not is_shared or fcntl.fcntl(descriptor, _F_GET_SEALS) & _SEALS == _SEALS):
                return descriptor
            os.close(descriptor)
    return None


def differing(runs: list[tuple[int, int]], process: int, start: int, image: int) -> list[tuple[int, int]]:
    """Returns, of the pages in `runs`, those that are not as the image has them: a guest writes many with what was there (zeros above all).

    `process` and `image` are descriptors; the guest's page 0 is at `start` of the one and at 0 of the other. Where hardly any of the
    first pages are equal the rest is taken unseen: a suspend must not read all of a large change twice for them.
    """
    made: list[tuple[int, int]] = []
    seen = equal = 0
    for first, after in runs:
        for at in range(first, after, _CHUNK // PAGE):  # a run may be all of a guest's memory
            if seen > _LOOKED_AT_PAGES and equal * _WORTH < seen:
                _add(made, at, after)
                break
            end = min(after, at + _CHUNK // PAGE)
            ours, theirs = (os.pread(file, (end - at) * PAGE, where + at * PAGE) for file, where in ((process, start), (image, 0)))
            for page in range(at, end):
                place = slice((page - at) * PAGE, (page - at + 1) * PAGE)
                if ours[place] == theirs[place]:
                    equal += 1
                else:
                    _add(made, page, page + 1)
            seen += end - at
    return made


def _add(runs: list[tuple[int, int]], first: int, after: int) -> None:
    """Adds to the last run where it goes on from there."""
    if runs and runs[-1][1] == first:
        runs[-1] = (runs[-1][0], after)
    else:
        runs.append((first, after))


def save_diff(mapping: Mapping, directory: Path, number: int, image: int | None = None) -> list[Sum]:
    """Writes the pages that are the process's own as diff `number` (vmm/diffs.py); the process must be stopped. `image` is the memory
    under them where that is the image's alone: pages that are as they were there are left out.

    Raises OSError (ENOSPC) before it writes where they would only fit into what the file system keeps for root.
    """
    source = os.open(f"/proc/{mapping.pid}/mem", os.O_RDONLY)
    state, total = seals.Checksum(), 0
    try:
        runs = syscalls.private_pages(mapping.pid, mapping.start, mapping.end)
        if image is not None:
            runs = differing(runs, source, mapping.start, image)
        runs = diffs.filled(runs)
        if diffs.page_count(runs) * PAGE > disk_free_bytes(directory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        with (directory / f"{number}.pages").open("wb", buffering=0) as pages:
            for first, after in runs:
                at, end = mapping.start + first * PAGE, mapping.start + after * PAGE
                while at < end:
                    data = os.pread(source, min(end - at, _CHUNK), at)
                    written = 0
                    while written < len(data):
                        written += pages.write(data[written:])
                    state.update(data)
                    at += len(data)
                    total += len(data)
    finally:
        os.close(source)
    diffs.write_runs(directory / f"{number}.runs", runs)
    return [diffs.checksum(directory / f"{number}.runs"), Sum(f"{number}.pages", total, state.digest())]
