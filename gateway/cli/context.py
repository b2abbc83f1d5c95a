"""What `torpor build DIR` sends: the directory as it is, in a zip file, without what its .dockerignore names."""

from __future__ import annotations

import os
import re
import stat
import struct
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

DOCKERFILE = "Dockerfile"
# In that order, as BuildKit looks for them.
_IGNORE_FILES = (f"{DOCKERFILE}.dockerignore", ".dockerignore")
_CHUNK = 1 << 20
_TIMESTAMP = 0x5455  # Info-ZIP's extra field of a time in seconds since 1970
_SECONDS = range(-(1 << 31), 1 << 31)
_DOS_YEARS = range(1980, 2108)
_UNIX = 3
_WILDCARD = re.compile(r"[*?\[\]\\]")


class ContextError(Exception):
    """The directory cannot be sent; the text says why."""


@dataclass(frozen=True)
class Pattern:
    """`lead` is what a path begins with that an exception may mean: its text, up to its first wildcard."""

    is_exception: bool
    expression: re.Pattern[str]
    lead: str


class Ignored:
    """The patterns of a .dockerignore, read and applied as Docker does (moby's patternmatcher): the last that matches a path decides.

    A pattern that matches a folder matches what is in it. One that could not have changed the answer for the folder was not tried there,
    and does not count below.
    """

    def __init__(self, text: str) -> None:
        self._patterns: list[Pattern] = []
        for line in text.removeprefix("\ufeff").split("\n"):
            pattern = line.strip()
            if not pattern or line.startswith("#"):
                continue
            is_exception = pattern.startswith("!")
            pattern = os.path.normpath(pattern.removeprefix("!").strip()).lstrip("/")
            if pattern in ("", "."):
                continue
            try:
                expression = re.compile(_expression(pattern), re.DOTALL)
            except re.error as error:
                raise ContextError(f".dockerignore: {line.strip()} is no pattern: {error}") from error
            self._patterns.append(Pattern(is_exception, expression, _WILDCARD.split(pattern, maxsplit=1)[0]))

    def match(self, path: str, above: Sequence[bool]) -> tuple[bool, list[bool]]:
        """Whether the path is ignored, and which patterns matched it; `above` are those that matched its folder, none at the root."""
        is_ignored, matched = False, []
        for at, pattern in enumerate(self._patterns):
            matches = bool(above) and above[at]
            if not matches and is_ignored is pattern.is_exception:
                matches = pattern.expression.fullmatch(path) is not None
            matched.append(matches)
            if matches:
                is_ignored = not pattern.is_exception
        return is_ignored, matched

    def may_spare(self, folder: str) -> bool:
        """Whether an exception may mean something in an ignored folder."""
        inside = f"{folder}/"
        return any(one.is_exception and (one.lead.startswith(inside) or inside.startswith(one.lead)) for one in self._patterns)

    def __contains__(self, path: str) -> bool:
        parts = path.split("/")
        is_ignored, above = False, list[bool]()
        for length in range(len(parts)):
            is_ignored, above = self.match("/".join(parts[: length + 1]), above)
        return is_ignored


def _expression(pattern: str) -> str:
    if pattern.startswith("**") and not _WILDCARD.search(pattern, 2):  # a suffix: of a path, or, behind a slash, of its parts
        return "(?:.*/)?" + re.escape(pattern[3:]) if pattern[2:3] == "/" else ".*" + re.escape(pattern[2:])
    out, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**", at):
            at += 2
            if pattern.startswith("/", at):
                at += 1
            any_folders = ".*" if at >= len(pattern) else "(?:.*/)?"
            out += any_folders if not out.endswith(any_folders) else ""  # twice is the same as once, and takes for ever
            continue
        if char == "[":
            end = pattern.find("]", at + 1)
            if end > 0:
                out += pattern[at : end + 1]
                at = end + 1
                continue
        if char == "\\" and at + 1 < len(pattern):
            at += 1
            out += re.escape(pattern[at])
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char))
        at += 1
    return out


def ignored_of(source: Path) -> Ignored:
    for name in _IGNORE_FILES:
        try:
            return Ignored((source / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeError) as error:
            raise ContextError(f"{source / name} cannot be read: {error}") from error
    return Ignored("")


def entries(source: Path, ignored: Ignored) -> Iterator[tuple[str, os.stat_result]]:
    """Returns paths of what is sent, in order, each folder before what is in it. The Dockerfile and the patterns are sent in any case; an
    ignored folder is, where something in it is."""
    yield from _entries(source, ignored, "", (), [])


def _entries(
    source: Path, ignored: Ignored, folder: str, above: Sequence[bool], unsent: list[tuple[str, os.stat_result]]
) -> Iterator[tuple[str, os.stat_result]]:
    """`unsent` are the ignored folders that lead here."""
    with os.scandir(source / folder) as found:
        names = sorted(found, key=lambda one: one.name)
    for one in names:
        path = f"{folder}/{one.name}" if folder else one.name
        is_ignored, matched = ignored.match(path, above)
        status = one.stat(follow_symlinks=False)
        if not is_ignored or path in (DOCKERFILE, *_IGNORE_FILES):
            yield from unsent
            unsent.clear()
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                yield from _entries(source, ignored, path, matched, unsent)
        elif stat.S_ISDIR(status.st_mode) and ignored.may_spare(path):
            unsent.append((path, status))
            yield from _entries(source, ignored, path, matched, unsent)
            if unsent:
                unsent.pop()


def pack(source: Path, out: IO[bytes]) -> list[str]:
    """Writes the zip file; returns the paths that no archive can have (sockets, pipes, devices). Raises ContextError."""
    if not (source / DOCKERFILE).is_file():
        raise ContextError(f"{source} has no {DOCKERFILE}")
    left: list[str] = []
    path = ""
    try:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_info(".", source.stat()), b"")  # says that slashes separate: a backslash is part of a name then
            for path, status in entries(source, ignored_of(source)):
                kind = stat.S_IFMT(status.st_mode)
                if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                    left.append(path)
                    continue
                info = _info(path, status)
                if kind == stat.S_IFLNK:
                    archive.writestr(info, os.fsencode(os.readlink(source / path)))
                elif kind == stat.S_IFDIR:
                    archive.writestr(info, b"")
                else:
                    with (source / path).open("rb") as data, archive.open(info, "w") as target:
                        while chunk := data.read(_CHUNK):
                            target.write(chunk)
    except UnicodeError as error:
        raise ContextError(f"{os.fsencode(path)!r} is not UTF-8: a zip file cannot have that name") from error
    except OSError as error:
        raise ContextError(f"{source / path} cannot be read: {error.strerror}") from error
    return left


def _info(path: str, status: os.stat_result) -> zipfile.ZipInfo:
    is_folder = stat.S_ISDIR(status.st_mode)
    when = time.gmtime(status.st_mtime)[:6]
    info = zipfile.ZipInfo(f"{path}/" if is_folder else path, when if when[0] in _DOS_YEARS else (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = _UNIX, (status.st_mode & 0xFFFF) << 16
    info.compress_type = zipfile.ZIP_DEFLATED if stat.S_ISREG(status.st_mode) else zipfile.ZIP_STORED
    info.file_size = 0 if is_folder else status.st_size
    if int(status.st_mtime) in _SECONDS:
        info.extra = struct.pack("<HHBi", _TIMESTAMP, 5, 1, int(status.st_mtime))
    return info
