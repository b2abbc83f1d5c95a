"""A Firecracker guest's memory: where it lies in the process, what of it changed, and how a chain of diffs gets back into it.

The process maps the image's memory file privately (MAP_PRIVATE, as its snapshot documentation says), in one piece below the hole
for devices at 3 GiB and one above it. A page's number is its place in that file.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from gateway.observe.room import disk_free_bytes

from .. import diffs, syscalls
from ..diffs import Manifest, Segment, Sum
from ..errors import Damaged
from ..syscalls import PAGE

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Region:
    """`pages` of guest memory from page `first` on, at `address` in the process."""

    first: int
    pages: int
    address: int


def regions(pid: int, file: Path) -> list[Region]:
    """Returns the private mappings of the memory file (proc(5), maps), told by device and inode. Raises LookupError."""
    status = file.stat()
    identity = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino))
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, _, offset, device, inode = line.split(None, 5)[:5]
            if (device, inode) == identity:
                start, end = (int(part, 16) for part in addresses.split("-"))
                found.append(Region(int(offset, 16) // PAGE, (end - start) // PAGE, start))
    if not found:
        raise LookupError(f"process {pid} does not map {file}")
    return sorted(found, key=lambda region: region.first)


def write_in(pid: int, where: list[Region], snapshot: Path, manifest: Manifest) -> None:
    """Copies a chain's pages into a process that has not run. KVM's log of dirty pages does not see it, so that the next diff
    is of what the guest changes from here on. Raises Damaged for files that do not fit, Missing, Unavailable, OSError."""
    segments = diffs.shown(snapshot, manifest.chain)
    for number in manifest.chain:
        with diffs.open_pages(snapshot, number) as file:
            for one in segments:
                if one.diff == number:
                    _write(pid, where, file.fileno(), one)


def _write(pid: int, where: list[Region], file: int, segment: Segment) -> None:
    for region in where:
        first, after = max(segment.first, region.first), min(segment.after, region.first + region.pages)
        offset, address = (segment.at + first - segment.first) * PAGE, region.address + (first - region.first) * PAGE
        left = (after - first) * PAGE
        while left > 0:
            data = os.pread(file, min(left, _CHUNK), offset)
            if not data:
                raise Damaged("a diff is shorter than its runs")
            buffer = ctypes.create_string_buffer(data, len(data))
            syscalls.write_memory(pid, ctypes.addressof(buffer), [(address, len(data))])
            offset, address, left = offset + len(data), address + len(data), left - len(data)


def pack(written: Path, directory: Path, number: int) -> list[Sum]:
    """Makes diff `number` of the sparse file that Firecracker wrote: pages that were dirtied, at their places. Raises OSError."""
    runs: list[tuple[int, int]] = []
    with written.open("rb") as source, (directory / f"{number}.pages").open("wb", buffering=0) as pages:
        for start, end in syscalls.data_segments(source.fileno()):
            first, after = start // PAGE, -(-end // PAGE)
            syscalls.copy_range(source.fileno(), first * PAGE, pages.fileno(), diffs.page_count(runs) * PAGE, (after - first) * PAGE)
            runs.append((first, after))
    return _finish(directory, number, runs)


def save_private(pid: int, where: list[Region], directory: Path, number: int) -> list[Sum]:
    """A diff over the image itself: every page that is the process's own. For a guest whose log of dirty pages was already read
    once (a suspend that was called off), and so tells only half. Raises OSError."""
    runs = [
        (region.first + first, region.first + after)
        for region in where
        for first, after in syscalls.private_pages(pid, region.address, region.address + region.pages * PAGE)
    ]
    if diffs.page_count(runs) * PAGE > disk_free_bytes(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    source = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        with (directory / f"{number}.pages").open("wb") as pages:
            for first, after in runs:
                region = next(region for region in where if region.first <= first < region.first + region.pages)
                at = region.address + (first - region.first) * PAGE
                end = at + (after - first) * PAGE
                while at < end:
                    at += pages.write(os.pread(source, min(end - at, _CHUNK), at))
    finally:
        os.close(source)
    return _finish(directory, number, runs)


def _finish(directory: Path, number: int, runs: list[tuple[int, int]]) -> list[Sum]:
    diffs.write_runs(directory / f"{number}.runs", runs)
    return [diffs.checksum(directory / name) for name in diffs.names([number])]
