"""What errors have ended lies in the quarantine until somebody brings it back, or until its time or the room for it is over.

A session's row stays for as long as its files may: it is TERMINATED, with the reason, and is all that brings it back under its id and
endpoint. Also where nothing is there now: a file system that was not mounted may be, by and by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from gateway.config import Quarantine as Settings
from gateway.messages import Quarantined

from .host import Host, RpcError, grown, patiently
from .lifecycle import Lifecycle
from .model import Session
from .states import Event, State
from .store import Store, StoreError

log = structlog.get_logger()

DAY_SECONDS = 86_400.0
_RECOVER_SECONDS = 660.0  # more than control waits for its host


class RecoverError(Exception):
    """A session cannot be brought back; the text says why, and what can be had."""


def patience(size: int) -> float:
    """Returns how long a recovery of so many bytes may take: each is compared with its checksum."""
    return grown(_RECOVER_SECONDS, size)


def leaves_at(one: Quarantined, settings: Settings) -> float:
    return one.at + settings.days * DAY_SECONDS


def leaving(found: list[Quarantined], settings: Settings, now: float) -> list[tuple[Quarantined, str]]:
    """Returns what has to go now, the oldest first, and why."""
    gone: list[tuple[Quarantined, str]] = []
    size = sum(one.bytes for one in found)
    for one in sorted(found, key=lambda one: one.at):
        if leaves_at(one, settings) <= now:
            gone.append((one, f"older than {settings.days:g} days (quarantine.days)"))
        elif size > settings.mib << 20:
            gone.append((one, f"more than {settings.mib} MiB are set aside (quarantine.mib)"))
        else:
            break
        size -= one.bytes
    return gone


class Quarantine:
    def __init__(
        self, settings: Settings, store: Store, host: Host, lifecycle: Lifecycle,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._store = store
        self._host = host
        self._lifecycle = lifecycle
        self._clock = clock
        self._told: set[str] = set()
        self._lock = asyncio.Lock()  # what is being brought back is not removed, nor brought back twice

    def _rows(self) -> list[Session]:
        return [session for session in self._store.sessions.values() if session.is_aside and session.state is State.TERMINATED]

    async def empty(self) -> None:
        """Removes what has to go and was said to go the time before; says a day before what will by its age. Raises RpcError, StoreError;
        what is left is looked at the next time."""
        async with self._lock:
            await self._empty()

    async def _empty(self) -> None:
        rows = self._rows()  # before the host is asked: what is set aside meanwhile is not missed then
        found = await self._host.quarantined()
        now = self._clock()
        due = leaving(found, self._settings, now)  # also all at once: for room, or by a clock that was set
        gone = [(one, why) for one, why in due if one.session in self._told]
        for one, why in gone:
            log.warning("quarantine.emptied", session=one.session, bytes=one.bytes, reason=one.reason, why=why)
            await self._host.release_quarantined(one.session)
        removed = {one.session for one, _ in gone}
        left = {one.session for one in found} - removed
        soon = {one.session for one, _ in due} | {one.session for one in found if leaves_at(one, self._settings) < now + DAY_SECONDS}
        for one in found:
            if one.session in left & soon and one.session not in self._told:
                self._told.add(one.session)
                log.warning("quarantine.leaves_soon", session=one.session, bytes=one.bytes, reason=one.reason)
        self._told &= left
        for session in rows:
            if session.id in removed or (session.id not in left and _is_old(session, self._settings, now)):
                await self._let_go(session)

    async def release(self, session: Session) -> None:
        """Removes what is set aside of a session, by its user's word: TerminateMicrovm once more. Raises RpcError, StoreError; it may be
        asked for again then."""
        async with self._lock:
            if session.state is State.TERMINATED and session.is_aside:
                log.warning("quarantine.released", session=session.id, reason=session.reason)
                await self._host.release_quarantined(session.id)
                await self._let_go(session)

    async def _let_go(self, session: Session) -> None:
        """Its row goes as every terminated session's does."""
        session.is_aside = False
        archiving = self._lifecycle.actions.archiving
        archiving.disown(session)
        self._store.put_session(session)
        try:
            await self._store.commit()
        except StoreError:
            session.is_aside = True
            raise
        archiving.tidy(session)
        self._lifecycle.timers.watch_purge(session)

    async def recover(self, name: str) -> Session:
        """Makes a session that was set aside SUSPENDED again, under its id and endpoint. Raises RecoverError, RpcError with what is still
        wrong with its files, StoreError."""
        async with self._lock:
            return await self._recover(name)

    async def _recover(self, name: str) -> Session:
        session = self._store.sessions.get(name)
        if session is None:
            raise RecoverError(f"the store knows no microVM {name}: its disk is what can be had (torpor recover {name} --disk FILE)")
        if session.state is not State.TERMINATED or not session.is_aside:
            raise RecoverError(f"{name} is {session.state.public}, and nothing of it is set aside")
        if session.archived is None:
            await self._bring_back(session)
        try:
            await self._lifecycle.fire(session, Event.RECOVERED, session.reason or "")
        except StoreError:
            await self._host.quarantine(session.id, session.incarnation, session.image, session.reason or "")
            raise
        self._lifecycle.actions.archiving.tidy(session)
        self._lifecycle.timers.watch_lifetime(session)
        self._lifecycle.rested(session)
        return session

    async def _bring_back(self, session: Session) -> None:
        found = next((one for one in await self._host.quarantined() if one.session == session.id), None)
        if found is not None and found.snapshot and found.snapshot != session.incarnation and not found.is_disk_as_saved:
            raise RecoverError(
                f"{session.id} ran on after its last snapshot, so its memory and its disk are of different times: its disk is what can be "
                f"had (torpor recover {session.id} --disk FILE)"
            )
        try:
            size = found.bytes if found is not None else session.snapshot_bytes
            back = await patiently(lambda: self._host.recover(session.id, size))  # also where it was done, and the answer was lost
            if back.snapshot:  # that of before, where its successor had not got as far as to write
                session.incarnation = back.snapshot
        except RpcError as error:
            if error.kind in ("Missing", "Damaged"):
                raise RecoverError(f"{error} (torpor recover {session.id} --disk FILE hands out the disk, where there is one)") from error
            raise


def _is_old(session: Session, settings: Settings, now: float) -> bool:
    return (session.terminated_at or now) + settings.days * DAY_SECONDS <= now
