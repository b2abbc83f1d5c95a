"""The store: what was committed is there again, whoever was killed; what could not be written is reported."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from gateway import executors
from gateway.accounts.model import Role
from gateway.config import ConfigError
from gateway.sessions import schema
from gateway.sessions import store as storing
from gateway.sessions.database import Connection
from gateway.sessions.model import Archived, Image, Session, Version
from gateway.sessions.states import State
from gateway.sessions.store import Store, StoreError


def session(name: str = "s1") -> Session:
    return Session(name, f"{name}.host", "arn:aws:lambda:us-east-1:123456789012:microvm-image:a", "1.0", "key", 512, 10.0, 60)


@pytest.fixture
async def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    one = Store(tmp_path / "state.db")
    await one.open()
    yield one
    await one.close()


async def test_survives_without_a_clean_close(store: Store, tmp_path: Path) -> None:
    one = session()
    store.put_session(one)
    store.put_image(Image("i", "arn:i", "name", 1.0, 1.0))
    store.put_client_token("token", "parameters", "reply")
    store.add_event("s1", "started", "PENDING", "RUNNING", 1, "why")
    await store.commit()
    for path in tmp_path.glob("state.db*"):  # as a kill -9 leaves them
        shutil.copy(path, tmp_path / f"copy-{path.name}")
    again = Store(tmp_path / "copy-state.db")
    await again.open()
    assert (
        again.sessions == {"s1": one} and list(again.images) == ["arn:i"] and await again.client_token("token") == ("parameters", "reply")
    )
    events = await again.events("s1")
    assert [(row.event, row.old, row.new, row.incarnation, row.detail) for row in events] == [("started", "PENDING", "RUNNING", 1, "why")]
    await again.close()


async def test_what_cannot_be_written_is_not_kept_in_memory(store: Store) -> None:
    """A row that no encoding has would stay until a restart, and no call could remove it."""
    spoilt = "\ud800"
    for put in (
        lambda: store.put_session(msgspec.structs.replace(session(), log_stream=spoilt)),
        lambda: store.put_image(Image("i", "arn:i", spoilt, 1.0, 1.0)),
        lambda: store.put("roles", "r", Role("r", {"Version": spoilt})),
    ):
        with pytest.raises(UnicodeEncodeError):
            put()
    assert not store.sessions and not store._order and not store.images and not store.roles
    await store.commit()


async def test_nothing_is_there_before_commit(store: Store, tmp_path: Path) -> None:
    store.put_session(session())
    reader = Store(tmp_path / "state.db")
    await reader.open()
    assert reader.sessions == {}
    await reader.close()


async def test_drop(store: Store, tmp_path: Path) -> None:
    store.put_session(session("a"))
    store.put_session(session("b"))
    await store.commit()
    store.drop_session(store.sessions["a"])
    await store.commit()
    await store.close()
    again = Store(tmp_path / "state.db")
    await again.open()
    assert list(again.sessions) == ["b"]
    await again.close()
    await store.open()


async def test_many_commits_are_few_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions = []
    original = store._transaction
    monkeypatch.setattr(store, "_transaction", lambda batch, *rest: (transactions.append(len(batch)), original(batch, *rest)))

    async def change(number: int) -> None:
        store.put_session(session(f"s{number}"))
        await store.commit()

    await asyncio.gather(*(change(number) for number in range(200)))
    assert sum(transactions) == 200 and len(transactions) < 10


async def test_a_commit_that_is_begun_is_of_what_was_put(store: Store) -> None:
    """Also where a commit is under way, whose writer looks for more before the caller's next turn."""
    store.put_session(session("one"))
    first = store.begin_commit()
    await asyncio.sleep(0)  # its writer has begun
    store.put_session(session("two"))
    second = store.begin_commit()
    await first
    assert not second.done()
    await second
    assert len(await store.db.rows("SELECT id FROM sessions")) == 2


async def test_an_aside_is_called_before_the_commit_is_done(store: Store) -> None:
    order: list[str] = []
    store.put_session(session("one"))
    await store.commit(lambda: order.append("aside"))
    order.append("committed")
    assert order == ["aside", "committed"]


async def test_a_failed_write_is_an_error_and_the_next_succeeds(store: Store) -> None:
    await store.db.rows("PRAGMA max_page_count=1")
    ((free,),) = await store.db.rows("PRAGMA freelist_count")
    assert free > 1000  # the room kept for a full disk
    big = session("big")
    big.run_hook_payload = "x" * (16 << 20)
    store.put_session(big)
    with pytest.raises(StoreError, match="full"):
        await store.commit()
    small = session("small")
    small.state = State.RUNNING
    store.put_session(small)
    await store.commit()
    rows = await store.db.rows("SELECT id, state FROM sessions")
    assert rows == [("small", "RUNNING")]


async def test_a_disk_with_errors_costs_the_commits_that_meet_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only reads goes on, and what is put when the disk is well again."""
    store.put_session(session("before"))
    await store.commit()
    transaction = store._transaction

    def broken(*arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(store, "_transaction", broken)
    store.add_event("before", "lost", "", "")
    with pytest.raises(StoreError, match="disk I/O error"):
        await store.commit()
    assert await store.db.rows("SELECT id FROM sessions") == [("before",)] and await store.events("before") == []
    monkeypatch.setattr(store, "_transaction", transaction)
    store.drop_session(store.sessions["before"])
    await store.commit()
    assert await store.db.rows("SELECT id FROM sessions") == []


async def test_control_is_replaced_when_a_commit_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(executors, "_LOOK_SECONDS", 0.01)
    store = Store(tmp_path / "state.db")
    await store.open()
    connection, replaced, stands = store.db.connection, threading.Event(), threading.Event()
    assert connection is not None
    connection.on_stuck, connection.seconds = replaced.set, 0.05
    monkeypatch.setattr(store, "_transaction", lambda *arguments: stands.wait(10))
    store.put_session(session())
    commit = store.begin_commit()
    assert await asyncio.to_thread(replaced.wait, 5)
    stands.set()
    await commit
    await store.close()
    assert "store.stands" in (said := capsys.readouterr().out) and "stands.wait(10)" in said


async def test_control_is_replaced_when_the_stores_thread_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no memory to tell of what it did dies, and nobody would hear of anything any more."""
    monkeypatch.setattr(executors, "_LOOK_SECONDS", 0.01)
    connection, replaced = Connection(tmp_path / "state.db"), threading.Event()
    connection.on_stuck = replaced.set
    await connection.open()
    await connection.run(lambda _: None)
    assert not replaced.is_set()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", _no_memory)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    lost = asyncio.ensure_future(connection.run(lambda _: None))
    while not replaced.is_set():
        await asyncio.sleep(0.01)
    lost.cancel()
    executors.unwatch(connection)
    connection.__dict__["_connection"] = None


def _no_memory(*_: object) -> None:
    raise MemoryError


async def test_a_turn_counts_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    now = [0.0]
    connection, replaced, may_end = Connection(tmp_path / "state.db", lambda: now[0]), threading.Event(), threading.Event()
    connection.on_stuck = replaced.set
    await connection.open()
    executors.unwatch(connection)  # the test looks
    first = asyncio.ensure_future(connection.run(lambda _: may_end.wait(10), seconds=100.0))
    second = asyncio.ensure_future(connection.run(lambda _: 2, seconds=10.0))
    unwanted = asyncio.ensure_future(connection.run(lambda _: replaced.set()))
    await asyncio.sleep(0)
    unwanted.cancel()
    await asyncio.wait([unwanted])  # the thread has not come to it
    now[0] = 99.0
    connection.look()
    may_end.set()
    assert await first and await second == 2
    await connection.run(lambda _: None)
    now[0] = 1e9
    connection.look()
    assert not replaced.is_set()
    await connection.close()


async def test_a_store_whose_thread_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(executors.NotStarted, match="can't start new thread"):
        await Connection(tmp_path / "state.db").open()


async def test_what_cannot_be_a_row_fails_its_own_commit_and_no_later_one(store: Store) -> None:
    """SQLite's integers have 64 bits; what is not sqlite3.Error once ended the writer, and every caller waited for ever."""
    store.add_event("s1", "event", "", "", incarnation=1 << 80)
    async with asyncio.timeout(5):
        with pytest.raises(StoreError, match="too large"):
            await store.commit()
        store.put_session(session("one"))
        await store.commit()
    assert await store.db.rows("SELECT id FROM sessions") == [("one",)]


async def test_the_event_table_keeps_the_last_rows_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "_EVENTS_KEPT", 5)
    for number in range(20):
        store.add_event(f"s{number % 2}", f"event{number}", "", "")
        if number % 3 == 0:
            await store.commit()
    await store.commit()
    assert [row.event for row in await store.events("s0") + await store.events("s1")] == [
        "event16",
        "event18",
        "event15",
        "event17",
        "event19",
    ]


async def test_client_tokens_are_kept_for_a_day_while_the_service_runs(tmp_path: Path) -> None:
    now = 1_000_000.0
    store = Store(tmp_path / "tokens.db", lambda: now)
    await store.open()
    for token in ("a", "b"):
        store.put_client_token(token, "parameters", "reply")
        await store.commit()
        now += 20 * 3600
    assert [await store.client_token(token) for token in ("a", "b")] == [None, ("parameters", "reply")]
    store.put_client_token("c", "parameters", "reply")
    await store.commit()
    await store.prune(math.inf)
    assert list(store.client_tokens) == ["b", "c"]
    assert await store.db.rows("SELECT token FROM client_tokens ORDER BY token") == [("b",), ("c",)]
    await store.close()
    now += 5 * 3600
    again = Store(tmp_path / "tokens.db", lambda: now)
    await again.open()
    assert [await again.client_token(token) for token in ("b", "c")] == [None, ("parameters", "reply")]
    await again.close()


async def test_memory_holds_the_newest_client_tokens_and_the_table_all_of_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At five launches a second a day's replies were a gigabyte of control's memory."""
    monkeypatch.setattr(storing, "_CLIENT_TOKENS_IN_MEMORY", 10)
    store = Store(tmp_path / "tokens.db")
    await store.open()
    for number in range(30):
        store.put_client_token(f"token-{number}", f"{number}", "reply")
    await store.commit()
    assert len(store.client_tokens) == 10
    assert [await store.client_token(f"token-{number}") for number in (0, 29)] == [("0", "reply"), ("29", "reply")]
    assert await store.client_token("another") is None
    await store.close()
    again = Store(tmp_path / "tokens.db")
    await again.open()
    assert len(again.client_tokens) == 10 and await again.client_token("token-0") == ("0", "reply")
    await again.close()


async def test_events_go_by_their_age(tmp_path: Path) -> None:
    now = 1_000_000.0
    store = Store(tmp_path / "events.db", lambda: now)
    await store.open()
    for number in range(5):
        store.add_event("s1", f"event{number}", "", "")
        now += 86_400
    await store.commit()
    assert await store.prune(2.5 * 86_400) == 3
    assert [row.event for row in await store.events("s1")] == ["event3", "event4"]
    await store.close()


@pytest.mark.parametrize("name", ["state.db", "state.db-wal"])
async def test_a_store_of_another_user_says_whose_it_has_to_be(tmp_path: Path, name: str) -> None:
    """As a copy that root has put back."""
    if os.geteuid():
        pytest.skip("needs root")
    tmp_path.chmod(0o777)
    (tmp_path / name).write_bytes(b"")
    code = (
        "import asyncio, os, sys; from pathlib import Path; from gateway.sessions.store import Store; "
        "os.setresuid(65534, 65534, 65534); asyncio.run(Store(Path(sys.argv[1])).open())"
    )
    (tmp_path / name).chmod(0o600)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state.db")], capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"state\.db cannot be opened: .*: {tmp_path / name} is user 0's: chown it to 65534$", said), done.stderr


@pytest.mark.parametrize("seconds", [5.0, -1.0])
async def test_a_store_that_is_damaged_where_only_writers_look_is_refused_at_the_start_in_one_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """One that is too large to be looked at in time opens; then each commit fails, no retry helps, and that says what does."""
    monkeypatch.setattr(storing, "_CHECK_SECONDS", seconds)
    monkeypatch.setattr(storing, "_CHECK_STEPS", 1)
    for number in range(50):
        store.put_session(session(f"s{number}"))
        store.add_event(f"s{number}", "started", "PENDING", "RUNNING", 1, "why")
    await store.commit()
    ((root,),) = await store.db.rows("SELECT rootpage FROM sqlite_schema WHERE name = 'events_subject'")
    await store.close()
    with (tmp_path / "state.db").open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"x" * 4096)
    before = (tmp_path / "state.db").read_bytes()
    if seconds > 0:
        with pytest.raises(
            ConfigError, match=r"^[^\n]*state\.db cannot be opened: [^\n]*(damaged|malformed)[^\n]*: restore it from[^\n]*$"
        ):
            await store.open()
        assert (tmp_path / "state.db").read_bytes() == before
        return
    await store.open()
    store.add_event("s1", "asleep", "RUNNING", "SUSPENDED", 1, "")
    with pytest.raises(StoreError, match=r"^[^\n]*state\.db: database disk image is malformed: restore it from a backup[^\n]*$"):
        await store.commit()


# ---- versions ----

STORES = Path(__file__).parent / "stores"


def recorded(path: Path, version: int) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((STORES / f"{version}.sql").read_text())
    return path


@pytest.mark.parametrize("version", range(len(schema.MIGRATIONS)))
async def test_a_store_of_each_earlier_version_opens(tmp_path: Path, version: int) -> None:
    store = Store(recorded(tmp_path / "state.db", version), lambda: 1_764_200_000.0)
    await store.open()
    assert [one.state for one in store.sessions.values()] == list(State)
    asleep = store.sessions["microvm-00000003-0000-4000-8000-000000000000"]
    assert (asleep.incarnation, asleep.archived, asleep.hooks.enabled, asleep.idle_policy and asleep.idle_policy.suspended) == (
        3, Archived("sessions/x", 77, "d" * 64), {"run": 2}, 600,
    )  # fmt: skip
    (image,) = store.images.values()
    assert [(one.version, one.state, one.build and one.build.reason) for one in image.versions] == [
        ("1.0", "SUCCESSFUL", None), ("2.0", "FAILED", "CONTAINER_BUILD_FAILED: step 3"),
    ]  # fmt: skip
    assert [len(kept) for kept in (store.accounts, store.keys, store.roles, store.connectors)] == [1, 1, 1, 1]
    assert [row.event for row in await store.events(asleep.id)] == ["started"] and store.set_aside == []
    known = await store.client_token("123456789012:RunMicrovm:token-1")
    assert known == (schema.digest(b'{"imageIdentifier":"notes"}'), '{"microvmId":"microvm-00000001"}')
    assert await store.db.rows("PRAGMA user_version") == [(len(schema.MIGRATIONS),)]
    store.put_meta("instance", "one")
    await store.commit()
    await store.close()
    again = Store(tmp_path / "state.db")
    await again.open()
    assert again.meta == {"instance": "one"} and len(again.sessions) == len(State)
    await again.close()


def test_a_store_of_each_version_is_recorded() -> None:
    """A migration comes with a store of the version before it: make it with sqlite3's .dump before the migration is written."""
    assert sorted(path.name for path in STORES.iterdir()) == [f"{version}.sql" for version in range(len(schema.MIGRATIONS))]


async def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE sessions")
        raise sqlite3.OperationalError("database or disk is full")

    path = recorded(tmp_path / "state.db", 0)
    monkeypatch.setattr(schema, "MIGRATIONS", (schema.MIGRATIONS[0], fail))
    with pytest.raises(ConfigError, match=r"state\.db cannot be opened: database or disk is full$"):
        await Store(path).open()
    monkeypatch.undo()
    store = Store(path)
    await store.open()
    assert len(store.sessions) == len(State)
    await store.close()


async def test_a_store_of_a_newer_version_is_refused_in_one_line_and_not_touched(tmp_path: Path) -> None:
    path = recorded(tmp_path / "state.db", 0)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"^[^\n]*state\.db is of a newer version of Torpor \(schema 99, this one knows \d+\)[^\n]*$"):
        await Store(path).open()
    assert path.read_bytes() == before


async def test_a_file_that_is_no_store_is_refused_in_one_line_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigError, match=r"^[^\n]*state\.db cannot be opened: file is not a database: restore it from a backup[^\n]*$"):
        await Store(path).open()
    assert path.read_bytes() == b"nonsense" * 1000


# ---- rows that cannot be read ----


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", msgspec.msgpack.encode({"id": "bad", "state": "DREAMING"})], ids=["empty", "torn", "no such state"]
)
async def test_a_row_that_cannot_be_read_stops_its_session_and_not_the_start(store: Store, tmp_path: Path, body: bytes) -> None:
    store.put_session(session("good"))
    store.put_session(session("bad"))
    await store.commit()
    await store.db.rows("UPDATE sessions SET body = ? WHERE id = 'bad'", (body,))
    for _ in range(2):
        again = Store(tmp_path / "state.db")
        await again.open()
        assert list(again.sessions) == ["good"]
        ((kind, key, reason),) = [(one.kind, one.key, one.reason) for one in again.set_aside]
        assert (kind, key) == ("sessions", "bad") and reason
        assert [(row.event, row.detail) for row in await again.events("bad")] == [("set_aside", reason)]
        await again.close()


@pytest.mark.parametrize("kind", ["images", "connectors", "of another time"])
async def test_any_row_may_be_unreadable(store: Store, tmp_path: Path, kind: str) -> None:
    statement = "INSERT INTO images VALUES ('arn', x'c1')" if kind == "images" else f"INSERT INTO records VALUES ('{kind}', 'arn', x'c1')"
    await store.db.rows(statement)
    again = Store(tmp_path / "state.db")
    await again.open()
    assert [(one.kind, one.key) for one in again.set_aside] == [(kind, "arn")] and not again.images and not again.connectors
    await again.close()


async def test_a_row_that_is_nested_without_end_stops_its_image_and_not_the_start(store: Store, tmp_path: Path) -> None:
    """What a damaged page may look like to who decodes it, and no error of the decoder's own."""
    image = Image("i", "arn", "name", 0.0, 0.0, versions=[Version("arn", "1.0", {"a": 1}, 0.0, 0.0, "PENDING")])
    body = msgspec.msgpack.encode(image)
    at = body.index(b"\xa1a\x01") + 2
    await store.db.rows("INSERT INTO images VALUES ('arn', ?)", (body[:at] + b"\x91" * 100_000 + b"\xc0" + body[at + 1 :],))
    again = Store(tmp_path / "state.db")
    await again.open()
    assert [(one.key, "recursion" in one.reason) for one in again.set_aside] == [("arn", True)] and not again.images
    await again.close()


async def test_what_was_set_aside_comes_back_when_it_can_be_read(store: Store, tmp_path: Path) -> None:
    """As after an upgrade of a store that a newer version had written to."""
    one = session("one")
    store.put_session(one)
    await store.commit()
    await store.db.rows("UPDATE sessions SET body = x'c1'")
    again = Store(tmp_path / "state.db")
    await again.open()
    assert again.sessions == {}
    await again.db.rows("UPDATE set_aside SET body = ?", (msgspec.msgpack.encode(one),))
    await again.close()
    await again.open()
    assert again.sessions == {"one": one} and again.set_aside == []
    assert [row.event for row in await again.events("one")] == ["set_aside", "recovered"]
    await again.close()
    third = Store(tmp_path / "state.db")
    await third.open()
    assert third.sessions == {"one": one}
    await third.close()
