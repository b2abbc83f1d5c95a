"""Sessions share each turn of the event loop fairly: a flood for one session does not delay the requests of the others.

In one turn the loop reads every client that has sent something. While more than one session is asked, each is admitted a quota of
requests in a turn; its further requests wait, in order, for the next turns, which serve the sessions round robin. The loop's
clock stands still within a turn (libuv, uv_now), which is how a turn is known.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog
from mypy_extensions import mypyc_attr

from .routes import Account

log = structlog.get_logger()

QUOTA: Final = 8  # requests of one session in a turn
_SHARED_SECONDS: Final = 1.0  # since requests of two sessions followed one another


@mypyc_attr(allow_interpreted_subclasses=True)
class FairQueue:
    __slots__ = ("_deferred", "_last", "_loop", "_shared_until")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last: Account | None = None
        self._shared_until = 0.0
        self._deferred: dict[Account, deque[Callable[[], None]]] = {}

    def admit(self, account: Account, now: float) -> bool:
        """Counts a request of the session in the turn at `now`; returns False where it must be deferred."""
        if account is not self._last:
            if self._last is not None:
                self._shared_until = now + _SHARED_SECONDS
            self._last = account
        if account.turn != now:
            account.turn, account.in_turn = now, 1
        else:
            account.in_turn += 1
        return now >= self._shared_until or (account.in_turn <= QUOTA and account not in self._deferred)

    def defer(self, account: Account, proceed: Callable[[], None]) -> None:
        """Calls `proceed` in one of the next turns, after what was deferred for the session before."""
        if not self._deferred:
            self._loop.call_soon(self._serve)
        self._deferred.setdefault(account, deque()).append(proceed)

    def _serve(self) -> None:
        """Serves up to a quota of each session's requests in this turn. A request that raises ends itself alone."""
        try:
            for account, queue in list(self._deferred.items()):
                for _ in range(min(QUOTA, len(queue))):
                    try:
                        queue.popleft()()
                    except Exception:
                        log.exception("edge.deferred_request_failed")
                if not queue:
                    del self._deferred[account]
        finally:
            if self._deferred:
                self._loop.call_soon(self._serve)
