"""What of the disk is kept for microVMs: a part of each one's disk, less what it has written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vmm.disks import create_overlay
from vmm.owed import OwedDisk
from vmm.snapshots import OVERLAY

GIB = 1 << 30


async def test_each_is_owed_its_part_and_who_took_more_takes_it_from_nobody(tmp_path: Path) -> None:
    for name in ("fresh", "wrote", "greedy"):
        (tmp_path / name).mkdir()
        await create_overlay(tmp_path / name / OVERLAY, 8 * GIB)
    (tmp_path / ".void-1").mkdir()
    (tmp_path / "archived").mkdir()
    one = OwedDisk(tmp_path, 10)
    await one.weigh()
    made = os.stat(tmp_path / "fresh" / OVERLAY).st_blocks * 512
    share = 8 * GIB // 10
    assert one.bytes == 3 * (share - made)
    for name, megabytes in (("wrote", 100), ("greedy", 900)):
        subprocess.run(["fallocate", "--offset", "1MiB", "--length", f"{megabytes}MiB", tmp_path / name / OVERLAY], check=True)
    await one.weigh()
    wrote = os.stat(tmp_path / "wrote" / OVERLAY).st_blocks * 512
    assert one.bytes == 2 * share - made - wrote and wrote > 100 << 20
    (tmp_path / "fresh" / OVERLAY).unlink()
    await one.weigh()
    assert one.bytes == share - wrote


async def test_of_a_raw_disk_nobody_knows_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / OVERLAY).open("wb") as file:
        file.write(bytes(1 << 20))
        file.truncate(GIB)
    one = OwedDisk(tmp_path, 100)
    await one.weigh()
    assert one.bytes == GIB


async def test_nothing_is_looked_at_where_nothing_is_kept(tmp_path: Path) -> None:
    one = OwedDisk(tmp_path / "gone", 0)
    await one.weigh()
    assert one.bytes == 0
    await OwedDisk(tmp_path / "gone", 2).weigh()
