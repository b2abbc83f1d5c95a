"""Deadlines against a clock of the test's own."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable

from hypothesis import given
from hypothesis import strategies as st

from gateway.sessions.deadlines import Deadlines


class Handle:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTimer:
    """asyncio's call_at, with a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._calls: list[tuple[float, int, Callable[[], None], Handle]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Handle:
        handle = Handle()
        heapq.heappush(self._calls, (when, next(self._numbers), callback, handle))
        return handle

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._calls and self._calls[0][0] <= end:
            when, _, callback, handle = heapq.heappop(self._calls)
            self.now = max(self.now, when)
            if not handle.cancelled:
                callback()
        self.now = end

    @property
    def armed(self) -> int:
        return sum(not handle.cancelled for *_, handle in self._calls)


def made() -> tuple[FakeTimer, Deadlines, list[Hashable]]:
    timer, fired = FakeTimer(), []
    return timer, Deadlines(timer, fired.append), fired


def test_fires_once_in_order_with_one_timer() -> None:
    timer, deadlines, fired = made()
    for key, when in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        deadlines.set(key, when)
    assert timer.armed == 1
    timer.advance(0.9)
    assert fired == []
    timer.advance(1.1)
    assert fired == ["a", "b"]
    timer.advance(10)
    assert fired == ["a", "b", "c"] and len(deadlines) == 0 and timer.armed == 0


def test_replaced_and_cleared() -> None:
    timer, deadlines, fired = made()
    deadlines.set("a", 1.0)
    deadlines.set("a", 5.0)
    deadlines.set("b", 2.0)
    deadlines.clear("b")
    timer.advance(4.0)
    assert fired == []
    timer.advance(2.0)
    assert fired == ["a"]


def test_may_be_set_again_while_it_fires() -> None:
    timer = FakeTimer()
    seen: list[float] = []

    def due(key: Hashable) -> None:
        seen.append(timer.now)
        if len(seen) < 3:
            deadlines.set(key, timer.now + 1)

    deadlines = Deadlines(timer, due)
    deadlines.set("a", 1.0)
    timer.advance(10)
    assert seen == [1.0, 2.0, 3.0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50), st.booleans()), max_size=300))
def test_like_a_dictionary(changes: list[tuple[int, int, bool]]) -> None:
    timer, deadlines, fired = made()
    expected: dict[int, int] = {}
    for key, when, clear in changes:
        if clear:
            deadlines.clear(key)
            expected.pop(key, None)
        else:
            deadlines.set(key, float(when))
            expected[key] = when
    assert len(deadlines) == len(expected)
    timer.advance(60)
    assert sorted(fired, key=repr) == sorted(expected, key=repr)
    assert [expected[key] for key in fired] == sorted(expected.values())  # type: ignore[index]


def test_what_one_deadline_raises_keeps_no_other_from_being_due() -> None:
    timer, seen = FakeTimer(), []

    def due(key: Hashable) -> None:
        if key == "broken":
            raise ValueError
        seen.append(key)

    deadlines = Deadlines(timer, due)
    for key in ("broken", "a", "b"):
        deadlines.set(key, 1.0)
    timer.advance(2.0)
    assert seen == ["a", "b"] and not len(deadlines)
