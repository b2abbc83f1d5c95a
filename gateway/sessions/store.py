"""The store is SQLite with one writer, and durable before anything is acted on.

Everything is held in memory too; rows are what survives. What one turn of the loop changes is one transaction
(WAL, synchronous=FULL): a commit is waited for once, however many callers wait.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec
import structlog

from gateway.accounts.model import AccessKey, Account, Role

from .model import Connector, Image, Session

log = structlog.get_logger()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, state TEXT NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (arn TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, subject TEXT NOT NULL, event TEXT NOT NULL,
    old TEXT NOT NULL, new TEXT NOT NULL, incarnation INTEGER NOT NULL, detail TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_subject ON events (subject, number);
CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS room (filling BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS client_tokens (
    token TEXT PRIMARY KEY, at REAL NOT NULL, parameters TEXT NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID;
"""
# What has no table of its own: kind to type.
_RECORDS: dict[str, type[msgspec.Struct]] = {"accounts": Account, "keys": AccessKey, "roles": Role, "connectors": Connector}
_CLIENT_TOKENS_SECONDS = 24 * 3600  # our choice: the service says nothing
_EVENTS_KEPT = 100_000  # of all sessions and images together; some 10 MB
# Kept in the log and in the database, so that transitions can still be stored when the disk is full.
_ROOM_BYTES = 8 << 20


class StoreError(Exception):
    """The store could not be written: nothing was changed, nothing may be acted on."""


class EventRow(msgspec.Struct):
    """One row of the event table, which keeps the last of them: each that is added beyond takes the oldest one's place."""

    at: float
    subject: str
    event: str
    old: str
    new: str
    incarnation: int
    detail: str


class Store:
    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._pending: list[tuple[str, Sequence[Any]]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._meanwhile: list[Callable[[], None]] = []
        self._writer: asyncio.Task[None] | None = None
        self._db: aiosqlite.Connection | None = None
        self.sessions: dict[str, Session] = {}
        self._order: dict[str, list[tuple[float, str]]] = {}  # by account: sessions by their start
        self.images: dict[str, Image] = {}
        self.client_tokens: dict[str, tuple[str, str]] = {}
        self._token_times: dict[str, float] = {}  # in order: the oldest is first
        self._records: dict[str, dict[str, Any]] = {kind: {} for kind in _RECORDS}

    @property
    def accounts(self) -> dict[str, Account]:
        return self._records["accounts"]

    @property
    def keys(self) -> dict[str, AccessKey]:
        return self._records["keys"]

    @property
    def roles(self) -> dict[str, Role]:
        return self._records["roles"]

    @property
    def connectors(self) -> dict[str, Connector]:
        return self._records["connectors"]

    @property
    def db(self) -> aiosqlite.Connection:
        assert self._db is not None
        return self._db

    async def open(self) -> None:
        self._db = await aiosqlite.connect(self._path, isolation_level=None)
        await self.db.execute("PRAGMA journal_mode=WAL")
        await self.db.execute("PRAGMA synchronous=FULL")
        await self.db.executescript(_SCHEMA)
        await self._make_room()
        session, image = msgspec.msgpack.Decoder(Session), msgspec.msgpack.Decoder(Image)
        for (body,) in await self.db.execute_fetchall("SELECT body FROM sessions"):
            restored = session.decode(body)
            self.sessions[restored.id] = restored
            self._order.setdefault(restored.account, []).append((restored.started_at, restored.id))
        for order in self._order.values():
            order.sort()
        for (body,) in await self.db.execute_fetchall("SELECT body FROM images"):
            made = image.decode(body)
            self.images[made.arn] = made
        for kind, key, body in await self.db.execute_fetchall("SELECT kind, key, body FROM records"):
            self._records[kind][key] = msgspec.msgpack.decode(body, type=_RECORDS[kind])
        await self.db.execute("DELETE FROM client_tokens WHERE at < ?", (self._clock() - _CLIENT_TOKENS_SECONDS,))
        for token, at, parameters, reply in await self.db.execute_fetchall("SELECT * FROM client_tokens ORDER BY at"):
            self.client_tokens[token] = (parameters, reply)
            self._token_times[token] = at

    async def _make_room(self) -> None:
        """Grows both files by writing filler and freeing it: SQLite gives neither the log's length nor free pages back."""
        try:
            await self.db.execute("INSERT INTO room VALUES (zeroblob(?))", (_ROOM_BYTES,))
            await self.db.execute_fetchall("PRAGMA wal_checkpoint(RESTART)")
        except sqlite3.OperationalError as error:
            log.warning("store.no_room", path=str(self._path), error=str(error))
        await self.db.execute("DELETE FROM room")

    async def close(self) -> None:
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)
        await self.db.close()

    def put_session(self, session: Session) -> None:
        if session.id not in self.sessions:
            self.sessions[session.id] = session
            bisect.insort(self._order.setdefault(session.account, []), (session.started_at, session.id))
        self._add("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (session.id, session.state, msgspec.msgpack.encode(session)))

    def drop_session(self, session: Session) -> None:
        self.forget_session(session)
        self._add("DELETE FROM sessions WHERE id = ?", (session.id,))

    def forget_session(self, session: Session) -> None:
        """Removes from memory a session that could not be stored."""
        if self.sessions.pop(session.id, None) is not None:
            order = self._order[session.account]
            del order[bisect.bisect_left(order, (session.started_at, session.id))]

    def order(self, account: str) -> list[tuple[float, str]]:
        """Returns (started_at, id) of the account's sessions, in order."""
        return self._order.get(account, [])

    def sessions_of(self, account: str) -> Iterator[Session]:
        return (self.sessions[name] for _, name in self.order(account))

    def put_image(self, image: Image) -> None:
        self.images[image.arn] = image
        self._add("INSERT OR REPLACE INTO images VALUES (?, ?)", (image.arn, msgspec.msgpack.encode(image)))

    def drop_image(self, arn: str) -> None:
        self.images.pop(arn, None)
        self._add("DELETE FROM images WHERE arn = ?", (arn,))

    def put(self, kind: str, key: str, record: msgspec.Struct) -> None:
        """Puts one record of `accounts`, `keys`, `roles` or `connectors`."""
        self._records[kind][key] = record
        self._add("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, key, msgspec.msgpack.encode(record)))

    def drop(self, kind: str, key: str) -> None:
        self._records[kind].pop(key, None)
        self._add("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))

    def put_client_token(self, token: str, parameters: str, reply: str) -> None:
        """Keeps a token for a day; those that are older go."""
        now = self._clock()
        for old in list(itertools.takewhile(lambda known: self._token_times[known] < now - _CLIENT_TOKENS_SECONDS, self._token_times)):
            self.forget_client_token(old)
            self._add("DELETE FROM client_tokens WHERE token = ?", (old,))
        self.client_tokens[token] = (parameters, reply)
        self._token_times[token] = now
        self._add("INSERT OR REPLACE INTO client_tokens VALUES (?, ?, ?, ?)", (token, now, parameters, reply))

    def forget_client_token(self, token: str) -> None:
        """Removes from memory the token of a call that could not be stored."""
        self.client_tokens.pop(token, None)
        self._token_times.pop(token, None)

    def add_event(self, subject: str, event: str, old: str, new: str, incarnation: int = 0, detail: str = "") -> None:
        self._add(
            "INSERT INTO events (at, subject, event, old, new, incarnation, detail) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self._clock(), subject, event, old, new, incarnation, detail),
        )
        self._add("DELETE FROM events WHERE number <= last_insert_rowid() - ?", (_EVENTS_KEPT,))

    async def events(self, subject: str) -> list[EventRow]:
        rows = await self.db.execute_fetchall(
            "SELECT at, subject, event, old, new, incarnation, detail FROM events WHERE subject = ? ORDER BY number", (subject,)
        )
        return [EventRow(*row) for row in rows]

    async def ended(self, subject: str) -> str | None:
        """What the event table says of the end of what was once there under this name; None where it knows of none."""
        statement = "SELECT detail FROM events WHERE subject = ? AND event = 'deleted' ORDER BY number DESC LIMIT 1"
        rows = list(await self.db.execute_fetchall(statement, (subject,)))
        return str(rows[0][0]) if rows else None

    async def commit(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Returns when everything put before is on the disk. Raises StoreError. `meanwhile` is called while the disk is waited
        for: what it starts takes no processor from the commit."""
        if self._pending or self._waiters:
            await self.begin_commit(meanwhile)

    def begin_commit(self, meanwhile: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Begins the commit of what was put in this turn of the loop: in a later turn it may be under way already, in another caller's
        commit."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        if meanwhile is not None:
            self._meanwhile.append(meanwhile)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())
        return asyncio.shield(future)

    def _add(self, statement: str, values: Sequence[Any]) -> None:
        self._pending.append((statement, values))

    async def _write(self) -> None:
        while self._pending or self._waiters:
            batch, self._pending = self._pending, []
            waiters, self._waiters = self._waiters, []
            during, self._meanwhile = self._meanwhile, []
            try:
                await self.db._execute(self._transaction, batch, during, asyncio.get_running_loop())  # type: ignore[no-untyped-call]
            except Exception as error:
                # Nothing of it was written; who waits takes its change back, or makes it again.
                if not isinstance(error, sqlite3.Error):
                    log.exception("store.failed", path=str(self._path))
                for waiter in waiters:
                    waiter.set_exception(StoreError(f"{self._path}: {error}"))
                continue
            for waiter in waiters:
                waiter.set_result(None)

    def _transaction(
        self, batch: list[tuple[str, Sequence[Any]]], during: list[Callable[[], None]], loop: asyncio.AbstractEventLoop
    ) -> None:  # fmt: skip
        """Writes the whole batch, in one hop to the writer's thread."""
        connection = self.db._conn
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in batch:
                connection.execute(statement, values)
            for meanwhile in during:
                loop.call_soon_threadsafe(meanwhile)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has rolled back by itself where the disk is full
                connection.execute("ROLLBACK")
            raise
