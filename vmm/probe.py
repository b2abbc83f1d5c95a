"""What this host can do. A /dev/kvm that opens is no proof that guests run, so one is run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

from gateway.messages import HostInfo

from .cgroups import Cgroups
from .errors import VmmError

_PROBE_SECONDS = 10
OLDEST_FIRECRACKER = (1, 13)  # its `track_dirty_pages` at a load
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


def firecracker_programs() -> tuple[Path, Path] | None:
    """Firecracker and its jailer, where both are on the path."""
    found = [shutil.which(name) for name in ("firecracker", "jailer")]
    return None if found[0] is None or found[1] is None else (Path(found[0]).resolve(), Path(found[1]).resolve())


def probe_firecracker(programs: tuple[Path, Path] | None) -> str:
    """Empty when both programs are there and new enough, else why not."""
    if programs is None:
        return "firecracker and jailer are not both on the path"
    versions = []
    for program in programs:
        try:
            said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        found = re.search(r"v(\d+)\.(\d+)", said)
        versions.append((int(found[1]), int(found[2])) if found else (0, 0))
    if versions[0] != versions[1] or versions[0] < OLDEST_FIRECRACKER:
        wanted, have = ".".join(map(str, OLDEST_FIRECRACKER)), ", ".join(f"{major}.{minor}" for major, minor in versions)
        return f"firecracker and jailer must be of one release, {wanted} or later: they are {have}"
    return ""


def choose_hypervisor(wanted: str, accelerator: str) -> tuple[str, str]:
    """`wanted` is auto, qemu or firecracker; auto takes Firecracker where it works. Returns it and why."""
    if wanted == "qemu":
        return "qemu", "chosen by the settings"
    why_not = "it needs KVM" if accelerator != "kvm" else probe_firecracker(firecracker_programs())
    if wanted == "firecracker":
        if why_not:
            raise VmmError(f'hypervisor = "firecracker" cannot be: {why_not}')
        return "firecracker", "chosen by the settings"
    return ("qemu", f"not Firecracker: {why_not}") if why_not else ("firecracker", "it is there, and KVM works")


def host_info(accelerator: str, hypervisor: str, cgroups: Cgroups, cache: Path) -> HostInfo:
    """`accelerator` is auto, kvm or tcg; auto takes kvm where it works. Raises VmmError for what cannot be had."""
    note = "chosen by the settings"
    if accelerator == "auto":
        note = remembered_kvm(cache)
        accelerator = "tcg" if note else "kvm"
        note = f"software emulation, because {note}" if note else "a probe guest ran under KVM"
    hypervisor, hypervisor_note = choose_hypervisor(hypervisor, accelerator)
    return HostInfo(
        accelerator=accelerator,
        accelerator_note=note,
        hypervisor=hypervisor,
        hypervisor_note=hypervisor_note,
        memory_cap_mib=memory_total_mib() * 3 // 4,
        vcpus_cap=os.cpu_count() or 1,
        architecture=os.uname().machine,
        controllers_missing=cgroups.missing,
    )
