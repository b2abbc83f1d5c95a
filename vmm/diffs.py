"""What a session changed in its image's memory, as a chain of diffs: later ones lie over earlier ones.

A diff is two files: `N.runs` (pairs of 64-bit page numbers: first, after the last) and `N.pages` (those pages, one run after
another); N is the incarnation that wrote it. They never change once written: hypervisors have them mapped. A snapshot's manifest
names its chain with sizes and checksums, and is sealed (vmm/seals.py).
"""

from __future__ import annotations

import array
import bisect
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

import msgspec

from . import beneath, seals, syscalls
from .beneath import Stray
from .errors import Damaged, unreadable
from .provenance import Provenance
from .syscalls import PAGE

MANIFEST = "snapshot.json"
PREFIX = "snapshot-"  # of the directory of a whole one: its incarnation follows
_CHUNK = 4 << 20
FOLD_AT = 6  # diffs in a chain; then they are folded into one


class Sum(msgspec.Struct, frozen=True):
    """A file's bytes and checksum."""

    name: str
    size: int
    digest: str


class Manifest(msgspec.Struct):
    """A snapshot: the chain's incarnations, oldest first, of which the last one wrote it, and every file it needs but the overlay, which is
    sized only. `session` and `account`: whose it is; no account: its image's was not known."""

    chain: list[int]
    files: list[Sum]
    overlay_bytes: int
    made: Provenance | None = None  # by what; None: as its image (commit 165a0cb wrote nothing here)
    session: str = ""
    account: str = ""


class Segment(msgspec.Struct, frozen=True, order=True):
    """Pages `first` to `after` (exclusive) of the guest, which lie at page `at` of the diff `diff`'s file."""

    first: int
    after: int
    diff: int
    at: int


def runs_of(path: Path) -> list[tuple[int, int]]:
    """Raises Damaged for a file that is no list of runs in order, Missing, Unavailable."""
    try:
        numbers = array.array("Q", seals.content(path))
    except ValueError as error:
        raise Damaged(f"{path} is no list of runs: {error}") from error
    runs = list(zip(numbers[::2], numbers[1::2], strict=len(numbers) % 2 == 0))
    if len(numbers) % 2 or any(first >= after for first, after in runs) or any(a[1] > b[0] for a, b in itertools.pairwise(runs)):
        raise Damaged(f"{path} is no list of runs")
    return runs


def open_pages(snapshot: Path, number: int) -> FileIO:
    """Raises Missing, Unavailable."""
    return _opened(snapshot / f"{number}.pages")


def _opened(path: Path) -> FileIO:
    """A link in a file's place is not followed. Raises Damaged, Missing, Unavailable."""
    try:
        return FileIO(beneath.opened(path.parent, path.name))
    except Stray as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise unreadable(error, path) from error


def write_runs(path: Path, runs: list[tuple[int, int]]) -> None:
    """Does not sync."""
    path.write_bytes(array.array("Q", [number for run in runs for number in run]).tobytes())


def filled(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the runs with their smallest gaps filled, for at most a tenth more pages: each run costs a mapping, a page 4 KiB."""
    room = page_count(runs) // 10
    gaps = sorted((after[0] - before[1], at) for at, (before, after) in enumerate(itertools.pairwise(runs)))
    closed: set[int] = set()
    for size, at in gaps:
        if size > room:
            break
        room -= size
        closed.add(at)
    made: list[tuple[int, int]] = []
    for at, (first, after) in enumerate(runs):
        if at - 1 in closed:
            made[-1] = (made[-1][0], after)
        else:
            made.append((first, after))
    return made


def page_count(runs: Iterable[tuple[int, int]]) -> int:
    return sum(after - first for first, after in runs)


def merge(chain: list[tuple[int, list[tuple[int, int]]]]) -> list[Segment]:
    """Returns what of each diff still shows, in the guest's order. `chain`: (diff, runs), oldest first."""
    shown: list[Segment] = []
    for diff, runs in chain:
        at = 0
        fresh: list[Segment] = []
        for first, after in runs:
            fresh.append(Segment(first, after, diff, at))
            at += after - first
        shown = _over(shown, fresh)
    return shown


def shown(snapshot: Path, chain: list[int]) -> list[Segment]:
    """Returns what of a snapshot's diffs shows. Raises Damaged, Missing, Unavailable."""
    return merge([(number, runs_of(snapshot / f"{number}.runs")) for number in chain])


def _over(below: list[Segment], above: list[Segment]) -> list[Segment]:
    """Returns `below` where `above` leaves it to be seen, and `above`."""
    if not below:
        return above
    starts = [one.first for one in above]
    kept: list[Segment] = []
    for one in below:
        first, at = one.first, max(0, bisect.bisect_right(starts, one.first) - 1)
        while first < one.after:
            while at < len(above) and above[at].after <= first:
                at += 1
            end = min(one.after, above[at].first) if at < len(above) else one.after
            if end > first:
                kept.append(Segment(first, end, one.diff, one.at + first - one.first))
            first = max(first, above[at].after) if at < len(above) else one.after
    return sorted(kept + above)


def checksum(path: Path, again: str = "") -> Sum:
    """`again`: the checksum that it had. Raises VmmError, OSError."""
    with _opened(path) as file:
        state, size, buffer = seals.Checksum(again), 0, memoryview(bytearray(min(_CHUNK, max(1, os.fstat(file.fileno()).st_size))))
        while got := file.readinto(buffer):
            state.update(buffer[:got])
            size += got
    return Sum(path.name, size, state.digest())


def verify(path: Path, expected: Sum) -> None:
    """Raises Damaged for a file that is not what was written, Missing, Unavailable."""
    try:
        found = checksum(path, expected.digest)
    except OSError as error:
        raise unreadable(error, path) from error
    if (found.size, found.digest) != (expected.size, expected.digest):
        raise Damaged(f"{path} is damaged: its {found.size} bytes are not the {expected.size} that were written")


def verify_all(snapshot: Path, manifest: Manifest, check: Callable[[], None] = lambda: None) -> None:
    """Raises Damaged for the first file that is not what was written, Missing, Unavailable. `check` calls it off by raising."""
    for one in manifest.files:
        check()
        verify(snapshot / one.name, one)


def verify_whole(snapshot: Path) -> None:
    """Compares all that a snapshot's manifest names. An image's files have no manifest: they are checked by whoever gets it. Raises
    Damaged, Missing, Unavailable."""
    if (snapshot / MANIFEST).exists():
        verify_all(snapshot, read_manifest(snapshot))


def read_manifest(snapshot: Path, session: str = "") -> Manifest:
    """Returns the manifest of a snapshot of `session`; of none, the directory's name says whose. Raises Damaged, also for one of another
    session or incarnation, Refused, Missing, Unavailable."""
    path, owner = snapshot / MANIFEST, session or snapshot.parent.name
    _, data = seals.opened(seals.SNAPSHOT, path)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except ValueError as error:
        raise Damaged(f"{path} is no manifest: {error}") from error
    if manifest.session != owner:
        raise Damaged(f"{path} is of session {manifest.session}, and lies in the place of {owner}'s")
    if not manifest.chain or (snapshot.name.startswith(PREFIX) and snapshot.name != f"{PREFIX}{manifest.chain[-1]}"):
        raise Damaged(f"{path} is of incarnation {(manifest.chain or [0])[-1]}, and lies in the place of another one's")
    return manifest


def write_manifest(snapshot: Path, manifest: Manifest) -> None:
    """Does not sync. Raises Unavailable, OSError."""
    (snapshot / MANIFEST).write_bytes(seals.seal(seals.SNAPSHOT, manifest.account, msgspec.json.encode(manifest)))


def names(chain: list[int]) -> list[str]:
    return [f"{number}.{kind}" for number in chain for kind in ("runs", "pages")]


def link_chain(source: Path, target: Path, chain: list[int]) -> None:
    """Makes the chain's files part of another snapshot, without a copy."""
    for name in names(chain):
        os.link(source / name, target / name)


def fold(snapshot: Path, manifest: Manifest, target: Path, check: Callable[[], None] = lambda: None) -> Manifest:
    """Writes the chain as one diff into `target`, named after the newest, with links to what else the snapshot has. Does not sync.
    `check` calls it off by raising. Raises Damaged, Missing, Unavailable, OSError."""
    segments = shown(snapshot, manifest.chain)
    newest = manifest.chain[-1]
    runs: list[tuple[int, int]] = []
    with contextlib.ExitStack() as files:
        sources = {number: files.enter_context(open_pages(snapshot, number)).fileno() for number in manifest.chain}
        out, at = files.enter_context((target / f"{newest}.pages").open("wb", buffering=0)), 0
        for one in segments:
            check()
            length = (one.after - one.first) * PAGE
            try:
                syscalls.copy_range(sources[one.diff], one.at * PAGE, out.fileno(), at, length)
            except EOFError as error:
                raise Damaged(f"{snapshot}/{one.diff}.pages is shorter than its runs") from error
            at += length
            if runs and runs[-1][1] == one.first:
                runs[-1] = (runs[-1][0], one.after)
            else:
                runs.append((one.first, one.after))
    write_runs(target / f"{newest}.runs", runs)
    kept = [file for file in manifest.files if file.name not in names(manifest.chain)]
    for file in kept:
        os.link(snapshot / file.name, target / file.name)
    written = [*kept, *(checksum(target / name) for name in names([newest]))]
    folded = msgspec.structs.replace(manifest, chain=[newest], files=written)
    write_manifest(target, folded)
    return folded
