"""Sends the embedded store's log events to a CloudWatch Logs endpoint too, in batches, in order, each at least once.

The store's files are the spool: what the endpoint has not taken yet is sent when it is back, also after a restart. How far each
stream was sent is one small file, written after what it says is true.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import msgspec
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from gateway import executors, files
from gateway.config import Settings

from .logs import LogEvent, LogStore

log = structlog.get_logger()

_PERIOD_SECONDS = 1.0
_AWAY_SECONDS = 10.0
# Bounds of PutLogEvents; 26 bytes are counted for each event beside its text.
_BATCH_EVENTS, _BATCH_BYTES, _EVENT_BYTES = 10_000, 1_000_000, 26
Name = tuple[str, str, str]  # account, group, stream


def default_client(settings: Settings) -> Any:
    """Makes boto3's client, with the credentials of its own chain (environment, profile)."""
    return boto3.client(
        "logs", region_name=settings.region, endpoint_url=settings.logs.endpoint,
        config=Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 2}),
    )  # fmt: skip


def _read(cursors: Path) -> dict[str, int]:
    """How far each stream was sent; nothing where that cannot be known, and then all of it is sent again."""
    try:
        return msgspec.json.decode(cursors.read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        log.error("logs.sent_again", path=str(cursors), error=str(error))
        return {}


class Shipper:
    def __init__(self, store: LogStore, cursors: Path, client: Callable[[], Any]) -> None:
        self._store = store
        self._path = cursors
        self._client = client
        self._sent = _read(cursors)
        self._made: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Ships for ever; while the endpoint is away, or refuses a stream, it is tried again every ten seconds."""
        waiting = set(self._store.names())
        while True:
            waiting |= self._store.take_changed()
            is_away = False
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
        key = "\0".join(name)
        events: list[LogEvent] = []
        size, after = 0, self._sent.get(key, 0)
        for start, event in self._store.events(*name, after):
            cost = len(event.m.encode()) + _EVENT_BYTES
            if len(events) >= _BATCH_EVENTS or size + cost > _BATCH_BYTES or (events and event.t - events[0].t >= 24 * 3_600_000):
                self._put(name, key, events, after)
                return False
            events.append(event)
            size, after = size + cost, start + 1
        if events:
            self._put(name, key, events, after)
        return True

    def _put(self, name: Name, key: str, events: list[LogEvent], after: int) -> None:
        _, group, stream = name
        client = self._client()
        if (group, stream) not in self._made:
            for make, arguments in (
                (client.create_log_group, {"logGroupName": group}),
                (client.create_log_stream, {"logGroupName": group, "logStreamName": stream}),
            ):
                with contextlib.suppress(client.exceptions.ResourceAlreadyExistsException):
                    make(**arguments)
            self._made.add((group, stream))
        ordered = sorted(events, key=lambda event: event.t)
        client.put_log_events(
            logGroupName=group, logStreamName=stream, logEvents=[{"timestamp": event.t, "message": event.m or " "} for event in ordered]
        )
        self._sent[key] = after
        files.write(self._path, msgspec.json.encode(self._sent), 0o644)
