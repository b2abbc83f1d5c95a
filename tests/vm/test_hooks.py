"""Lifecycle hooks on real microVMs: delivery, order, and what a failure does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from service import Instance, until
from wire import get

pytestmark = pytest.mark.vm
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


def call(instance: Instance, vm: dict[str, Any], path: str = "/state") -> Any:
    return get(vm["endpoint"], Path(instance.root / "tls/ca.crt"), vm["token"], path)


def launch(instance: Instance, arn: str, **request: Any) -> dict[str, Any]:
    made = instance.launch(arn, idlePolicy=POLICY, **request)
    made["token"] = instance.token(made["microvmId"])
    return made


def test_hooks_in_order_with_the_payload(instance: Instance, hooked: str) -> None:
    vm = launch(instance, hooked, runHookPayload='{"tenant": "ä"}')
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    facts = call(instance, vm).json()
    names = [name for name, *_ in facts["hooks"]]
    assert [name for name in names if name != "ready"] == ["run", "suspend", "resume"] and names[0] == "ready"
    _, body, host, peer = next(hook for hook in facts["hooks"] if hook[0] == "run")
    assert json.loads(body) == {"microvmId": vm["microvmId"], "runHookPayload": '{"tenant": "ä"}'}
    assert (host, peer) == ("localhost:9000", "127.0.0.1")
    assert facts["env"]["COLOUR"] == "blue"
    instance.terminate(vm["microvmId"])


@pytest.mark.parametrize(
    ("hook", "status", "reason"),
    [
        (
            "suspend",
            500,
            "Suspend lifecycle hook returned HTTP status 500. Please check your hook endpoint and application logs for more details.",
        ),
        (
            "resume",
            404,
            "Resume lifecycle hook returned HTTP status 404. Please check your hook endpoint and application logs for more details.",
        ),
    ],
)
def test_hook_that_fails_terminates(instance: Instance, hooked: str, hook: str, status: int, reason: str) -> None:
    vm = launch(instance, hooked)
    assert call(instance, vm, f"/hook-status?{hook}={status}").status == 200
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    if hook == "resume":
        instance.state(vm["microvmId"], "SUSPENDED")
        assert call(instance, vm).status == 502
    assert instance.state(vm["microvmId"], "TERMINATED")["stateReason"] == reason


def test_run_hook_that_refuses(instance: Instance, app: str) -> None:
    from service import HOOKS, app_files

    arn = instance.create("refuses", instance.upload(app_files(), "refuses.zip"), hooks=HOOKS, environmentVariables={"HOOK_RUN": "400"})
    assert instance.built(arn)["buildState"] == "SUCCESSFUL"
    vm = instance.client().run_microvm(imageIdentifier=arn)
    ended = instance.state(vm["microvmId"], "TERMINATED")
    assert ended["stateReason"].startswith("Run lifecycle hook returned HTTP status 400. Please check")
    instance.client().delete_microvm_image(imageIdentifier=arn)


def names(facts: dict[str, Any]) -> list[str]:
    return [name for name, *_ in facts["hooks"]]


def test_validate_hook_runs_in_clones_and_those_that_ran_ahead_become_sessions(instance: Instance, app: str) -> None:
    """The build's clone is thrown away; later ones, which the owner's validate hook allows, wait for launches."""
    from service import app_files

    hooks = {"port": 9000, "microvmImageHooks": {"ready": "ENABLED", "validate": "ENABLED", "validateTimeoutInSeconds": 20}}
    arn = instance.create("validated", instance.upload(app_files(), "validated.zip"), hooks=hooks)
    bad = instance.create("invalid", "s3://artifacts/validated.zip", hooks=hooks, environmentVariables={"HOOK_VALIDATE": "500"})
    assert instance.built(arn)["buildState"] == "SUCCESSFUL"
    waiting = until(lambda: ahead(instance) if len(ahead(instance)) == 2 else None)
    vms = [launch(instance, arn) for _ in range(2)]
    facts = []
    for vm in vms:
        facts.append(call(instance, vm, "/").json())
        assert abs(facts[-1]["time"] - time.time()) < 1
    assert {instance.hypervisors()[vm["microvmId"]]["pid"] for vm in vms} == waiting
    for vm, seen in zip(vms, facts, strict=True):
        assert names(seen).count("validate") == 1 and seen["env"]["AWS_LAMBDA_MICROVM_IMAGE_ARN"] == arn
        trace = instance.command("torpor", "trace", vm["microvmId"]).stdout
        assert "one that ran ahead" in trace
    assert len({seen["random"] for seen in facts}) == 2
    # From here on it is a session like any other: it sleeps, wakes, and has lost nothing.
    instance.client().suspend_microvm(microvmIdentifier=vms[0]["microvmId"])
    instance.state(vms[0]["microvmId"], "SUSPENDED")
    again = call(instance, vms[0], "/").json()
    assert (again["counter"], again["pid"], names(again)) == (facts[0]["counter"] + 1, facts[0]["pid"], names(facts[0]))
    instance.terminate(*(vm["microvmId"] for vm in vms))
    build = instance.built(bad)
    assert build["stateReason"] == "Validate hook check failed: the application returned a server error (HTTP 5xx) response"
    for image in (arn, bad):
        instance.client().delete_microvm_image(imageIdentifier=image)
    until(lambda: not [name for name in instance.hypervisors() if name.startswith("ahead-")])


def ahead(instance: Instance) -> set[int]:
    """The processes that ran ahead, once as many wait as the metrics say."""
    metrics = instance.command("curl", "-s", f"http://127.0.0.1:{instance.environment['TORPOR_API__METRICS_PORT']}/metrics").stdout
    count = next(line for line in metrics.splitlines() if line.startswith("torpor_ran_ahead "))
    found = {record["pid"] for name, record in instance.hypervisors().items() if name.startswith("ahead-")}
    return found if len(found) == float(count.split()[1]) else set()
