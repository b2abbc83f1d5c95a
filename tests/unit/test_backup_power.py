"""A power cut at any call of `torpor backup` or `torpor restore`: what was there before is there, and what is half made is refused, or made
anew by the same command."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import power
import pytest
from test_backup import ARN, Instance, without_syncs
from test_power import left

from gateway.backup import BackupError, backup, restore
from gateway.config import ConfigError, Settings
from gateway.sessions.model import Session
from vmm import diffs

pytestmark = [pytest.mark.service, pytest.mark.skipif(os.geteuid() != 0, reason="files have owners")]
NAMES = ("monday", "monday.tar")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where there is such a place: hundreds of states are laid out."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="torpor-backup-", dir=shared if shared.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
async def instance(root: Path) -> Settings:
    return await made(root / "instance")


async def made(root: Path, *more: str) -> Settings:
    """As a service leaves it that was killed: what its store wrote last is in the log beside it."""
    one = Instance(root)
    (one.settings.images_dir / "key-1.0/disk.raw").write_bytes(b"the disk")
    await one.start()
    for name in more:
        one.store.put_session(Session(name, name, ARN, "1.0", "key-1.0", 512, 1.0, 60))
        await one.store.commit()
    shutil.copytree(root, root.with_name("copy"))
    await one.store.close()
    shutil.rmtree(root)
    root.with_name("copy").rename(root)
    assert (one.settings.control_dir / "torpor.db-wal").stat().st_size
    return one.settings


def content(place: Path) -> dict[str, bytes]:
    """All files, but for the index of the store's log: it is made anew."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file() and path.suffix != ".db-shm"}


def sessions(control: Path) -> set[str]:
    """Raises sqlite3.Error. Who only reads leaves the log as it is."""
    connection = sqlite3.connect(f"file:{control / 'torpor.db'}?mode=ro", uri=True)
    try:
        return {name for (name,) in connection.execute("SELECT id FROM sessions")}
    finally:
        connection.close()


def settings_of(place: Path) -> Settings:
    return Settings(root=place, run=place.with_name("run"))


def is_whole(place: Path) -> bool:
    """Whether it is what `instance` was."""
    try:
        snapshot = place / "sessions/asleep/snapshot-1"
        diffs.verify_all(snapshot, diffs.read_manifest(snapshot))
        return (
            sessions(place / "control") == {"asleep", "awake", "away", "ended"}
            and (place / "sessions/asleep/overlay").read_text() == "the disk of asleep 1"
            and (place / "images/key-1.0/disk.raw").read_bytes() == b"the disk"
            and (place / "control/keys.json").read_text() == "keys.json is secret"
        )
    except Exception:
        return False


def moments(scene: str, root: Path, target: Path, least: int, draft: str = "\0") -> Iterator[tuple[str, Path, bool]]:
    """Each state that a power cut can leave: what the program did last, where it is, whether the program had said that it was done. Of
    states that differ only in what lies below a `draft`, which is never read again, the first."""
    seen: list[dict[str, object]] = []
    for moment, outcome, place in left(power.run(scene, root), target, least):
        state: dict[str, object] = {path: data for path, data in moment.outcomes[outcome].items() if draft not in path}
        if moment.said or state not in seen:
            seen.append(state)
            yield f"{moment.number} {moment.call} {outcome}", place, bool(moment.said)


@pytest.mark.parametrize("name", NAMES)
def test_a_backup(root: Path, tmp_path: Path, instance: Settings, name: str) -> None:
    before = content(instance.root)
    states = moments(name.replace("monday", "backup").replace(".", "_"), root, tmp_path / "left", 100)
    for number, (where, place, is_done) in enumerate(states):
        assert content(place / "instance") == before, where
        assert (place / name).exists() or not is_done, where
        for path in (place / name, *place.glob(".monday*/*")):
            if not (path / "backup.json" if path.is_dir() else path).exists():
                continue
            try:
                restore(settings_of(tmp_path / "fresh"), path, False)
                assert is_whole(tmp_path / "fresh"), (where, path)
            except (BackupError, ConfigError):
                assert path.name != name, f"{where}: what has its name is a backup"
                assert not (tmp_path / "fresh/control/torpor.db").exists(), where
            shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        if not (place / name).exists() and not number % 10:
            backup(settings_of(place / "instance"), place / name, True, lambda text: None)
            assert sorted(path.name for path in place.iterdir() if path.name != "run") == ["instance", name], (
                f"{where}: nothing is left over"
            )


@pytest.mark.parametrize("name", NAMES)
async def test_a_restore(root: Path, tmp_path: Path, instance: Settings, name: str) -> None:
    backup(instance, root / name, True, lambda text: None)
    shutil.rmtree(instance.root)
    other = await made(root / "other", "other")
    (other.sessions_dir / "asleep/overlay").write_text("of the other one")
    before, source = content(other.root), content(root / name) if (root / name).is_dir() else (root / name).read_bytes()
    for where, place, is_done in moments("restore", root, tmp_path / "left", 100, "restore.new/"):
        assert (content(place / name) if (place / name).is_dir() else (place / name).read_bytes()) == source, where
        _is_there(place / "other", before, where)
        assert is_whole(place / "other") or not is_done, where
        if (place / "other/control/torpor.db").exists() and not is_whole(place / "other"):
            assert content(place / "other").items() >= before.items(), f"{where}: with a store it is as before, or as after"
        if is_done:
            continue
        restore(settings_of(place / "other"), place / name, True)
        assert is_whole(place / "other") and not (place / "other/restore.new").exists(), where
        _is_there(place / "other", before, where)
        (old,) = (path.parent for path in (place / "other").glob("replaced*/control/torpor.db") if "other" in sessions(path.parent))
        assert sessions(old) == {"asleep", "awake", "away", "ended", "other"}, f"{where}: its log lies beside it"


def _is_there(place: Path, before: dict[str, bytes], where: str) -> None:
    """Each file of before: in its place, or where it was moved to."""
    moved = [path for path in place.glob("replaced*")]
    for path, data in before.items():
        found = [one / path for one in (place, *moved) if (one / path).exists()]
        assert any(one.read_bytes() == data for one in found), f"{where}: {path}"
