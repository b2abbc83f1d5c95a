"""doctor's second half: what a crash left behind, and its removal."""

from __future__ import annotations

import fcntl
import sqlite3
from pathlib import Path

import msgspec

from gateway.config import Settings
from gateway.sessions.model import Image, Session
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


def known(database: Path) -> tuple[set[str], set[str]]:
    """Ids of live sessions and keys of image versions in the store. Raises sqlite3.Error for one that cannot be read."""
    if not database.exists():
        return set(), set()
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)
    try:
        sessions = [msgspec.msgpack.decode(body, type=Session) for (body,) in connection.execute("SELECT body FROM sessions")]
        images = [msgspec.msgpack.decode(body, type=Image) for (body,) in connection.execute("SELECT body FROM images")]
    finally:
        connection.close()
    return (
        {session.id for session in sessions if not session.state.is_ended},
        {version.key for image in images for version in image.versions},
    )


def leftovers_of(settings: Settings) -> list[leftovers.Leftover]:
    """Nothing while a service runs: it mends its own. Raises sqlite3.Error."""
    if is_served(settings):
        return []
    return leftovers.find(settings, *known(settings.control_dir / "torpor.db"))
