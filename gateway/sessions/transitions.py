"""An event meets the table (states.py), and what follows is stored before it is acted on.

One event at a time for each session. Two things are ahead of the disk, because they can be taken back: the gate of a call's suspend is
closed beside its commit, and workers that hold requests hear that the next incarnation is about to run. One thing is behind it: that a
session runs is published before it is stored, because its incarnation was stored before it ran.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from gateway.observe.steps import Steps
from gateway.tasks import Tasks

from .model import Session
from .routes import Gate, Routes
from .states import REVOCABLE, Action, Event, State, step
from .store import Store, StoreError

log = structlog.get_logger()

_STORE_RETRY_SECONDS = 1.0
_RECOVERED_SECONDS = 3600.0
_FIRST_SECONDS = 0.03  # for the requests that were held: what is then stored says no more than that they could be let through


@dataclass
class Observer:
    """Hears what happens to sessions: metrics, spans, and lines of their logs."""

    transition: Callable[[Event], None] = lambda event: None
    steps: Callable[[Session, Steps], None] = lambda session, steps: None
    action: Callable[[str, float], None] = lambda name, seconds: None
    out_of_memory: Callable[[Session, str], None] = lambda session, line: None


class _Moves:
    """Keeps what is known of a session's transitions and not worth storing."""

    __slots__ = ("deferred", "gate", "lock", "stored")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.deferred: list[Event] = []
        self.stored: State | None = None  # as its last row says; a resume is not stored before its guest is about to run
        self.gate: asyncio.Task[Gate] | None = None  # being closed while the call that asked for it is stored


class Transitions:
    """`entered(session, action, event)` is called when a state was entered, under the session's lock: it starts the action."""

    def __init__(
        self, store: Store, routes: Routes, tasks: Tasks, gate_seconds: float, entered: Callable[[Session, Action, Event], None],
        observer: Observer, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store = store
        self._routes = routes
        self._tasks = tasks
        self._gate_seconds = gate_seconds
        self._entered = entered
        self._observer = observer
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._moves: dict[str, _Moves] = {}

    def _of(self, session: Session) -> _Moves:
        moves = self._moves.get(session.id)
        if moves is None:
            moves = self._moves[session.id] = _Moves()
        return moves

    async def fire(self, session: Session, event: Event, detail: str = "") -> Action:
        """Applies an event. Returns when the new state is durable; its action has then been started.

        An event that comes while another is being stored meets the state that follows, and finds that state's action started. Raises
        IllegalTransition, StoreError.
        """
        moves = self._of(session)
        async with moves.lock:
            old = session.state
            new, action = step(old, event)
            if action is Action.DEFER:
                moves.deferred.append(event)
            if new is not old:
                await self._enter(session, new, old, event, detail, action)
                self._entered(session, action, event)
            return action

    async def _enter(self, session: Session, new: State, old: State, event: Event, detail: str, action: Action) -> None:
        before = (session.reason, session.terminated_at, session.is_aside, session.aside_seconds)
        session.state = new
        if new is State.TERMINATING:
            session.reason = detail or session.reason
            session.is_aside = action is Action.SET_ASIDE
        elif new is State.TERMINATED:
            session.terminated_at = self._clock()
        elif event is Event.NOT_RESUMED:
            session.reason = detail or session.reason
            self.drop(session, Event.SUSPEND)  # it sleeps, as was asked meanwhile: no later resume is undone by it
        elif event in (Event.STARTED, Event.RESUMED):
            session.reason, session.refusal = None, ""
        elif event in (Event.SAVED, Event.CALLED_OFF, Event.NOT_SAVED):  # what was said meanwhile (_UNDER_WAY) is over
            session.reason = None
        elif event is Event.RECOVERED:
            self._come_back(session)
        self._observer.transition(event)
        # That this incarnation runs was stored before it did, and a control that starts finds it running: its requests need not wait
        # for the commit, nor share a processor with it.
        is_open = event in (Event.STARTED, Event.RESUMED)
        if is_open:
            self._routes.publish(session)
            await asyncio.sleep(_FIRST_SECONDS)
        note = partial(log.info, "session", id=session.id, on=event.value, old=old.value, new=new.value, detail=detail)
        if new is State.RESUMING or event is Event.SUSPEND:  # somebody waits
            self._loop.call_later(_FIRST_SECONDS, note)
        else:
            note()
        # A resume is stored when its snapshot has been loaded and the guest is about to run: until then the snapshot is
        # good, and a crash must find the session SUSPENDED.
        is_as_stored = old is State.RESUMING and new is State.SUSPENDED and self._of(session).stored is not State.RESUMING
        if new is not State.RESUMING and not is_as_stored:
            try:
                await self._commit(session, event, old, detail, partial(self._begin_gate, session) if event is Event.SUSPEND else None)
            except StoreError:
                session.reason, session.terminated_at, session.is_aside, session.aside_seconds = before
                raise
        elif new is State.RESUMING:
            self._of(session).stored = old
        if new is not State.SUSPENDING and not is_open:  # whose gate is closed, and answers counted, by its action
            self._routes.publish(session)

    def _come_back(self, session: Session) -> None:
        """The time that a session was in the quarantine is none of its lifetime, of which an hour is left at least: who brought it back
        has something to do with it."""
        now = self._clock()
        session.aside_seconds += now - (session.terminated_at or now)
        session.aside_seconds += max(0.0, now + _RECOVERED_SECONDS - session.expires_at)
        session.terminated_at, session.reason, session.is_aside, session.suspended_by = None, None, False, "api"

    async def _commit(self, session: Session, event: Event, old: State, detail: str, meanwhile: Callable[[], None] | None) -> None:
        """Stores a transition. A call that cannot be stored is taken back and refused; what has happened is stored as soon as that
        works."""
        while True:
            undo = self._record(session, event, old, detail)
            try:
                await self._store.commit(meanwhile)
                return
            except StoreError as error:
                undo()
                if event in REVOCABLE:
                    session.state = old
                    await self._open_again(session)
                    raise
                log.error("store.retry", id=session.id, error=str(error))
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    def _record(self, session: Session, event: Event, old: State, detail: str) -> Callable[[], None]:
        """Puts the session and a row that follows its last one into the next commit. Call what is returned where that fails."""
        moves = self._of(session)
        before = moves.stored
        self._store.put_session(session)
        self._store.add_event(session.id, event.value, (before or old).value, session.state.value, session.incarnation, detail)
        moves.stored = session.state
        return lambda: setattr(moves, "stored", before)

    # ---- the gate ----

    def _begin_gate(self, session: Session) -> None:
        """Begins to close the gate: requests may be held before it is known for how long, so the disk need not be waited for."""
        self._of(session).gate = self._tasks.spawn(self._routes.close_gate(session, self._gate_seconds))

    async def close_gate(self, session: Session) -> Gate:
        """Closes the gate of a session that is SUSPENDING, or waits until it is closed."""
        moves = self._of(session)
        gate, moves.gate = moves.gate, None
        return await (gate or self._routes.close_gate(session, self._gate_seconds))

    async def _open_again(self, session: Session) -> None:
        moves = self._of(session)
        gate, moves.gate = moves.gate, None
        if gate is not None:
            await gate
            self._routes.publish(session)

    # ---- the next incarnation ----

    async def begin(self, session: Session, event: Event) -> None:
        """Stores that the next incarnation runs, before it does. Raises StoreError: it must not run then. Who is stopped meanwhile knows
        the session as it is stored."""
        session.incarnation += 1
        undo = self._record(session, event, State.SUSPENDED if session.incarnation > 1 else State.PENDING, "started")
        stored = self._store.begin_commit(partial(self._announce, session, session.incarnation))
        try:
            await asyncio.wait([stored])
        finally:
            if not stored.done():
                await asyncio.wait([stored])
            if stored.exception() is not None:
                session.incarnation -= 1
                undo()
        await stored

    def has_begun(self, session: Session) -> bool:
        """Whether it is stored that the incarnation of a session that is RESUMING runs."""
        return self._of(session).stored is State.RESUMING

    def _announce(self, session: Session, incarnation: int) -> None:
        """Tells the workers that hold requests, while the disk is waited for: they connect, and their SYNs wait in the link."""
        if session.incarnation == incarnation:
            self._routes.publish(session, is_begun=True)

    # ---- deferred events ----

    def defer(self, session: Session, event: Event) -> None:
        self._of(session).deferred.append(event)

    def is_wake_deferred(self, session: Session) -> bool:
        deferred = self._of(session).deferred
        return Event.REQUEST in deferred or Event.RESUME in deferred

    def is_request_deferred(self, session: Session) -> bool:
        return Event.REQUEST in self._of(session).deferred

    def has_deferred(self, session: Session) -> bool:
        return bool(self._of(session).deferred)

    def drop_wakes(self, session: Session) -> None:
        """Drops events that would wake a session, because it goes on running."""
        self.drop(session, Event.REQUEST, Event.RESUME)

    def drop(self, session: Session, *events: Event) -> None:
        moves = self._of(session)
        moves.deferred = [event for event in moves.deferred if event not in events]

    def take_deferred(self, session: Session) -> list[Event]:
        moves = self._of(session)
        deferred, moves.deferred = moves.deferred, []
        return deferred

    # ---- what need not be kept ----

    def is_moving(self, session: Session) -> bool:
        moves = self._moves.get(session.id)
        return moves is not None and moves.lock.locked()

    def forget(self, session: Session) -> None:
        """Forgets what is known of a session that is at rest or gone."""
        self._moves.pop(session.id, None)
