"""What is said of a host's KVM: on one that has it (`make test-kvm`), with a right to it or without, and when it does not work."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import Settings
from vmm import disks, kvm_device, probe

pytestmark = pytest.mark.vm
PROBES = {"qemu": probe.why_not_kvm, "firecracker": probe.why_not_firecracker}


@pytest.fixture(autouse=True)
def _kvm(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--accelerator") != "kvm":
        pytest.skip("of a host with KVM")


@pytest.fixture
def settings() -> Iterator[Settings]:
    """With a cache that remembers no answer."""
    with tempfile.TemporaryDirectory(prefix="torpor-kvm-", dir="/var/tmp") as directory:
        cache = Path(directory, "cache")
        cache.mkdir()
        for entry in Settings().cache.iterdir():
            if not entry.name.endswith("-probe"):
                (cache / entry.name).symlink_to(entry)
        Path(directory, "root").mkdir()
        yield Settings(cache=cache, root=Path(directory, "root"), oldest_firecracker="1.12.1")


@pytest.mark.parametrize("hypervisor", PROBES)
@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_guests_of_the_host_run_whoever_may_open_its_kvm(settings: Settings, hypervisor: str, mode: int) -> None:
    """Each jail has a node of its own."""
    before = stat.S_IMODE(probe.KVM.stat().st_mode)
    probe.KVM.chmod(mode)
    try:
        assert PROBES[hypervisor](settings) == ""
    finally:
        probe.KVM.chmod(before)


@pytest.mark.parametrize(
    ("hypervisor", "says"),
    [("qemu", "failed to initialize kvm: No such device"), ("firecracker", "Kvm(Error(19))")],
)
def test_a_kvm_of_the_host_that_cannot_be_used_is_quoted(settings: Settings, hypervisor: str, says: str) -> None:
    """Its module for the processor is not there, as where the firmware has virtualisation off; its node is."""
    (module,) = [path.name for path in Path("/sys/module").glob("kvm_*")]
    subprocess.run(["rmmod", module], check=True)
    try:
        assert PROBES[hypervisor](settings) == "/dev/kvm is not there"
        assert kvm_device.cure(probe.KVM).startswith(f"/dev/kvm is not there, and the processor could have it: modprobe {module}; ")
        os.mknod(probe.KVM, stat.S_IFCHR | 0o600, os.makedev(10, 232))
        why = PROBES[hypervisor](settings)
        assert why.startswith("no guest ran: ") and says in why, why
        assert kvm_device.cure(probe.KVM).startswith(f"/dev/kvm is a node without a driver (No such device): modprobe {module}; ")
    finally:
        probe.KVM.unlink(missing_ok=True)
        subprocess.run(["modprobe", module], check=True)
    assert PROBES[hypervisor](settings) == "", "what was said of it was kept"


@pytest.mark.parametrize("hypervisor", PROBES)
def test_a_kvm_of_the_host_that_opens_and_runs_no_guest_is_given_up(settings: Settings, hypervisor: str) -> None:
    """By its deadline: guests that are let run for so short a time are as those that hang."""
    assert PROBES[hypervisor](settings.model_copy(update={"probe_seconds": 0.3})).startswith("no guest's init ran within 0.3 s")
    assert kvm_device.cure(probe.KVM).startswith("/dev/kvm opens and makes machines, and no guest of ours ran in one: ")


def doctor(root: Path, **settings: str) -> dict[str, str]:
    environment = os.environ | {f"TORPOR_{name}": value for name, value in settings.items()} | {"TORPOR_ROOT": str(root)}
    done = subprocess.run(
        [Path(sys.prefix) / "bin/torpor", "doctor", "--json"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return {row["check"]: row["text"] for row in json.loads(done.stdout)}


def test_doctor_says_of_the_host_which_hypervisor_a_microvm_gets_and_why(settings: Settings) -> None:
    said = doctor(settings.root, OLDEST_FIRECRACKER="1.12.1")
    assert said["acceleration"] == "kvm: a probe guest ran under KVM"
    assert said["hypervisor"] == "firecracker: a probe guest ran in it"
    assert "nested=0" in said["host: nested kvm"]
    assert ("host: disks" in said) == (not disks.shares_blocks(settings.root))
    said = doctor(settings.root)
    assert said["hypervisor"].startswith("qemu: not Firecracker: Firecracker 1.12.1 would lose what sleeps, 1.16.2 or later is needed: ")
    with tempfile.TemporaryDirectory(prefix="torpor-kvm-", dir="/root") as other:  # on a file system without shared blocks
        assert not disks.shares_blocks(Path(other))
        assert doctor(Path(other), OLDEST_FIRECRACKER="1.12.1")["host: disks"] == f"{other}: {disks.COPIED}"
