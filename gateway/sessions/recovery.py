"""After a restart of control: the store is compared with the host, session by session, and each goes on from there."""

from __future__ import annotations

from gateway.messages import HostState

from .actions import Actions
from .lifecycle import Lifecycle
from .states import State


async def recover(lifecycle: Lifecycle, actions: Actions, state: HostState) -> None:
    """What the host holds for nobody is forgotten. Routes are published before anything else happens."""
    sessions = lifecycle.store.sessions
    held = {one.session: one for one in state.sessions}
    for session in sessions.values():
        lifecycle.routes.publish(session)
    for session in list(sessions.values()):
        if session.state is State.TERMINATED:
            lifecycle.ended(session)
            continue
        lifecycle.watch_lifetime(session)
        is_saved = session.archived is not None or state.snapshots.get(session.id) == session.incarnation
        is_at_rest = session.id not in held or held[session.id].phase == "warm"
        if session.state is State.SUSPENDED and is_saved and is_at_rest and session.suspended_by != "stop":
            lifecycle.rested(session)
        else:
            lifecycle.settle(session, actions.settle(session, state))
    for orphan in (set(held) | set(state.preparing)) - set(sessions):
        await lifecycle.host.forget(orphan)
    archived = {session.id for session in sessions.values() if session.archived is not None}
    for orphan in set(state.snapshots) - (set(sessions) - archived):
        await lifecycle.host.forget(orphan)
