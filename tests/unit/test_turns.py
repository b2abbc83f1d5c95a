"""Builds wait in order, accounts take turns, and each is told how many are before it."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.images.turns import Line, Place, Turns


class Builds:
    def __init__(self, most: int, of_one: int = 9) -> None:
        self.turns = Turns(most, of_one)
        self.said: list[str] = []
        self.has_turn: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    def begin(self, name: str, account: str = "one") -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()

        async def work() -> None:
            async with self.turns.turn(account, lambda before: self.said.append(f"{name} {before}")):
                self.has_turn.append(name)
                await self.ends[name].wait()

        return asyncio.get_running_loop().create_task(work())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_rest_wait_in_order_and_are_told() -> None:
    line = Builds(2)
    tasks = [line.begin(name) for name in "abcd"]
    await settled()
    assert line.has_turn == ["a", "b"] and line.said == ["c 1", "d 2"]
    line.ends["b"].set()
    await settled()
    assert line.has_turn == ["a", "b", "c"] and line.said == ["c 1", "d 2", "d 1"]
    for name in "acd":
        line.ends[name].set()
    await asyncio.gather(*tasks)
    assert line.has_turn == ["a", "b", "c", "d"]


async def test_one_that_is_called_off_leaves_its_place() -> None:
    line = Builds(1)
    tasks = [line.begin(name) for name in "abc"]
    await settled()
    tasks[1].cancel()
    await settled()
    assert line.said == ["b 1", "c 2", "c 1"]
    line.ends["a"].set()
    await settled()
    assert line.has_turn == ["a", "c"]
    line.ends["c"].set()
    await tasks[2]


async def test_one_that_is_called_off_as_its_turn_comes_passes_it_on() -> None:
    line = Builds(1)
    tasks = [line.begin(name) for name in "abc"]
    await settled()
    line.ends["a"].set()
    await asyncio.sleep(0)  # b's turn has come, b has not run yet
    tasks[1].cancel()
    await settled()
    assert line.has_turn == ["a", "c"]
    line.ends["c"].set()
    await tasks[2]


async def test_all_that_are_called_off_at_once_leave() -> None:
    """As when the service stops: one that is called off is passed over, though it has not left yet."""
    line = Builds(1)
    tasks = [line.begin(name) for name in "abc"]
    await settled()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    line.begin("d")
    line.begin("e")
    await settled()
    assert line.has_turn == ["a", "d"]


# ---- accounts ----


async def test_one_that_asks_for_a_hundred_delays_another_by_one() -> None:
    line = Builds(1)
    many = [line.begin(f"a{number}", "a") for number in range(100)]
    await settled()
    other = line.begin("b", "b")
    await settled()
    assert line.said[-100:][0] == "b 1" and line.said[-1] == "a99 100", "the others are told that one came before them"
    line.ends["a0"].set()
    await settled()
    assert line.has_turn == ["a0", "b"]
    for task in (*many, other):
        task.cancel()
    await asyncio.wait([*many, other])


async def test_an_account_has_so_many_at_once_and_leaves_the_rest_to_others() -> None:
    line = Builds(3, of_one=2)
    tasks = [line.begin(name, "a") for name in ("a1", "a2", "a3")]
    await settled()
    assert line.has_turn == ["a1", "a2"] and line.said == ["a3 1"]
    tasks.append(line.begin("b1", "b"))
    await settled()
    assert line.has_turn == ["a1", "a2", "b1"]
    line.ends["b1"].set()
    await settled()
    assert line.has_turn == ["a1", "a2", "b1"], "a place is free, and not for this account"
    line.ends["a1"].set()
    await settled()
    assert line.has_turn == ["a1", "a2", "b1", "a3"]
    for name in ("a2", "a3"):
        line.ends[name].set()
    await asyncio.gather(*tasks)


def test_who_leaves_and_comes_again_does_not_pass_those_that_wait() -> None:
    line = Line(1, 1)
    line.join("a")
    under_way = line.next()
    waits = line.join("a")
    for _ in range(3):  # b has its turn, and comes again at once; a waits meanwhile
        line.join("b")
        assert under_way is not None
        line.end(under_way)
        under_way = line.next()
        if under_way is waits:
            return
    raise AssertionError("it waits for ever")


@settings(max_examples=300, deadline=None)
@given(
    most=st.integers(1, 4), of_one=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(("join", "leave", "end")), st.sampled_from("abcd"), st.integers(0, 9)), max_size=60),
)  # fmt: skip
def test_whatever_comes_no_place_is_idle_and_no_account_waits_for_ever(most: int, of_one: int, steps: list[tuple[str, str, int]]) -> None:
    line = Line(most, of_one)
    waiting: list[Place] = []
    under_way: list[Place] = []
    passed: dict[Place, int] = {}  # how many turns others had while one waited first in its account

    def go_on() -> None:
        while True:
            foretold = next((one for one in line.order() if sum(one.account == other.account for other in under_way) < of_one), None)
            place = line.next()
            if place is None:
                break
            assert place is foretold, "what was told is what happens"
            assert place is next(one for one in waiting if one.account == place.account), "an account's own keep their order"
            waiting.remove(place)
            under_way.append(place)
            for one in waiting:
                if not any(other.account == one.account for other in under_way):
                    passed[one] = passed.get(one, 0) + (place.account != one.account)
                    before = sum(other.account == one.account for other in waiting[: waiting.index(one)])
                    assert before or passed[one] <= len({"a", "b", "c", "d"}), "each other account goes once before it"
        assert len(under_way) <= most
        for account in "abcd":
            mine = sum(one.account == account for one in under_way)
            assert mine <= of_one
            if len(under_way) < most and mine < of_one:
                assert not any(one.account == account for one in waiting), "no place is idle that it may have"

    for what, account, number in steps:
        if what == "join":
            waiting.append(line.join(account))
        elif what == "leave" and waiting:
            place = waiting.pop(number % len(waiting))
            line.leave(place)
        elif what == "end" and under_way:
            line.end(under_way.pop(number % len(under_way)))
        go_on()
    assert {id(one) for one in line.order()} == {id(one) for one in waiting}
    while under_way:
        line.end(under_way.pop())
        go_on()
    assert not waiting and not line._last, "nothing is kept of accounts that have no builds"
