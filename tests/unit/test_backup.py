"""Backups: of one moment though the service runs, laid out on another root, and nothing there is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_snapshots import save

from gateway import backup as module
from gateway.backup import BackupError, backup, restore
from gateway.cli import backup as command
from gateway.cli import host, repair
from gateway.config import ConfigError, Settings
from gateway.sessions import store as storing
from gateway.sessions.model import Archived, Build, Image, Session, Version
from gateway.sessions.states import State
from gateway.sessions.store import Store
from vmm import diffs, making
from vmm.snapshots import Snapshots

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
KEYS = ("keys.json", "access-keys.json", "pager.key", "sessions.key")


class Instance:
    """An instance's files, as its service writes them."""

    def __init__(self, root: Path) -> None:
        self.settings = Settings(root=root, run=root / "run")
        for path in (self.settings.control_dir, self.settings.sessions_dir, self.settings.images_dir, self.settings.tls_dir):
            path.mkdir(parents=True)
        for name in KEYS:
            (self.settings.control_dir / name).write_text(f"{name} is secret")
        for path in (self.settings.tls_dir / "ca.key", self.settings.tls_dir / "ca.crt", root / "edge-port", root / "torpor.toml"):
            path.write_text("")
        (root / "manifests.key").write_text("of manifests")
        (root / "manifests.key").chmod(0o600)
        (self.settings.images_dir / "key-1.0").mkdir()
        (self.settings.images_dir / "key-1.0/manifest.json").write_text("{}")
        (self.settings.images_dir / "instance").write_text("whose they are")
        with (self.settings.images_dir / "key-1.0/disk.raw").open("wb") as file:
            file.truncate(64 << 20)  # a hole
        self.store = Store(self.settings.control_dir / "torpor.db")

    async def start(self) -> None:
        await self.store.open()
        version = Version(ARN, "1.0", {}, 1.0, 1.0, "SUCCESSFUL", key="key-1.0", build=Build("b"))
        self.store.put_image(Image("i", ARN, "a", 1.0, 1.0, "CREATED", versions=[version]))
        self.files("asleep", 1)
        self.files("awake", 1)
        for name, state, archived in (
            ("asleep", State.SUSPENDED, None), ("awake", State.RUNNING, None), ("away", State.SUSPENDED, Archived("key", 1, "d")),
            ("ended", State.TERMINATED, None),
        ):  # fmt: skip
            self.store.put_session(Session(name, f"{name}.host", ARN, "1.0", "key-1.0", 512, 1.0, 3600, state, 1, archived=archived))
            self.store.add_event(name, "moved", "", state, 1)
        await self.store.commit()

    def files(self, name: str, incarnation: int) -> None:
        directory = self.settings.sessions_dir / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "overlay").write_text(f"the disk of {name} {incarnation}")
        save(Snapshots(self.settings.sessions_dir), incarnation, [], [1, 2, 3], name)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync waits for all that the machine writes, and what is looked at need not outlive anything."""
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *command: run(*command) if command[0] != "sync" else None)
    monkeypatch.setattr(storing, "_ROOM_BYTES", 4096)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    one = Instance(tmp_path / "root")
    await one.start()
    yield one
    await one.store.close()


def other(tmp_path: Path) -> Settings:
    return Settings(root=tmp_path / "other", run=tmp_path / "other/run")


async def opened(settings: Settings) -> Store:
    store = Store(settings.control_dir / "torpor.db")
    await store.open()
    await store.close()
    return store


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
async def test_a_restore_on_another_root_is_the_same_instance(instance: Instance, tmp_path: Path, name: str) -> None:
    said: list[str] = []
    made = backup(instance.settings, tmp_path / name, True, said.append)
    assert made.sessions == {"asleep": "files", "awake": "row", "away": "archived"} and made.images == ["key-1.0"]
    assert said == ["of awake only the row is in the backup: it is awake: suspend it first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "root"]
    settings = other(tmp_path)
    _, old = restore(settings, tmp_path / name, False)
    assert old is None and not (settings.root / "restore.new").exists()
    store = await opened(settings)
    assert store.sessions == instance.store.sessions and store.images == instance.store.images
    snapshot = settings.sessions_dir / "asleep/snapshot-1"
    diffs.verify_all(snapshot, diffs.read_manifest(snapshot))
    assert (settings.sessions_dir / "asleep/overlay").read_text() == "the disk of asleep 1"
    assert not (settings.sessions_dir / "awake").exists() and (settings.images_dir / "instance").exists()
    disk = (settings.images_dir / "key-1.0/disk.raw").stat()
    assert disk.st_size == 64 << 20 and disk.st_blocks < 100
    for key in KEYS:
        path = settings.control_dir / key
        assert path.read_text() == f"{key} is secret"
        if not os.geteuid():
            assert path.stat().st_uid == settings.users.control
    seal = settings.root / "manifests.key"
    assert seal.read_text() == "of manifests" and stat.S_IMODE(seal.stat().st_mode) == 0o600 and seal.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(settings.control_dir.stat().st_mode) == 0o700 and (settings.root / "edge-port").exists()


@pytest.mark.parametrize("has_data", [True, False])
async def test_a_backup_from_before_there_were_seals_is_sealed_at_the_next_start(
    instance: Instance, tmp_path: Path, has_data: bool
) -> None:
    """Its files have none: the root that they come to must not be taken for one where all have theirs. Without data the root's own have."""
    (instance.settings.root / "manifests.key").unlink()
    backup(instance.settings, tmp_path / "backup", has_data, print)
    settings = other(tmp_path)
    settings.root.mkdir(exist_ok=True)
    (settings.root / "manifests.key").write_text("of the root")
    if has_data:
        with pytest.raises(BackupError, match=r"manifests\.key is there already"):
            restore(settings, tmp_path / "backup", False)
    _, old = restore(settings, tmp_path / "backup", True, without_files=True)
    assert (settings.root / "manifests.key").exists() is not has_data
    assert not has_data or (old is not None and (old / "manifests.key").read_text() == "of the root")


async def test_without_data_it_is_the_store_and_the_keys(instance: Instance, tmp_path: Path) -> None:
    made = backup(instance.settings, tmp_path / "backup", False, lambda text: None)
    assert made.sessions == {"asleep": "row", "awake": "row", "away": "archived"}
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == [
        "backup.json", "control", "edge-port", "manifests", "manifests.key", "tls", "torpor.toml",
    ]  # fmt: skip
    assert (tmp_path / "backup/manifests/sessions/asleep/snapshot-1/snapshot.json").exists()
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
    # The disks are still there: the store comes back beside them.
    await instance.store.close()
    for path in instance.settings.control_dir.iterdir():
        path.unlink()
    restore(instance.settings, tmp_path / "backup", True)
    assert (await opened(instance.settings)).sessions == instance.store.sessions
    assert (instance.settings.sessions_dir / "asleep/overlay").exists()


async def test_files_and_row_belong_together_though_the_session_wakes_and_sleeps_meanwhile(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, copy = 0, module._copy_tree

    def moving(source: Path, target: Path) -> None:
        nonlocal copied
        copy(source, target)
        if source.name == "asleep" and not copied:
            copied += 1
            with contextlib.closing(sqlite3.connect(instance.settings.control_dir / "torpor.db", isolation_level=None)) as live:
                ((body,),) = live.execute("SELECT body FROM sessions WHERE id = 'asleep'")
                one = msgspec.msgpack.decode(body, type=Session)
                one.incarnation = 2
                live.execute("UPDATE sessions SET body = ? WHERE id = 'asleep'", (msgspec.msgpack.encode(one),))
            instance.files("asleep", 2)

    monkeypatch.setattr(module, "_copy_tree", moving)
    made = backup(instance.settings, tmp_path / "backup", True, lambda text: None)
    assert copied == 1 and made.sessions["asleep"] == "files"
    settings = other(tmp_path)
    restore(settings, tmp_path / "backup", False)
    assert (await opened(settings)).sessions["asleep"].incarnation == 2
    assert (settings.sessions_dir / "asleep/overlay").read_text() == "the disk of asleep 2"
    assert sorted(os.listdir(settings.sessions_dir / "asleep")) == ["overlay", "snapshot-2"]


async def test_of_a_session_that_is_damaged_only_the_row_is_kept(instance: Instance, tmp_path: Path) -> None:
    (instance.settings.sessions_dir / "asleep/snapshot-1/1.pages").write_bytes(b"damaged")
    said: list[str] = []
    made = backup(instance.settings, tmp_path / "backup", True, said.append)
    assert made.sessions["asleep"] == "row" and any("1.pages is damaged" in text for text in said)
    assert not (tmp_path / "backup/sessions/asleep").exists()


async def test_what_is_there_is_refused_or_moved_aside_and_never_gone(instance: Instance, tmp_path: Path) -> None:
    backup(instance.settings, tmp_path / "backup", True, lambda text: None)
    settings = other(tmp_path)
    restore(settings, tmp_path / "backup", False)
    (settings.control_dir / "keys.json").write_text("of the other one")
    (settings.sessions_dir / "asleep/overlay").write_text("of the other one")
    with pytest.raises(BackupError, match="is there already: --replace moves it"):
        restore(settings, tmp_path / "backup", False)
    assert (settings.control_dir / "keys.json").read_text() == "of the other one"
    _, old = restore(settings, tmp_path / "backup", True)
    assert (
        old is not None and (old / "control/keys.json").read_text() == (old / "sessions/asleep/overlay").read_text() == "of the other one"
    )
    assert (settings.control_dir / "keys.json").read_text() == "keys.json is secret"
    assert (await opened(settings)).sessions == instance.store.sessions


async def test_a_restore_that_is_ended_at_any_step_is_done_again(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    backup(instance.settings, tmp_path / "backup", True, lambda text: None)
    rename = os.rename

    class Ended(BaseException): ...

    def run(steps: int) -> bool:
        """Whether it was ended, at that step."""
        settings, left = Settings(root=tmp_path / f"r{steps}", run=tmp_path / "run"), steps

        def ending(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Ended
            rename(*arguments)

        monkeypatch.setattr(module.os, "rename", ending)
        try:
            restore(settings, tmp_path / "backup", False)
        except Ended:
            assert not (settings.control_dir / "torpor.db").exists(), "the store is the last"
            return True
        finally:
            monkeypatch.setattr(module.os, "rename", rename)
        return False

    steps = 0
    while run(steps):
        settings = Settings(root=tmp_path / f"r{steps}", run=tmp_path / "run")
        restore(settings, tmp_path / "backup", True)
        assert (await opened(settings)).sessions == instance.store.sessions and (settings.sessions_dir / "asleep/overlay").exists()
        steps += 1
    assert steps > 8


def _edit(backup: Path, **members: Any) -> None:
    path = backup / "backup.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda backup: (backup / "control/keys.json").write_text("x"), r"is damaged: control/keys\.json is not what was written"),
        (lambda backup: (backup / "backup.json").write_text("x"), "is no backup"),
        (lambda backup: (backup / "backup.json").unlink(), "is no backup"),
        (lambda backup: _edit(backup, version=9), "is a backup of format 9"),
        (lambda backup: _edit(backup, schema=99), "has schema 99"),
    ],
)
async def test_what_is_no_backup_of_ours_changes_nothing(
    instance: Instance, tmp_path: Path, change: Callable[[Path], None], text: str
) -> None:  # fmt: skip
    backup(instance.settings, tmp_path / "backup", False, lambda text: None)
    change(tmp_path / "backup")
    with pytest.raises((BackupError, ConfigError), match=text):
        restore(instance.settings, tmp_path / "backup", True)
    assert (instance.settings.control_dir / "keys.json").read_text() == "keys.json is secret"
    assert not list(instance.settings.root.glob("replaced-*")) and not (instance.settings.root / "restore.new").exists()


async def test_what_an_ended_backup_left_goes_and_one_under_way_stays(instance: Instance, tmp_path: Path) -> None:
    over, busy, foreign = (tmp_path / f".backup.{name}" for name in ("torpor-backup-1", "torpor-backup-2", "settings"))
    for path in (over, busy, foreign):
        (path / "backup/control").mkdir(parents=True)
    with making.alone_unless_busy(busy) as is_mine:
        assert is_mine
        backup(instance.settings, tmp_path / "backup", False, lambda text: None)
        assert not over.exists() and busy.exists() and foreign.exists()


async def test_an_archive_that_was_cut_off_is_not_whole(instance: Instance, tmp_path: Path) -> None:
    """Where a file ends, tar(1) takes what is there for all: a copy that broke off lost images and disks without a word."""
    backup(instance.settings, tmp_path / "backup.tar", True, lambda text: None)
    with tarfile.open(tmp_path / "backup.tar") as archive:
        ends = [member.offset for member in archive if member.name.startswith(("./images", "./sessions", "./backup.json"))]
    assert len(ends) > 8
    whole = (tmp_path / "backup.tar").read_bytes()
    for end in ends:
        (tmp_path / "backup.tar").write_bytes(whole[:end])
        with pytest.raises(BackupError, match=r"is not whole: .* has 0 of \d+ bytes|is damaged|is no backup"):
            restore(other(tmp_path), tmp_path / "backup.tar", False)


def test_a_store_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    settings = other(tmp_path)
    settings.control_dir.mkdir(parents=True)
    (settings.control_dir / "torpor.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(BackupError, match=r"^[^\n]*torpor\.db cannot be read: file is not a database: restore it from a backup[^\n]*$"):
        backup(settings, tmp_path / "backup", True, lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


async def test_a_backup_that_cannot_be_finished_leaves_nothing(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_manifests", full)
    for name in ("backup", "backup.tar"):
        with pytest.raises(OSError, match="No space"):
            backup(instance.settings, tmp_path / name, True, lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    with pytest.raises(BackupError, match="there already"):
        backup(instance.settings, tmp_path / "root", True, lambda text: None)
    with pytest.raises(BackupError, match="no instance at"):
        backup(other(tmp_path), tmp_path / "backup", True, lambda text: None)


async def test_a_backup_without_data_says_which_image_versions_its_store_knows(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for data, said in ((False, "1 image versions (1 without its files), 3 microVMs"), (True, "1 image versions, 3 microVMs")):
        command.backup(tmp_path / f"backup-{data}", data, instance.settings.root)
        assert said in capsys.readouterr().out
    made = backup(instance.settings, tmp_path / "backup", False, lambda text: None)
    assert (made.versions, made.images) == (["key-1.0"], [])


async def test_sleepers_that_would_have_no_files_are_somebodys_to_give_up(instance: Instance, tmp_path: Path) -> None:
    backup(instance.settings, tmp_path / "backup", False, lambda text: None)
    settings = other(tmp_path)
    said = r"^1 sleeping microVM \(asleep\) would have no files: .* \(made without --data\) nor in .*other/sessions\..*--without-files"
    with pytest.raises(BackupError, match=said):
        restore(settings, tmp_path / "backup", False)
    assert not any(settings.root.iterdir())
    restore(settings, tmp_path / "backup", False, without_files=True)
    assert (await opened(settings)).sessions == instance.store.sessions


@pytest.mark.parametrize("place", [".", "restore.new", ".."])
async def test_a_root_is_not_restored_from_itself(instance: Instance, place: str) -> None:
    root = instance.settings.root
    (root / "restore.new").mkdir()
    with pytest.raises(BackupError, match=r"^[^\n]* is the instance itself, or has it inside[^\n]*torpor backup` made$"):
        restore(instance.settings, root / place, True)
    assert (root / "restore.new").exists() and not list(root.glob("replaced-*"))


@pytest.mark.parametrize(
    ("gone", "check", "said"),
    [
        ("sessions", "directory", "sessions, where 3 microVMs have their files, is not there"),
        ("images", "directory", "images, where 1 image versions have their files, is not there"),
        ("sessions/asleep", "sleeper", "sessions/asleep, where a sleeping microVM has its files, is not there"),
        ("sessions/away", "", ""),
    ],
)
async def test_doctor_says_what_the_store_knows_and_the_disks_have_not(instance: Instance, gone: str, check: str, said: str) -> None:
    assert not repair.missing_of(instance.settings, repair.known(instance.settings.control_dir / "torpor.db"))
    shutil.rmtree(instance.settings.root / gone, ignore_errors=True)
    found = repair.missing_of(instance.settings, repair.known(instance.settings.control_dir / "torpor.db"))
    assert [(name, is_well) for name, is_well, _ in found] == ([(check, False)] if check else [])
    assert all(said in text for _, _, text in found)
    rows = list(host._stored(instance.settings, repair.known(instance.settings.control_dir / "torpor.db")))
    assert set(found) <= set(rows)
