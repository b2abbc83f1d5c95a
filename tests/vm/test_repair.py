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


def doctor(instance: Instance) -> list[dict[str, Any]]:
    return list(json.loads(instance.command("torpor", "doctor", "--json", check=False).stdout))


def found(instance: Instance) -> list[dict[str, Any]]:
    return [row for row in doctor(instance) if row["check"].startswith("left over")]


def test_a_stopped_instance_is_mended_and_its_sessions_stay(instance: Instance, vm: dict[str, Any], outside_world: Outside) -> None:
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 1
    refused = instance.command("torpor", "doctor", "--repair", check=False)
    assert refused.returncode == 1 and "is served" in refused.stderr
    instance.stop()
    assert not found(instance) and not outside_world.devices() and "torpor" not in outside_world.rules()
    (instance.root / "sessions/microvm-gone").mkdir()
    (instance.root / "sessions/microvm-stranger/snapshot-3").mkdir(parents=True)
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
    assert (instance.root / "quarantine/microvm-stranger/snapshot-3").is_dir(), "what the store does not know is nobody's to remove"


def test_damage_ends_one_session_with_its_reason_and_no_other(instance: Instance, app: str, tmp_path: Path) -> None:
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    hurt, well = (instance.launch(app, idlePolicy=policy) for _ in range(2))
    for vm in (hurt, well):
        vm["token"] = instance.token(vm["microvmId"])
        get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"])
        instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "SUSPENDED")
    snapshot = next((instance.root / "sessions" / hurt["microvmId"]).glob("snapshot-*"))
    pages = next(snapshot.glob("*.pages"))
    flip(pages)
    assert get(hurt["endpoint"], instance.root / "tls/ca.crt", hurt["token"]).status == 502
    reason = instance.state(hurt["microvmId"], "TERMINATED")["stateReason"]
    assert "is damaged" in reason and pages.name in reason
    assert get(well["endpoint"], instance.root / "tls/ca.crt", well["token"]).json()["counter"] == 2
    comes_back(instance, hurt, pages.name, tmp_path)
    instance.terminate(hurt["microvmId"], well["microvmId"])


def flip(pages: Path) -> None:
    """Another byte in its middle."""
    with pages.open("r+b") as file:
        file.seek(pages.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def comes_back(instance: Instance, hurt: dict[str, Any], pages: str, tmp_path: Path) -> None:
    """It is tried again, in vain; its disk is handed out; and once its files are what they were it sleeps, and wakes, as before."""
    name = hurt["microvmId"]
    aside = instance.root / "quarantine" / name
    assert not (instance.root / "sessions" / name).exists()
    listed = next(row["text"] for row in doctor(instance) if row["check"] == "set aside" and name in row["text"])
    assert listed.startswith(f"{name}: ") and "is damaged" in listed and f"torpor recover {name}" in listed
    refused = instance.command("torpor", "recover", name, check=False)
    assert refused.returncode == 1 and pages in refused.stderr and aside.is_dir()
    instance.command("torpor", "recover", name, "--disk", str(tmp_path / "disk"))
    shown = subprocess.run(["debugfs", "-R", "ls -p /", str(tmp_path / "disk")], capture_output=True, text=True, check=True)
    assert "/etc/" in shown.stdout
    flip(next(aside.glob(f"snapshot-*/{pages}")))
    instance.command("torpor", "recover", name)
    assert instance.describe(name)["state"] == "SUSPENDED" and not aside.exists()
    assert get(hurt["endpoint"], instance.root / "tls/ca.crt", hurt["token"]).json()["counter"] == 2


def test_a_store_that_is_not_there_costs_no_image_and_no_sleeper(instance: Instance, vm: dict[str, Any]) -> None:
    """A damaged store that was moved aside, or a wrong --root: the start says so in one line, changes nothing, and does not serve."""
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 1
    instance.stop()
    control, moved = instance.root / "control", instance.root / "moved"
    moved.mkdir()
    for path in control.glob("torpor.db*"):
        path.rename(moved / path.name)
    before = {path.name for name in ("images", "sessions") for path in (instance.root / name).iterdir()}
    refused = instance.command("torpor", "serve", check=False)
    said = [line for line in refused.stderr.splitlines() if "process.not_started" in line]
    assert refused.returncode == 1 and len(said) == 1, refused.stderr[-2000:]
    assert "torpor serve --adopt" in said[0] and "--quarantine" in said[0] and str(control / "torpor.db") in said[0]
    assert {path.name for name in ("images", "sessions") for path in (instance.root / name).iterdir()} == before
    for path in control.glob("torpor.db*"):
        path.unlink()
    for path in moved.iterdir():
        path.rename(control / path.name)
    moved.rmdir()
    instance.start()
    until(lambda: instance.describe(vm["microvmId"])["state"] == "RUNNING")
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 2
