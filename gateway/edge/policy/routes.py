"""A worker's routes and its accounts of activity: what control told it, and what it tells control."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from gateway.config import Edge
from gateway.messages import Activity, GateAnswer, Route, Table

from .limits import Limiter, bounds_of

_UNREPORTED = -1


class Account:
    """Activity of one session at this worker. `count` grows with every byte or request that counts, `spoken` with what clients
    say on streams; `gated` is both when the gate closed. `waiting` requests wait for the head of their final response.
    `in_turn` requests came in the loop's turn of the time `turn`."""

    __slots__ = ("count", "gated", "in_turn", "last", "reported", "reported_waiting", "spoken", "turn", "waiting", "when_answered")

    def __init__(self) -> None:
        self.count = 0
        self.spoken = 0
        self.gated = (0, 0)
        self.turn = 0.0
        self.in_turn = 0
        self.waiting = 0
        self.when_answered: asyncio.Event | None = None  # set when none waits any more, for whoever waits for that
        self.last = 0.0
        self.reported = 0
        self.reported_waiting = 0

    async def until_answered(self, seconds: float) -> None:
        """Returns when no request waits for a head any more, or after so many seconds."""
        event = self.when_answered
        if event is None:
            event = self.when_answered = asyncio.Event()
        event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()


class RouteEntry:
    """A route, and what this worker keeps for it."""

    __slots__ = ("account", "limiter", "opened_at", "route")

    def __init__(self, route: Route, account: Account, opened_at: float) -> None:
        self.limiter: Limiter | None = None
        self.route = route
        self.account = account
        self.opened_at = opened_at


class RouteTable:
    """Routes by host name. `on_change(old, new)` hears of each change after it was made; `old` may be None."""

    def __init__(self, clock: Callable[[], float], on_change: Callable[[Route | None, Route], None], settings: Edge | None = None) -> None:
        self._clock = clock
        self._settings = settings or Edge()
        self._on_change = on_change
        self._entries: dict[str, RouteEntry] = {}
        self._accounts: dict[str, Account] = {}
        self._awake: dict[str, Account] = {}  # of sessions that run: a sleeper costs no look, however many there are
        self.get = self._entries.get  # the hot path's lookup

    def replace(self, table: Table) -> None:
        """Takes the whole table, as after each connection to control."""
        for account in self._accounts.values():
            account.reported = _UNREPORTED  # another control, perhaps, which knows nothing yet
        known = {route.endpoint for route in table.routes}
        for endpoint in [name for name in self._entries if name not in known]:
            self.change(Route(endpoint, "", 0, "refuse", is_live=False))
        for route in table.routes:
            self.change(route)

    def close_gate(self, route: Route) -> GateAnswer:
        """Applies a route whose gate is not open; returns what the table holds then, and the activity until now."""
        self.change(route)
        entry = self._entries[route.endpoint]
        entry.account.gated = (entry.account.count, entry.account.spoken)
        return GateAnswer(entry.account.count, entry.account.waiting, entry.route.gate != "open")

    def add(self, route: Route) -> None:
        """Applies a route that was looked up, unless a change came first."""
        if route.endpoint not in self._entries:
            self.change(route)

    def account(self, session: str) -> Account:
        """Returns the activity of a session; of one that has no route, that there was none: nothing is kept of it."""
        account = self._accounts.get(session)
        return account if account is not None else Account()

    def change(self, route: Route) -> None:
        """Applies one route; control sends them in the order in which they came to be (gateway/sessions/routes.py)."""
        entry = self._entries.get(route.endpoint)
        old = entry.route if entry is not None else None
        if old == route:
            return
        if not route.session:
            self._entries.pop(route.endpoint, None)
            if old is not None:
                self._accounts.pop(old.session, None)
                self._awake.pop(old.session, None)
        elif entry is None:
            account = self._accounts[route.session] = self.account(route.session)
            entry = self._entries[route.endpoint] = RouteEntry(route, account, self._clock())
            bounds = bounds_of(self._settings, route.baseline_mib)
            if bounds is not None:
                entry.limiter = Limiter(bounds, self._clock)
        else:
            if route.gate == "open" and (old is None or old.gate != "open"):
                entry.opened_at = self._clock()
                entry.account.reported = _UNREPORTED  # control has forgotten what it knew while the session slept
            entry.route = route
        if entry is not None and route.is_live:
            self._awake[route.session] = entry.account
        else:
            self._awake.pop(route.session, None)
        self._on_change(old, route)

    def report(self) -> Activity | None:
        """Returns what changed since the last report, of sessions that run; all of a session is reported anew when its gate opens."""
        now = self._clock()
        changed: dict[str, tuple[int, float, int]] = {}
        for session, account in self._awake.items():
            if account.count != account.reported or account.waiting != account.reported_waiting:
                changed[session] = (account.count, now - account.last, account.waiting)
                account.reported, account.reported_waiting = account.count, account.waiting
        return Activity(changed) if changed else None

    def __len__(self) -> int:
        return len(self._entries)
