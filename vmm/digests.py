"""What was made once per host is used only as it was made: each file and directory of the cache has its SHA-256 beside it (`NAME.sha256`).

It is written when the content has been made, with what that was made from. Each start looks again, and reads again what has changed on the
outside since the last look: a file's inode, size, mode, owner, or one of its times, of which the kernel alone sets the last one (ctime).
What an earlier version has made, or made again, has no digest: it gets one at the first look.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

_CHUNK = 1 << 20
SHOWN = 12  # digits of a digest in a line for users


class Changed(Exception):
    """A file that was made once per host is another one now."""


class _Recorded(msgspec.Struct, frozen=True):
    sha256: str
    outside: str
    made_of: str


def path_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def forget(target: Path) -> None:
    """Before it is made again. Raises OSError."""
    path_of(target).unlink(missing_ok=True)


def recorded(target: Path, made_of: str) -> str:
    """Returns the digest, empty where none is known."""
    known = _read(target)
    return known.sha256 if known is not None and known.made_of == made_of else ""


def check(target: Path, made_of: str, is_thorough: bool = False) -> None:
    """Looks whether it is what was recorded, and records what there is where nothing was. `is_thorough`: it is read in any case. Raises
    Changed, OSError."""
    known, outside = _read(target), _outside(target)
    if known is not None and known.made_of != made_of:
        known = None
    if known is not None and known.outside == outside and not is_thorough:
        return
    found = _content(target)
    if known is not None and known.sha256 != found:
        raise Changed(
            f"{target} is not what was made: its SHA-256 is {found[:SHOWN]}…, and was {known.sha256[:SHOWN]}…; find out who changed it, "
            f"then remove {target}.key, and `torpor assets` makes it again"
        )
    if known is None or known.outside != outside:
        _write(target, _Recorded(found, outside, made_of))


def _read(target: Path) -> _Recorded | None:
    with contextlib.suppress(OSError, ValueError):
        return msgspec.json.decode(path_of(target).read_bytes(), type=_Recorded)
    return None


def _write(target: Path, known: _Recorded) -> None:
    path = path_of(target)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(PermissionError):  # who is not root may look, and remembers nothing
        unfinished.write_bytes(msgspec.json.encode(known))
        unfinished.rename(path)


def _members(target: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """It, and all below it, by names."""
    yield "", target, target.lstat()
    if target.is_symlink() or not target.is_dir():
        return
    for directory, names, files in os.walk(target):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            yield str(path.relative_to(target)), path, path.lstat()


def _digest(target: Path, told: Callable[[Path, os.stat_result], str]) -> str:
    state = hashlib.sha256()
    for name, path, its in _members(target):
        state.update(f"{name}\0{its.st_mode:o} {its.st_uid} {its.st_gid} {told(path, its)}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def _outside(target: Path) -> str:
    return _digest(target, _seen)


def _seen(path: Path, its: os.stat_result) -> str:
    return "" if stat.S_ISDIR(its.st_mode) else f"{its.st_ino} {its.st_size} {its.st_mtime_ns} {its.st_ctime_ns}"


def _content(target: Path) -> str:
    """Of a file the SHA-256 that sha256sum(1) says; of a directory that of a list of its members."""
    return of_file(target) if stat.S_ISREG(target.lstat().st_mode) else _digest(target, _told)


def _told(path: Path, its: os.stat_result) -> str:
    if stat.S_ISREG(its.st_mode):
        return of_file(path)
    return os.readlink(path) if stat.S_ISLNK(its.st_mode) else str(its.st_rdev)


def of_file(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            state.update(data)
    return state.hexdigest()
