"""Turns of the event loop, shared between sessions: who floods one does not make the others wait for all of it.

In one turn the loop reads every client that has sent something. While more than one session is asked, each gets a share of a turn; the
rest of its requests wait, in order, for the next ones. The loop's clock stands still within a turn (libuv, uv_now), which is how a turn
is known.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

from .table import Account

SHARE: Final = 8  # requests of one session in a turn
_SHARED_SECONDS: Final = 1.0  # since two sessions were asked in turns


@mypyc_attr(allow_interpreted_subclasses=True)
class Turns:
    __slots__ = ("_last", "_loop", "_shared_until", "_waiting")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last: Account | None = None
        self._shared_until = 0.0
        self._waiting: dict[Account, deque[Callable[[], None]]] = {}

    def is_over(self, account: Account, now: float) -> bool:
        """Counts a request; whether it has to wait for another turn."""
        if account is not self._last:
            if self._last is not None:
                self._shared_until = now + _SHARED_SECONDS
            self._last = account
        if account.turn != now:
            account.turn, account.in_turn = now, 1
        else:
            account.in_turn += 1
        return now < self._shared_until and (account.in_turn > SHARE or account in self._waiting)

    def wait(self, account: Account, go_on: Callable[[], None]) -> None:
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting.setdefault(account, deque()).append(go_on)

    def _next(self) -> None:
        for account, line in list(self._waiting.items()):
            for _ in range(min(SHARE, len(line))):
                line.popleft()()
            if not line:
                del self._waiting[account]
        if self._waiting:
            self._loop.call_soon(self._next)
