"""What was wrong with an application is a line in its microVM's log: from the exchange that failed to the ring that root reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import Rig, response
from waiting import until

from gateway.edge import native
from gateway.edge.records.faults import SESSIONS_MAX, TEXT_MAX_CHARACTERS, TEXTS_MAX, WINDOW_SECONDS, FaultLines
from gateway.sessions.faults import FaultLog
from gateway.sessions.logs import LogStore
from gateway.sessions.model import Session

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:app"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def session(**members: Any) -> Session:
    return Session("microvm-1", "e", ARN, "1.0", "key", 512, 0.0, 60, **members)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


# ---- a worker's lines ----


def test_a_new_fault_is_due_at_once_and_its_repetitions_are_one_line() -> None:
    clock = Clock()
    faults = FaultLines(clock)
    for _ in range(5):
        faults.add("s1", "port 80: nothing listens")
    assert faults.take() == {"s1": ["port 80: nothing listens"]}
    faults.add("s1", "port 80: nothing listens")
    assert faults.take() == {}
    clock.now += WINDOW_SECONDS
    assert faults.take() == {"s1": ["port 80: nothing listens (5 more in 10 s)"]}
    assert faults.take() == {}
    faults.add("s1", "port 80: nothing listens")
    assert faults.take() == {"s1": ["port 80: nothing listens"]}


def test_a_sessions_faults_are_bounded_and_its_neighbours_are_written() -> None:
    clock = Clock()
    faults = FaultLines(clock)
    for number in range(1000):
        faults.add("s1", f"{number} " + "x" * 1000)
    faults.add("s2", "other")
    due = faults.take()
    assert len(due["s1"]) == TEXTS_MAX and max(map(len, due["s1"])) == TEXT_MAX_CHARACTERS and due["s2"] == ["other"]
    clock.now += WINDOW_SECONDS
    assert faults.take() == {"s1": [f"{1000 - TEXTS_MAX} other faults in 10 s"]}


def test_the_number_of_sessions_with_faults_is_bounded_and_falls_again() -> None:
    clock = Clock()
    faults = FaultLines(clock)
    for number in range(2 * SESSIONS_MAX):
        faults.add(f"s{number}", "fault")
    assert len(faults.take()) == SESSIONS_MAX
    clock.now += WINDOW_SECONDS
    faults.take()
    faults.add("another", "fault")
    assert faults.take() == {"another": ["fault"]}


# ---- control's log ----


def test_a_line_goes_to_the_microvms_stream(tmp_path: Path) -> None:
    store = LogStore(tmp_path)
    log = FaultLog(store)
    one = session(execution_role="role", log_group="group", log_stream="stream")
    log.write(one, ["port 80: nothing listens"])
    assert [event.m for event in store.read(one.account, "group", "stream")[0]] == ["torpor: port 80: nothing listens"]
    answer = log.read(one, 0)
    assert (answer.group, answer.stream, answer.why, answer.lines) == ("group", "stream", "", [])


def test_without_an_execution_role_lines_are_kept_in_memory_and_the_store_stays_empty(tmp_path: Path) -> None:
    store = LogStore(tmp_path)
    log = FaultLog(store, Clock())
    one = session()
    log.write(one, ["first"])
    log.write(one, ["second"])
    answer = log.read(one, 0)
    assert answer.why == "it has no execution role" and [line.text for line in answer.lines] == ["torpor: first", "torpor: second"]
    assert [line.text for line in log.read(one, answer.lines[0].number).lines] == ["torpor: second"]
    assert store.names() == []
    assert log.read(session(execution_role="role"), 0).why == "logging is disabled for it"


def test_lines_in_memory_are_bounded_and_are_lines(tmp_path: Path) -> None:
    log = FaultLog(LogStore(tmp_path))
    one = session()
    for _ in range(100):
        log.write(one, ["two\nlines\x1b[0m" + "x" * 10_000] * 100)
    lines = log.read(one, 0).lines
    assert len(lines) == 64 and all(len(line.text) < 600 and line.text.isprintable() for line in lines)


def test_a_full_disk_leaves_the_line_in_memory(tmp_path: Path) -> None:
    (tmp_path / "logs").write_bytes(b"not a directory")
    store = LogStore(tmp_path / "logs")
    log = FaultLog(store)
    one = session(execution_role="role", log_group="group", log_stream="stream")
    log.write(one, ["waits for the disk"])
    store.flush()
    assert store.trouble
    log.write(one, ["fault"])
    assert [line.text for line in log.read(one, 0).lines] == ["torpor: fault"]
    (tmp_path / "logs").unlink()
    assert [event.m for event in store.read(one.account, "group", "stream")[0]] == ["torpor: waits for the disk", "torpor: fault"]


# ---- what becomes a line ----


async def test_a_port_on_which_nothing_listens(rig: Rig) -> None:
    await rig.start(connect_seconds=0.1, hold_seconds=0.2)
    rig.application.close()
    await rig.application.wait_closed()
    ((status, _, body),) = await rig.ask(rig.request())
    assert (status, body) == (502, b"")
    assert await rig.control.fault() == f"s1 port {rig.app_port}: nothing listens"


async def test_a_session_that_is_not_resumed_in_time(rig: Rig) -> None:
    await rig.start(hold_seconds=0.05)
    await rig.control.change("hold")
    ((status, _, _),) = await rig.ask(rig.request())
    assert status == 502
    assert await rig.control.fault() == f"s1 port {rig.app_port}: the MicroVM could not take the request within 0.05 s (edge.hold_seconds)"


async def test_more_requests_than_are_held(rig: Rig) -> None:
    await rig.start(held_requests=1)
    await rig.control.change("hold")
    _, writer = await rig.open()
    writer.write(rig.request())
    await until(lambda: rig.worker.holds.statistics()["requests"] == 1)
    ((status, _, _),) = await rig.ask(rig.request())
    assert status == 429
    assert (await rig.control.fault()).startswith(f"s1 port {rig.app_port}: more requests wait for the MicroVM than its share")
    writer.close()


async def test_the_endpoints_limits(rig: Rig) -> None:
    await rig.start(limits="custom", limit_requests_per_second=1, workers=1)
    answers = await rig.ask(rig.request() * 2, answers=2)
    assert [status for status, _, _ in answers] == [200, 429]
    assert (
        await rig.control.fault() == f"s1 port {rig.app_port}: more requests or connections than the endpoint's limits allow (edge.limits)"
    )


async def test_a_body_that_grows_beyond_what_is_held(rig: Rig) -> None:
    await rig.start(held_bytes=65536)
    await rig.control.change("hold")
    connections = [await rig.open() for _ in range(3)]
    for number, (_, writer) in enumerate(connections):
        writer.write(rig.request("/", "Content-Length: 100000", method="POST"))
        await until(lambda number=number: rig.worker.holds.statistics()["requests"] == number + 1)  # type: ignore[misc]
    for _, writer in connections:
        writer.write(bytes(30_000))
    await until(lambda: rig.worker.holds.statistics()["requests"] == 2)
    answers = [asyncio.ensure_future(response(reader)) for reader, _ in connections]
    answered, waiting = await asyncio.wait(answers, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert [(await one)[0] for one in answered] == [429]  # whichever's bytes were read last
    for one in waiting:
        one.cancel()
    assert (await rig.control.fault()).startswith(f"s1 port {rig.app_port}: more of requests' bodies waits")
    for _, writer in connections:
        writer.close()


async def test_a_microvm_that_no_request_resumes(rig: Rig) -> None:
    await rig.start()
    await rig.control.change("refuse")
    ((status, _, body),) = await rig.ask(rig.request())
    assert (status, body) == (502, b"")
    assert await rig.control.fault() == "s1 a request was refused: the MicroVM is not running, and no request resumes it"


@pytest.mark.skipif(native.directory().is_dir() and native.is_wanted(), reason="objects of compiled classes cannot be changed")
async def test_a_fault_of_the_service(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()

    async def connect(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rig.worker.upstream, "connect", connect)
    ((status, _, _),) = await rig.ask(rig.request())
    assert status == 500
    assert await rig.control.fault() == f"s1 port {rig.app_port}: the service failed; its own log says more"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", "response has two different Content-Length values (RFC 9112 6.3)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what the application answered is not HTTP (RFC 9112, 4)"),
        (b"", "the application closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the application closed the connection in the middle of the response's head (RFC 9112, 8)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "the application closed the connection before the response's content was complete (RFC 9112, 8)"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "the response switches protocols, which the request did not ask for (RFC 9110, 15.2.2)"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", None),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", None),
    ],
)  # fmt: skip
async def test_an_answer_that_cannot_be_taken_names_the_rule_and_its_clause(rig: Rig, answer: bytes, line: str | None) -> None:
    await rig.start()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(answer)
        await writer.drain()

    rig.script = script
    reader, writer = await rig.open()
    writer.write(rig.request("/", method="POST"))
    await reader.read(65536)
    told = await rig.control.fault()
    assert told.startswith(f"s1 port {rig.app_port}: ") and (line is None or told.endswith(line)), told
    assert "RFC" in told or "edge." in told or not answer
    writer.close()


async def test_repeated_faults_are_not_repeated_lines(rig: Rig) -> None:
    await rig.start(connect_seconds=0.05, hold_seconds=0.1)
    rig.application.close()
    await rig.application.wait_closed()
    await asyncio.gather(*(rig.ask(rig.request()) for _ in range(20)))
    assert (await rig.control.fault()).endswith(f"port {rig.app_port}: nothing listens")
