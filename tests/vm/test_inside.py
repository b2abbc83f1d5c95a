"""What code in a microVM finds when it tries to get out (vmm/inside/inside.c), by `torpor doctor --inside`; and on this host, as a control."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Instance

from gateway.cli import inside
from vmm import kernel

pytestmark = pytest.mark.vm
CONNECTOR = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:"


@pytest.fixture
def vm(instance: Instance, app: str) -> Iterator[dict[str, Any]]:
    made = instance.launch(app, ingressNetworkConnectors=[CONNECTOR + "SHELL_INGRESS"])
    yield made
    instance.terminate(made["microvmId"])


def test_nothing_that_is_tried_inside_gets_out(instance: Instance, vm: dict[str, Any], tmp_path: Path) -> None:
    done = instance.command("torpor", "doctor", "--inside", vm["microvmId"], "--json", check=False)
    print(done.stdout, done.stderr)
    found = {row["check"].removeprefix("inside: "): row for row in json.loads(done.stdout)}
    assert not [name for name, row in found.items() if not row["ok"]] and done.returncode == 0
    assert len(found) > 25 and found["capabilities"]["text"] == "00000000a80425fb"
    # The control: root of this host, of whom most of that is not kept.
    kernel.make_inside(tmp_path / "inside")
    said = subprocess.run(
        ["unshare", "--mount", "--net", tmp_path / "inside"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    free = {name.removeprefix("inside: ") for name, is_well, _ in inside.verdicts(said) if not is_well}
    assert free >= {"core pattern", "mount", "bpf"} and free <= set(found)
