"""Packages at run time: a microVM with a way out installs by itself, one without is told that it cannot."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fidelity.table import BASE as FROM
from fidelity.table import SERVER, archive
from service import Instance, served
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.long]
FIDELITY = Path(__file__).resolve().parents[1] / "fidelity"
CONNECTOR = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"


@pytest.fixture
def packages(host_before: object, tmp_path: Path) -> Iterator[tuple[Instance, str]]:
    """An instance whose uplink is this host's own, and an image of the base alone."""
    server = tmp_path / "server"
    subprocess.run(["musl-gcc", "-static", "-Os", "-o", server, FIDELITY / "server.c"], check=True, timeout=60)
    instance = Instance("packages", 920_000, EGRESS__CLOSED="false")
    with served(instance):
        files = {"Dockerfile": FROM + "RUN dnf install -y tar && python3 -m venv /venv\n" + SERVER, "server": server.read_bytes()}
        arn = instance.create("packages", instance.upload(archive(files)))
        build = instance.built(arn)
        assert build["buildState"] == "SUCCESSFUL", build
        yield instance, arn


def run(instance: Instance, arn: str, command: str, **launch: object) -> tuple[int, str]:
    vm = instance.launch(arn, **launch)
    token = instance.token(vm["microvmId"])
    answer = get(vm["endpoint"], instance.root / "tls/ca.crt", token, "/run", method="POST", body=command.encode())
    assert answer.status == 200, answer
    instance.terminate(vm["microvmId"])
    return int(answer.fields["x-exit-code"]), answer.body.decode(errors="replace")


def test_a_microvm_with_a_way_out_installs_packages(packages: tuple[Instance, str]) -> None:
    instance, arn = packages
    out = {"egressNetworkConnectors": [CONNECTOR]}
    code, said = run(
        instance, arn, "dnf install -y jq && jq --version && /venv/bin/pip install --quiet six && /venv/bin/python -c 'import six'", **out
    )
    assert code == 0 and "jq-1.6" in said, said
    code, said = run(instance, arn, "dnf install -y jq")
    assert code != 0 and "dnf: the lists of packages could not be fetched: no archive is reached from here" in said, said
