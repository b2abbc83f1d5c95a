"""vmm's builder alone, without microVMs: builds of a Dockerfile for an account, their logs, and what they leave."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import tarfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.messages import BuildRequest, BuildResult
from vmm.builds import Builder, BuildSettings
from vmm.cgroups import Cgroups

NAME = "public.ecr.aws/lambda/microvms:al2023-minimal"
FROM = f"FROM {NAME}\nCMD true\n"
FIRST_UID = (1 << 30) + (1 << 29)


class Rig:
    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.cgroups = Cgroups("builder", directory)
        cache = Settings().cache
        named = {"memory_mib": 512, "store_mib": 4096, **settings}
        made = BuildSettings(cache / "base.tar", cache / "builder", cache / "modules", (NAME,), False, FIRST_UID, **named)
        self.builder = Builder(directory, directory / "netns", self.cgroups, made)

    async def begin(
        self, dockerfile: str, account: str = "111111111111", logins: dict[str, str] | None = None,
        links: dict[str, str] | None = None, programs: dict[str, Path] | None = None,
    ) -> tuple[str, asyncio.Task[str]]:  # fmt: skip
        """The build's name, and its log when it is over. The context has the Dockerfile, symbolic links and programs."""
        name = uuid.uuid4().hex
        (self.directory / f"{name}.Dockerfile").write_text(dockerfile)
        with tarfile.open(self.directory / f"{name}.tar", "w") as archive:
            archive.add(self.directory / f"{name}.Dockerfile", "Dockerfile")
            for program, path in (programs or {}).items():
                archive.add(path, program)
            for link, target in (links or {}).items():
                member = tarfile.TarInfo(link)
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)
        sources = (os.open(self.directory / f"{name}.{kind}", os.O_RDONLY) for kind in ("tar", "Dockerfile"))
        request = BuildRequest(name, "image", account, [], 256 << 20, logins or {})
        log, phases = await self.builder.begin(request, self.directory / "image", *sources)

        async def read() -> str:
            with os.fdopen(log, errors="replace") as lines, os.fdopen(phases):
                return await asyncio.to_thread(lines.read)

        return name, asyncio.get_running_loop().create_task(read())

    async def build(self, dockerfile: str, account: str = "111111111111", **more: Any) -> tuple[BuildResult, str]:
        name, log = await self.begin(dockerfile, account, **more)
        said = await log
        return await self.builder.result(name), said

    def allow_pulls(self) -> None:
        self.builder._settings = dataclasses.replace(self.builder._settings, pull=True)

    def in_store(self, account: str, command: str) -> str:
        """A command's output in an account's layers."""
        disk = self.directory / "accounts" / account / "store.ext4"
        command = f'mount -o loop "{disk}" /mnt && cd /mnt && {command}'
        done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode <= 1 and not done.stderr, done.stderr
        return done.stdout

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


@asynccontextmanager
async def builder_in(directory: Path, **settings: Any) -> AsyncIterator[Rig]:
    """A builder that has started, in a directory that is there."""
    one = Rig(directory, **settings)
    try:
        one.cgroups.start()
        one.builder.start()
        yield one
    finally:
        one.cgroups.close()


@asynccontextmanager
async def builder(**settings: Any) -> AsyncIterator[Rig]:
    """The same in a directory of its own."""
    directory = Path(f"/var/tmp/torpor-builder-{os.getpid()}")
    directory.mkdir()
    try:
        async with builder_in(directory, **settings) as one:
            yield one
    finally:
        subprocess.run(["rm", "-rf", directory], check=True)
