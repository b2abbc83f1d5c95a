"""The files of sessions: what is a snapshot, what is only what a running hypervisor still has mapped, what is nobody's.

sessions/<id>/overlay            the disk
sessions/<id>/snapshot-<N>/      what incarnation N left: a whole snapshot from the moment of one rename
sessions/<id>/memory/            the same, void since its successor runs; the next snapshot is a diff over it
sessions/<id>/new-…              what was being written when somebody died; fold-…: the same
sessions/<id>/void-…             what is nobody's any more, and has yet to be removed; sessions/.void-…: a whole session
sessions/.unpacked-…             a session that is being unpacked

Who calls what changes a session's files holds its lock (vmm/vms.py). What is void is renamed under the lock, which takes no time, and
removed without it (`sweep`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway import executors

from . import beneath, diffs, disks, syscalls
from .diffs import Manifest, Sum
from .errors import Damaged, Missing, Unavailable, VmmError
from .provenance import Provenance

_PREFIX, _BASE, _NEW, _FOLD, _LINK = diffs.PREFIX, "memory", "new-", "fold-", "link"
_VOID, _FORGOTTEN, _UNPACKED = "void-", ".void-", ".unpacked-"
_NEW_BEFORE = "snapshot.new"  # that of commit 6df6a41 and before
OVERLAY = "overlay"
_SYNCERS = executors.SYNC
_SYNC_SECONDS = 300.0  # of a disk that is busy with others


@dataclass(frozen=True)
class Folded:
    """A chain that was written as one diff, and what it was made of."""

    work: Path
    snapshot: Path
    chain: list[int]


class Snapshots:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._newest: dict[str, int] | None = None  # by session, once somebody has asked: walking all of them takes time
        self._folding: set[Path] = set()

    def of(self, session: str) -> Path:
        return beneath.child(self._directory, session)

    def overlay(self, session: str) -> Path:
        return self.of(session) / OVERLAY

    def held(self) -> dict[str, int]:
        """Session to the incarnation whose snapshot is there. Raises OSError; what was seen until then is not taken for all."""
        if self._newest is None:
            there = [directory for directory in self._directory.iterdir() if not directory.name.startswith(".")]
            found = {directory.name: _newest_in(directory) for directory in there}
            self._newest = {session: number for session, number in found.items() if number}
        return dict(self._newest)

    def look(self, session: str) -> None:
        """Learns what a session has, of which files have come, changed or gone. Raises OSError."""
        if self._newest is None or session.startswith("."):
            return
        newest = _newest_in(self.of(session))
        if newest:
            self._newest[session] = newest
        else:
            self._newest.pop(session, None)

    def newest(self, session: str) -> Path:
        """Raises Missing, OSError. One without its manifest would be loaded as an image is: a sleeper's devices over the image's memory."""
        there = sorted(snapshots_in(self.of(session)))
        if not there:
            raise Missing(f"session {session} has no snapshot on this host")
        for path in (there[-1][1] / diffs.MANIFEST, self.overlay(session)):
            if not path.exists():
                raise Missing(f"{path} is not there")
        return there[-1][1]

    def check(self, session: str, before: int, account: str) -> Path:
        """Returns the newest snapshot, where it is what the incarnation `before` left, and the account's (empty: not known). Raises
        VmmError, OSError."""
        snapshot = self.newest(session)
        manifest = diffs.read_manifest(snapshot)
        if manifest.chain[-1] != before:
            raise Damaged(f"{snapshot} is of incarnation {manifest.chain[-1]}, and the session slept with {before}")
        names = [*(f"{snapshot.name}/{one.name}" for one in manifest.files), OVERLAY]
        for name in (snapshot.name, *names):
            if os.path.islink(self.of(session) / name):
                raise Damaged(f"{self.of(session) / name} is a link, and none of ours is")
        if account and manifest.account and account != manifest.account:
            raise Damaged(f"{snapshot} is of account {manifest.account}, and its image of {account}")
        return snapshot

    def is_outrun(self, session: str) -> bool:
        """Whether a guest has written to the session's disk since its newest snapshot, so that its memory is not that disk's any more."""
        newest = _newest_in(self.of(session))
        return newest > 0 and not is_disk_as_saved(self.of(session), newest)

    # ---- a new one ----

    def begin(self, session: str) -> Path:
        """Makes an empty directory to write a snapshot into. Its name is its own: a thread that comes late, from a suspend whose time was
        up, makes no snapshot of what a later one is writing."""
        directory = self.of(session)
        self._discard(*(path for path in directory.iterdir() if path.name.startswith(_NEW) or path.name == _NEW_BEFORE))
        work = directory / f"{_NEW}{time.time_ns()}"
        work.mkdir()
        return work

    def abandon(self, session: str, incarnation: int, work: Path) -> None:
        """A snapshot that could not be finished, or was and could not be made durable. Raises OSError."""
        self._discard(work)
        self.called_off(session, incarnation)

    def commit(
        self, session: str, incarnation: int, work: Path, chain: list[int], written: list[Sum], made: Provenance | None = None,
        account: str = "",
    ) -> Manifest:  # fmt: skip
        """Makes what was written, with the diffs under it, durable, and then the session's snapshot. Raises OSError, Missing, Damaged."""
        files = list(written)
        if chain:
            base = self._base(session, chain)
            known = {one.name: one for one in diffs.read_manifest(base).files}
            diffs.link_chain(base, work, chain)
            files += [known[name] for name in diffs.names(chain)]
        manifest = Manifest([*chain, incarnation], files, self.overlay(session).stat().st_size, made, session, account)
        diffs.write_manifest(work, manifest)
        sync([*(work / one.name for one in written), work / diffs.MANIFEST, work, self.overlay(session)])
        target = self.of(session) / f"{_PREFIX}{incarnation}"
        if target.exists():  # of a suspend that was called off, and whose files could not be
            syscalls.exchange(work, target)
            self._discard(work)
        else:
            os.rename(work, target)
        disks.sync_path(self.of(session))
        self.look(session)
        return manifest

    def _base(self, session: str, chain: list[int]) -> Path:
        """Returns where the diffs lie that a running hypervisor has mapped."""
        directory = self.of(session)
        places = [directory / _BASE, *(path for _, path in sorted(snapshots_in(directory), reverse=True))]
        for place in places:
            if all((place / name).exists() for name in diffs.names(chain)):
                return place
        raise Missing(f"session {session} has lost diffs {chain} that its memory is made of")

    def made(self, session: str, incarnation: int) -> Manifest | None:
        """Returns what the snapshot of an incarnation holds, where it is whole. Raises VmmError, OSError for one that cannot be read."""
        path = self.of(session) / f"{_PREFIX}{incarnation}"
        return diffs.read_manifest(path) if path.exists() else None

    def is_saved(self, session: str, incarnation: int) -> bool:
        """Whether what a guest had is on the disk: its snapshot goes before it runs on."""
        return (self.of(session) / f"{_PREFIX}{incarnation}").exists()

    # ---- what becomes of one ----

    def started(self, session: str, incarnation: int) -> None:
        """`incarnation` runs: older snapshots are void; the newest of them stays as what is mapped. Raises OSError."""
        directory = self.of(session)
        old = sorted((number, path) for number, path in snapshots_in(directory) if number < incarnation)
        if not old:
            return
        self._discard(directory / _BASE, *(path for _, path in old[:-1]))
        os.rename(old[-1][1], directory / _BASE)
        self.look(session)

    def called_off(self, session: str, incarnation: int) -> None:
        """The guest of `incarnation` runs on: what it had saved is void, for certain before it does. Raises OSError."""
        if self._discard(self.of(session) / f"{_PREFIX}{incarnation}"):
            disks.sync_path(self.of(session))
            self.look(session)

    def rest(self, session: str) -> None:
        """Nothing is mapped any more: what the newest snapshot was made over, whose files it shares, goes. Raises OSError."""
        directory = self.of(session)
        half = [path for path in directory.glob("*") if is_half_made(path) and path not in self._folding]
        self._discard(directory / _BASE, *half, *(path for _, path in sorted(snapshots_in(directory))[:-1]))
        self.look(session)

    def _discard(self, *paths: Path) -> int:
        """Makes directories nobody's; returns how many there were. Raises OSError."""
        count = 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, path.with_name(f"{_VOID}{time.time_ns()}-{path.name}"))
                count += 1
        return count

    def sweep(self, session: str) -> None:
        """Removes what is nobody's any more."""
        for path in self.of(session).glob(f"{_VOID}*"):
            shutil.rmtree(path, ignore_errors=True)

    # ---- folds ----

    def foldable(self, session: str) -> int:
        """Returns how many diffs the session's chain has, where those are too many, else 0."""
        with contextlib.suppress(VmmError, OSError):
            length = len(diffs.read_manifest(self.newest(session)).chain)
            return length if length >= diffs.FOLD_AT else 0
        return 0

    def write_fold(self, session: str, check: Callable[[], None]) -> Folded:
        """Writes the session's chain as one diff, durably, beside its snapshot, whose files do not change. `check` is called now and then,
        and calls it off by raising. Raises OSError, VmmError."""
        snapshot = self.newest(session)
        manifest = diffs.read_manifest(snapshot)
        work = snapshot.with_name(f"{_FOLD}{time.time_ns()}")
        self._folding.add(work)
        try:
            work.mkdir()
            diffs.verify_all(snapshot, manifest, check)  # what is damaged would be given a checksum that is right
            folded = diffs.fold(snapshot, manifest, work, check)
            sync([*(work / name for name in diffs.names(folded.chain)), work / diffs.MANIFEST, work])
        except BaseException:
            self._drop(work)
            raise
        return Folded(work, snapshot, manifest.chain)

    def put_fold(self, session: str, folded: Folded) -> None:
        """Puts what was folded in the place of what it was made of, by one exchange. Raises Unavailable where that is another one by now,
        OSError, VmmError."""
        if self.newest(session) != folded.snapshot or diffs.read_manifest(folded.snapshot).chain != folded.chain:
            raise Unavailable(f"session {session} has another snapshot by now")
        syscalls.exchange(folded.work, folded.snapshot)
        disks.sync_path(self.of(session))

    def drop_fold(self, folded: Folded) -> None:
        """Removes what `put_fold` left, or did not take."""
        self._drop(folded.work)

    def _drop(self, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        self._folding.discard(work)

    # ---- links that outlive their hypervisors ----

    def park_link(self, session: str, name: str | None) -> None:
        """Remembers, over a restart, the link in which a sleeping session's streams are; None: there are none."""
        path = self.of(session) / _LINK
        if name is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(name, encoding="ascii")

    def parked_link(self, session: str) -> str | None:
        try:
            return (self.of(session) / _LINK).read_text(encoding="ascii")
        except OSError:
            return None

    def parked_links(self) -> dict[str, str]:
        """Session to link."""
        found = {directory.name: self.parked_link(directory.name) for directory in self._directory.iterdir()}
        return {session: name for session, name in found.items() if name}

    def rename(self, session: str, new: str) -> None:
        """All files of a session become another's, which has none. Raises Missing, Unavailable, OSError."""
        try:
            os.rename(self.of(session), self.of(new))
        except FileNotFoundError as error:
            raise Missing(f"session {session} has no files") from error
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise Unavailable(f"session {new} has files of its own") from error
            raise
        self.look(session)
        self.look(new)

    def forget(self, session: str) -> None:
        """The session is over: its files are nobody's. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.of(session), self._directory / f"{_FORGOTTEN}{time.time_ns()}-{session}")
        self.look(session)

    def sweep_forgotten(self) -> None:
        for path in self._directory.glob(f"{_FORGOTTEN}*"):
            shutil.rmtree(path, ignore_errors=True)

    def forget_unpacked(self) -> None:
        """What was being unpacked when an earlier daemon ended is nobody's. Raises OSError."""
        for path in self._directory.glob(f"{_UNPACKED}*"):
            os.rename(path, self._directory / f"{_FORGOTTEN}{time.time_ns()}-{path.name}")


def is_disk_as_saved(directory: Path, snapshot: int) -> bool:
    """Whether nothing was written to a session's disk since its snapshot, whose manifest was written when its guest had stopped."""
    try:
        return os.stat(directory / OVERLAY).st_mtime_ns <= os.stat(directory / f"{_PREFIX}{snapshot}" / diffs.MANIFEST).st_mtime_ns
    except OSError:
        return False


def unpacked(session: Path) -> Path:
    """Returns where the files of a session are put together that come from elsewhere: nobody's until they are all there."""
    return session.with_name(f"{_UNPACKED}{time.time_ns()}-{session.name}")


def _newest_in(directory: Path) -> int:
    """Returns the incarnation of the newest snapshot; 0: there is none. Raises OSError."""
    return max((number for number, _ in snapshots_in(directory)), default=0)


def is_half_made(path: Path) -> bool:
    """Whether this is a snapshot or a fold of a session that was never finished."""
    return path.name.startswith((_NEW, _FOLD)) or path.name == _NEW_BEFORE


def is_void(path: Path) -> bool:
    """Whether this, in a session's directory, is nobody's."""
    return path.name.startswith(_VOID)


def snapshots_in(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in directory.glob(f"{_PREFIX}[0-9]*"):
        with contextlib.suppress(ValueError):
            yield int(path.name.removeprefix(_PREFIX)), path


def sync(paths: list[Path]) -> None:
    """Makes files and directories durable (fsync(2)), side by side: a file system's journal commits once for all that wait.
    Raises OSError."""
    size = max((path.stat().st_size for path in paths), default=0)
    _SYNCERS.map(disks.sync_path, paths, executors.seconds_for(size, _SYNC_SECONDS))
