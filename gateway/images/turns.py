"""Whose turn it is: so many builds at once, so many of one account; each that waits is told how many are before it.

`Line` decides, without clocks and tasks. A free turn goes to the account that has the fewest under way, of these to the one that had its
last turn longest ago; an account's own keep their order. So a hundred of one account delay another's by one build, and not by a hundred.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)
class Place:
    """One's place in the line."""

    account: str


class Line:
    def __init__(self, most: int, of_one: int) -> None:
        """So many at once, and of one account."""
        self._most = most
        self._of_one = of_one
        self._waiting: dict[str, list[Place]] = {}
        self._under_way: Counter[str] = Counter()
        self._last: dict[str, int] = {}  # accounts' last turns, of those that wait or are under way
        self._latest = 0

    def join(self, account: str) -> Place:
        """One of an account that has none yet comes before the account whose turn was last, and behind all others: who leaves and comes
        again gains nothing."""
        place = Place(account)
        self._last.setdefault(account, self._latest - 1)
        self._waiting.setdefault(account, []).append(place)
        return place

    def leave(self, place: Place) -> None:
        """It waits no longer."""
        mine = self._waiting[place.account]
        mine.remove(place)
        if not mine:
            del self._waiting[place.account]
        self._forget(place.account)

    def next(self) -> Place | None:
        """Whose turn has come: it is under way until `end`. None where all turns are taken, or nobody who waits may have one."""
        if self._under_way.total() >= self._most:
            return None
        chosen = self._choose([one for one in self._waiting if self._under_way[one] < self._of_one], self._under_way, self._last)
        if chosen is None:
            return None
        place = self._waiting[chosen][0]
        self._under_way[chosen] += 1
        self._last[chosen] = self._latest = self._latest + 2
        self.leave(place)
        return place

    def end(self, place: Place) -> None:
        self._under_way[place.account] -= 1
        if not self._under_way[place.account]:
            del self._under_way[place.account]
        self._forget(place.account)

    def order(self) -> list[Place]:
        """Returns those that wait, as their turns come if nobody else joins."""
        left = {one: list(places) for one, places in self._waiting.items()}
        had, last, turn = Counter(self._under_way), dict(self._last), self._latest
        found: list[Place] = []
        while (chosen := self._choose(left, had, last)) is not None:
            found.append(left[chosen].pop(0))
            had[chosen] += 1
            last[chosen] = turn = turn + 2
            if not left[chosen]:
                del left[chosen]
        return found

    @staticmethod
    def _choose(accounts: Iterable[str], under_way: Mapping[str, int], last: Mapping[str, int]) -> str | None:
        return min(accounts, key=lambda one: (under_way.get(one, 0), last[one]), default=None)

    def _forget(self, account: str) -> None:
        if account not in self._waiting and account not in self._under_way:
            self._last.pop(account, None)


@dataclass(eq=False)
class _Waiter:
    say: Callable[[int], None]
    come: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    said: int = 0


class Turns:
    def __init__(self, most: int, of_one: int) -> None:
        self._line = Line(most, of_one)
        self._waiters: dict[Place, _Waiter] = {}

    @contextlib.asynccontextmanager
    async def turn(self, account: str, say: Callable[[int], None]) -> AsyncIterator[None]:
        """`say` is called with how many builds are before it, once it waits and whenever that changes."""
        place, waiter = self._line.join(account), _Waiter(say)
        self._waiters[place] = waiter
        self._go_on()
        try:
            await waiter.come
        except asyncio.CancelledError:
            if place in self._waiters:
                self._line.leave(place)
                del self._waiters[place]
            elif not waiter.come.cancelled():  # its turn had come
                self._line.end(place)
            self._go_on()
            raise
        try:
            yield
        finally:
            self._line.end(place)
            self._go_on()

    def _go_on(self) -> None:
        """Gives turns to those whose turn it is, and tells the others where they are."""
        while (place := self._line.next()) is not None:
            come = self._waiters.pop(place).come
            if come.done():  # it was called off, and has not left yet
                self._line.end(place)
            else:
                come.set_result(None)
        for number, place in enumerate(self._line.order(), 1):
            waiter = self._waiters[place]
            if waiter.said != number and not waiter.come.done():
                waiter.said = number
                waiter.say(number)
