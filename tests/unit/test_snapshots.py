"""A power cut at any step leaves the old snapshot or the new one, never half of one.

What may be lost in a power cut is what was not synced: a file's bytes until fsync(file), a name until fsync(directory). The calls are
recorded as they are made; at each instant the worst that a power cut could leave is built from the record, and must be whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm import diffs, snapshots, syscalls
from vmm.errors import Missing, VmmError
from vmm.snapshots import Snapshots

SESSION = "microvm-1"
PAGE = syscalls.PAGE


class Power:
    """Follows one session's directory. `cut` builds what a power cut at this moment may leave."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.moments: list[dict[str, dict[str, bytes | None]]] = []
        self._bytes: dict[int, bytes] = {}  # by inode: what is on the disk for certain
        self._names: dict[int, dict[str, int]] = {}  # by a directory's inode: its synced entries
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(snapshots, "_SYNCERS", OneByOne())
        for owner, name in ((os, "rename"), (syscalls, "exchange"), (os, "link")):
            monkeypatch.setattr(owner, name, self._noting(getattr(owner, name)))

    def _noting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.cut()
            done = call(*arguments)
            self.cut()
            return done

        return noted

    def fsync(self, descriptor: int) -> None:
        self.cut()
        self._fsync(descriptor)
        path, status = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor)
        if path.is_dir():
            self._names[status.st_ino] = {one.name: one.stat().st_ino for one in path.iterdir()}
        else:
            self._bytes[status.st_ino] = path.read_bytes()
        self.cut()

    def cut(self) -> None:
        """The two extremes: names that were not synced are there already, or are not; unsynced bytes are lost in both."""
        session = self.root / SESSION
        if not session.exists():
            return
        present = {one.name: one for one in session.iterdir() if one.is_dir()}
        synced = self._names.get(session.stat().st_ino, {})
        inodes = {one.stat().st_ino: one for one in present.values()}
        for entries in (present, {name: inodes[inode] for name, inode in synced.items() if inode in inodes}):
            self.moments.append({name: self._content(path) for name, path in entries.items()})

    def _content(self, directory: Path) -> dict[str, bytes | None]:
        synced = self._names.get(directory.stat().st_ino, {})
        return {
            one.name: self._bytes.get(one.stat().st_ino)
            for one in directory.iterdir()
            if one.name in synced or directory.name.endswith(".new")
        }


class OneByOne:
    """Syncs in their order, each a step at which the power may go."""

    def map(self, work: Callable[[Path], None], paths: list[Path], seconds: float) -> list[None]:
        return [work(path) for path in paths]


def whole(content: dict[str, bytes | None], directory: Path) -> bool:
    """Whether a snapshot's files, as a power cut left them, are those that its manifest names."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in content.items():
        (directory / name).write_bytes(data or b"")
    try:
        manifest = diffs.read_manifest(directory, SESSION)
        for one in manifest.files:
            diffs.verify(directory / one.name, one)
    except VmmError:
        return False
    return True


def save(kept: Snapshots, incarnation: int, chain: list[int], pages: list[int], session: str = SESSION, account: str = "") -> None:
    """As the daemon and a hypervisor do it."""
    work = kept.begin(session)
    (work / "devices.state").write_bytes(b"devices %d" % incarnation)
    runs = [(page, page + 1) for page in pages]
    diffs.write_runs(work / f"{incarnation}.runs", runs)
    (work / f"{incarnation}.pages").write_bytes(bytes([incarnation]) * PAGE * len(pages))
    written = [diffs.checksum(work / name) for name in ("devices.state", f"{incarnation}.runs", f"{incarnation}.pages")]
    kept.commit(session, incarnation, work, chain, written, account=account)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Snapshots]:
    (tmp_path / "sessions" / SESSION).mkdir(parents=True)
    one = Snapshots(tmp_path / "sessions")
    one.overlay(SESSION).write_bytes(b"disk")
    yield one


def check(power: Power, tmp_path: Path, least: int) -> set[str]:
    """Every snapshot at every moment is whole; the names that were seen."""
    seen: set[str] = set()
    for moment in power.moments:
        names = {name for name in moment if name.startswith("snapshot-")}
        for name in names:
            assert whole(moment[name], tmp_path / "check"), (name, sorted(moment[name]))
        seen |= names
    assert len(power.moments) >= least
    return seen


def test_a_first_snapshot(kept: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    power = Power(tmp_path / "sessions", monkeypatch)
    save(kept, 1, [], [1, 2, 3])
    power.cut()
    assert check(power, tmp_path, 10) == {"snapshot-1"}
    assert "snapshot-1" in power.moments[-1], "what was committed is there whatever was not synced"


def test_a_chain_and_its_fold(kept: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain: list[int] = []
    for incarnation in range(1, diffs.FOLD_AT):
        save(kept, incarnation, chain, [incarnation, 50])
        kept.started(SESSION, incarnation + 1)
        chain.append(incarnation)
    power = Power(tmp_path / "sessions", monkeypatch)
    for path in (tmp_path / "sessions" / SESSION).rglob("*"):  # what was before is on the disk
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    save(kept, diffs.FOLD_AT, chain, [60])
    assert kept.foldable(SESSION) == diffs.FOLD_AT
    kept.rest(SESSION)
    before = diffs.read_manifest(kept.newest(SESSION))
    folded = kept.write_fold(SESSION, lambda: None)
    kept.put_fold(SESSION, folded)
    kept.drop_fold(folded)
    power.cut()
    check(power, tmp_path, 30)
    after = diffs.read_manifest(kept.newest(SESSION))
    assert len(before.chain) == diffs.FOLD_AT and after.chain == [diffs.FOLD_AT] and not kept.foldable(SESSION)
    assert kept.held() == {SESSION: diffs.FOLD_AT}


def test_a_recorder_that_sees_nothing_would_fail(kept: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its syncs the same sequence is caught."""
    power = Power(tmp_path / "sessions", monkeypatch)
    monkeypatch.setattr(snapshots, "sync", lambda paths: None)
    save(kept, 1, [], [1, 2, 3])
    power.cut()
    with pytest.raises(AssertionError):
        check(power, tmp_path, 1)


def test_what_a_start_a_call_off_and_a_rest_leave(kept: Snapshots) -> None:
    save(kept, 1, [], [1])
    kept.started(SESSION, 2)
    assert kept.held() == {} and (kept.of(SESSION) / "memory/1.pages").exists()
    save(kept, 2, [1], [2])
    kept.called_off(SESSION, 2)
    assert kept.held() == {} and (kept.of(SESSION) / "memory/1.pages").exists(), "what is mapped stays"
    save(kept, 2, [1], [2])
    kept.rest(SESSION)
    assert kept.held() == {SESSION: 2} and not (kept.of(SESSION) / "memory").exists()
    assert diffs.read_manifest(kept.newest(SESSION)).chain == [1, 2]
    with pytest.raises(Missing, match="has lost diffs"):
        save(kept, 4, [7], [3])


def test_who_has_a_snapshot_is_known_without_a_look_at_everybodys_files(kept: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scrape of the metrics asked, and a build twice a second: 25 ms a thousand sessions on the event loop."""
    save(kept, 1, [], [1])
    assert kept.held() == {SESSION: 1}
    save(kept, 2, [1], [2])
    kept.rest(SESSION)
    kept.rename(SESSION, "other")
    with monkeypatch.context() as patch:
        for name in ("iterdir", "glob", "exists"):
            patch.setattr(Path, name, lambda *_: pytest.fail("it looked"))
        assert kept.held() == {"other": 2}
    kept.started("other", 3)
    assert kept.held() == {}
    kept.rename("other", SESSION)
    kept.forget(SESSION)
    assert kept.held() == {} and not kept.of(SESSION).exists()
    kept.sweep_forgotten()
    assert not any(kept.of(SESSION).parent.iterdir())


def test_a_snapshot_that_is_made_again_takes_the_place_of_the_one_that_could_not_be_called_off(kept: Snapshots) -> None:
    """At no moment is there none."""
    save(kept, 1, [], [1])
    save(kept, 1, [], [1, 2])
    assert diffs.page_count(diffs.runs_of(kept.newest(SESSION) / "1.runs")) == 2
    kept.rest(SESSION)
    kept.sweep(SESSION)
    assert sorted(path.name for path in kept.of(SESSION).iterdir()) == ["overlay", "snapshot-1"]


def test_a_thread_that_comes_late_makes_no_snapshot_of_what_a_later_one_writes(kept: Snapshots) -> None:
    """A suspend's time was up while its files were being synced, and the guest ran on."""
    late = kept.begin(SESSION)
    kept.abandon(SESSION, 1, late)
    later = kept.begin(SESSION)
    (later / "devices.state").write_bytes(b"half")
    with pytest.raises(OSError, match="No such file"):
        kept.commit(SESSION, 1, late, [], [])
    assert kept.held() == {} and later.exists()
    once_more = kept.begin(SESSION)
    kept.sweep(SESSION)
    assert {path for path in kept.of(SESSION).iterdir() if path.is_dir()} == {once_more}, "what nobody finished goes with the next one"


def test_a_session_that_went_meanwhile_has_nothing_to_clear_away(kept: Snapshots) -> None:
    kept.forget(SESSION)
    kept.rest(SESSION)
    kept.sweep(SESSION)
    assert not kept.foldable(SESSION)


def test_what_is_void_and_not_yet_gone_is_no_snapshot_any_more(kept: Snapshots) -> None:
    """A session that sleeps again before its old files went: diffs are found in them, and the rest takes them."""
    save(kept, 1, [], [1])
    save(kept, 2, [1], [2])
    assert kept.held() == {SESSION: 2} and kept.newest(SESSION).name == "snapshot-2"
    kept.rest(SESSION)
    assert [path.name for path in kept.of(SESSION).glob("snapshot-*")] == ["snapshot-2"]
    kept.started(SESSION, 2)
    assert kept.held() == {SESSION: 2}, "a start that is noted late takes nothing that is newer"


@pytest.mark.parametrize("name", ["snapshot-2/snapshot.json", "overlay"])
def test_what_lacks_its_manifest_or_its_disk_is_not_loaded(tmp_path: Path, name: str) -> None:
    """Without the manifest it was taken for an image: a sleeper's devices over the image's memory, and what it had saved was void then."""
    (tmp_path / SESSION / "snapshot-2").mkdir(parents=True)
    for path in ("snapshot-2/snapshot.json", "overlay"):
        (tmp_path / SESSION / path).write_bytes(b"{}")
    kept = Snapshots(tmp_path)
    assert kept.newest(SESSION).name == "snapshot-2"
    (tmp_path / SESSION / name).unlink()
    with pytest.raises(Missing, match=f"{name} is not there"):
        kept.newest(SESSION)


def test_a_look_that_fails_halfway_is_not_taken_for_all_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vmm that starts while descriptors are short would have told control that half of the sleepers have no snapshot."""
    for name in ("a", "b", "c"):
        (tmp_path / name / "snapshot-1").mkdir(parents=True)
    snapshots, looked, scandir = Snapshots(tmp_path), [], os.scandir

    def short(path: Any) -> Any:
        looked.append(path)
        if len(looked) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", short)
    with pytest.raises(OSError, match="Too many"):
        snapshots.held()
    assert snapshots.held() == {"a": 1, "b": 1, "c": 1}
