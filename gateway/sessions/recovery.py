"""After a restart of control the store is compared with the host, session by session, and each goes on from there."""

from __future__ import annotations

import structlog

from gateway.messages import HostState

from .host import RpcError
from .lifecycle import Lifecycle
from .states import State

log = structlog.get_logger()


async def recover(lifecycle: Lifecycle, state: HostState) -> None:
    """Forgets what the host holds for nobody. Routes are published before anything else happens."""
    sessions = lifecycle.store.sessions
    held = {host_session.session: host_session for host_session in state.sessions}
    for session in sessions.values():
        session.refusal = ""  # this host's hypervisor may be another one by now
        lifecycle.routes.publish(session)
    for session in list(sessions.values()):
        if session.state is State.TERMINATED:
            lifecycle.ended(session)
            continue
        lifecycle.timers.watch_lifetime(session)
        is_saved = session.archived is not None or state.snapshots.get(session.id) == session.incarnation
        is_at_rest = session.id not in held or held[session.id].phase == "warm"
        if session.state is State.SUSPENDED and is_saved and is_at_rest and session.suspended_by != "stop":
            lifecycle.rested(session)
        else:
            lifecycle.settle(session, state)
    archived = {session.id for session in sessions.values() if session.archived is not None}
    unread = {row.key for row in lifecycle.store.set_aside}  # their files are as they were when their rows can be read again
    running = (set(held) | set(state.preparing)) - set(sessions) - unread
    asleep = set(state.snapshots) - (set(sessions) - archived) - unread
    for orphan in sorted(running | asleep):
        try:
            await lifecycle.host.forget(orphan)
        except RpcError as error:  # the next start finds it again
            log.error("orphan.left", session=orphan, error=str(error))
