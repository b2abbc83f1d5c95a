"""The API on a disk that is really full (a small tmpfs): what reads and what ends things works, also after a restart on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import IMAGES, VMS, ApiRig, create, encoded
from test_api_connectors import EGRESS, OPERATOR, PATH

pytestmark = [pytest.mark.service, pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "full", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    assert os.statvfs(disk).f_bavail == 0


def test_with_the_disk_full_everything_can_be_read_and_deleted(disk: Path) -> None:
    egress = {"subnets": {"subnet-1": ["10.1.0.0/16"]}, "security_groups": {"sg-1": ["tcp:443"]}}
    api = ApiRig(disk, egress=egress)
    try:
        api.pipeline.failing["failed"] = "it does not build"
        built, failed, running = api.image("built"), api.image("failed"), api.image("running")
        several = api.image("several")
        body = {"baseImageArn": api.client().get_microvm_image_version(imageIdentifier=several, imageVersion="1.0")["baseImageArn"]}
        body |= {"buildRoleArn": "arn:aws:iam::123456789012:role/build", "codeArtifact": {"uri": "s3://bucket/app.zip"}}
        assert api.call("PUT", f"{IMAGES}/{encoded(several)}", body)[0] == 200
        api.settled(several)
        vms = [api.run(running) for _ in range(3)]
        configuration = {"VpcEgressConfiguration": EGRESS}
        made = api.call("POST", PATH, {"Name": "c", "OperatorRole": OPERATOR, "ClientToken": "t", "Configuration": configuration})[2]
        fill(disk)

        for path in (IMAGES, VMS, f"{IMAGES}/{encoded(built)}", f"{VMS}/{vms[0]}", PATH, f"{PATH}/{made['Id']}"):
            assert api.call("GET", path)[0] == 200, path
        assert api.call("DELETE", f"{VMS}/{vms[0]}")[0] in (200, 202)
        api.reach(vms[0], "TERMINATED")
        assert api.call("DELETE", f"{IMAGES}/{encoded(several)}/versions/1.0")[0] in (200, 202)
        assert api.call("DELETE", f"{IMAGES}/{encoded(built)}")[0] in (200, 202)
        assert api.call("DELETE", f"{PATH}/{made['Id']}")[0] in (200, 202)

        api.restart()  # a start on a full disk knows all that was stored
        fill(disk)
        assert api.call("GET", f"{IMAGES}/{encoded(built)}")[0] == 404
        assert [one["imageVersion"] for one in api.call("GET", f"{IMAGES}/{encoded(several)}/versions")[2]["items"]] == ["2.0"]
        for vm in vms[1:]:
            assert api.call("DELETE", f"{VMS}/{vm}")[0] in (200, 202)
            api.reach(vm, "TERMINATED")
        for arn in (failed, running, several):
            assert api.call("DELETE", f"{IMAGES}/{encoded(arn)}")[0] in (200, 202)
        made_again = create(api, "more")
        assert made_again[0] in (201, 500, 503), "what makes something may be refused"
    finally:
        api.close()
