"""Which hypervisor an instance runs: what the settings say, and what the host has."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm import probe
from vmm.errors import VmmError


def program(path: Path, says: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_firecracker_where_it_works(host: Path) -> None:
    program(host / "firecracker", "Firecracker v1.13.1")
    program(host / "jailer", "Jailer v1.13.1")
    assert probe.choose_hypervisor("auto", "kvm") == ("firecracker", "it is there, and KVM works")
    assert probe.choose_hypervisor("firecracker", "kvm")[0] == "firecracker"
    assert probe.choose_hypervisor("qemu", "kvm")[0] == "qemu"
    assert probe.choose_hypervisor("auto", "tcg") == ("qemu", "not Firecracker: it needs KVM")


@pytest.mark.parametrize(
    ("firecracker", "jailer", "why"),
    [
        (None, None, "not both on the path"),
        ("Firecracker v1.16.1", None, "not both on the path"),
        ("Firecracker v1.12.0", "Jailer v1.12.0", "1.13 or later: they are 1.12, 1.12"),
        ("Firecracker v1.16.1", "Jailer v1.15.0", "of one release, 1.13 or later: they are 1.16, 1.15"),
        ("something else", "Jailer v1.15.0", "they are 0.0, 1.15"),
    ],
)
def test_why_not(host: Path, firecracker: str | None, jailer: str | None, why: str) -> None:
    for name, says in (("firecracker", firecracker), ("jailer", jailer)):
        if says:
            program(host / name, says)
    hypervisor, note = probe.choose_hypervisor("auto", "kvm")
    assert hypervisor == "qemu" and why in note
    with pytest.raises(VmmError, match='hypervisor = "firecracker" cannot be'):
        probe.choose_hypervisor("firecracker", "kvm")
