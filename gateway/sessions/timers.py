"""The deadlines of sessions, of all kinds, have one clock (deadlines.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from enum import StrEnum
from typing import cast

from .deadlines import Deadlines, Timer
from .model import Session

_TERMINATED_KEPT_SECONDS = 3600.0  # reference: at least 20 minutes
_PURGE_AGAIN_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_RETRY_MOST_SECONDS = 8.0
_LITTER_AGAIN_SECONDS, _LITTER_MOST_SECONDS = 5.0, 3600.0
_ARCHIVE_AGAIN_SECONDS, _ARCHIVE_MOST_SECONDS = 60.0, 3600.0


class Deadline(StrEnum):
    IDLE = "idle"  # a running session has had no activity for as long as its policy allows
    WINDOW = "window"  # a session that fell asleep by its policy has slept for as long as that allows
    LIFETIME = "lifetime"
    RETRY = "retry"  # a resume that could not be made is tried again
    ARCHIVE = "archive"  # a session has slept for so long that it is moved to the object store
    LITTER = "litter"  # archives that are nobody's are removed
    OVERDUE = "overdue"  # a launch, resume or suspend has not got on for longer than all that bounds its steps
    PURGE = "purge"  # a terminated session is not listed any more


class Timers:
    """`due(deadline, session's id)` is called when its time has come. `timer` counts monotonic seconds, `clock` those of the epoch."""

    def __init__(
        self, timer: Timer, due: Callable[[Deadline, str], None], archive_after: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._timer = timer
        self._clock = clock
        self._archive_after = archive_after
        self._deadlines = Deadlines(timer, lambda key: due(*cast(tuple[Deadline, str], key)))

    def watch_idle(self, session: Session, since: float) -> None:
        """Sets the idle deadline; `since` is in the timer's seconds."""
        if session.idle_policy is not None:
            self._set(session, Deadline.IDLE, since + session.idle_policy.max_idle)

    def watch_window(self, session: Session) -> None:
        policy = session.idle_policy
        if policy is not None and session.suspended_by == "idle" and session.suspended_at is not None:
            self._set_wall(session, Deadline.WINDOW, session.suspended_at + policy.suspended)

    def watch_lifetime(self, session: Session) -> None:
        self._set_wall(session, Deadline.LIFETIME, session.expires_at)

    def watch_archive(self, session: Session) -> None:
        if self._archive_after and session.archived is None and session.suspended_at is not None:
            self._set_wall(session, Deadline.ARCHIVE, session.suspended_at + self._archive_after)

    def archive_later(self, session: Session, failures: int = 0) -> None:
        """Tries later to archive a session that cannot be archived now, less and less often where that fails."""
        again = min(_ARCHIVE_AGAIN_SECONDS * 2 ** min(failures - 1, 10), _ARCHIVE_MOST_SECONDS) if failures else self._archive_after
        self._set(session, Deadline.ARCHIVE, self._timer.time() + again)

    def litter_later(self, session: Session, failures: int = 1) -> None:
        again = min(_LITTER_AGAIN_SECONDS * 2 ** min(failures - 1, 10), _LITTER_MOST_SECONDS)
        self._set(session, Deadline.LITTER, self._timer.time() + again)

    def retry_later(self, session: Session, failures: int = 1) -> None:
        """Tries later a resume that could not be made now; what is held is tried again until the edges give up, less and less often."""
        self._set(session, Deadline.RETRY, self._timer.time() + min(_RETRY_SECONDS * 2 ** min(failures - 1, 10), _RETRY_MOST_SECONDS))

    def watch_work(self, session: Session, seconds: float) -> None:
        """Sets the deadline of a launch, resume or suspend that begins now."""
        self._set(session, Deadline.OVERDUE, self._timer.time() + seconds)

    def watch_purge(self, session: Session) -> None:
        self._set_wall(session, Deadline.PURGE, (session.terminated_at or self._clock()) + _TERMINATED_KEPT_SECONDS)

    def purge_later(self, session: Session) -> None:
        self._set(session, Deadline.PURGE, self._timer.time() + _PURGE_AGAIN_SECONDS)

    def clear(self, session: Session, *deadlines: Deadline) -> None:
        for deadline in deadlines:
            self._deadlines.clear(self._key(session, deadline))

    def is_set(self, session: Session, deadline: Deadline) -> bool:
        return self._key(session, deadline) in self._deadlines

    def _key(self, session: Session, deadline: Deadline) -> Hashable:
        return deadline, session.id

    def _set(self, session: Session, deadline: Deadline, when: float) -> None:
        self._deadlines.set(self._key(session, deadline), when)

    def _set_wall(self, session: Session, deadline: Deadline, wall: float) -> None:
        self._set(session, deadline, self._timer.time() + max(0.0, wall - self._clock()))
