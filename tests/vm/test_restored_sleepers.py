"""A backup with data, made while the service runs: its sleepers wake on another root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from service import BIN, Instance, served
from wire import get

pytestmark = pytest.mark.vm


def test_a_restored_sleeper_wakes_on_another_root(instance: Instance, vm: dict[str, Any], tmp_path: Path) -> None:
    identifier, token = vm["microvmId"], vm["token"]
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", token).json()["counter"] == 1
    instance.client().suspend_microvm(microvmIdentifier=identifier)
    instance.state(identifier, "SUSPENDED")
    target = tmp_path / "backup"
    said = instance.command("torpor", "backup", "--data", str(target)).stdout
    assert "1 with their files" in said, said
    other = Instance("restored", 1_000_000)
    try:
        other.root.mkdir()
        (other.root / "edge-port").write_text(str(other.edge_port))  # the first one's is taken here
        other.command(str(BIN / "torpor"), "restore", str(target))
    except BaseException:
        other.remove()
        raise
    with served(other):
        endpoint = other.describe(identifier)["endpoint"]
        assert get(endpoint, other.root / "tls/ca.crt", token).json()["counter"] == 2, "the token's key came along"
        assert get(vm["endpoint"], instance.root / "tls/ca.crt", token).json()["counter"] == 2, "the first one's is as it was"
        other.terminate(identifier)
