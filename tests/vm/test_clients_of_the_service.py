"""Clients that were written against the real service, unchanged: aws cli, microvm-ctl, capo, microvms, a create-or-update loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, BASE, KEY, ROLE, SECRET, ApiRig, image_arn
from real_name import real_name
from service import BUCKET, Instance, app_files

EGRESS = {"SubnetIds": ["subnet-1"], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"]}
OPERATOR = f"arn:aws:iam::{ACCOUNT}:role/operator"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("clients"), egress={"subnets": {"subnet-1": ["10.1.0.0/16"]}})
    one.image("cli")
    yield one
    one.close()


def aws(api: ApiRig, service: str, *words: str) -> Any:
    """One aws cli call; its JSON."""
    environment = {
        "PATH": os.environ["PATH"], "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{api.port}", "AWS_PAGER": "", "HOME": str(api.directory),
    }  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.prefix) / "bin/aws"), service, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (words, done.stderr)
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.mark.service
def test_every_subcommand_of_the_aws_cli(api: ApiRig) -> None:
    arn, made = image_arn("cli"), {"--base-image-arn": BASE, "--build-role-arn": ROLE, "--code-artifact": "uri=s3://bucket/app.zip"}
    build = [word for pair in made.items() for word in pair]
    called = set()

    def call(name: str, *words: str, service: str = "lambda-microvms") -> Any:
        called.add(name)
        return aws(api, service, name, *words)

    image = ("--image-identifier", arn)
    vm = call("run-microvm", *image)["microvmId"]
    api.reach(vm, "RUNNING")
    which = ("--microvm-identifier", vm)
    assert call("get-microvm", *which)["state"] == "RUNNING"
    assert vm in [one["microvmId"] for one in call("list-microvms")["items"]]
    minutes = ("--expiration-in-minutes", "5")
    assert call("create-microvm-auth-token", *which, *minutes, "--allowed-ports", "port=80")["authToken"]
    shell = call(
        "run-microvm",
        *image,
        "--ingress-network-connectors",
        f"{image_arn('x').partition(':123')[0]}:aws:network-connector:aws-network-connector:SHELL_INGRESS",
    )
    assert call("create-microvm-shell-auth-token", "--microvm-identifier", shell["microvmId"], *minutes)["authToken"]
    call("suspend-microvm", *which)
    api.reach(vm, "SUSPENDED")
    call("resume-microvm", *which)
    api.reach(vm, "RUNNING")
    call("terminate-microvm", *which)
    call("terminate-microvm", "--microvm-identifier", shell["microvmId"])
    other = call("create-microvm-image", "--name", "other", *build)["imageArn"]
    api.settled(other)
    which = ("--image-identifier", other)
    call("update-microvm-image", *which, *build)
    api.settled(other)
    assert call("get-microvm-image", *which)["latestActiveImageVersion"] == "2.0"
    assert len(call("list-microvm-image-versions", *which)["items"]) == 2
    version = (*which, "--image-version", "1.0")
    assert call("get-microvm-image-version", *version)["state"] == "SUCCESSFUL"
    assert call("update-microvm-image-version", *version, "--status", "INACTIVE")["status"] == "INACTIVE"
    built = call("list-microvm-image-builds", *version)["items"][0]["buildId"]
    assert call("get-microvm-image-build", *version, "--build-id", built)["buildState"] == "SUCCESSFUL"
    assert call("delete-microvm-image-version", *version)["state"] == "DELETING"
    api.settled(other)
    assert other in [one["imageArn"] for one in call("list-microvm-images")["items"]]
    assert call("list-managed-microvm-images")["items"][0]["imageArn"] == BASE
    assert len(call("list-managed-microvm-image-versions", "--image-identifier", BASE)["items"]) == 2
    call("tag-resource", "--resource", other, "--tags", "a=b")
    assert call("list-tags", "--resource", other)["Tags"] == {"a": "b"}
    call("untag-resource", "--resource", other, "--tag-keys", "a")
    assert call("delete-microvm-image", *which)["state"] == "DELETING"
    assert len(called) == 24
    called.clear()
    core = {"service": "lambda-core"}
    configuration = ("--configuration", json.dumps({"VpcEgressConfiguration": EGRESS}))
    one = call("create-network-connector", "--name", "c", *configuration, "--operator-role", OPERATOR, **core)["Id"]
    assert call("get-network-connector", "--identifier", one, **core)["State"] == "ACTIVE"
    assert call("list-network-connectors", **core)["NetworkConnectors"]
    call("update-network-connector", "--identifier", one, *configuration, **core)
    # list-network-connector-versions is in botocore, not yet in the aws cli.
    assert api.client("lambda-core").list_network_connector_versions(Identifier=one)["NetworkConnectorVersions"]
    assert call("delete-network-connector", "--identifier", one, **core)["State"] == "DELETING"
    assert len(called) == 5


@pytest.mark.service
def test_capo_reads_and_writes_everything(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SDK made from the published Smithy model, with an HTTP stack and a signer of its own."""
    import capo_lambda_microvms as capo

    for name, value in (("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    with capo.LambdaMicrovmsClient(region="us-east-1", endpoint=f"http://127.0.0.1:{api.port}") as client:
        vm = client.run_microvm(image_identifier=image_arn("cli"))
        api.reach(vm["microvm_id"], "RUNNING")
        assert client.get_microvm(microvm_identifier=vm["microvm_id"])["state"] == "RUNNING"
        token = client.create_microvm_auth_token(microvm_identifier=vm["microvm_id"], expiration_in_minutes=5, allowed_ports=[{"port": 80}])
        assert token["auth_token"]["X-aws-proxy-auth"]
        assert vm["microvm_id"] in [item["microvm_id"] for item in client.iter_list_microvms()]
        assert [image["name"] for image in client.iter_list_microvm_images()]
        client.tag_resource(resource=image_arn("cli"), tags={"by": "capo"})
        assert client.list_tags(resource=image_arn("cli"))["tags"] == {"by": "capo"}
        client.terminate_microvm(microvm_identifier=vm["microvm_id"])
        with pytest.raises(Exception, match="MicroVM not found: microvm-none"):
            client.get_microvm(microvm_identifier="microvm-none")


@pytest.mark.service
def test_create_or_update_as_terraform_does(api: ApiRig) -> None:
    """Read, create where it is not there, update where it differs, read again; twice, and the second time nothing changes."""
    client = api.client()
    wanted = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/tf.zip"}, "description": "one"}

    def apply(**request: Any) -> str:
        arn = image_arn("terraform")
        try:
            image = client.get_microvm_image(imageIdentifier=arn)
        except client.exceptions.ResourceNotFoundException:
            client.create_microvm_image(name="terraform", **request)
            api.settled(arn)
            return "created"
        version = client.get_microvm_image_version(imageIdentifier=arn, imageVersion=image["latestActiveImageVersion"])
        if all(version.get(name) == value for name, value in request.items()):
            return "unchanged"
        client.update_microvm_image(imageIdentifier=arn, **request)
        api.settled(arn)
        return "updated"

    assert [apply(**wanted), apply(**wanted), apply(**{**wanted, "description": "two"}), apply(**{**wanted, "description": "two"})] == [
        "created", "unchanged", "updated", "unchanged",
    ]  # fmt: skip


@pytest.mark.service
def test_microvms_control_plane(api: ApiRig, tmp_path: Path) -> None:
    """A client in Rust on AWS' SDK for Rust that takes no endpoint: the API has the real service's name to it. (Its guest daemon
    is for another architecture.)"""
    vm = api.run(image_arn("cli"))
    script = (
        "import sys\nfrom microvms import ControlPlane, Region\n"
        "plane, vm, image = ControlPlane(Region.us_east_1()), sys.argv[1], sys.argv[2]\n"
        "assert plane.get(vm).state == 'RUNNING'\n"
        "assert vm in [one.id for one in plane.list()]\n"
        "plane.suspend(vm)\nplane.wait_for_state(vm, ['SUSPENDED'], poll_interval=0.05)\n"
        "plane.resume(vm)\nplane.wait_for_state(vm, ['RUNNING'], poll_interval=0.05)\n"
        "assert image in [one.image_arn for one in plane.list_images()]\n"
        "version = plane.list_image_versions(image)[0].image_version\n"
        "assert plane.list_image_builds(image, version)\n"
        "plane.terminate(vm)\n"
    )
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    with real_name(tmp_path, api.port) as real:
        done = real.run(sys.executable, "-c", script, vm, image_arn("cli"), **keys)
    assert done.returncode == 0, done.stderr
    api.reach(vm, "TERMINATED")


# ---- on real microVMs ----


@pytest.mark.vm
def test_microvm_ctl_builds_runs_calls_and_scales(instance: Instance, app: str, tmp_path: Path) -> None:
    """microvm-ctl's own flow: its ImageBuilder's zip with its hook server, FleetManager, EndpointClient, Fleet."""
    source = tmp_path / "app"
    source.mkdir()
    for name, data in app_files().items():
        (source / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    script = tmp_path / "flow.py"
    script.write_text(
        "import sys\n"
        "from microvm import EndpointClient, Fleet, FleetManager, PlaneConfig\n"
        "from microvm.fleet import IdlePolicy\n"
        "from microvm.images import ImageBuilder\n"
        "cfg = PlaneConfig()\n"
        "hooks = {'microvmImageHooks': {'ready': 'ENABLED'}, 'port': 9000, 'microvmHooks': {'run': 'ENABLED', 'runTimeoutInSeconds': 10}}\n"
        "built = ImageBuilder(cfg).build('ctl', sys.argv[1], memory_mib=512, hooks=hooks)\n"
        "fm = FleetManager(cfg)\n"
        "vm = fm.run('ctl', idle_policy=IdlePolicy(max_idle=300, suspended_for=3600, auto_resume=True), run_payload='{\"a\": 1}')\n"
        "fm.wait_until(vm.microvm_id, 'RUNNING')\n"
        "client = EndpointClient(cfg, vm.microvm_id)\n"
        "assert client.get('/').json()['counter'] == 1\n"
        "fm.suspend(vm.microvm_id)\n"
        "fm.wait_until(vm.microvm_id, 'SUSPENDED')\n"
        "assert client.get('/').json()['counter'] == 2\n"
        "fleet = Fleet(fm, 'ctl')\n"
        "fleet.scale_to(2, wait_running=True)\n"
        "assert fleet.size() == 2\n"
        "fleet.drain()\n"
        "print('done')\n"
    )
    extra = {"MVM_ARTIFACT_BUCKET": BUCKET, "MVM_BUILD_ROLE_ARN": ROLE, "REQUESTS_CA_BUNDLE": instance.environment["CURL_CA_BUNDLE"]}
    done = subprocess.run(
        [sys.executable, str(script), str(source)],
        env={**instance.environment, **extra},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr
    drained = instance.client().list_microvms(imageIdentifier=image_arn("ctl"))["items"]
    for vm in drained:  # which drain() does not wait for
        instance.state(vm["microvmId"], "TERMINATED")
    instance.client().delete_microvm_image(imageIdentifier=image_arn("ctl"))


@pytest.mark.vm
def test_logs_of_a_microvm_by_the_aws_cli(instance: Instance, vm: dict[str, Any]) -> None:
    """filter-log-events and get-log-events of pip's aws cli; version 2's logs tail is in tests/conformance."""
    from wire import get

    get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"])
    group = "/aws/lambda-microvms/app"
    for name in (group, "/aws/lambda/microvms/app"):
        answer = json.loads(
            instance.command("aws", "logs", "filter-log-events", "--log-group-name", name, "--filter-pattern", "visit").stdout
        )
        assert any(event["message"].startswith("visit") for event in answer["events"])
    stream = answer["events"][-1]["logStreamName"]
    events = json.loads(instance.command("aws", "logs", "get-log-events", "--log-group-name", group, "--log-stream-name", stream).stdout)
    assert any(event["message"].startswith("visit") for event in events["events"])
