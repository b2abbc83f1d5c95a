"""The store and the disks know each other: an instance id in the store, in images/ and in sessions/.

A new, older or other store finds directories that it does not know, and a directory that is not mounted finds a store that knows it. None
of these is a reason to delete anything: a start that finds one says what it is, and has two ways on. `--adopt` takes all as it is;
`--quarantine` sets aside what the store does not know.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import structlog

from gateway.config import ConfigError, Settings
from gateway.messages import HostState, Marks

from .host import Host, RpcError
from .recovery import launches_of_nobody
from .states import State
from .store import Store

log = structlog.get_logger()

ADOPT, QUARANTINE = "adopt", "quarantine"
_FEW = 5
_SHARE = 10  # and no more than one of so many; one alone is always few
_UNKNOWN = "The store does not know it."


@dataclass(frozen=True)
class Directory:
    """What lies in images/ or sessions/: its instance id, how much the store knows there, what it does not know, what it misses, and
    whose files are of another incarnation than it knows."""

    path: Path
    what: str
    mark: str
    known: int
    strangers: list[str]
    missing: list[str]
    other: list[str]

    @property
    def has_many_strangers(self) -> bool:
        count = len(self.strangers)
        return count > _FEW or count > max(1, (self.known + count) // _SHARE)


@dataclass(frozen=True)
class Known:
    """What the store says of itself. `is_marked`: the directories were given its id. `is_new`: it knows no image and no session."""

    path: Path
    instance: str
    is_marked: bool
    is_new: bool


def objection(store: Known, directories: list[Directory]) -> str | None:
    """Returns why a store and directories are not taken to belong together, in one sentence; None where nothing says so."""
    for one in directories:
        if one.mark and store.instance and one.mark != store.instance:
            return f"{one.path} belongs to another instance ({one.mark}) than {store.path} ({store.instance})"
        if one.mark and not store.instance:
            return f"{one.path} belongs to an instance ({one.mark}) that {store.path} knows nothing of: it is new, or very old"
        if store.is_marked and not one.mark:
            return f"{one.path} has no instance id, and had one when {store.path} was last used: its file system may not be mounted"
        if store.is_new and one.strangers:
            return f"{store.path} is new, and {one.path} is not: it holds {_some(one.strangers, one.what)}"
        if one.has_many_strangers:
            return f"{one.path} holds {_some(one.strangers, one.what)} that {store.path} does not know"
        if len(one.missing) > _FEW:
            return f"{store.path} knows {_some(one.missing, one.what)} whose files are not in {one.path}"
        if len(one.other) > _FEW:
            return f"{one.path} holds files of {_some(one.other, one.what)} that are of other incarnations than {store.path} knows"
    return None


def _some(names: list[str], what: str) -> str:
    listed = ", ".join(sorted(names)[:3])
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({listed}{', …' if len(names) > 3 else ''})"


class Identity:
    def __init__(self, settings: Settings, store: Store, host: Host) -> None:
        self._settings = settings
        self._store = store
        self._host = host

    async def check(self, state: HostState) -> None:
        """Takes store and directories together, and sets the few aside that the store does not know. Raises ConfigError where they are
        not of one instance, and no way on was chosen; RpcError, StoreError."""
        meta, choice = self._store.meta, self._settings.strangers
        marks = await self._host.marks()
        path = self._settings.control_dir / "torpor.db"
        known = Known(path, meta.get("instance", ""), "marked" in meta, not self._store.sessions and not self._store.images)
        directories = [self._images(state, marks), self._sessions(state, marks)]
        why = objection(known, directories)
        if why is not None and choice not in (ADOPT, QUARANTINE):
            raise ConfigError(
                f"{why}. Nothing was changed. Put back what belongs together (a backup of the store, a mount), or go on with what is "
                "there: `torpor serve --adopt` leaves what the store does not know where it is, `torpor serve --quarantine` sets it aside"
            )
        await self._mark(known, marks, is_forced=why is not None)
        strangers = [(one, name) for one in directories for name in one.strangers]
        if why is not None:
            log.warning("identity.chosen", choice=choice, why=why, strangers=len(strangers))
        if choice == ADOPT:
            await self._adopt([name for _, name in strangers])
        else:
            for one, name in strangers:
                await self._set_aside(one, name, state)

    def _images(self, state: HostState, marks: Marks) -> Directory:
        wanted = {version.key for image in self._store.images.values() for version in image.versions}
        strangers = sorted(set(state.images) - wanted - self._adopted)
        if any(row.kind == "images" for row in self._store.set_aside):
            strangers = []  # which keys are an unread image's, nobody knows
        return Directory(self._settings.images_dir, "image", marks.images, len(wanted), strangers, [], [])

    def _sessions(self, state: HostState, marks: Marks) -> Directory:
        sessions = self._store.sessions
        here = (set(state.snapshots) | {one.session for one in state.sessions}) - launches_of_nobody(state)
        unread = {row.key for row in self._store.set_aside}
        asleep = [one for one in sessions.values() if one.state is State.SUSPENDED and one.archived is None]
        missing = [one.id for one in asleep if one.id not in state.snapshots]
        other = [one.id for one in asleep if state.snapshots.get(one.id, one.incarnation) != one.incarnation]
        strangers = sorted(here - set(sessions) - unread - self._adopted)
        return Directory(self._settings.sessions_dir, "microVM", marks.sessions, len(sessions), strangers, missing, other)

    @property
    def _adopted(self) -> set[str]:
        return set(json.loads(self._store.meta.get("adopted", "[]")))

    async def _mark(self, known: Known, marks: Marks, is_forced: bool) -> None:
        """The store is told first, the directories then: a start that dies in between finds a store that has not marked anything."""
        instance = known.instance or (marks.sessions if is_forced else "") or uuid.uuid4().hex
        if known.instance != instance:
            self._store.put_meta("instance", instance)
            await self._store.commit()
        if {marks.images, marks.sessions} != {instance}:
            await self._host.mark(instance)
        if not known.is_marked:
            self._store.put_meta("marked", "1")
            await self._store.commit()

    async def _adopt(self, names: list[str]) -> None:
        if names:
            self._store.put_meta("adopted", json.dumps(sorted(self._adopted | set(names))))
            await self._store.commit()

    async def _set_aside(self, where: Directory, name: str, state: HostState) -> None:
        log.warning("identity.stranger", what=where.what, name=name, directory=str(where.path))
        try:
            if where.what == "image":
                await self._host.quarantine_image(name, _UNKNOWN)
                return
            running = next((one for one in state.sessions if one.session == name and one.phase == "running"), None)
            if running is not None:
                with contextlib.suppress(RpcError):
                    await self._host.suspend(name, running.incarnation)
            incarnation = running.incarnation if running is not None else state.snapshots.get(name, 0)
            await self._host.quarantine(name, incarnation, "", _UNKNOWN)
        except RpcError as error:  # the next start finds it again
            log.error("orphan.left", name=name, error=str(error))
