"""What `torpor doctor --security` says of a host (vmm/host_security.py): decisions over files that were read elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.messages import Shape
from vmm import host_security, manifest, probe, upgrades
from vmm.host_setup import Finding
from vmm.manifest import Manifest
from vmm.provenance import Provenance

# Of two hosts, as their kernels print it; /proc/cpuinfo is cut to what is read.
METAL = {
    "sys/devices/system/cpu/vulnerabilities/vmscape": "Mitigation: IBPB before exit to userspace\n",
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmicrocode\t: 0xa0011d1\nflags\t\t: fpu vme svm\n\nprocessor\t: 1\nmicrocode\t: 0x1\n",
    "sys/kernel/security/lsm": "lockdown,capability,landlock,yama,apparmor,bpf",
}
VIRTUAL = {
    "sys/devices/system/cpu/vulnerabilities/vmscape": "Not affected\n",
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmicrocode\t: 0x1000065\nflags\t\t: fpu vme hypervisor\n\n",
}
LOADED = [Finding("smt", False, "it is on"), Finding("overcommit", True, "counted once")]


def found(root: Path, host: dict[str, str], landlock: int = 6, **versions: str) -> dict[str, Finding]:
    for name, text in host.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    known = {"release": "6.12.90+deb13-amd64", "qemu": "10.0.8 (Debian 1:10.0.8+ds-0+deb13u1)", "firecracker": "1.16.2"} | versions
    lines = host_security.findings(root, known["release"], known["qemu"], known["firecracker"], landlock, LOADED)
    assert len({line.what for line in lines}) == len(lines)
    return {line.what: line for line in lines}


@pytest.mark.parametrize("host", [METAL, VIRTUAL])
def test_a_host_that_is_well_has_a_line_for_each_and_no_fault_but_those_of_its_setup(tmp_path: Path, host: dict[str, str]) -> None:
    lines = found(tmp_path, host)
    assert list(lines) == ["smt", "vmscape", "microcode", "kernel", "qemu", "firecracker", "security modules"]
    assert [name for name, line in lines.items() if not line.is_well] == ["smt"]
    assert ("0xa0011d1" in lines["microcode"].text) == (host is METAL)


DISK, VOLUME, OTHER = os.makedev(8, 1), os.makedev(253, 1), os.makedev(253, 0)


@pytest.mark.parametrize(
    ("device", "uuids", "below", "is_well"),
    [
        (DISK, {}, {}, False),
        (OTHER, {"253:0": "CRYPT-LUKS2-abc-root"}, {}, True),
        (VOLUME, {"253:1": "LVM-abc", "253:0": "CRYPT-LUKS2-abc-root"}, {"253:1": ["253:0"]}, True),
        (VOLUME, {"253:1": "LVM-abc", "253:0": "CRYPT-LUKS2-abc-root"}, {"253:1": ["253:0", "8:1"]}, False),
        (VOLUME, {"253:1": "LVM-abc"}, {"253:1": []}, False),
        (VOLUME, {"253:1": "LVM-CRYPT-"}, {}, False),
        (os.makedev(0, 45), {}, {}, False),
    ],
    ids=["a partition", "dm-crypt", "a volume on dm-crypt", "half of it", "nothing below", "a name", "no device"],
)
def test_whether_the_data_is_encrypted_on_its_disk(
    tmp_path: Path, device: int, uuids: dict[str, str], below: dict[str, list[str]], is_well: bool
) -> None:
    block = tmp_path / "sys/dev/block"
    (block / "8:1").mkdir(parents=True)
    for number, uuid in uuids.items():
        (block / number / "dm").mkdir(parents=True)
        (block / number / "dm/uuid").write_text(f"{uuid}\n")
    for number, others in below.items():
        (block / number / "slaves").mkdir()
        for one in others:
            (block / number / "slaves" / one).symlink_to(block / one)
    line = host_security.at_rest(tmp_path, Path("/var/lib/torpor"), device)
    assert (line.what, line.is_well) == ("data at rest", is_well) and "/var/lib/torpor" in line.text


def test_a_kernel_that_says_nothing_is_an_old_one(tmp_path: Path) -> None:
    lines = found(tmp_path, {}, landlock=0)
    assert {name for name, line in lines.items() if not line.is_well} == {"smt", "vmscape", "microcode", "security modules"}
    assert "Landlock" in lines["security modules"].text


def test_what_is_not_mitigated_is_said(tmp_path: Path) -> None:
    lines = found(tmp_path, VIRTUAL | {"sys/devices/system/cpu/vulnerabilities/vmscape": "Vulnerable\n"})
    assert not lines["vmscape"].is_well


@pytest.mark.parametrize(
    ("what", "version", "is_well"),
    [
        ("release", "6.1.0-49-cloud-amd64", False),
        ("release", "6.1.167", False),
        ("release", "6.1.168-rt", True),
        ("release", "6.17.4", False),
        ("release", "6.18.44-fc-v595", True),
        ("release", "7.0.0", True),
        ("qemu", "7.2.10", False),
        ("qemu", "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", True),
        ("qemu", "8.1.5", False),
        ("firecracker", "1.14.0", False),
        ("firecracker", "1.17.0", True),
    ],
)
def test_versions_are_held_against_the_releases_that_have_the_cure(tmp_path: Path, what: str, version: str, is_well: bool) -> None:
    lines = found(tmp_path, METAL, **{what: version})
    name = "kernel" if what == "release" else what
    assert lines[name].is_well == is_well
    assert ("CVE" in lines[name].text) or what == "firecracker"


def test_what_is_not_there_has_no_line(tmp_path: Path) -> None:
    assert not {"qemu", "firecracker"} & set(found(tmp_path, METAL, qemu="", firecracker=""))


@pytest.mark.parametrize(
    ("version", "has", "has_not"),
    [
        ("1.13.1", ["CVE-2026-1386", "CVE-2026-5747", "5969"], []),
        ("1.13.2", ["CVE-2026-5747", "5969"], ["CVE-2026-1386"]),
        ("1.14.4", ["5969"], ["CVE-2026-1386", "CVE-2026-5747"]),
        ("1.15.0", ["CVE-2026-5747", "5969"], ["CVE-2026-1386"]),
        ("1.16.1", ["5969"], ["CVE-2026-1386", "CVE-2026-5747", "5958"]),
    ],
)
def test_firecrackers_faults_are_those_of_the_release_and_not_of_a_line_that_was_mended(
    version: str, has: list[str], has_not: list[str]
) -> None:
    said = probe.firecracker_faults(version)
    assert all(one in said for one in has) and not any(one in said for one in has_not)
    assert not probe.firecracker_faults("1.16.2")


def test_images_and_sleepers_whose_guests_see_virtualisation_are_named(tmp_path: Path) -> None:
    from gateway.config import Settings

    settings = Settings(root=tmp_path)
    shape = Shape(memory_mib=1, vcpus=1, disk_bytes=1, accelerator="kvm", baseline_mib=1)
    for key, model in (("one", "host"), ("two", ""), ("three", "host,vmx=off,svm=off"), ("four", "max,erms=off,svm=off")):
        (settings.images_dir / key).mkdir(parents=True)
        manifest.write(settings.images_dir / key, Manifest(shape, 1, 1, "qemu", Provenance(processor=model)))
    said = upgrades.virtualising(settings, {"one": "flask 1.0"}, {"vm-1": "one", "vm-2": "three"})
    assert said.startswith("images flask 1.0, two; sleepers vm-1: their guests see virtualisation") and "--rebuild-old" in said
    for key in ("one", "two"):
        (settings.images_dir / key / manifest.MANIFEST).unlink()
    assert not upgrades.virtualising(settings, {}, {})
