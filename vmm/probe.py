"""What this host can do. A /dev/kvm that opens is no proof that guests run, so one is run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path

from gateway.messages import HostInfo

from .cgroups import Cgroups

_PROBE_SECONDS = 10
_MARKER = b"Run /init as init process"


def probe_kvm(kernel: Path, initrd: Path) -> str:
    """Empty when our own guest's kernel reached its init under KVM, else why not.

    Nothing smaller proves it: on hosts whose KVM only emulates (pvm, for one), a boot sector runs and a kernel hangs.
    """
    if not os.path.exists("/dev/kvm"):
        return "/dev/kvm is not there"
    command = [
        "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "q35", "-m", "256", "-nodefaults", "-nographic",
        "-no-user-config", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 reboot=t panic=-1",
    ]  # fmt: skip
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return str(error)
    timer = threading.Timer(_PROBE_SECONDS, process.kill)
    timer.start()
    said = b""
    try:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            said += data
            if _MARKER in said:
                return ""
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close() if process.stdout else None
    words = said.decode(errors="replace").strip().splitlines()
    if process.returncode == -9:
        return f"a guest's kernel did not come up under KVM within {_PROBE_SECONDS} s"
    return f"a guest did not run under KVM: {words[-1][-200:] if words else f'exit code {process.returncode}'}"


def remembered_kvm(cache: Path) -> str:
    """The probe's answer, remembered until the host is booted again."""
    memory = cache / "kvm-probe"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError):
        known, _, answer = memory.read_text(encoding="utf-8").partition("\n")
        if known == boot:
            return answer
    answer = probe_kvm(cache / "kernel/vmlinuz", cache / "initrd")
    with contextlib.suppress(OSError):
        memory.write_text(f"{boot}\n{answer}", encoding="utf-8")
    return answer


def memory_total_mib() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) // 1024


def memory_available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def host_info(accelerator: str, cgroups: Cgroups, cache: Path) -> HostInfo:
    """`accelerator` is auto, kvm or tcg; auto takes kvm where it works."""
    note = "chosen by the settings"
    if accelerator == "auto":
        note = remembered_kvm(cache)
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
