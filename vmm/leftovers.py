"""What a crash left on the host that nobody needs any more: found for `torpor doctor`, removed for `torpor doctor --repair`.

Only what belongs to the instance by its name and place is looked at, and only while no service runs: a running one knows better,
and mends all of this at its start.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.config import Settings

from . import syscalls
from .cgroups import Cgroups
from .driver import Process
from .egress import Uplink
from .own_groups import OwnGroups
from .snapshots import is_half_made, is_void

_OWN = "control groups"


@dataclass(frozen=True)
class Leftover:
    """`kind`: process, namespace, uplink, control group (or groups), directory, file. `why` says what makes it nobody's; `started` with its
    pid which process is meant."""

    kind: str
    what: str
    why: str
    started: int = 0


def find(settings: Settings, sessions: Collection[str], images: Collection[str]) -> list[Leftover]:
    """`sessions` and `images` are those that the store knows (ids, and keys of image versions)."""
    records = list(records_of(settings))
    held = {record.link for record in records if record.session in sessions and syscalls.start_time(record.pid) == record.started}
    links = held | set(_parked(settings, sessions))
    return [
        *_processes(records, sessions), *_namespaces(settings, links), *_uplinks(settings, links), *_groups(settings, records, sessions),
        *_jails(settings, records, sessions), *_files(settings, sessions, images),
    ]  # fmt: skip


def records_of(settings: Settings) -> Iterator[Process]:
    for path in sorted((settings.runtime / "vms").glob("*/process.json")):
        with contextlib.suppress(OSError, ValueError):
            yield msgspec.json.decode(path.read_bytes(), type=Process)


def _processes(records: list[Process], sessions: Collection[str]) -> Iterator[Leftover]:
    for record in records:
        if syscalls.start_time(record.pid) == record.started and record.session not in sessions:
            yield Leftover("process", str(record.pid), f"hypervisor {record.vm} of {record.session or 'no session'}", record.started)


def _parked(settings: Settings, sessions: Collection[str]) -> Iterator[str]:
    for session in sessions:
        with contextlib.suppress(OSError):
            yield (settings.sessions_dir / session / "link").read_text(encoding="ascii")


def _namespaces(settings: Settings, links: Collection[str]) -> Iterator[Leftover]:
    for directory in ("netns", "build-netns"):
        for path in sorted((settings.runtime / directory).glob("*")):
            if path.name not in links:
                yield Leftover("namespace", str(path), "no microVM runs in it")


def uplink_of(settings: Settings) -> Uplink:
    return Uplink(settings.egress, settings.name, settings.runtime / "uplink")


def _uplinks(settings: Settings, links: Collection[str]) -> Iterator[Leftover]:
    uplink = uplink_of(settings)
    with contextlib.suppress(OSError):  # what cannot be asked, for want of privileges or programs, is not reported
        if not links and uplink.is_left():
            yield Leftover("uplink", f"{uplink.device}, {uplink.path}", "no microVM has a way out through it")


def _groups(settings: Settings, records: list[Process], sessions: Collection[str]) -> Iterator[Leftover]:
    known = {name for record in records if record.session in sessions for name in (record.vm, f"image-{record.image}")}
    for name in sorted(Cgroups(settings.name, settings.root).names()):
        if name not in known:
            yield Leftover("control group", name, "nothing that is known belongs in it")
    if OwnGroups(settings.name).are_left():
        yield Leftover(_OWN, "of the service's own processes", "none of these runs")


def _jails(settings: Settings, records: list[Process], sessions: Collection[str]) -> Iterator[Leftover]:
    """Finds Firecracker's; QEMU's jails are mounts of the process itself."""
    known = {record.vm for record in records if record.session in sessions}
    for path in sorted((settings.root / "jails").glob("*/*")):
        if path.name not in known:
            yield Leftover("directory", str(path), "the jail of a process that is nobody's")


def _files(settings: Settings, sessions: Collection[str], images: Collection[str]) -> Iterator[Leftover]:
    for path in _entries(settings.sessions_dir):
        if path.name.startswith("."):
            yield Leftover("directory", str(path), "of a microVM that was being removed or fetched")
        elif path.name not in sessions:
            if not _is_saved(path):
                yield Leftover("directory", str(path), "of a launch that was interrupted")
        else:
            for part in _entries(path):
                if is_half_made(part):
                    yield Leftover("directory", str(part), "half a snapshot")
                elif is_void(part):
                    yield Leftover("directory", str(part), "a snapshot that was being removed")
    for path in _entries(settings.images_dir):
        if path.name not in images and not _is_image(path):
            yield Leftover("directory", str(path), "half an image")
    for path in _entries(settings.control_dir / "builds"):
        yield Leftover("directory", str(path), "of a build that was interrupted")


def _entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _is_saved(session: Path) -> bool:
    return session.name[0] != "." and any(session.glob("snapshot-[0-9]*"))


def _is_image(path: Path) -> bool:
    return path.name[0] != "." and (path / "manifest.json").exists()


def strangers(settings: Settings, sessions: Collection[str], images: Collection[str]) -> list[Path]:
    """Returns sleeping sessions and images that the store does not know. They are nobody's to remove: the store may be the wrong one."""
    asleep = [path for path in _entries(settings.sessions_dir) if path.name not in sessions and _is_saved(path)]
    return asleep + [path for path in _entries(settings.images_dir) if path.name not in images and _is_image(path)]


def mend(settings: Settings, found: Leftover) -> None:
    """Removes it. Raises OSError."""
    if found.kind == "process":
        with contextlib.suppress(ProcessLookupError):
            syscalls.signal_process(int(found.what), found.started, signal.SIGKILL)
    elif found.kind == "namespace":
        with contextlib.suppress(OSError):
            syscalls.umount(found.what)
        Path(found.what).unlink(missing_ok=True)
    elif found.kind == "uplink":
        uplink_of(settings).remove()
    elif found.kind == _OWN:
        OwnGroups(settings.name).remove()
    elif found.kind == "control group":
        Cgroups(settings.name, settings.root).remove(found.what)
    else:
        shutil.rmtree(found.what)
