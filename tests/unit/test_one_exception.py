"""One exception ends one thing: a callback that raises stops neither the loop that calls it nor those behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from edge_rig import Rig, response
from waiting import turn, until

from gateway.config import Edge
from gateway.edge import native
from gateway.edge import worker as worker_module
from gateway.edge.client.certificates import Certificates
from gateway.edge.policy.fairness import QUOTA, FairQueue
from gateway.edge.policy.holds import Holds
from gateway.edge.policy.routes import Account
from gateway.messages import Route

ROUTE = Route("h", "s1", 3, "hold")


class Fault(Exception):
    pass


def fault(*arguments: object) -> None:
    raise Fault


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    monkeypatch.setattr(worker_module, "_SWEEP_SECONDS", 0.01)
    monkeypatch.setattr(worker_module, "_REPORT_SECONDS", 0.01)
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


# ---- turns ----


@pytest.mark.parametrize("position", [0, 1, QUOTA - 1, QUOTA])
async def test_a_deferred_request_that_raises_leaves_the_others_their_turns(position: int) -> None:
    turns, account, other = FairQueue(), Account(), Account()
    served: list[int] = []
    works: list[Callable[[], None]] = [lambda number=number: served.append(number) for number in range(2 * QUOTA)]  # type: ignore[misc]
    works.insert(position, fault)
    for work in works:
        turns.defer(account, work)
    turns.defer(other, lambda: served.append(-1))
    for _ in range(5):
        await turn()
    assert [number for number in served if number >= 0] == list(range(2 * QUOTA)) and -1 in served
    turns.defer(account, lambda: served.append(100))
    await turn()
    assert served[-1] == 100, "the queue is scheduled again"


# ---- holds ----


class Request:
    held_for: str | None = None
    held_bytes = 0


async def test_a_question_that_cannot_be_asked_ends_its_request_and_is_asked_again_by_the_next() -> None:
    asked: list[Route] = []

    def ask(route: Route) -> None:
        asked.append(route)
        if len(asked) == 1:
            raise Fault

    holds = Holds(Edge(), ask)
    with pytest.raises(Fault):
        await holds.wait(ROUTE, 5, Request())
    assert holds.statistics() == {"sessions": 0, "requests": 0, "bytes": 0}
    second = asyncio.create_task(holds.wait(ROUTE, 5, Request()))
    await turn()
    assert len(asked) == 2
    holds.changed("s1")
    await second


async def test_asking_again_for_one_session_that_raises_asks_for_the_others() -> None:
    asked: list[str] = []
    holds = Holds(Edge(), lambda route: asked.append(route.session))
    tasks = [asyncio.create_task(holds.wait(Route(name, name, 1, "hold"), 5, Request())) for name in ("a", "b", "c")]
    await turn()

    def find(session: str) -> Route | None:
        if session == "a":
            raise Fault
        return Route(session, session, 1, "hold")

    holds.ask_again(find)
    assert asked == ["a", "b", "c", "b", "c"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- the worker's background ----


class Client:
    """A client connection whose every call raises."""

    is_quiet = True

    def __init__(self) -> None:
        self.is_aborted = False
        self.transport = self

    def abort(self) -> None:
        self.is_aborted = True

    begin_drain = press_drain = close_idle = sweep = fault


async def test_a_client_that_cannot_be_swept_is_ended_and_the_others_are_swept(rig: Rig) -> None:
    await rig.start(head_seconds=0.05)
    broken = Client()
    rig.worker.clients.add(broken)  # type: ignore[arg-type]
    reader, writer = await rig.open()
    writer.write(b"GET / HTTP/1.1\r\n")
    assert (await response(reader))[0] == 408
    assert broken.is_aborted and broken not in rig.worker.clients
    writer.close()


class Faulty:
    """In place of an object, one of whose methods raises: objects of compiled classes cannot be changed."""

    def __init__(self, real: Any, method: str) -> None:
        self._real = real
        setattr(self, method, fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_pools_that_cannot_be_swept_leave_the_certificates_refreshed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    refreshed = asyncio.Event()

    class Files:
        def refresh(self) -> bool:
            refreshed.set()
            return False

    monkeypatch.setattr(rig.worker, "upstream", Faulty(rig.worker.upstream, "sweep"))
    rig.worker._certificates = Files()  # type: ignore[assignment]
    async with asyncio.timeout(5):
        await refreshed.wait()
    rig.worker._certificates = None


async def test_a_report_that_cannot_be_made_is_made_the_next_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    real, calls = rig.worker.holds.statistics, []

    def statistics() -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise Fault
        return real()

    monkeypatch.setattr(rig.worker.holds, "statistics", statistics)
    await rig.ask(rig.request())
    await until(lambda: getattr(rig.control, "counters", None))


@pytest.mark.skipif(native.directory().is_dir() and native.is_wanted(), reason="objects of compiled classes cannot be changed")
async def test_connections_that_cannot_be_ended_leave_held_requests_their_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    await rig.control.change("hold", is_live=False)
    reader, writer = await rig.open()
    writer.write(rig.request("/held"))
    await until(lambda: rig.worker.holds.statistics()["requests"])
    monkeypatch.setattr(rig.worker, "upstream", Faulty(rig.worker.upstream, "end"))
    await rig.control.change("open", incarnation=2)
    assert (await response(reader))[2] == b"/held"
    writer.close()
    monkeypatch.undo()


async def test_a_drain_goes_on_past_a_client_that_raises(rig: Rig) -> None:
    await rig.start()
    rig.worker.clients.add(Client())  # type: ignore[arg-type]
    reader, writer = await rig.open()
    writer.write(rig.request())
    await response(reader)
    draining = asyncio.create_task(rig.worker.drain())
    await until(lambda: len(rig.worker.clients) == 1)
    writer.write(rig.request())
    assert (await response(reader))[1]["connection"] == "close"
    async with asyncio.timeout(5):
        assert await reader.read() == b""
        await draining
    writer.close()


async def test_a_parked_stream_that_cannot_go_on_leaves_the_others_theirs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()
    adopted: list[object] = []

    class Stream:
        key = ("s1", 1, 80)
        stream_count = 1
        was_cut = False

        def cut(self) -> None:
            self.was_cut = True

    streams = [Stream() for _ in range(3)]
    for stream in streams:
        rig.worker.parking.add(stream)  # type: ignore[arg-type]

    def adopt(stream: object, incarnation: int) -> None:
        if not adopted:
            adopted.append(stream)
            raise Fault
        adopted.append(stream)

    monkeypatch.setattr(rig.worker.parking, "_adopt", adopt)
    rig.worker.parking.opened(Route("h", "s1", 2, "open"))
    assert len(adopted) == 3 and [one.was_cut for one in streams].count(True) == 1 and rig.worker.parking.count == 0


# ---- certificates ----


def test_files_that_cannot_be_looked_at_leave_the_certificate_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Certificates, "_load", lambda self: "first")
    certificates = Certificates(tmp_path)

    def refuse(self: Path) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Certificates, "_load", refuse)
    monkeypatch.setattr(Path, "stat", refuse)
    assert certificates.refresh() is False
    assert certificates.context == "first"  # type: ignore[comparison-overlap]
