"""Sessions whose files were set aside, because something is wrong with them that no retry mends. Nothing here is deleted but by the user's
or the policy's word.

ROOT/quarantine/<id>/             all that was in sessions/<id>/: disk, memory, diffs, manifests
ROOT/quarantine/<id>/reason.json  what is wrong, since when, and what control knew of the session
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import msgspec
import structlog

from gateway.messages import Quarantined, QuarantineRequest

from . import beneath, diffs, disks
from .errors import Missing, Unavailable
from .snapshots import OVERLAY, is_disk_as_saved, snapshots_in, sync

log = structlog.get_logger()

_REASON = "reason.json"
_HALF = ".new"


class Quarantine:
    def __init__(self, sessions: Path, directory: Path, images: Path) -> None:
        """`directory` lies on the file system of `sessions`, as a rule: then one rename sets a session aside."""
        self._sessions = sessions
        self._images = images
        self._directory = directory

    def _places(self, session: str) -> tuple[Path, Path]:
        """Returns where a session's files are, and where they are set aside. Raises VmmError."""
        return beneath.child(self._sessions, session), beneath.child(self._directory, session)

    def put(self, request: QuarantineRequest) -> Quarantined:
        """Sets a session's files aside, where that was not done yet. Nobody has any of them open. Raises OSError, Missing."""
        source, target = self._places(request.session)
        if not source.exists():
            return self._read(target)
        record = Quarantined(request.session, request.incarnation, request.image, request.reason, time.time())
        try:
            self._write(source / _REASON, record)
        except OSError as error:  # a full disk keeps nothing from being set aside
            log.error("quarantine.reason_not_written", session=request.session, reason=request.reason, error=str(error))
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700, exist_ok=True)
            sync([self._directory.parent])
        if target.exists():  # an earlier one of this name, which recovery did not take
            os.rename(target, target.with_name(f"{target.name}.{time.time_ns()}"))
        move(source, target)
        return self._read(target)

    def list(self) -> list[Quarantined]:
        """Returns what is set aside, the oldest first; a file that somebody put there is no session. Raises OSError."""
        if not self._directory.exists():
            return []
        found = [self._read(path) for path in self._directory.iterdir() if path.is_dir() and not path.name.endswith(_HALF)]
        return sorted(found, key=lambda one: one.at)

    def size(self, session: str) -> int:
        """Returns how many bytes of a session are set aside."""
        return disks.tree_bytes(self._places(session)[1])

    def recover(self, session: str) -> Quarantined:
        """Gives a session its files back, where its newest snapshot is whole. Raises Missing, Damaged, Unavailable, OSError."""
        target, source = self._places(session)
        if not source.exists() and target.exists():  # done, and the answer was lost
            return Quarantined(session, 0, "", "", 0.0, 0, _newest(target))
        record = self._read(source)
        if target.exists():
            raise Unavailable(f"session {session} has files of its own: what was set aside stays at {source}")
        if not record.snapshot:
            raise Missing(f"session {session} has no snapshot among its files: its disk is {source / OVERLAY}")
        if not (source / OVERLAY).exists():
            raise Missing(f"session {session} has no disk among its files in {source}")
        if record.image and not beneath.child(self._images, record.image).exists():
            raise Missing(f"image {record.image}, which session {session} was loaded over, is not in {self._images}")
        snapshot = source / f"snapshot-{record.snapshot}"
        diffs.verify_all(snapshot, diffs.read_manifest(snapshot))
        move(source, target)
        (target / _REASON).unlink(missing_ok=True)
        return record

    def release(self, session: str) -> None:
        """Removes what was set aside."""
        shutil.rmtree(self._places(session)[1], ignore_errors=True)

    def _read(self, path: Path) -> Quarantined:
        """What cannot be read is listed all the same. Raises Missing, OSError."""
        if not path.is_dir():
            raise Missing(f"session {path.name} has no files, here or set aside")
        try:
            record = msgspec.json.decode((path / _REASON).read_bytes(), type=Quarantined)
        except (OSError, ValueError) as error:
            record = Quarantined(path.name, 0, "", f"{path / _REASON} cannot be read: {error}", path.stat().st_mtime)
        record.session = path.name
        record.bytes = disks.tree_bytes(path)
        record.snapshot = _newest(path)
        record.is_disk_as_saved = is_disk_as_saved(path, record.snapshot)
        return record

    def _write(self, path: Path, record: Quarantined) -> None:
        """Durable when it returns. Raises OSError."""
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(record))
        sync([temporary])
        os.rename(temporary, path)
        sync([path.parent])


def move(source: Path, target: Path) -> None:
    """Moves by one rename; where the two lie on different file systems, a copy that is whole before the source goes. Raises OSError."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        half = target.with_name(f".{target.name}{_HALF}")  # no session's name: what is left of it goes with the next try
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(source, half, copy_function=_copy)
        sync([*half.rglob("*"), half])
        os.rename(half, target)
        sync([target.parent])
        shutil.rmtree(source, ignore_errors=True)
    sync([target.parent])  # before the old name goes for certain
    sync([source.parent])


def _copy(source: str, target: str) -> None:
    """A file with its holes."""
    disks.copy_overlay(Path(source), Path(target))


def _newest(directory: Path) -> int:
    return max((number for number, _ in snapshots_in(directory)), default=0)
