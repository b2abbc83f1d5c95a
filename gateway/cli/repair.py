"""doctor's second half: what a crash left behind, and its removal."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from gateway.config import ConfigError, Settings
from gateway.sessions.store import SetAside, readable
from vmm import leftovers


def is_served(settings: Settings) -> bool:
    """Whether a supervisor holds the instance's lock."""
    try:
        with (settings.runtime / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@dataclass(frozen=True)
class Known:
    """What the store knows: ids of live sessions, keys of image versions, and the rows that cannot be read. `is_whole` is false where some
    of those are images', whose keys nobody knows."""

    sessions: set[str]
    images: set[str]
    set_aside: list[SetAside]

    @property
    def is_whole(self) -> bool:
        return not any(row.kind == "images" for row in self.set_aside)


def known(database: Path) -> Known:
    """Reads the store, also that of a service that runs. Raises ConfigError for one that cannot be read."""
    if not database.exists():
        return Known(set(), set(), [])
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
            found, set_aside = readable(connection, database)
    except sqlite3.Error as error:
        raise ConfigError(f"{database} cannot be read: {error}") from error
    sessions = {value.id for kind, _, value in found if kind == "sessions" and not value.state.is_ended}
    images = {version.key for kind, _, value in found if kind == "images" for version in value.versions}
    return Known(sessions | {row.key for row in set_aside if row.kind == "sessions"}, images, set_aside)


def leftovers_of(settings: Settings, store: Known) -> list[leftovers.Leftover]:
    """Nothing while a service runs: it mends its own."""
    if is_served(settings):
        return []
    images = store.images if store.is_whole else {path.name for path in settings.images_dir.glob("*")}
    return leftovers.find(settings, store.sessions, images)
