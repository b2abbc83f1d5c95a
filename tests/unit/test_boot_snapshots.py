"""A kept boot is of the very programs, and of what the kernel was told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.messages import Shape
from vmm.driver import DEVICES
from vmm.qemu import machine
from vmm.qemu.boot_snapshots import BootSnapshotCache

SHAPE = Shape(memory_mib=1, vcpus=1, disk_bytes=1 << 20, accelerator="tcg", baseline_mib=1)


def test_another_kernel_line_or_program_finds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hypervisor is that of the root that runs: the host's may be another."""
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    for path in (kernel, initrd):
        path.write_bytes(b"program")
    boots = BootSnapshotCache(tmp_path / "boots", "qemu-root-1", kernel, initrd)
    work = boots.begin()
    (work / DEVICES).write_bytes(b"state")
    memory = os.memfd_create("memory")
    os.write(memory, b"memory" * 1000)
    boots.keep(work, SHAPE, memory)
    os.close(memory)
    assert boots.find(SHAPE) is not None
    with monkeypatch.context() as patch:
        patch.setattr(machine, "KERNEL_LINE", "another")
        assert boots.find(SHAPE) is None
    assert BootSnapshotCache(tmp_path / "boots", "qemu-root-2", kernel, initrd).find(SHAPE) is None
    for path in (initrd, kernel):
        assert boots.find(SHAPE) is not None
        before = path.stat()
        path.write_bytes(b"another program")
        assert boots.find(SHAPE) is None, path
        path.write_bytes(b"program")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
