"""The embedded log store: groups and streams as CloudWatch Logs has them, one file of JSON lines a stream.

Default names follow the service (reference, 7): group /aws/lambda-microvms/<image>, stream YYYY/MM/DD[<version>]<microvmId>.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

_LINE_MAX_BYTES = 256 << 10  # CloudWatch's bound of one event
_STREAM_MAX_BYTES = 64 << 20  # then the older half goes: a guest must not fill the disk
_SAFE = ""


class LogEvent(msgspec.Struct):
    """One line of a stream: milliseconds since the epoch, and text without its end of line."""

    t: int
    m: str


def default_group(image: str) -> str:
    return f"/aws/lambda-microvms/{image}"


def default_stream(version: str, microvm: str, at: float) -> str:
    return f"{time.strftime('%Y/%m/%d', time.gmtime(at))}[{version}]{microvm}"


def build_stream(version: str, build: str) -> str:
    return f"build/{version}/{build}"


class LogStore:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LogEvent).decode

    def _path(self, group: str, stream: str) -> Path:
        return self._directory / quote(group, safe=_SAFE) / f"{quote(stream, safe=_SAFE)}.jsonl"

    def append(self, group: str, stream: str, lines: list[str]) -> None:
        """Raises OSError when the disk is full; callers drop the lines then."""
        path = self._path(group, stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        now = int(time.time() * 1000)
        with path.open("ab") as file:
            file.write(b"".join(self._encode(LogEvent(now, line)) + b"\n" for line in lines))
            too_long = file.tell() > _STREAM_MAX_BYTES
        if too_long:
            kept = path.read_bytes()[-_STREAM_MAX_BYTES // 2 :]
            path.write_bytes(kept[kept.find(b"\n") + 1 :])

    def read(self, group: str, stream: str, offset: int = 0, limit: int = 10_000) -> tuple[list[LogEvent], int]:
        """Events from a byte offset on, and the offset after them. An unknown stream is empty."""
        events: list[LogEvent] = []
        try:
            with self._path(group, stream).open("rb") as file:
                file.seek(offset)
                for line in file:
                    if len(events) >= limit or not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    events.append(self._decode(line))
        except (FileNotFoundError, msgspec.DecodeError):
            pass
        return events, offset

    def groups(self) -> list[str]:
        if not self._directory.is_dir():
            return []
        return sorted(unquote(path.name) for path in self._directory.iterdir())

    def streams(self, group: str) -> list[str]:
        directory = self._directory / quote(group, safe=_SAFE)
        if not directory.is_dir():
            return []
        paths = sorted(directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        return [unquote(path.name.removesuffix(".jsonl")) for path in paths]


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LineWriter:
    """Cuts a byte stream into lines for one log stream."""

    def __init__(self, store: LogStore, group: str, stream: str) -> None:
        self._store = store
        self._group, self._stream = group, stream
        self._rest: dict[int, bytes] = {}
        self.lost_lines = 0

    def feed(self, channel: int, data: bytes) -> None:
        """Channels (standard output, standard error) are cut apart and stored together."""
        *lines, rest = (self._rest.get(channel, b"") + data).split(b"\n")
        if len(rest) > _LINE_MAX_BYTES:
            lines.append(rest)
            rest = b""
        self._rest[channel] = rest
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
            self._store.append(self._group, self._stream, texts)
        except OSError:
            self.lost_lines += len(texts)
