"""Bad input: one clear line, the right code, and nothing left behind."""

from __future__ import annotations

import os
import struct
import subprocess
import zipfile
from typing import Any

import pytest
from service import BASE, ROLE, Instance, app_files, make_zip, until

pytestmark = pytest.mark.vm
FROM = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n"


def bomb() -> bytes:
    """An entry that says what it would become: more than is taken (images.unpacked_bytes)."""
    size = struct.pack("<I", 1 << 20)
    return make_zip({"Dockerfile": FROM, "zeros": b"\0" * (1 << 20)}).replace(size, struct.pack("<I", 3 << 30))


def lying() -> bytes:
    """An entry that claims to be small and is not."""
    data = bytearray(make_zip({"Dockerfile": FROM, "zeros": b"\0" * (1 << 20)}))
    size = struct.pack("<I", 1 << 20)
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = struct.pack("<I", 100)
    return bytes(data)


def link() -> bytes:
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("Dockerfile", FROM)
        info = zipfile.ZipInfo("etc")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "../etc")
    return out.getvalue()


ARTIFACTS: dict[str, tuple[Any, str]] = {
    "not-a-zip": (b"this is no zip", "ARCHIVE_INVALID: the artifact is not a zip file"),
    "cut-short": (make_zip(app_files())[:-40], "ARCHIVE_INVALID: the artifact cannot be read as a zip file"),
    "no-dockerfile": ({"app.py": "x"}, "ARCHIVE_DOCKERFILE_NOT_FOUND: the artifact has no Dockerfile at its root"),
    "climbs-out": ({"Dockerfile": FROM, "../../evil": "x"}, "ARCHIVE_INVALID: entry '../../evil' leaves the archive"),
    "absolute": ({"Dockerfile": FROM, "/etc/evil": "x"}, "ARCHIVE_INVALID: entry '/etc/evil' has an absolute path"),
    "bomb": (bomb, "ARCHIVE_INVALID: the artifact's"),
    "lying": (lying, "ARCHIVE_INVALID"),
    "link": (link, "ARCHIVE_INVALID: entry 'etc' is a link that leaves the archive: '../etc'"),
    "transport": ({"Dockerfile": "FROM oci-archive:/etc/passwd\n"}, "CONTAINER_BUILD_FAILED: Dockerfile, line 1: FROM names a transport"),
    "unknown-base": ({"Dockerfile": "FROM example.com/no/such:1\nCMD [\"x\"]\n"}, "The container image build failed."),
    "failing-run": ({"Dockerfile": FROM + "RUN exit 3\nCMD [\"x\"]\n"}, "The container image build failed."),
    "nothing-to-start": ({"Dockerfile": FROM + "RUN true\n"}, "CONTAINER_BUILD_FAILED: the Dockerfile sets neither ENTRYPOINT nor CMD"),
    "app-exits": ({"Dockerfile": FROM + 'CMD ["sh", "-c", "echo going; exit 3"]\n'}, "Container Stopped with Exit Code: 3"),
    "no-such-program": ({"Dockerfile": FROM + 'CMD ["/no/such/program"]\n'}, "Container Stopped with Exit Code: 127"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_that_cannot_become_an_image(instance: Instance, name: str) -> None:
    made, reason = ARTIFACTS[name]
    arn = instance.create(f"bad-{name}", instance.upload(made() if callable(made) else made, f"{name}.zip"))
    build = instance.built(arn)
    assert build["buildState"] == "FAILED"
    assert build["stateReason"].startswith(reason), build["stateReason"]
    image = instance.client().get_microvm_image(imageIdentifier=arn)
    assert image["state"] == "CREATE_FAILED" and image["latestFailedImageVersion"] == "1.0"
    with pytest.raises(instance.client().exceptions.ResourceNotFoundException, match="No active version found"):
        instance.client().run_microvm(imageIdentifier=arn)
    instance.client().delete_microvm_image(imageIdentifier=arn)
    until(lambda: arn not in [item["imageArn"] for item in instance.client().list_microvm_images()["items"]])
    assert not [path for path in (instance.root / "images").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("s3://no-such-bucket/a.zip", "S3_NO_SUCH_BUCKET"), ("s3://artifacts/no-such-key.zip", "S3_NO_SUCH_KEY")],
)
def test_artifacts_that_are_not_there(instance: Instance, uri: str, reason: str) -> None:
    instance.upload({"x": "y"}, "other.zip")
    arn = instance.create(f"missing-{reason.lower()}", uri)
    assert instance.built(arn)["stateReason"].startswith(reason)
    instance.client().delete_microvm_image(imageIdentifier=arn)


def test_ready_hook_that_is_never_reached(instance: Instance, app: str) -> None:
    image = {"ready": "ENABLED", "readyTimeoutInSeconds": 3}
    silent = instance.create("never-ready", instance.upload(app_files()), hooks={"port": 9100, "microvmImageHooks": image})
    image = {"ready": "ENABLED", "readyTimeoutInSeconds": 60}
    refusing = instance.create(
        "not-ready", "s3://artifacts/app.zip", hooks={"port": 9000, "microvmImageHooks": image}, environmentVariables={"HOOK_READY": "500"}
    )
    assert instance.built(silent)["stateReason"] == "Ready hook invocation timed out after PT3S"
    reason = "Ready hook check failed: the application returned a server error (HTTP 5xx) response"
    assert instance.built(refusing)["stateReason"] == reason
    for arn in (silent, refusing):
        instance.client().delete_microvm_image(imageIdentifier=arn)


def test_requests_that_the_api_refuses(instance: Instance, app: str) -> None:
    api = instance.client()
    with pytest.raises(api.exceptions.ValidationException, match="Malformed ARN - doesn't start with 'arn:'"):
        api.run_microvm(imageIdentifier="app")
    with pytest.raises(api.exceptions.ResourceNotFoundException, match="MicroVM not found: microvm-x"):
        api.get_microvm(microvmIdentifier="microvm-x")
    with pytest.raises(api.exceptions.ValidationException, match="already exists in this account"):
        instance.create("app", "s3://artifacts/app.zip")
    with pytest.raises(api.exceptions.ValidationException, match="must be a valid S3 URI"):
        instance.create("other", "https://example.com/a.zip")
    with pytest.raises(api.exceptions.ValidationException, match="requested memory size of 700 MiB is not supported"):
        instance.create("other", "s3://artifacts/app.zip", resources=[{"minimumMemoryInMiB": 700}])
    with pytest.raises(api.exceptions.ValidationException, match="run hook must be enabled"):
        api.run_microvm(imageIdentifier=app, runHookPayload="x")
    with pytest.raises(api.exceptions.ValidationException, match="ExpirationMinutes 61 exceeded max allowed of 60"):
        api.create_microvm_auth_token(microvmIdentifier=instance.launch(app, maximumDurationInSeconds=30)["microvmId"],
                                      expirationInMinutes=61, allowedPorts=[{"port": 1}])  # fmt: skip
    with pytest.raises(api.exceptions.ValidationException, match="2 validation errors detected: Value null at 'baseImageArn'"):
        api.create_microvm_image(name="x y", buildRoleArn=ROLE, codeArtifact={"uri": "s3://b/k"})
    with pytest.raises(api.exceptions.ValidationException, match=r"No managed MicroVM Image with arn .* and version 999 is available"):
        api.create_microvm_image(name="x", baseImageArn=BASE, baseImageVersion="999", buildRoleArn=ROLE, codeArtifact={"uri": "s3://b/k"})


def test_signatures_are_checked(instance: Instance, app: str) -> None:
    import boto3
    import requests

    url = f"http://127.0.0.1:{instance.environment['TORPOR_API__PORT']}"
    good = instance.client()._request_signer._credentials
    for key, secret, code in (
        (good.access_key, "wrong", "InvalidSignatureException"),
        ("AKIAOTHER", good.secret_key, "UnrecognizedClientException"),
    ):
        client = boto3.client(
            "lambda-microvms", region_name="us-east-1", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret
        )
        with pytest.raises(client.exceptions.ClientError) as refused:
            client.list_microvms()
        assert (refused.value.response["Error"]["Code"], refused.value.response["ResponseMetadata"]["HTTPStatusCode"]) == (code, 403)
    assert requests.get(f"{url}/2025-09-09/microvms", timeout=5).status_code == 403
    unknown = requests.get(f"{url}/2025-09-09/nothing", timeout=5)
    assert unknown.status_code == 404 and "<h1>404 Not Found</h1>" in unknown.text


def test_client_tokens_make_run_idempotent(instance: Instance, app: str) -> None:
    api = instance.client()
    first = api.run_microvm(imageIdentifier=app, clientToken="token-1", maximumDurationInSeconds=60)
    second = api.run_microvm(imageIdentifier=app, clientToken="token-1", maximumDurationInSeconds=60)
    assert first["microvmId"] == second["microvmId"] and second["state"] == "PENDING"
    with pytest.raises(api.exceptions.ConflictException):
        api.run_microvm(imageIdentifier=app, clientToken="token-1", maximumDurationInSeconds=61)
    instance.terminate(first["microvmId"])


def test_image_in_use_is_kept(instance: Instance, app: str, vm: dict[str, Any]) -> None:
    api = instance.client()
    with pytest.raises(api.exceptions.ValidationException, match=r"Cannot delete microvm image with running microvms\."):
        api.delete_microvm_image(imageIdentifier=app)
    arn = instance.create("in-build", instance.upload(app_files(), "in-build.zip"))
    with pytest.raises(api.exceptions.ValidationException, match="Cannot delete MicroVM image in its current state"):
        api.delete_microvm_image(imageIdentifier=arn)
    assert instance.built(arn)["buildState"] == "SUCCESSFUL"
    api.delete_microvm_image(imageIdentifier=arn)


def test_update_makes_a_new_version_and_a_failed_one_keeps_the_old(instance: Instance, app: str) -> None:
    api = instance.client()
    arn = instance.create("changing", instance.upload(app_files(), "changing.zip"))
    instance.built(arn)
    request = {"baseImageArn": BASE, "buildRoleArn": ROLE, "resources": [{"minimumMemoryInMiB": 512}]}
    uri = instance.upload(app_files(**{"GREETING=hello": "GREETING=goodbye"}), "changing2.zip")
    assert api.update_microvm_image(imageIdentifier=arn, codeArtifact={"uri": uri}, **request)["imageVersion"] == "2.0"
    assert instance.built(arn, "2.0")["buildState"] == "SUCCESSFUL"
    api.update_microvm_image(imageIdentifier=arn, codeArtifact={"uri": "s3://artifacts/none"}, **request)
    assert instance.built(arn, "3.0")["buildState"] == "FAILED"
    image = api.get_microvm_image(imageIdentifier=arn)
    assert (image["state"], image["latestActiveImageVersion"], image["latestFailedImageVersion"]) == ("UPDATE_FAILED", "2.0", "3.0")
    vm = instance.launch(arn)
    assert vm["imageVersion"] == "2.0"
    instance.terminate(vm["microvmId"])
    api.delete_microvm_image(imageIdentifier=arn)


@pytest.fixture(scope="module")
def cramped(host_before: object) -> Any:
    """An instance whose root is a small file system of its own: an image fits, little more. What keeps a launch from a full disk is off."""
    one = Instance("test3", 700_000 + 2 * 262_144, LIMITS__DISK_RESERVE_MIB="0", LIMITS__DISK_PERCENT="0", STANDBYS__PER_IMAGE="1")
    one.root.mkdir(parents=True)
    disk = one.directory / "disk.img"
    with disk.open("wb") as file:
        os.truncate(file.fileno(), 2200 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(one.root)], check=True)
    try:
        one.start()
        yield one
    finally:
        try:
            if one.process is not None:
                one.stop()
        finally:
            subprocess.run(["umount", "--lazy", str(one.root)], check=True)
            one.remove()


def fill(instance: Instance, leave_kib: int) -> Any:
    """Leaves this much room on the small disk."""
    status = os.statvfs(instance.root)
    size = status.f_bavail * status.f_frsize - (leave_kib << 10)
    filler = instance.root / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 4096))
    return filler


def test_full_disk_during_build_launch_and_suspend(cramped: Instance) -> None:
    from pathlib import Path

    from wire import get

    api = cramped.client()
    arn = cramped.create("app", cramped.upload(app_files()))
    assert cramped.built(arn)["buildState"] == "SUCCESSFUL"
    vm = cramped.launch(arn, idlePolicy={"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 60, "autoResumeEnabled": True})
    token = cramped.token(vm["microvmId"])
    ca = Path(cramped.root / "tls/ca.crt")
    assert get(vm["endpoint"], ca, token, "/dirty?mib=64").status == 200
    filler = fill(cramped, 3000)
    # Suspend: there is no room for 64 MiB of memory, so it runs on with all it has.
    api.suspend_microvm(microvmIdentifier=vm["microvmId"])
    cramped.state(vm["microvmId"], "RUNNING")
    assert get(vm["endpoint"], ca, token, "/state").status == 200
    # Build: refused with its code, nothing half made.
    other = cramped.create("other", "s3://artifacts/app.zip")
    assert cramped.built(other)["stateReason"].startswith("DISK_STORAGE_FULL")
    filler.unlink()
    api.suspend_microvm(microvmIdentifier=vm["microvmId"])
    cramped.state(vm["microvmId"], "SUSPENDED")
    assert get(vm["endpoint"], ca, token, "/").json()["counter"] == 1
    # Launch: an error, and no orphan.
    filler = fill(cramped, 64)
    made = api.run_microvm(imageIdentifier=arn)
    reason = cramped.state(made["microvmId"], "TERMINATED")["stateReason"]
    assert reason.startswith("The MicroVM could not be launched: no room for session")
    filler.unlink()
    until(lambda: set(cramped.hypervisors()) == {vm["microvmId"]})
    assert get(vm["endpoint"], ca, token, "/").json()["counter"] == 2
    cramped.terminate(vm["microvmId"])
