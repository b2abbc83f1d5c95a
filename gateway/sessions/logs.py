"""The embedded log store: groups and streams as CloudWatch Logs has them, in files of JSON lines.

Default names follow the service (reference, 7): group /aws/lambda-microvms/<image>, stream YYYY/MM/DD[<version>]<microvmId>.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import msgspec
import structlog

from gateway.executors import Pool

from . import log_names

log = structlog.get_logger()

_STREAM_MAX_BYTES, _SEGMENT_BYTES = 64 << 20, 8 << 20
_WAITING_BYTES, _WAITING_IN_ALL_BYTES = 4 << 20, 64 << 20  # of a stream, of all
_BATCH_SECONDS, _AGAIN_SECONDS = 0.1, 1.0
_SECONDS = 300.0  # for one batch; when it stands, control is replaced
_TAILS = 4096  # streams whose last segment is known without a look at the directory
_SEGMENT = re.compile(r"(.+)\.([0-9]{16})\.jsonl")
_END = ord("\n")
GROUP_PREFIX = "/aws/lambda-microvms/"


Name = tuple[str, str, str]  # account, group, stream


@dataclass(frozen=True)
class StreamFacts:
    """Times in milliseconds since the epoch."""

    first: int
    last: int
    stored_bytes: int
    end: int  # the offset of what is written next


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


@dataclass(frozen=True)
class _Segment:
    """A file of a stream: `start` is the offset of its first byte in the stream, of which the segments before may be gone."""

    start: int
    size: int
    path: Path

    @property
    def end(self) -> int:
        return self.start + self.size


class _Waiting:
    """What of a stream is not written yet."""

    __slots__ = ("data", "dropped")

    def __init__(self) -> None:
        self.data = bytearray()
        self.dropped = 0  # lines, behind what `data` has


class LogStore:
    """Lines are taken into memory, and written in a thread by `flush`: every so often while `keep` runs, and before anything is read.

    A stream is a row of segments, each named by its stream (log_names.py) and its first offset. A stream's offsets only go up, so that a
    reader finds its place also when the oldest segments went meanwhile.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed: set[Name] | None = None  # since `take_changed` was called first
        self._waiting: dict[Name, _Waiting] = {}
        self._waiting_bytes = 0
        self._lock = threading.Lock()  # of what waits
        self._disk = threading.RLock()  # of the files
        self._tails: dict[Name, _Segment] = {}
        self._named: set[Path] = set()  # groups whose directories' names were synced
        self._torn: set[Name] = set()  # streams whose last line is not written whole, and waits
        self._wake: asyncio.Event | None = None
        self._threads = Pool("logs", 1, _SECONDS)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LogEvent).decode
        self.trouble = ""  # why the disk takes nothing
        self._name_segments()

    def _name_segments(self) -> None:
        """A stream was one file once: that is its first segment."""
        for path in self._directory.glob("*/*/*.jsonl"):
            if _SEGMENT.fullmatch(path.name) is None:
                group, stream = unquote(path.parent.name), unquote(path.name.removesuffix(".jsonl"))
                try:
                    log_names.write_down(path.parent, group, stream)
                    os.rename(path, path.with_name(f"{log_names.stream_file(stream)}{log_names.suffix(0)}"))
                except (OSError, ValueError) as error:  # it stays as it is
                    log.error("logs.not_renamed", path=str(path), error=str(error))

    def _group(self, account: str, group: str) -> Path:
        return self._directory / account / log_names.group_file(group)

    # ---- writing ----

    def append(self, account: str, group: str, stream: str, lines: list[str]) -> None:
        """Adds lines to a stream. Those beyond what may wait for the disk are dropped, and a line says how many."""
        name, now = (account, group, stream), int(time.time() * 1000)
        with self._lock:
            waiting = self._waiting.get(name) or self._waiting.setdefault(name, _Waiting())
            for text in lines:
                line = self._encode(LogEvent(now, text)) + b"\n"
                if len(waiting.data) + len(line) > _WAITING_BYTES or self._waiting_bytes + len(line) > _WAITING_IN_ALL_BYTES:
                    waiting.dropped += 1
                    continue
                self._say_dropped(waiting, now)
                self._take(waiting, line)
        if self._wake is not None:
            self._wake.set()

    def _take(self, waiting: _Waiting, line: bytes) -> None:
        waiting.data += line
        self._waiting_bytes += len(line)

    def _say_dropped(self, waiting: _Waiting, now: int) -> None:
        if waiting.dropped:
            text = dropped_line(waiting.dropped, "the disk did not take them in time")
            waiting.dropped = 0
            self._take(waiting, self._encode(LogEvent(now, text)) + b"\n")

    async def keep(self) -> None:
        """Writes what waits, for ever: some times a second, many lines at once."""
        self._wake = asyncio.Event()
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._threads.run(self.flush)
            except Exception as error:  # Overdue, NotStarted; and whatever it is, writing goes on
                log.error("logs.not_written", error=repr(error))
            if self._waiting:
                self._wake.set()
            await asyncio.sleep(_AGAIN_SECONDS if self.trouble else _BATCH_SECONDS)

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            await self._threads.run(self.flush)
        self._threads.close()

    def flush(self) -> None:
        """Writes what waits; blocking. What the disk does not take waits on, and `trouble` says why."""
        with self._disk:
            trouble = ""
            with self._lock:
                names = list(self._waiting)
            for name in names:
                with self._lock:
                    waiting = self._waiting[name]
                    if len(waiting.data) < _WAITING_BYTES:
                        self._say_dropped(waiting, int(time.time() * 1000))
                    data, waiting.data = waiting.data, bytearray()
                    self._waiting_bytes -= len(data)
                try:
                    self._write(name, data)
                except OSError as error:
                    trouble = str(error)
                except Exception as error:  # of this stream alone
                    log.exception("logs.lost", group=name[1], stream=name[2])
                    trouble = repr(error)
                    data.clear()
                with self._lock:
                    waiting.data[:0] = data
                    self._waiting_bytes += len(data)
                    if not waiting.data and not waiting.dropped:
                        del self._waiting[name]
                    if self._changed is not None:
                        self._changed.add(name)
            if trouble != self.trouble:
                log.error("logs.wait", error=trouble) if trouble else log.info("logs.go_on")
                self.trouble = trouble

    def _write(self, name: Name, data: bytearray) -> None:
        """Takes from `data` what was written: also where the last line was not written whole, which the rest of it follows then."""
        if not data:
            return
        tail = self._tails.pop(name, None) or self._open_tail(name)
        if tail.size >= _SEGMENT_BYTES and name not in self._torn:
            tail = _Segment(tail.end, 0, self._path(name, tail.end))
            self._truncate(name)
        tail.path.parent.mkdir(parents=True, exist_ok=True)
        log_names.write_down(tail.path.parent, name[1], name[2])
        file = os.open(tail.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = tail.size
        try:
            while data:
                written = os.write(file, data)
                self._torn.discard(name)
                if written < len(data) and data[written - 1] != _END:
                    self._torn.add(name)
                size += written
                del data[:written]
        finally:
            os.close(file)
            if len(self._tails) >= _TAILS:
                self._tails.clear()
            self._tails[name] = _Segment(tail.start, size, tail.path)

    def _open_tail(self, name: Name) -> _Segment:
        """The last segment, whose last line may have been cut off by the end of the process or a power cut: it is ended."""
        segments = self._segments(name)
        if not segments:
            return _Segment(0, 0, self._path(name, 0))
        tail = segments[-1]
        if tail.size and name not in self._torn:
            with tail.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
                    return _Segment(tail.start, tail.size + 1, tail.path)
        return tail

    def _path(self, name: Name, start: int) -> Path:
        account, group, stream = name
        return self._group(account, group) / f"{log_names.stream_file(stream)}{log_names.suffix(start)}"

    def _truncate(self, name: Name) -> None:
        """The oldest segments of a stream that is too long go: a guest must not fill the disk."""
        segments = self._segments(name)
        size = sum(segment.size for segment in segments) + _SEGMENT_BYTES
        for segment in segments:
            if size <= _STREAM_MAX_BYTES:
                return
            segment.path.unlink(missing_ok=True)
            size -= segment.size

    def sync(self, account: str, group: str, stream: str) -> None:
        """Has what was written of a stream outlive a power cut; blocking. Raises OSError."""
        paths = [segment.path for segment in self._segments((account, group, stream))[-2:]]
        group_directory = self._group(account, group)
        above = () if group_directory in self._named else (group_directory.parent, self._directory, self._directory.parent)
        for path in (*paths, group_directory, *above):
            with contextlib.suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        self._named.add(group_directory)

    # ---- reading: all of it blocks ----

    def _segments(self, name: Name) -> list[_Segment]:
        account, group, stream = name
        file = log_names.stream_file(stream)
        return self._by_file(self._group(account, group), file).get(file, [])

    def _by_stream(self, directory: Path) -> dict[str, list[_Segment]]:
        """Returns the segments of a group's streams, the oldest first."""
        found = ((log_names.stream_of(directory, file), segments) for file, segments in self._by_file(directory).items())
        return {stream: segments for stream, segments in found if stream is not None}

    def _by_file(self, directory: Path, only: str = "") -> dict[str, list[_Segment]]:
        """The same by their file names, of one stream or of all."""
        found: dict[str, list[_Segment]] = {}
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    match = _SEGMENT.fullmatch(entry.name) if entry.name.startswith(only) else None
                    if match is None or (only and match[1] != only):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        size = entry.stat().st_size
                        found.setdefault(match[1], []).append(_Segment(int(match[2]), size, Path(entry.path)))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        for segments in found.values():
            segments.sort(key=lambda segment: segment.start)
        return found

    def read(self, account: str, group: str, stream: str, offset: int = 0, limit: int = 10_000) -> tuple[list[LogEvent], int]:
        """Returns events from an offset on, and the offset after them. An unknown stream is empty."""
        events = []
        for _, event, end in itertools.islice(self._lines((account, group, stream), offset), limit):
            offset = end
            events.append(event)
        return events, offset

    def events(self, account: str, group: str, stream: str, offset: int) -> Iterator[tuple[int, LogEvent]]:
        """Yields every event from an offset on, or from the next that begins after it, with its offset."""
        return ((start, event) for start, event, _ in self._lines((account, group, stream), offset))

    def events_before(self, account: str, group: str, stream: str, offset: int) -> Iterator[tuple[int, LogEvent]]:
        """Yields every event before an offset, the newest first."""
        self.flush()
        for segment in reversed(self._segments((account, group, stream))):
            if segment.start < offset:
                yield from reversed([(start, event) for start, event, _ in self._in_segment(segment, 0) if start < offset])

    def _lines(self, name: Name, offset: int) -> Iterator[tuple[int, LogEvent, int]]:
        self.flush()
        for segment in self._segments(name):
            if segment.end > offset:
                yield from self._in_segment(segment, max(0, offset - segment.start))

    def _in_segment(self, segment: _Segment, at: int) -> Iterator[tuple[int, LogEvent, int]]:
        try:
            with segment.path.open("rb") as file:
                if at:
                    file.seek(at - 1)
                    at += len(file.readline()) - 1
                for line in file:
                    if not line.endswith(b"\n"):  # half written
                        return
                    with contextlib.suppress(ValueError):  # what a power cut left of a line
                        yield segment.start + at, self._decode(line), segment.start + at + len(line)
                    at += len(line)
        except FileNotFoundError:  # it went meanwhile
            return

    def facts(self, account: str, group: str, stream: str) -> StreamFacts:
        """Returns the first and last event's time, the stored bytes and the end; zeros for a stream that is not there."""
        self.flush()
        segments = self._segments((account, group, stream))
        if not segments:
            return StreamFacts(0, 0, 0, 0)
        first = next((event.t for segment in segments for _, event, _ in self._in_segment(segment, 0)), 0)
        last = segments[-1].path.stat().st_mtime if segments[-1].path.exists() else 0
        return StreamFacts(first, int(last * 1000), sum(segment.size for segment in segments), segments[-1].end)

    def names(self) -> list[Name]:
        """Returns (account, group, stream) of everything that is kept."""
        self.flush()
        accounts = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        return [
            (account, group, stream)
            for account in accounts
            for group in self.groups(account)
            for stream in self._by_stream(self._group(account, group))
        ]

    def take_changed(self) -> set[Name]:
        """Returns the streams that were written to since this was last called; none at the first call."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed or set()

    def groups(self, account: str) -> list[str]:
        self.flush()
        directory = self._directory / account
        found = [log_names.group_of(path) for path in directory.iterdir()] if directory.is_dir() else []
        return sorted(group for group in found if group is not None)

    def streams(self, account: str, group: str) -> list[str]:
        """Those written to last are last."""
        self.flush()
        found = self._by_stream(self._group(account, group))
        return sorted(found, key=lambda stream: (_written_at(found[stream]), stream))

    # ---- what goes ----

    def drop_old(self, seconds: float, account_bytes: float = math.inf, account_streams: float = math.inf) -> list[Name]:
        """Removes streams that nobody has written to for so long, then those of an account beyond so many bytes and so many streams, the
        one that is silent for longest first; returns their names. Blocking."""
        gone: list[Name] = []
        now = time.time()
        for account in sorted(path.name for path in self._directory.iterdir()) if self._directory.is_dir() else []:
            found = [
                (_written_at(segments), (account, group, stream), segments)
                for group in self.groups(account)
                for stream, segments in self._by_stream(self._group(account, group)).items()
            ]
            left = sum(segment.size for _, _, segments in found for segment in segments)
            for number, (at, name, segments) in enumerate(sorted(found, key=lambda one: one[:2])):
                if at >= now - seconds and left <= account_bytes and len(found) - number <= account_streams:
                    break
                left -= sum(segment.size for segment in segments)
                self._drop(name)
                gone.append(name)
        return gone

    def _drop(self, name: Name) -> None:
        with self._disk:
            self._tails.pop(name, None)
            self._torn.discard(name)
            for segment in self._segments(name):
                segment.path.unlink(missing_ok=True)
            directory = self._group(name[0], name[1])
            with contextlib.suppress(OSError):  # others are left in it
                log_names.forget_stream(directory, name[2])
                self._named.discard(directory)


def _written_at(segments: list[_Segment]) -> float:
    try:
        return segments[-1].path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def dropped_line(count: int, why: str) -> str:
    return f"torpor: {count} line{'s were' if count != 1 else ' was'} dropped here: {why}"
