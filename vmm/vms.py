"""Which hypervisor holds which session, and who may touch a session's files.

Whoever changes a session's files, or the hypervisor that has them open, holds the session's lock (`owned`). What reads the files of a
sleeping session for long, a fold or an archive, holds no lock, so that a resume need not wait for it: it is a reader (`reading`), which a
resume and an end call off, and it looks again under the lock before anything becomes of what it made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from gateway import messages as m
from gateway.observe.steps import Steps

from .driver import Machine
from .errors import Ended, Unavailable
from .network import Link, Network

log = structlog.get_logger()

_PATIENCE_SECONDS = 50.0  # with a session's lock; control's calls that wait for it have a minute


@dataclass(eq=False)
class VmEntry:
    """A session whose hypervisor is here."""

    machine: Machine
    link: Link
    is_end_expected: bool = False
    keeps_link: bool = False  # edges hold connections in its link, which outlives it
    saving: asyncio.Future[m.Suspended] | None = None  # its suspend: under way, or done and not called off

    @property
    def session(self) -> str:
        return self.machine.record.session

    @property
    def incarnation(self) -> int:
        return self.machine.record.incarnation

    @property
    def is_being_saved(self) -> bool:
        return self.saving is not None and not self.saving.done()

    @property
    def has_ended(self) -> bool:
        return self.machine.record.phase == "ended"


class Reader:
    """Work that reads a sleeping session's files, in a thread. `is_urgent`: a resume waits for it."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.is_called_off = False
        self.is_urgent = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def check(self) -> None:
        """Raises Unavailable once the session is about to wake or to end."""
        if self.is_called_off:
            raise Unavailable(f"session {self.session} does not rest any more")


@dataclass(eq=False)
class _Lock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0  # who holds it, and who waits
    doing: str = ""
    since: float = 0.0


class VmRegistry:
    def __init__(self, network: Network, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self.kept_links: dict[str, Link] = {}  # of sessions that sleep with streams
        self.on_end: Callable[[VmEntry], None] = lambda entry: None  # a hypervisor has ended, whether that was expected or not
        self._network = network
        self._spawn = spawn
        self._entries: dict[str, VmEntry] = {}
        self._locks: dict[str, _Lock] = {}
        self._readers: dict[str, set[Reader]] = {}
        self._preparing: dict[str, asyncio.Task[Any]] = {}
        self._traces: dict[str, dict[str, Steps]] = {}
        self._ran: dict[str, int] = {}  # by session, the last incarnation whose guest was told to run

    # ---- who may touch a session ----

    @contextlib.asynccontextmanager
    async def owned(self, session: str, doing: str, patience: float = _PATIENCE_SECONDS) -> AsyncIterator[None]:
        """Holds the session's lock. Raises Unavailable, with what goes on, where others hold it for longer than `patience`."""
        own = self._locks.setdefault(session, _Lock())
        own.users += 1
        try:
            if own.users == 1:
                await own.lock.acquire()  # at once
            else:
                await self._wait(own, session, patience)
            own.doing, own.since = doing, asyncio.get_running_loop().time()
            try:
                yield
            finally:
                own.lock.release()
        finally:
            own.users -= 1
            if not own.users:
                del self._locks[session]

    async def _wait(self, own: _Lock, session: str, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await own.lock.acquire()
        except TimeoutError as error:
            seconds = asyncio.get_running_loop().time() - own.since
            raise Unavailable(f"session {session} is busy: it is {own.doing}, for {seconds:.0f} s now") from error

    @contextlib.asynccontextmanager
    async def reading(self, session: str) -> AsyncIterator[Reader]:
        """Reads a sleeping session's files without the lock. It begins under it, so that whoever is about to change them knows of all
        readers. Raises Unavailable."""
        reader = Reader(session)
        async with self.owned(session, "being looked at"):
            if session in self._entries:
                raise Unavailable(f"session {session} does not rest")
            self._readers.setdefault(session, set()).add(reader)
        try:
            yield reader
        finally:
            reader.is_called_off = True  # also for a thread whose time was up, and that nobody waits for any more
            left = self._readers[session]
            left.discard(reader)
            if not left:
                del self._readers[session]
            reader.ended.set_result(None)

    def call_off_readers(self, session: str) -> None:
        """The session's files are about to change. The caller holds the session's lock."""
        for reader in self._readers.get(session, ()):
            reader.is_called_off = True

    async def urgent_readers(self, session: str) -> None:
        """Waits for readers without which a resume would cost more and more. The caller does not hold the lock, which they take at last."""
        urgent = [reader.ended for reader in self._readers.get(session, ()) if reader.is_urgent]
        if urgent:
            await asyncio.wait(urgent)

    @contextlib.contextmanager
    def preparing(self, session: str) -> Iterator[None]:
        """What is under way here for a session that has no hypervisor yet can be called off."""
        task = asyncio.current_task()
        assert task is not None
        self._preparing[session] = task
        try:
            yield
        finally:
            del self._preparing[session]

    def call_off_preparation(self, session: str) -> None:
        """Whoever calls this waits for its end by taking the session's lock."""
        task = self._preparing.get(session)
        if task is not None:
            task.cancel()

    @property
    def in_preparation(self) -> list[str]:
        return list(self._preparing)

    # ---- hypervisors ----

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[VmEntry]:
        return list(self._entries.values())

    def get(self, session: str) -> VmEntry | None:
        return self._entries.get(session)

    def require(self, session: str, incarnation: int) -> VmEntry:
        """Raises Ended."""
        entry = self._entries.get(session)
        if entry is None or entry.incarnation != incarnation or entry.has_ended:
            raise Ended(f"session {session} has no hypervisor of incarnation {incarnation}")
        return entry

    def add(self, session: str, machine: Machine, link: Link) -> VmEntry:
        entry = self._entries[session] = VmEntry(machine, link)
        if machine.record.phase != "prepared":
            self.note_run(session, machine.record.incarnation)
        self._spawn(self._watch(entry))
        return entry

    async def _watch(self, entry: VmEntry) -> None:
        await entry.machine.wait()
        self.remove(entry)
        if entry.saving is not None:  # which may need it no more
            await asyncio.wait([entry.saving])
        self.on_end(entry)

    def remove(self, entry: VmEntry) -> asyncio.Future[None]:
        """Takes out a session whose hypervisor has ended; what is returned is done when its link is destroyed, or kept."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        if self._entries.get(entry.session) is not entry:
            return done
        del self._entries[entry.session]
        if entry.keeps_link:
            self.kept_links[entry.session] = entry.link
            return done
        return self._spawn(self._network.release(entry.link))

    async def end(self, entry: VmEntry) -> asyncio.Future[None]:
        """Ends a hypervisor, and returns what `remove` does. The caller holds the session's lock. Raises Unavailable."""
        entry.is_end_expected = True
        try:
            await entry.machine.kill()
        except TimeoutError as error:  # it is let go of whenever it ends
            raise Unavailable(f"the hypervisor of session {entry.session} has not ended in time: ask again") from error
        return self.remove(entry)

    def rename(self, entry: VmEntry, session: str, incarnation: int) -> None:
        """A microVM that ran ahead becomes a session. The caller holds both locks."""
        del self._entries[entry.session]
        self.forget(entry.session)
        entry.machine.record.session, entry.machine.record.incarnation = session, incarnation
        self._entries[session] = entry

    def note_run(self, session: str, incarnation: int) -> None:
        """The guest of `incarnation` is told to run: the snapshot that it was loaded from is void."""
        self._ran[session] = incarnation

    def take_back_run(self, session: str, incarnation: int) -> None:
        """It could not be told: that snapshot is good."""
        self._ran[session] = incarnation - 1

    def has_run(self, session: str, incarnation: int) -> bool:
        return self._ran.get(session, 0) >= incarnation

    # ---- traces ----

    def trace(self, session: str, work: str) -> Steps:
        kind = "suspend" if work == "suspend" else "wake"
        made = self._traces.setdefault(session, {})[kind] = Steps("vmm", work)
        return made

    def traces(self, session: str) -> list[Steps]:
        return list(self._traces.get(session, {}).values())

    def forget(self, session: str) -> None:
        """Drops what is remembered of a session that is over."""
        self._traces.pop(session, None)
        self._ran.pop(session, None)
