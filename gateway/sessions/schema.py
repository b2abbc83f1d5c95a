"""The store's tables, and how a store of an older version becomes one of this version.

`PRAGMA user_version` is the number of migrations that a store has had. Each is one transaction together with its number, so that a store
is of one version or the next, whatever ends the process. Migrations are never changed, only added: tests/unit/stores has a store as each
earlier version wrote it.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import structlog

from gateway.config import ConfigError

from .database import transaction

log = structlog.get_logger()


def _first(connection: sqlite3.Connection) -> None:
    """Schema 0 had the first six tables and no number. `meta` has facts about the store itself (which instance it belongs to),
    `set_aside` rows that could not be read."""
    for statement in (
        "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, state TEXT NOT NULL, body BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS images (arn TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, subject TEXT NOT NULL, "
        "event TEXT NOT NULL, old TEXT NOT NULL, new TEXT NOT NULL, incarnation INTEGER NOT NULL, detail TEXT NOT NULL)",
        "CREATE INDEX IF NOT EXISTS events_subject ON events (subject, number)",
        "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (kind, key)) "
        "WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS room (filling BLOB NOT NULL)",
        "CREATE TABLE IF NOT EXISTS client_tokens (token TEXT PRIMARY KEY, at REAL NOT NULL, parameters TEXT NOT NULL, "
        "reply TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE set_aside (kind TEXT NOT NULL, key TEXT NOT NULL, at REAL NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL, "
        "PRIMARY KEY (kind, key, at)) WITHOUT ROWID",
    ):
        connection.execute(statement)


def digest(parameters: bytes) -> str:
    """Returns what is kept of a call's parameters, to know them again."""
    return hashlib.sha256(parameters).hexdigest()


def _short_tokens(connection: sqlite3.Connection) -> None:
    """Of a client token's parameters, up to a MiB, a digest is enough to compare; those that are a day old are found by their age."""
    connection.create_function("torpor_digest", 1, lambda parameters: digest(parameters.encode()), deterministic=True)
    connection.execute("UPDATE client_tokens SET parameters = torpor_digest(parameters)")
    connection.execute("CREATE INDEX client_tokens_at ON client_tokens (at)")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first, _short_tokens)


def version_of(connection: sqlite3.Connection) -> int:
    with closing(connection.execute("PRAGMA user_version")) as rows:
        return int(rows.fetchone()[0])


def check(connection: sqlite3.Connection, path: Path) -> int:
    """Returns a store's version. Raises ConfigError for one that is newer than this code, which is not touched then."""
    version = version_of(connection)
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{path} is of a newer version of Torpor (schema {version}, this one knows {len(MIGRATIONS)}): run that version, or restore a "
            "backup that this one made"
        )
    return version


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Brings a store to this version. Raises ConfigError, sqlite3.Error; the migrations before the one that failed are done then."""
    version = check(connection, path)
    for number, migration in enumerate(MIGRATIONS[version:], version + 1):
        with transaction(connection):
            migration(connection)
            connection.execute(f"PRAGMA user_version = {number}")
        if version:
            log.info("store.migrated", path=str(path), schema=number)
