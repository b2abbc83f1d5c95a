"""A sleeping session's files as one compressed stream, and back: what is moved to the object store and fetched from it.

A tar of plain files in two levels (overlay, snapshot-<N>/…), compressed with zstd, and encrypted where the settings say so
(vmm/encryption.py). What comes back is taken only whole and only as
it was made: its checksum is compared before root unpacks it, and names that were never written are refused.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import zstandard

from . import diffs, encryption, sealing, seals, syscalls
from .encryption import ArchiveKeys
from .errors import Damaged
from .snapshots import OVERLAY, snapshots_in, sync, unpacked

_LEVEL = 3
_CHUNK = 1 << 20
_PLAIN = ArchiveKeys()
_NAME = re.compile(rf"{re.escape(OVERLAY)}|snapshot-\d{{1,12}}(/[a-z0-9.]{{1,40}})?")


def pack(
    session: Path, snapshot: Path, target: int, check: Callable[[], None] = lambda: None, keys: ArchiveKeys = _PLAIN
) -> tuple[int, str]:
    """Writes overlay and snapshot to the descriptor; the bytes written and their SHA-256. Raises VmmError, OSError, and what
    `check` raises to call it off."""
    account = diffs.read_manifest(snapshot, session.name).account if keys.are_wanted else ""
    with os.fdopen(os.dup(target), "wb") as file:
        hashed = _Hashed(file, check)
        with (
            encryption.writing(hashed, session.name, account, keys) as sealed,
            zstandard.ZstdCompressor(level=_LEVEL).stream_writer(cast(IO[bytes], sealed), closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|") as archive,
        ):
            archive.add(session / OVERLAY, OVERLAY)
            archive.add(snapshot, snapshot.name)
        file.flush()
        os.fsync(file.fileno())
    return hashed.size, hashed.state.hexdigest()


class _Hashed(io.RawIOBase):
    """Counts and hashes what passes."""

    def __init__(self, file: IO[bytes], check: Callable[[], None]) -> None:
        self._file = file
        self._check = check
        self.state = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self._check()
        view = memoryview(data)  # type: ignore[arg-type]
        self._file.write(view)
        self.state.update(view)
        self.size += view.nbytes
        return view.nbytes


def unpack(source: int, digest: str, session: Path, keys: ArchiveKeys = _PLAIN) -> None:
    """Puts a session's files back, all or none. Raises Damaged for a stream that is not what was packed, Refused where its key is not here,
    Unavailable, OSError."""
    with os.fdopen(os.dup(source), "rb") as file:
        state = hashlib.sha256()
        file.seek(0)
        while data := file.read(_CHUNK):
            state.update(data)
        if state.hexdigest() != digest:
            raise Damaged(f"the archive of session {session.name} is damaged: its SHA-256 is {state.hexdigest()}, not {digest}")
        file.seek(0)
        work = unpacked(session)
        work.mkdir(mode=0o755)
        try:
            packed = encryption.reading(file, session.name, keys)
            with (
                zstandard.ZstdDecompressor().stream_reader(packed, closefd=False) as plain,
                tarfile.open(fileobj=plain, mode="r|") as archive,
            ):
                for member in archive:
                    _take(archive, member, work)
            _check(work, session.name, digest)
            sync([work, *work.rglob("*")])
            if session.exists():  # by an answer that was lost
                syscalls.exchange(work, session)
            else:
                os.rename(work, session)
            sync([session.parent])  # before its copy in the object store goes
        except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
            raise Damaged(f"the archive of session {session.name} cannot be read: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check(work: Path, session: str, digest: str) -> None:
    """Of what was unpacked. One that was packed before there were seals gets its own now. Raises Damaged, Refused, Unavailable, OSError."""
    for _, snapshot in snapshots_in(work):
        if seals.held().archives.get(digest) == session:
            sealing.seal_snapshot(snapshot, session)
        diffs.read_manifest(snapshot, session)


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, work: Path) -> None:
    if not _NAME.fullmatch(member.name) or not (member.isreg() or member.isdir()):
        raise Damaged(f"the archive of session {work.name} has {member.name!r}, which no archive of ours has")
    target = work / member.name
    if member.isdir():
        target.mkdir()
        return
    data = archive.extractfile(member)
    assert data is not None
    with target.open("xb") as file:
        shutil.copyfileobj(data, file, _CHUNK)
    target.chmod(0o600)
