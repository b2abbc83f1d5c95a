"""torpor doctor on what a crash leaves: found, named, removed; and nothing that anything still needs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from outside import Outside
from service import Instance, until
from wire import get

from gateway.config import Egress
from vmm.egress import Uplink

pytestmark = pytest.mark.vm


def found(instance: Instance, *words: str) -> list[dict[str, Any]]:
    done = instance.command("torpor", "doctor", "--json", *words, check=False)
    return [row for row in json.loads(done.stdout) if row["check"].startswith("left over")]


def test_a_stopped_instance_is_mended_and_its_sessions_stay(instance: Instance, vm: dict[str, Any], outside_world: Outside) -> None:
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 1
    refused = instance.command("torpor", "doctor", "--repair", check=False)
    assert refused.returncode == 1 and "is served" in refused.stderr
    instance.stop()
    assert not found(instance) and not outside_world.devices() and "torpor" not in outside_world.rules()
    (instance.root / "sessions/microvm-gone/snapshot-3").mkdir(parents=True)
    (instance.root / "sessions" / vm["microvmId"] / "snapshot.new").mkdir()
    (instance.root / "images/.half").mkdir()
    namespace = instance.run / instance.name / "netns/999999"
    namespace.parent.mkdir(parents=True, exist_ok=True)
    namespace.touch()
    subprocess.run(["unshare", f"--net={namespace}", "true"], check=True)
    assert str(namespace) in Path("/proc/mounts").read_text()
    Uplink(Egress(uplink=outside_world.path), instance.name, namespace.parent.with_name("uplink")).start()
    assert outside_world.devices()
    kinds = sorted(row["check"] for row in found(instance))
    assert kinds == ["left over: directory"] * 3 + ["left over: namespace", "left over: uplink"], kinds
    done = instance.command("torpor", "doctor", "--repair", check=False)
    assert done.stderr.count("torpor: removed") == 5 and not outside_world.devices() and "torpor" not in outside_world.rules()
    assert not found(instance) and str(namespace) not in Path("/proc/mounts").read_text() and not os.path.exists(namespace)
    instance.start()
    until(lambda: instance.describe(vm["microvmId"])["state"] == "RUNNING")
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 2


def test_damage_ends_one_session_with_its_reason_and_no_other(instance: Instance, app: str) -> None:
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    hurt, well = (instance.launch(app, idlePolicy=policy) for _ in range(2))
    for vm in (hurt, well):
        vm["token"] = instance.token(vm["microvmId"])
        get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"])
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
    snapshot = next((instance.root / "sessions" / hurt["microvmId"]).glob("snapshot-*"))
    pages = next(snapshot.glob("*.pages"))
    with pages.open("r+b") as file:
        file.seek(pages.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert get(hurt["endpoint"], instance.root / "tls/ca.crt", hurt["token"]).status == 502
    reason = instance.state(hurt["microvmId"], "TERMINATED")["stateReason"]
    assert "is damaged" in reason and pages.name in reason
    assert get(well["endpoint"], instance.root / "tls/ca.crt", well["token"]).json()["counter"] == 2
    instance.terminate(well["microvmId"])
