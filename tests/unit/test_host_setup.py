"""What doctor says of a host on which Firecracker's recommendations are not followed (vmm/host_setup.py)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmm import disks, host_setup

AS_RECOMMENDED = {
    "sys/devices/system/cpu/smt/active": "0\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Not affected\n",
    "sys/devices/system/cpu/vulnerabilities/mds": "Mitigation: Clear CPU buffers\n",
    "sys/module/kvm_amd/parameters/nested": "0\n",
    "sys/module/kvm_intel/parameters/nested": "N\n",
}


def found(root: Path, **changed: str) -> dict[str, str]:
    for name, text in (AS_RECOMMENDED | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return dict(host_setup.recommendations(root))


def test_a_host_that_is_as_recommended_has_no_line(tmp_path: Path) -> None:
    assert found(tmp_path) == {}
    assert dict(host_setup.recommendations(tmp_path / "nothing")) == {}


@pytest.mark.parametrize(
    ("file", "text", "check", "says"),
    [
        ("sys/devices/system/cpu/smt/active", "1\n", "smt", "`nosmt`"),
        ("sys/kernel/mm/ksm/run", "1\n", "ksm", "echo 0 > /sys/kernel/mm/ksm/run"),
        ("proc/swaps", "Filename\tType\n/dev/sda2 partition 1 0 -2\n/swap file 1 0 -3\n", "swap", "written to /dev/sda2, /swap"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: Clear CPU buffers attempted, no microcode\n", "processor", "for mds:"),
        ("sys/module/kvm_intel/parameters/nested", "Y\n", "nested kvm", "options kvm_intel nested=0"),
        ("sys/module/kvm_amd/parameters/nested", "1\n", "nested kvm", "options kvm_amd nested=0"),
    ],
)
def test_what_is_otherwise_is_named_with_its_cure(tmp_path: Path, file: str, text: str, check: str, says: str) -> None:
    lines = found(tmp_path, **{file: text})
    assert list(lines) == [check] and says in lines[check]


def test_a_program_that_others_may_replace_is_found_also_by_its_directory(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root has programs of root's")
    place = tmp_path / "bin"
    place.mkdir(mode=0o755)
    program = place / "firecracker"
    program.touch(mode=0o755)
    before = host_setup.replaceable([program])
    assert program not in before and place not in before
    place.chmod(0o777)
    assert place in host_setup.replaceable([program])
    place.chmod(0o1777)  # in a sticky one nobody may replace another's
    assert place not in host_setup.replaceable([program])
    place.chmod(0o755)
    os.chown(program, 1000, 0)
    assert program in host_setup.replaceable([program])


def test_a_file_system_that_shares_blocks_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.ioctl", lambda *words: 0)
    assert disks.shares_blocks(tmp_path)
    monkeypatch.setattr("fcntl.ioctl", refused)
    assert not disks.shares_blocks(tmp_path)
    assert list(tmp_path.iterdir()) == []
