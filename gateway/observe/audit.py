"""The audit trail: one line of JSON a call, allowed or refused, in CloudTrail's record format (CloudTrail record contents, 1.11).

Each account has a trail of its own, `<account>/audit.jsonl`, as CloudTrail keeps them apart: however much one calls, it washes out no
other's. Refusals of callers whom nobody knows are in `refused.jsonl`, which is small: anybody can send those. A record that the disk does
not take waits in memory, and is written when it can be; when too many wait, what was lost is itself a record. No call fails because of its
record.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

_FILE_BYTES, _FILES = 32 << 20, 8  # of each account
_NAME = "audit.jsonl"
_REFUSED_BYTES, _REFUSED_FILES = 8 << 20, 2
_WAITING_BYTES = 1 << 20  # of records that could not be written
_RECORD_BYTES = 64 << 10
_TEXT_CHARACTERS = 1000
_HIDDEN = "HIDDEN_DUE_TO_SECURITY_REASONS"
_TOKENS = frozenset({"clientToken", "ClientToken", "nextToken", "NextToken", "NextMarker", "Marker"})
# Calls on microVMs are data events, the rest are management events (service reference, 7).
_DATA = frozenset(
    {"RunMicrovm", "SuspendMicrovm", "ResumeMicrovm", "TerminateMicrovm", "CreateMicrovmAuthToken", "CreateMicrovmShellAuthToken"}
)
_LOST = "AuditRecordsLost"


def redacted(value: Any, hidden: Set[str]) -> Any:
    """Returns a copy without tokens and the members that are `hidden`; what is long is cut."""
    if isinstance(value, dict):
        return {name: _HIDDEN if (name in hidden or name in _TOKENS) and item else redacted(item, hidden) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, hidden) for item in value[:100]]
    return value[:_TEXT_CHARACTERS] if isinstance(value, str) else copy.copy(value)


def record(event: str, at: float, **parts: Any) -> dict[str, Any]:
    """One record. `parts` are CloudTrail's own members; those that are None stay, as CloudTrail has them."""
    is_data = event in _DATA
    return {
        "eventVersion": "1.11",
        "eventTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "eventName": event,
        "readOnly": event.startswith(("Get", "List", "Describe", "Filter")),
        "eventType": "AwsApiCall",
        "managementEvent": not is_data,
        "eventCategory": "Data" if is_data else "Management",
        **parts,
    }


def _line(made: dict[str, Any]) -> bytes:
    """Returns a record of bounded length: what is too long is left out, as CloudTrail does it."""
    line = json.dumps(redacted(made, frozenset()), separators=(",", ":"), default=str).encode()
    for name in ("requestParameters", "responseElements"):
        if len(line) > _RECORD_BYTES:
            made = made | {name: {"omitted": True, "originalSize": len(line)}}
            line = json.dumps(redacted(made, frozenset()), separators=(",", ":"), default=str).encode()
    return line + b"\n"


class Trail:
    """One file of records, and the older ones: a full `NAME` becomes NAME.1, and so on; the oldest goes when there are `files`.

    `made` is called with the number of records lost by the name of their call, and returns the record that says so.
    """

    def __init__(self, path: Path, file_bytes: int, files: int, made: Callable[[dict[str, int]], bytes]) -> None:
        self._path = path
        self._file_bytes, self._files = file_bytes, files
        self._made = made
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = 0
        self._lost: Counter[str] = Counter()
        self._trouble = ""
        self._is_torn = False  # the first that waits is the rest of one
        self._full: list[int] = []  # files that have another name by now, and are not synced
        self._is_synced = self._is_named = False
        self._file, self._bytes = -1, 0
        self._flush()

    def _open(self) -> None:
        """Raises OSError: a disk that is full keeps no service from starting, and is tried again with each record."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._bytes = os.fstat(self._file).st_size
        if self._bytes and os.pread(self._file, 1, self._bytes - 1) != b"\n":  # a power cut, or the end of a process on a full disk
            self._waiting.appendleft(("", b"\n"))
            self._waiting_bytes += 1

    def add(self, event: str, line: bytes) -> None:
        """Writes a record, or keeps it until it can be written."""
        self._put(event, line)
        self._flush()

    def lose(self, event: str) -> None:
        """Counts a record that could not be made; the next one that is written is followed by one that says so."""
        self._lost[event] += 1

    def _put(self, event: str, line: bytes) -> None:
        self._waiting.append((event, line))
        self._waiting_bytes += len(line)
        while self._waiting_bytes > _WAITING_BYTES:  # the first may be written in part: it stays
            name, old = self._waiting[1]
            del self._waiting[1]
            self._waiting_bytes -= len(old)
            self._lost[name] += 1

    def _flush(self) -> None:
        try:
            if self._file < 0:
                self._open()
            while self._waiting:
                event, line = self._waiting[0]
                if self._bytes + len(line) > self._file_bytes and not self._is_torn:
                    self._rotate()
                written = os.write(self._file, line)
                self._bytes += written
                self._waiting_bytes -= written
                self._is_synced = False
                self._is_torn = written < len(line)
                if self._is_torn:
                    self._waiting[0] = (event, line[written:])
                else:
                    self._waiting.popleft()
                if self._lost and not self._waiting:
                    lost, self._lost = self._lost, Counter()
                    self._put(_LOST, self._made(dict(lost)))
        except OSError as error:
            self._say("audit.waits", error)
        else:
            self._say("")

    def _say(self, trouble: str, error: OSError | None = None) -> None:
        """One line in the service's log for a trouble that lasts, and one for its end."""
        if trouble and trouble != self._trouble:
            log.error(trouble, path=str(self._path), error=str(error))
        elif not trouble and self._trouble:
            log.info("audit.goes_on", path=str(self._path))
        self._trouble = trouble

    def _rotate(self) -> None:
        """Each step may have been done by a try before that failed at a later one. Until there is a new file, the full one goes on being
        written, whatever its name is by then."""
        try:
            if self._is_current():
                # Up to the first number that is free, or else over the oldest one.
                free = next((number for number in range(1, self._files) if not self._numbered(number).exists()), self._files - 1)
                for number in range(free, 1, -1):
                    os.replace(self._numbered(number - 1), self._numbered(number))
                os.replace(self._path, self._numbered(1))
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._say("audit.not_rotated", error)
            return
        self._full.append(self._file)
        self._file = file
        self._bytes = os.fstat(file).st_size

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _is_current(self) -> bool:
        """Whether the file that is written still has its first name."""
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return False
        own = os.fstat(self._file)
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def sync(self) -> None:
        """Has what was written outlive a power cut. For a thread: it waits for the disk. Raises OSError."""
        if self._file < 0:
            return
        full, self._full = self._full, []
        for file in full:
            try:
                os.fsync(file)
            finally:
                os.close(file)
        if not self._is_synced or full:
            self._is_synced = True
            os.fsync(self._file)
            if full or not self._is_named:
                for path in (self._path.parent, self._path.parent.parent):  # that one had the directory's own name put into it
                    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    try:
                        os.fsync(directory)
                    finally:
                        os.close(directory)
                self._is_named = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sync()
        if self._file >= 0:
            os.close(self._file)


class AuditTrail:
    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._clock = clock
        self._refused = Trail(directory / "refused.jsonl", _REFUSED_BYTES, _REFUSED_FILES, self._lost)
        self._trails: dict[str, Trail] = {}

    def adopt(self, account: str) -> None:
        """Gives an account the trail that all had together, before each got one of its own. What cannot be moved stays: the next
        start tries again."""
        try:
            for path in self._directory.glob(f"{_NAME}*"):
                target = self._directory / account / path.name
                if not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    path.rename(target)
        except OSError as error:
            log.error("audit.not_adopted", path=str(self._directory), error=str(error))

    def write(self, event: str, account: str | None, **parts: Any) -> None:
        """Writes the record of a call; `account` is its caller's, where that is known. Raises nothing: the call was carried out."""
        trail = self._refused if account is None else self._trail(account)
        try:
            trail.add(event, _line(record(event, self._clock(), **parts)))
        except Exception:
            log.exception("audit.lost", call=event)
            trail.lose(event)

    def _trail(self, account: str) -> Trail:
        if account not in self._trails:
            self._trails[account] = Trail(self._directory / account / _NAME, _FILE_BYTES, _FILES, self._lost)
        return self._trails[account]

    def _lost(self, counts: dict[str, int]) -> bytes:
        return _line(record(_LOST, self._clock(), eventType="AwsServiceEvent", serviceEventDetails=counts))

    def sync(self) -> None:
        """Has what was written outlive a power cut; blocking. Raises OSError."""
        for trail in (self._refused, *list(self._trails.values())):
            trail.sync()

    def close(self) -> None:
        for trail in (self._refused, *self._trails.values()):
            trail.close()
