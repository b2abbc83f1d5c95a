"""Parking by itself: who is woken, and what becomes of streams whose session does not run again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from waiting import turns, until

from gateway.config import Edge
from gateway.edge.origin.parking import Parking
from gateway.edge.policy.holds import Holds
from gateway.messages import Route


class Connection:
    stream_count = 2

    def __init__(self, session: str = "s1") -> None:
        self.key = (session, 1, 80)
        self.said: list[str] = []

    def cut(self) -> None:
        self.said.append("cut")


class Worker:
    def __init__(self) -> None:
        self.settings = Edge(hold_seconds=5)
        self.asked: list[Route] = []
        self.holds = Holds(self.settings, self.asked.append)
        self.route: Route | None = Route("one.example", "s1", 1, "hold")
        self.faults: list[str] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.adopted: list[tuple[Any, int]] = []
        self.parking = Parking(self, self.adopt)

    def route_of_session(self, session: str) -> Route | None:
        return self.route

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Any:
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]

    def guard(self, work: Callable[..., object], *arguments: object) -> bool:
        try:
            work(*arguments)
        except ZeroDivisionError:
            return False
        return True

    def report_fault(self, session: str, text: str) -> None:
        self.faults.append(f"{session}: {text}")

    def adopt(self, connection: Any, incarnation: int) -> None:
        if "cannot be adopted" in connection.said:
            raise ZeroDivisionError
        self.adopted.append((connection, incarnation))

    def change(self, gate: str, incarnation: int) -> None:
        self.route = Route("one.example", "s1", incarnation, gate)
        self.holds.changed("s1")


@pytest.fixture
async def worker() -> Worker:
    return Worker()


def parked(worker: Worker, *connections: Any) -> None:
    for connection in connections:
        worker.parking.add(connection)


async def test_a_session_is_woken_once_however_many_speak(worker: Worker) -> None:
    first, second = Connection(), Connection()
    parked(worker, first, second)
    for connection in (first, second, first):
        worker.parking.wake(connection)  # type: ignore[arg-type]
    await until(lambda: worker.asked)
    worker.change("open", 2)
    await asyncio.gather(*worker.tasks)
    assert len(worker.asked) == len(worker.tasks) == 1
    assert {(connection, incarnation) for connection, incarnation in worker.adopted} == {(first, 2), (second, 2)}
    assert worker.parking.count == 0


async def test_a_wake_that_does_not_come_to_be_cuts_the_streams_and_says_so(worker: Worker) -> None:
    worker.settings.hold_seconds = 0.02
    connection = Connection()
    parked(worker, connection)
    worker.parking.wake(connection)  # type: ignore[arg-type]
    await until(lambda: connection.said)
    assert connection.said == ["cut"] and not worker.parking.count
    assert worker.faults == [
        "s1: 2 streams that waited for the MicroVM were closed: it did not run again within 0.02 s (edge.hold_seconds)"
    ]


@pytest.mark.parametrize("gate", ["refuse", None])
async def test_a_session_that_will_not_run_again_has_its_streams_cut(worker: Worker, gate: str | None) -> None:
    worker.route = Route("one.example", "s1", 1, gate) if gate else None
    connection = Connection()
    parked(worker, connection)
    worker.parking.wake(connection)  # type: ignore[arg-type]
    await asyncio.gather(*worker.tasks)
    assert connection.said == ["cut"] and not worker.asked and not worker.faults


async def test_a_stream_that_cannot_go_on_is_cut_alone(worker: Worker) -> None:
    bad, good = Connection(), Connection()
    bad.said.append("cannot be adopted")
    parked(worker, bad, good)
    worker.parking.opened(Route("one.example", "s1", 2, "open"))
    assert bad.said[-1] == "cut" and worker.adopted == [(good, 2)] and not good.said


async def test_streams_of_another_session_stay(worker: Worker) -> None:
    mine, other = Connection(), Connection("s2")
    parked(worker, mine, other)
    worker.parking.over("s1")
    assert mine.said == ["cut"] and worker.parking.streams("s2") == worker.parking.count == 2
    worker.parking.discard(other)  # type: ignore[arg-type]
    worker.parking.close()
    await turns()
    assert not other.said
