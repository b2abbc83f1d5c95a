"""Private base images: pulled with a login that a build was given, and by no build that was not."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry import Ecr, Registry, running, served
from service import Instance, app_files
from service import served as serving

from gateway.config import Settings
from gateway.messages import BuildRequest, BuildResult
from vmm.builds import Builder, BuildSettings
from vmm.cgroups import Cgroups
from vmm.making import key_path

pytestmark = pytest.mark.vm
UID = 1 << 30
TOOLS = Settings().cache / "builder"
# Says what of the builder's logins a RUN step can see: its own root, and every other process's.
PROBE = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
int main(void) {
    char path[300];
    int seen = open("/out/login/config.json", O_RDONLY) >= 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *one; proc && (one = readdir(proc));) {
        snprintf(path, sizeof path, "/proc/%s/root/out/login/config.json", one->d_name);
        if (open(path, O_RDONLY) >= 0) seen++;
    }
    printf("logins seen: %d\n", seen);
    return 0;
}
"""


@pytest.fixture
def registry(tmp_path: Path, host_before: object) -> Iterator[tuple[Registry, Path]]:
    (tmp_path / "probe.c").write_text(PROBE)
    subprocess.run(["musl-gcc", "-static", "-O1", "-o", tmp_path / "probe", tmp_path / "probe.c"], check=True, timeout=60)
    with served(tmp_path, "secret") as (one, trusted):
        one.put("private/base:1", {"probe": (tmp_path / "probe").read_bytes()})
        yield one, trusted


def asked(directory: Path, dockerfile: str, logins: dict[str, str]) -> BuildRequest:
    (directory / "Dockerfile").write_text(dockerfile)
    with tarfile.open(directory / "context.tar", "w") as archive:
        archive.add(directory / "Dockerfile", "Dockerfile")
    return BuildRequest(uuid.uuid4().hex, "image", "123456789012", [], 64 << 20, logins)


def sources(directory: Path) -> list[int]:
    return [os.open(directory / name, os.O_RDONLY) for name in ("context.tar", "Dockerfile")]


async def test_a_login_is_one_builds_and_stays_outside_of_it(registry: tuple[Registry, Path], tmp_path: Path) -> None:
    private, trusted = registry
    directory = Path(f"/var/tmp/torpor-bases-{os.getpid()}")
    directory.mkdir()
    cgroups = Cgroups("bases", directory)
    (tmp_path / "base.tar").touch()
    builder = Builder(
        directory, tmp_path / "netns", cgroups, BuildSettings(tmp_path / "base.tar", TOOLS, tmp_path, (), True, UID, str(trusted))
    )
    dockerfile = f'FROM {private.host}/private/base:1\nRUN ["/probe"]\nCMD ["/probe"]\n'

    async def build(logins: dict[str, str]) -> tuple[BuildResult, str]:
        request = asked(directory, dockerfile, logins)
        log, phases = await builder.begin(request, directory / "image", *sources(directory))
        with os.fdopen(log) as lines, os.fdopen(phases):
            text = await asyncio.to_thread(lines.read)
        return await builder.result(request.build), text

    try:
        cgroups.start()
        builder.start()
        refused, said = await build({})
        assert refused.status and private.refused and not private.pulled, said
        made, said = await build({private.host: private.login})
        assert made.status == 0 and "/probe" in made.config and "logins seen: 0" in said, said
        assert private.pulled == ["private/base"]
        # Its layers are in the store now, and do not open it to a build without the login; with it they are used again.
        again, said = await build({})
        assert again.status and private.pulled == ["private/base"], said
        more, said = await build({private.host: private.login})
        assert more.status == 0 and "CACHED" in said and private.login not in said, said
        assert not list((directory / "work").iterdir())
    finally:
        cgroups.close()
        subprocess.run(["rm", "-rf", directory], check=True)


@pytest.mark.long
async def test_another_local_base_takes_the_place_of_the_one_in_the_store(tmp_path: Path, host_before: object) -> None:
    """The layer store outlives an update of the code, whose base has another dnf: the base is known by what it was made from."""
    directory = Path(f"/var/tmp/torpor-bases-{os.getpid()}")
    directory.mkdir()
    cgroups = Cgroups("bases", directory)
    base = directory / "base.tar"
    builder = Builder(directory, tmp_path / "netns", cgroups, BuildSettings(base, TOOLS, tmp_path, ("local:base",), False, UID))

    async def build(release: str) -> str:
        with tarfile.open(base, "w") as archive:
            member = tarfile.TarInfo("release")
            member.size = len(release)
            archive.addfile(member, io.BytesIO(release.encode()))
        key_path(base).write_text(release)
        request = asked(directory, 'FROM local:base\nCOPY Dockerfile /copied\nCMD ["/release"]\n', {})
        log, phases = await builder.begin(request, directory / "image", *sources(directory))
        with os.fdopen(log) as lines, os.fdopen(phases):
            said = await asyncio.to_thread(lines.read)
        done = await builder.result(request.build)
        assert done.status == 0, said
        shown = subprocess.run(["debugfs", "-R", "cat /release", directory / "image/disk.raw"], capture_output=True, text=True, check=True)
        assert shown.stdout == release
        return said

    try:
        cgroups.start()
        builder.start()
        assert "making the local base" in await build("one")
        assert "making the local base" not in await build("one")
        assert "making the local base" in await build("two")
        assert "CACHED" in await build("two")
    finally:
        cgroups.close()
        subprocess.run(["rm", "-rf", directory], check=True)


@pytest.mark.long
def test_ecr_gives_it_to_the_build_role(registry: tuple[Registry, Path]) -> None:
    private, trusted = registry
    ecr = Ecr(private)
    files = app_files(**{"FROM ": f"FROM {private.host}/private/base:1 AS private\nFROM "})
    files["Dockerfile"] = str(files["Dockerfile"]) + "\nCOPY --from=private /probe /srv/probe\n"
    one = Instance("bases", 910_000, IMAGES__PULL="true", IMAGES__REGISTRY_CA=str(trusted), IMAGES__ECR_ENDPOINT=ecr.endpoint)
    with running(ecr), serving(one):
        arn = one.create("private", one.upload(files))
        build = one.built(arn)
        assert build["buildState"] == "SUCCESSFUL", build
        assert private.pulled == ["private/base"] and [key[:4] for key in ecr.asked] == ["ASIA"]
        ecr.open = False
        failed = one.built(one.create("refused", one.upload(files)))
        events = one.client("logs").filter_log_events(logGroupName="/aws/lambda-microvms/refused")["events"]
        said = " ".join(event["message"] for event in events)
        assert failed.get("stateReason") == "The container image build failed.", said
        assert "no login to ECR in us-east-1" in said and "AccessDeniedException" in said and private.login not in said
