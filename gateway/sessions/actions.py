"""What the table's actions do: launch, save, rest, wake, destroy. Each ends by firing what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from gateway.messages import EgressRules, HostState
from gateway.observe.steps import Steps

from . import hooks
from .agent import Agent, AgentError, wake_frame
from .ahead import Ahead
from .archive import Archive, ArchiveError
from .egress import rules_of
from .host import RpcError, RpcLost
from .lifecycle import Lifecycle, Live
from .logs import LineWriter
from .model import Session
from .states import Action, Event, State
from .store import StoreError

log = structlog.get_logger()

_SERVE_SECONDS = 0.01  # after a guest has woken
_WOKEN_SECONDS = 30.0  # a loaded host and an emulated guest; usually some 20 ms
_DESTROY_RETRY_SECONDS = 0.5
_AWAY_RETRY_SECONDS = 0.2
_AWAY_TRIES = 100
_SETTLE_RETRY_SECONDS = 1.0
T = TypeVar("T")


@dataclass
class Arrival:
    """A session that a call brings into being: its first commit, and whether its guest has been told to run, or will take a while."""

    stored: asyncio.Future[None]
    is_away: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_failed(self) -> bool:
        return self.stored.done() and self.stored.exception() is not None


class Actions:
    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._host = lifecycle.host
        self._settings = lifecycle.settings
        self._routes = lifecycle.routes
        # A herd on few cores is served best a few at a time (docs/architecture.md).
        self._turn = asyncio.Semaphore(2 * (os.cpu_count() or 1))
        self.archive: Archive | None = None
        self.ahead = Ahead(self._host, lifecycle.store, lifecycle.settings, lifecycle.spawn)
        lifecycle.actions = self.carry_out
        lifecycle.archive_it = self.archive_it

    async def carry_out(self, session: Session, action: Action, event: Event, detail: str) -> None:
        started = time.monotonic()
        try:
            await self._carry_out(session, action, event)
        except Exception:
            log.exception("action.failed", session=session.id, action=action.value)
            await self._settle_after_failure(session)
            if event is Event.REQUEST and session.state is State.SUSPENDED:
                self._lifecycle.retry_later(session)
        finally:
            self._lifecycle.on_action(action.value, time.monotonic() - started)

    async def _settle_after_failure(self, session: Session) -> None:
        """An action ended in a way that it does not know: the session is compared with its host until that works or something else
        has moved it. What was deferred until its hypervisor is gone does not wait for that any more."""
        state, live = session.state, self._lifecycle.live(session)
        while session.state is state:
            try:
                await self.settle(session)
                return
            except Exception:
                log.exception("settle.failed", session=session.id)
            if state is State.SUSPENDED and live.deferred:
                self._lifecycle.rested(session)
            await asyncio.sleep(_SETTLE_RETRY_SECONDS)

    async def _carry_out(self, session: Session, action: Action, event: Event) -> None:
        if action is Action.SAVE:
            await self.save(session, event)
        elif action is Action.REST:
            await self.rest(session)
        elif action is Action.WAKE:
            await self.wake(session, event)
        elif action is Action.DESTROY:
            await self.destroy(session, event)

    # ---- launch and wake ----

    async def launch(self, session: Session, arrival: Arrival | None = None) -> None:
        """From the image to RUNNING. Not started yet: incarnation 0 is stored until the guest is about to run. What is prepared beside the
        session's first commit goes again where that fails."""
        fire, begun = self._lifecycle.fire, False
        steps = self._steps(session, "launch")
        try:
            async with self._turn:
                steps.mark("turn")
                try:
                    await self._prepare_launch(session, steps, arrival)
                finally:
                    if arrival is not None:
                        await asyncio.shield(arrival.stored)
                await self._begin(session, Event.STARTED)
                begun = True
                steps.mark("start stored")
                if arrival is not None:
                    asyncio.get_running_loop().call_soon(arrival.is_away.set)
                await self._start(session, steps)
            await self.run_hook(session)
            steps.mark("run hook")
        except hooks.HookError as error:
            await fire(session, Event.FAILED, hooks.runtime_reason("run", error))
        except Exception as error:
            if not isinstance(error, RpcError | AgentError | StoreError):
                log.exception("launch.failed", session=session.id)
            if arrival is not None and arrival.has_failed:  # there is no such session
                await self._patiently(lambda: self._host.forget(session.id))
                return
            if begun and isinstance(error, RpcLost):
                await self.settle(session)
                return
            await fire(session, Event.FAILED, f"The MicroVM could not be launched: {error}")
        else:
            await fire(session, Event.STARTED)
            self._lifecycle.on_steps(session, steps)

    async def _prepare_launch(self, session: Session, steps: Steps, arrival: Arrival | None) -> None:
        """Raises RpcError."""
        if await self.ahead.claim(session, self._egress(session)):
            steps.mark("one that ran ahead")
            return
        if arrival is not None:
            arrival.is_away.set()
        await self._patiently(lambda: self._host.prepare(session.id, 1, session.image, False, self._egress(session)))
        steps.mark("prepared by the host")

    async def run_hook(self, session: Session) -> None:
        payload = {"microvmId": session.id, "runHookPayload": session.run_hook_payload}
        await self._hook(session, "run", payload)

    async def wake(self, session: Session, event: Event) -> None:
        """From the snapshot to RUNNING. Until `_begin` the snapshot is good and a failure leads back to SUSPENDED."""
        fire, begun = self._lifecycle.fire, False
        steps = self._steps(session, "resume")
        resting = self._lifecycle.live(session).resting
        if resting is not None:
            await asyncio.wait([resting])
        try:
            await self._fetch(session, steps)
            async with self._turn:
                steps.mark("turn")
                await self._patiently(lambda: self._host.prepare(
                    session.id, session.incarnation + 1, session.image, True, self._egress(session)
                ))  # fmt: skip
                steps.mark("prepared by the host")
                await self._begin(session, event)
                begun = True
                steps.mark("start stored")
                await self._start(session, steps)
            await self._hook(session, "resume")
            steps.mark("resume hook")
        except hooks.HookError as error:
            await fire(session, Event.FAILED, hooks.runtime_reason("resume", error))
        except (RpcError, AgentError, StoreError, ArchiveError) as error:
            await self._not_woken(session, event, error, begun)
        else:
            await fire(session, Event.RESUMED)
            self._lifecycle.on_steps(session, steps)

    async def _not_woken(self, session: Session, event: Event, error: Exception, begun: bool) -> None:
        if begun and isinstance(error, RpcLost):  # vmm is away; whether the guest runs is seen when it is back
            await self.settle(session)
            return
        if begun or (isinstance(error, RpcError) and error.kind == "StateLost"):
            await self._lifecycle.fire(session, Event.LOST, f"The MicroVM could not be resumed: {error}")
            return
        log.warning("resume.failed", session=session.id, error=str(error))
        await self._lifecycle.fire(session, Event.NOT_RESUMED, str(error))
        if event is Event.REQUEST:
            self._lifecycle.retry_later(session)

    async def _begin(self, session: Session, event: Event) -> None:
        """Stores that the next incarnation runs, before it does."""
        session.incarnation += 1
        incarnation = session.incarnation
        undo = self._lifecycle.record(session, event, State.SUSPENDED if session.incarnation > 1 else State.PENDING, "started")
        try:
            await self._lifecycle.store.commit(lambda: self._announce(session, incarnation))
        except StoreError:
            session.incarnation -= 1
            undo()
            raise

    def _announce(self, session: Session, incarnation: int) -> None:
        """To whoever holds requests, while the disk is waited for: connections are made, and their SYNs wait in the link."""
        if session.incarnation == incarnation:
            self._routes.publish(session, is_begun=True)

    def _steps(self, session: Session, work: str) -> Steps:
        steps = Steps("control", work)
        self._lifecycle.live(session).traces["suspend" if work == "suspend" else "wake"] = steps
        return steps

    async def _start(self, session: Session, steps: Steps | None = None) -> None:
        nonce = secrets.randbits(63)
        wake = wake_frame(nonce, reset_tcp=self._egress(session) is not None)
        agent = self.attach(session, await self._host.start(session.id, session.incarnation, wake))
        if steps is not None:
            steps.mark("cont")
        try:
            async with asyncio.timeout(_WOKEN_SECONDS):
                await agent.expect(nonce)
            if steps is not None:
                steps.mark("agent answered")
        except TimeoutError as error:
            raise AgentError(f"the guest did not answer in {_WOKEN_SECONDS:g} s after it was restored") from error
        self._serve_guest(session)

    def attach(self, session: Session, descriptor: int) -> Agent:
        """Reads a running guest's agent: its output goes to the logs, its end ends the session."""
        live = self._lifecycle.live(session)
        if live.agent is not None and live.agent.is_detached:  # its shells slept with it
            live.agent.attach(descriptor)
            return live.agent
        self._lifecycle.close_agent(live)
        writer = None
        if session.log_group is not None and session.log_stream is not None:
            writer = LineWriter(self._lifecycle.logs, session.account, session.log_group, session.log_stream)
        live.agent = Agent(
            descriptor,
            writer.feed if writer is not None else lambda channel, data: None,
            lambda code: self._lifecycle.exited(session, code),
        )
        if writer is not None:
            live.agent.closed.add_done_callback(lambda _: writer.flush())
        return live.agent

    def _egress(self, session: Session) -> EgressRules | None:
        return rules_of(self._settings.egress, self._lifecycle.store, session.egress)

    def _serve_guest(self, session: Session) -> None:
        """Its questions for metadata and names are answered once its first requests are on their way; until then they wait in its sockets'
        queues."""
        live = self._lifecycle.live(session)
        if live.agent is not None:
            self._lifecycle.spawn(self._serve(session, live, live.agent))

    async def _serve(self, session: Session, live: Live, agent: Agent) -> None:
        """As long as its agent is ours."""
        await asyncio.sleep(_SERVE_SECONDS)
        if live.agent is not agent:
            return
        try:
            sockets = await self._patiently(lambda: self._host.services(session.id, session.incarnation))
        except RpcError as error:
            log.warning("services.missing", session=session.id, error=str(error))
            return
        services = await self._lifecycle.serve_guest(session, sockets, self._egress(session))
        if live.agent is agent:
            live.services = services
        else:
            services.close()

    async def _hook(self, session: Session, name: str, payload: object = None) -> None:
        seconds = session.hooks.timeout(name)
        if seconds is not None:
            await hooks.call(
                lambda: self._host.socket(session.id, session.incarnation),
                name, session.hooks.port, seconds, str(uuid.uuid4()), payload,
            )  # fmt: skip

    # ---- save and rest ----

    async def save(self, session: Session, event: Event) -> None:
        """Gate, drain, hook, cut, snapshot. An idle suspend is called off by activity until the hook is sent."""
        live = self._lifecycle.live(session)
        idle = event is Event.IDLE
        fire = self._lifecycle.fire
        known = dict(live.counts)
        has_hook = session.hooks.timeout("suspend") is not None
        one_way = self._settings.sessions.streams_at_suspend == "park-all"
        patience = 0.0 if idle else self._settings.suspend.drain_seconds
        steps = self._steps(session, "suspend")
        gate, live.gate = live.gate, None
        answers, complete = await (gate or self._routes.close_gate(session, self._settings.suspend.gate_seconds))
        if idle:
            moved = any(answer.waiting or answer.count != known.get(worker, 0) for worker, answer in answers.items())
            if moved or not complete or self._wanted(live):
                await self._call_off(session, live)
                return
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
            if may_be_called_off and (not drained.quiet or self._wanted(live)):
                await self._call_off(session, live)
                return
            session.parked = drained.parked
            if drained.parked and drained.spoken:  # to an application that may not have had the time to answer
                live.deferred.append(Event.REQUEST)
            if live.agent is not None and live.agent.shells.count:
                await live.agent.quiet(_WOKEN_SECONDS)
            steps.mark("streams parked or cut")
            saved = await self._host.suspend(session.id, session.incarnation)
            steps.mark("saved by the host")
        except hooks.HookError as error:
            await fire(session, Event.FAILED, hooks.runtime_reason("suspend", error))
        except AgentError as error:
            await self._not_saved(session, RpcError("AgentError", str(error)))
        except RpcError as error:
            await self._not_saved(session, error)
        else:
            session.suspended_at = self._lifecycle.clock()
            if session.suspended_by != "stop" or idle:
                session.suspended_by = "idle" if idle else "api"
            session.snapshot_bytes = saved.memory_bytes + saved.state_bytes + saved.disk_bytes
            await fire(session, Event.SAVED)
            self._lifecycle.on_steps(session, steps)

    def _may_park(self, session: Session) -> int:
        """Streams at each worker: none where no request may wake the session, for they would never go on."""
        settings = self._settings.sessions
        is_over = session.idle_policy is not None and session.idle_policy.suspended == 0
        may = settings.streams_at_suspend != "cut" and session.resumes_on_request and not is_over
        return settings.parked_streams if may and session.suspended_by != "stop" else 0  # at a stop the workers go too

    def _wanted(self, live: Live) -> bool:
        return Event.REQUEST in live.deferred or Event.RESUME in live.deferred

    async def _call_off(self, session: Session, live: Live) -> None:
        live.deferred = [event for event in live.deferred if event not in (Event.REQUEST, Event.RESUME)]
        await self._lifecycle.fire(session, Event.CALLED_OFF)

    async def _not_saved(self, session: Session, error: RpcError) -> None:
        log.warning("suspend.failed", session=session.id, error=str(error))
        if error.kind == "StateLost":
            await self._lifecycle.fire(session, Event.LOST, f"The MicroVM could not be suspended: {error}")
            return
        if isinstance(error, RpcLost):
            # vmm is away; whether the snapshot was made is seen when it is back.
            await self.settle(session)
            return
        live = self._lifecycle.live(session)
        live.deferred = [e for e in live.deferred if e not in (Event.REQUEST, Event.RESUME)]
        await self._lifecycle.fire(session, Event.NOT_SAVED, str(error))

    async def rest(self, session: Session) -> None:
        live = self._lifecycle.live(session)
        if live.agent is not None and live.agent.shells.count:
            live.agent.detach()
        await self._rest(session)
        if _is_over(session):
            await self._lifecycle.fire(session, Event.WINDOW_OVER, "MicroVM exceeded maximum lifetime.")
            return
        self._lifecycle.rested(session)

    async def _rest(self, session: Session) -> None:
        keep = not _is_over(session) and session.suspended_by != "stop"
        await self._patiently(lambda: self._host.rest(session.id, session.incarnation, keep, session.parked > 0))

    # ---- the archive ----

    async def archive_it(self, session: Session) -> None:
        """A session that has slept for long: to the object store, then named in its row, then its files go. A request that comes
        meanwhile waits for the end of it, as it does for a hypervisor's."""
        live = self._lifecycle.live(session)
        try:
            if self.archive is None or not await self._has_left(session) or session.state is not State.SUSPENDED:
                return
            archived = await self.archive.store(session)
            if session.state is not State.SUSPENDED:
                await self.archive.forget(archived)
                return
            session.archived = archived
            self._lifecycle.store.put_session(session)
            await self._lifecycle.store.commit()
            await self._patiently(lambda: self._host.forget(session.id))
        except (RpcError, ArchiveError, StoreError) as error:
            log.warning("archive.failed", session=session.id, error=str(error))
        finally:
            live.resting = None

    async def _has_left(self, session: Session) -> bool:
        """Whether no client holds a parked stream of the session any more: its network could not outlive its files. The workers are
        asked; where one holds some or is missing, the archive is due once more later."""
        if session.parked:
            left = await self._routes.parked_streams(session)
            if left is not None:
                session.parked = left
            if left != 0:
                self._lifecycle.archive_later(session)
        return session.parked == 0

    async def _fetch(self, session: Session, steps: Steps) -> None:
        """Raises ArchiveError, RpcError, StoreError; the session sleeps on then, archived as it was."""
        archived = session.archived
        if archived is None or self.archive is None:
            return
        await self.archive.fetch(session, archived)
        session.archived = None
        self._lifecycle.store.put_session(session)
        try:
            await self._lifecycle.store.commit()
        except StoreError:
            session.archived = archived
            raise
        steps.mark("fetched from the archive")
        self._lifecycle.spawn(self.archive.forget(archived))

    # ---- destroy ----

    async def destroy(self, session: Session, event: Event) -> None:
        """The terminate hook where the guest still runs, then everything of the session goes; never given up."""
        live = self._lifecycle.live(session)
        if live.resting is not None:  # what it puts into the object store would be nobody's
            await asyncio.wait([live.resting])
        if live.agent is not None and event in (Event.TERMINATE, Event.EXPIRED):
            await self._routes.drain(session, 0, cut=True)
            with contextlib.suppress(hooks.HookError, RpcError):
                await self._hook(session, "terminate")
        while True:
            try:
                await self._host.forget(session.id)
                break
            except RpcError as error:
                log.warning("destroy.retry", session=session.id, error=str(error))
                await asyncio.sleep(_DESTROY_RETRY_SECONDS)
        if session.archived is not None and self.archive is not None:
            await self.archive.forget(session.archived)
        await self._lifecycle.fire(session, Event.CLEANED)

    # ---- after a restart ----

    async def settle(self, session: Session, state: HostState | None = None) -> None:
        """Compares a session with what the host has of it, and goes on from there."""
        if state is None:
            state = await self._patiently(self._host.state)
        held = next((one for one in state.sessions if one.session == session.id), None)
        saved = state.snapshots.get(session.id)
        fire = self._lifecycle.fire
        if session.state is State.PENDING and session.incarnation == 0:
            if held is not None:
                await self._host.forget(session.id)
            await self.launch(session)
        elif session.state is State.TERMINATING:
            await self.destroy(session, Event.LOST)
        elif session.state is State.SUSPENDED:
            if held is not None and held.phase == "stopped" and saved == session.incarnation:
                await self._rest(session)  # which was interrupted
            elif held is not None and held.phase != "warm":
                await self._host.kill(session.id, held.incarnation)
            if saved != session.incarnation and session.archived is None:
                await fire(session, Event.LOST, "The snapshot of the MicroVM is not on this host any more.")
            elif session.suspended_by == "stop":  # by our own stop: as it was before
                session.suspended_by = "api"
                await fire(session, Event.RESUME)
            else:
                self._lifecycle.rested(session)
        elif session.state is State.RESUMING and (saved == session.incarnation or session.archived is not None):
            if held is not None:  # prepared, and not told to run: the snapshot is good
                await self._host.kill(session.id, held.incarnation)
            await fire(session, Event.NOT_RESUMED)
        elif session.state is State.SUSPENDING and saved == session.incarnation and (held is None or held.phase == "stopped"):
            session.suspended_at = self._lifecycle.clock()
            session.suspended_by = session.suspended_by or "api"
            await fire(session, Event.SAVED)
        elif held is None or held.incarnation != session.incarnation:
            await fire(session, Event.LOST, "The MicroVM was lost when its host stopped.")
        else:
            await self._take_over(session, held.phase)

    async def _take_over(self, session: Session, phase: str) -> None:
        """A guest that went on while control was away."""
        fire = self._lifecycle.fire
        try:
            if phase == "prepared":
                await self._start(session)
            else:
                if phase == "stopped":
                    await self._host.unpause(session.id, session.incarnation)
                agent = self.attach(session, await self._host.agent(session.id, session.incarnation))
                state, code = await agent.hello(_WOKEN_SECONDS)
                if state == 2:
                    self._lifecycle.exited(session, code)
                    return
                self._serve_guest(session)
            if session.state is State.PENDING:
                await self.run_hook(session)
                await fire(session, Event.STARTED)
            elif session.state is State.RESUMING:
                await self._hook(session, "resume")
                await fire(session, Event.RESUMED)
            elif session.state is State.SUSPENDING:
                await fire(session, Event.CALLED_OFF)
            else:
                self._lifecycle.adopted(session)
        except hooks.HookError as error:
            await fire(session, Event.FAILED, hooks.runtime_reason("run" if session.state is State.PENDING else "resume", error))
        except (RpcError, AgentError) as error:
            await fire(session, Event.LOST, f"The MicroVM could not be taken over: {error}")

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Asks again while vmm is away: it restarts, and every call is idempotent."""
        for _ in range(_AWAY_TRIES):
            try:
                return await call()
            except RpcLost:
                await asyncio.sleep(_AWAY_RETRY_SECONDS)
        raise RpcLost("vmm did not come back")


def _is_over(session: Session) -> bool:
    """Its suspended window is nothing: it ends when it falls asleep."""
    policy = session.idle_policy
    return policy is not None and session.suspended_by == "idle" and policy.suspended == 0
