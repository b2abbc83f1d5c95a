"""What this host can do. A /dev/kvm that opens is no proof that guests run, so a tiny one is run."""

from __future__ import annotations

import os
import subprocess
import tempfile

from gateway.messages import HostInfo

from .cgroups import Cgroups

_PROBE_SECONDS = 10
_EXIT_PORT = 0xF4
_EXIT_CODE = 0x10 << 1 | 1
# mov al, 0x10; out 0xf4, al; hlt; jmp $-1: a boot sector that ends its own machine.
_SECTOR = bytes([0xB0, 0x10, 0xE6, _EXIT_PORT, 0xF4, 0xEB, 0xFD]).ljust(510, b"\0") + b"\x55\xaa"


def probe_kvm() -> str:
    """Empty when a guest ran under KVM, else why not."""
    if not os.path.exists("/dev/kvm"):
        return "/dev/kvm is not there"
    with tempfile.NamedTemporaryFile() as disk:
        disk.write(_SECTOR)
        disk.flush()
        command = [
            "qemu-system-x86_64", "-accel", "kvm", "-M", "pc", "-m", "16", "-nodefaults", "-nographic", "-no-user-config",
            "-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1",
            "-drive", f"file={disk.name},format=raw,if=ide,readonly=off",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"/dev/kvm opens, but a guest did not run within {_PROBE_SECONDS} s"
        except OSError as error:
            return str(error)
    if done.returncode == _EXIT_CODE:
        return ""
    words = done.stderr.strip().splitlines()
    return f"a guest did not run: {words[-1] if words else f'exit code {done.returncode}'}"


def memory_total_mib() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) // 1024


def memory_available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def host_info(accelerator: str, cgroups: Cgroups) -> HostInfo:
    """`accelerator` is auto, kvm or tcg; auto takes kvm where it works."""
    note = "chosen by the settings"
    if accelerator == "auto":
        note = probe_kvm()
        accelerator = "tcg" if note else "kvm"
        note = f"software emulation, because {note}" if note else "a probe guest ran under KVM"
    return HostInfo(
        accelerator=accelerator,
        accelerator_note=note,
        memory_cap_mib=memory_total_mib() * 3 // 4,
        vcpus_cap=os.cpu_count() or 1,
        architecture=os.uname().machine,
        controllers_missing=cgroups.missing,
    )
