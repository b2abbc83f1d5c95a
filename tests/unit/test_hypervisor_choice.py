"""Which accelerator and hypervisor an instance runs: what the settings say, and what the host has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.config import Devices, Settings
from gateway.process import SETTINGS_VARIABLE, passed
from vmm import probe
from vmm.errors import VmmError


def program(path: Path, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_host_gives_the_best_that_works() -> None:
    assert probe.choose_accelerator("auto", "")[:1] == ("kvm",)
    assert probe.choose_accelerator("auto", "no guest ran") == ("tcg", "software emulation, not KVM: no guest ran", True)
    assert probe.choose_hypervisor("auto", "")[:1] == ("firecracker",)
    assert probe.choose_hypervisor("auto", "it is not there") == ("qemu", "not Firecracker: it is not there", True)


@pytest.mark.parametrize("choose", [probe.choose_accelerator, probe.choose_hypervisor])
@pytest.mark.parametrize("why_not", ["", "no guest ran"])
def test_the_settings_have_their_way(choose: Callable[[str, str], probe.Choice], why_not: str) -> None:
    plain, better = ("tcg", "kvm") if choose is probe.choose_accelerator else ("qemu", "firecracker")
    assert choose(plain, why_not) == (plain, "chosen by the settings", True)
    choice = choose(better, why_not)
    assert choice.what == better and choice.works == (not why_not) and why_not in choice.why


@pytest.mark.parametrize("wanted", [{"accelerator": "kvm"}, {"accelerator": "tcg", "hypervisor": "firecracker"}])
def test_what_is_wanted_and_does_not_work_is_no_instance(wanted: dict[str, str], tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, cache=tmp_path / "nothing", **wanted)
    with pytest.raises(VmmError, match="chosen by the settings, but"):
        probe.host_info(settings)


def test_limits_that_a_hypervisor_does_not_keep_are_refused(tmp_path: Path) -> None:
    """A limit that is set and not kept would be believed."""
    settings = Settings(root=tmp_path, accelerator="tcg", hypervisor="qemu", devices={"network_packets_per_second": 5})
    with pytest.raises(VmmError, match="limits no link: set them to 0"):
        probe.host_info(settings)
    assert probe.why_not_limited(settings, "firecracker") == ""
    disk = settings.model_copy(update={"devices": Devices(disk_mib_per_second=5, disk_operations_per_second=5)})
    assert probe.host_info(disk).hypervisor == "qemu"


def test_the_daemon_says_in_one_line_what_cannot_be(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, run=tmp_path, cache=tmp_path / "nothing", accelerator="kvm")
    with passed(settings) as number:
        environment = os.environ | {SETTINGS_VARIABLE: str(number)}
        done = subprocess.run(
            [sys.executable, "-m", "vmm"], env=environment, capture_output=True, text=True, timeout=60, check=False, pass_fds=[number]
        )
    assert done.returncode == 1 and done.stderr.startswith("torpor: vmm: accelerator kvm: chosen by the settings, but "), done.stderr
    assert done.stderr.count("\n") == 1


def of(host: Path, firecracker: str | None, jailer: str | None) -> None:
    for name, says in (("firecracker", firecracker), ("jailer", jailer)):
        if says:
            program(host / name, says)


@pytest.mark.parametrize("version", ["1.16.2", "1.16.3", "1.17.0", "2.0.0"])
def test_both_programs_of_one_release(host: Path, version: str) -> None:
    of(host, f"Firecracker v{version}", f"Jailer v{version}")
    assert probe.wrong_release(probe.firecracker_programs(), Settings().oldest_firecracker) == ""


@pytest.mark.parametrize(
    ("firecracker", "jailer", "why"),
    [
        (None, None, "not both on the path"),
        ("Firecracker v1.16.2", None, "not both on the path"),
        ("Firecracker v1.16.2", "Jailer v1.16.3", "of one release, 1.16.2 or later: they are 1.16.2, 1.16.3"),
        ("something else", "Jailer v1.16.2", "they are unknown, 1.16.2"),
    ],
)
def test_why_not(host: Path, firecracker: str | None, jailer: str | None, why: str) -> None:
    of(host, firecracker, jailer)
    assert why in probe.why_not_firecracker(Settings(cache=host))


@pytest.mark.parametrize(
    ("version", "before"),
    [
        ("1.12.1", ["1.13.0", "1.14.1", "1.14.4", "1.15.0", "1.15.1", "1.16.0", "1.16.1", "1.16.2"]),
        ("1.13.2", ["1.14.4", "1.15.0", "1.15.1", "1.16.0", "1.16.1", "1.16.2"]), ("1.14.4", ["1.15.0", "1.16.0", "1.16.1", "1.16.2"]),
        ("1.16.0", ["1.16.1", "1.16.2"]), ("1.16.1", ["1.16.2"]),
    ],
)  # fmt: skip
def test_an_older_release_is_refused_with_what_is_wrong_with_it(host: Path, version: str, before: list[str]) -> None:
    of(host, f"Firecracker v{version}", f"Jailer v{version}")
    why = probe.why_not_firecracker(Settings(cache=host))
    assert why.startswith(f"Firecracker {version} would lose what sleeps, 1.16.2 or later is needed: before {before[0]} ")
    assert re.findall(r"before (\S+) ", why) == before
    # A setting that tests make lets it in.
    assert "can be probed once" in probe.why_not_firecracker(Settings(cache=host, oldest_firecracker="1.12.1"), Path("/dev/null"))
