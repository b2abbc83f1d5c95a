"""What each of the service's own processes gives up at its start, by itself, before it serves: gateway/confine.py has the means.

Somebody who takes an edge over finds the files that it reads, the sockets that it has, and nothing to start, to trace, to signal or to
connect from. Control starts the unpacker, and vmm the microVMs, so they keep more; a kernel without a layer keeps all, and the log says so.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from . import confine
from .config import Settings

log = structlog.get_logger()

_CODE = Path(__file__).resolve().parents[1]
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ssl", "/etc/localtime", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/proc/meminfo")
_NAMES = ("/etc", "/run/systemd/resolve", "/run/resolvconf")  # for who asks for names of the internet's
_UNIX = (socket.AF_UNIX,)
_INTERNET = (*_UNIX, socket.AF_INET, socket.AF_INET6)
_RESOLVER = (*_INTERNET, socket.AF_NETLINK)  # glibc asks which addresses the host has


class Kept(NamedTuple):
    """What is left to a process; see confine.confine_service."""

    reads: list[Path]
    writes: list[Path]
    refused: Mapping[str, confine.Numbers]
    families: Sequence[int] | None
    starts: bool


def kept(name: str, settings: Settings) -> Kept:
    refused, temporary = confine.MACHINE | confine.OTHERS, Path(tempfile.gettempdir())
    if name.startswith("edge"):
        asks = bool(settings.traces.endpoint)
        reads = [*_program(), settings.tls_dir, *(map(Path, _NAMES) if asks else ())]
        return Kept(reads, list(_log_of(settings)), refused | confine.STARTS, _RESOLVER if asks else _UNIX, False)
    if name == "store":
        return Kept([*_program(), *map(Path, _NAMES)], [temporary], refused | confine.STARTS, _INTERNET, False)
    if name == "control":
        writes = [settings.control_dir, settings.control_socket.parent, temporary, Path("/var/tmp"), Path("/dev/null")]  # SQLite's
        return Kept([Path("/")], writes, refused, _RESOLVER, True)
    # vmm mounts, which Landlock ends, and starts what takes a range of users by newuidmap(1), which no_new_privs ends.
    return Kept([], [], confine.MACHINE, None, True)


def memory_bound(settings: Settings) -> int:
    """Returns what one process may have of the host's memory, in bytes."""
    return settings.service.memory_mib << 20 or _host_bytes() // 2


def group_bound(name: str, settings: Settings) -> int:
    """Returns what a process may have with all that it starts, as its control group counts: pages of files, and the kernel's for it, too.
    An eighth more than its own bound: what the process is refused it may survive, and a group's end is a process's. vmm holds the memory
    of images, which limits of microVMs bound: it leaves what the host keeps back."""
    if name == "vmm":
        return max(_host_bytes() - (settings.limits.reserve_mib << 20), _host_bytes() // 2)
    return memory_bound(settings) // 8 * 9


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bound_memory(settings: Settings) -> None:
    """Each by itself takes no more of the host's memory than that: an allocation beyond fails, which ends what asked for it and not the
    process. Of anonymous memory (getrlimit(2), RLIMIT_DATA); who starts later has the same."""
    limit = memory_bound(settings)
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def raise_walls(name: str, settings: Settings) -> None:
    """In a process that is called `name`, while it has one thread. Raises OSError for a layer that is there and does not stand."""
    left = kept(name, settings)
    if left.reads:  # not vmm, whose children are microVMs
        bound_memory(settings)
    layers = confine.confine_service(*left)
    if missing := {confine.FILTER, *([confine.LANDLOCK] if left.reads else [])} - set(layers):
        log.warning("process.less_confined", process=name, missing=sorted(missing))


def _program() -> Iterator[Path]:
    yield from map(Path, _SYSTEM)
    yield from {Path(one) for one in (sys.prefix, sys.base_prefix, str(_CODE), *sys.path) if one}
    yield from (Path(os.environ[name]) for name in ("SSL_CERT_FILE", "TZDIR") if name in os.environ)


def _log_of(settings: Settings) -> Iterator[Path]:
    """The access log, which is opened again when it was rotated, where a program that rotates puts a new one."""
    if not settings.edge.access_log:
        return
    path = Path(settings.edge.access_log)
    yield path
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        is_file = True
    if is_file:
        yield path.parent
