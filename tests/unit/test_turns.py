"""Builds wait in order, and each is told how many are before it."""

from __future__ import annotations

import asyncio

from gateway.images.turns import Turns


class Line:
    def __init__(self, most: int) -> None:
        self.turns = Turns(most)
        self.said: list[str] = []
        self.has_turn: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    def begin(self, name: str) -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()

        async def work() -> None:
            async with self.turns.turn(lambda before: self.said.append(f"{name} {before}")):
                self.has_turn.append(name)
                await self.ends[name].wait()

        return asyncio.get_running_loop().create_task(work())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_rest_wait_in_order_and_are_told() -> None:
    line = Line(2)
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
    line = Line(1)
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
    line = Line(1)
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
    line = Line(1)
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
