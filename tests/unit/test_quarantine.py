"""What something is wrong with is set aside, whole, and comes back whole; only a word of its own removes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from test_diffs import make

from gateway.messages import QuarantineRequest
from vmm.errors import Damaged, Missing, Unavailable
from vmm.quarantine import Quarantine

WHY = QuarantineRequest("s1", 3, "image-1", "1.pages is damaged")


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    """One session with a snapshot of incarnation 3 and a disk."""
    snapshot = tmp_path / "sessions/s1/snapshot-3"
    snapshot.mkdir(parents=True)
    make(snapshot, [{1, 2, 9}, {3}, {4}])
    (tmp_path / "sessions/s1/overlay").write_bytes(b"disk")
    (tmp_path / "images/image-1").mkdir(parents=True)
    return Quarantine(tmp_path / "sessions", tmp_path / "quarantine", tmp_path / "images")


def content(directory: Path) -> dict[str, bytes]:
    return {str(one.relative_to(directory)): one.read_bytes() for one in directory.rglob("*") if one.is_file()}


@pytest.mark.parametrize("are_apart", [False, True], ids=["one file system", "two"])
def test_there_and_back(quarantine: Quarantine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_apart: bool) -> None:
    before = content(tmp_path / "sessions/s1")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if are_apart and Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "other file system")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    put = quarantine.put(WHY)
    assert (put.session, put.incarnation, put.image, put.reason, put.snapshot) == ("s1", 3, "image-1", "1.pages is damaged", 3)
    assert put.bytes > 0 and put.at > 0
    assert quarantine.put(WHY) == put and quarantine.list() == [put], "it may be asked for again"
    assert not (tmp_path / "sessions/s1").exists()
    assert quarantine.recover("s1").snapshot == 3
    assert quarantine.recover("s1").snapshot == 3, "it may be asked for again"
    assert content(tmp_path / "sessions/s1") == before and not quarantine.list()


def test_one_without_its_manifest_is_not_given_back(quarantine: Quarantine, tmp_path: Path) -> None:
    (tmp_path / "sessions/s1/snapshot-3/snapshot.json").unlink()
    quarantine.put(WHY)
    with pytest.raises(Missing, match=r"snapshot\.json is not there"):
        quarantine.recover("s1")


def test_a_disk_that_was_written_to_since_is_known(quarantine: Quarantine, tmp_path: Path) -> None:
    """Its memory is of another time then (gateway/sessions/quarantine.py)."""
    overlay, manifest = (tmp_path / "sessions/s1" / name for name in ("overlay", "snapshot-3/snapshot.json"))
    at = manifest.stat().st_mtime_ns
    os.utime(overlay, ns=(at, at))
    assert quarantine.put(WHY).is_disk_as_saved
    os.utime(tmp_path / "quarantine/s1/overlay", ns=(at + 1, at + 1))
    assert not quarantine.list()[0].is_disk_as_saved


def test_a_full_disk_keeps_nothing_from_being_set_aside(quarantine: Quarantine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert quarantine.put(WHY).snapshot == 3 and not (tmp_path / "sessions/s1").exists()


def test_what_is_still_damaged_stays(quarantine: Quarantine, tmp_path: Path) -> None:
    pages = tmp_path / "sessions/s1/snapshot-3/1.pages"
    good = pages.read_bytes()
    pages.write_bytes(b"x" * len(good))
    quarantine.put(WHY)
    with pytest.raises(Damaged):
        quarantine.recover("s1")
    (tmp_path / "quarantine/s1/snapshot-3/1.pages").write_bytes(good)
    assert quarantine.recover("s1").snapshot == 3


@pytest.mark.parametrize("gone", ["snapshot-3", "overlay"])
def test_what_cannot_come_back_says_what_is_left(quarantine: Quarantine, tmp_path: Path, gone: str) -> None:
    (tmp_path / "sessions/s1" / gone).rename(tmp_path / "elsewhere")
    quarantine.put(WHY)
    with pytest.raises(Missing, match="quarantine/s1"):
        quarantine.recover("s1")
    assert len(quarantine.list()) == 1


def test_one_whose_image_is_gone_is_not_given_back_to_sleep_for_ever(quarantine: Quarantine, tmp_path: Path) -> None:
    quarantine.put(WHY)
    (tmp_path / "images/image-1").rename(tmp_path / "quarantine/image-image-1")
    with pytest.raises(Missing, match="image image-1, which session s1 was loaded over, is not in"):
        quarantine.recover("s1")
    (tmp_path / "quarantine/image-image-1").rename(tmp_path / "images/image-1")
    assert quarantine.recover("s1").snapshot == 3


def test_a_session_with_files_of_its_own_keeps_them(quarantine: Quarantine, tmp_path: Path) -> None:
    quarantine.put(WHY)
    (tmp_path / "sessions/s1").mkdir()
    with pytest.raises(Unavailable, match="files of its own"):
        quarantine.recover("s1")
    quarantine.put(WHY)
    assert len(quarantine.list()) == 2, "neither takes the other's place"


@pytest.mark.parametrize("content", [b"{", b'{"session":"\xff"}'], ids=["cut off", "no text"])
def test_only_its_release_removes_it(quarantine: Quarantine, tmp_path: Path, content: bytes) -> None:
    quarantine.put(WHY)
    (tmp_path / "quarantine/s1/reason.json").write_bytes(content)
    (tmp_path / "quarantine/notes.txt").write_text("of an operator, who looks after it")
    (listed,) = quarantine.list()
    assert listed.session == "s1" and listed.snapshot == 3 and "cannot be read" in listed.reason
    quarantine.release("s1")
    assert not quarantine.list() and [path.name for path in (tmp_path / "quarantine").iterdir()] == ["notes.txt"]
    with pytest.raises(Missing):
        quarantine.recover("s1")
