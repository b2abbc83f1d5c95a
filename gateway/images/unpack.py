"""Unpacks an artifact. Run as a process of its own, without privileges: `python -m gateway.images.unpack ZIP TARGET …`.

A zip file is an untrusted program for its reader: everything that a careful one must refuse is refused here, and bytes are
counted while they are written, because a header's sizes are only claims. Prints one JSON object, {"code", "text"}; the code
is empty on success.
"""

from __future__ import annotations

import errno
import json
import lzma
import os
import resource
import stat
import struct
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

DOCKERFILE = "Dockerfile"
_CHUNK = 1 << 20
_NAME_MAX, _PATH_MAX, _DEPTH_MAX = 255, 1024, 64
_LOCAL_HEADER = b"PK\x03\x04"
_BROKEN = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, lzma.LZMAError,
    EOFError, OverflowError, RuntimeError, ValueError,
)  # fmt: skip


class ArchiveError(Exception):
    """The archive is not acceptable; `code` is the build's (service reference, 4)."""

    def __init__(self, text: str, code: str = "ARCHIVE_INVALID") -> None:
        super().__init__(text)
        self.code = code


def check_name(name: str) -> PurePosixPath:
    """The entry's path below the target. Raises ArchiveError for one that would leave it or could be read two ways."""
    shown = name if len(name) < 80 else name[:77] + "..."
    if "\\" in name or "\0" in name or any(ord(c) < 32 for c in name):
        raise ArchiveError(f"entry {shown!r} has a character that no file name should have")
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        raise ArchiveError(f"entry {shown!r} has an absolute path")
    path = PurePosixPath(name)
    if ".." in path.parts or not path.parts:
        raise ArchiveError(f"entry {shown!r} leaves the archive")
    if len(name.encode()) > _PATH_MAX or len(path.parts) > _DEPTH_MAX or any(len(p.encode()) > _NAME_MAX for p in path.parts):
        raise ArchiveError(f"entry {shown!r} has too long a name")
    return path


def check_entry(info: zipfile.ZipInfo) -> None:
    mode = info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if info.flag_bits & 1:
        raise ArchiveError(f"entry {info.filename!r} is encrypted")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "a device or pipe"
        raise ArchiveError(f"entry {info.filename!r} is {what}: only files and folders are taken")


def unpack(archive: Path, target: Path, max_bytes: int, max_entries: int, max_ratio: int) -> None:
    """Writes the archive's files below `target`, which is empty. Raises ArchiveError."""
    packed = archive.stat().st_size
    with archive.open("rb") as file:
        if file.read(4) not in (_LOCAL_HEADER, b"PK\x05\x06"):
            raise ArchiveError("the artifact is not a zip file")
    try:
        with zipfile.ZipFile(archive) as source:
            entries = source.infolist()
            if len(entries) > max_entries:
                raise ArchiveError(f"the artifact has {len(entries)} entries; {max_entries} are taken")
            claimed = sum(info.file_size for info in entries)
            if claimed > max_bytes or claimed > max(packed, 1 << 16) * max_ratio:
                raise ArchiveError(f"the artifact's {packed} bytes claim to unpack to {claimed}: too many")
            _write_all(source, entries, target, min(max_bytes, max(packed, 1 << 16) * max_ratio))
    except UnicodeError as error:
        raise ArchiveError("an entry's name is not text") from error
    except _BROKEN as error:
        raise ArchiveError(f"the artifact cannot be read as a zip file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to where no file can have anything
            raise
        raise ArchiveError("the artifact cannot be read as a zip file: an offset is wrong") from error
    if not (target / DOCKERFILE).is_file():
        raise ArchiveError("the artifact has no Dockerfile at its root", "ARCHIVE_DOCKERFILE_NOT_FOUND")


def _write_all(source: zipfile.ZipFile, entries: list[zipfile.ZipInfo], target: Path, budget: int) -> None:
    seen: set[PurePosixPath] = set()
    for info in entries:
        path = check_name(info.filename)
        check_entry(info)
        if path in seen and not info.is_dir():
            raise ArchiveError(f"entry {info.filename!r} is there twice")
        seen.add(path)
        place = target / path
        try:
            place.mkdir(mode=0o755, parents=True, exist_ok=True) if info.is_dir() else place.parent.mkdir(
                mode=0o755, parents=True, exist_ok=True
            )
        except (FileExistsError, NotADirectoryError) as error:
            raise ArchiveError(f"entry {info.filename!r} uses a file as a folder") from error
        if not info.is_dir():
            budget = _write(source, info, place, budget)


def _write(source: zipfile.ZipFile, info: zipfile.ZipInfo, place: Path, budget: int) -> int:
    executable = (info.external_attr >> 16) & 0o100
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o755 if executable else 0o644)
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise ArchiveError(f"entry {info.filename!r} is there twice, or uses a file as a folder") from error
    with os.fdopen(descriptor, "wb") as out, source.open(info) as data:
        while chunk := data.read(_CHUNK):
            budget -= len(chunk)
            if budget < 0:
                raise ArchiveError(f"entry {info.filename!r} unpacks to more than it claims")
            out.write(chunk)
    return budget


def _main() -> None:
    archive, target, max_bytes, max_entries, max_ratio = sys.argv[1:]
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(max_bytes), int(max_bytes)))
    try:
        unpack(Path(archive), Path(target), int(max_bytes), int(max_entries), int(max_ratio))
        answer = {"code": "", "text": ""}
    except ArchiveError as error:
        answer = {"code": error.code, "text": str(error)}
    except OSError as error:
        answer = {"code": "DISK_STORAGE_FULL" if error.errno == 28 else "INTERNAL_PLATFORM_ERROR", "text": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
