"""Sessions in motion: transitions start actions, actions end in events; timers and the edges' reports bring others.

One task for each session that is in transition, none for one at rest. What an event means is in states.py, how it is applied in
transitions.py, what is then done in actions.py; here is who starts what, and when.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable

import structlog

from gateway.config import Settings
from gateway.messages import Activity, Ended, HostState
from gateway.observe.steps import Steps
from gateway.tasks import Tasks

from .actions import Actions, Arrival, End, Fired, Outcome
from .agent import Agent
from .ahead import Ahead
from .archive import Archive
from .channels import Channels, OpenServices
from .host import Host, RpcError, patiently
from .liveness import Liveness
from .logs import LogStore
from .model import Session
from .room import Room
from .routes import Routes
from .states import Action, Event, State, exit_reason, reason_of
from .store import Store
from .timers import Deadline, Timers
from .transitions import Observer, Transitions

log = structlog.get_logger()


class _Work:
    """Keeps a session's one task; and the one that ends the hypervisor of a session that sleeps, or archives it, which is not stopped: who
    wakes or ends the session waits for it."""

    __slots__ = ("at_rest", "failures", "not_archived", "task")

    def __init__(self) -> None:
        self.failures = 0  # resumes that failed, one after the other
        self.not_archived = 0
        self.task: asyncio.Task[None] | None = None
        self.at_rest: asyncio.Task[None] | None = None


class Lifecycle:
    def __init__(
        self, settings: Settings, store: Store, host: Host, routes: Routes, logs: LogStore, open_services: OpenServices,
        archive: Archive | None = None, observer: Observer | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        observer = observer or Observer()
        loop = asyncio.get_running_loop()
        self.store = store
        self.host = host
        self.routes = routes
        self._observer = observer
        self._time = loop.time
        self.tasks = Tasks()
        self.room = Room(host, settings.limits, self.tasks)
        self.ahead = Ahead(host, store, settings, self.tasks.spawn)
        self.timers = Timers(loop, self._due, settings.archive.after_seconds, clock)
        self.liveness = Liveness(loop.time)
        self.channels = Channels(
            host, store, settings.egress, logs, self.tasks, open_services, self.exited, observer.out_of_memory, self.gone
        )
        gate_seconds = settings.suspend.gate_seconds
        self.transitions = Transitions(store, routes, self.tasks, gate_seconds, self._entered, observer, clock)
        self.actions = Actions(
            settings,
            store,
            host,
            routes,
            self.transitions,
            self.channels,
            self.liveness,
            self.ahead,
            archive,
            self.tasks,
            observer,
            clock,
            self.timers.litter_later,
        )
        self._work: dict[str, _Work] = {}
        self.is_stopping = False

    # ---- events ----

    async def fire(self, session: Session, event: Event, detail: str = "") -> Action:
        """Applies an event. Returns when the new state is durable; its action has then been started. Raises IllegalTransition,
        StoreError."""
        return await self.transitions.fire(session, event, detail)

    def post(self, session: Session, event: Event, detail: str = "") -> None:
        """Fires an event without waiting for what becomes of it, as for what happens by itself."""
        self.tasks.spawn(self.fire(session, event, detail))

    def launch(self, session: Session, arrival: Arrival | None = None) -> None:
        """Starts the launch of a session that is PENDING."""
        self._start(session, lambda: self.actions.launch(session, arrival))

    def settle(self, session: Session, state: HostState | None = None) -> None:
        """Goes on with a session from what the host has of it; `state` is what it has of all."""
        self._start(session, lambda: self.actions.settled(session, state), is_at_rest=session.state is State.SUSPENDED)

    def _entered(self, session: Session, action: Action, event: Event) -> None:
        if action is Action.OPEN:
            self._work_of(session).failures = 0
            self._opened(session)
        elif action in (Action.SAVE, Action.REST, Action.WAKE, Action.DESTROY, Action.SET_ASIDE):
            work = self._work_of(session)
            self.timers.clear(session, Deadline.IDLE, Deadline.ARCHIVE)
            if action in (Action.DESTROY, Action.SET_ASIDE):
                self.timers.clear(session, Deadline.WINDOW, Deadline.LIFETIME)
                if work.task not in (None, work.at_rest, asyncio.current_task()):
                    work.task.cancel()
            before = work.at_rest if work.at_rest is not None and not work.at_rest.done() else None
            self._start(session, lambda: self.actions.carry_out(session, action, event, before), event, is_at_rest=action is Action.REST)
        if session.state in (State.RUNNING, State.SUSPENDED, State.TERMINATING):
            self.timers.clear(session, Deadline.OVERDUE)
        if session.state is State.TERMINATED:
            self.ended(session)

    def _start(
        self, session: Session, act: Callable[[], Awaitable[Outcome]], event: Event | None = None, is_at_rest: bool = False
    ) -> None:  # fmt: skip
        """Starts the session's one task. It calls `act` in its first step, which a task that is cancelled at once does not take."""
        work = self._work_of(session)
        work.task = self.tasks.spawn(self._conclude(session, act, event))
        if is_at_rest:
            work.at_rest = work.task
        if session.state in (State.PENDING, State.RESUMING, State.SUSPENDING):
            self.timers.watch_work(session, self.actions.bound(session))

    async def _conclude(self, session: Session, act: Callable[[], Awaitable[Outcome]], event: Event | None) -> None:
        """Acts, and applies what becomes of the action, which an event started."""
        end = await act()
        if isinstance(end, Fired):
            await self.fire(session, end.event, end.detail)
            if end.steps is not None:
                self._observer.steps(session, end.steps)
        elif end is End.RESTED:
            self.rested(session)
        elif end is End.ADOPTED:
            self.routes.publish(session)
            self._opened(session)
        elif end is End.POSTPONED:
            self.timers.archive_later(session)
        elif end is End.NOT_ARCHIVED:
            work = self._work_of(session)
            work.not_archived += 1
            self.timers.archive_later(session, work.not_archived)
        if event is Event.REQUEST and session.state is State.SUSPENDED:  # it could not be resumed for who still waits
            self._retry(session)

    def _retry(self, session: Session) -> None:
        """A refusal stays one until somebody has changed something: nobody is held for it, and nothing is tried by itself."""
        if not session.refusal:
            work = self._work_of(session)
            work.failures += 1
            self.timers.retry_later(session, work.failures)

    def _work_of(self, session: Session) -> _Work:
        work = self._work.get(session.id)
        if work is None:
            work = self._work[session.id] = _Work()
        return work

    # ---- arriving in a state ----

    def _opened(self, session: Session) -> None:
        self.channels.release(session)
        self.timers.watch_idle(session, self.liveness.touch(session.id))
        deferred = self.transitions.take_deferred(session)
        event = next((candidate for candidate in (Event.TERMINATE, Event.EXPIRED, Event.SUSPEND) if candidate in deferred), None)
        if event is not None:
            self.post(session, event, reason_of(event))

    def rested(self, session: Session) -> None:
        """Goes on with a suspended session whose hypervisor is gone: deferred events come first, then the deadlines of its sleep."""
        is_closed = self.channels.rested(session)
        if session.state is not State.SUSPENDED:  # a request came meanwhile, and waits for this
            return
        deferred = self.transitions.take_deferred(session)
        event = next((candidate for candidate in (Event.TERMINATE, Event.EXPIRED, Event.RESUME) if candidate in deferred), None)
        if event is not None:
            self.post(session, event, reason_of(event))
        elif Event.REQUEST in deferred and session.resumes_on_request:
            self.tasks.spawn(self.request(session))
        else:
            self.timers.watch_window(session)
            self.timers.watch_archive(session)
            if is_closed and not self.transitions.is_moving(session):
                self._forget(session)

    def ended(self, session: Session) -> None:
        """Lists a terminated session for a while; then its row goes."""
        self.channels.close(session)
        self._forget(session)
        self.actions.archiving.tidy(session)
        if not session.is_aside:  # whose row goes when its files do (quarantine.py)
            self.timers.watch_purge(session)

    def discard(self, session: Session) -> None:
        """Discards a session that could not be stored, of which nobody was told."""
        self.routes.remove(session)
        self.store.forget_session(session)
        self._forget(session)

    def _forget(self, session: Session) -> None:
        """Forgets whatever is not stored of a session that is at rest."""
        self._work.pop(session.id, None)
        self.transitions.forget(session)
        self.liveness.forget(session.id)
        self.actions.forget(session)

    # ---- deadlines ----

    def _due(self, deadline: Deadline, name: str) -> None:
        session = self.store.sessions.get(name)
        if session is None:
            return
        if deadline is Deadline.IDLE:
            self._idle_due(session)
        elif deadline is Deadline.WINDOW:
            self.post(session, Event.WINDOW_OVER, reason_of(Event.WINDOW_OVER))
        elif deadline is Deadline.LIFETIME:
            self.post(session, Event.EXPIRED, reason_of(Event.EXPIRED))
        elif deadline is Deadline.ARCHIVE and session.state is State.SUSPENDED:
            self._start(session, lambda: self.actions.store_archive(session), is_at_rest=True)
        elif deadline is Deadline.RETRY and session.state is State.SUSPENDED:
            self.tasks.spawn(self.request(session))
        elif deadline is Deadline.OVERDUE:
            self._overdue(session)
        elif deadline is Deadline.LITTER:
            self.tasks.spawn(self.actions.archiving.clean(session))
        elif deadline is Deadline.PURGE and session.litter:  # which only the row knows
            self.timers.purge_later(session)
        elif deadline is Deadline.PURGE:
            self.routes.remove(session)
            self.store.drop_session(session)
            self.tasks.spawn(self.store.commit())

    def _overdue(self, session: Session) -> None:
        """Whatever a launch, resume or suspend waits for, it has an end, with a reason."""
        work = self._work_of(session)
        if session.state not in (State.PENDING, State.RESUMING, State.SUSPENDING):
            return
        log.error("work.overdue", session=session.id, state=session.state.value, last=self.actions.last_step(session))
        if work.task is not None:
            work.task.cancel()
        before = work.task
        self._start(session, lambda: self.actions.overdue(session, before))

    def _idle_due(self, session: Session) -> None:
        if session.state is not State.RUNNING or session.idle_policy is None:
            return
        last = self.liveness.last_active(session.id)
        if self._time() - last + 0.001 < session.idle_policy.max_idle:
            self.timers.watch_idle(session, last)
        else:
            self.post(session, Event.IDLE)

    # ---- what the edges and the host report ----

    def activity(self, worker: Hashable, report: Activity) -> None:
        for name, (count, seconds_ago, waiting) in report.sessions.items():
            session = self.store.sessions.get(name)
            if session is not None and not session.state.is_ended:
                self.liveness.report(worker, name, count, seconds_ago, waiting)

    def worker_left(self, worker: Hashable) -> None:
        self.liveness.worker_left(worker)

    async def request(self, session: Session) -> None:
        """Has this session resumed, for which a request is held; not before the next start where the service stops."""
        if self.is_stopping:
            return
        if session.state is State.SUSPENDED and (not session.resumes_on_request or session.refusal):
            return
        if session.state is State.SUSPENDING and self.transitions.is_request_deferred(session):
            return
        if session.state is State.SUSPENDED and not await self._take_room(session):
            self._retry(session)
            return
        await self.fire(session, Event.REQUEST)

    async def _take_room(self, session: Session) -> bool:
        try:
            if await self.room.take():
                return True
            log.warning("resume.no_room", id=session.id)
        except RpcError as error:
            log.warning("resume.host_away", id=session.id, error=str(error))
        return False

    def hypervisor_ended(self, ended: Ended) -> None:
        """One that had not run its guest yet costs nothing: who is about to start it hears that it is gone."""
        session = self.store.sessions.get(ended.session)
        if session is not None and session.incarnation == ended.incarnation and ended.has_run:
            self.post(session, Event.LOST, ended.reason)

    async def find_lost(self) -> None:
        """Ends sessions whose hypervisor has ended while vmm was away, which nobody else tells: they would count as running, and refuse
        every request. One that has moved meanwhile is its action's affair. Raises RpcError."""
        running = {one.id: one.incarnation for one in self.store.sessions.values() if one.state is State.RUNNING}
        held = {one.session: one.incarnation for one in (await patiently(self.host.state)).sessions}
        for identifier, incarnation in running.items():
            session = self.store.sessions.get(identifier)
            if session is None or session.state is not State.RUNNING or session.incarnation != incarnation:
                continue
            if held.get(identifier) != incarnation:
                self.post(session, Event.LOST, "The hypervisor of the MicroVM stopped while its host was restarted.")

    def exited(self, session: Session, code: int) -> None:
        """Ends the session of a guest whose application has ended."""
        self.post(session, Event.EXITED, exit_reason(code))

    def gone(self, session: Session) -> None:
        """Ends a session whose hypervisor ended while nobody watched it: with its vmm, say."""
        self.post(session, Event.LOST, "The hypervisor of the MicroVM stopped unexpectedly.")

    # ---- what others ask ----

    def agent(self, session: Session) -> Agent:
        """Returns the agent of a running session. Raises AgentError."""
        return self.channels.agent(session)

    def traces(self, session: Session) -> list[Steps]:
        return self.actions.traces(session)

    async def resumed(self, session: Session, seconds: float) -> None:
        """Returns when a resume that is under way has become something, or when the time is up."""
        work = self._work.get(session.id)
        if session.state is State.RESUMING and work is not None and work.task is not None:
            await asyncio.wait([work.task], timeout=seconds)

    # ---- ends ----

    async def quiet(self) -> None:
        """Waits until no session is in transition."""
        await self.tasks.quiet()

    async def close(self) -> None:
        await self.tasks.close()
        self.channels.close_all()
