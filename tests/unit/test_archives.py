"""A sleeping session's files, packed and unpacked: the same again, or nothing."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from vmm import archives, diffs
from vmm.errors import Damaged
from vmm.snapshots import Snapshots, unpacked


def make(directory: Path) -> Path:
    """A session's directory with a snapshot."""
    session = directory / "microvm-1"
    snapshot = session / "snapshot-3"
    snapshot.mkdir(parents=True)
    (session / "overlay").write_bytes(b"overlay" * 1000)
    (session / "memory").mkdir()
    (session / "memory/2.pages").write_bytes(b"void")
    for name in ("3.pages", "3.runs", "devices.state"):
        (snapshot / name).write_bytes(os.urandom(5000))
    diffs.write_manifest(snapshot, diffs.Manifest([3], [], 7000, session="microvm-1"))
    return session


def files(session: Path) -> dict[str, bytes]:
    return {str(path.relative_to(session)): path.read_bytes() for path in session.rglob("*") if path.is_file()}


def packed(session: Path, path: Path) -> tuple[int, str]:
    with path.open("wb") as file:
        return archives.pack(session, session / "snapshot-3", file.fileno())


def unpack(path: Path, digest: str, target: Path) -> None:
    with path.open("rb") as file:
        archives.unpack(file.fileno(), digest, target)


def test_there_and_back(tmp_path: Path) -> None:
    session = make(tmp_path / "a")
    expected = {name: data for name, data in files(session).items() if not name.startswith("memory")}
    size, digest = packed(session, tmp_path / "archive")
    assert (tmp_path / "archive").stat().st_size == size
    target = tmp_path / "b/microvm-1"
    target.parent.mkdir()
    unpack(tmp_path / "archive", digest, target)
    assert files(target) == expected
    assert [path.name for path in target.parent.iterdir()] == ["microvm-1"]


def test_what_came_back_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their directories' entries, and the name under which they are found: then control deletes the copy in the object store."""
    session = make(tmp_path / "a")
    _, digest = packed(session, tmp_path / "archive")
    target = tmp_path / "b/microvm-1"
    target.parent.mkdir()
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/b"))
        sync(descriptor)

    def renamed(path: Path, new: Path) -> None:
        done.append("rename")
        rename(path, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    unpack(tmp_path / "archive", digest, target)
    work = min(name for name in done if name.startswith("/.unpacked-"))
    names = ["3.pages", "3.runs", "devices.state", "snapshot.json"]
    assert set(done[:-2]) == {work, f"{work}/overlay", f"{work}/snapshot-3", *(f"{work}/snapshot-3/{name}" for name in names)}
    assert done[-2:] == ["rename", ""]


def test_one_that_was_interrupted_is_no_sleeper_and_goes(tmp_path: Path) -> None:
    """It was taken for a microVM that the store does not know, and set aside."""
    half = unpacked(tmp_path / "microvm-1")
    make(tmp_path / "whole").rename(half)
    kept = Snapshots(tmp_path)
    assert (half / "snapshot-3").is_dir() and kept.held() == {}
    kept.sweep_forgotten()
    assert half.exists(), "it may be under way"
    kept.forget_unpacked()
    kept.sweep_forgotten()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_leaves_nothing(tmp_path: Path, damage: str) -> None:
    _, digest = packed(make(tmp_path / "a"), tmp_path / "archive")
    data = bytearray((tmp_path / "archive").read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (tmp_path / "archive").write_bytes(data if damage == "flip" else data[:-10])
    target = tmp_path / "b/microvm-1"
    target.parent.mkdir()
    with pytest.raises(Damaged, match="is damaged"):
        unpack(tmp_path / "archive", digest, target)
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "snapshot-3/../../evil", "snapshot-3/a/b", "other"])
def test_names_that_were_never_written_are_refused(tmp_path: Path, name: str) -> None:
    import hashlib

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    data = zstandard.ZstdCompressor().compress(raw.getvalue())
    (tmp_path / "archive").write_bytes(data)
    target = tmp_path / "b/microvm-1"
    target.parent.mkdir()
    with pytest.raises(Damaged, match="which no archive of ours has"):
        unpack(tmp_path / "archive", hashlib.sha256(data).hexdigest(), target)
    assert not list(target.parent.iterdir()) and not (tmp_path / "evil").exists()
