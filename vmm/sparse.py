"""Which parts of an image's memory its clones map, and how its file gets into a memfd: by a process of its own (memory.fill_apart), which
imports little, because the first launch of an image waits for it.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from . import syscalls

_SMALLEST_HOLE_BYTES = 64 << 10  # smaller ones are filled: 290 pieces of an image became 50, for 2 MiB more
_PIECES_MOST = 2000  # of vm.max_map_count, which is 65,530; diffs take as many (vmm/mapping.py)


def pieces(descriptor: int) -> list[tuple[int, int]]:
    """Returns the parts of a sparse file that a clone maps, (start, end) in bytes: its data, with the holes between that are too small to
    be worth two mappings."""
    smallest = _SMALLEST_HOLE_BYTES
    while True:
        found: list[tuple[int, int]] = []
        for start, end in syscalls.data_segments(descriptor):
            if found and start - found[-1][1] < smallest:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        if len(found) <= _PIECES_MOST:
            return found
        smallest *= 2


def holes(descriptor: int) -> list[tuple[int, int]]:
    """Returns what lies between the pieces. In a clone it is memory of the process's own from the start: a page of zeros that is written in
    a mapping of the image's file would be made twice, first in the file, for as long as the image lives, and then as the private copy."""
    ends = [(0, 0), *pieces(descriptor), (os.fstat(descriptor).st_size, 0)]
    return [(end, start) for (_, end), (start, _) in itertools.pairwise(ends) if start > end]


def fill(source: Path, descriptor: int) -> None:
    """Copies the pieces of a sparse file into a memfd, in order, and so leaves it without small holes."""
    with source.open("rb") as file:
        for start, end in pieces(file.fileno()):
            syscalls.copy_range(file.fileno(), start, descriptor, start, end - start)


def _main() -> None:
    source, descriptor, *rest = sys.argv[1:]
    split = rest.index("--")
    for member in rest[split + 1 :]:
        Path(member).write_text(str(os.getpid()), encoding="ascii")
    fill(Path(source), int(descriptor))
    for disk in rest[:split]:
        with open(disk, "rb") as file:
            for start, end in syscalls.data_segments(file.fileno()):
                os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":
    _main()
