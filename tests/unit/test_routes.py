"""Control's side of routing: who hears of a change, and when."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from waiting import turns

from gateway.messages import Route
from gateway.sessions import routes as routing
from gateway.sessions.model import Session
from gateway.sessions.routes import Routes
from gateway.sessions.states import State


class Worker:
    """A connection to an edge that notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str, bool]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def notify(self, method: str, body: Any) -> None:
        assert method == "route" and isinstance(body, Route)
        self.heard.append((body.incarnation, body.gate, body.is_live))


@pytest.fixture
async def table() -> tuple[Routes, Worker, Worker, Session]:
    routes, holder, other = Routes(2, 0.1), Worker(), Worker()
    routes.add_worker(holder, "1")  # type: ignore[arg-type]
    routes.add_worker(other, "2")  # type: ignore[arg-type]
    one = Session(
        "s1",
        "h1",
        "arn:aws:lambda:us-east-1:123456789012:microvm-image:a",
        "1.0",
        "image",
        512,
        0.0,
        3600,
        state=State.SUSPENDED,
        incarnation=1,
    )
    routes.publish(one)
    for worker in (holder, other):
        worker.heard.clear()
    return routes, holder, other, one


async def test_who_holds_requests_hears_first(table: tuple[Routes, Worker, Worker, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_OTHERS_SECONDS", 0)
    routes, holder, other, one = table
    routes.holds(holder, one)  # type: ignore[arg-type]
    one.state, one.incarnation = State.RESUMING, 2
    routes.publish(one, is_begun=True)
    one.state = State.RUNNING
    routes.publish(one)
    assert holder.heard == [(2, "hold", True), (2, "open", True)] and other.heard == []
    await turns()
    assert len(holder.heard) == 2 and other.heard == [(2, "open", True)]
    one.state = State.TERMINATING
    routes.publish(one)
    assert holder.heard[-1] == other.heard[-1] == (2, "refuse", False)


async def test_who_hears_late_hears_what_is_true_by_then(
    table: tuple[Routes, Worker, Worker, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_OTHERS_SECONDS", 0)
    routes, holder, other, one = table
    routes.holds(holder, one)  # type: ignore[arg-type]
    one.state = State.RUNNING
    routes.publish(one)
    one.state = State.TERMINATING
    routes.publish(one)
    await turns()
    assert {gate for _, gate, _ in other.heard} == {"refuse"}


async def test_a_microvm_that_nobody_waits_for_is_everybodys_at_once(table: tuple[Routes, Worker, Worker, Session]) -> None:
    routes, holder, other, one = table
    one.state = State.RUNNING
    routes.publish(one)
    assert holder.heard == other.heard == [(1, "open", True)]


async def test_nothing_is_kept_of_a_worker_that_went(table: tuple[Routes, Worker, Worker, Session]) -> None:
    """Of each that was replaced while it held requests, its connection once stayed for as long as the session slept."""
    routes, holder, other, one = table
    routes.holds(holder, one)  # type: ignore[arg-type]
    routes.holds(other, one)  # type: ignore[arg-type]
    holder.closed.set_result(None)
    await turns()
    assert routes._holders == {"s1": {other}} and list(routes._workers) == [other]
    other.closed.set_result(None)
    await turns()
    assert not routes._holders and not routes._workers
