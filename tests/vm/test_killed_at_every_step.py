"""Every step of a suspend, a resume and a build killed twenty times: `kill -9` at moments spread over the whole of each."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from service import Instance, app_files, until
from test_faults import retried

pytestmark = [pytest.mark.vm, pytest.mark.long]
TIMES = int(os.environ.get("KILLS", "20"))
SUSPEND_SECONDS, RESUME_SECONDS, BUILD_SECONDS = 0.06, 0.25, 25.0  # a little more than each takes


def settled(instance: Instance, identifier: str) -> str:
    return str(instance.state(identifier, "RUNNING", "SUSPENDED", "TERMINATED")["state"])


def kill(instance: Instance, victim: str, after: float) -> None:
    old = instance.pid_of(victim)
    time.sleep(after)
    os.kill(old, signal.SIGKILL)
    until(lambda: instance.pid_of(victim) != old)


@pytest.mark.parametrize("victim", ["control", "vmm", "edge-0"])
def test_suspends(instance: Instance, vm: dict[str, Any], victim: str) -> None:
    for turn in range(TIMES):
        before = retried(instance, vm, "/").json()["counter"]
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        kill(instance, victim, SUSPEND_SECONDS * turn / TIMES)
        assert settled(instance, vm["microvmId"]) != "TERMINATED", turn
        assert retried(instance, vm, "/").json()["counter"] == before + 1, turn


@pytest.mark.parametrize("victim", ["control", "vmm", "edge-0"])
def test_resumes(instance: Instance, vm: dict[str, Any], victim: str) -> None:
    for turn in range(TIMES):
        before = retried(instance, vm, "/").json()["counter"]
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
        instance.client().resume_microvm(microvmIdentifier=vm["microvmId"])
        kill(instance, victim, RESUME_SECONDS * turn / TIMES)
        assert settled(instance, vm["microvmId"]) != "TERMINATED", turn
        assert retried(instance, vm, "/").json()["counter"] == before + 1, turn


@pytest.mark.parametrize("victim", ["control", "vmm"])
def test_builds(instance: Instance, app: str, victim: str) -> None:
    """A build whose host was killed goes on or is made again; one whose control was killed has failed, and says so. Nothing is left."""
    uri = instance.upload(app_files(), "killed.zip")
    for turn in range(TIMES):
        images = {path.name for path in (instance.root / "images").iterdir()}
        arn = instance.create(f"killed-{turn}", uri)
        kill(instance, victim, BUILD_SECONDS * turn / TIMES)
        build = instance.built(arn, seconds=200)
        assert build["buildState"] == "SUCCESSFUL" or build["stateReason"].startswith("INTERNAL_PLATFORM_ERROR"), build
        instance.client().delete_microvm_image(imageIdentifier=arn)
        until(lambda before=images: {path.name for path in (instance.root / "images").iterdir()} == before)
    instance.terminate(instance.launch(app)["microvmId"])
