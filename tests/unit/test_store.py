"""The store: what was committed is there again, whoever was killed; what could not be written is reported."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from gateway.sessions import store as storing
from gateway.sessions.model import Image, Session
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
    assert again.sessions == {"s1": one} and list(again.images) == ["arn:i"] and again.client_tokens == {"token": ("parameters", "reply")}
    events = await again.events("s1")
    assert [(row.event, row.old, row.new, row.incarnation, row.detail) for row in events] == [("started", "PENDING", "RUNNING", 1, "why")]
    await again.close()


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
    assert len(list(await store.db.execute_fetchall("SELECT id FROM sessions"))) == 2


async def test_an_aside_is_called_before_the_commit_is_done(store: Store) -> None:
    order: list[str] = []
    store.put_session(session("one"))
    await store.commit(lambda: order.append("aside"))
    order.append("committed")
    assert order == ["aside", "committed"]


async def test_a_failed_write_is_an_error_and_the_next_succeeds(store: Store) -> None:
    await store.db.execute("PRAGMA max_page_count=1")
    (free,) = next(iter(await store.db.execute_fetchall("PRAGMA freelist_count")))
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
    rows = list(await store.db.execute_fetchall("SELECT id, state FROM sessions"))
    assert rows == [("small", "RUNNING")]


async def test_what_cannot_be_a_row_fails_its_own_commit_and_no_later_one(store: Store) -> None:
    """SQLite's integers have 64 bits; what is not sqlite3.Error once ended the writer, and every caller waited for ever."""
    store.add_event("s1", "event", "", "", incarnation=1 << 80)
    async with asyncio.timeout(5):
        with pytest.raises(StoreError, match="too large"):
            await store.commit()
        store.put_session(session("one"))
        await store.commit()
    assert list(await store.db.execute_fetchall("SELECT id FROM sessions")) == [("one",)]


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
    store.put_client_token("c", "parameters", "reply")
    await store.commit()
    assert list(store.client_tokens) == ["b", "c"]
    rows = await store.db.execute_fetchall("SELECT token FROM client_tokens ORDER BY token")
    assert [token for (token,) in rows] == ["b", "c"]
    await store.close()
    again = Store(tmp_path / "tokens.db", lambda: now + 5 * 3600)
    await again.open()
    again.put_client_token("d", "parameters", "reply")
    assert list(again.client_tokens) == ["c", "d"]
    await again.close()
