"""Sleeping sessions on their way to the object store and back.

The order keeps a session whole at every instant: its archive is complete in the store and named in its row before its files go, and they
are back before the row forgets the archive. What fails keeps the session as it is.

No archive is left behind either: `Session.litter` has the key of each that may be in the store and is nobody's, from before its upload
until it is named in the row, and from when the row forgets it until it is removed, which is tried until it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto

import structlog

from gateway.observe.steps import Steps
from gateway.tasks import Tasks

from .archive import Archive, ArchiveError
from .host import Host, RpcError, patiently
from .model import Session
from .routes import Routes
from .states import State
from .store import Store, StoreError

log = structlog.get_logger()

_AT_REST = (State.RUNNING, State.SUSPENDED, State.TERMINATED)
_AT_ONCE = 1  # of the two that do bulk work: a resume from the archive finds the other one


class Moved(Enum):
    """What became of a session that was to be archived."""

    DONE = auto()  # or somebody woke or ended it
    LATER = auto()  # clients hold parked streams of it
    FAILED = auto()


class Archiving:
    """`later(session, failures)` has `clean` called again after a while; `is_moving` says whether a transition is being stored."""

    def __init__(
        self, store: Store, host: Host, routes: Routes, archive: Archive | None, tasks: Tasks, later: Callable[[Session, int], None],
        is_moving: Callable[[Session], bool],
    ) -> None:  # fmt: skip
        self._store = store
        self._host = host
        self._routes = routes
        self._archive = archive
        self._tasks = tasks
        self._later = later
        self._is_moving = is_moving
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._unsettled: set[str] = set()  # keys of which a commit is still to say whose they are
        self._cleaning: set[str] = set()
        self._failures: dict[str, int] = {}

    async def put(self, session: Session) -> Moved:
        """Moves a session that has slept for long to the object store. Who wakes or ends the session meanwhile waits for the end of this;
        where somebody does, the files stay."""
        if self._archive is None:
            return Moved.DONE
        try:
            async with self._turns:
                moved = await self._put(session, self._archive)
        except (RpcError, ArchiveError, StoreError) as error:
            log.warning("archive.failed", session=session.id, error=str(error))
            moved = Moved.FAILED
        self.tidy(session)
        return moved

    async def _put(self, session: Session, archive: Archive) -> Moved:
        if session.state is not State.SUSPENDED or session.archived is not None:
            return Moved.DONE
        if not await self._have_streams_left(session):
            return Moved.LATER
        key = archive.key(session)
        session.litter.append(key)
        self._unsettled.add(key)
        try:
            await self._commit(session)
            archived = await archive.store(session, key)
            if session.state is not State.SUSPENDED:
                return Moved.DONE
            session.archived = archived
            session.litter.remove(key)
            try:
                await self._commit(session)
            except StoreError:
                session.archived = None
                session.litter.append(key)
                raise
        finally:
            self._unsettled.discard(key)
        try:
            await patiently(lambda: self._host.forget(session.id))
        except RpcError as error:  # its files are here as well: the next start finds both, and keeps these
            log.warning("archive.both", session=session.id, error=str(error))
        return Moved.DONE

    async def _have_streams_left(self, session: Session) -> bool:
        """Whether no client holds a parked stream of the session any more: its network could not outlive its files. The workers are
        asked; where one is missing, nobody knows."""
        if session.parked:
            left = await self._routes.parked_streams(session)
            if left is None:
                return False
            session.parked = left
        return session.parked == 0

    async def fetch(self, session: Session, steps: Steps) -> None:
        """Fetches the session's archive. Raises ArchiveError, RpcError, StoreError; the session sleeps on then, archived as it was."""
        archived = session.archived
        if archived is None:
            return
        if self._archive is None:
            raise ArchiveError("there is no object store to fetch it from")
        await self._archive.fetch(session, archived)
        await self.drop(session)
        steps.mark("fetched from the archive")

    async def drop(self, session: Session) -> None:
        """Forgets the archive of a session whose files are here, or that nobody brings back. Raises StoreError: it is as it was then."""
        archived = session.archived
        if archived is None:
            return
        self._unsettled.add(archived.key)
        self.disown(session)
        try:
            await self._commit(session)
        except StoreError:
            session.archived = archived
            session.litter.remove(archived.key)
            raise
        finally:
            self._unsettled.discard(archived.key)
        self.tidy(session)

    def disown(self, session: Session) -> None:
        """Makes a session's archive nobody's; whoever calls this stores it, and has it tidied up then."""
        if session.archived is not None:
            session.litter.append(session.archived.key)
            session.archived = None

    async def _commit(self, session: Session) -> None:
        self._store.put_session(session)
        await self._store.commit()

    def tidy(self, session: Session) -> None:
        """Has what is nobody's removed, now."""
        if session.litter:
            self._tasks.spawn(self.clean(session))

    async def clean(self, session: Session) -> None:
        """Removes what is nobody's; what cannot be removed, or not be stored, is tried again later. A session in the quarantine keeps all
        that there may be of it."""
        keys = [key for key in session.litter if key not in self._unsettled]
        if not keys or session.is_aside or session.id in self._cleaning:
            return
        self._cleaning.add(session.id)
        try:
            if await self._clean(session, keys):
                self._failures.pop(session.id, None)
                return
        except (ArchiveError, StoreError) as error:
            log.warning("archive.left", session=session.id, keys=keys, error=str(error))
        finally:
            self._cleaning.discard(session.id)
        failures = self._failures[session.id] = self._failures.get(session.id, 0) + 1
        self._later(session, failures)

    async def _clean(self, session: Session, keys: list[str]) -> bool:
        """Returns whether all is done. A session in motion is not stored: its next transition may not come to be."""
        if self._archive is None:
            raise ArchiveError("there is no object store")
        for key in keys:
            await self._archive.remove(key)
        if session.state not in _AT_REST or self._is_moving(session):
            return False
        session.litter = [key for key in session.litter if key not in keys]
        try:
            await self._commit(session)
        except StoreError:
            session.litter = [*keys, *session.litter]
            raise
        return not [key for key in session.litter if key not in self._unsettled]
