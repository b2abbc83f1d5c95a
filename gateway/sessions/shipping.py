"""Sends the embedded store's log events to a CloudWatch Logs endpoint too, in batches, in order, each at least once.

The store's files are the spool: what the endpoint has not taken yet is sent when it is back, also after a restart. How far each
stream was sent is a row of a small database, written after what it says is true, and after what was sent is on the disk: a power cut must
not take lines back whose offsets count as sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
import msgspec
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from gateway import executors
from gateway.config import Settings

from .logs import LogEvent, LogStore, Name

log = structlog.get_logger()

_PERIOD_SECONDS = 1.0
_AWAY_SECONDS = 10.0
# Bounds of PutLogEvents; 26 bytes are counted for each event beside its text.
_BATCH_EVENTS, _BATCH_BYTES, _EVENT_BYTES = 10_000, 1_000_000, 26
_PRUNE_SECONDS = 3600.0
_MADE = 10_000  # streams that are known to be at the endpoint


def default_client(settings: Settings) -> Any:
    """Makes boto3's client, with the credentials of its own chain (environment, profile)."""
    return boto3.client(
        "logs", region_name=settings.region, endpoint_url=settings.logs.endpoint,
        config=Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 2}),
    )  # fmt: skip


class Cursors:
    """How far each stream was sent. Where that cannot be known, all of it is sent again."""

    def __init__(self, path: Path) -> None:
        """`path` with the suffix .json is where a service of before kept them. Raises sqlite3.OperationalError, OSError."""
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # of the disk, and not of what is in the file
                raise
            log.error("logs.sent_again", path=str(path), error=str(error))
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open(path)
        self._move(path.with_suffix(".json"))

    def _open(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS sent (stream TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID")
        return db

    def _move(self, old: Path) -> None:
        try:
            sent = msgspec.json.decode(old.read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            return
        except ValueError as error:
            log.error("logs.sent_again", path=str(old), error=str(error))
            sent = {}
        self._db.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?)", sent.items())
        old.unlink()

    def get(self, name: Name) -> int:
        row = self._db.execute("SELECT offset FROM sent WHERE stream = ?", ("\0".join(name),)).fetchone()
        return row[0] if row is not None else 0

    def put(self, name: Name, offset: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO sent VALUES (?, ?)", ("\0".join(name), offset))

    def keep(self, names: Iterable[Name]) -> None:
        """Removes all but these."""
        kept = {"\0".join(name) for name in names}
        gone = [stream for (stream,) in self._db.execute("SELECT stream FROM sent") if stream not in kept]
        self._db.executemany("DELETE FROM sent WHERE stream = ?", [(stream,) for stream in gone])

    def close(self) -> None:
        self._db.close()


class Shipper:
    def __init__(self, store: LogStore, cursors: Path, client: Callable[[], Any]) -> None:
        self._store = store
        self._client = client
        self._path = cursors
        self._opened: Cursors | None = None
        self._made: OrderedDict[tuple[str, str], None] = OrderedDict()

    @property
    def _sent(self) -> Cursors:
        """Raises sqlite3.OperationalError, OSError: it is opened again by whoever asks next."""
        if self._opened is None:
            self._opened = Cursors(self._path)
        return self._opened

    async def run(self) -> None:
        """Ships for ever; while the endpoint is away, or refuses a stream, it is tried again every ten seconds."""
        self._store.take_changed()
        waiting: set[Name] = set()
        pruned_at = -math.inf
        while True:
            is_away = False
            if time.monotonic() - pruned_at > _PRUNE_SECONDS:
                try:
                    waiting |= set(await executors.BULK.run(self.prune))
                    pruned_at = time.monotonic()
                except Exception as error:  # it is tried again
                    log.warning("logs.not_sent", error=str(error))
                    is_away = True
            waiting |= self._store.take_changed()
            for name in sorted(waiting):
                try:
                    if await executors.BULK.run(self.ship, name):
                        waiting.discard(name)
                except BotoCoreError as error:
                    log.warning("logs.not_sent", group=name[1], stream=name[2], error=str(error))
                    is_away = True
                    break
                except Exception as error:  # of this stream alone: it is refused, or how far it was sent cannot be written
                    log.warning("logs.not_sent", group=name[1], stream=name[2], error=str(error))
                    is_away = True
            await asyncio.sleep(_AWAY_SECONDS if is_away else _PERIOD_SECONDS)

    def ship(self, name: Name) -> bool:
        """Sends one batch; True when nothing is left of the stream. Blocking. Raises BotoCoreError, ClientError."""
        events: list[LogEvent] = []
        size, after = 0, self._sent.get(name)
        if after > self._store.facts(*name).end:
            after = 0  # another stream of this name, or one whose end a power cut took
        for start, event in self._store.events(*name, after):
            cost = len(event.m.encode()) + _EVENT_BYTES
            if len(events) >= _BATCH_EVENTS or size + cost > _BATCH_BYTES or (events and event.t - events[0].t >= 24 * 3_600_000):
                self._put(name, events, after)
                return False
            events.append(event)
            size, after = size + cost, start + 1
        if events:
            self._put(name, events, after)
        return True

    def prune(self) -> list[Name]:
        """Forgets streams that are there no more; returns those that are. Blocking. Raises OSError, sqlite3.OperationalError."""
        names = self._store.names()
        self._sent.keep(names)
        return names

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _put(self, name: Name, events: list[LogEvent], after: int) -> None:
        _, group, stream = name
        client = self._client()
        if (group, stream) not in self._made:
            for make, arguments in (
                (client.create_log_group, {"logGroupName": group}),
                (client.create_log_stream, {"logGroupName": group, "logStreamName": stream}),
            ):
                with contextlib.suppress(client.exceptions.ResourceAlreadyExistsException):
                    make(**arguments)
            self._made[group, stream] = None
            if len(self._made) > _MADE:
                self._made.popitem(last=False)
        ordered = sorted(events, key=lambda event: event.t)
        client.put_log_events(
            logGroupName=group, logStreamName=stream, logEvents=[{"timestamp": event.t, "message": event.m or " "} for event in ordered]
        )
        self._store.sync(*name)
        self._sent.put(name, after)
