"""Backups of an instance: `torpor backup` and `torpor restore`.

A backup is a directory, or a tar file of one: `backup.json`, `control/` (the store, keys), `tls/` (the authority), the settings,
`manifests/`, and with `--data` `images/`, `sessions/` and `quarantine/`. It is made while the service runs. The store's copy is of one
moment; a sleeping session's files belong to its row, because nothing happened to the session while they were copied, and each file is what
its manifest says. A session that is awake has no files that could be copied: it is in the backup as its row.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from vmm import diffs, making, seals
from vmm.errors import VmmError

from .config import ConfigError, Settings
from .sessions import schema
from .sessions.model import Image, Session, Version
from .sessions.states import State
from .sessions.store import advice, readable

_VERSION = 1
_STORE = "control/torpor.db"
_SEALS = seals.FILE
# What is small and cannot be made again: place in ROOT, and whether control owns it.
_FILES = {
    _STORE: True, "control/keys.json": True, "control/access-keys.json": True, "control/pager.key": True, "control/sessions.key": True,
    "tls/ca.key": False, "tls/ca.crt": False, _SEALS: False,
}  # fmt: skip
_KEPT = ("torpor.toml", "edge-port")  # where the other root has its own, that one stays
_DATA = ("images", "sessions", "quarantine")
_TRIES = 3
_MANIFEST = "backup.json"
_LOGS = (f"{_STORE}-wal", f"{_STORE}-shm")  # of SQLite: without them the store may be an older one
_UNFINISHED = "torpor-backup-"
_ASIDE = "replaced.new"  # until all is in it
Say = Callable[[str], None]


class BackupError(Exception):
    """The backup or restore was not done; the text is one line that says why, and what to do."""


class Contents(msgspec.Struct):
    """backup.json. `files` has the SHA-256 of each small file, `sessions` what of each live session is in the backup: `files`, `archived`
    (they are in the object store) or `row` (it was awake, or its files could not be read, or data was not asked for). `images` are the
    versions whose files are in the backup, `versions` all that its store knows. `data` has the size of each file of data: an archive that
    was cut off where a file ended is one that tar(1) takes for whole."""

    version: int
    made_at: float
    name: str
    root: str
    schema: int
    has_data: bool
    files: dict[str, str]
    sessions: dict[str, str]
    images: list[str]
    versions: list[str] = []
    data: dict[str, int] = {}


# ---- backup ----


def backup(settings: Settings, target: Path, has_data: bool, say: Say) -> Contents:
    """Makes a backup in `target`: a tar file where its name ends with .tar, else a directory. Raises BackupError, ConfigError, OSError."""
    if target.exists():
        raise BackupError(f"{target} is there already: name another place")
    if not (settings.root / _STORE).exists():
        raise BackupError(f"no instance at {settings.root}: name it with --root")
    seals.load(settings.root)
    target.parent.mkdir(parents=True, exist_ok=True)
    _drop_unfinished(target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_UNFINISHED}", dir=target.parent))
    try:
        with making.alone_unless_busy(work):
            made = work / "backup"
            made.mkdir(mode=0o700)
            contents = _fill(settings, made, has_data, say)
            if target.suffix == ".tar":
                archive = work / "backup.tar"
                _run("tar", "--create", "--sparse", "--numeric-owner", f"--file={archive}", f"--directory={made}", ".")
                archive.chmod(0o600)
                made = archive
            _run("sync", "--file-system", str(made))
            os.rename(made, target)
            _run("sync", "--file-system", str(target.parent))
    except sqlite3.Error as error:
        raise BackupError(f"{settings.root / _STORE} cannot be read: {error}{advice(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return contents


def _drop_unfinished(target: Path) -> None:
    """Removes what backups of this name have left that were ended in their middle, every secret of the instance among it."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.{_UNFINISHED}"):
            with making.alone_unless_busy(path) as is_over:
                if is_over:
                    shutil.rmtree(path)


def _fill(settings: Settings, work: Path, has_data: bool, say: Say) -> Contents:
    root = settings.root
    for directory in ("control", "tls", "manifests"):
        (work / directory).mkdir(mode=0o700)
    database = work / _STORE
    with contextlib.closing(_connect(root / _STORE)) as live:
        number = schema.check(live, root / _STORE)
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as copy:
            live.backup(copy)  # one read transaction: of one moment
            copy.execute("PRAGMA journal_mode=DELETE").fetchall()
            found, _ = readable(copy, database)
            sessions = [value for kind, _, value in found if kind == "sessions" and not value.state.is_ended]
            images = [value for kind, _, value in found if kind == "images"]
            for path in (*_FILES, *_KEPT):
                if path != _STORE and (root / path).exists():
                    _copy(root / path, work / path)
            _manifests(root, work / "manifests")
            keys = _images(settings, work, images, say) if has_data else []
            saved = {session.id: "archived" if session.archived is not None else "row" for session in sessions}
            if has_data:
                saved |= {one.id: _session(settings, work, one, live, copy, say) for one in sessions if saved[one.id] == "row"}
                for one in (path for name in _DATA for path in (root / name).glob("*")):
                    if one.is_file() or one.parent.name == "quarantine":  # whose instance it is, and what was set aside
                        _copy_tree(one, work / one.parent.name / one.name)
    files = {path: _digest(work / path) for path in (*_FILES, *_KEPT) if (work / path).exists()}
    versions = sorted(version.key for version in _made(images))
    data = {str(path.relative_to(work)): path.stat().st_size for name in _DATA for path in (work / name).rglob("*") if path.is_file()}
    contents = Contents(_VERSION, time.time(), settings.name, str(root), number, has_data, files, saved, keys, versions, data)
    _run("sync", "--file-system", str(work))  # with its contents' list a backup is one
    (work / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(contents)))
    return contents


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30, isolation_level=None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackupError(f"{command[0]}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")


def _copy(source: Path, target: Path) -> None:
    """With its owner and mode. A link is followed by nobody: what it leads to would be control's after a restore. Raises BackupError."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BackupError(f"{source} is a link: put the file itself there") from error
        raise
    with os.fdopen(descriptor, "rb") as file, target.open("wb") as copy:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BackupError(f"{source} is no plain file")
        shutil.copyfileobj(file, copy)
        os.fchown(copy.fileno(), status.st_uid, status.st_gid)
        os.fchmod(copy.fileno(), stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_tree(source: Path, target: Path) -> None:
    """Holes stay holes, and blocks are shared where the file system can. Raises BackupError, also for a file that went meanwhile."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _run("cp", "--archive", "--sparse=always", "--reflink=auto", str(source), str(target))


def _manifests(root: Path, target: Path) -> None:
    """Returns what the images and snapshots there were made of: for who looks into a backup that has no data."""
    for path in (*root.glob("images/*/manifest.json"), *root.glob("sessions/*/snapshot-*/snapshot.json")):
        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
            _copy(path, target / path.relative_to(root))


def _made(images: list[Image]) -> Iterator[Version]:
    return (version for image in images for version in image.versions if version.state == "SUCCESSFUL")


def _images(settings: Settings, work: Path, images: list[Image], say: Say) -> list[str]:
    """An image is never changed: it is there whole, or is being deleted."""
    copied = []
    for version in _made(images):
        source = settings.images_dir / version.key
        try:
            _copy_tree(source, work / "images" / version.key)
            copied.append(version.key)
        except BackupError as error:
            if source.exists():
                raise
            say(f"image {version.key} is not in the backup: {error}")
    return copied


def _session(settings: Settings, work: Path, known: Session, live: sqlite3.Connection, copy: sqlite3.Connection, say: Say) -> str:
    """Copies the files of a session that sleeps, with the row that they belong to; returns what of it is in the backup."""
    source, target = settings.sessions_dir / known.id, work / "sessions" / known.id
    why = "it is awake: suspend it first"
    for _ in range(_TRIES):
        before = _state(live, known.id)
        if before is None or before[0].state is not State.SUSPENDED or before[0].archived is not None:
            break
        try:
            _copy_tree(source, target)
            snapshot = target / f"snapshot-{before[0].incarnation}"
            if not (target / "overlay").exists():
                raise BackupError(f"{source} has no disk")
            diffs.verify_all(snapshot, diffs.read_manifest(snapshot))
        except (BackupError, VmmError) as error:
            why = str(error)
            continue
        after = _state(live, known.id)
        if after == before:
            copy.execute(
                "UPDATE sessions SET state = ?, body = ? WHERE id = ?", (before[0].state, msgspec.msgpack.encode(before[0]), known.id)
            )
            return "files"
        why = "it was woken meanwhile"
    shutil.rmtree(target, ignore_errors=True)
    say(f"of {known.id} only the row is in the backup: {why}")
    return "row"


def _state(live: sqlite3.Connection, session: str) -> tuple[Session, int] | None:
    """Returns a session as it is now, and the number of the last thing that happened to it."""
    row = live.execute(
        "SELECT body, (SELECT coalesce(max(number), 0) FROM events WHERE subject = id) FROM sessions WHERE id = ?", (session,)
    ).fetchone()
    return (msgspec.msgpack.decode(row[0], type=Session), row[1]) if row is not None else None


# ---- restore ----


def restore(settings: Settings, source: Path, replaces: bool, without_files: bool = False) -> tuple[Contents, Path | None]:
    """Lays a backup out in ROOT, which no service may run over; returns what it had, and where to what it `replaces` was moved. The store
    comes last: a restore that was ended in its middle leaves an instance that has none, and is done again. Sleepers that would have no
    files are somebody's to give up: `without_files`. Raises BackupError, ConfigError, OSError."""
    root = settings.root
    work = root / "restore.new"
    if source.resolve() in (work.resolve(), *work.resolve().parents):  # it would be copied into itself, or removed as what was left
        raise BackupError(f"{source} is the instance itself, or has it inside, and no backup of it: name what `torpor backup` made")
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    try:
        if source.is_dir():
            _copy_tree(source, work)
        else:
            work.mkdir(mode=0o700)
            _run("tar", "--extract", "--numeric-owner", "--same-owner", "--preserve-permissions", f"--file={source}", f"--directory={work}")
        contents = _checked(source, work)
        lost = [] if without_files else _without_files(settings, work)
        if lost:
            listed = f"{', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}"
            how = "" if contents.has_data else " (made without --data)"
            raise BackupError(
                f"{len(lost)} sleeping microVM{'s' if len(lost) != 1 else ''} ({listed}) would have no files: they are neither in "
                f"{source}{how} nor in {settings.sessions_dir}. Put them there, or go on with "
                "--without-files: then they end when they are asked for"
            )
        pieces = list(_pieces(work))
        # A backup from before there were seals: its files get them at the next start, which takes the root for one that has none yet.
        present = [
            piece
            for piece in dict.fromkeys([*pieces, *([_SEALS] if contents.has_data else [])])
            if os.path.lexists(root / piece) and piece not in _KEPT
        ]
        if present and not replaces:
            raise BackupError(f"{root / present[0]} is there already: --replace moves it, and what else is in the way, aside")
        old = _move_aside(root, present)
        _lay_out(settings, work, [piece for piece in pieces if not os.path.lexists(root / piece)])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return contents, old


def _move_aside(root: Path, present: list[str]) -> Path | None:
    """Moves what is in the way to ROOT/replaced-<time>, which has that name when all is there: where this was ended in its middle, what is
    left follows. Returns that directory, where there is one."""
    aside, old = root / _ASIDE, None
    # The store first, with its log: what is left without it is no instance, and is not started.
    pieces = (_STORE, *_LOGS, *(piece for piece in present if piece != _STORE))
    while aside.exists() or any(os.path.lexists(root / piece) for piece in pieces):
        # A store that is in the way again, of an instance that came later, has its own log.
        is_complete = os.path.lexists(aside / _STORE) and os.path.lexists(root / _STORE)
        for piece in () if is_complete else pieces:
            if os.path.lexists(root / piece) and not os.path.lexists(aside / piece):
                (aside / piece).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.rename(root / piece, aside / piece)
        _run("sync", "--file-system", str(root))
        moved = _replaced(root)
        os.rename(aside, moved)
        old = old or moved
    return old


def _replaced(root: Path) -> Path:
    """Returns a name that is free."""
    wanted = root / f"replaced-{time.strftime('%Y%m%dT%H%M%S')}"
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([wanted], numbered) if not os.path.lexists(path))


def _checked(source: Path, work: Path) -> Contents:
    try:
        contents = msgspec.json.decode((work / _MANIFEST).read_bytes(), type=Contents)
    except (OSError, ValueError) as error:
        raise BackupError(f"{source} is no backup: {error}") from error
    if contents.version != _VERSION:
        raise BackupError(f"{source} is a backup of format {contents.version}, this version knows {_VERSION}: restore it with that version")
    for path, digest in contents.files.items():
        if not (work / path).exists() or _digest(work / path) != digest:
            raise BackupError(f"{source} is damaged: {path} is not what was written")
    for path, size in contents.data.items():
        found = os.lstat(work / path).st_size if os.path.lexists(work / path) else 0
        if found != size:
            raise BackupError(f"{source} is not whole: {path} has {found} of {size} bytes")
    if contents.schema > len(schema.MIGRATIONS):
        raise ConfigError(f"{source} has schema {contents.schema}, this version of Torpor knows {len(schema.MIGRATIONS)}: use a newer one")
    return contents


def _without_files(settings: Settings, work: Path) -> list[str]:
    """Sleepers of a backup's store whose files neither it nor the root has."""
    with contextlib.closing(_connect(work / _STORE)) as connection:
        found, _ = readable(connection, work / _STORE)
    asleep = [value.id for kind, _, value in found if kind == "sessions" and value.state is State.SUSPENDED and value.archived is None]
    return sorted(name for name in asleep if not (work / "sessions" / name).is_dir() and not (settings.sessions_dir / name).is_dir())


def _pieces(work: Path) -> Iterator[str]:
    """Returns what is moved as one, the store last."""
    for name in _DATA:
        if (work / name).is_dir():
            yield from sorted(str(path.relative_to(work)) for path in (work / name).iterdir())
    for path in (*_KEPT, *(path for path in _FILES if path != _STORE), _STORE):
        if (work / path).exists():
            yield path


def _lay_out(settings: Settings, work: Path, pieces: list[str]) -> None:
    control = settings.users.control
    for name in _DATA:
        (settings.root / name).mkdir(mode=0o700, exist_ok=True)
    for name, owner in (("control", control), ("tls", 0)):
        (settings.root / name).mkdir(mode=0o700 if owner else 0o755, exist_ok=True)
        os.chown(settings.root / name, owner, owner)
    for piece in pieces:
        if piece in _FILES:
            owner = control if _FILES[piece] else 0
            os.chown(work / piece, owner, owner)
    _run("sync", "--file-system", str(work))
    for piece in pieces:
        if piece == _STORE:
            _run("sync", "--file-system", str(settings.root))
        os.rename(work / piece, settings.root / piece)
    _run("sync", "--file-system", str(settings.root))
