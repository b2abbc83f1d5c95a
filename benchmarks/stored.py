"""What a suspended session takes on the disk, beside the pages of its memory that differ from its image's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from report import figure

from vmm import archives, diffs, seals
from vmm.syscalls import PAGE


def stored(root: Path, session: str) -> None:
    """Of a session of the newest image: `stored_bytes` (its files, as the disk has them) and `stored_packed` (as an archive)."""
    memory = max((root / "images").glob("*/memory.raw"), key=lambda path: path.stat().st_mtime)
    directory = root / "sessions" / session
    snapshot = max(directory.glob("snapshot-*"), key=lambda path: path.stat().st_mtime)
    seals.load(root)
    chain = diffs.read_manifest(snapshot).chain
    differing = sum(differing_pages(snapshot / str(one), memory) for one in chain) * PAGE
    taken = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
    figure("stored_bytes", taken, "bytes", "pages_that_differ", differing)
    with tempfile.TemporaryFile(dir=root) as file:
        packed, _ = archives.pack(directory, snapshot, file.fileno())
    figure("stored_packed", packed, "bytes", "pages_that_differ", differing)


def differing_pages(diff: Path, memory: Path) -> int:
    """Of a diff's pages those that are not as the image has them."""
    count = 0
    with memory.open("rb") as image, diff.with_suffix(".pages").open("rb") as pages:
        for first, after in diffs.runs_of(diff.with_suffix(".runs")):
            for page in range(first, after):
                count += pages.read(PAGE) != os.pread(image.fileno(), PAGE, page * PAGE)
    return count
