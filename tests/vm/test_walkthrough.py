"""The main path, on real microVMs: launch, call, sleep, wake, with what must survive checked inside the guest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import PATIENCE, REPO, Instance, until
from wire import get

from vmm.syscalls import data_segments

pytestmark = pytest.mark.vm


def bundle(instance: Instance) -> Path:
    return instance.root / "tls/ca.crt"


def test_first_call_sees_the_guest_that_the_service_promises(instance: Instance, vm: dict[str, Any]) -> None:
    facts = get(vm["endpoint"], bundle(instance), vm["token"]).json()
    assert facts["peer"] == "127.0.0.1"
    assert facts["pid"] == 1 and facts["uid"] == 0
    assert facts["cap_eff"] == "00000000a80425fb"
    assert facts["host"] == "localhost"
    assert facts["env"]["AWS_LAMBDA_MICROVM_IMAGE_NAME"] == "app"
    assert facts["env"]["AWS_LAMBDA_MICROVM_IMAGE_VERSION"] == "1.0"
    assert facts["env"]["AWS_REGION"] == "us-east-1"
    assert facts["env"]["GREETING"] == "hello"
    assert not [name for name, value in facts["env"].items() if ".lent" in value]
    assert facts["counter"] == 1 and facts["lines"] == 1


def test_listener_on_loopback_only_is_reached(instance: Instance, vm: dict[str, Any]) -> None:
    answer = get(vm["endpoint"], bundle(instance), vm["token"], "/state", X_aws_proxy_port="7001")
    assert answer.status == 200 and answer.json()["peer"] == "127.0.0.1"


def test_a_clone_writes_nothing_that_was_its_images_to_write(instance: Instance, vm: dict[str, Any]) -> None:
    """The application wrote 4 MiB when it started, before the image was made of it."""
    assert get(vm["endpoint"], bundle(instance), vm["token"], "/sync").body == b"synced"
    overlay = instance.root / "sessions" / vm["microvmId"] / "overlay"
    assert overlay.stat().st_blocks * 512 < 2 << 20


def test_sleep_and_wake_keep_memory_disk_clock_and_threads(instance: Instance, vm: dict[str, Any]) -> None:
    before = get(vm["endpoint"], bundle(instance), vm["token"]).json()
    for round_ in range(3):
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
        until(lambda: vm["microvmId"] not in instance.hypervisors())
        fell_asleep = time.time()
        until(lambda fell_asleep=fell_asleep: time.time() > fell_asleep + 1.5)
        asked = time.time()
        answer = get(vm["endpoint"], bundle(instance), vm["token"])
        after = answer.json()
        assert answer.fields["server-timing"].startswith("hold;dur=")
        assert after["counter"] == before["counter"] + 1 == round_ + 2
        assert after["lines"] == before["lines"] + 1
        assert before["ticks"] <= after["ticks"] < before["ticks"] + 50 * PATIENCE
        assert asked - 0.5 * PATIENCE < after["time"] < time.time() + 0.5
        assert after["mono"] - before["mono"] < after["time"] - before["time"] - (asked - fell_asleep) + 1, (
            "the pause happened to its clock"
        )
        assert after["random"] != before["random"]
        before = after
        later = get(vm["endpoint"], bundle(instance), vm["token"], "/state").json()
        assert later["ticks"] >= after["ticks"]
    assert instance.describe(vm["microvmId"])["state"] == "RUNNING"


def test_clones_are_strangers_to_each_other(instance: Instance, app: str, vm: dict[str, Any]) -> None:
    other = instance.launch(app)
    try:
        token = instance.token(other["microvmId"])
        one = get(vm["endpoint"], bundle(instance), vm["token"]).json()
        two = get(other["endpoint"], bundle(instance), token).json()
        assert one["random"] != two["random"]
        assert two["counter"] == 1 and two["lines"] == 1
        assert vm["endpoint"] != other["endpoint"]
        assert get(vm["endpoint"], bundle(instance), token).status == 403
    finally:
        instance.terminate(other["microvmId"])


def test_clone_cannot_change_its_images_memory(instance: Instance, app: str, vm: dict[str, Any]) -> None:
    """The sealed memory that clones map is the same after a clone wrote a lot; and the devices that could punch holes
    into it are not there."""
    record = instance.hypervisors()[vm["microvmId"]]
    pid, name = record["pid"], f"memfd:torpor-{record['image']}"
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"balloon" not in command and b"free-page" not in command
    maps = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if name in line]
    assert maps and all(line.split()[1] == "rw-p" for line in maps)
    fds = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if name in os.readlink(fd)]
    assert not [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd:torpor-disk" in os.readlink(fd)], (
        "the disk's stand-in is still there"
    )
    stored = instance.root / "images" / record["image"] / "memory.raw"
    assert get(vm["endpoint"], bundle(instance), vm["token"], "/dirty?mib=64").status == 200
    with fds[0].open("rb") as memory, stored.open("rb") as image:
        assert os.fstat(memory.fileno()).st_size == os.fstat(image.fileno()).st_size
        for start, end in data_segments(memory.fileno()):
            for at in range(start, end, 1 << 20):
                length = min(1 << 20, end - at)
                assert os.pread(memory.fileno(), length, at) == os.pread(image.fileno(), length, at)


def test_output_is_in_the_log_store(instance: Instance, vm: dict[str, Any]) -> None:
    get(vm["endpoint"], bundle(instance), vm["token"])
    lines = until(lambda: [line for line in instance.command("torpor", "logs", vm["microvmId"]).stdout.splitlines() if "visit" in line])
    assert lines == ["visit 1"]


def test_command_line_from_end_to_end(instance: Instance, app: str) -> None:
    run = instance.command
    identifier = run("torpor", "run", "app", "--idle", "600").stdout.strip()
    token = run("torpor", "token", identifier, "-p", "8080", "-q").stdout.strip()
    endpoint = instance.describe(identifier)["endpoint"]
    answer = run("curl", "-sS", "-H", f"X-aws-proxy-auth: {token}", f"https://{endpoint}/")
    assert json.loads(answer.stdout)["counter"] == 1
    run("torpor", "suspend", identifier)
    assert json.loads(run("torpor", "curl", identifier, "/").stdout)["counter"] == 2
    listed = json.loads(run("torpor", "ps", "--json").stdout)
    assert [item["state"] for item in listed if item["microvmId"] == identifier] == ["RUNNING"]
    shown = json.loads(run("aws", "lambda-microvms", "get-microvm", "--microvm-identifier", identifier).stdout)
    assert shown["state"] == "RUNNING" and shown["imageArn"] == app
    run("torpor", "suspend", identifier)
    run("torpor", "resume", identifier)
    run("torpor", "terminate", identifier)
    assert instance.describe(identifier)["stateReason"] == "Success."
    missing = run("torpor", "suspend", "microvm-00000000-0000-0000-0000-000000000000", check=False)
    assert missing.returncode == 3 and "MicroVM not found" in missing.stderr and "Traceback" not in missing.stderr


DEMO_ROOT = Path("/var/tmp/torpor-demo-test")


@pytest.fixture
def demo(instance: Instance) -> Iterator[dict[str, str]]:
    """The environment of make demo's own script, for an instance of its own."""
    kept = {
        name: value for name, value in instance.environment.items() if not name.startswith(("AWS_", "TORPOR_")) or name == "TORPOR_CACHE"
    }
    yield kept | {"TORPOR_DEMO_ROOT": str(DEMO_ROOT), "TORPOR_USERS__FIRST": "1700000", "TORPOR_EGRESS__CLOSED": "true"}
    subprocess.run(["rm", "-rf", str(DEMO_ROOT)], check=True)


def run_demo(environment: dict[str, str]) -> None:
    """It checks state and leftovers itself."""
    done = subprocess.run(
        [sys.executable, "config/demo.py"], env=environment, capture_output=True, text=True, timeout=240, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_demo_runs_and_leaves_nothing(demo: dict[str, str]) -> None:
    run_demo(demo)


@pytest.mark.long
@pytest.mark.parametrize("killed", ["the script", "the service too"])
def test_a_demo_that_was_killed_is_made_up_for_by_the_next(demo: dict[str, str], killed: str) -> None:
    """Its microVM runs, its image is there, and some or all of its processes hold the instance's lock and ports."""
    with subprocess.Popen([sys.executable, "config/demo.py"], env=demo, stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout is not None
        assert any("4. Call it" in line for line in process.stdout)
        process.kill()
    if killed == "the service too":
        os.kill(int(Path("/run/torpor/demo/lock").read_text()), signal.SIGKILL)
    run_demo(demo)


@pytest.mark.parametrize(("name", "status"), [("NO_INGRESS", 403), ("SHELL_INGRESS", 403), ("ALL_INGRESS", 200)])
def test_ingress_connectors_open_what_they_name(instance: Instance, app: str, name: str, status: int) -> None:
    arn = f"arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:{name}"
    vm = instance.launch(app, ingressNetworkConnectors=[arn])
    try:
        assert get(vm["endpoint"], bundle(instance), instance.token(vm["microvmId"])).status == status
    finally:
        instance.terminate(vm["microvmId"])
