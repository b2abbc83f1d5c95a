"""Makes a build's context of an artifact. Run as a process of its own, without privileges: `python -m gateway.images.unpack ZIP TARGET …`.
It has control's user, and before it looks at the artifact gives up all but that and the target (gateway/confine.py).

A zip file is an untrusted program for its reader. What is safe comes out as it went in, whichever tool wrote it; what could leave
the tree, exhaust the host or be more than a file is refused, and the text says which entry it was. The context is written as a tar
archive, in which owners, modes, times and links are data: the builder unpacks it in its jail, and nothing here ever follows a link. Bytes
are counted while they are written, because a header's sizes are only claims. Prints one JSON object, {"code", "text", "walls"}; the code
is empty on success, and `walls` are those that stood.
"""

from __future__ import annotations

import calendar
import errno
import json
import lzma
import os
import re
import resource
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gateway.confine import confine

DOCKERFILE = "Dockerfile"
CONTEXT = "context.tar"
_FOLLOWED = (DOCKERFILE, ".dockerignore", f"{DOCKERFILE}.dockerignore")  # files that the builder itself opens
DOCKERFILE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16  # of an archive: below, its ratio says nothing
_NAME_MAX, _PATH_MAX, _DEPTH_MAX = 255, 1024, 64
_LINK_MAX, _LINKS_FOLLOWED = 4096, 40
_SHOWN_CHARACTERS = 80
_MS_DOS, _UNIX = 0, 3  # who made an entry (APPNOTE.TXT, 4.4.2)
_DOS_FOLDER = 0x10
_UTF8_FLAG = 0x800
_UNICODE_PATH, _TIMESTAMP = 0x7075, 0x5455  # extra fields
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")  # systemd's escapes, in names that Unix made
_BROKEN = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, lzma.LZMAError,
    EOFError, OverflowError, RuntimeError, ValueError,
)  # fmt: skip


class ArchiveError(Exception):
    """The archive is not acceptable; `code` is the build's (service reference, 4)."""

    def __init__(self, text: str, code: str = "ARCHIVE_INVALID") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Entry:
    info: zipfile.ZipInfo
    name: str  # as it is shown
    mode: int

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)


def decoded_name(info: zipfile.ZipInfo) -> str:
    """Returns the name as its writer meant it: UTF-8 by the flag or by the extra field of Info-ZIP, else by its looks, else code page 437.

    What of it is not UTF-8 in an archive that Unix made is kept as bytes, as Python keeps them in file names.
    """
    if info.flag_bits & _UTF8_FLAG:
        return info.orig_filename
    raw = info.orig_filename.encode("cp437")
    extra = extra_fields(info.extra).get(_UNICODE_PATH, b"")
    if extra[:1] == b"\1" and extra[1:5] == struct.pack("<I", zlib.crc32(raw)):
        return extra[5:].decode()
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return os.fsdecode(raw) if info.create_system == _UNIX else info.orig_filename


def extra_fields(extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    while len(extra) >= 4:
        identifier, size = struct.unpack_from("<HH", extra)
        fields.setdefault(identifier, extra[4 : 4 + size])
        extra = extra[4 + size :]
    return fields


def check_name(name: str) -> tuple[str, ...]:
    """Returns the parts of an entry's path below the root; none for the root. Raises ArchiveError for one that would leave it."""
    if "\0" in name:
        raise ArchiveError(f"entry {_shown(name)} has a NUL in its name")
    if name.startswith("/") or _DRIVE.match(name):
        raise ArchiveError(f"entry {_shown(name)} has an absolute path")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise ArchiveError(f"entry {_shown(name)} leaves the archive")
    if len(os.fsencode(name)) > _PATH_MAX or len(parts) > _DEPTH_MAX or any(len(os.fsencode(part)) > _NAME_MAX for part in parts):
        raise ArchiveError(f"entry {_shown(name)} has too long a name")
    return parts


def check_link(path: tuple[str, ...], target: str, name: str) -> None:
    """A link is data for the image, where an absolute target is the image's own. Raises ArchiveError for one that climbs out of it."""
    if not target or "\0" in target or len(os.fsencode(target)) > _LINK_MAX:
        raise ArchiveError(f"entry {name} is a link without a proper target")
    depth = 0 if target.startswith("/") else len(path) - 1
    for part in target.split("/"):
        depth += (part not in ("", ".")) - 2 * (part == "..")
        if depth < 0:
            raise ArchiveError(f"entry {name} is a link that leaves the archive: {_shown(target)}")


def separated(names: list[tuple[zipfile.ZipInfo, str]]) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    r"""Backslashes are separators where MS-DOS or Windows made the entry, and where no name of the archive has another separator.

    Some tools write `a\b` and claim to be Unix; there a backslash may also be part of a name, as in units of systemd.
    """
    windows = not any("/" in name for _, name in names)
    for info, name in names:
        means = "\\" in name and (info.create_system != _UNIX or (windows and not _ESCAPED.search(name)))
        yield info, name.replace("\\", "/") if means else name


def entries_of(infos: list[zipfile.ZipInfo]) -> dict[tuple[str, ...], Entry]:
    """Returns what the tree has, by path. Of a name that is there twice the last one counts, as for unzip. Raises ArchiveError."""
    found: dict[tuple[str, ...], Entry] = {}
    for info, name in separated([(info, decoded_name(info)) for info in infos]):
        path = check_name(name)
        entry = _entry(info, name)
        if not path and entry.kind != stat.S_IFDIR:
            raise ArchiveError(f"entry {entry.name} has no name")
        if path:
            found.pop(path, None)
            found[path] = entry
    for path, entry in found.items():
        for depth in range(1, len(path)):
            above = found.get(path[:depth])
            if above is not None and above.kind != stat.S_IFDIR:
                raise ArchiveError(f"entry {entry.name} uses a {'link' if above.kind == stat.S_IFLNK else 'file'} as a folder")
    return found


def _entry(info: zipfile.ZipInfo, name: str) -> Entry:
    mode, shown = info.external_attr >> 16, _shown(name)
    kind = stat.S_IFMT(mode)
    if info.flag_bits & 1:
        raise ArchiveError(f"entry {shown} is encrypted")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        raise ArchiveError(f"entry {shown} is a device or pipe: only files, folders and links are taken")
    if name.endswith("/") or kind == stat.S_IFDIR or (not kind and info.external_attr & _DOS_FOLDER):
        return Entry(info, shown, stat.S_IFDIR | (stat.S_IMODE(mode) & 0o777 or 0o755))
    if kind == stat.S_IFLNK:
        return Entry(info, shown, stat.S_IFLNK | 0o777)
    # Without a kind these bits are nobody's; and whoever wrote none at all did not mean a file that nobody may read.
    is_unix = (mode and info.create_system != _MS_DOS) or kind
    return Entry(info, shown, stat.S_IFREG | (stat.S_IMODE(mode) & 0o777 if is_unix else 0o644))


def unpack(archive: Path, target: Path, max_bytes: int, max_entries: int, max_ratio: int) -> None:
    """Writes the context below `target`, and its Dockerfile beside it. Raises ArchiveError."""
    packed = archive.stat().st_size
    try:
        if not zipfile.is_zipfile(archive) and not _begins_as_zip(archive):
            raise ArchiveError("the artifact is not a zip file")
        with zipfile.ZipFile(archive) as source:
            infos = source.infolist()
            if len(infos) > max_entries:
                raise ArchiveError(f"the artifact has {len(infos)} entries; {max_entries} are taken (images.unpacked_entries)")
            most = min(max_bytes, max(packed, _SMALL_BYTES) * max_ratio)
            claimed = sum(info.file_size for info in infos)
            if claimed > most:
                largest = max(infos, key=lambda info: info.file_size)
                raise ArchiveError(
                    f"the artifact's {packed} bytes claim to unpack to {claimed}, entry {_shown(largest.filename)} to {largest.file_size}: "
                    f"{most} are taken (images.unpacked_bytes, images.ratio)"
                )
            found = entries_of(infos)
            followed = {name: resolved(source, found, name) for name in _FOLLOWED}
            dockerfile = followed[DOCKERFILE]
            if dockerfile is None:
                raise ArchiveError(f"the artifact has no {DOCKERFILE} at its root", "ARCHIVE_DOCKERFILE_NOT_FOUND")
            if dockerfile.info.file_size > DOCKERFILE_BYTES:
                raise ArchiveError(f"entry {dockerfile.name} has {dockerfile.info.file_size} bytes; {DOCKERFILE_BYTES} are taken")
            _write_tree(source, found, target / CONTEXT, most)
            with source.open(dockerfile.info) as data:
                (target / DOCKERFILE).write_bytes(data.read())
    except UnicodeError as error:
        raise ArchiveError(f"an entry's name is not text: {error}") from error
    except _BROKEN as error:
        raise ArchiveError(f"the artifact cannot be read as a zip file: {error}") from error
    except OSError as error:
        if error.errno is None:  # bzip2's reader
            raise ArchiveError(f"the artifact cannot be read as a zip file: {error}") from error
        if error.errno != errno.EINVAL:  # a seek to where no file can have anything
            raise
        raise ArchiveError("the artifact cannot be read as a zip file: an offset is wrong") from error


def _begins_as_zip(archive: Path) -> bool:
    """What was cut short has no directory at its end, and yet its beginning."""
    with archive.open("rb") as file:
        return file.read(2) == b"PK"


def resolved(source: zipfile.ZipFile, found: dict[tuple[str, ...], Entry], name: str) -> Entry | None:
    """Returns the file that a name at the root leads to, by links of the archive alone: the builder opens it. Raises ArchiveError.

    It is walked as the kernel walks a path (path_resolution(7)): ".." is what a link before it led to, and not what stands before it.
    """
    path: tuple[str, ...] = ()
    rest, followed = [name], 0
    while rest:
        part = rest.pop(0)
        if part == "..":
            if not path:
                break
            path = path[:-1]
            continue
        if part in ("", "."):
            continue
        path = (*path, part)
        entry = found.get(path)
        if entry is None or entry.kind != stat.S_IFLNK:
            continue
        target, followed = _target(source, entry), followed + 1
        if target.startswith("/") or followed > _LINKS_FOLLOWED:
            break
        path, rest = path[:-1], [*target.split("/"), *rest]
    else:
        entry = found.get(path)
        if entry is None or entry.kind == stat.S_IFREG:
            return entry
    code = "ARCHIVE_DOCKERFILE_NOT_FOUND" if name == DOCKERFILE else "ARCHIVE_INVALID"
    raise ArchiveError(f"entry {name!r} leads to no file of the archive", code)


def _target(source: zipfile.ZipFile, entry: Entry) -> str:
    with source.open(entry.info) as data:
        return os.fsdecode(data.read(_LINK_MAX + 1))


def _write_tree(source: zipfile.ZipFile, found: dict[tuple[str, ...], Entry], target: Path, most: int) -> None:
    room = most
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as out:
        for path, entry in found.items():
            member = tarfile.TarInfo("/".join(path))
            member.mode, member.mtime = stat.S_IMODE(entry.mode), modified(entry.info)
            try:
                if entry.kind == stat.S_IFDIR:
                    member.type = tarfile.DIRTYPE
                    out.addfile(member)
                elif entry.kind == stat.S_IFLNK:
                    member.type, member.linkname = tarfile.SYMTYPE, _target(source, entry)
                    check_link(path, member.linkname, entry.name)
                    out.addfile(member)
                else:
                    room -= entry.info.file_size
                    member.size = entry.info.file_size
                    with source.open(entry.info) as data:
                        out.addfile(member, _Whole(data))
                        if room < 0 or data.read(1):
                            raise ArchiveError(f"entry {entry.name} unpacks to more than it claims")
            except _BROKEN as error:
                raise ArchiveError(f"entry {entry.name} cannot be read: {error}") from error
            except OSError as error:
                if error.errno is None:
                    raise ArchiveError(f"entry {entry.name} cannot be read: {error}") from error
                raise


class _Whole:
    """An entry's bytes for tarfile: one that ends early is broken, not short."""

    def __init__(self, data: IO[bytes]) -> None:
        self._data = data

    def read(self, size: int = -1, /) -> bytes:
        piece = self._data.read(size)
        if len(piece) < size:
            raise EOFError("it ends early")
        return piece


def modified(info: zipfile.ZipInfo) -> int:
    """By Info-ZIP's extra field, in seconds since 1970; else by the entry's date, whose zone nobody knows."""
    extra = extra_fields(info.extra).get(_TIMESTAMP, b"")
    if len(extra) >= 5 and extra[0] & 1:
        return int(struct.unpack_from("<i", extra, 1)[0])
    try:
        return calendar.timegm(info.date_time)
    except (OverflowError, ValueError):
        return 0


def _shown(name: str) -> str:
    return repr(name if len(name) < _SHOWN_CHARACTERS else f"{name[: _SHOWN_CHARACTERS - 3]}...")


def answer(archive: Path, target: Path, max_bytes: int, max_entries: int, max_ratio: int) -> dict[str, str]:
    """Unpacks, and returns what control is told of it: an error's code and text, empty where there is none."""
    try:
        unpack(archive, target, max_bytes, max_entries, max_ratio)
    except ArchiveError as error:
        return {"code": error.code, "text": str(error)}
    except OSError as error:
        return {"code": "DISK_STORAGE_FULL" if error.errno == errno.ENOSPC else "INTERNAL_PLATFORM_ERROR", "text": str(error)}
    return {"code": "", "text": ""}


def _main() -> None:
    archive, target, max_bytes, max_entries, max_ratio = sys.argv[1:]
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    # Of the context: its files, and what tar writes of each.
    most = int(max_bytes) + int(max_entries) * 8192
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    # Python's own files are read while it runs, too: of a zip's names' encoding, say.
    walls = confine([Path(archive), *(Path(one) for one in (*sys.path, "/usr", "/lib", "/lib64") if one)], [Path(target)])
    told = answer(Path(archive), Path(target), int(max_bytes), int(max_entries), int(max_ratio))
    print(json.dumps({**told, "walls": walls}))


if __name__ == "__main__":
    _main()
