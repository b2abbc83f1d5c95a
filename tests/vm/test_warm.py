"""Suspended sessions whose hypervisors are still there, paused: they wake at once, and nothing is lost when they go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
from durable import DurableStore
from service import PATIENCE, Instance, app_files, served, until
from wire import get

from vmm import encryption

pytestmark = pytest.mark.vm
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


@pytest.fixture(scope="module")
def warm(host_before: dict[str, set[str]]) -> Iterator[tuple[Instance, str]]:
    one = Instance(
        "testw", 700_000 + 5 * 262_144, STANDBYS__WARM="1", STANDBYS__PER_IMAGE="1", EDGE__HOLD_SECONDS=str(30 * PATIENCE)
    )  # fmt: skip
    with served(one):
        arn = one.create("app", one.upload(app_files()))
        assert one.built(arn)["buildState"] == "SUCCESSFUL"
        yield one, arn


class Sleeper:
    def __init__(self, instance: Instance, arn: str) -> None:
        self.instance = instance
        vm = instance.launch(arn, idlePolicy=POLICY)
        self.id, self.endpoint, self.token = vm["microvmId"], vm["endpoint"], instance.token(vm["microvmId"])
        self.visits = 0

    def visit(self) -> dict[str, Any]:
        facts = get(self.endpoint, self.instance.root / "tls/ca.crt", self.token).json()
        self.visits += 1
        assert facts["counter"] == self.visits
        return dict(facts)

    def suspend(self) -> None:
        self.instance.client().suspend_microvm(microvmIdentifier=self.id)
        self.instance.state(self.id, "SUSPENDED")

    def process(self) -> dict[str, Any] | None:
        return self.instance.hypervisors().get(self.id)


def is_warm(one: Sleeper) -> bool:
    process = one.process()
    return process is not None and process["phase"] == "warm"


def test_it_wakes_in_the_same_process_and_sleeps_again(warm: tuple[Instance, str]) -> None:
    instance, arn = warm
    one = Sleeper(instance, arn)
    before = one.visit()
    pid = one.process()["pid"]  # type: ignore[index]
    for _ in range(3):
        one.suspend()
        until(lambda: is_warm(one))
        assert "warm, " in instance.command("torpor", "ps").stdout
        assert next((instance.root / "sessions" / one.id).glob("snapshot-*")), "warm or not, the snapshot is durable"
        after = one.visit()
        assert one.process()["pid"] == pid and after["random"] != before["random"]  # type: ignore[index]
        assert abs(after["time"] - before["time"]) < 30 * PATIENCE
    instance.terminate(one.id)


def test_a_second_one_takes_the_firsts_place_and_both_wake(warm: tuple[Instance, str]) -> None:
    instance, arn = warm
    one, two = Sleeper(instance, arn), Sleeper(instance, arn)
    for sleeper in (one, two):
        sleeper.visit()
        sleeper.suspend()
        until(lambda sleeper=sleeper: is_warm(sleeper))
    until(lambda: one.process() is None)
    one.visit()
    two.visit()
    one.suspend()
    one.visit()
    instance.terminate(one.id, two.id)


def test_a_paused_hypervisor_that_dies_is_no_loss(warm: tuple[Instance, str]) -> None:
    instance, arn = warm
    one = Sleeper(instance, arn)
    one.visit()
    one.suspend()
    until(lambda: is_warm(one))
    os.kill(one.process()["pid"], signal.SIGKILL)  # type: ignore[index]
    until(lambda: one.process() is None)
    assert instance.describe(one.id)["state"] == "SUSPENDED"
    one.visit()
    instance.terminate(one.id)


@pytest.mark.parametrize("child", ["vmm", "control"])
def test_restarts_leave_it_warm(warm: tuple[Instance, str], child: str) -> None:
    instance, arn = warm
    one = Sleeper(instance, arn)
    one.visit()
    one.suspend()
    until(lambda: is_warm(one))
    pid = one.process()["pid"]  # type: ignore[index]
    instance.kill(child)
    until(lambda: instance.describe(one.id)["state"] == "SUSPENDED")
    one.visit()
    assert one.process()["pid"] == pid  # type: ignore[index]
    one.suspend()
    one.visit()
    instance.terminate(one.id)


def test_it_may_be_terminated_in_its_sleep(warm: tuple[Instance, str]) -> None:
    instance, arn = warm
    one = Sleeper(instance, arn)
    one.suspend()
    until(lambda: is_warm(one))
    instance.terminate(one.id)
    assert one.process() is None and not (instance.root / "sessions" / one.id).exists()


def test_a_stop_of_the_service_ends_what_is_paused(warm: tuple[Instance, str]) -> None:
    instance, arn = warm
    one = Sleeper(instance, arn)
    one.visit()
    one.suspend()
    until(lambda: is_warm(one))
    instance.stop()
    assert not instance.hypervisors()
    instance.start()
    one.visit()
    instance.terminate(one.id)


def test_what_the_other_hypervisor_made_is_refused_and_not_lost(warm: tuple[Instance, str]) -> None:
    """An image and a sleeper of Firecracker's, on a service that was started again with QEMU, and then with Firecracker."""
    instance, arn = warm
    if instance.environment.get("TORPOR_HYPERVISOR") != "firecracker":
        pytest.skip("of a host that has both")
    one = Sleeper(instance, arn)
    one.visit()
    one.suspend()
    instance.stop()
    instance.environment["TORPOR_HYPERVISOR"] = "qemu"
    try:
        instance.start()
        api, says = instance.client(), "was made with firecracker, and this host runs qemu"
        with contextlib.suppress(botocore.exceptions.ClientError):
            api.resume_microvm(microvmIdentifier=one.id)
        until(lambda: says in (instance.describe(one.id).get("stateReason") or ""))
        assert instance.describe(one.id)["state"] == "SUSPENDED"
        with pytest.raises(botocore.exceptions.ClientError, match=says):
            api.resume_microvm(microvmIdentifier=one.id)
        refused = api.run_microvm(imageIdentifier=arn)["microvmId"]
        assert says in instance.state(refused, "TERMINATED")["stateReason"]
    finally:
        instance.stop()
        instance.environment["TORPOR_HYPERVISOR"] = "firecracker"
        instance.start()
    one.visit()
    instance.terminate(one.id)


@pytest.fixture
def store(warm: tuple[Instance, str], tmp_path: Path) -> Iterator[DurableStore]:
    instance, _ = warm
    ((key, secret),) = json.loads((instance.root / "control/access-keys.json").read_text()).items()
    one = DurableStore(tmp_path, key, secret)
    one.start()
    yield one
    one.kill()


def test_a_long_sleep_is_in_the_object_store_and_comes_back(warm: tuple[Instance, str], store: DurableStore) -> None:
    """The archived tier, encrypted, on a service that was started again with it switched on; the store ends in the middle, and keeps what it has."""
    instance, arn = warm
    one, two = Sleeper(instance, arn), Sleeper(instance, arn)
    one.visit()
    two.visit()
    instance.stop()
    instance.environment |= {
        "TORPOR_ARCHIVE__AFTER_SECONDS": "1", "TORPOR_STANDBYS__WARM": "0", "TORPOR_OBJECT_STORE__ENDPOINT": store.endpoint,
        "TORPOR_ARCHIVE__ENCRYPTION": "instance",
    }  # fmt: skip
    instance.start()
    for sleeper in (one, two):
        instance.state(sleeper.id, "RUNNING")
        sleeper.suspend()
    files = instance.root / "sessions"
    until(lambda: not (files / one.id).exists() and not (files / two.id).exists())
    s3 = store.client()

    def archived() -> list[str]:
        listed = s3.list_objects_v2(Bucket="torpor-archive").get("Contents", [])
        return [entry["Key"] for entry in listed]

    assert len(archived()) == 2
    for key in archived():
        assert s3.get_object(Bucket="torpor-archive", Key=key)["Body"].read().startswith(encryption.MAGIC)
    assert instance.command("torpor", "ps").stdout.count("archived, ") == 2
    metrics = instance.command("curl", "-s", f"http://127.0.0.1:{instance.environment['TORPOR_API__METRICS_PORT']}/metrics").stdout
    assert 'torpor_asleep{tier="archived"} 2.0' in metrics
    store.kill()
    store.start()
    one.visit()
    until(lambda: len(archived()) == 1)
    instance.kill("control")
    until(lambda: instance.describe(two.id)["state"] == "SUSPENDED")
    two.visit()
    two.suspend()
    until(lambda: not (files / two.id).exists())
    instance.terminate(one.id, two.id)
    until(lambda: not archived())
