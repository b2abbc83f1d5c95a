"""The first start with seals: keys are made, and what was stored before gets its seals, once.

Until all of it has them the keys lie in a file of another name, so a start that was ended in its middle is gone on with; from the moment
of its rename nothing is taken without a seal. Files are compared with the checksums that they had (xxh3), and get those of now: what
differs stays as it is, and is refused as damaged when somebody asks for it. Archives in the object store get theirs when they come back:
their SHA-256, which the store of control has now, is written down with the keys.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import xxhash

from gateway.config import Settings

from . import diffs, disks, manifest, seals
from .diffs import Manifest, Sum
from .errors import Damaged, Unavailable, VmmError

_HALF = f"{seals.FILE}.first"
_CHUNK = 4 << 20
_STORE_SECONDS = 30.0
Say = Callable[[str], None]


class _Archive(msgspec.Struct):
    digest: str


class _Row(msgspec.Struct):
    """What is wanted of a session's row."""

    id: str
    archived: _Archive | None = None


def prepare(settings: Settings, say: Say) -> None:
    """Makes the instance's keys this process's. `say` is told of what gets no seal. Raises ConfigError, VmmError, OSError."""
    path, half = settings.root / seals.FILE, settings.root / _HALF
    if path.exists():
        seals.use(seals.read(path))
        return
    settings.root.mkdir(parents=True, exist_ok=True)
    if not half.exists():
        keys = seals.new()
        keys.archives = _archives(settings.control_dir / "torpor.db")
        seals.write(half, keys)
    seals.use(seals.read(half))
    for image in sorted(settings.images_dir.glob(f"[!.]*/{manifest.MANIFEST}")):
        _try(_seal_image, image.parent, say)
    for snapshot, session in _snapshots(settings):
        _try(partial(seal_snapshot, session=session), snapshot, say)
    os.rename(half, path)
    disks.sync_path(settings.root)


def _archives(store: Path) -> dict[str, str]:
    """Returns the SHA-256 of each archive that the store names, and its session. Raises Unavailable."""
    if not store.exists():
        return {}
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=_STORE_SECONDS)) as connection:
            rows = [msgspec.msgpack.decode(row[0], type=_Row) for row in connection.execute("SELECT body FROM sessions")]
    except (sqlite3.Error, ValueError) as error:
        raise Unavailable(f"{store} cannot be read, which names archives of before: {error}") from error
    return {row.archived.digest: row.id for row in rows if row.archived is not None}


def _snapshots(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Returns each with its session: those that sleep, that run (`memory`), and that were set aside."""
    for path in sorted(settings.sessions_dir.glob(f"[!.]*/*/{diffs.MANIFEST}")):
        if path.parent.name == "memory" or path.parent.name.startswith(diffs.PREFIX):
            yield path.parent, path.parents[1].name
    for path in sorted((settings.root / "quarantine").glob(f"[!.]*/{diffs.PREFIX}*/{diffs.MANIFEST}")):
        yield path.parent, path.parents[1].name.partition(".")[0]  # an earlier one of a name has a time behind it


def _try(work: Callable[[Path], None], path: Path, say: Say) -> None:
    try:
        work(path)
    except (VmmError, ValueError, FileNotFoundError) as error:
        say(f"{path} has got no seal: {error}")


def _seal_image(image: Path) -> None:
    data = seals.content(image / manifest.MANIFEST)
    if seals.is_sealed(data):
        return
    whole = msgspec.json.decode(data, type=manifest.Manifest)
    whole.files = manifest.sums(image)
    manifest.write(image, whole)


def seal_snapshot(snapshot: Path, session: str) -> None:
    """Gives a snapshot of before its checksums and its seal. Raises VmmError, ValueError, OSError."""
    path = snapshot / diffs.MANIFEST
    data = seals.content(path)
    if seals.is_sealed(data):
        return
    whole = msgspec.json.decode(data, type=Manifest)
    whole.files = [_again(snapshot / one.name, one) for one in whole.files]
    whole.session = session
    status, temporary = path.stat(), path.with_name(f"{path.name}.new")
    temporary.write_bytes(seals.seal(seals.SNAPSHOT, whole.account, msgspec.json.encode(whole)))
    os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))  # which says whether the disk was written to since
    disks.sync_path(temporary)
    os.rename(temporary, path)
    disks.sync_path(snapshot)


def _again(path: Path, known: Sum) -> Sum:
    """Returns the checksum of now of a file that is as it was. Raises VmmError, OSError."""
    state = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            state.update(data)
    if (path.stat().st_size, state.hexdigest()) != (known.size, known.digest):
        raise Damaged(f"{path} is not what was written")
    return diffs.checksum(path)
