"""What a build may take of the host's disk: its account's share of it, and never what is kept for others.

Attacked by one step that takes bytes at once, bytes by writing, and inodes, on a disk of the test's own. The wall is the file system that
an account's layers are (vmm/build_stores.py); without it, the first of these three fills the host's disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_rig import FROM, builder, builder_in
from small_disk import small_disk

pytestmark = pytest.mark.vm
GIB = 1 << 30
KEPT = 256 << 20
TAKE = f"""{FROM}RUN fallocate -l 500G /x; echo "at once: $(stat -c %s /x)"; rm -f /x; \\
    cat /dev/zero > /y; echo "by writing: $(stat -c %s /y)"; rm -f /y; \\
    mkdir /d; for i in $(seq 60000); do : > /d/$i || break; done; echo "inodes: $(ls /d | wc -l)"; false
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(GIB + (GIB >> 1)) as one:
        yield one


@contextlib.contextmanager
def least_free(disk: Path) -> Iterator[list[int]]:
    """The least that the host had free meanwhile, in bytes."""
    least, over = [1 << 60], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            there = os.statvfs(disk)
            least[0] = min(least[0], there.f_bavail * there.f_frsize)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield least
    finally:
        over.set()
        watch.join()


def told(said: str, what: str) -> int:
    return int(next(line for line in said.splitlines() if f"{what}: " in line and "RUN" not in line).rpartition(": ")[2])


async def test_a_step_takes_its_accounts_share_and_leaves_the_host_and_others_theirs(disk: Path, host_before: object) -> None:
    async with builder_in(disk, store_mib=512, kept_bytes=KEPT) as rig:
        with least_free(disk) as least:
            done, said = await rig.build(TAKE)
        assert done.status and said.count("No space left on device") >= 3, said
        assert told(said, "at once") < 512 << 20 and told(said, "by writing") < 512 << 20 and told(said, "inodes") < 512 << 6, said
        assert least[0] > KEPT and done.room_bytes == 512 << 20 and not done.disk_full
        assert (await rig.build(FROM, "222222222222"))[0].status == 0, "another account's"
        again, said = await rig.build(FROM)
        assert again.status == 0 and "broken" not in said, said


@pytest.mark.long
async def test_where_the_host_has_less_than_the_share_that_is_the_bound(disk: Path, host_before: object) -> None:
    async with builder_in(disk, store_mib=4096, kept_bytes=KEPT) as rig:
        with least_free(disk) as least:
            done, said = await rig.build(TAKE)
        assert done.status and said.count("No space left on device") >= 2, said
        assert least[0] > KEPT and 256 << 20 < done.room_bytes < 700 << 20
        assert told(said, "at once") < done.room_bytes and told(said, "by writing") < done.room_bytes, said


@pytest.mark.long
async def test_a_step_that_forks_without_end_ends_alone(host_before: object) -> None:
    """Control: with more of them to have, it forks as it likes."""
    forks = f"{FROM}RUN for i in $(seq 500); do sleep 60 & done; echo all"
    async with builder(processes=300) as rig:
        done, said = await rig.build(forks)
        assert done.status and "Cannot fork" in said and not rig.left(), said
        assert done.reason == "the container build wanted more than 300 processes (images.build_processes)"
    async with builder(processes=1500) as rig:
        assert (await rig.build(forks))[0].status == 0


async def test_without_the_wall_a_step_fills_the_hosts_disk(disk: Path, host_before: object) -> None:
    """Positive control: the store as it was, a plain directory."""
    async with builder_in(disk, store_mib=0, kept_bytes=KEPT) as rig:
        with least_free(disk) as least:
            done, said = await rig.build(f"{FROM}RUN fallocate -l 500G /x")
        assert done.status and "No space left on device" in said and least[0] < 16 << 20, said
