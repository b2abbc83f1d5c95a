"""The egress audit: a line of JSON for each decision about a name or a connection of a microVM that reaches hosts by their names.

`ROOT/control/egress/<account>/<microVM>.jsonl` and one older file: bounded for each microVM, so that none washes out another's lines, and
in the number of lines a second. What could not be written or was too much is counted in the next line. Nothing fails because of its line.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from gateway.sessions.allowance import Allowance

log = structlog.get_logger()

ALLOWED, REFUSED, ENDED = "allowed", "refused", "ended"
_FILE_BYTES = 1 << 20  # of two files
_BURST, _RATE = 200, 20  # lines, and lines a second
_SAME_SECONDS, _SAME_KEPT = 60.0, 256  # a decision that is repeated is one line
_SHOWN = 255
_LINES = 2000  # read at once


class SessionAudit:
    def __init__(self, path: Path, clock: Callable[[], float], ticks: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._ticks = ticks
        self._lines = Allowance(_BURST, _RATE, ticks)
        self._told: dict[tuple[str, str, str], float] = {}
        self._untold = 0
        self._last = 0
        self._is_failing = False

    def name(self, name: str, reason: str, addresses: str) -> None:
        """About a question; without a reason it was answered."""
        now, key = self._ticks(), (name, reason, addresses)
        if now - self._told.get(key, -_SAME_SECONDS) < _SAME_SECONDS:
            return
        self._told.pop(key, None)
        while len(self._told) >= _SAME_KEPT:
            self._told.pop(next(iter(self._told)))
        self._told[key] = now
        self._write({"what": "name", "name": name, "address": addresses, "verdict": REFUSED if reason else ALLOWED, "reason": reason})

    def connection(self, name: str, address: str, port: int, verdict: str, reason: str, sent: int = 0, received: int = 0) -> None:
        """`sent` and `received` are bytes of the guest's, which an end has."""
        self._write({
            "what": "connection", "name": name, "address": address, "port": port, "verdict": verdict, "reason": reason,
            "sent": sent, "received": received,
        })  # fmt: skip

    def _write(self, parts: dict[str, Any]) -> None:
        if not self._lines.take():
            self._untold += 1
            return
        now = self._clock()
        self._last = max(int(now * 1e6), self._last + 1)  # by which a reader goes on
        time_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        line = {"time": time_text, "order": self._last, **parts, "name": parts["name"][:_SHOWN], "untold": self._untold}
        try:
            _append(self._path, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            self._untold += 1
            if not self._is_failing:
                log.error("egress_audit.not_written", path=str(self._path), error=str(error))
            self._is_failing = True
        else:
            self._untold, self._is_failing = 0, False


def _append(path: Path, line: bytes) -> None:
    """Raises OSError."""
    try:
        file = _open(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = _open(path)
    try:
        is_full = os.fstat(file).st_size + len(line) > _FILE_BYTES
        if not is_full:
            os.write(file, line)
    finally:
        os.close(file)
    if is_full:
        os.replace(path, _older(path))
        _append(path, line)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


class EgressAudit:
    def __init__(
        self, directory: Path, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._directory = directory
        self._clock, self._ticks = clock, ticks

    def of(self, account: str, session: str) -> SessionAudit:
        return SessionAudit(self._path(account, session), self._clock, self._ticks)

    def _path(self, account: str, session: str) -> Path:
        return self._directory / account / f"{session}.jsonl"

    def read(self, account: str, session: str, after: int) -> list[str]:
        """Returns the next lines behind the one of that order; blocking."""
        path, found = self._path(account, session), []
        for file in (_older(path), path):
            with contextlib.suppress(OSError):
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        if json.loads(line)["order"] > after:
                            found.append(line)
        return found[:_LINES]

    def has(self, account: str) -> bool:
        return (self._directory / account).exists()

    def drop_old(self, seconds: float, account_bytes: float) -> None:
        """Removes files that nothing was written to for so long, and of an account the oldest beyond its room; blocking."""
        for account in self._directory.glob("*/"):
            files = []
            for path in account.iterdir():
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    files.append((facts.st_mtime, facts.st_size, path))
            room = account_bytes
            for at, size, path in sorted(files, reverse=True):
                room -= size
                if room < 0 or self._clock() - at > seconds:
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                account.rmdir()  # an empty one
