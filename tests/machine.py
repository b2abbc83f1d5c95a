"""A host as operators have it, in one QEMU machine: Debian with systemd, udev, the unified hierarchy of control groups, and KVM.

Its disk is made once and kept in the cache. A run writes to a copy that goes with it, and brings a second disk: the tree with its virtual
environment, what `make setup` has made, and the job. The processor is emulated whatever the host has, and offers AMD's SVM: what the
machine runs are guests of its own KVM. It begins with systemd, which then does the job, or with the job itself, which is quicker.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fresh

from vmm import kernel, making, mirrors

REPO = Path(__file__).resolve().parents[1]
RELEASE = "bookworm"
SYSTEM = ("systemd-sysv", "udev", "dbus", "busybox-static", "procps", "xfsprogs")
DISK_MIB, LENT_MIB = 12_288, 6144
UNIT = """[Unit]
RequiresMountsFor=/lent
Wants=network-online.target
After=network-online.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
Environment=HOME=/root
ExecStart=/bin/sh /lent/start
"""
# What the job tells goes to the second serial port, everything else to the first.
START = """set -e
mkdir -p '{repo}' /var/cache/torpor
{mounts}
cd '{repo}'
{job} > /dev/ttyS1 2> /dev/ttyS0
"""
MOUNTS = """mount --bind /lent/tree '{repo}'
mount --bind /lent/cache /var/cache/torpor"""
# Where systemd does the job, it knows the mounts, and has them until all that needs them is stopped. A job may restart the machine: that
# ends this shell by a signal, and nothing powers off.
KNOWN_MOUNTS = """trap 'systemctl poweroff --force' EXIT
grep -q /lent/tree /etc/fstab || {{
    cat >> /etc/fstab << 'end'
/lent/tree {escaped} none bind 0 0
/lent/cache /var/cache/torpor none bind 0 0
end
    systemctl daemon-reload
    mount -a
}}"""
# Of one that is the machine's first process: what systemd, udev and a DHCP client would have done. The network is QEMU's own (slirp).
FIRST = """mount -t proc proc /proc; mount -t sysfs sys /sys; mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts; mount -t tmpfs -o mode=1777 shm /dev/shm; mount -t tmpfs -o mode=755 run /run; mkdir -p /run/lock
mount -t cgroup2 cgroup /sys/fs/cgroup
for module in kvm-amd kvm-intel tun veth nf_tables overlay loop xfs virtio_net; do modprobe -q "$module"; done
echo host > /proc/sys/kernel/hostname; ip link set lo up
for link in /sys/class/net/e*; do ip link set "${{link##*/}}" up; ip address add 10.0.2.15/24 dev "${{link##*/}}"; done
ip route add default via 10.0.2.2
export HOME=/root PATH=/lent/programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
(
{start}
)
sync
echo o > /proc/sysrq-trigger
sleep 60
"""
# The kernel of the cache has its drivers of disks as modules. A word of the kernel's line that it does not know is a variable here.
INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules); do /bin/busybox insmod /m/$module; done
/bin/busybox mount -t ext4 /dev/vda /new
if [ "$first" ]; then
    /bin/busybox mkdir -p /new/lent
    /bin/busybox mount -t ext4 /dev/vdb /new/lent
    /bin/busybox mount -o move /dev /new/dev
    exec /bin/busybox switch_root /new /bin/bash /lent/first
fi
/bin/busybox umount /dev
exec /bin/busybox switch_root /new /sbin/init
"""


@dataclass(frozen=True)
class Job:
    """`command` is run in the tree, and tells of itself in lines of JSON on standard output. `programs` are on its path; `first`: it is
    started by the machine's first process, not by systemd. `room_mib`: of an empty disk of its own, /dev/vdc. `files` are in /lent."""

    command: str
    memory_mib: int = 6144
    programs: dict[str, Path] = field(default_factory=dict)
    first: bool = False
    room_mib: int = 0
    files: dict[str, str] = field(default_factory=dict)


def _run(*command: str | Path, deadline: float = 900) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=deadline, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr.strip()[-2000:]}"


def packages() -> list[str]:
    """What the Makefile installs on a host to run the service there."""
    found = re.search(r"^PACKAGES = ((?:.*\\\n)*.*)$", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return sorted({*found[1].replace("\\", " ").split(), *SYSTEM})


def make_system(image: Path, modules: Path) -> None:
    """Installs the Debian and makes it a disk."""
    root, sources, options = (image.with_name(name) for name in ("root", "host.sources", "apt.conf"))
    sources.write_text(mirrors.host_sources(RELEASE), encoding="utf-8")
    options.write_text(mirrors.apt_options(), encoding="utf-8")
    _run(
        "mmdebstrap", "--mode=root", "--variant=apt", f"--include={','.join(packages())}", f"--aptopt={options}",
        '--aptopt=Acquire::Retries "3"', RELEASE, root, sources,
    )  # fmt: skip
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    _run("depmod", "-b", root, modules.name)
    fresh.lend_sources(root)
    etc = root / "etc"
    # The keys of what the cache has name the host's package sources.
    shutil.rmtree(etc / "apt/sources.list.d")
    (etc / "apt/sources.list").unlink(missing_ok=True)
    shutil.copytree("/etc/apt", etc / "apt", dirs_exist_ok=True)
    for name, text in {
        "hostname": "host\n", "hosts": "127.0.0.1 localhost host\n::1 localhost\n", "machine-id": "",
        "fstab": "/dev/vda / ext4 defaults 0 0\n/dev/vdb /lent ext4 defaults 0 0\n",
        "systemd/network/host.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n",
        "modules-load.d/kvm.conf": "kvm-amd\nkvm-intel\n",
        "systemd/system/trial.service": UNIT,
    }.items():  # fmt: skip
        (etc / name).parent.mkdir(parents=True, exist_ok=True)
        (etc / name).write_text(text, encoding="utf-8")
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text("nameserver 10.0.2.3\n", encoding="utf-8")  # QEMU's own (slirp)
    _run("chroot", root, "systemctl", "enable", "systemd-networkd")
    for name in ("serial-getty@ttyS0", "serial-getty@ttyS1", "getty@tty1"):
        (etc / f"systemd/system/{name}.service").symlink_to("/dev/null")
    wants = etc / "systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "trial.service").symlink_to("../trial.service")
    _run("mke2fs", "-q", "-t", "ext4", "-d", root, image, f"{DISK_MIB}M")
    shutil.copy(root / "bin/busybox", image.with_name("busybox"))


def initramfs(cache: Path, busybox: bytes) -> bytes:
    files = kernel.module_files(cache / "kernel", ("virtio_pci", "virtio_blk"))
    entries: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in ("bin", "dev", "new", "m")]
    entries += [("bin/busybox", 0o100755, busybox), ("init", 0o100755, INIT.encode())]
    entries += [(f"m/{file.name}", 0o100644, file.read_bytes()) for file in files]
    entries.append(("modules", 0o100644, "\n".join(file.name for file in files).encode()))
    return gzip.compress(kernel.cpio(entries), 1)


def system(cache: Path) -> Path:
    """The disk, made where it is not there yet."""
    release = (cache / "kernel/release").read_text(encoding="ascii").strip()
    place = cache / "systemd"

    def work(made: Path) -> None:
        made.mkdir()
        make_system(made / "disk.raw", cache / "kernel/lib/modules" / release)
        for name in ("root", "host.sources", "apt.conf"):
            making.remove(made / name)

    authorities = sorted((Path("/") / fresh.CERTIFICATES).glob("**/*.crt"))
    with making.alone(cache):
        key = making.key_of(make_system, RELEASE, packages(), release, UNIT, DISK_MIB, mirrors.host_sources(RELEASE), *authorities)
        if making.key_at(place) != key:
            making.make(place, key, work)
    return place


def start(mounts: str, job: Job) -> str:
    return START.format(repo=REPO, mounts=mounts.format(repo=REPO, escaped=str(REPO).replace(" ", "\\040")), job=job.command)


def lend(directory: Path, cache: Path, job: Job) -> Path:
    """A disk with the tree, the cache and the job."""
    lent = directory / "lent"
    (lent / "cache").mkdir(parents=True)
    (lent / "programs").mkdir()
    # Bytecode comes along: an emulated processor takes long to make it.
    left = {str(REPO): {".git", ".mypy_cache", ".ruff_cache", ".hypothesis"}, str(REPO / ".venv"): {"clients", "autocannon"}}
    shutil.copytree(REPO, lent / "tree", symlinks=True, ignore=lambda where, names: left.get(where, set()) & set(names))
    for one in cache.iterdir():
        if not one.name.startswith(("systemd", "firecracker-")) and one.name not in ("lock", "kvm-probe"):
            _run("cp", "-a", one, lent / "cache")
    for name, program in job.programs.items():
        shutil.copy(program, lent / "programs" / name)
        (lent / "programs" / name).chmod(0o755)
    for name, text in job.files.items():
        (lent / name).write_text(text, encoding="utf-8")
    (lent / "start").write_text(start(KNOWN_MOUNTS, job), encoding="utf-8")
    (lent / "first").write_text(FIRST.format(start=start(MOUNTS, job)), encoding="utf-8")
    _run("mke2fs", "-q", "-t", "ext4", "-d", lent, directory / "lent.raw", f"{LENT_MIB}M")
    making.remove(lent)
    return directory / "lent.raw"


@contextlib.contextmanager
def machine(directory: Path, cache: Path, log: Path, job: Job) -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[], None]]]:
    """Boots it; yields what the job in it tells, as it does, and what ends it."""
    disk = system(cache)
    drives = [f"file={disk / 'disk.raw'},snapshot=on", f"file={lend(directory, cache, job)},cache=unsafe"]
    if job.room_mib:
        (directory / "room.raw").touch()
        os.truncate(directory / "room.raw", job.room_mib << 20)
        drives.append(f"file={directory / 'room.raw'},cache=unsafe")
    (directory / "initrd").write_bytes(initramfs(cache, (disk / "busybox").read_bytes()))
    command = [
        "setpriv", "--pdeathsig=KILL", "--", "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm",
        "-smp", "2", "-m", str(job.memory_mib), "-display", "none", *(["-no-reboot"] if job.first else []), "-nic", "user,model=virtio-net-pci",
        "-kernel", str(cache / "kernel/vmlinuz"), "-initrd", str(directory / "initrd"),
        "-append", f"console=ttyS0 mitigations=off quiet panic=1{' first=1' if job.first else ''}",
        "-serial", f"file:{log}", "-serial", "stdio", *(word for one in drives for word in ("-drive", f"{one},if=virtio,format=raw")),
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(directory)}
    with (
        (directory / "qemu.log").open("wb") as words,  # what of EPYC is not emulated, as a rule
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            yield (json.loads(line) for line in process.stdout if line.startswith("{") and line.endswith("\n")), process.kill
        finally:
            process.kill()
