"""What a process finds, as JSON: run in a container of the reference and in a microVM of the same image; and, with the name of a file, in a
step of the reference's build and of ours, where there is more to compare (test_reference.py)."""

import ctypes
import json
import os
import resource
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        return f"{error.strerror}"


def fields(path: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text(path).splitlines())}


def mounts() -> dict[str, str]:
    """Where something is mounted: which file system, and the options of this mount."""
    found = {}
    for line in text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        found[before.split()[4]] = f"{after.split()[0]} {before.split()[5]}"
    return found


def entry(path: str) -> str:
    """Its type, mode and owner; where a link leads."""
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"{error.strerror}"
    what = f"{stat.filemode(found.st_mode)} {found.st_uid} {found.st_gid}"
    if stat.S_ISLNK(found.st_mode):
        return f"{what} {os.readlink(path)}"
    if stat.S_ISCHR(found.st_mode) and not path.startswith("/dev/pts/"):
        return f"{what} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return what


def is_written(path: str) -> str:
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        return f"{error.strerror}"
    return "can be written"


def content(path: str) -> str:
    """Whether there is something to read, or to list."""
    try:
        return "something" if (os.listdir(path) if os.path.isdir(path) else os.read(os.open(path, os.O_RDONLY), 1)) else "nothing"
    except OSError as error:
        return f"{error.strerror}"


def sysctl(*names: str) -> dict[str, str]:
    return {name: text(f"/proc/sys/{name}").strip() for name in names}


def descriptor(number: str) -> str:
    """What it leads to, without numbers of its own."""
    try:
        return os.readlink(f"/proc/self/fd/{number}").partition(":[")[0]
    except OSError:
        return "closed"


def outcome(attempt: Callable[[], object]) -> str:
    """In a process of its own: what it changes is gone with it."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
            said = "done"
        except OSError as error:
            said = f"{error.strerror}"
        os.write(into, said.encode())
        os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    said = os.read(out, 200).decode()
    os.close(out)
    return said


def call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def port(number: int) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", number))


def made(make: Callable[[str], object]) -> None:
    """In a directory that goes."""
    with tempfile.TemporaryDirectory() as directory:
        make(f"{directory}/one")


def mounted() -> None:
    with tempfile.TemporaryDirectory() as directory:
        call("mount", b"none", directory.encode(), b"tmpfs", 0, None)
        call("umount", directory.encode())


_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
# Numbers of system calls are x86-64's.
ATTEMPTS: dict[str, Callable[[], object]] = {
    "a port below 1024": lambda: port(80),
    "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
    "a socket of packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "a ping": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close(),
    "a socket of IPv6": lambda: socket.socket(socket.AF_INET6).close(),
    "a device": lambda: made(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))),
    "a pipe": lambda: made(os.mkfifo),
    "chown": lambda: made(lambda path: (Path(path).touch(), os.chown(path, 12, 12))),
    "a capability of a file": lambda: made(
        lambda path: (Path(path).touch(), os.setxattr(path, "security.capability", bytes.fromhex("0100000200040000" + "0" * 24)))
    ),
    "an attribute trusted.*": lambda: made(lambda path: (Path(path).touch(), os.setxattr(path, "trusted.a", b"b"))),
    "chroot": lambda: os.chroot("/tmp"),
    "setuid": lambda: (os.setgroups([1, 2]), os.setgid(3), os.setuid(4)),
    "setuid beyond 65,535": lambda: os.setuid(100_000),
    "nice": lambda: os.nice(-1),
    "more open files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2),
    "mount": mounted,
    "unshare mounts": lambda: call("unshare", _CLONE_NEWNS),
    "unshare users": lambda: call("unshare", _CLONE_NEWUSER),
    "unshare network": lambda: call("unshare", _CLONE_NEWNET),
    "sethostname": lambda: socket.sethostname(socket.gethostname()),
    "ptrace": lambda: call("ptrace", 0, 0, None, None),
    "keyctl": lambda: call("syscall", 250, 0, -3, 0),
    "io_uring": lambda: call("syscall", 425, 1, ctypes.create_string_buffer(120)),
    "bpf": lambda: call("syscall", 321, 0, ctypes.create_string_buffer(64), 64),
    "personality": lambda: call("personality", 0x40000),
    "mlock": lambda: call("mlock", ctypes.create_string_buffer(1 << 16), 1 << 16),
}  # fmt: skip
SYSCTL = (
    "net/ipv4/ip_forward", "net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/lo/disable_ipv6", "net/ipv4/ip_local_port_range",
    "net/core/somaxconn", "kernel/shmmax", "kernel/shmall", "kernel/sem", "kernel/msgmax", "fs/mqueue/msg_max", "kernel/domainname",
)  # fmt: skip
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware", "/sys/devices/system/cpu/cpu0/thermal_throttle",
)  # fmt: skip
READ_ONLY = ("/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/vm/overcommit_memory", "/proc/irq/default_smp_affinity",
             "/sys/kernel/uevent_helper", "/sys/kernel/mm/ksm/run", "/proc/self/oom_score_adj")  # fmt: skip
FILES = (
    "/",
    "/tmp",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/hostname",
    "/etc/mtab",
    "/.dockerenv",
    "/run",
    "/proc",
    "/sys",
    "/sys/fs/cgroup",
)

status = fields("/proc/self/status")
found = {
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "ids": [os.getresuid(), os.getresgid(), sorted(os.getgroups())],
    "umask": status["Umask"],
    "capabilities": {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
    "signals": {name: status[name] for name in ("SigBlk", "SigIgn")},
    "status": {name: status.get(name, "") for name in ("NoNewPrivs", "Seccomp")},
    "mounts": mounts(),
    "devices": {f"/dev/{name}": entry(f"/dev/{name}") for name in sorted(os.listdir("/dev"))},
    "masked": {path: content(path) for path in MASKED},
    "read-only": {path: is_written(path) for path in READ_ONLY},
    "files": {path: entry(path) for path in FILES},
    "first process": text("/proc/1/cmdline").replace("\0", " ").strip(),
    "host name": os.uname().nodename,
    "oom_score_adj": text("/proc/self/oom_score_adj").strip(),
    "sysctl": sysctl("net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range", "vm/overcommit_memory", "kernel/core_pattern"),
}
if len(sys.argv) < 2:
    json.dump(found, sys.stdout)
else:  # of a step, whose kernel is the reference's
    found |= {
        "id maps": {name: text(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map", "setgroups")},
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")},
        "handled signals": status["SigCgt"],
        "descriptors": {name: descriptor(name) for name in sorted(os.listdir("/proc/self/fd"))},
        "parent": os.getppid(),
        "session": [os.getsid(0), os.getpgrp()],
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "hosts": text("/etc/hosts"),
        "all of sysctl": sysctl(*SYSCTL),
        "what it may": {name: outcome(attempt) for name, attempt in ATTEMPTS.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
