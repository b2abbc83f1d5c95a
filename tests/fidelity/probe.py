"""What a process finds, as JSON: run in a container of the reference and in a microVM of the same image (test_reference.py).

Resource limits are not among it: a container has those of its daemon, which has those of who started it."""

import json
import os
import stat
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
print(
    json.dumps(
        {
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "ids": [os.getuid(), os.getgid(), sorted(os.getgroups())],
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
            "sysctl": {
                path: text(f"/proc/sys/{path}").strip()
                for path in (
                    "net/ipv4/ip_unprivileged_port_start",
                    "net/ipv4/ping_group_range",
                    "vm/overcommit_memory",
                    "kernel/core_pattern",
                )
            },
        }
    )
)
