"""Sessions in motion: events meet the table (states.py), are stored, and only then acted on.

One task per session that is in transition, none for a session at rest. What the tasks do is in actions.py; here is who
may start them, the deadlines, and what the edges report.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Protocol

import structlog

from gateway.config import Settings
from gateway.messages import Activity, EgressRules, Ended
from gateway.observe.steps import Steps

from .agent import Agent, AgentError
from .deadlines import Deadlines
from .host import Host, RpcError
from .logs import LogStore
from .model import Session
from .room import Room
from .routes import Gate, Routes
from .states import CALLS, Action, Event, State, step
from .store import Store, StoreError

log = structlog.get_logger()

MAX_LIFETIME = "MicroVM exceeded maximum lifetime."
SUCCESS = "Success."
_IDLE, _WINDOW, _LIFETIME, _RETRY, _PURGE, _ARCHIVE = "idle", "window", "lifetime", "retry", "purge", "archive"
_TERMINATED_KEPT_SECONDS = 3600.0  # reference: at least 20 minutes
_RETRY_SECONDS = 1.0
_FIRST_SECONDS = 0.03  # for the requests that were held: what is then stored says no more than that they could be let through


class GuestServices(Protocol):
    """What answers a running guest on sockets of its own network."""

    def close(self) -> None: ...


class Live:
    """What is known of a session that is not worth storing."""

    def __init__(self, now: float) -> None:
        self.lock = asyncio.Lock()
        self.agent: Agent | None = None
        self.services: GuestServices | None = None
        self.traces: dict[str, Steps] = {}
        self.task: asyncio.Task[None] | None = None
        self.gate: asyncio.Task[Gate] | None = None  # being closed while the call that asked for it is stored
        self.resting: asyncio.Task[None] | None = None  # ends the hypervisor of a session that was just saved
        self.deferred: list[Event] = []
        self.counts: dict[Hashable, int] = {}  # by worker, as last reported
        self.waiting: dict[Hashable, int] = {}
        self.last_active = now
        self.stored: State | None = None  # as its last row says; a resume is not stored before its guest is about to run


class Lifecycle:
    """`actions` makes the coroutine that carries an action out; given late, because it needs the lifecycle."""

    def __init__(
        self, settings: Settings, store: Store, host: Host, routes: Routes, logs: LogStore,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.store = store
        self.host = host
        self.room = Room(host, settings.limits)
        self.routes = routes
        self.logs = logs
        self.clock = clock
        self.on_transition: Callable[[Event], None] = lambda event: None
        self.on_steps: Callable[[Session, Steps], None] = lambda session, steps: None
        self.on_action: Callable[[str, float], None] = lambda name, seconds: None
        self.serve_guest: Callable[[Session, list[socket.socket], EgressRules | None], Awaitable[GuestServices]]
        self.archive_it: Callable[[Session], Coroutine[Any, Any, None]]
        self.actions: Callable[[Session, Action, Event, str], Coroutine[Any, Any, None]]
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, Live] = {}
        self._deadlines = Deadlines(self._loop, self._due)
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- events ----

    async def fire(self, session: Session, event: Event, detail: str = "") -> Action:
        """Applies an event. Returns when the new state is durable; its action has then been started.

        One at a time for each session: an event that comes while another is being stored meets the state that follows, and
        finds that state's action started. Raises IllegalTransition, StoreError.
        """
        async with self.live(session).lock:
            old = session.state
            new, action = step(old, event)
            if action is Action.DEFER:
                self.live(session).deferred.append(event)
            if new is not old:
                await self._enter(session, new, old, event, detail)
                self._act(session, action, event, detail)
            return action

    async def _enter(self, session: Session, new: State, old: State, event: Event, detail: str) -> None:
        session.state = new
        if new is State.TERMINATING:
            session.reason = detail or session.reason
        if new is State.TERMINATED:
            session.terminated_at = self.clock()
        self.on_transition(event)
        # That this incarnation runs was stored before it did, and a control that starts finds it running: its requests need not wait
        # for the commit, nor share a processor with it.
        is_open = event in (Event.STARTED, Event.RESUMED)
        if is_open:
            self.routes.publish(session)
            await asyncio.sleep(_FIRST_SECONDS)
        note = partial(log.info, "session", id=session.id, on=event.value, old=old.value, new=new.value, detail=detail)
        if new is State.RESUMING or event is Event.SUSPEND:  # somebody waits
            self._loop.call_later(_FIRST_SECONDS, note)
        else:
            note()
        # A resume is stored when its snapshot has been loaded and the guest is about to run: until then the snapshot is
        # good, and a crash must find the session SUSPENDED.
        if new is not State.RESUMING and not (old is State.RESUMING and new is State.SUSPENDED):
            await self._store(session, event, old, detail, partial(self._close_gate, session) if event is Event.SUSPEND else None)
        elif new is State.RESUMING:
            self.live(session).stored = old
        if new is not State.SUSPENDING and not is_open:  # whose gate is closed, and answers counted, by its action
            self.routes.publish(session)

    async def _store(self, session: Session, event: Event, old: State, detail: str, aside: Callable[[], None] | None = None) -> None:
        """A call that cannot be stored is taken back and refused; what has happened is stored as soon as that works."""
        while True:
            undo = self.record(session, event, old, detail)
            try:
                await self.store.commit(aside)
                return
            except StoreError as error:
                undo()
                if event in CALLS:
                    session.state = old
                    await self._open_again(session)
                    raise
                log.error("store.retry", id=session.id, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)

    def _close_gate(self, session: Session) -> None:
        """Requests may be held before it is known for how long: the disk need not be waited for."""
        self.live(session).gate = self.spawn(self.routes.close_gate(session, self.settings.suspend.gate_seconds))

    async def _open_again(self, session: Session) -> None:
        live = self.live(session)
        gate, live.gate = live.gate, None
        if gate is not None:
            await gate
            self.routes.publish(session)

    def record(self, session: Session, event: Event, old: State, detail: str = "") -> Callable[[], None]:
        """Puts the session and a row that follows its last one into the next commit; what is returned is for one that failed."""
        live = self.live(session)
        before = live.stored
        self.store.put_session(session)
        self.store.add_event(session.id, event.value, (before or old).value, session.state.value, session.incarnation, detail)
        live.stored = session.state
        return lambda: setattr(live, "stored", before)

    def _act(self, session: Session, action: Action, event: Event, detail: str) -> None:
        live = self.live(session)
        if action is Action.OPEN:
            self._opened(session, live)
        elif action in (Action.SAVE, Action.REST, Action.WAKE, Action.DESTROY):
            self._deadlines.clear((_IDLE, session.id))
            self._deadlines.clear((_ARCHIVE, session.id))
            if action is Action.DESTROY:
                self._stop_task(live)
                self._deadlines.clear((_WINDOW, session.id))
                self._deadlines.clear((_LIFETIME, session.id))
            self.run(session, self.actions(session, action, event, detail))
            live.resting = live.task if action is Action.REST else live.resting
        if session.state is State.TERMINATED:
            self.ended(session)

    def run(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        """Starts the session's one task."""
        live = self.live(session)
        live.task = self.spawn(work)

    def settle(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        """The same for work on a session that may sleep: who wakes or ends it meanwhile waits for the end of it."""
        self.run(session, work)
        live = self.live(session)
        live.resting = live.task if session.state is State.SUSPENDED else None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("lifecycle.task_failed", error=repr(task.exception()), exc_info=task.exception())

    def _stop_task(self, live: Live) -> None:
        """What ends a hypervisor or archives a session is not stopped: who comes next waits for it."""
        if live.task is not None and live.task is not asyncio.current_task() and live.task is not live.resting:
            live.task.cancel()

    def live(self, session: Session) -> Live:
        live = self._live.get(session.id)
        if live is None:
            live = self._live[session.id] = Live(self._loop.time())
        return live

    def traces(self, session: Session) -> list[Steps]:
        live = self._live.get(session.id)
        return list(live.traces.values()) if live is not None else []

    def agent(self, session: Session) -> Agent:
        """A running session's. Raises AgentError."""
        agent = self.live(session).agent if session.state is State.RUNNING else None
        if agent is None:
            raise AgentError("the MicroVM is not running")
        return agent

    def post(self, session: Session, event: Event, detail: str = "") -> None:
        """Fires without waiting: for what happens by itself."""
        self.spawn(self.fire(session, event, detail))

    # ---- arriving in a state ----

    def _opened(self, session: Session, live: Live) -> None:
        live.last_active = self._loop.time()
        if live.agent is not None:
            live.agent.release()
        self._watch_idle(session, live.last_active)
        deferred, live.deferred = live.deferred, []
        for event in (Event.TERMINATE, Event.EXPIRED, Event.SUSPEND):
            if event in deferred:
                self.post(session, event, reason_of(event))
                return

    def adopted(self, session: Session) -> None:
        """A session that ran on while control was away: as active now."""
        self.routes.publish(session)
        self._opened(session, self.live(session))

    def rested(self, session: Session) -> None:
        """Called when a suspended session's hypervisor is gone: deferred events, then the window."""
        live = self.live(session)
        live.resting = None
        sleeps_with_shells = live.agent is not None and live.agent.is_detached
        if not sleeps_with_shells:
            self.close_agent(live)
        elif live.services is not None:
            live.services.close()
            live.services = None
        if session.state is not State.SUSPENDED:  # a request came meanwhile, and waits for this
            return
        deferred, live.deferred = live.deferred, []
        if Event.TERMINATE in deferred or Event.EXPIRED in deferred:
            event = Event.TERMINATE if Event.TERMINATE in deferred else Event.EXPIRED
            self.post(session, event, reason_of(event))
        elif Event.RESUME in deferred:
            self.post(session, Event.RESUME)
        elif Event.REQUEST in deferred and session.resumes_on_request:
            self.spawn(self.request(session))
        else:
            self._watch_window(session)
            after = self.settings.archive.after_seconds
            if after and session.archived is None and session.suspended_at is not None:
                self._at((_ARCHIVE, session.id), session.suspended_at + after)
            if live.task is asyncio.current_task() and not live.lock.locked() and not sleeps_with_shells:
                self._live.pop(session.id, None)

    def _watch_idle(self, session: Session, since: float) -> None:
        if session.idle_policy is not None:
            self._deadlines.set((_IDLE, session.id), since + session.idle_policy.max_idle)

    def _watch_window(self, session: Session) -> None:
        policy = session.idle_policy
        if policy is not None and session.suspended_by == "idle" and session.suspended_at is not None:
            self._at((_WINDOW, session.id), session.suspended_at + policy.suspended)

    def watch_lifetime(self, session: Session) -> None:
        self._at((_LIFETIME, session.id), session.expires_at)

    def archive_later(self, session: Session) -> None:
        self._deadlines.set((_ARCHIVE, session.id), self._loop.time() + self.settings.archive.after_seconds)

    def retry_later(self, session: Session) -> None:
        """A resume could not be made now; what is held is tried again until the edges give up."""
        self._deadlines.set((_RETRY, session.id), self._loop.time() + _RETRY_SECONDS)

    def _at(self, key: Hashable, wall: float) -> None:
        self._deadlines.set(key, self._loop.time() + max(0.0, wall - self.clock()))

    def never_was(self, session: Session) -> None:
        """A session that could not be stored."""
        self.routes.remove(session)
        self.store.forget_session(session)
        self._live.pop(session.id, None)

    def ended(self, session: Session) -> None:
        """A terminated session stays listed for a while, then its row goes."""
        live = self._live.pop(session.id, None)
        if live is not None:
            self.close_agent(live)
        self._at((_PURGE, session.id), (session.terminated_at or self.clock()) + _TERMINATED_KEPT_SECONDS)

    def close_agent(self, live: Live) -> None:
        if live.agent is not None:
            live.agent.close()
            live.agent = None
        if live.services is not None:
            live.services.close()
            live.services = None

    # ---- deadlines ----

    def _due(self, key: Hashable) -> None:
        assert isinstance(key, tuple)
        kind, name = key
        session = self.store.sessions.get(name)
        if session is None:
            return
        if kind == _IDLE:
            self._idle_due(session)
        elif kind == _WINDOW:
            self.post(session, Event.WINDOW_OVER, MAX_LIFETIME)
        elif kind == _LIFETIME:
            self.post(session, Event.EXPIRED, MAX_LIFETIME)
        elif kind == _ARCHIVE and session.state is State.SUSPENDED and session.archived is None:
            self.settle(session, self.archive_it(session))
        elif kind == _RETRY and session.state is State.SUSPENDED:
            self.spawn(self.request(session))
        elif kind == _PURGE:
            self.routes.remove(session)
            self.store.drop_session(session)
            self.spawn(self.store.commit())

    def _idle_due(self, session: Session) -> None:
        live = self.live(session)
        if session.state is not State.RUNNING or session.idle_policy is None:
            return
        if any(live.waiting.values()):
            live.last_active = self._loop.time()
        if self._loop.time() - live.last_active + 0.001 < session.idle_policy.max_idle:
            self._watch_idle(session, live.last_active)
        else:
            self.post(session, Event.IDLE)

    # ---- what the edges and the host report ----

    def activity(self, worker: Hashable, report: Activity) -> None:
        now = self._loop.time()
        for name, (count, ago, waiting) in report.sessions.items():
            session = self.store.sessions.get(name)
            if session is None or session.state.is_over:
                continue
            live = self.live(session)
            live.counts[worker] = count
            live.waiting[worker] = waiting
            live.last_active = max(live.last_active, now - ago)

    def worker_left(self, worker: Hashable) -> None:
        """What it did not report counts as activity now."""
        now = self._loop.time()
        for live in self._live.values():
            if live.counts.pop(worker, None) is not None or live.waiting.pop(worker, 0):
                live.last_active = now

    async def request(self, session: Session) -> None:
        """A request is held for this session."""
        if session.state is State.SUSPENDED and not session.resumes_on_request:
            return
        if session.state is State.SUSPENDING and Event.REQUEST in self.live(session).deferred:
            return
        if session.state is State.SUSPENDED and not await self._has_room(session):
            self.retry_later(session)
            return
        await self.fire(session, Event.REQUEST)

    async def _has_room(self, session: Session) -> bool:
        try:
            if await self.room.take():
                return True
            log.warning("resume.no_room", id=session.id)
        except RpcError as error:
            log.warning("resume.host_away", id=session.id, error=str(error))
        return False

    def hypervisor_ended(self, ended: Ended) -> None:
        session = self.store.sessions.get(ended.session)
        if session is not None and session.incarnation == ended.incarnation:
            self.post(session, Event.LOST, ended.reason)

    def exited(self, session: Session, code: int) -> None:
        self.post(session, Event.EXITED, f"Container Stopped with Exit Code: {code}")

    # ---- ends ----

    async def quiet(self) -> None:
        """Waits until no session is in transition."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.quiet()
        for live in self._live.values():
            self.close_agent(live)


def reason_of(event: Event) -> str:
    return SUCCESS if event is Event.TERMINATE else MAX_LIFETIME if event is Event.EXPIRED else ""
