"""What control keeps of guests that run: the channel to each one's agent, and what answers its questions for metadata and names."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from gateway.config import Egress
from gateway.messages import EgressRules
from gateway.tasks import Tasks

from .agent import EXITED, Agent, AgentError
from .egress import has_hosts, rules_of
from .host import Host, RpcError, ends_session, patiently
from .line_writer import LineWriter
from .logs import LogStore
from .model import Session
from .states import State
from .store import Store

log = structlog.get_logger()

_SERVE_SECONDS = 0.01  # after a guest has woken
_AGAIN_SECONDS, _AGAIN_MOST_SECONDS = 0.05, 15.0
_HELLO_SECONDS = 30.0


class GuestServices(Protocol):
    """Answers a running guest on sockets of its own network."""

    def close(self) -> None: ...


OpenServices = Callable[[Session, list[socket.socket], EgressRules | None], Awaitable[GuestServices]]


class Channels:
    """`exited(session, code)` is called when a guest's application has ended, `killed(session, line)` when its kernel has killed a
    process for want of memory, `gone(session)` when the hypervisor of one that runs is no more."""

    def __init__(
        self, host: Host, store: Store, egress: Egress, logs: LogStore, tasks: Tasks, open_services: OpenServices,
        exited: Callable[[Session, int], None], killed: Callable[[Session, str], None], gone: Callable[[Session], None],
    ) -> None:  # fmt: skip
        self._host = host
        self._store = store
        self._egress = egress
        self._logs = logs
        self._tasks = tasks
        self._open_services = open_services
        self._exited = exited
        self._killed = killed
        self._gone = gone
        self._agents: dict[str, Agent] = {}
        self._services: dict[str, GuestServices] = {}

    def egress(self, session: Session) -> EgressRules | None:
        """Returns what the session may reach now."""
        return rules_of(self._egress, self._store, session.egress)

    def agent(self, session: Session) -> Agent:
        """Returns the agent of a running session. Raises AgentError."""
        agent = self._agents.get(session.id) if session.state is State.RUNNING else None
        if agent is None:
            raise AgentError("the MicroVM is not running")
        return agent

    def is_attached(self, session: Session) -> bool:
        return session.id in self._agents

    def attach(self, session: Session, descriptor: int) -> Agent:
        """Reads a running guest's agent: its output goes to the logs, its end ends the session."""
        agent = self._agents.get(session.id)
        if agent is not None and agent.is_detached:  # its shells slept with it
            agent.attach(descriptor)
            return agent
        self.close(session)
        writer = None
        if session.log_group is not None and session.log_stream is not None:
            image = self._store.images.get(session.image_arn)
            version = image.find(session.image_version) if image is not None else None
            is_limited = version is not None and not version.has_all_capabilities
            writer = LineWriter(self._logs, session.account, session.log_group, session.log_stream, is_limited)
        agent = Agent(
            descriptor, writer.feed if writer is not None else lambda channel, data: None, lambda code: self._exited(session, code),
            lambda line: self._killed(session, line), lambda: self._lost(session),
        )  # fmt: skip
        if writer is not None:
            agent.closed.add_done_callback(lambda _: writer.flush())
        self._agents[session.id] = agent
        return agent

    def _lost(self, session: Session) -> bool:
        """Connects again to a guest that runs: a connection of a vsock may end by itself. Returns whether it will."""
        agent = self._agents.get(session.id)
        if agent is None or session.state is not State.RUNNING:
            return False
        self._tasks.spawn(self._connect_again(session, agent, session.incarnation))
        return True

    async def _connect_again(self, session: Session, agent: Agent, incarnation: int) -> None:
        """Until it is there again, or the host says that its hypervisor is gone: that it ended is told once, and to who was there then."""
        pause = _AGAIN_SECONDS
        while True:
            await asyncio.sleep(pause)
            if not self._is_waited_for(session, agent, incarnation):
                return
            try:
                await self._attach_again(session, agent, incarnation)
                return
            except (RpcError, AgentError) as error:
                log.warning("agent.not_connected", session=session.id, error=str(error))
                if not self._is_waited_for(session, agent, incarnation):
                    return
                if isinstance(error, AgentError) or ends_session(error):
                    agent.close()
                    if isinstance(error, RpcError):
                        self._gone(session)
                    return
            pause = min(2 * pause, _AGAIN_MOST_SECONDS)

    def _is_waited_for(self, session: Session, agent: Agent, incarnation: int) -> bool:
        """Whether it is this agent's channel still that is missing. Who suspends or ends its session looks after it himself."""
        is_current = self._agents.get(session.id) is agent and session.incarnation == incarnation
        return is_current and agent.is_detached and session.state is State.RUNNING

    async def _attach_again(self, session: Session, agent: Agent, incarnation: int) -> None:
        """What the guest said last may have gone with the channel: its application's end is asked for. Raises RpcError, AgentError."""
        descriptor = await patiently(lambda: self._host.agent(session.id, incarnation))
        if not self._is_waited_for(session, agent, incarnation):
            os.close(descriptor)
            return
        agent.attach(descriptor)
        state, code = await agent.hello(_HELLO_SECONDS)
        if state == EXITED:
            self._exited(session, code)

    def serve_guest(self, session: Session) -> None:
        """Answers a guest's questions for metadata and names once its first requests are on their way; until then they wait in the
        queues of its sockets."""
        agent = self._agents.get(session.id)
        if agent is not None:
            self._tasks.spawn(self._serve_guest(session, agent))

    async def _serve_guest(self, session: Session, agent: Agent) -> None:
        """Serves the guest for as long as the agent is this incarnation's."""
        await asyncio.sleep(_SERVE_SECONDS)
        if self._agents.get(session.id) is not agent:
            return
        rules = self.egress(session)
        try:
            sockets = await patiently(lambda: self._host.services(session.id, session.incarnation, has_hosts(rules)))
        except RpcError as error:
            log.warning("services.missing", session=session.id, error=str(error))
            return
        services = await self._open_services(session, sockets, rules)
        if self._agents.get(session.id) is agent and session.id not in self._services:
            self._services[session.id] = services
        else:
            services.close()

    async def is_heard(self, session: Session, seconds: float) -> bool:
        """Returns whether a guest that runs answers over its channel; where it does not, the channel is ready to be attached anew."""
        agent = self._agents.get(session.id)
        if agent is None or await agent.is_heard(seconds):
            return agent is not None
        if agent.shells.count and not agent.closed.done():
            agent.detach()
        return False

    # ---- through a suspend ----

    async def quiet(self, session: Session, seconds: float) -> None:
        """Returns when nothing is under way in the session's shells. Raises AgentError."""
        agent = self._agents.get(session.id)
        if agent is not None and agent.shells.count:
            await agent.quiet(seconds)

    def detach(self, session: Session) -> None:
        """Keeps the shells, because the guest sleeps, and they sleep with it."""
        agent = self._agents.get(session.id)
        if agent is not None and agent.shells.count:
            agent.detach()

    def release(self, session: Session) -> None:
        """Lets go on what was held back for a suspend."""
        agent = self._agents.get(session.id)
        if agent is not None:
            agent.release()

    def rested(self, session: Session) -> bool:
        """Closes what does not sleep with a session whose hypervisor has ended, and returns whether that is all of it."""
        agent = self._agents.get(session.id)
        if agent is None or not agent.is_detached:
            self.close(session)
            return True
        self._close_services(session)
        return False

    # ---- ends ----

    async def stop(self, session: Session, seconds: float) -> None:
        """Has the application of a guest that runs end by itself, as `docker stop` does. Raises AgentError."""
        agent = self._agents.get(session.id)
        if agent is not None and not agent.is_detached and seconds > 0:
            await agent.stop(seconds)

    def close(self, session: Session) -> None:
        agent = self._agents.pop(session.id, None)
        if agent is not None:
            agent.close()
        self._close_services(session)

    def _close_services(self, session: Session) -> None:
        services = self._services.pop(session.id, None)
        if services is not None:
            services.close()

    def close_all(self) -> None:
        for closable in (*self._agents.values(), *self._services.values()):
            closable.close()
        self._agents.clear()
        self._services.clear()
