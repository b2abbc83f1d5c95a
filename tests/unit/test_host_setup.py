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
    "sys/devices/system/cpu/vulnerabilities/itlb_multihit": "Not affected\n",
    "sys/module/kvm_amd/parameters/nested": "0\n",
    "sys/module/kvm_intel/parameters/nested": "N\n",
    "sys/module/kvm/parameters/min_timer_period_us": "200\n",
    "sys/module/kvm/parameters/nx_huge_pages": "never\n",
    "proc/sys/kernel/printk": "4\t4\t1\t7\n",
    "proc/sys/vm/overcommit_memory": "0\n",
    "proc/meminfo": "MemTotal:       24000000 kB\nHugePages_Total:       0\nHugetlb:               0 kB\n",
    "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n",
}
CHECKS = [
    "smt", "ksm", "swap", "processor", "nested kvm", "kernel's console", "kvm's timer", "huge pages", "overcommit", "control groups",
    "kvm's start",
]  # fmt: skip


def found(root: Path, release: str = "6.1.0-13-cloud-amd64", **changed: str) -> list[host_setup.Finding]:
    for name, text in (AS_RECOMMENDED | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return host_setup.findings(root, release)


def test_each_recommendation_has_a_line_on_a_host_that_heeds_them_all(tmp_path: Path) -> None:
    lines = found(tmp_path)
    assert [line.what for line in lines] == CHECKS
    assert [line for line in lines if not line.is_well] == []


def test_a_kernel_that_says_nothing_breaks_none_of_the_checks(tmp_path: Path) -> None:
    assert [line.what for line in host_setup.findings(tmp_path / "nothing", "5.10.0")] == CHECKS


@pytest.mark.parametrize(
    ("file", "text", "check", "says"),
    [
        ("sys/devices/system/cpu/smt/active", "1\n", "smt", "`nosmt`"),
        ("sys/kernel/mm/ksm/run", "1\n", "ksm", "echo 2 > /sys/kernel/mm/ksm/run"),
        ("proc/swaps", "Filename\tType\n/dev/sda2 partition 1 0 -2\n/swap file 1 0 -3\n", "swap", "written to /dev/sda2, /swap"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: Clear CPU buffers attempted, no microcode\n", "processor", "for mds:"),
        ("sys/devices/system/cpu/vulnerabilities/spectre_v2", "Mitigation: Retpolines; BHI: Vulnerable\n", "processor", "for spectre_v2:"),
        ("sys/module/kvm_intel/parameters/nested", "Y\n", "nested kvm", "options kvm_intel nested=0"),
        ("sys/module/kvm_amd/parameters/nested", "1\n", "nested kvm", "options kvm_amd nested=0"),
        ("sys/module/kvm/parameters/min_timer_period_us", "0\n", "kvm's timer", "min_timer_period_us=200"),
        ("sys/module/kvm/parameters/nx_huge_pages", "Y\n", "kvm's start", "nx_huge_pages=never"),
        ("proc/sys/kernel/printk", "7\t4\t1\t7\n", "kernel's console", "`quiet loglevel=1`"),
        ("proc/sys/vm/overcommit_memory", "2\n", "overcommit", "vm.overcommit_memory=0"),
        ("proc/meminfo", "MemTotal:       24000000 kB\nHugetlb:         2097152 kB\n", "huge pages", "2048 MiB are reserved"),
        ("proc/mounts", "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n", "control groups", "boot with version 2"),
    ],
)
def test_what_is_otherwise_is_named_with_its_cure(tmp_path: Path, file: str, text: str, check: str, says: str) -> None:
    (line,) = [line for line in found(tmp_path, **{file: text}) if not line.is_well]
    assert line.what == check and says in line.text


def test_a_kernel_that_favours_writers_has_nothing_to_change(tmp_path: Path) -> None:
    """Before Linux 6.0 all did; since then those whose control groups are mounted so."""
    parameter, mounts = "sys/module/kvm/parameters/nx_huge_pages", "cgroup2 /sys/fs/cgroup cgroup2 rw,favordynmods 0 0\n"
    assert all(line.is_well for line in found(tmp_path, "5.10.0-28-amd64", **{parameter: "Y\n"}))
    assert all(line.is_well for line in found(tmp_path, "6.12.1", **{parameter: "Y\n", "proc/mounts": mounts}))


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
