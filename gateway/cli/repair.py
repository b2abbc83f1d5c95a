"""doctor's second half: what a crash left behind, and its removal."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config import ConfigError, Settings
from gateway.sessions.model import Image, Session
from gateway.sessions.states import State
from gateway.sessions.store import SetAside, advice, readable
from vmm import leftovers, upgrades


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
    """What the store knows: ids of live sessions, keys of image versions, the rows that cannot be read, and those that can. `is_whole` is
    false where some of those that cannot are images', whose keys nobody knows."""

    sessions: set[str]
    images: set[str]
    set_aside: list[SetAside]
    live: list[Session]
    made: list[Image]
    aside: list[Session] = field(default_factory=list)  # that errors have ended, and that may come back

    @property
    def is_whole(self) -> bool:
        return not any(row.kind == "images" for row in self.set_aside)


def known(database: Path) -> Known:
    """Reads the store, also that of a service that runs. Raises ConfigError for one that cannot be read."""
    if not database.exists():
        return Known(set(), set(), [], [], [])
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
            found, set_aside = readable(connection, database)
    except sqlite3.Error as error:
        raise ConfigError(f"{database} cannot be read: {error}{advice(error)}") from error
    stored = [value for kind, _, value in found if kind == "sessions"]
    live = [value for value in stored if not value.state.is_ended]
    aside = [value for value in stored if value.is_aside and value.state is State.TERMINATED]
    made = [value for kind, _, value in found if kind == "images"]
    sessions = {one.id for one in live} | {row.key for row in set_aside if row.kind == "sessions"}
    return Known(sessions, {version.key for image in made for version in image.versions}, set_aside, live, made, aside)


def leftovers_of(settings: Settings, store: Known) -> list[leftovers.Leftover]:
    """Nothing while a service runs: it mends its own."""
    if is_served(settings):
        return []
    images = store.images if store.is_whole else {path.name for path in settings.images_dir.glob("*")}
    return leftovers.find(settings, store.sessions, images)


def strangers_of(settings: Settings, store: Known) -> list[tuple[str, bool, str]]:
    """Returns what doctor says of sleepers and images that the store does not know."""
    images = store.images if store.is_whole else {path.name for path in settings.images_dir.glob("*")}
    text = "the store does not know it: the next start sets a few of them aside, and refuses to go on with many"
    return [("stranger", False, f"{path}: {text}") for path in leftovers.strangers(settings, store.sessions, images)]


def missing_of(settings: Settings, store: Known) -> list[tuple[str, bool, str]]:
    """Returns what doctor says of directories and sleepers' files that the store knows and that are not there."""
    asleep = [one.id for one in store.live if one.state is State.SUSPENDED and one.archived is None]
    places = ((settings.sessions_dir, len(store.live), "microVMs"), (settings.images_dir, len(store.images), "image versions"))
    text = "is not there: its file system may not be mounted; else put it back (torpor restore)"
    found = [
        ("directory", False, f"{path}, where {count} {what} have their files, {text}")
        for path, count, what in places
        if count and not path.is_dir()
    ]  # fmt: skip
    if settings.sessions_dir.is_dir():
        lost = [settings.sessions_dir / name for name in asleep if not (settings.sessions_dir / name).is_dir()]
        found += [("sleeper", False, f"{path}, where a sleeping microVM has its files, {text}") for path in lost]
    return found


def away_of(settings: Settings, store: Known) -> list[tuple[str, bool, str]]:
    """Returns what doctor says of microVMs that errors have ended and of which nothing is in the quarantine: their files were not there to
    be set aside, or are archived."""
    rows = []
    for one in store.aside:
        if not (settings.root / "quarantine" / one.id).is_dir():
            files = settings.sessions_dir / one.id
            wants = "its archive is kept" if one.archived is not None else f"once {files} is back (a mount, a backup)"
            rows.append(("set aside", False, f"{one.id}: {one.reason}; torpor recover {one.id} brings it back: {wants}"))
    return rows


def upgrades_of(settings: Settings, store: Known) -> list[tuple[str, bool, str]]:
    """Returns what doctor says of images and sleepers that an update of the host has left behind. Raises OSError, VmmError."""
    return upgrades.report(settings, *named_of(store))


def named_of(store: Known) -> tuple[dict[str, str], dict[str, str]]:
    """Returns names by images' keys, and of sessions that sleep their images' keys."""
    names = {version.key: f"{image.name} {version.version}" for image in store.made for version in image.versions}
    return names, {session.id: session.image for session in store.live if session.state is State.SUSPENDED}


def old_versions(settings: Settings) -> dict[str, tuple[str, str]]:
    """Of images whose newest version that can be launched is older than a build would make it: by ARN, that version and what is old in it.
    Raises ConfigError, OSError, VmmError."""
    old = upgrades.old_images(settings)
    newest = {image.arn: image.latest_active for image in known(settings.control_dir / "torpor.db").made}
    return {arn: (one.version, old[one.key]) for arn, one in newest.items() if one is not None and one.key in old}
