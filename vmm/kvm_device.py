"""Why this host's /dev/kvm is of no use, and what is done about it: the hypervisor's own words (vmm/probe.py) seldom say that.

The device is looked at from outside of any jail: whether it is there, opens, and makes a machine without a guest in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

_KVM_GET_API_VERSION, _KVM_CREATE_VM = 0xAE00, 0xAE01  # linux/kvm.h
_API_VERSION = 12  # of every Linux since 2.6.22
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}
_NO_RIGHT = (errno.EPERM, errno.EACCES)
_CONTAINER = (
    "a container or unit has it by a rule of its own (docker run --device /dev/kvm, DeviceAllow=/dev/kvm rw), and anybody else as root"
)


def cure(device: Path, root: Path = Path("/")) -> str:
    """Returns what is wrong with the device and what to do about it. `root` is where /proc is."""
    try:
        mode = device.stat().st_mode
    except OSError:
        return _absent(device, root)
    if not stat.S_ISCHR(mode):
        return f"{device} is no device: remove it, and load KVM's module again"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return _not_opened(device, error, root)
    try:
        return _opened(device, descriptor)
    finally:
        os.close(descriptor)


def _absent(device: Path, root: Path) -> str:
    flags = _processor_flags(root)
    module = next((name for flag, name in _MODULES.items() if flag in flags), "")
    if module:
        return f"{device} is not there, and the processor could have it: modprobe {module}; a container must be given the device"
    if "hypervisor" in flags:
        return (
            f"{device} is not there: this host is a virtual machine whose own hypervisor lends it no virtualisation: turn nested "
            "virtualisation on there, for this machine (kvm_intel or kvm_amd nested=1 and -cpu host; a cloud's instance type that has it)"
        )
    return f"{device} is not there: the processor offers no virtualisation: turn VT-x or AMD-V on in its firmware, where it has it"


def _not_opened(device: Path, error: OSError, root: Path) -> str:
    if error.errno in _NO_RIGHT:
        return f"{device} may not be opened here ({error.strerror}): {_CONTAINER}"
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{device} is a node without a driver ({error.strerror}): {_absent(device, root).partition(': ')[2]}"
    return f"{device} does not open: {error.strerror}"


def _opened(device: Path, descriptor: int) -> str:
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        if version != _API_VERSION:
            return f"{device} speaks version {version} of KVM's interface, not {_API_VERSION}: use this kernel's own module"
        os.close(fcntl.ioctl(descriptor, _KVM_CREATE_VM, 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return f"{device} makes no machine: another hypervisor has the processor's virtualisation (VirtualBox, VMware): end it"
        if error.errno == errno.ENOTTY:
            return f"{device} is not KVM's: remove it, and load KVM's module again"
        return f"{device} opens and makes no machine ({error.strerror}): the kernel's log says why (dmesg)"
    return (
        f"{device} opens and makes machines, and no guest of ours ran in one: KVM that is itself emulated (pvm) does so; "
        "take another kind of host, or more probe_seconds where it is only slow"
    )


def _processor_flags(root: Path) -> set[str]:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
