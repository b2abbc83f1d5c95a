"""The files of sessions: what is a snapshot, what is only what a running hypervisor still has mapped, what is nobody's.

sessions/<id>/overlay                the disk
sessions/<id>/snapshot-<N>/          what incarnation N left: a whole snapshot from the moment of one rename
sessions/<id>/memory/                the same, void since its successor runs; the next snapshot is a diff over it
sessions/<id>/snapshot.new, fold.new what was being written when somebody died
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import diffs, disks, syscalls
from .diffs import Manifest, Sum
from .errors import Missing, VmmError
from .provenance import Provenance

_PREFIX, _BASE, _NEW, _FOLD, _LINK = "snapshot-", "memory", "snapshot.new", "fold.new", "link"
OVERLAY = "overlay"
_SYNCERS = ThreadPoolExecutor(8, "fsync")


class Snapshots:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, session: str) -> Path:
        return self._directory / session

    def overlay(self, session: str) -> Path:
        return self.of(session) / OVERLAY

    def held(self) -> dict[str, int]:
        """Session to the incarnation whose snapshot is there."""
        found: dict[str, int] = {}
        for directory in self._directory.iterdir():
            for number, _ in snapshots_in(directory):
                found[directory.name] = max(number, found.get(directory.name, 0))
        return found

    def newest(self, session: str) -> Path:
        """Raises Missing, OSError."""
        there = sorted(snapshots_in(self.of(session)))
        if not there or not self.overlay(session).exists():
            raise Missing(f"session {session} has no snapshot on this host")
        return there[-1][1]

    # ---- a new one ----

    def begin(self, session: str) -> Path:
        """An empty directory to write a snapshot into."""
        work = self.of(session) / _NEW
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def commit(
        self, session: str, incarnation: int, work: Path, chain: list[int], written: list[Sum], made: Provenance | None = None
    ) -> Manifest:  # fmt: skip
        """Makes what was written, with the diffs under it, durable, and then the session's snapshot. Raises OSError, Missing, Damaged."""
        files = list(written)
        if chain:
            base = self._base(session, chain)
            known = {one.name: one for one in diffs.read_manifest(base).files}
            diffs.link_chain(base, work, chain)
            files += [known[name] for name in diffs.names(chain)]
        manifest = Manifest([*chain, incarnation], files, self.overlay(session).stat().st_size, made)
        diffs.write_manifest(work, manifest)
        sync([*(work / one.name for one in written), work / diffs.MANIFEST, work, self.overlay(session)])
        target = self.of(session) / f"{_PREFIX}{incarnation}"
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        disks.sync_path(self.of(session))
        return manifest

    def _base(self, session: str, chain: list[int]) -> Path:
        """Where the diffs lie that a running hypervisor has mapped."""
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

    # ---- what becomes of one ----

    def started(self, session: str, incarnation: int) -> None:
        """`incarnation` runs: older snapshots are void; the newest of them stays as what is mapped."""
        directory = self.of(session)
        old = sorted((number, path) for number, path in snapshots_in(directory) if number < incarnation)
        if not old:
            return
        shutil.rmtree(directory / _BASE, ignore_errors=True)
        old[-1][1].rename(directory / _BASE)
        for _, path in old[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def called_off(self, session: str, incarnation: int) -> None:
        """The guest of `incarnation` runs on: what it had saved is void."""
        shutil.rmtree(self.of(session) / f"{_PREFIX}{incarnation}", ignore_errors=True)

    def rest(self, session: str) -> None:
        """Nothing is mapped any more: what the newest snapshot was made over, whose files it shares, goes."""
        directory = self.of(session)
        older = [path.name for _, path in sorted(snapshots_in(directory))[:-1]]
        for name in (_BASE, _NEW, _FOLD, *older):
            shutil.rmtree(directory / name, ignore_errors=True)

    def needs_fold(self, session: str) -> bool:
        with contextlib.suppress(VmmError, OSError):
            return len(diffs.read_manifest(self.newest(session)).chain) >= diffs.FOLD_AT
        return False

    def fold(self, session: str) -> None:
        """Writes the chain as one diff and puts it in the snapshot's place by one exchange. Nobody may resume meanwhile."""
        snapshot, work = self.newest(session), self.of(session) / _FOLD
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            folded = diffs.fold(snapshot, diffs.read_manifest(snapshot), work)
            sync([*(work / name for name in diffs.names(folded.chain)), work / diffs.MANIFEST, work])
            syscalls.exchange(work, snapshot)
            disks.sync_path(self.of(session))
        finally:
            shutil.rmtree(work, ignore_errors=True)

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
        """All files of a session become another's, which has none. Raises Missing, OSError."""
        shutil.rmtree(self.of(new), ignore_errors=True)
        try:
            self.of(session).rename(self.of(new))
        except FileNotFoundError as error:
            raise Missing(f"session {session} has no files: {error}") from error

    def forget(self, session: str) -> None:
        shutil.rmtree(self.of(session), ignore_errors=True)


def snapshots_in(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in directory.glob(f"{_PREFIX}[0-9]*"):
        with contextlib.suppress(ValueError):
            yield int(path.name.removeprefix(_PREFIX)), path


def sync(paths: list[Path]) -> None:
    """Makes files and directories durable (fsync(2)), side by side: a file system's journal commits once for all that wait.
    Raises OSError."""
    list(_SYNCERS.map(disks.sync_path, paths))
