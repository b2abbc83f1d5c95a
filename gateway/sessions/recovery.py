"""After a restart of control the store is compared with the host, session by session, and each goes on from there.

Nothing that was saved is deleted here. What the store does not know has been looked at before (identity.py).
"""

from __future__ import annotations

import structlog

from gateway.messages import HostState

from .ahead import PREFIX
from .host import RpcError
from .lifecycle import Lifecycle
from .model import Session
from .states import State
from .store import StoreError

log = structlog.get_logger()


async def recover(lifecycle: Lifecycle, state: HostState) -> None:
    """Routes are published before anything else happens."""
    sessions = lifecycle.store.sessions
    held = {host_session.session: host_session for host_session in state.sessions}
    for session in sessions.values():
        session.refusal = ""  # this host's hypervisor may be another one by now
        lifecycle.routes.publish(session)
        if session.litter:  # not before it is known what of it is here
            lifecycle.timers.litter_later(session)
    for session in list(sessions.values()):
        if session.state is State.TERMINATED:
            lifecycle.ended(session)
            if session.is_aside and (session.id in state.snapshots or session.id in held):  # a recovery that was not stored
                await _set_aside(lifecycle, session, session.reason or "")
            continue
        lifecycle.timers.watch_lifetime(session)
        if session.state is State.SUSPENDED and session.archived is not None and session.id in state.snapshots:
            await _settle_archived(lifecycle, session, state.snapshots[session.id])
        is_saved = session.archived is not None or state.snapshots.get(session.id) == session.incarnation
        is_at_rest = session.id not in held or held[session.id].phase == "warm"
        if session.state is State.SUSPENDED and is_saved and is_at_rest and session.suspended_by != "stop":
            lifecycle.rested(session)
        else:
            lifecycle.settle(session, state)
    unread = {row.key for row in lifecycle.store.set_aside}  # their files are as they were when their rows can be read again
    for name in sorted(launches_of_nobody(state) - set(sessions) - unread):
        try:
            await lifecycle.host.forget(name)
        except RpcError as error:  # the next start finds it again
            log.error("orphan.left", session=name, error=str(error))


def launches_of_nobody(state: HostState) -> set[str]:
    """Returns what was being launched when its control died, and never told to run for anybody, so that nothing of it was saved."""
    waiting = {one.session for one in state.sessions if one.phase == "prepared" or one.session.startswith(PREFIX)}
    return (waiting | set(state.preparing)) - set(state.snapshots)


async def _settle_archived(lifecycle: Lifecycle, session: Session, snapshot: int) -> None:
    """Its files are here as well as in the archive. They are the same where `forget` or a fetch was interrupted, and then they are what
    counts; or others, because the store is an older one, and then they are set aside."""
    if snapshot != session.incarnation:
        await _set_aside(lifecycle, session, f"The store knows an archive of incarnation {session.incarnation}, and this is {snapshot}.")
        return
    try:
        await lifecycle.actions.archiving.drop(session)
    except StoreError as error:
        log.error("archive.both", session=session.id, error=str(error))


async def _set_aside(lifecycle: Lifecycle, session: Session, reason: str) -> None:
    try:
        await lifecycle.host.quarantine(session.id, session.incarnation, session.image, reason)
    except RpcError as error:  # the next start finds it again
        log.error("orphan.left", session=session.id, error=str(error))
