"""Packages at run time: a microVM with a way out installs by itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fidelity.table import BASE as FROM
from fidelity.table import SERVER, archive
from service import Instance, served, until
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.long]
FIDELITY = Path(__file__).resolve().parents[1] / "fidelity"
CONNECTOR = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"


@pytest.fixture
def forwarding(host_before: object) -> Iterator[None]:
    """An instance leaves forwarding on, where its microVMs go out by the host itself; a test leaves it as it was."""
    places = [Path("/proc/sys/net/ipv4", name) for name in ("ip_forward", "conf/all/forwarding", "conf/default/forwarding")]
    was = [place.read_text() for place in places]
    yield
    for place, text in zip(places, was, strict=True):
        place.write_text(text)


@pytest.fixture
def packages(forwarding: None, tmp_path: Path) -> Iterator[tuple[Instance, str]]:
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


class Guest:
    """A microVM that executes commands."""

    def __init__(self, instance: Instance, arn: str, **launch: object) -> None:
        self._instance = instance
        self.vm = instance.launch(arn, **launch)
        self._token = instance.token(self.vm["microvmId"])

    def run(self, command: str) -> str:
        answer = get(self.vm["endpoint"], self._instance.root / "tls/ca.crt", self._token, "/run", method="POST", body=command.encode())
        assert answer.status == 200, answer
        return answer.body.decode(errors="replace")

    def finish(self, command: str) -> tuple[int, str]:
        """One that takes longer than a client waits for an answer: apt's lists are read by an emulated processor."""
        self.run(f"(({command}) > /said 2>&1; echo $? > /code) > /dev/null 2>&1 &")
        code = until(lambda: self.run("cat /code 2>/dev/null").strip(), 240, 1.0)
        return int(code), self.run("cat /said")


def test_a_microvm_with_a_way_out_installs_packages(packages: tuple[Instance, str]) -> None:
    instance, arn = packages
    guest = Guest(instance, arn, egressNetworkConnectors=[CONNECTOR])
    code, said = guest.finish("dnf install -y jq && jq --version")
    assert code == 0 and "jq-1.6" in said, said
    guest.run("rm /code")
    code, said = guest.finish("/venv/bin/pip install six && /venv/bin/python -c 'import six; print(six.__name__)'")
    assert code == 0 and said.strip().endswith("six"), said
    instance.terminate(guest.vm["microvmId"])
