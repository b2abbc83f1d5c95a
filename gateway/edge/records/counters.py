"""Each request of a worker gets its id from here, and is counted here once when it has ended (Exchange.record)."""

from __future__ import annotations

import uuid
from typing import Final

from .access_log import AccessLog
from .record import PROTOCOLS

_LOW: Final = 4096
_ENDS = [b"%03x" % number for number in range(_LOW)]


class Counters:
    """Numbers the requests of one worker and counts their answers; `access` is its access log, where one is kept."""

    __slots__ = ("_next", "_prefix", "_start", "access", "answers")

    def __init__(self, access: AccessLog | None) -> None:
        self.access = access
        self.answers = [[0] * 10 for _ in PROTOCOLS]  # by protocol and first digit of the status
        self._prefix = f"{uuid.uuid4()}"[:24].encode("ascii")
        self._next = 0
        self._start = b""

    def request_id(self) -> bytes:
        """Returns an id in the form of a UUID: 24 characters are random for each worker, the other 12 count its requests."""
        low = self._next % _LOW
        if not low:
            self._start = b"%b%09x" % (self._prefix, self._next // _LOW)
        self._next += 1
        return self._start + _ENDS[low]

    def count(self, protocol: int, status: int) -> None:
        """Counts a request that has ended."""
        self.answers[protocol][status // 100] += 1
