"""What a worker writes down of its requests: a number for each, the answers, the access log."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .access import PROTOCOLS, AccessLog

if TYPE_CHECKING:
    from .exchange import Exchange

_LOW: Final = 4096
_ENDS = [b"%03x" % number for number in range(_LOW)]


class Ledger:
    __slots__ = ("_next", "_prefix", "_start", "_time", "_wall", "access", "answers")

    def __init__(self, access: AccessLog | None, time: Callable[[], float], wall: Callable[[], float]) -> None:
        self.access = access
        self.answers = [[0] * 10 for _ in PROTOCOLS]  # by protocol and first digit of the status
        self._time, self._wall = time, wall
        self._prefix = f"{uuid.uuid4()}"[:24].encode("ascii")
        self._next = 0
        self._start = b""

    def request_id(self) -> bytes:
        """A UUID's form: random for the worker, counted for the request."""
        low = self._next % _LOW
        if not low:
            self._start = b"%b%09x" % (self._prefix, self._next // _LOW)
        self._next += 1
        return self._start + _ENDS[low]

    def count(self, exchange: Exchange, closed_by: str = "") -> None:
        """An exchange has ended."""
        self.answers[exchange.protocol][exchange.status // 100] += 1
        if self.access is not None:
            self.access.add(exchange, self._wall(), self._time(), closed_by)
