"""The embedded log store: groups and streams as CloudWatch Logs has them, one file of JSON lines a stream.

Default names follow the service (reference, 7): group /aws/lambda-microvms/<image>, stream YYYY/MM/DD[<version>]<microvmId>.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

_LINE_MAX_BYTES = 256 << 10  # CloudWatch's bound of one event
_STREAM_MAX_BYTES = 64 << 20  # then the older half goes: a guest must not fill the disk
_SAFE = ""
GROUP_PREFIX = "/aws/lambda-microvms/"


@dataclass(frozen=True)
class StreamFacts:
    """Times in milliseconds since the epoch."""

    first: int
    last: int
    stored_bytes: int


class LogEvent(msgspec.Struct):
    """One line of a stream: milliseconds since the epoch, and text without its end of line."""

    t: int
    m: str


def default_group(image: str) -> str:
    return GROUP_PREFIX + image


def default_stream(version: str, microvm: str, at: float) -> str:
    return f"{time.strftime('%Y/%m/%d', time.gmtime(at))}[{version}]{microvm}"


def build_stream(version: str, build: str) -> str:
    return f"build/{version}/{build}"


class LogStore:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed: set[tuple[str, str, str]] | None = None  # since `take_changed` was called first
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LogEvent).decode

    def _path(self, account: str, group: str, stream: str) -> Path:
        return self._group(account, group) / f"{quote(stream, safe=_SAFE)}.jsonl"

    def _group(self, account: str, group: str) -> Path:
        return self._directory / account / quote(group, safe=_SAFE)

    def append(self, account: str, group: str, stream: str, lines: list[str]) -> None:
        """Adds lines to a stream. Raises OSError when the disk is full; callers drop the lines then."""
        path = self._path(account, group, stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._changed is not None:
            self._changed.add((account, group, stream))
        now = int(time.time() * 1000)
        with path.open("ab") as file:
            file.write(b"".join(self._encode(LogEvent(now, line)) + b"\n" for line in lines))
            too_long = file.tell() > _STREAM_MAX_BYTES
        if too_long:
            kept = path.read_bytes()[-_STREAM_MAX_BYTES // 2 :]
            path.write_bytes(kept[kept.find(b"\n") + 1 :])

    def read(self, account: str, group: str, stream: str, offset: int = 0, limit: int = 10_000) -> tuple[list[LogEvent], int]:
        """Returns events from a byte offset on, and the offset after them. An unknown stream is empty."""
        events = []
        for _, event, end in itertools.islice(self._lines(account, group, stream, offset), limit):
            offset = end
            events.append(event)
        return events, offset

    def events(self, account: str, group: str, stream: str, offset: int) -> list[tuple[int, LogEvent]]:
        """Returns every event from a byte offset on, or from the next that begins after it, with its offset."""
        return [(start, event) for start, event, _ in self._lines(account, group, stream, offset)]

    def _lines(self, account: str, group: str, stream: str, offset: int) -> Iterator[tuple[int, LogEvent, int]]:
        try:
            with self._path(account, group, stream).open("rb") as file:
                if offset:
                    file.seek(offset - 1)
                    offset += len(file.readline()) - 1
                for line in file:
                    if not line.endswith(b"\n"):  # half written
                        return
                    yield offset, self._decode(line), offset + len(line)
                    offset += len(line)
        except (FileNotFoundError, msgspec.DecodeError):
            return

    def facts(self, account: str, group: str, stream: str) -> StreamFacts:
        """Returns the first and last event's time, and the stored bytes; zeros for a stream that is not there."""
        path = self._path(account, group, stream)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                first = self._decode(file.readline() or b'{"t":0,"m":""}')
                return StreamFacts(first.t, int(path.stat().st_mtime * 1000), size)
        except (OSError, msgspec.DecodeError):
            return StreamFacts(0, 0, 0)

    def names(self) -> list[tuple[str, str, str]]:
        """Returns (account, group, stream) of everything that is kept."""
        accounts = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        return [
            (account, group, stream) for account in accounts for group in self.groups(account) for stream in self.streams(account, group)
        ]

    def take_changed(self) -> set[tuple[str, str, str]]:
        """Returns the streams that were written to since this was last called; none at the first call."""
        changed, self._changed = self._changed, set()
        return changed or set()

    def drop_older(self, seconds: float) -> int:
        """Removes streams that nobody has written to for so long; how many."""
        old = [path for path in self._directory.glob("*/*/*.jsonl") if path.stat().st_mtime < time.time() - seconds]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def groups(self, account: str) -> list[str]:
        directory = self._directory / account
        return sorted(unquote(path.name) for path in directory.iterdir()) if directory.is_dir() else []

    def streams(self, account: str, group: str) -> list[str]:
        directory = self._group(account, group)
        if not directory.is_dir():
            return []
        paths = sorted(directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        return [unquote(path.name.removesuffix(".jsonl")) for path in paths]


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


# What a program writes whose system call was refused for want of a capability (strerror(3), EPERM).
_REFUSED = b"peration not permitted"
ADVICE = (
    'torpor: "Operation not permitted": this image has the default capabilities of a container. What needs more (mounts, network devices, '
    "FUSE, dockerd, kernel modules) works in an image that is created with additionalOsCapabilities ALL"
)


class LineWriter:
    """Cuts a byte stream into lines for one log stream.

    `is_limited` where the guest has not all capabilities: the first time that its application is refused something, one line says so.
    """

    def __init__(self, store: LogStore, account: str, group: str, stream: str, is_limited: bool = False) -> None:
        self._store = store
        self._advises = is_limited
        self._name = (account, group, stream)
        self._rest: dict[int, bytes] = {}
        self.lost_lines = 0

    def feed(self, channel: int, data: bytes) -> None:
        """Cuts each channel into lines of its own; they are stored together. An application's channels are 1 and more."""
        *lines, rest = (self._rest.get(channel, b"") + data).split(b"\n")
        if len(rest) > _LINE_MAX_BYTES:
            lines.append(rest)
            rest = b""
        self._rest[channel] = rest
        if self._advises and channel and any(_REFUSED in line for line in lines):
            lines.append(ADVICE.encode())
            self._advises = False
        if lines:
            self._write(lines)

    def flush(self) -> None:
        rest = [data for data in self._rest.values() if data]
        self._rest.clear()
        if rest:
            self._write(rest)

    def _write(self, lines: list[bytes]) -> None:
        texts = [_ESCAPES.sub("", line.decode("utf-8", "replace").rstrip("\r")) for line in lines]
        try:
            self._store.append(*self._name, texts)
        except OSError:
            self.lost_lines += len(texts)
