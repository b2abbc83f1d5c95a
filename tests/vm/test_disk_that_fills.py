"""A host whose disk fills: a build ends and says why, what sleeps is kept, everything can be deleted, and all goes on when there is room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import Instance, app_files, served, until
from small_disk import fill, small_disk
from wire import get

pytestmark = pytest.mark.vm
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(4 << 30) as one:
        yield one


@pytest.fixture
def full(disk: Path, host_before: object) -> Iterator[Instance]:
    one = Instance(
        "full", 700_000 + 9 * 262_144, ROOT=str(disk / "root"), LIMITS__DISK_RESERVE_MIB="64", STANDBYS__PER_IMAGE="1", STANDBYS__LINKS="1"
    )
    one.root = disk / "root"
    with served(one):
        yield one


def test_a_disk_that_fills_and_is_freed(full: Instance, disk: Path) -> None:
    api, ca = full.client(), full.root / "tls/ca.crt"
    uri = full.upload(app_files())
    image = full.create("app", uri)
    assert full.built(image)["buildState"] == "SUCCESSFUL"
    vm = full.launch(image, idlePolicy=POLICY)
    token = full.token(vm["microvmId"])
    assert get(vm["endpoint"], ca, token).json()["counter"] == 1
    api.suspend_microvm(microvmIdentifier=vm["microvmId"])
    full.state(vm["microvmId"], "SUSPENDED")

    known = {path.name for path in (full.root / "images").iterdir()}
    api.update_microvm_image(
        imageIdentifier=image, baseImageArn=api.get_microvm_image_version(imageIdentifier=image, imageVersion="1.0")["baseImageArn"],
        buildRoleArn="arn:aws:iam::123456789012:role/test", codeArtifact={"uri": uri}, resources=[{"minimumMemoryInMiB": 512}],
    )  # fmt: skip
    until(lambda: any((path / "disk.raw").exists() for path in (full.root / "images").glob(".*") if path.name not in known), 120)
    filler = fill(disk)  # it boots, and is to be stored
    assert full.built(image, "2.0")["stateReason"].startswith("DISK_STORAGE_FULL")
    assert api.get_microvm_image(imageIdentifier=image)["state"] == "UPDATE_FAILED"
    until(lambda: {path.name for path in (full.root / "images").iterdir()} == known)  # what was built of it is gone
    filler.unlink()
    filler = fill(disk)

    refused = full.command("env", "AWS_MAX_ATTEMPTS=1", "aws", "lambda-microvms", "run-microvm", "--image-identifier", image, check=False)
    assert "The host has no room for another MicroVM (disk: 0 MiB are free" in refused.stderr, refused.stderr
    assert full.describe(vm["microvmId"])["state"] == "SUSPENDED" and api.list_microvms()["items"]
    api.delete_microvm_image_version(imageIdentifier=image, imageVersion="2.0")
    until(lambda: [one["imageVersion"] for one in api.list_microvm_image_versions(imageIdentifier=image)["items"]] == ["1.0"])

    filler.unlink()
    assert get(vm["endpoint"], ca, token).json()["counter"] == 2
    fill(disk)
    full.terminate(vm["microvmId"])
    api.delete_microvm_image(imageIdentifier=image)
    until(lambda: not api.list_microvm_images()["items"])
    left = {name for place in ("images", "sessions") for name in os.listdir(full.root / place)}
    assert left <= {"instance-id"}
