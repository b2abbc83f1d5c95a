"""vmm's builder alone, without microVMs: what accounts share, what a build that is ended leaves, and a store that is of no use."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from small_disk import small_disk

from gateway.config import Settings
from gateway.messages import BuildRequest, BuildResult
from vmm.builds import Builder, BuildSettings
from vmm.cgroups import Cgroups

pytestmark = pytest.mark.vm
NAME = "public.ecr.aws/lambda/microvms:al2023-minimal"
FROM = f"FROM {NAME}\nCMD true\n"
FIRST_UID = (1 << 30) + (1 << 29)


class Rig:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cgroups = Cgroups("builder", directory)
        cache = Settings().cache
        made = BuildSettings(cache / "base.tar", cache / "builder", cache / "modules", (NAME,), False, FIRST_UID, memory_mib=512)
        self.builder = Builder(directory, directory / "netns", self.cgroups, made)

    async def begin(self, dockerfile: str, account: str = "111111111111") -> tuple[str, asyncio.Task[str]]:
        """The build's name, and its log when it is over."""
        name = uuid.uuid4().hex
        (self.directory / f"{name}.Dockerfile").write_text(dockerfile)
        with tarfile.open(self.directory / f"{name}.tar", "w") as archive:
            archive.add(self.directory / f"{name}.Dockerfile", "Dockerfile")
        files = (os.open(self.directory / f"{name}.{kind}", os.O_RDONLY) for kind in ("tar", "Dockerfile"))
        request = BuildRequest(name, "image", account, [], 256 << 20, {})
        log, phases = await self.builder.begin(request, self.directory / "image", *files)

        async def read() -> str:
            with os.fdopen(log, errors="replace") as lines, os.fdopen(phases):
                return await asyncio.to_thread(lines.read)

        return name, asyncio.get_running_loop().create_task(read())

    async def build(self, dockerfile: str, account: str = "111111111111") -> tuple[BuildResult, str]:
        name, log = await self.begin(dockerfile, account)
        said = await log
        return await self.builder.result(name), said

    def left(self) -> list[str]:
        """Processes of the builder's users, and what builds have while they are under way."""
        found = [entry.name for place in ("work", "netns") for entry in (self.directory / place).iterdir()]
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            except OSError:
                continue
            is_over = fields["State"][0] in "ZX"
            if not is_over and FIRST_UID <= int(fields["Uid"].split()[0]) < FIRST_UID + (1 << 28):
                found.append(f"process {status.parent.name} {fields['Name']}")
        return found + self.cgroups.names()


@pytest.fixture
async def rig(host_before: object) -> AsyncIterator[Rig]:
    directory = Path(f"/var/tmp/torpor-builder-{os.getpid()}")
    directory.mkdir()
    one = Rig(directory)
    try:
        one.cgroups.start()
        one.builder.start()
        yield one
    finally:
        one.cgroups.close()
        subprocess.run(["rm", "-rf", directory], check=True)


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
        assert subprocess.run(["grep", "-rlF", word, stores[name]], capture_output=True, check=False).returncode == 1
        strangers = ["find", str(stores[name]), "!", "-uid", f"+{owners[name] - 1}", "-o", "-uid", f"+{owners[name] + (1 << 20) - 1}"]
        assert not subprocess.run(strangers, capture_output=True, check=True, text=True).stdout
    again, said = await rig.build(f"{FROM}ENV WHO=one\n{step}# the same account\n")
    assert again.status == 0 and "CACHED" in said, said


async def test_what_is_out_of_memory_is_said_and_a_broken_store_is_made_afresh(rig: Rig) -> None:
    done, said = await rig.build(f"{FROM}RUN head -c 900m /dev/zero | tail -n 1 > /dev/null\n")
    assert done.status and done.out_of_memory, said
    (database,) = (rig.directory / "accounts").glob("*/store/buildkit/cache.db")
    database.write_bytes(b"no database" * 1000)
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
    rig = Rig(disk)
    rig.cgroups.start()
    rig.builder.start()
    try:
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
    finally:
        rig.cgroups.close()


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
