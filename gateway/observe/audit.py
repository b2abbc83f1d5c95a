"""The audit trail: one line of JSON a call, allowed or refused, in CloudTrail's record format (CloudTrail record contents, 1.11)."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

_FILE_BYTES = 64 << 20
_FILES = 8
_HIDDEN = "HIDDEN_DUE_TO_SECURITY_REASONS"
_TOKENS = frozenset({"clientToken", "ClientToken", "nextToken", "NextToken", "NextMarker", "Marker"})
# Calls on microVMs are data events, the rest are management events (service reference, 7).
_DATA = frozenset(
    {"RunMicrovm", "SuspendMicrovm", "ResumeMicrovm", "TerminateMicrovm", "CreateMicrovmAuthToken", "CreateMicrovmShellAuthToken"}
)


def redacted(value: Any, hidden: Set[str]) -> Any:
    """A copy without tokens and the members that are `hidden`; what is long is cut."""
    if isinstance(value, dict):
        return {name: _HIDDEN if (name in hidden or name in _TOKENS) and item else redacted(item, hidden) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, hidden) for item in value[:100]]
    return value[:1000] if isinstance(value, str) else copy.copy(value)


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


class AuditTrail:
    """Appends to `audit.jsonl` in `directory`; a full file becomes audit.jsonl.1, the oldest goes."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / "audit.jsonl"
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)
        self._bytes = self._path.stat().st_size
        self._is_torn = False  # the last record is not complete: a full disk took a part of it

    def write(self, event: str, **parts: Any) -> None:
        """A record that cannot be written is counted in the service's log, and the call goes on."""
        line = json.dumps(record(event, self._clock(), **parts), separators=(",", ":"), default=str).encode() + b"\n"
        if self._bytes + len(line) > _FILE_BYTES:
            self._rotate()
        if self._is_torn:
            line = b"\n" + line
        try:
            written = self._file.write(line)
        except OSError as error:
            log.error("audit.lost", call=event, error=str(error))
            return
        self._bytes += written
        self._is_torn = written < len(line)
        if self._is_torn:
            log.error("audit.lost", call=event, error="written in part")

    def _rotate(self) -> None:
        """The full file stays open until the new one is: where there is no new one, it goes on being written."""
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            file = new.open("ab", buffering=0)
        except OSError as error:
            log.error("audit.not_rotated", error=str(error))
            return
        try:
            for number in range(_FILES - 1, 0, -1):
                old = self._path.with_name(f"{self._path.name}.{number}")
                if old.exists():
                    os.replace(old, self._path.with_name(f"{self._path.name}.{number + 1}"))
            os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
            os.replace(new, self._path)
        except OSError as error:
            log.error("audit.not_rotated", error=str(error))
            file.close()
            return
        self._file.close()
        self._file = file
        self._bytes = 0
        self._is_torn = False

    def close(self) -> None:
        self._file.close()
