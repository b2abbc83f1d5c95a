"""The access log and the counters: a line a request, once, whatever ends it; a file that can be replaced; a disk that stands still."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import OK, Rig, response
from h2_client import Judge, fields
from waiting import until

from gateway.edge.records import access_log
from gateway.edge.records.access_log import AccessLog
from gateway.edge.records.counters import Counters
from gateway.edge.records.record import HTTP1, HTTP2, RequestRecord

BIG = 600_000


def record(number: int = 0, **changes: Any) -> RequestRecord:
    made = RequestRecord(
        b"id-%d" % number, "192.0.2.1", HTTP1, "host", b"GET", b"/path?secret", 200, 5, 10.0, 10.25, 10.5, 0.125, "", ""
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[AccessLog]:
    (tmp_path / "logs").mkdir()
    one = AccessLog(tmp_path / "logs/access.log", lambda: 1000.0)
    yield one
    one.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs/access.log"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


def ids(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def lines(rig: Rig) -> list[dict[str, Any]]:
    log = rig.worker.counters.access
    assert log is not None and log.settle(5)
    return [json.loads(line) for line in (rig.directory / "access.log").read_text().splitlines()]


class Disk:
    """os.write as a disk has it: it takes so many bytes of what it is given, stands still, or is full."""

    def __init__(self) -> None:
        self.moves = threading.Event()
        self.moves.set()
        self.room = 1 << 30
        self.step = 1 << 30
        self.waiting = threading.Event()

    def write(self, descriptor: int, data: bytes) -> int:
        self.waiting.set()
        self.moves.wait(10)
        size = min(len(data), self.room, self.step)
        if not size:
            raise OSError(28, "No space left on device")
        self.room -= size
        return self.real(descriptor, data[:size])

    real: Callable[[int, bytes], int] = staticmethod(os.write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    one = Disk()
    monkeypatch.setattr(access_log.os, "write", one.write)
    yield one
    one.moves.set()


# ---- a line ----


async def test_a_line_has_the_times_in_milliseconds_and_no_query(log: AccessLog, path: Path) -> None:
    log.add(record(closed_by="client", reason="why"))
    assert log.settle(5)
    assert json.loads(path.read_text()) == {
        "time": 1000.0, "id": "id-0", "client": "192.0.2.1", "protocol": "HTTP/1.1", "host": "host", "method": "GET", "path": "/path",
        "status": 200, "sent_bytes": 5, "total_ms": 500.0, "hold_ms": 125.0, "first_byte_ms": 250.0, "closed_by": "client", "reason": "why",
    }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o640


async def test_lines_are_written_without_being_asked_for(log: AccessLog, path: Path) -> None:
    log.add(record(1))
    log.add(record(2))
    await until(lambda: path.read_bytes().count(b"\n") == 2)
    assert ids(path) == ["id-1", "id-2"]


# ---- rotation ----


async def test_a_reopened_log_goes_on_in_the_new_file(log: AccessLog, path: Path) -> None:
    log.add(record(1))
    assert log.settle(5)
    rotated = path.rename(path.with_name("rotated"))
    log.reopen()
    log.add(record(2))
    assert log.settle(5)
    assert (ids(rotated), ids(path), log.lost) == (["id-1"], ["id-2"], 0)


async def test_a_log_that_cannot_be_reopened_stays_open_and_its_descriptor_is_nobody_elses(log: AccessLog, path: Path) -> None:
    path.parent.rename(path.parent.with_name("away"))
    log.reopen()
    assert log.settle(5)
    with open(os.devnull, "rb") as other:  # takes the lowest free number: the log's own, had that been closed
        log.add(record(1))
        assert log.settle(5)
        assert log.lost == 0 and log.not_reopened == 1
        assert os.readlink(f"/proc/self/fd/{other.fileno()}") == os.devnull
    assert ids(path.parent.with_name("away") / path.name) == ["id-1"]
    path.parent.mkdir()
    log.reopen()
    log.add(record(2))
    assert log.settle(5)
    assert ids(path) == ["id-2"]


async def test_reopening_leaves_no_descriptor_behind(log: AccessLog) -> None:
    log.reopen()
    assert log.settle(5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        log.reopen()
    assert log.settle(5)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- disks ----


async def test_a_disk_that_stands_still_costs_lines_neither_the_loop_nor_memory(
    log: AccessLog, path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_BATCH_MAX_BYTES", 1000)
    disk.moves.clear()
    log.add(record(0))
    await until(disk.waiting.is_set)  # the loop runs while the write does not return
    for number in range(1, 100):
        log.add(record(number))
    log.flush()
    assert sum(map(len, log._lines)) < 2000 and 80 < log.lost < 99
    disk.moves.set()
    assert log.settle(5)
    assert len(ids(path)) + log.lost == 100


async def test_a_disk_that_takes_a_part_gets_the_rest(log: AccessLog, path: Path, disk: Disk) -> None:
    disk.step = 7
    for number in range(3):
        log.add(record(number))
    assert log.settle(5)
    assert (ids(path), log.lost) == (["id-0", "id-1", "id-2"], 0)


@pytest.mark.parametrize("room", [0, 10, 300, 10_000])
async def test_lines_that_a_full_disk_does_not_take_whole_are_lost_and_the_next_is_a_line_of_its_own(
    log: AccessLog, path: Path, disk: Disk, room: int
) -> None:
    disk.room = room
    for number in range(4):
        log.add(record(number))
    assert log.settle(5)
    whole = path.read_bytes().count(b"\n")
    assert log.lost == 4 - whole
    disk.room = 0
    log.add(record(4))
    assert log.settle(5)
    disk.room = 1 << 30
    log.add(record(5))
    assert log.settle(5)
    written = path.read_text().splitlines()
    assert json.loads(written[-1])["id"] == "id-5"
    assert log.lost == 5 - whole and len([line for line in written if line.endswith("}")]) == whole + 1


async def test_the_end_does_not_wait_for_a_disk_that_stands_still(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_CLOSE_SECONDS", 0.02)
    log = AccessLog(tmp_path / "log", lambda: 0.0)
    disk.moves.clear()
    log.add(record())
    log.flush()
    ends = threading.Thread(target=log.close)
    ends.start()
    ends.join(5)
    is_over = not ends.is_alive()
    disk.moves.set()
    ends.join()
    assert is_over


# ---- counters ----


def test_request_ids_are_uuids_and_differ() -> None:
    counters = Counters(None)
    found = [counters.request_id() for _ in range(10_000)]
    assert len(set(found)) == len(found) and all(len(one) == 36 and one.count(b"-") == 4 for one in found)
    assert len({one[:20] for one in found}) == 1 and Counters(None).request_id()[:20] != found[0][:20]


def test_answers_are_counted_by_protocol_and_first_digit() -> None:
    counters = Counters(None)
    for protocol, status in ((HTTP1, 200), (HTTP1, 204), (HTTP2, 502), (HTTP2, 999)):
        counters.count(protocol, status)
    assert counters.answers == [[0, 0, 2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]]


# ---- what a request becomes ----


def lose(writer: asyncio.StreamWriter) -> None:
    """A connection that ends with a reset, not with a FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def big(rig: Rig, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await rig.head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BIG + bytes(BIG))
        await writer.drain()


@pytest.mark.parametrize("how", ["reset", "loss"])
async def test_an_aborted_http2_download_is_one_line_and_one_answer(rig: Rig, how: str) -> None:
    await rig.start(http2=True, access_log=str(rig.directory / "access.log"))
    rig.script = lambda reader, writer: big(rig, reader, writer)
    client = Judge(*await rig.open())
    client.auto_credit = False
    number = client.ask(fields(rig))
    while len(client.answers[number].body) < 65535:
        await client.turn()
    (connection,) = rig.worker.clients
    (stream,) = connection.streams.values()  # type: ignore[union-attr]
    await until(lambda: stream.end_after_queue or stream.source_paused)
    if how == "reset":
        client.h2.reset_stream(number, 8)
        client.flush()
    else:
        lose(client.writer)
    await until(lambda: stream.number not in connection.streams)  # type: ignore[union-attr]
    (line,) = lines(rig)
    assert (line["status"], line["closed_by"], line["sent_bytes"]) == (200, "client", 65535)
    assert sum(rig.worker.counters.answers[HTTP2]) == 1


async def test_an_http2_download_is_counted_when_its_client_has_it(rig: Rig) -> None:
    await rig.start(http2=True, access_log=str(rig.directory / "access.log"))
    rig.script = lambda reader, writer: big(rig, reader, writer)
    client = Judge(*await rig.open())
    assert len((await client.answer(client.ask(fields(rig, "/x?y")))).body) == BIG
    (line,) = lines(rig)
    assert (line["path"], line["status"], line["sent_bytes"], line["protocol"]) == ("/x", 200, BIG, "HTTP/2") and "closed_by" not in line


@pytest.mark.parametrize("http2", [False, True])
async def test_a_refusal_has_its_reason_and_the_id_that_the_client_was_told(rig: Rig, http2: bool) -> None:
    await rig.start(http2=http2, access_log=str(rig.directory / "access.log"))
    if http2:
        client = Judge(*await rig.open())
        answer = await client.answer(client.ask([*fields(rig)[:4], ("x-aws-proxy-auth", rig.minter.mint("s2", [(1, 65535)], 600))]))
        status, told = answer.status, answer.fields["x-amzn-requestid"]
    else:
        ((status, heads, _),) = await rig.ask(rig.request(token=rig.minter.mint("s2", [(1, 65535)], 600)))
        told = heads["x-amzn-requestid"]
    (line,) = lines(rig)
    assert (status, line["id"], line["status"], line["reason"]) == (403, told, 403, "Token authentication failed")


async def test_a_session_that_no_request_resumes_is_named(rig: Rig) -> None:
    await rig.start(access_log=str(rig.directory / "access.log"))
    await rig.control.change("refuse")
    await rig.ask(rig.request())
    (line,) = lines(rig)
    assert (line["status"], line["reason"]) == (502, "the MicroVM is not running, and no request resumes it")


async def test_the_next_request_of_a_connection_has_no_reason_and_no_times_of_the_one_before(rig: Rig) -> None:
    await rig.start(connect_seconds=0.01, hold_seconds=0.05, access_log=str(rig.directory / "access.log"))
    rig.application.close()
    await rig.application.wait_closed()
    reader, writer = await rig.open()
    writer.write(rig.request("/refused"))
    assert (await response(reader))[0] == 502
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port)
    writer.write(rig.request("/answered"))
    assert (await response(reader))[0] == 200
    writer.write(rig.request("/wrong", token=rig.minter.mint("s2", [(1, 65535)], 600)))
    assert (await response(reader))[0] == 403
    writer.close()
    refused, answered, wrong = lines(rig)
    assert refused["reason"] == "nothing listens" and "first_byte_ms" not in refused
    assert "reason" not in answered
    assert wrong["reason"] == "Token authentication failed" and "first_byte_ms" not in wrong


async def test_a_head_that_cannot_be_read_names_no_earlier_request(rig: Rig) -> None:
    await rig.start(access_log=str(rig.directory / "access.log"))
    reader, writer = await rig.open()
    writer.write(rig.request("/first"))
    assert (await response(reader))[0] == 200
    writer.write(b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n")
    status, heads, _ = await response(reader)
    writer.close()
    first, second = lines(rig)
    assert (first["path"], status, second["status"]) == ("/first", 400, 400)
    assert [second[name] for name in ("id", "host", "method", "path", "sent_bytes")] == [heads["x-amzn-requestid"], "", "", "", 0]
    assert second["closed_by"] == "client" and second["reason"]


async def test_a_client_that_leaves_is_one_line(rig: Rig) -> None:
    await rig.start(access_log=str(rig.directory / "access.log"))

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await reader.read()

    rig.script = silent
    _, writer = await rig.open()
    writer.write(rig.request("/left"))
    await until(lambda: b"/left" in rig.received)
    lose(writer)
    await until(lambda: not rig.worker.clients)
    (line,) = lines(rig)
    assert (line["path"], line["status"], line["closed_by"]) == ("/left", 499, "client")


async def test_a_client_that_leaves_between_requests_is_no_line(rig: Rig) -> None:
    await rig.start(access_log=str(rig.directory / "access.log"))
    await rig.ask(rig.request())
    await until(lambda: not rig.worker.clients)
    assert len(lines(rig)) == 1 and sum(rig.worker.counters.answers[HTTP1]) == 1


async def test_an_application_that_breaks_off_is_named(rig: Rig) -> None:
    await rig.start(access_log=str(rig.directory / "access.log"))

    async def short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(OK[:-1])
        await writer.drain()

    rig.script = short
    reader, writer = await rig.open()
    writer.write(rig.request())
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await response(reader)
    writer.close()
    (line,) = lines(rig)
    assert (line["status"], line["closed_by"]) == (200, "origin")
