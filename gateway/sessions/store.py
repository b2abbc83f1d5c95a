"""The store is SQLite with one writer, and durable before anything is acted on.

Everything is held in memory too; rows are what survives. What one turn of the loop changes is one transaction
(WAL, synchronous=FULL): a commit is waited for once, however many callers wait. A row that cannot be read is set aside, with its
reason, and keeps nothing else from starting; each start tries it again.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from gateway.accounts.model import AccessKey, Account, Role
from gateway.config import ConfigError

from . import schema
from .database import Database, transaction
from .model import Connector, Image, Session

log = structlog.get_logger()

# What has no table of its own: kind to type.
_RECORDS: dict[str, type[msgspec.Struct]] = {"accounts": Account, "keys": AccessKey, "roles": Role, "connectors": Connector}
_TYPES: dict[str, type[msgspec.Struct]] = {"sessions": Session, "images": Image, **_RECORDS}
_CLIENT_TOKENS_SECONDS = 24 * 3600  # our choice: the service says nothing
_CLIENT_TOKENS_IN_MEMORY = 10_000  # the newest, some 1 KiB each: clients repeat a call within minutes. Of older ones the table is asked
_EVENTS_KEPT = 100_000  # of all sessions and images together; some 10 MB
_ADD_EVENT = "INSERT INTO events (at, subject, event, old, new, incarnation, detail) VALUES (?, ?, ?, ?, ?, ?, ?)"
_DELETE_TOKENS = "DELETE FROM client_tokens WHERE token IN (SELECT token FROM client_tokens WHERE at < ? LIMIT ?)"
# Numbers go up with time: the first rows are looked at, not the whole table.
_DELETE_EVENTS = "DELETE FROM events WHERE at < ? AND number IN (SELECT number FROM events ORDER BY number LIMIT ?)"
# The newest of each, where no row has its key now.
_BACK = (
    "SELECT kind, key, max(at), body FROM set_aside WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE kind = 'sessions' AND id = key) "
    "AND NOT EXISTS (SELECT 1 FROM images WHERE kind = 'images' AND arn = key) "
    "AND NOT EXISTS (SELECT 1 FROM records WHERE records.kind = set_aside.kind AND records.key = set_aside.key) GROUP BY kind, key"
)
_OPEN_SECONDS = 3600.0  # migrations of a large store
_CHECK_SECONDS = 5.0  # for a look at every page: some 0.1 s for each 30 MB that are in memory
_CHECK_STEPS = 10_000  # of SQLite's machine, between two looks at the clock
_PRUNED_AT_ONCE = 1000  # rows: commits wait behind them
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


class SetAside(msgspec.Struct, frozen=True):
    """A row that could not be read: of a session, an image or a record, whose files stay as they are. `at` is seconds since the epoch."""

    kind: str
    key: str
    at: float
    reason: str


def advice(error: Exception) -> str:
    """Returns what helps where the store's file is not what was written; the empty string where it may be."""
    is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    return ": restore it from a backup (torpor restore)" if is_damaged else ""


def _whose(path: Path) -> str:
    """Returns what helps where root has put a copy back; the empty string where the store's files are this user's to write."""
    with contextlib.suppress(OSError):
        for one in (path, *path.parent.glob(f"{path.name}-*")):
            if one.exists() and not os.access(one, os.R_OK | os.W_OK):
                return f": {one} is user {one.stat().st_uid}'s: chown it to {os.geteuid()}"
    return ""


def decoded(kind: str, body: bytes) -> Any:
    """Raises ValueError for a row that this version cannot read."""
    if kind not in _TYPES:
        raise ValueError(f"there is no kind {kind}")
    try:
        return msgspec.msgpack.decode(body, type=_TYPES[kind])
    except (msgspec.MsgspecError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error


def _changed(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> int:
    return connection.execute(statement, values).rowcount


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[str, str, bytes]]:
    yield from connection.execute("SELECT 'sessions', id, body FROM sessions")
    yield from connection.execute("SELECT 'images', arn, body FROM images")
    yield from connection.execute("SELECT kind, key, body FROM records")


def _insert(kind: str, key: str, value: Any) -> tuple[str, Sequence[Any]]:
    body = msgspec.msgpack.encode(value)
    if kind == "sessions":
        return "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (key, value.state, body)
    if kind == "images":
        return "INSERT OR REPLACE INTO images VALUES (?, ?)", (key, body)
    return "INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, key, body)


def _delete(kind: str, key: str) -> tuple[str, Sequence[Any]]:
    if kind == "sessions":
        return "DELETE FROM sessions WHERE id = ?", (key,)
    if kind == "images":
        return "DELETE FROM images WHERE arn = ?", (key,)
    return "DELETE FROM records WHERE kind = ? AND key = ?", (kind, key)


def readable(connection: sqlite3.Connection, path: Path) -> tuple[list[tuple[str, str, Any]], list[SetAside]]:
    """Returns what a store holds, as (kind, key, value), and the rows that cannot be read. Raises ConfigError, sqlite3.Error."""
    found, set_aside = [], []
    if schema.check(connection, path):
        set_aside = [SetAside(*row) for row in connection.execute("SELECT kind, key, at, reason FROM set_aside ORDER BY at, kind, key")]
    for kind, key, body in _rows(connection):
        try:
            found.append((kind, key, decoded(kind, body)))
        except ValueError as error:
            set_aside.append(SetAside(kind, key, time.time(), str(error)))
    return found, set_aside


def _sort_out(connection: sqlite3.Connection, now: float) -> None:
    """Moves rows that cannot be read to the table of those set aside, so that nothing that is put under their keys takes their place; those
    of before that can be read now come back."""
    moved: list[tuple[str, Sequence[Any]]] = []
    for kind, key, body in _rows(connection):
        try:
            decoded(kind, body)
        except ValueError as error:
            log.error("store.set_aside", kind=kind, key=key, error=str(error))
            moved.append(("INSERT INTO set_aside VALUES (?, ?, ?, ?, ?)", (kind, key, now, str(error), body)))
            moved.append(_delete(kind, key))
            moved.append((_ADD_EVENT, (now, key, "set_aside", "", "", 0, str(error))))
    for kind, key, at, body in connection.execute(_BACK).fetchall():
        with contextlib.suppress(ValueError):
            moved.append(_insert(kind, key, decoded(kind, body)))
            moved.append(("DELETE FROM set_aside WHERE kind = ? AND key = ? AND at = ?", (kind, key, at)))
            moved.append((_ADD_EVENT, (now, key, "recovered", "", "", 0, "")))
    if moved:
        with transaction(connection):
            for statement, values in moved:
                connection.execute(statement, values)


class Store:
    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._pending: list[tuple[str, Sequence[Any]]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._meanwhile: list[Callable[[], None]] = []
        self._writer: asyncio.Task[None] | None = None
        self.db = Database(path)
        self.sessions: dict[str, Session] = {}
        self._order: dict[str, list[tuple[float, str]]] = {}  # by account: sessions by their start
        self.images: dict[str, Image] = {}
        self.set_aside: list[SetAside] = []
        self.meta: dict[str, str] = {}  # facts about the store itself
        self.client_tokens: dict[str, tuple[float, str, str]] = {}  # the newest, by their time: the oldest of them is first
        self._has_older_tokens = False  # in the table
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

    async def open(self) -> None:
        """Raises ConfigError for a store that this version cannot open; it is not touched then."""
        try:
            await self.db.open()
            await self.db.run(self._prepare, seconds=_OPEN_SECONDS)
            found, self.set_aside = await self.db.run(readable, self._path, seconds=_OPEN_SECONDS)
            self.meta = dict(await self.db.rows("SELECT key, value FROM meta"))
            tokens = await self.db.rows("SELECT * FROM client_tokens ORDER BY at DESC LIMIT ?", (_CLIENT_TOKENS_IN_MEMORY + 1,))
        except sqlite3.Error as error:
            await self.db.close()
            raise ConfigError(f"{self._path} cannot be opened: {error}{advice(error) or _whose(self._path)}") from error
        except ConfigError:
            await self.db.close()
            raise
        for kind, key, value in found:
            if kind == "sessions":
                self.sessions[key] = value
                self._order.setdefault(value.account, []).append((value.started_at, key))
            elif kind == "images":
                self.images[key] = value
            else:
                self._records[kind][key] = value
        for order in self._order.values():
            order.sort()
        for token, at, parameters, reply in reversed(tokens[:_CLIENT_TOKENS_IN_MEMORY]):
            self.client_tokens[token] = (at, parameters, reply)
        self._has_older_tokens = len(tokens) > _CLIENT_TOKENS_IN_MEMORY

    def _prepare(self, connection: sqlite3.Connection) -> None:
        schema.check(connection, self._path)
        self._look_at_pages(connection)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        schema.migrate(connection, self._path)
        self._make_room(connection)
        try:
            _sort_out(connection, self._clock())
        except sqlite3.OperationalError as error:  # of a full disk: those rows stay where they are until the next start
            log.error("store.not_set_aside", path=str(self._path), error=str(error))

    def _look_at_pages(self, connection: sqlite3.Connection) -> None:
        """Of an index that is damaged nobody but the first commit would hear, and each after it fails too. What takes too long is left at
        that. Raises sqlite3.DatabaseError."""
        end = time.monotonic() + _CHECK_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > end, _CHECK_STEPS)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            log.warning("store.not_checked", path=str(self._path), seconds=_CHECK_SECONDS)
            return
        finally:
            connection.set_progress_handler(None, 0)
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({' '.join(found.split())})")

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """Grows both files by writing filler and freeing it: SQLite gives neither the log's length nor free pages back."""
        try:
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (_ROOM_BYTES,))
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.OperationalError as error:
            log.warning("store.no_room", path=str(self._path), error=str(error))
        connection.execute("DELETE FROM room")

    async def close(self) -> None:
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)
        await self.db.close()

    def put_session(self, session: Session) -> None:
        row = _insert("sessions", session.id, session)  # first: what cannot be written is not kept in memory either
        if session.id not in self.sessions:
            self.sessions[session.id] = session
            bisect.insort(self._order.setdefault(session.account, []), (session.started_at, session.id))
        self._pending.append(row)

    def drop_session(self, session: Session) -> None:
        self.forget_session(session)
        self._pending.append(_delete("sessions", session.id))

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
        row = _insert("images", image.arn, image)
        self.images[image.arn] = image
        self._pending.append(row)

    def drop_image(self, arn: str) -> None:
        self.images.pop(arn, None)
        self._pending.append(_delete("images", arn))

    def put(self, kind: str, key: str, record: msgspec.Struct) -> None:
        """Puts one record of `accounts`, `keys`, `roles` or `connectors`."""
        row = _insert(kind, key, record)
        self._records[kind][key] = record
        self._pending.append(row)

    def drop(self, kind: str, key: str) -> None:
        self._records[kind].pop(key, None)
        self._pending.append(_delete(kind, key))

    def put_meta(self, key: str, value: str) -> None:
        self.meta[key] = value
        self._add("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    async def client_token(self, token: str) -> tuple[str, str] | None:
        """Returns the digest of the parameters, and the reply, of the call that came with this token within the last day."""
        known = self.client_tokens.get(token)
        if known is None and self._has_older_tokens:
            rows = await self.db.rows("SELECT at, parameters, reply FROM client_tokens WHERE token = ?", (token,))
            known = rows[0] if rows else None
        return known[1:] if known is not None and known[0] >= self._clock() - _CLIENT_TOKENS_SECONDS else None

    def put_client_token(self, token: str, parameters: str, reply: str) -> None:
        """Keeps a token for a day. `parameters` is their digest."""
        now = self._clock()
        self.client_tokens.pop(token, None)
        self.client_tokens[token] = (now, parameters, reply)
        if len(self.client_tokens) > _CLIENT_TOKENS_IN_MEMORY:
            del self.client_tokens[next(iter(self.client_tokens))]
            self._has_older_tokens = True
        self._add("INSERT OR REPLACE INTO client_tokens VALUES (?, ?, ?, ?)", (token, now, parameters, reply))

    def forget_client_token(self, token: str) -> None:
        """Removes from memory the token of a call that could not be stored."""
        self.client_tokens.pop(token, None)

    def add_event(self, subject: str, event: str, old: str, new: str, incarnation: int = 0, detail: str = "") -> None:
        self._add(_ADD_EVENT, (self._clock(), subject, event, old, new, incarnation, detail))
        self._add("DELETE FROM events WHERE number <= last_insert_rowid() - ?", (_EVENTS_KEPT,))

    async def events(self, subject: str) -> list[EventRow]:
        statement = "SELECT at, subject, event, old, new, incarnation, detail FROM events WHERE subject = ? ORDER BY number"
        return [EventRow(*row) for row in await self.db.rows(statement, (subject,))]

    async def ended(self, subject: str) -> str | None:
        """Returns what the event table says of the end of what was once there under this name; None where it knows of none."""
        statement = "SELECT detail FROM events WHERE subject = ? AND event = 'deleted' ORDER BY number DESC LIMIT 1"
        rows = await self.db.rows(statement, (subject,))
        return str(rows[0][0]) if rows else None

    async def prune(self, events_seconds: float) -> int:
        """Removes client tokens older than a day, and events older than so many seconds; how many. Raises sqlite3.Error."""
        now = self._clock()
        for token in [token for token, (at, _, _) in self.client_tokens.items() if at < now - _CLIENT_TOKENS_SECONDS]:
            del self.client_tokens[token]
        removed = 0
        for statement, before in ((_DELETE_TOKENS, now - _CLIENT_TOKENS_SECONDS), (_DELETE_EVENTS, now - events_seconds)):
            while gone := await self.db.run(_changed, statement, (before, _PRUNED_AT_ONCE)):
                removed += gone
        ((tokens,),) = await self.db.rows("SELECT count(*) FROM client_tokens")
        self._has_older_tokens = tokens > len(self.client_tokens)
        return removed

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
                loop = asyncio.get_running_loop()
                await self.db.run(lambda connection: self._transaction(batch, during, loop, connection))  # noqa: B023
            except Exception as error:
                # Nothing of it was written; who waits takes its change back, or makes it again.
                if not isinstance(error, sqlite3.Error):
                    log.exception("store.failed", path=str(self._path))
                for waiter in waiters:
                    waiter.set_exception(StoreError(f"{self._path}: {error}{advice(error)}"))
                continue
            for waiter in waiters:
                waiter.set_result(None)

    def _transaction(
        self, batch: list[tuple[str, Sequence[Any]]], during: list[Callable[[], None]], loop: asyncio.AbstractEventLoop,
        connection: sqlite3.Connection,
    ) -> None:  # fmt: skip
        """Writes the whole batch, in one hop to the writer's thread."""
        with transaction(connection):
            for statement, values in batch:
                connection.execute(statement, values)
            for meanwhile in during:
                loop.call_soon_threadsafe(meanwhile)
