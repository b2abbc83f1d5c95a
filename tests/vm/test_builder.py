"""vmm's builder alone, without microVMs: what accounts share, what a build that is ended leaves, and a store that is of no use."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from build_rig import FROM, Rig, builder, builder_in
from small_disk import fill, small_disk

pytestmark = pytest.mark.vm


@pytest.fixture
async def rig(host_before: object) -> AsyncIterator[Rig]:
    async with builder() as one:
        yield one


async def test_an_account_finds_nothing_of_anothers(rig: Rig) -> None:
    """Layers, cache mounts, and the bytes of both on the disk."""
    step = "RUN --mount=type=cache,target=/kept cat /kept/mine 2>&1; echo secret-of-$WHO > /kept/mine; id; cat /proc/self/uid_map\n"
    for who in ("one", "other"):
        done, said = await rig.build(f"{FROM}ENV WHO={who}\n{step}", {"one": "111111111111", "other": "222222222222"}[who])
        assert done.status == 0 and "No such file" in said and "CACHED\n\n#6" not in said, said
    stores = {path.name: path / "store" for path in (rig.directory / "accounts").iterdir()}
    owners = {name: store.stat().st_uid for name, store in stores.items()}
    assert len(set(owners.values())) == 2
    for name, word in (("111111111111", "secret-of-other"), ("222222222222", "secret-of-one")):
        mine = {"secret-of-other": "secret-of-one", "secret-of-one": "secret-of-other"}[word]
        assert not rig.in_store(name, f"grep -rlF {word} .") and rig.in_store(name, f"grep -rlF {mine} .")
        strangers = f"find . ! -path './lost+found' '(' ! -uid +{owners[name] - 1} -o -uid +{owners[name] + (1 << 20) - 1} ')'"
        assert not rig.in_store(name, strangers)
    again, said = await rig.build(f"{FROM}ENV WHO=one\n{step}# the same account\n")
    assert again.status == 0 and "CACHED" in said, said


async def test_what_is_out_of_memory_is_said_and_a_broken_store_is_made_afresh(rig: Rig) -> None:
    done, said = await rig.build(f"{FROM}RUN head -c 900m /dev/zero | tail -n 1 > /dev/null\n")
    assert done.status and done.out_of_memory, said
    rig.in_store("111111111111", "ls buildkit/cache.db && yes 'no database' | head -n 1000 > buildkit/cache.db")
    done, said = await rig.build(FROM)
    assert done.status == 0 and "the layer store is broken: building again with a new one" in said, said
    assert not rig.left()


@pytest.fixture
def disk() -> Iterator[Path]:
    """With room for one account's layers and little more."""
    with small_disk(1 << 30) as one:
        yield one


async def test_a_full_disk_ends_one_build_and_is_given_back(disk: Path, host_before: object) -> None:
    """What the build wrote goes with it, also where it failed; the layers themselves go where their room is wanted."""
    async with builder_in(disk) as rig:
        done, said = await rig.build(FROM)
        assert done.status == 0, said
        free = os.statvfs(disk).f_bavail
        done, said = await rig.build(f"{FROM}RUN echo kept > /kept\nRUN cat /dev/zero > /full\n")
        assert done.status and "No space left on device" in said and not rig.left(), said
        assert os.statvfs(disk).f_bavail > free * 0.95, "a build that fails leaves no more than its layers that did not"
        rig.builder._settings = dataclasses.replace(rig.builder._settings, room_bytes=1 << 40)
        for account in (rig.directory / "accounts").iterdir():
            os.utime(account / "users", (0, 0))
        rig.builder.trim()
        assert rig.builder._trimming is not None
        await rig.builder._trimming
        assert not list((rig.directory / "accounts").iterdir()) and os.statvfs(disk).f_bavail > free
        assert (await rig.build(FROM))[0].status == 0


@pytest.mark.long
async def test_layers_that_a_full_disk_did_not_take_are_no_cache(disk: Path, host_before: object) -> None:
    """Another has filled the host's disk meanwhile: what the store's file system had promised was lost, and no step was told."""
    async with builder_in(disk) as rig:
        name, log = await rig.begin(f"{FROM}RUN head -c 100m /dev/urandom > /x; sleep 3; sync; sleep 1\n")
        async with asyncio.timeout(120):
            while not any(one.endswith(" sleep") for one in map(str.strip, rig.left())):
                await asyncio.sleep(0.05)
        filler = fill(disk)
        await log
        done = await rig.builder.result(name)
        assert done.status and done.disk_full
        assert not list((rig.directory / "accounts").glob("*/store.ext4")), "its store is made afresh"
        filler.unlink()
        done, said = await rig.build(FROM)
        assert done.status == 0 and "making the local base" in said, said


@pytest.mark.long
async def test_a_build_may_be_ended_at_any_moment(rig: Rig) -> None:
    """Nothing of it stays, and the next one goes on with the store."""
    assert (await rig.build(FROM))[0].status == 0
    for turn in range(12):
        dockerfile = f"{FROM}RUN echo {turn}; head -c 3000000 /dev/urandom > /x; sync\nRUN for i in $(seq 200); do echo $i > /f$i; done\n"
        name, log = await rig.begin(dockerfile)
        await asyncio.sleep(0.1 + 0.25 * turn)
        await rig.builder.cancel(name)
        await log
        assert not rig.left(), turn
        done, said = await rig.build(dockerfile)
        assert done.status == 0 and "broken" not in said and "making the local base" not in said, said
