"""Held requests: one question however many wait, first come first served, bounded and shared, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from waiting import turn

from gateway.config import Edge
from gateway.edge.policy.holds import HoldFull, Holds, Ticket
from gateway.messages import Route

ROUTE = Route("h", "s1", 3, "hold")
NOTHING = {"sessions": 0, "requests": 0, "bytes": 0}


class Request:
    def __init__(self, held_bytes: int = 0) -> None:
        self.held_bytes = held_bytes
        self.held_for: Ticket | None = None


def made(**settings: int) -> tuple[Holds, list[Route]]:
    asked: list[Route] = []
    return Holds(Edge.model_validate(settings), asked.append), asked


def route(session: str, account: str = "") -> Route:
    return Route(session, session, 1, "hold", account=account)


@contextlib.asynccontextmanager
async def held(holds: Holds, requests: Iterable[tuple[Route, Request]]) -> AsyncIterator[list[asyncio.Task[float]]]:
    """These requests wait meanwhile, those that are refused excepted."""
    tasks = []
    for where, request in requests:
        tasks.append(asyncio.create_task(holds.wait(where, 60, request)))
        await turn()
    yield [task for task in tasks if not task.done()]
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, HoldFull | asyncio.CancelledError), outcome
    assert holds.statistics() == NOTHING


async def test_one_question_for_a_hundred() -> None:
    holds, asked = made()
    order: list[int] = []

    async def wait(number: int) -> None:
        await holds.wait(ROUTE, 5, Request())
        order.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(100)]
    await turn()
    assert asked == [ROUTE] and holds.statistics() == {"sessions": 1, "requests": 100, "bytes": 0}
    holds.changed("s1")
    await asyncio.gather(*tasks)
    assert order == list(range(100)) and holds.statistics() == NOTHING


async def test_a_changed_route_is_asked_about_again() -> None:
    holds, asked = made()
    first = asyncio.create_task(holds.wait(ROUTE, 5, Request()))
    await turn()
    holds.changed("s1")
    second = asyncio.create_task(holds.wait(Route("h", "s1", 4, "hold"), 5, Request()))
    await turn()
    assert [route.incarnation for route in asked] == [3, 4]
    holds.changed("s1")
    await asyncio.gather(first, second)


async def test_asked_again_when_control_is_back() -> None:
    holds, asked = made()
    task = asyncio.create_task(holds.wait(ROUTE, 5, Request()))
    await turn()
    holds.ask_again(lambda session: ROUTE)
    assert asked == [ROUTE, ROUTE]
    holds.changed("s1")
    await task


# ---- bounds ----


async def test_a_session_holds_so_many_requests_and_bytes() -> None:
    holds, _ = made(held_requests=2, held_bytes=65536)
    async with held(holds, [(ROUTE, Request())] * 2):
        with pytest.raises(HoldFull, match="held_requests"):
            await holds.wait(ROUTE, 5, Request())
        with pytest.raises(HoldFull, match="held_bytes"):
            await holds.wait(route("s2"), 5, Request(65537))


async def test_four_sleeping_sessions_do_not_fill_what_a_worker_holds() -> None:
    """The kind of L17: a bound in total that the first who come may use up."""
    holds, _ = made(held_requests=100)
    async with held(holds, [(route(f"greedy-{n}"), Request()) for _ in range(100) for n in range(4)]) as waiting:
        greedy = len(waiting)
        assert 250 < greedy < 300
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(holds.wait(route(f"other-{n}"), 60, Request())) for n in range(10)]
            await turn()
            assert holds.statistics()["requests"] == greedy + 10
            for n in range(10):
                holds.changed(f"other-{n}")
        assert all(task.done() for task in others)


async def test_an_account_with_many_sessions_leaves_the_others_a_share() -> None:
    holds, _ = made(held_requests=100)
    async with held(holds, [(route(f"s{n}", "greedy"), Request()) for n in range(1000)]) as waiting:
        assert len(waiting) == 300
        async with held(Holds(Edge(), lambda route: None), []):
            other = asyncio.create_task(holds.wait(route("other", "other"), 60, Request()))
            await turn()
            assert not other.done()
            holds.changed("other")
            await other


async def test_bytes_are_bounded_in_total_and_a_request_without_a_body_is_held_all_the_same() -> None:
    holds, _ = made(held_bytes=65536)
    async with held(holds, [(route(f"s{n}"), Request(8192)) for n in range(100)]):
        assert holds.statistics()["bytes"] <= 4 * 65536
        async with asyncio.TaskGroup() as group:
            group.create_task(holds.wait(route("other"), 60, Request()))
            await turn()
            holds.changed("other")


async def test_a_held_body_that_grows_beyond_the_bound_is_said_to() -> None:
    holds, _ = made(held_bytes=65536)
    one, other = Request(1000), Request()
    async with held(holds, [(ROUTE, one), (ROUTE, other)]):
        assert one.held_for is not None and other.held_for is not None
        assert holds.grow(one.held_for, 60_000)
        assert not holds.grow(other.held_for, 10_000)
        assert holds.statistics()["bytes"] == 71_000
    assert one.held_for is None


async def test_what_is_left_is_what_was_counted_whatever_the_request_says_of_itself_meanwhile() -> None:
    holds, _ = made()
    request = Request(500)
    task = asyncio.create_task(holds.wait(ROUTE, 5, request))
    await turn()
    request.held_bytes = 0  # its body went elsewhere before its wait was over
    holds.changed("s1")
    await task
    assert holds.statistics() == NOTHING


async def test_deadline_and_leaving_clients_leave_nothing() -> None:
    holds, _ = made()
    with pytest.raises(TimeoutError):
        await holds.wait(ROUTE, 0, Request(10))
    task = asyncio.create_task(holds.wait(ROUTE, 5, Request(10)))
    await turn()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    holds.changed("s1")
    assert holds.statistics() == NOTHING


class Model(RuleBasedStateMachine):
    """Any order of requests, growth, changes and departures: what is held stays within the bounds, and a session that holds nothing is
    refused only where nothing at all is free."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.holds = Holds(Edge(held_requests=4, held_bytes=65536), lambda route: None)
        self.waiting: list[tuple[Route, Request, asyncio.Task[float]]] = []

    def turns(self) -> None:
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))
        for _, _, task in self.waiting:
            if task.done() and not task.cancelled():
                assert task.exception() is None
        self.waiting = [one for one in self.waiting if not one[2].done()]

    @rule(session=st.integers(0, 9), account=st.integers(0, 3), size=st.sampled_from([0, 100, 30_000, 70_000]))
    def ask(self, session: int, account: int, size: int) -> None:
        where, request = route(f"{account}/{session}", f"{account}"), Request(size)
        before = self.holds.statistics()
        task = self.loop.create_task(self.holds.wait(where, 60, request))
        self.loop.run_until_complete(asyncio.sleep(0))
        if not task.done():
            self.waiting.append((where, request, task))
            return
        assert isinstance(task.exception(), HoldFull)
        holds_some = any(one[0].account == where.account for one in self.waiting)
        assert holds_some or before["requests"] >= 16 or before["bytes"] + size > 4 * 65536 - before["bytes"] or size > 65536

    @rule(data=st.data(), size=st.integers(1, 40_000))
    def grow(self, data: Any, size: int) -> None:
        if self.waiting:
            _, request, task = data.draw(st.sampled_from(self.waiting))
            assert request.held_for is not None
            if not self.holds.grow(request.held_for, size):
                task.cancel()
                self.turns()

    @rule(data=st.data(), leaves=st.booleans())
    def end(self, data: Any, leaves: bool) -> None:
        if self.waiting:
            where, _, task = data.draw(st.sampled_from(self.waiting))
            task.cancel() if leaves else self.holds.changed(where.session)
            self.turns()

    @invariant()
    def is_within_bounds(self) -> None:
        found = self.holds.statistics()
        assert found["requests"] == len(self.waiting) <= 16 and found["bytes"] <= 4 * 65536

    def teardown(self) -> None:
        for _, _, task in self.waiting:
            task.cancel()
        self.turns()
        assert self.holds.statistics() == NOTHING
        self.loop.close()


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
