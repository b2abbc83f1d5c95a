"""What was stored before there were seals gets them at one start; after it, nothing is taken without."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash
from known_keys import KEYS
from test_snapshots import save

from gateway.config import ConfigError, Settings
from gateway.messages import Shape
from vmm import archives, diffs, manifest, sealing, seals
from vmm.errors import Damaged
from vmm.snapshots import Snapshots, is_disk_as_saved

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def own_keys() -> Iterator[None]:
    yield
    seals.use(KEYS)


def before(path: Path) -> None:
    """Makes a manifest's file what it was before seals."""
    known = msgspec.json.decode(seals.opened(seals.SNAPSHOT, path)[1])
    for name in ("session", "account"):
        del known[name]
    known["files"] = [one | {"digest": xxhash.xxh3_64_hexdigest((path.parent / one["name"]).read_bytes())} for one in known["files"]]
    status = path.stat()
    path.write_bytes(msgspec.json.encode(known))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An image, one session that sleeps with a chain of two, one that runs, one that was set aside, and a store that names an archive."""
    one = Settings(root=tmp_path / "root", run=tmp_path / "run")
    image = one.images_dir / "image"
    image.mkdir(parents=True)
    (image / "devices.state").write_bytes(b"devices")
    (image / "manifest.json").write_bytes(
        msgspec.json.encode({"shape": Shape(512, 1, 1 << 30, "kvm", 512), "memory_bytes": 1, "boot_bytes": 1})
    )
    for name in ("asleep", "running", "aside"):
        (one.sessions_dir / name).mkdir(parents=True)
        (one.sessions_dir / name / "overlay").write_bytes(b"disk")
        save(Snapshots(one.sessions_dir), 1, [], [1, 2], name)
    Snapshots(one.sessions_dir).started("running", 2)
    save(Snapshots(one.sessions_dir), 2, [1], [2, 3], "asleep")
    (one.root / "quarantine").mkdir()
    (one.sessions_dir / "aside").rename(one.root / "quarantine/aside.123")
    for path in one.root.glob(f"*/*/*/{diffs.MANIFEST}"):
        before(path)
    one.control_dir.mkdir()
    with sqlite3.connect(one.control_dir / "torpor.db") as store:
        store.execute("CREATE TABLE sessions (id TEXT PRIMARY KEY, state TEXT NOT NULL, body BLOB NOT NULL)")
        rows = [{"id": "away", "state": "SUSPENDED", "archived": {"key": "k", "size": 1, "digest": DIGEST}}, {"id": "asleep"}]
        for row in rows:
            store.execute("INSERT INTO sessions VALUES (?, '', ?)", (row["id"], msgspec.msgpack.encode(row)))
    return one


def prepared(settings: Settings) -> list[str]:
    said: list[str] = []
    sealing.prepare(settings, said.append)
    return said


def test_all_that_there_is_gets_its_seal_once(settings: Settings) -> None:
    assert prepared(settings) == []
    for path, session in (
        ("sessions/asleep/snapshot-1", ""), ("sessions/asleep/snapshot-2", ""), ("sessions/running/memory", ""),
        ("quarantine/aside.123/snapshot-1", "aside"),
    ):  # fmt: skip
        snapshot = settings.root / path
        known = diffs.read_manifest(snapshot, session)
        diffs.verify_all(snapshot, known)
        assert known.files and known.session == (session or path.split("/")[1])
    assert manifest.read(settings.images_dir / "image", "qemu").files == [
        diffs.Sum("devices.state", 7, manifest.read(settings.images_dir / "image", "qemu").files[0].digest)
    ]
    key = settings.root / seals.FILE
    assert key.stat().st_mode & 0o777 == 0o600 and seals.read(key).archives == {DIGEST: "away"}
    assert is_disk_as_saved(settings.sessions_dir / "asleep", 2), "the time of a manifest says whether a guest wrote since"
    content = key.read_bytes()
    assert prepared(settings) == [] and key.read_bytes() == content


def test_afterwards_nothing_is_taken_without(settings: Settings) -> None:
    snapshot = settings.sessions_dir / "asleep/snapshot-2"
    old = (snapshot / diffs.MANIFEST).read_bytes()
    prepared(settings)
    (snapshot / diffs.MANIFEST).write_bytes(old)
    assert prepared(settings) == []
    with pytest.raises(Damaged, match="is no sealed manifest"):
        diffs.read_manifest(snapshot)


def test_a_start_that_was_ended_in_its_middle_is_gone_on_with(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            prepared(settings)
    assert not (settings.root / seals.FILE).exists()
    assert prepared(settings) == []
    assert not list(settings.root.glob(f"{seals.FILE}?*"))
    for number in (1, 2):
        diffs.verify_all(
            settings.sessions_dir / f"asleep/snapshot-{number}", diffs.read_manifest(settings.sessions_dir / f"asleep/snapshot-{number}")
        )


def test_what_is_damaged_gets_none(settings: Settings) -> None:
    """It would be given a checksum that is right."""
    pages = settings.sessions_dir / "asleep/snapshot-2/2.pages"
    pages.write_bytes(b"x" + pages.read_bytes()[1:])
    said = prepared(settings)
    assert len(said) == 1 and "asleep/snapshot-2 has got no seal" in said[0] and "2.pages is not what was written" in said[0]
    with pytest.raises(Damaged):
        diffs.read_manifest(pages.parent)
    diffs.read_manifest(settings.sessions_dir / "asleep/snapshot-1")


def test_an_archive_of_before_gets_its_seal_when_it_comes_back_and_no_other_does(settings: Settings, tmp_path: Path) -> None:
    """Only the very archive that the store named at the first start, and only as that session."""
    session = settings.sessions_dir / "asleep"
    with (tmp_path / "packed").open("wb") as file:
        _, digest = archives.pack(session, session / "snapshot-2", file.fileno())
    shutil.rmtree(session)
    prepared(settings)
    for known in ({}, {digest: "another"}, {digest: "asleep"}):
        keys = seals.read(settings.root / seals.FILE)
        keys.archives = known
        seals.use(keys)
        with (tmp_path / "packed").open("rb") as file:
            if known.get(digest) == "asleep":
                archives.unpack(file.fileno(), digest, session)
            else:
                with pytest.raises(Damaged, match="is no sealed manifest"):
                    archives.unpack(file.fileno(), digest, session)
    diffs.verify_all(session / "snapshot-2", diffs.read_manifest(session / "snapshot-2"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"current": "a", "keys": {"b": "%s"}}' % (b"00" * 32), b'{"current": "a", "keys": {"a": ""}}']
)
def test_a_key_file_that_holds_none_is_said(settings: Settings, content: bytes) -> None:
    prepared(settings)
    (settings.root / seals.FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="restore it from a backup"):
        prepared(settings)
