"""A power cut at any call leaves what was promised: the store, the audit trail, keys, logs, archives, the quarantine (test_snapshots.py has the
snapshots)."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import power
import pytest
from power_scenes import WORDS, Endpoint
from test_snapshots import save

from gateway import files
from gateway.config import ConfigError
from gateway.sessions import store as storing
from gateway.sessions.logs import LogStore
from gateway.sessions.shipping import Shipper
from gateway.tokens import Minter
from vmm import archives, diffs
from vmm.errors import VmmError
from vmm.quarantine import Quarantine
from vmm.snapshots import Snapshots

SESSION = "microvm-1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at need not outlive anything."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def left(
    moments: list[power.Moment], target: Path, least: int, outcomes: tuple[str, ...] = power.OUTCOMES
) -> Iterator[tuple[power.Moment, str, Path]]:
    """Each outcome that differs from the one before."""
    assert len(moments) >= least
    before: dict[str, object] = {}
    for moment in moments:
        for outcome in outcomes:
            state = (moment.outcomes[outcome], moment.said)
            if state != before.get(outcome):
                before[outcome] = state
                yield moment, outcome, moment.lay_out(outcome, target)


@pytest.mark.parametrize("recorded", [False, True], ids=["new", "migrated"])
async def test_the_store(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    monkeypatch.setattr(storing, "_ROOM_BYTES", 4096)
    before = 0
    if recorded:
        connection = sqlite3.connect(root / "torpor.db")
        connection.executescript((Path(__file__).parent / "stores/0.sql").read_text())
        ((before,),) = connection.execute("SELECT count(*) FROM sessions").fetchall()
        connection.close()
    for moment, outcome, place in left(power.run("store", root), tmp_path / "left", 25, ("synced", "names")):
        words = [word for word in moment.said if word in WORDS]
        if recorded and words:
            return  # from here on it is as a new one
        store = storing.Store(place / "torpor.db")
        await store.open()
        tokens = {token for (token,) in await store.db.rows("SELECT token FROM client_tokens")}
        await store.close()
        found = [word for word in WORDS if word in store.sessions]
        assert found[: len(words)] == words and len(found) <= len(words) + 1, (moment.number, moment.call, outcome)
        assert tokens >= set(found) and len(tokens & set(WORDS)) == len(found), "reply and deed are one"
        assert len(store.sessions) - len(found) == before and not store.set_aside, (moment.number, moment.call, outcome)


def test_the_audit_trail(root: Path, tmp_path: Path) -> None:
    for moment, outcome, place in left(power.run("audit", root), tmp_path / "left", 15):
        paths = (place / "audit").glob("1/audit.jsonl*")
        records = [json.loads(line)["requestID"] for path in sorted(paths, reverse=True) for line in path.read_text().splitlines()]
        wanted = [f"{word} {number}" for word in moment.said for number in range(2)]
        assert [one for one in records if one in wanted] == wanted, (moment.number, moment.call, outcome, records)


def test_keys(root: Path, tmp_path: Path) -> None:
    for moment, outcome, place in left(power.run("keys", root), tmp_path / "left", 15):
        where = (moment.number, moment.call, outcome)
        if "secret" in moment.said:
            assert (place / "sessions.key").exists(), where
        if (place / "sessions.key").exists():
            try:
                assert len(files.secret(place / "sessions.key", "")) == 32
            except ConfigError:
                pytest.fail(f"{where}")
        rotated = [word.split()[1] for word in moment.said if word != "secret"]
        if rotated:
            assert rotated[-1] in {one.kid for one in Minter(place / "keys.json", lambda: 0.0).verifiers()}, where


def test_logs_that_are_sent_elsewhere(root: Path, tmp_path: Path) -> None:
    """Lines that were not synced may go; what is there afterwards, and what comes then, is sent, whatever was sent before."""
    for moment, outcome, place in left(power.run("logs", root), tmp_path / "left", 25, ("synced", "names")):
        sent = list(moment.said)
        logs = LogStore(place / "logs")
        logs.append("1", "g", "s", ["after the cut"])
        there = [event.m for event in logs.read("1", "g", "s")[0]]
        shipper = Shipper(logs, place / "sent.db", lambda sent=sent: Endpoint(sent.append))
        while not shipper.ship(("1", "g", "s")):
            pass
        shipper.close()
        assert set(there) <= set(sent), (moment.number, moment.call, outcome, there, sent)
        lines = [f"{word} {number}" for word in WORDS for number in range(3)]
        assert there[-1] == "after the cut" and [line for line in lines if line in there] == there[:-1]


@pytest.fixture
def asleep(root: Path) -> Path:
    directory = root / "sessions" / SESSION
    directory.mkdir(parents=True)
    (directory / "overlay").write_bytes(b"disk")
    save(Snapshots(root / "sessions"), 1, [], [1, 2, 3])
    return directory


def is_whole(session: Path) -> bool:
    try:
        snapshot = session / "snapshot-1"
        diffs.verify_all(snapshot, diffs.read_manifest(snapshot))
        return (session / "overlay").read_bytes() == b"disk"
    except (VmmError, OSError):
        return False


def test_what_comes_back_from_the_object_store(root: Path, tmp_path: Path, asleep: Path) -> None:
    with (root / "packed").open("wb") as file:
        _, digest = archives.pack(asleep, asleep / "snapshot-1", file.fileno())
    (root / "digest").write_text(digest)
    archives.shutil.rmtree(asleep)
    for moment, outcome, place in left(power.run("archive", root), tmp_path / "left", 10):
        if (place / "sessions" / SESSION).exists() or moment.said:
            assert is_whole(place / "sessions" / SESSION), (moment.number, moment.call, outcome)


def test_the_quarantine(root: Path, tmp_path: Path, asleep: Path) -> None:
    for moment, outcome, place in left(power.run("quarantine", root), tmp_path / "left", 8):
        where = {name: is_whole(place / name / SESSION) for name in ("sessions", "quarantine")}
        assert any(where.values()), (moment.number, moment.call, outcome)
        set_aside = [one.session for one in Quarantine(place / "sessions", place / "quarantine", place / "images").list()]
        assert set_aside == [SESSION] or where["sessions"], "it is listed, or where it was"
        if "recovered" in moment.said:
            assert where["sessions"], (moment.number, moment.call, outcome)


def test_a_recorder_that_sees_nothing_would_fail(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store whose commits are not synced the promise is not kept."""
    moments = power.run("unsynced", root)
    broken = [moment for moment in moments if set(moment.said) - {path for path in moment.outcomes["synced"] if path in WORDS}]
    assert broken and moments[-1].said
