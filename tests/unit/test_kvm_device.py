"""What doctor says of a /dev/kvm that is of no use, and what is done about it (vmm/kvm_device.py)."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from vmm import kvm_device


def host(root: Path, flags: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t:\n")
    return root


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("vmx", "modprobe kvm_intel"),
        ("svm hypervisor", "modprobe kvm_amd"),
        ("hypervisor", "turn nested virtualisation on there"),
        ("", "turn VT-x or AMD-V on in its firmware"),
    ],
)
def test_one_that_is_not_there(tmp_path: Path, flags: str, says: str) -> None:
    device = tmp_path / "kvm"
    text = kvm_device.cure(device, host(tmp_path, flags))
    assert text.startswith(f"{device} is not there") and says in text


def test_one_that_is_no_device(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    assert kvm_device.cure(device, tmp_path) == f"{device} is no device: remove it, and load KVM's module again"


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EPERM, "DeviceAllow=/dev/kvm rw"), (errno.EACCES, "as root"), (errno.ENODEV, "modprobe kvm_amd"), (errno.EIO, "does not open")],
)
def test_one_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    def refuse(*words: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vmm.kvm_device.os.open", refuse)
    assert says in kvm_device.cure(Path("/dev/null"), host(tmp_path, "svm"))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([11], "speaks version 11"),
        ([errno.ENOTTY], "is not KVM's"),
        ([12, errno.EBUSY], "VirtualBox"),
        ([12, errno.ENOMEM], "makes no machine (Cannot allocate memory)"),
        ([12, "made"], "more probe_seconds"),
    ],
)
def test_one_that_opens(monkeypatch: pytest.MonkeyPatch, answers: list[int | str], says: str) -> None:
    """Numbers are KVM's answers, or errors where they are one's; a machine that was made is closed again."""
    left, made = list(answers), []

    def answer(descriptor: int, call: int, argument: int) -> int:
        found = left.pop(0)
        if found == "made":
            made.append(os.open("/dev/null", os.O_RDONLY))
            return made[0]
        assert isinstance(found, int)
        if found in (11, 12) and call == 0xAE00:
            return found
        raise OSError(found, os.strerror(found))

    monkeypatch.setattr("vmm.kvm_device.fcntl.ioctl", answer)
    assert says in kvm_device.cure(Path("/dev/null"))
    assert not left
    for descriptor in made:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_device_of_another_kind_is_told_from_kvm(tmp_path: Path) -> None:
    """By what a real one answers, without a stand-in for its calls."""
    if os.geteuid():
        pytest.skip("only root makes device nodes")
    device = tmp_path / "kvm"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert "is not KVM's" in kvm_device.cure(device)
