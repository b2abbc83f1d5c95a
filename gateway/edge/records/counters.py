"""Each request of a worker gets its id from here, and is counted here once when it has ended (Exchange.record)."""

from __future__ import annotations

import os
import uuid
from typing import Final

from .access_log import AccessLog
from .record import PROTOCOLS

_READY: Final = 256  # ids that are made at once
_ID_BYTES: Final = 8


class Counters:
    """Numbers the requests of one worker and counts their answers; `access` is its access log, where one is kept."""

    __slots__ = ("_prefix", "_ready", "access", "answers")

    def __init__(self, access: AccessLog | None) -> None:
        self.access = access
        self.answers = [[0] * 10 for _ in PROTOCOLS]  # by protocol and first digit of the status
        self._prefix = f"{uuid.uuid4()}"[:20].encode("ascii")
        self._ready: list[bytes] = []

    def request_id(self) -> bytes:
        """Returns an id in the form of a UUID: 20 characters are random for each worker, 60 bits for each request. Who gets two of them
        learns nothing of how many others came between."""
        if not self._ready:
            self._make()
        return self._ready.pop()

    def _make(self) -> None:
        digits, each = os.urandom(_READY * _ID_BYTES).hex().encode("ascii"), 2 * _ID_BYTES
        self._ready = [b"%b%b-%b" % (self._prefix, digits[at : at + 3], digits[at + 4 : at + each]) for at in range(0, len(digits), each)]

    def count(self, protocol: int, status: int) -> None:
        """Counts a request that has ended."""
        self.answers[protocol][status // 100] += 1
