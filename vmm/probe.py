"""What this host can do. A /dev/kvm that opens is no proof that guests run, so one is run, jailed as all that follow."""

from __future__ import annotations

import hashlib
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gateway.config import Settings
from gateway.messages import HostInfo

from . import jail
from .errors import VmmError
from .firecracker.jail import Jail, Programs
from .kernel import PROBED
from .making import key_at, remembered
from .qemu import machine as topology
from .sandboxes import QUOTED_CHARACTERS, VmSandbox

KVM = Path("/dev/kvm")
_MENDED = re.compile(r"mended in (\d+\.\d+\.\d+)")
_CODE = Path(__file__).parent  # what is asked is written there
_JAILED = ("kernel.py", "jail.py", "qemu/machine.py", "calls.py", "qemu/calls.c")
_VERSION_SECONDS = 10
_ENDING_SECONDS = 5.0
# What is wrong with releases of Firecracker before a number, as its repository's changes, issues and advisories say: the service has lost,
# or would lose, sleepers by most; the others are faults of its walls. A release of an older line that has the cure is named.
_FIRECRACKER_FAULTS = (
    ((1, 13, 0), "snapshots are a preview"),
    ((1, 14, 1), "its jailer follows links that others put below its root (CVE-2026-1386; mended in 1.13.2)"),
    ((1, 14, 4), "diffs of more than 3 GiB differ from what was in memory (5705), the guest's monotonic clock jumps over a sleep (5809)"),
    ((1, 15, 0), "a restored vsock takes ports that are in use (5688)"),
    ((1, 15, 1), "a guest writes beyond a queue of virtio over PCI, which is not turned on here (CVE-2026-5747; mended in 1.14.4)"),
    ((1, 16, 0), "connections by vsock break after a restore (5882)"),
    ((1, 16, 1), "a vsock is dead after a restore where a packet was on its way (5958)"),
    ((1, 16, 2), "a vsock hangs after a restore where a packet waited in its queue (5969)"),
)


def why_not_kvm(settings: Settings, device: Path = KVM) -> str:
    """Empty where our own guest's init ran under KVM, in QEMU, in the jail; else why not.

    Nothing smaller proves it: on hosts whose KVM only emulates (pvm, for one), a boot sector runs and a kernel hangs.
    """
    cache = settings.cache
    root, kernel, initrd = cache / "qemu-root", cache / "kernel/vmlinuz", cache / "initrd"
    if why_not := _not_askable(device, [root, kernel.parent, initrd]):
        return why_not

    def ask() -> str:
        with kernel.open("rb") as first, initrd.open("rb") as second:
            command = topology.probe("kvm", first.fileno(), second.fileno())
            return run(jail.command(root, [], settings.users.probe, True, command.arguments), command.descriptors, settings.probe_seconds)

    made_of = [
        Path(f"{root}{topology.BINARY}"),
        kernel,
        initrd,
        *(_CODE / name for name in _JAILED),
    ]
    return remembered(cache / "kvm-probe", _key(device, made_of, settings.probe_seconds), ask)


def why_not_firecracker(settings: Settings, device: Path = KVM) -> str:
    """Empty where Firecracker and its jailer are there, new enough, and ran our own guest's init; else why not."""
    programs = firecracker_programs()
    if why_not := wrong_release(programs, settings.oldest_firecracker):
        return why_not
    assert programs is not None
    cache = settings.cache
    kernel, initrd = cache / "vmlinux", cache / "initrd-firecracker"
    if why_not := _not_askable(device, [kernel, initrd]):
        return why_not

    # Where microVMs' jails will be: its file system decides whether a jailer's device nodes are devices there.
    place = settings.root if settings.root.is_dir() else cache
    base = place / "jails"

    def ask() -> str:
        jailed = Jail(base, programs, VmSandbox(f"probe-{os.getpid()}", settings.users.probe, base), None)
        try:
            jailed.make()
            return run(jailed.probe(kernel, initrd), [], settings.probe_seconds)
        finally:
            jailed.remove()

    made_of = [programs.firecracker, programs.jailer, kernel, initrd, *(_CODE / name for name in ("kernel.py", "firecracker/jail.py"))]
    facts = [place.stat().st_dev, os.statvfs(place).f_flag]  # instances with other roots share the cache
    return remembered(cache / "firecracker-probe", _key(device, made_of, settings.probe_seconds, *facts), ask)


def _not_askable(device: Path, assets: Sequence[Path]) -> str:
    """Why no guest can be run to find out; this is not remembered. `assets`: what the set-up must have made whole (vmm/making.py)."""
    try:
        mode = device.stat().st_mode
    except FileNotFoundError:
        return f"{device} is not there"
    if not stat.S_ISCHR(mode):
        return f"{device} is no device"
    if missing := [path for path in assets if not key_at(path)]:
        return f"it can be probed once `torpor assets` has made {missing[0]}"
    return "" if os.geteuid() == 0 else "only root can probe it"


def run(command: Sequence[str], descriptors: Sequence[int], seconds: float) -> str:
    """Runs a jailed hypervisor until its guest's init speaks on standard output. Empty when it did, else why not; nothing of it is left."""
    with tempfile.TemporaryFile() as errors:
        try:
            # A group of its own, and no session: the child of a session's leader gets another session by Firecracker's jailer.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command], pass_fds=descriptors, process_group=0, env={"PATH": jail.PATH},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        except OSError as error:
            return str(error)
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        said, data = b"", None
        with process.stdout as console:
            try:
                while PROBED not in said and (data := _read(console.fileno(), deadline)):
                    said += data
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # until it is waited for, its number is nobody else's
                while _read(console.fileno(), time.monotonic() + _ENDING_SECONDS):
                    pass  # to the end, which is when the last process of it is gone
                code = process.wait()
        errors.seek(0)
        words = _last_line(errors.read()) or _last_line(said)
    if PROBED in said:
        return ""
    if data is None:
        return f"no guest's init ran within {seconds:g} s" + (f": {words}" if words else "")
    return f"no guest ran: {words or f'its hypervisor ended with code {code}'}"


def _read(descriptor: int, deadline: float) -> bytes | None:
    """Empty at the end, None at the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return os.read(descriptor, 65536) if poll.poll(max(0.0, deadline - time.monotonic()) * 1000) else None


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][-QUOTED_CHARACTERS:] if lines else ""


def _key(device: Path, made_of: Sequence[Path], seconds: float, *others: object) -> str:
    """Another boot of the host, mode or owner of the device, hypervisor, kernel, jail or deadline makes another answer possible; and so
    does KVM's module when it is loaded again, which makes the device anew."""
    found = device.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    facts = [boot, seconds, found.st_rdev, found.st_ino, found.st_mode, found.st_uid, found.st_gid, *others]
    for path in made_of:
        entry = path.stat()
        facts += [path, entry.st_size, entry.st_mtime_ns]
    return hashlib.sha256(repr([str(fact) for fact in facts]).encode()).hexdigest()


def memory_cap_mib() -> int:
    """Returns what a guest may see at most: three quarters of the host's."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) // 1024 * 3 // 4


def firecracker_programs() -> Programs | None:
    """Firecracker and its jailer, where both are on the path."""
    found = [shutil.which(name) for name in ("firecracker", "jailer")]
    return None if found[0] is None or found[1] is None else Programs(Path(found[0]).resolve(), Path(found[1]).resolve())


def wrong_release(programs: Programs | None, oldest: str) -> str:
    """Empty when both programs are there, of one release, and as new as `oldest`, else why not."""
    if programs is None:
        return "firecracker and jailer are not both on the path"
    try:
        versions = [version_of(program) or "unknown" for program in (programs.firecracker, programs.jailer)]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if versions[0] != versions[1] or versions[0] == "unknown":
        return f"firecracker and jailer must be of one release, {oldest} or later: they are {', '.join(versions)}"
    number = _number(versions[0])
    if number >= _number(oldest):
        return ""
    return f"Firecracker {versions[0]} would lose what sleeps, {oldest} or later is needed: {firecracker_faults(versions[0])}"


def version_of(program: Path) -> str:
    """Returns what Firecracker or its jailer says of itself; empty where that is no version. Raises OSError, SubprocessError."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=True).stdout
    found = re.search(r"v(\d+\.\d+\.\d+)", said)
    return found[1] if found else ""


def firecracker_faults(version: str) -> str:
    """Returns what is wrong with a release; empty where nothing is listed."""
    number = _number(version)
    return "; ".join(
        f"before {'.'.join(map(str, release))} {fault}"
        for release, fault in _FIRECRACKER_FAULTS
        if number < release and not any(mended[:2] == number[:2] and mended <= number for mended in map(_number, _MENDED.findall(fault)))
    )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class Choice(NamedTuple):
    """`works` is false for what the settings want and this host cannot do."""

    what: str
    why: str
    works: bool = True


def choose_accelerator(wanted: str, why_not: str) -> Choice:
    """`wanted` is auto, kvm or tcg; auto takes KVM unless there is a reason `why_not`."""
    if wanted == "tcg":
        return Choice("tcg", "chosen by the settings")
    if wanted == "kvm":
        return Choice("kvm", f"chosen by the settings, but {why_not}", works=False) if why_not else Choice("kvm", "chosen by the settings")
    return Choice("tcg", f"software emulation, not KVM: {why_not}") if why_not else Choice("kvm", "a probe guest ran under KVM")


def choose_hypervisor(wanted: str, why_not: str) -> Choice:
    """`wanted` is auto, qemu or firecracker; auto takes Firecracker unless there is a reason `why_not`."""
    if wanted == "qemu":
        return Choice("qemu", "chosen by the settings")
    if wanted == "firecracker":
        why = f"chosen by the settings, but {why_not}" if why_not else "chosen by the settings"
        return Choice("firecracker", why, works=not why_not)
    return Choice("qemu", f"not Firecracker: {why_not}") if why_not else Choice("firecracker", "a probe guest ran in it")


def choose(settings: Settings) -> tuple[Choice, Choice]:
    """Returns the accelerator and the hypervisor."""
    accelerator = choose_accelerator(settings.accelerator, "" if settings.accelerator == "tcg" else why_not_kvm(settings))
    why_not = ""
    if settings.hypervisor != "qemu":
        why_not = why_not_firecracker(settings) if accelerator.what == "kvm" and accelerator.works else "it needs KVM"
    return accelerator, choose_hypervisor(settings.hypervisor, why_not)


def why_not_limited(settings: Settings, hypervisor: str) -> str:
    """Empty where the hypervisor keeps devices within the limits of the settings, else what to do."""
    limits = settings.devices
    if hypervisor == "firecracker" or not (limits.network_mib_per_second or limits.network_packets_per_second):
        return ""
    return (
        f"devices.network_mib_per_second and devices.network_packets_per_second are Firecracker's, and this host runs {hypervisor}, which "
        "limits no link: set them to 0"
    )


def host_info(settings: Settings) -> HostInfo:
    """Raises VmmError for what the settings want and this host cannot do."""
    accelerator, hypervisor = choose(settings)
    for name, choice in (("accelerator", accelerator), ("hypervisor", hypervisor)):
        if not choice.works:
            raise VmmError(f"{name} {choice.what}: {choice.why}")
    if why_not := why_not_limited(settings, hypervisor.what):
        raise VmmError(why_not)
    return HostInfo(
        accelerator=accelerator.what,
        accelerator_note=accelerator.why,
        hypervisor=hypervisor.what,
        memory_cap_mib=settings.limits.guest_mib or memory_cap_mib(),
        vcpus_cap=os.cpu_count() or 1,
        architecture=os.uname().machine,
    )
