"""What a host has that tests could leave behind."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

TEST_UIDS = range(700_000, 700_000 + 8 * 262_144)
BUILDERS_UIDS = range(1 << 30, 1 << 32)
_PROGRAMS = ("qemu-system-x86", "slirp4netns", "dockerd", "containerd", "torpor", "firecracker", "jailer")
_PLACES = (
    *("/run/torpor*", "/run/torpor/*", "/run/netns", "/var/lib/torpor*", "/etc/torpor*", "/etc/netns", "/usr/local/share/ca-certificates/torpor*"),
    *("/var/tmp/torpor*", "/tmp/torpor*", "/root/torpor*", "/dev/shm/torpor*"),
)  # fmt: skip
# Of the initial network namespace, which the way out of microVMs changes.
_SETTINGS = (
    *("ipv4/ip_forward", "ipv4/ip_local_port_range", "ipv4/conf/all/forwarding", "ipv4/conf/default/forwarding"),
    *("ipv6/conf/all/forwarding", "ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"),
)


def _processes() -> Iterator[str]:
    """Those of the tests' users, hypervisors and what goes with them, and programs of this virtual environment."""
    ours = f"{sys.prefix}/bin/" if sys.prefix != sys.base_prefix else None
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if fields["State"].startswith("Z"):  # over, and not ours to reap
            continue
        name = fields["Name"].strip()
        is_ours = ours is not None and command.startswith(os.fsencode(ours))
        uid = int(fields["Uid"].split()[0])
        if uid in TEST_UIDS or uid in BUILDERS_UIDS or name in _PROGRAMS or is_ours:
            yield f"{status.parent.name} {name}"


def _mounts() -> Iterator[str]:
    """Each mount point, with a number where something is mounted there more than once."""
    points = Counter(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    for point, count in points.items():
        yield from (point if number == 1 else f"{point} ({number})" for number in range(1, count + 1))


def _namespaces() -> Iterator[str]:
    """Network namespaces that outlive their processes: pinned by a mount (nsfs), or held open by this process."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("nsfs "):
            yield f"{mount.split()[3]} at {mount.split()[4]}"
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("net:["):
            yield f"{target} held by this process"


def _links() -> Iterator[str]:
    return (name for _, name in socket.if_nameindex())


def groups(root: str = "/sys/fs/cgroup") -> Iterator[str]:
    """Those of ours below `root`. `os.walk` passes over what is removed meanwhile: the service under test ends guests of its own."""
    for directory, names, _ in os.walk(root):
        yield from (f"{directory}/{name}" for name in names if name.startswith("torpor-"))


def _tables() -> list[str]:
    try:
        done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:  # before anything is installed
        return []
    return done.stderr.splitlines() if done.returncode else done.stdout.splitlines()


def _files() -> Iterator[str]:
    """What instances wrote down in the cache that they share is theirs too."""
    needs = f"{os.environ.get('TORPOR_CACHE', '/var/cache/torpor')}/needed-roots/*"
    return (path for place in (*_PLACES, needs) for path in glob.iglob(place))


def _settings() -> Iterator[str]:
    for name in _SETTINGS:
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            yield f"net/{name} is {(Path('/proc/sys/net') / name).read_text().strip()}"


KINDS: dict[str, Callable[[], Iterator[str] | list[str]]] = {
    "processes": _processes, "mounts": _mounts, "namespaces": _namespaces, "links": _links, "control groups": groups,
    "nft tables": _tables, "files": _files, "settings": _settings,
}  # fmt: skip


def snapshot() -> dict[str, set[str]]:
    return {kind: set(look()) for kind, look in KINDS.items()}


def left(before: dict[str, set[str]], after: dict[str, set[str]]) -> list[str]:
    return sorted(f"{kind}: {item}" for kind in before for item in after[kind] - before[kind])
