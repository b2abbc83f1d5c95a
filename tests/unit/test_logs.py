"""Log streams: segments with offsets that go on, written in a thread; what is lost is said, and nothing else is."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from gateway.sessions import line_writer, logs, shipping
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.logs import LogStore
from gateway.sessions.shipping import Cursors, Shipper

NAME = ("123456789012", "/aws/lambda-microvms/a", "2026/11/25[1.0]microvm-1")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogStore:
    monkeypatch.setattr(logs, "_SEGMENT_BYTES", 500)
    monkeypatch.setattr(logs, "_STREAM_MAX_BYTES", 2000)
    return LogStore(tmp_path / "logs")


def append(store: LogStore, *numbers: int) -> None:
    for number in numbers:
        store.append(*NAME, [f"line {number}"])
        store.flush()


def numbers(store: LogStore, offset: int = 0) -> list[int]:
    return [int(event.m.split()[1]) for event in store.read(*NAME, offset)[0]]


class Endpoint:
    """CloudWatch Logs, as far as the shipper asks it."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.exceptions = self

    ResourceAlreadyExistsException = KeyError

    def create_log_group(self, **arguments: Any) -> None: ...

    def create_log_stream(self, **arguments: Any) -> None: ...

    def put_log_events(self, **arguments: Any) -> None:
        self.sent += [event["message"] for event in arguments["logEvents"]]


# ---- segments ----


def test_who_follows_sees_each_line_once_while_the_oldest_segments_go(store: LogStore, tmp_path: Path) -> None:
    """The newer half once took the place of the whole file, and followers and shippers waited behind its new end."""
    seen, offset = [], 0
    for number in range(200):
        append(store, number)
        if number % 7 == 0:
            events, offset = store.read(*NAME, offset)
            seen += [int(event.m.split()[1]) for event in events]
    events, offset = store.read(*NAME, offset)
    assert seen + [int(event.m.split()[1]) for event in events] == list(range(200))
    left = numbers(store)
    assert left == list(range(left[0], 200)) and 30 < len(left) < 60, "what is kept is the end, whole"
    size = sum(path.stat().st_size for path in (tmp_path / "logs").rglob("*.jsonl"))
    assert 1000 < size <= 2000 + 50 and store.facts(*NAME).end > 6000
    assert [event.m for _, event in zip(range(3), (e for _, e in store.events_before(*NAME, 1 << 62)), strict=False)] == [
        "line 199",
        "line 198",
        "line 197",
    ]


def test_an_offset_within_a_line_or_of_what_went_is_the_next_lines(store: LogStore) -> None:
    append(store, *range(200))
    (first, _), (second, event) = list(store.events(*NAME, 0))[:2]
    assert first > 0 and next(store.events(*NAME, first + 1))[0] == second == next(store.events(*NAME, second))[0]
    assert next(store.events(*NAME, 5))[0] == first and event.m


def test_each_event_is_sent_while_the_oldest_segments_go(store: LogStore, tmp_path: Path) -> None:
    endpoint = Endpoint()
    for number in range(200):
        append(store, number)
        if number % 7 == 0:
            Shipper(store, tmp_path / "sent.db", lambda: endpoint).ship(NAME)
    Shipper(store, tmp_path / "sent.db", lambda: endpoint).ship(NAME)
    assert endpoint.sent == [f"line {number}" for number in range(200)]


def test_a_stream_of_before_is_its_first_segment(tmp_path: Path) -> None:
    """Cursors of before count too; one that lies behind the end, as truncation left them, has all of it sent again."""
    directory = tmp_path / "logs/123456789012/%2Faws%2Flambda-microvms%2Fa"
    directory.mkdir(parents=True)
    lines = [json.dumps({"t": 1, "m": f"line {number}"}) + "\n" for number in range(3)]
    for name in ("good", "truncated"):
        (directory / f"{name}.jsonl").write_text("".join(lines))
    group = "/aws/lambda-microvms/a"
    (tmp_path / "sent.json").write_text(
        json.dumps({f"123456789012\0{group}\0good": len(lines[0]) + 1, f"123456789012\0{group}\0truncated": 1 << 26})
    )
    store = LogStore(tmp_path / "logs")
    assert store.streams("123456789012", group) == ["good", "truncated"]
    store.append("123456789012", group, "good", ["line 3"])
    for stream, wanted in (("good", ["line 2", "line 3"]), ("truncated", ["line 0", "line 1", "line 2"])):
        endpoint = Endpoint()
        shipper = Shipper(store, tmp_path / "sent.db", lambda endpoint=endpoint: endpoint)
        while not shipper.ship(("123456789012", group, stream)):  # a batch is of one day
            pass
        assert endpoint.sent == wanted
    assert not (tmp_path / "sent.json").exists()
    assert [event.m for event in LogStore(tmp_path / "logs").read("123456789012", group, "good")[0]] == [f"line {n}" for n in range(4)]


@pytest.mark.parametrize(
    "rest", [b'{"t":1,"m":"ha', b"\0" * 100, b'{"t":1}\n', b'{"t":1,"m":"\xff"}\n'], ids=["half a line", "zeros", "no event", "no text"]
)
def test_what_a_power_cut_left_of_a_line_spoils_no_other(tmp_path: Path, rest: bytes) -> None:
    store = LogStore(tmp_path / "logs")
    append(store, 1)
    with store._path(NAME, 0).open("ab") as file:
        file.write(rest)
    again = LogStore(tmp_path / "logs")
    append(again, 2, 3)
    assert numbers(again) == [1, 2, 3]


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "x" * 300])
def test_a_groups_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    store = LogStore(tmp_path / "logs")
    store.append("123456789012", name, name, ["x"])
    store.append("123456789012", "g", "s", ["y"])
    store.flush()
    assert set(store.groups("123456789012")) == {name, "g"} and store.streams("123456789012", name) == [name]
    assert all(path.parent.parent == tmp_path / "logs/123456789012" for path in tmp_path.rglob("*.jsonl"))


def test_an_accounts_room_is_for_the_streams_that_were_written_to_last(tmp_path: Path) -> None:
    store = LogStore(tmp_path / "logs")
    for number in range(10):
        store.append("1", "g", f"s{number}", ["x" * 1000])
        store.append("2", "g", f"s{number}", ["x"])
    store.flush()
    for number in range(10):
        os.utime(store._path(("1", "g", f"s{number}"), 0), (number + 1e9,) * 2)
    gone = store.drop_old(1e12, 3500)
    assert gone == [("1", "g", f"s{number}") for number in range(7)]
    assert store.streams("1", "g") == ["s7", "s8", "s9"] and len(store.streams("2", "g")) == 10
    store.drop_old(-1)
    assert store.names() == [] and store.groups("1") == []


def test_a_stream_that_went_and_is_there_again_is_sent(tmp_path: Path) -> None:
    store, endpoint = LogStore(tmp_path / "logs"), Endpoint()
    shipper = Shipper(store, tmp_path / "sent.db", lambda: endpoint)
    append(store, 1, 2, 3)
    shipper.ship(NAME)
    store.drop_old(-1)
    shipper.prune()
    append(store, 4, 5, 6, 7)
    shipper.ship(NAME)
    assert endpoint.sent == [f"line {number}" for number in range(1, 8)]


# ---- a disk that is full or slow ----


class Disk:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 40
        self.threads: set[int] = set()
        self._write = os.write
        monkeypatch.setattr(logs.os, "write", self.write)

    def write(self, file: int, data: bytes) -> int:
        self.threads.add(threading.get_ident())
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(file, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 40, 200, 700])
def test_what_a_full_disk_does_not_take_is_written_when_it_can_be(store: LogStore, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    disk = Disk(monkeypatch)
    append(store, 0)
    disk.room = room
    append(store, *range(1, 30))
    assert store.trouble and numbers(store) == list(range(len(numbers(store)))), "what is there can be read"
    disk.room = 1 << 40
    append(store, 30)
    assert numbers(store) == list(range(31)) and not store.trouble


def test_lines_that_find_no_room_are_counted_in_the_log(store: LogStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_WAITING_BYTES", 300)
    disk = Disk(monkeypatch)
    disk.room = 0
    append(store, *range(30))
    disk.room = 1 << 40
    append(store, 30)
    texts = [event.m for event in store.read(*NAME)[0]]
    kept = [text for text in texts if text.startswith("line")]
    said = [
        re.fullmatch(r"torpor: (\d+) lines? w\w+ dropped here: the disk did not take them in time", text)
        for text in texts
        if text not in kept
    ]
    assert sum(int(match[1]) for match in said if match) == 31 - len(kept) and None not in said and 1 < len(kept) < 31


async def test_the_loop_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    store = LogStore(tmp_path / "logs")
    keeping = asyncio.create_task(store.keep())
    for number in range(10):
        store.append(*NAME, [f"line {number}"])
    await until(lambda: not store._waiting)
    store.append(*NAME, ["line 10"])
    keeping.cancel()
    await store.close()
    assert disk.threads and threading.get_ident() not in disk.threads
    assert numbers(LogStore(tmp_path / "logs")) == list(range(11)), "also what was taken last"


async def test_writing_goes_on_after_a_disk_that_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_AGAIN_SECONDS", 0.01)
    disk = Disk(monkeypatch)
    disk.room = 0
    store = LogStore(tmp_path / "logs")
    keeping = asyncio.create_task(store.keep())
    store.append(*NAME, ["line 0"])
    await until(lambda: bool(store.trouble))
    disk.room = 1 << 40
    await until(lambda: not store._waiting)
    keeping.cancel()
    await store.close()
    assert numbers(store) == [0] and not store.trouble


def test_output_beyond_the_rate_is_counted_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "_BURST_BYTES", 100)
    monkeypatch.setattr(line_writer, "_RATE_BYTES", 10)
    now = 0.0
    store = LogStore(tmp_path / "logs")
    writer = LineWriter(store, *NAME, clock=lambda: now)
    for number in range(100):
        writer.feed(1, f"line {number}\n".encode())
    assert numbers(store) == list(range(13)), "a burst is kept"
    now = 5.0
    writer.feed(1, b"line 100\n")
    texts = [event.m for event in store.read(*NAME)[0]]
    assert texts[-2:] == ["torpor: 87 lines were dropped here: more than 0 MiB a second", "line 100"]
    writer.feed(1, b"x" * 200 + b"\n")
    writer.flush()
    assert store.read(*NAME)[0][-1].m.startswith("torpor: 1 line was dropped here")


# ---- how far it was sent ----


@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000], ids=["empty", "damaged"])
def test_cursors_that_cannot_be_read_keep_nothing_from_starting(tmp_path: Path, content: bytes) -> None:
    """Each event is sent at least once: what is not known to be sent is sent again."""
    (tmp_path / "sent.db").write_bytes(content)
    store, endpoint = LogStore(tmp_path / "logs"), Endpoint()
    append(store, 1)
    for _ in range(2):  # as before and after a restart
        shipper = Shipper(store, tmp_path / "sent.db", lambda: endpoint)
        shipper.ship(NAME)
        shipper.close()
    assert endpoint.sent == ["line 1"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b'{"\xff": 1}'], ids=["empty", "cut off", "no text"])
def test_nor_do_those_of_before(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sent.json").write_bytes(content)
    assert Cursors(tmp_path / "sent.db").get(NAME) == 0 and not (tmp_path / "sent.json").exists()


def test_cursors_of_streams_that_went_go(tmp_path: Path) -> None:
    store = LogStore(tmp_path / "logs")
    cursors = Cursors(tmp_path / "sent.db")
    for number in range(20):
        cursors.put(("1", "g", f"s{number}"), number)
    cursors.close()
    store.append("1", "g", "s7", ["x"])
    Shipper(store, tmp_path / "sent.db", Endpoint).prune()
    left = Cursors(tmp_path / "sent.db")
    assert [left.get(("1", "g", f"s{number}")) for number in (6, 7, 8)] == [0, 7, 0]


def test_lines_are_on_the_disk_before_their_offset_counts_as_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LogStore(tmp_path / "logs")
    shipper = Shipper(store, tmp_path / "sent.db", Endpoint)
    append(store, 1)
    order: list[str] = []
    sync, put = os.fsync, shipper._sent.put
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), sync(file)))
    monkeypatch.setattr(shipper._sent, "put", lambda *arguments: (order.append("cursor"), put(*arguments)))
    assert shipper.ship(NAME)
    assert order == ["sync"] * 5 + ["cursor"], "the file, and the directories down to it"
    append(store, 2)
    assert shipper.ship(NAME) and order[6:] == ["sync", "sync", "cursor"]
    assert shipping.Cursors is Cursors


async def test_a_disk_that_is_full_when_shipping_begins_costs_no_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "_AWAY_SECONDS", 0.01)
    cursors = Cursors(tmp_path / "sent.db")
    store, endpoint = LogStore(tmp_path / "logs"), Endpoint()
    append(store, 1)
    cursors.put(NAME, store.facts(*NAME).end)
    cursors.close()
    real, failed = Cursors._open, 0

    def full(self: Cursors, path: Path) -> sqlite3.Connection:
        nonlocal failed
        failed += 1
        if failed < 5:
            raise sqlite3.OperationalError("database or disk is full")
        return real(self, path)

    monkeypatch.setattr(Cursors, "_open", full)
    task = asyncio.create_task(Shipper(store, tmp_path / "sent.db", lambda: endpoint).run())
    await until(lambda: failed > 3)
    append(store, 2)
    await until(lambda: bool(endpoint.sent))
    task.cancel()
    assert endpoint.sent == ["line 2"]


def test_a_stream_of_before_whose_name_leaves_no_room_for_a_segments_has_its_lines(tmp_path: Path) -> None:
    directory = tmp_path / "logs/1/g"
    directory.mkdir(parents=True)
    (directory / f"{'x' * 245}.jsonl").write_text('{"t":1,"m":"of before"}\n')
    store = LogStore(tmp_path / "logs")
    store.append("1", "g", "x" * 245, ["of now"])
    assert store.streams("1", "g") == ["x" * 245]
    assert [event.m for event in store.read("1", "g", "x" * 245)[0]] == ["of before", "of now"]


def test_a_group_of_before_is_where_it_was(tmp_path: Path) -> None:
    """A directory has no suffix: its name has more room than a segment's."""
    directory = tmp_path / "logs/1" / ("g" * 250)
    directory.mkdir(parents=True)
    (directory / "s.0000000000000000.jsonl").write_text('{"t":1,"m":"x"}\n')
    store = LogStore(tmp_path / "logs")
    assert store.groups("1") == ["g" * 250] and [event.m for event in store.read("1", "g" * 250, "s")[0]] == ["x"]


async def test_what_goes_wrong_with_one_stream_ends_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_AGAIN_SECONDS", 0.01)
    store = LogStore(tmp_path / "logs")
    write = store._write

    def failing(name: tuple[str, str, str], data: bytearray) -> None:
        if name[2] == "bad":
            raise RuntimeError("a fault")
        write(name, data)

    monkeypatch.setattr(store, "_write", failing)
    keeping = asyncio.create_task(store.keep())
    for stream in ("bad", "good"):
        store.append("1", "g", stream, ["x"])
    await until(lambda: not store._waiting)
    store.append("1", "g", "good", ["y"])
    await until(lambda: not store._waiting)
    keeping.cancel()
    await store.close()
    assert [event.m for event in store.read("1", "g", "good")[0]] == ["x", "y"]


def test_an_account_has_so_many_streams(tmp_path: Path) -> None:
    """Whoever names a stream a launch made files without end."""
    store = LogStore(tmp_path)
    for account, count in (("1", 5), ("2", 2)):
        for number in range(count):
            store.append(account, f"group {number % 2}", f"stream {number}", ["line"])
    store.flush()
    for path in tmp_path.rglob("*.jsonl"):
        os.utime(path, (int(path.name.split("%20")[1][0]) + 1, 1 + int(path.name.split("%20")[1][0])))
    assert store.drop_old(1e12, math.inf, 3) == [("1", "group 0", "stream 0"), ("1", "group 1", "stream 1")]
    assert sorted(name[2] for name in store.names() if name[0] == "1") == ["stream 2", "stream 3", "stream 4"]


LONG = ["s" * 232, "s" * 233, "s" * 512, "s" * 511 + "t", "/" * 512, "é" * 512, "%~" + "0" * 64, "%~", "s.name"]


def test_each_name_that_the_model_takes_has_a_place_of_its_own(tmp_path: Path) -> None:
    """Those that no file can have were refused, and before that, held up everybody's."""
    store = LogStore(tmp_path)
    for group in LONG:
        for stream in LONG:
            store.append("1", group, stream, [f"{LONG.index(group)} {LONG.index(stream)}"])
    store.flush()
    assert not store.trouble
    for known in (store, LogStore(tmp_path)):
        assert known.groups("1") == sorted(LONG)
        assert sorted(known.names()) == sorted(("1", group, stream) for group in LONG for stream in LONG)
        for group in LONG:
            assert sorted(known.streams("1", group)) == sorted(LONG)
            for stream in LONG:
                assert [event.m for event in known.read("1", group, stream)[0]] == [f"{LONG.index(group)} {LONG.index(stream)}"]


def test_a_long_name_goes_with_its_stream_and_with_the_groups_last(tmp_path: Path) -> None:
    store = LogStore(tmp_path)
    for group in ("short", "g" * 512):
        for stream in ("a" * 512, "b"):
            store.append("1", group, stream, ["line"])
    store.flush()
    for path in tmp_path.rglob("*.jsonl"):
        if path.name.startswith("b."):
            os.utime(path, (1, 1))
    assert sorted(store.drop_old(3600)) == [("1", "g" * 512, "b"), ("1", "short", "b")]
    assert store.groups("1") == ["g" * 512, "short"] and store.streams("1", "g" * 512) == ["a" * 512]
    store.drop_old(-1)
    assert store.groups("1") == [] and list((tmp_path / "1").iterdir()) == []
    store.append("1", "g" * 512, "a" * 512, ["again"])
    assert store.streams("1", "g" * 512) == ["a" * 512]


@pytest.mark.parametrize("content", [None, b"another", b"\xff"], ids=["gone", "of another", "no text"])
def test_a_long_name_that_is_damaged_is_not_listed_till_it_is_written_again(tmp_path: Path, content: bytes | None) -> None:
    store = LogStore(tmp_path)
    store.append("1", "g" * 512, "s" * 512, ["one"])
    store.flush()
    for path in (next(tmp_path.rglob("*.name")), next(tmp_path.glob("1/*/%~"))):
        path.unlink() if content is None else path.write_bytes(content)
    again = LogStore(tmp_path)
    assert again.groups("1") == [] and again.streams("1", "g" * 512) == []
    assert [event.m for event in again.read("1", "g" * 512, "s" * 512)[0]] == ["one"]
    again.append("1", "g" * 512, "s" * 512, ["two"])
    assert again.groups("1") == ["g" * 512] and again.streams("1", "g" * 512) == ["s" * 512]
