"""What the service itself has to say about a microVM: lines of the microVM's own log.

A microVM without an execution role has no log stream, as at the service, and the log calls of the API stay empty. Our own lines are kept
for it in memory, a bounded number for each microVM, and `torpor logs` shows them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gateway.messages import LogLine, MicrovmLog

from .logs import LogStore
from .model import Session

_LINES_MAX = 64  # for each microVM without a stream
_MICROVMS_MAX = 1024  # without a stream; the one that was written to longest ago is forgotten
_AT_ONCE_MAX = 32  # lines of one call
_TEXT_MAX_CHARACTERS = 500
_PREFIX = "torpor: "


class FaultLog:
    def __init__(self, logs: LogStore, clock: Callable[[], float] = time.time) -> None:
        self._logs = logs
        self._clock = clock
        self._rings: dict[str, deque[LogLine]] = {}
        self._next = 1

    def write(self, session: Session, texts: list[str]) -> None:
        """Writes lines to the microVM's stream; where it has none, to memory; to both while the disk is full. The texts come from a worker,
        which may be anybody's: what would not be one line of text becomes one."""
        lines = [_PREFIX + _printable(text[:_TEXT_MAX_CHARACTERS]) for text in texts[:_AT_ONCE_MAX]]
        if session.log_group is not None and session.log_stream is not None:
            self._logs.append(session.account, session.log_group, session.log_stream, lines)
            if not self._logs.trouble:
                return
        ring = self._rings.pop(session.id, None)
        if ring is None:
            ring = deque(maxlen=_LINES_MAX)
            if len(self._rings) >= _MICROVMS_MAX:
                del self._rings[next(iter(self._rings))]
        self._rings[session.id] = ring
        now = int(self._clock() * 1000)
        for line in lines:
            ring.append(LogLine(self._next, now, line))
            self._next += 1

    def read(self, session: Session, after: int) -> MicrovmLog:
        """Returns where the microVM's stream is, or why there is none, and the lines in memory whose numbers are above `after`."""
        why = ""
        if session.execution_role is None:
            why = "it has no execution role"
        elif session.log_group is None:
            why = "logging is disabled for it"
        lines = [line for line in self._rings.get(session.id, ()) if line.number > after]
        return MicrovmLog(session.log_group or "", session.log_stream or "", why, lines)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
