"""Held requests: one question however many wait, first come first served, bounded, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import Edge
from gateway.edge.hold import HoldFull, Holds
from gateway.edge.memo import Memo
from gateway.messages import Route

ROUTE = Route("h", "s1", 3, "hold")


class Request:
    def __init__(self, held_bytes: int) -> None:
        self.held_bytes = held_bytes
        self.held_for: str | None = None


def made(**settings: int) -> tuple[Holds, list[Route]]:
    asked: list[Route] = []
    return Holds(Edge.model_validate(settings), asked.append), asked


async def test_one_question_for_a_hundred() -> None:
    holds, asked = made()
    order: list[int] = []

    async def wait(number: int) -> None:
        await holds.wait(ROUTE, 5, Request(0))
        order.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(100)]
    await asyncio.sleep(0)
    assert asked == [ROUTE] and holds.statistics() == {"sessions": 1, "requests": 100}
    holds.changed("s1")
    await asyncio.gather(*tasks)
    assert order == list(range(100)) and holds.statistics() == {"sessions": 0, "requests": 0}


async def test_a_changed_route_is_asked_about_again() -> None:
    holds, asked = made()
    first = asyncio.create_task(holds.wait(ROUTE, 5, Request(0)))
    await asyncio.sleep(0)
    holds.changed("s1")
    second = asyncio.create_task(holds.wait(Route("h", "s1", 4, "hold"), 5, Request(0)))
    await asyncio.sleep(0)
    assert [route.incarnation for route in asked] == [3, 4]
    holds.changed("s1")
    await asyncio.gather(first, second)


async def test_asked_again_when_control_is_back() -> None:
    holds, asked = made()
    task = asyncio.create_task(holds.wait(ROUTE, 5, Request(0)))
    await asyncio.sleep(0)
    holds.ask_again(lambda session: ROUTE)
    assert asked == [ROUTE, ROUTE]
    holds.changed("s1")
    await task


async def test_bounds() -> None:
    holds, _ = made(held_requests=2, held_bytes=65536)
    tasks = [asyncio.create_task(holds.wait(ROUTE, 5, Request(0))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(HoldFull):
        await holds.wait(ROUTE, 5, Request(0))
    with pytest.raises(HoldFull):
        await holds.wait(Route("h2", "s2", 1, "hold"), 5, Request(65537))
    others = [asyncio.create_task(holds.wait(Route(f"o{n}", f"o{n}", 1, "hold"), 5, Request(0))) for n in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(HoldFull):  # four times the bound of one session, in total
        await holds.wait(Route("h3", "s3", 1, "hold"), 5, Request(0))
    for task in (*tasks, *others):
        task.cancel()
    await asyncio.gather(*tasks, *others, return_exceptions=True)
    assert holds.statistics() == {"sessions": 0, "requests": 0}


async def test_deadline_and_leaving_clients_leave_nothing() -> None:
    holds, _ = made()
    with pytest.raises(TimeoutError):
        await holds.wait(ROUTE, 0.001, Request(10))
    task = asyncio.create_task(holds.wait(ROUTE, 5, Request(10)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    holds.changed("s1")
    assert holds.statistics() == {"sessions": 0, "requests": 0}


def test_memo_is_bounded_and_forgets_the_oldest() -> None:
    memo: Memo[int, str] = Memo(4)
    for number in range(5):
        memo.put(number, str(number))
    assert [memo.get(number) for number in range(5)] == [None, None, "2", "3", "4"] and len(memo) == 3
    memo.drop(3)
    assert memo.get(3) is None
    memo.clear()
    assert len(memo) == 0
