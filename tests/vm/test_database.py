"""A database in a microVM, with a writer running, through twenty sleeps: nothing that it said was committed is lost, and its own
checks of every page and index find nothing. Once its hypervisor is killed after a suspend, warm or not, and it wakes from files."""

from __future__ import annotations

from typing import Any

import pytest
from service import REPO, Instance, until
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.long]
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
CYCLES = 20


def ask(instance: Instance, vm: dict[str, Any], path: str = "/") -> dict[str, Any]:
    answer = get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"], path)
    assert answer.status == 200, answer
    return dict(answer.json())


def test_postgresql_through_twenty_sleeps(instance: Instance) -> None:
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in (REPO / "tests/database").iterdir()}
    arn = instance.create("database", instance.upload(files, "database.zip"))
    build = instance.built(arn, seconds=400)
    assert build["buildState"] == "SUCCESSFUL", build
    vm = instance.launch(arn, idlePolicy=POLICY)
    vm["token"] = instance.token(vm["microvmId"])
    until(lambda: ask(instance, vm)["committed"] > 10, 120)
    committed = 0
    for _ in range(CYCLES):
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
        told = ask(instance, vm)
        assert not told["errors"] and told["committed"] >= committed, told
        committed = told["committed"]
        until(lambda before=committed: ask(instance, vm)["committed"] > before)  # the writer goes on, on the connection it had
    found = ask(instance, vm, "/check")
    assert (found["least"], found["broken"], found["amcheck"]) == (1, 0, 0), found
    assert found["count"] == found["most"] >= committed, found
    instance.terminate(vm["microvmId"])
    instance.client().delete_microvm_image(imageIdentifier=arn)
