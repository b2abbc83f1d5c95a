"""What is made once per host, in the cache directory: kernel, initramfs, the hypervisor's root, the local base image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import base, jail, kernel, probe
from .kernel import AssetError

__all__ = ["AssetError", "make", "make_firecracker"]


def make(cache: Path, say: Callable[[str], None]) -> None:
    """Makes what is missing; quick when all is there. Raises AssetError."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "kernel/complete").exists():
        say("fetching the guest's kernel (Debian's cloud kernel)")
    kernel.fetch_kernel(cache / "kernel")
    init = kernel.make_init(cache / "guest")
    initrd = cache / "initrd"
    if not initrd.exists() or initrd.stat().st_mtime < init.stat().st_mtime:
        say("making the guest's initramfs")
        kernel.make_initrd(cache / "kernel", init, initrd)
    if probe.firecracker_programs() is not None:
        make_firecracker(cache)
    if not (cache / "qemu-root/complete").exists():
        say("making the hypervisors' root")
    jail.make_root(cache / "qemu-root")
    if not (cache / "base.tar").exists():
        say("making the local base image with mmdebstrap (some 30 s, once)")
    base.make_base(cache / "base.tar")


def make_firecracker(cache: Path) -> None:
    """The same kernel and init for Firecracker's machine. Raises AssetError."""
    init, elf, initrd = cache / "guest/init", cache / "vmlinux", cache / "initrd-firecracker"
    if not elf.exists():
        kernel.extract_elf(cache / "kernel/vmlinuz", elf)
    if not initrd.exists() or initrd.stat().st_mtime < init.stat().st_mtime:
        kernel.make_initrd(cache / "kernel", init, initrd, kernel.FIRECRACKER_MODULES)
