"""What the table's actions do: launch, save, rest, wake, archive, destroy, set aside. Each returns what became of it; who starts one
applies that.

An action depends on the transitions for what has to be stored or closed on its way (the next incarnation, the gate), and on nothing that
decides when it runs.

An error of the host ends a session only where it says that there is no way on (`ends_session`). Any other leads back to where the session
was, or, where that is not known, to a comparison with its host that is made again until it is, or until the operation's time is up.
`forget`, which deletes, follows the user's word or the policy's alone, or what was never saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import structlog

from gateway.config import Settings
from gateway.messages import HostState, SessionState, Suspended
from gateway.observe.steps import Steps
from gateway.tasks import Tasks

from . import hooks
from .agent import EXITED, AgentError, wake_frame
from .ahead import Ahead
from .archive import Archive, ArchiveDamaged, ArchiveError
from .archiving import Archiving, Moved
from .channels import Channels
from .host import Host, RpcError, RpcLost, ends_session, grown, is_refused, patiently
from .liveness import Liveness
from .model import Session
from .routes import Routes
from .states import MAX_LIFETIME, Action, Event, State, exit_reason
from .store import Store, StoreError
from .transitions import Observer, Transitions

log = structlog.get_logger()

_WOKEN_SECONDS = 30.0  # a loaded host and an emulated guest; usually some 20 ms
_HEARD_SECONDS = 5.0
_DESTROY_RETRY_SECONDS = 0.5
_SETTLE_RETRY_SECONDS = 1.0
_RETRY_MOST_SECONDS = 15.0
_SETTLE_SECONDS = 300.0  # for what is not known of a launch, resume or suspend to be known; then it ends with a reason
_TURN_SECONDS = 600.0
_WORK_SECONDS = 1800.0
_AGAIN = "; nothing of it is lost: try again"
_UNDER_WAY = {State.PENDING: "launched", State.RESUMING: "resumed", State.SUSPENDING: "suspended"}


@dataclass
class Arrival:
    """A session that a call brings into being: its first commit, and whether its guest has been told to run, or will take a while."""

    stored: asyncio.Future[None]
    is_away: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_failed(self) -> bool:
        return self.stored.done() and self.stored.exception() is not None


@dataclass(frozen=True)
class Fired:
    """An action ended with an event of the table."""

    event: Event
    detail: str = ""
    steps: Steps | None = None


class End(Enum):
    """An action ended, and the session keeps the state that it has."""

    ADOPTED = auto()  # it runs, and ran on while control was away
    RESTED = auto()  # it sleeps, and its hypervisor is gone or stays paused
    POSTPONED = auto()  # it cannot be archived now
    NOT_ARCHIVED = auto()  # it could not be archived
    NOTHING = auto()


Outcome = Fired | End


class Actions:
    def __init__(
        self, settings: Settings, store: Store, host: Host, routes: Routes, transitions: Transitions, channels: Channels,
        liveness: Liveness, ahead: Ahead, archive: Archive | None, tasks: Tasks, observer: Observer, clock: Callable[[], float],
        clean_later: Callable[[Session, int], None],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._store = store
        self._host = host
        self._routes = routes
        self._transitions = transitions
        self._channels = channels
        self._liveness = liveness
        self._ahead = ahead
        self.archiving = Archiving(store, host, routes, archive, tasks, clean_later, transitions.is_moving)
        self._tasks = tasks
        self._observer = observer
        self._clock = clock
        self._traces: dict[str, dict[str, Steps]] = {}
        self._loop = asyncio.get_running_loop()
        # A herd on few cores is served best a few at a time (docs/architecture.md).
        self._turns = asyncio.Semaphore(2 * (os.cpu_count() or 1))

    async def carry_out(self, session: Session, action: Action, event: Event, before: asyncio.Task[None] | None) -> Outcome:
        """Carries out an action; `before` is work on the sleeping session that is under way. Raises nothing: an action that ends in a way
        that it does not know is followed by a comparison of the session with its host."""
        started = time.monotonic()
        try:
            if action is Action.SAVE:
                return await self.save(session, event)
            if action is Action.REST:
                return await self.rest(session)
            if action is Action.WAKE:
                return await self.wake(session, event, before)
            if action is Action.SET_ASIDE:
                return await self.set_aside(session, before)
            return await self.destroy(session, event, before)
        except Exception as error:
            _log_failure("action.failed", session, error, action=action.value)
            return await self._settle_after_failure(session, str(error))
        finally:
            self._observer.action(action.value, time.monotonic() - started)

    async def _settle_after_failure(self, session: Session, why: str = "") -> Outcome:
        """Compares the session with its host until that works or something else has moved it, or until it can be ended with a reason. An
        event that was deferred until the hypervisor has ended does not wait for that any more. Meanwhile the session's reason says what
        stands."""
        state, pause = session.state, _SETTLE_RETRY_SECONDS
        end = self._loop.time() + _SETTLE_SECONDS
        while session.state is state:
            if why and state in _UNDER_WAY:
                session.reason = f"The MicroVM is still being {_UNDER_WAY[state]}: {why}; it is tried again"
            try:
                return await self.settle(session)
            except Exception as error:
                why = str(error)
                _log_failure("settle.failed", session, error)
            if state is State.SUSPENDED and self._transitions.has_deferred(session):
                return End.RESTED
            if self._loop.time() > end:
                with contextlib.suppress(RpcError):
                    if (outcome := await self._give_up(session, why)) is not None:
                        return outcome
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MOST_SECONDS)
        return End.NOTHING

    def bound(self, session: Session) -> float:
        """More seconds than all that bounds the steps of a launch, resume or suspend together."""
        return _WORK_SECONDS + sum(session.hooks.enabled.values()) + 4 * grown(0, max(_memory_bytes(session), session.snapshot_bytes))

    def last_step(self, session: Session) -> str:
        """Returns the last step that was taken for a session."""
        steps = max(self.traces(session), key=lambda trace: trace.started_at, default=None)
        return steps.steps[-1].what if steps is not None and steps.steps else "none"

    async def overdue(self, session: Session, before: asyncio.Task[None] | None) -> Outcome:
        """Goes on for an action that was stopped because it did not get on."""
        if before is not None:
            await asyncio.wait([before])
        why = f"nothing was heard after this step: {self.last_step(session)}"
        if session.state is State.PENDING:
            return Fired(Event.FAILED, f"The MicroVM could not be launched: {why}")
        if session.state is State.RESUMING and not self._transitions.has_begun(session):
            return Fired(Event.NOT_RESUMED, f"The MicroVM could not be resumed: {why}{_AGAIN}")
        return await self._settle_after_failure(session, why)

    async def _give_up(self, session: Session, why: str) -> Outcome | None:
        """Ends what has not got on in its time, from what the host says of it; None where that says nothing yet. Raises RpcError: while
        the host is silent, whether a guest has run its session's snapshot out of date is not known, and it is asked again."""
        if session.state is State.PENDING:
            return Fired(Event.FAILED, f"The MicroVM could not be launched: {why}")
        if session.state not in (State.RESUMING, State.SUSPENDING):
            return None
        held = _held(await self._host.state(), session)
        if held is None or held.incarnation != session.incarnation:
            return None
        if session.state is State.SUSPENDING:
            return Fired(Event.NOT_SAVED, why) if held.phase == "running" else None
        if held.phase == "prepared":
            return await self._take_back(session, why)
        return Fired(Event.LOST, f"The MicroVM was resumed, and does not answer: {why}")

    def traces(self, session: Session) -> list[Steps]:
        """Returns the traces of the last launch or resume and of the last suspend, as long as they are remembered."""
        return list(self._traces.get(session.id, {}).values())

    def forget(self, session: Session) -> None:
        """Drops what is remembered of a session that is at rest or gone."""
        self._traces.pop(session.id, None)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Raises RpcError where those before take too long."""
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError as error:
            raise RpcError("Unavailable", f"the host was busy for {_TURN_SECONDS:g} s") from error
        try:
            yield
        finally:
            self._turns.release()

    # ---- launch and wake ----

    async def launch(self, session: Session, arrival: Arrival | None = None) -> Outcome:
        """Brings a session from its image to RUNNING. Incarnation 0 is stored until the guest is about to run: it has not started yet. What
        is prepared beside the session's first commit goes again where that fails."""
        begun = False
        steps = self._steps(session, "launch")
        try:
            async with self._turn():
                steps.mark("turn")
                try:
                    await self._prepare_launch(session, steps, arrival)
                finally:
                    if arrival is not None:
                        await asyncio.shield(arrival.stored)
                await self._transitions.begin(session, Event.STARTED)
                begun = True
                steps.mark("start stored")
                if arrival is not None:
                    asyncio.get_running_loop().call_soon(arrival.is_away.set)
                await self._start(session, steps)
            await self._run_hook(session)
            steps.mark("run hook")
        except hooks.HookError as error:
            return Fired(Event.FAILED, hooks.runtime_reason("run", error))
        except Exception as error:
            if not isinstance(error, RpcError | AgentError | StoreError):
                log.exception("launch.failed", session=session.id)
            if arrival is not None and arrival.has_failed:  # there is no such session
                await patiently(lambda: self._host.forget(session.id))
                return End.NOTHING
            if begun and isinstance(error, RpcError | AgentError) and not ends_session(error):
                return await self._settle_after_failure(session, str(error))
            return Fired(Event.FAILED, f"The MicroVM could not be launched: {error}")
        return Fired(Event.STARTED, steps=steps)

    async def _prepare_launch(self, session: Session, steps: Steps, arrival: Arrival | None) -> None:
        """Prepares a launch at the host. Raises RpcError."""
        if await self._ahead.claim(session, self._channels.egress(session)):
            steps.mark("one that ran ahead")
            return
        if arrival is not None:
            arrival.is_away.set()
        await patiently(lambda: self._host.prepare(session.id, 1, session.image, False, self._channels.egress(session)))
        steps.mark("prepared by the host")

    async def _run_hook(self, session: Session) -> None:
        await self._hook(session, "run", {"microvmId": session.id, "runHookPayload": session.run_hook_payload})

    async def wake(self, session: Session, event: Event, before: asyncio.Task[None] | None = None) -> Outcome:
        """Brings a session from its snapshot to RUNNING. Until the next incarnation is stored the snapshot is good, and a failure leads
        back to SUSPENDED."""
        begun = False
        steps = self._steps(session, "resume")
        if before is not None:
            await asyncio.wait([before])
        try:
            await self.archiving.fetch(session, steps)
            async with self._turn():
                steps.mark("turn")
                await patiently(lambda: self._host.prepare(
                    session.id, session.incarnation + 1, session.image, True, self._channels.egress(session), session.snapshot_bytes
                ))  # fmt: skip
                steps.mark("prepared by the host")
                await self._transitions.begin(session, event)
                begun = True
                steps.mark("start stored")
                await self._start(session, steps)
            await self._hook(session, "resume")
            steps.mark("resume hook")
        except hooks.HookError as error:
            return Fired(Event.FAILED, hooks.runtime_reason("resume", error))
        except (RpcError, AgentError, StoreError, ArchiveError) as error:
            return await (self._not_run if begun else self._not_prepared)(session, error)
        return Fired(Event.RESUMED, steps=steps)

    async def _not_prepared(self, session: Session, error: Exception) -> Outcome:
        """Nothing of the next incarnation has run or is stored: the session sleeps on, unless its files are no snapshot any more."""
        if ends_session(error):
            return Fired(Event.LOST, f"The MicroVM could not be resumed: {error}")
        log.warning("resume.failed", session=session.id, error=str(error))
        if isinstance(error, StoreError | RpcLost):  # it may be prepared, which the next resume would find, or nobody
            with contextlib.suppress(RpcError):
                await patiently(lambda: self._host.kill(session.id, session.incarnation + 1))
        session.refusal = str(error) if is_refused(error) or isinstance(error, ArchiveDamaged) else ""
        again = f"; then `torpor resume {session.id}` or the next start tries again" if session.refusal else _AGAIN
        return Fired(Event.NOT_RESUMED, f"The MicroVM could not be resumed: {error}{again}")

    async def _not_run(self, session: Session, error: Exception) -> Outcome:
        """The next incarnation is stored, and may have run. What the host says of it decides."""
        if isinstance(error, RpcError) and error.kind == "NeverRan":
            return await self._take_back(session, str(error))
        if ends_session(error):
            return Fired(Event.LOST, f"The MicroVM could not be resumed: {error}")
        log.warning("resume.asked_again", session=session.id, error=str(error))
        return await self._settle_after_failure(session, str(error))

    async def _take_back(self, session: Session, why: str) -> Outcome:
        """Ends an incarnation whose guest was never told to run: the snapshot before it is good. Raises RpcError."""
        await patiently(lambda: self._host.kill(session.id, session.incarnation))
        session.incarnation -= 1
        return Fired(Event.NOT_RESUMED, f"The MicroVM could not be resumed: {why}{_AGAIN}")

    def _steps(self, session: Session, work: str) -> Steps:
        steps = Steps("control", work)
        self._traces.setdefault(session.id, {})["suspend" if work == "suspend" else "wake"] = steps
        return steps

    async def _start(self, session: Session, steps: Steps | None = None) -> None:
        """Lets a prepared guest run, and waits until it has woken. Raises RpcError, AgentError."""
        nonce = secrets.randbits(63)
        wake = wake_frame(nonce, reset_tcp=self._channels.egress(session) is not None)
        descriptor = await self._host.start(session.id, session.incarnation, wake, session.snapshot_bytes)
        agent = self._channels.attach(session, descriptor)
        if steps is not None:
            steps.mark("cont")
        try:
            async with asyncio.timeout(_WOKEN_SECONDS):
                await agent.expect(nonce)
            if steps is not None:
                steps.mark("agent answered")
        except TimeoutError as error:
            raise AgentError(f"the guest did not answer in {_WOKEN_SECONDS:g} s after it was restored") from error
        self._channels.serve_guest(session)

    async def _hook(self, session: Session, name: str, payload: object = None) -> None:
        """Calls a runtime hook where the image has it. Raises HookError."""
        seconds = session.hooks.timeout(name)
        if seconds is not None:
            await hooks.call(
                lambda: self._host.socket(session.id, session.incarnation),
                name, session.hooks.port, seconds, str(uuid.uuid4()), payload,
            )  # fmt: skip

    # ---- save and rest ----

    async def save(self, session: Session, event: Event) -> Outcome:
        """Suspends a session: gate, drain, hook, cut, snapshot. An idle suspend is called off by activity until the hook is sent."""
        idle = event is Event.IDLE
        known = self._liveness.counts(session.id)
        has_hook = session.hooks.timeout("suspend") is not None
        one_way = self._settings.sessions.streams_at_suspend == "park-all"
        patience = 0.0 if idle else self._settings.suspend.drain_seconds
        steps = self._steps(session, "suspend")
        answers, complete = await self._transitions.close_gate(session)
        if idle:
            moved = any(answer.waiting or answer.count != known.get(worker, 0) for worker, answer in answers.items())
            if moved or not complete or self._transitions.is_wake_deferred(session):
                return self._called_off(session)
        elif has_hook:
            await self._routes.drain(session, patience, cut=False, park=self._may_park(session), one_way=one_way)
            patience = 0.0
        steps.mark("gate closed, answers drained")
        try:
            await self._hook(session, "suspend")
            steps.mark("suspend hook")
            may_be_called_off = idle and not has_hook
            park = self._may_park(session)
            drained = await self._routes.drain(session, patience, cut=True, park=park, if_quiet=may_be_called_off, one_way=one_way)
            if may_be_called_off and (not drained.quiet or self._transitions.is_wake_deferred(session)):
                return self._called_off(session)
            session.parked = drained.parked
            if drained.parked and drained.spoken:  # to an application that may not have had the time to answer
                self._transitions.defer(session, Event.REQUEST)
            await self._channels.quiet(session, _WOKEN_SECONDS)
            steps.mark("streams parked or cut")
            saved = await self._host.suspend(session.id, session.incarnation, _memory_bytes(session))
            steps.mark("saved by the host")
        except hooks.HookError as error:
            return Fired(Event.FAILED, hooks.runtime_reason("suspend", error))
        except (AgentError, RpcError) as error:
            return await self._not_saved(session, error)
        if session.suspended_by != "stop" or idle:
            session.suspended_by = "idle" if idle else "api"
        self._note_saved(session, saved)
        return Fired(Event.SAVED, steps=steps)

    def _note_saved(self, session: Session, saved: Suspended) -> None:
        session.suspended_at = self._clock()
        session.snapshot_bytes = saved.memory_bytes + saved.state_bytes + saved.disk_bytes

    def _may_park(self, session: Session) -> int:
        """Returns how many streams may be parked at each worker: none where no request may wake the session, for they would never go on."""
        settings = self._settings.sessions
        may = settings.streams_at_suspend != "cut" and session.resumes_on_request
        has_window = session.idle_policy is None or session.idle_policy.suspended > 0
        return settings.parked_streams if may and has_window and session.suspended_by != "stop" else 0  # at a stop the workers go too

    def _called_off(self, session: Session) -> Outcome:
        self._transitions.drop_wakes(session)
        return Fired(Event.CALLED_OFF)

    async def _not_saved(self, session: Session, error: AgentError | RpcError) -> Outcome:
        log.warning("suspend.failed", session=session.id, error=str(error))
        if isinstance(error, RpcError) and error.kind == "Ended":  # where files are missing, the guest runs on all the same
            return Fired(Event.LOST, f"The MicroVM could not be suspended: {error}")
        if isinstance(error, RpcLost):  # vmm is away, or needs longer: whether the snapshot was made is seen by asking again
            return await self._settle_after_failure(session, str(error))
        held = _held(await patiently(self._host.state), session)
        if held is not None and held.phase == "stopped":
            await patiently(lambda: self._host.unpause(session.id, session.incarnation))
        if not await self._channels.is_heard(session, _HEARD_SECONDS):  # a snapshot may end the channel (Firecracker's vsock)
            return await self._settle_after_failure(session, str(error))
        self._transitions.drop_wakes(session)
        return Fired(Event.NOT_SAVED, str(error))

    async def rest(self, session: Session) -> Outcome:
        """Ends the hypervisor of a session that was just saved, or lets the host keep it paused."""
        self._channels.detach(session)
        await self._rest(session)
        return Fired(Event.WINDOW_OVER, MAX_LIFETIME) if _ends_asleep(session) else End.RESTED

    async def _rest(self, session: Session) -> None:
        keep = not _ends_asleep(session) and session.suspended_by != "stop"
        await patiently(lambda: self._host.release_vm(session.id, session.incarnation, keep, session.parked > 0))

    # ---- the archive ----

    async def store_archive(self, session: Session) -> Outcome:
        moved = await self.archiving.put(session)
        return {Moved.DONE: End.NOTHING, Moved.LATER: End.POSTPONED, Moved.FAILED: End.NOT_ARCHIVED}[moved]

    # ---- destroy ----

    async def destroy(self, session: Session, event: Event, before: asyncio.Task[None] | None = None) -> Outcome:
        """Calls the terminate hook and sends the stop signal where the guest still runs, then has everything of the session go, and tries
        until that is done."""
        if before is not None:  # what it puts into the object store would be nobody's
            await asyncio.wait([before])
        if self._channels.is_attached(session) and event in (Event.TERMINATE, Event.EXPIRED):
            await self._routes.drain(session, 0, cut=True)
            with contextlib.suppress(hooks.HookError, RpcError):
                await self._hook(session, "terminate")
            with contextlib.suppress(AgentError):
                await self._channels.stop(session, self._settings.sessions.stop_seconds)
        await self._insist(session, lambda: self._host.forget(session.id))
        self.archiving.disown(session)
        return Fired(Event.CLEANED)

    async def set_aside(self, session: Session, before: asyncio.Task[None] | None = None) -> Outcome:
        """Ends the hypervisor of a session that an error has ended, and moves its files to the quarantine. An archive stays where it is."""
        if before is not None:
            await asyncio.wait([before])
        reason = session.reason or "The MicroVM was lost."
        await self._insist(session, lambda: self._host.quarantine(session.id, session.incarnation, session.image, reason))
        return Fired(Event.CLEANED)

    async def _insist(self, session: Session, call: Callable[[], Awaitable[object]]) -> None:
        """Makes a call until it is done."""
        pause = _DESTROY_RETRY_SECONDS
        while True:
            try:
                await call()
                return
            except Exception as error:
                if isinstance(error, RpcError) and error.kind == "Missing":  # there are no files
                    return
                _log_failure("end.retry", session, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MOST_SECONDS)

    # ---- after a restart, or a failure ----

    async def settled(self, session: Session, state: HostState | None = None) -> Outcome:
        """Does what `settle` does, until it works."""
        try:
            return await self.settle(session, state)
        except Exception as error:
            _log_failure("settle.failed", session, error)
            return await self._settle_after_failure(session, str(error))

    async def settle(self, session: Session, state: HostState | None = None) -> Outcome:
        """Compares a session with what the host has of it, and goes on from there."""
        if state is None:
            state = await patiently(self._host.state)
        held = _held(state, session)
        saved = state.snapshots.get(session.id)
        if session.state is State.PENDING and session.incarnation == 0:
            if held is not None:
                await self._host.forget(session.id)
            return await self.launch(session)
        if session.state is State.TERMINATING:
            return await (self.set_aside(session) if session.is_aside else self.destroy(session, Event.LOST))
        if session.state is State.SUSPENDED:
            return await self._settle_asleep(session, held, saved)
        if session.state is State.RESUMING and (saved == session.incarnation or session.archived is not None):
            if held is not None:  # prepared, and not told to run: the snapshot is good
                await self._host.kill(session.id, held.incarnation)
            return Fired(Event.NOT_RESUMED)
        if session.state is State.SUSPENDING and (held is None or held.phase in ("saving", "stopped")):
            if saved != session.incarnation and held is not None and held.incarnation == session.incarnation:
                # The snapshot is being written, or who wrote it is gone: asked again, the host goes on with it.
                self._note_saved(session, await self._host.suspend(session.id, session.incarnation, _memory_bytes(session)))
                saved = session.incarnation
            if saved == session.incarnation:
                session.suspended_at = session.suspended_at or self._clock()
                session.suspended_by = session.suspended_by or "api"
                return Fired(Event.SAVED)
        if held is None or held.incarnation != session.incarnation:
            return Fired(Event.LOST, "The MicroVM was lost when its host stopped.")
        return await self._take_over(session, held.phase)

    async def _settle_asleep(self, session: Session, held: SessionState | None, saved: int | None) -> Outcome:
        if held is not None and held.phase == "stopped" and saved == session.incarnation:
            await self._rest(session)  # which was interrupted
        elif held is not None and held.phase != "warm":
            await self._host.kill(session.id, held.incarnation)
        if saved != session.incarnation and session.archived is None:
            return Fired(Event.LOST, _why_not_here(session, saved))
        if session.suspended_by == "stop":  # by our own stop: as it was before
            session.suspended_by = "api"
            return Fired(Event.RESUME)
        return End.RESTED

    async def _take_over(self, session: Session, phase: str) -> Outcome:
        """Takes over a guest that went on while control was away. Raises RpcError and AgentError for what passes."""
        try:
            if phase in ("prepared", "starting"):  # the latter may run, but nobody has heard that it was woken
                await self._start(session)
            else:
                if phase in ("saving", "stopped"):
                    await self._host.unpause(session.id, session.incarnation)
                agent = self._channels.attach(session, await self._host.agent(session.id, session.incarnation))
                state, code = await agent.hello(_WOKEN_SECONDS)
                if state == EXITED:
                    return Fired(Event.EXITED, exit_reason(code))
                self._channels.serve_guest(session)
            if session.state is State.PENDING:
                await self._run_hook(session)
                return Fired(Event.STARTED)
            if session.state is State.RESUMING:
                await self._hook(session, "resume")
                return Fired(Event.RESUMED)
            return Fired(Event.CALLED_OFF) if session.state is State.SUSPENDING else End.ADOPTED
        except hooks.HookError as error:
            return Fired(Event.FAILED, hooks.runtime_reason("run" if session.state is State.PENDING else "resume", error))
        except RpcError as error:
            if not ends_session(error):
                raise
            return Fired(Event.LOST, f"The MicroVM could not be taken over: {error}")


def _ends_asleep(session: Session) -> bool:
    """Whether the session's policy gives it no time asleep: it is terminated once it is saved."""
    policy = session.idle_policy
    return policy is not None and session.suspended_by == "idle" and policy.suspended == 0


def _why_not_here(session: Session, saved: int | None) -> str:
    """Why a sleeper cannot be woken from the snapshot that the host has of it, or has not."""
    if saved is None:
        return "The snapshot of the MicroVM is not on this host any more."
    known, age = session.incarnation, "a later" if saved > session.incarnation else "an earlier"
    return (
        f"The files of the MicroVM are of incarnation {saved}, {age} one than the store knows ({known}): the store and the disks are of "
        f"different times. They are set aside, and `torpor recover {session.id}` brings them back."
    )


def _held(state: HostState, session: Session) -> SessionState | None:
    return next((held for held in state.sessions if held.session == session.id), None)


def _memory_bytes(session: Session) -> int:
    """Returns the most that a snapshot may have to write: all memory that the guest sees, which is four times the size asked for."""
    return 4 * session.minimum_mib << 20


def _log_failure(event: str, session: Session, error: Exception, **facts: str) -> None:
    """A traceback only for what is not understood."""
    if isinstance(error, RpcError | AgentError | StoreError):
        log.warning(event, session=session.id, error=str(error), **facts)
    else:
        log.exception(event, session=session.id, **facts)
