"""Sleeping sessions on their way to the object store and back.

The order keeps a session whole at every instant: its archive is complete in the store and named in its row before its files go, and they
are back before the row forgets the archive. What fails keeps the session as it is.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto

import structlog

from gateway.observe.steps import Steps
from gateway.tasks import Tasks

from .archive import Archive, ArchiveError
from .host import Host, RpcError, patiently
from .model import Archived, Session
from .routes import Routes
from .states import State
from .store import Store, StoreError

log = structlog.get_logger()

_AT_ONCE = 1  # of the two that do bulk work: a resume from the archive finds the other one


class Moved(Enum):
    """What became of a session that was to be archived."""

    DONE = auto()  # or somebody woke or ended it
    LATER = auto()  # clients hold parked streams of it
    FAILED = auto()


class Archiving:
    def __init__(self, store: Store, host: Host, routes: Routes, archive: Archive | None, tasks: Tasks) -> None:
        self._store = store
        self._host = host
        self._routes = routes
        self._archive = archive
        self._tasks = tasks
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def put(self, session: Session) -> Moved:
        """Moves a session that has slept for long to the object store. Who wakes or ends the session meanwhile waits for the end of this;
        where somebody does, the files stay."""
        if self._archive is None:
            return Moved.DONE
        try:
            async with self._turns:
                return await self._put(session, self._archive)
        except (RpcError, ArchiveError, StoreError) as error:
            log.warning("archive.failed", session=session.id, error=str(error))
            return Moved.FAILED

    async def _put(self, session: Session, archive: Archive) -> Moved:
        if session.state is not State.SUSPENDED or session.archived is not None:
            return Moved.DONE
        if not await self._have_streams_left(session):
            return Moved.LATER
        archived = await archive.store(session)
        if session.state is not State.SUSPENDED:
            await archive.forget(archived)
            return Moved.DONE
        session.archived = archived
        try:
            await self._commit(session)
        except StoreError:
            session.archived = None
            self.forget(archived)
            raise
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
        session.archived = None
        try:
            await self._commit(session)
        except StoreError:
            session.archived = archived
            raise
        steps.mark("fetched from the archive")
        self.forget(archived)

    async def _commit(self, session: Session) -> None:
        self._store.put_session(session)
        await self._store.commit()

    def forget(self, archived: Archived) -> None:
        """Removes an archive whose session is here, or has ended."""
        if self._archive is not None:
            self._tasks.spawn(self._archive.forget(archived))
