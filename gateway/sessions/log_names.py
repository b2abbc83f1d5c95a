"""File names of log groups and streams, of which each name has one, and no two have the same.

A name that fits into a file's is quoted. A longer one (CloudWatch's have up to 512 characters) is its digest behind `%~`, which begins no
quoted name, and stands in a file beside what it names: `%~` in a group's directory for the group, DIGEST.name there for a stream.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from urllib.parse import quote, unquote

from gateway import files

_NAME_MAX = 255  # bytes of a file's name (limits.h)
_LONG = "%~"
_GROUP_RECORD = _LONG


def suffix(start: int) -> str:
    """The end of a segment's file name."""
    return f".{start:016d}.jsonl"


_SUFFIX_BYTES = len(suffix(0))


def group_file(group: str) -> str:
    return _fitting(group, _NAME_MAX)


def stream_file(stream: str) -> str:
    """Without the suffix of a segment, for which it leaves room."""
    return _fitting(stream, _NAME_MAX - _SUFFIX_BYTES)


def _fitting(name: str, room: int) -> str:
    quoted = quote(name, safe="")
    if not quoted.strip("."):  # `.` and `..` would be others
        quoted = quoted.replace(".", "%2E")
    return quoted if len(quoted) <= room else _digest(name)


def _digest(name: str) -> str:
    return _LONG + hashlib.sha256(name.encode()).hexdigest()


def group_of(directory: Path) -> str | None:
    """Returns the name of a group by its directory; None where what stands beside it is gone."""
    return _name(directory.name, directory / _GROUP_RECORD)


def stream_of(directory: Path, file: str) -> str | None:
    """Returns the name of a stream by its file name in a group's directory."""
    return _name(file, directory / f"{file}.name")


def _name(file: str, record: Path) -> str | None:
    if not file.startswith(_LONG):
        return unquote(file)
    with contextlib.suppress(OSError, ValueError):
        name = record.read_bytes().decode()
        if _digest(name) == file:
            return name
    return None


def write_down(directory: Path, group: str, stream: str) -> None:
    """Has names that files' names do not tell stand in the group's directory. Raises OSError."""
    file = stream_file(stream)
    if group_of(directory) is None:
        files.write(directory / _GROUP_RECORD, group.encode(), 0o644)
    if stream_of(directory, file) is None:
        files.write(directory / f"{file}.name", stream.encode(), 0o644)


def forget_stream(directory: Path, stream: str) -> None:
    """Removes what stands beside a stream that is gone; the group's directory goes with the last one. Raises OSError where others are in
    it."""
    file = stream_file(stream)
    if file.startswith(_LONG):
        (directory / f"{file}.name").unlink(missing_ok=True)
    if [path.name for path in directory.iterdir()] == [_GROUP_RECORD]:
        (directory / _GROUP_RECORD).unlink()
    directory.rmdir()
