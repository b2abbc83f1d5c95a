"""How files that are made once per host come into the cache: whole, on the disk, and known by what they were made from.

A name in the cache is trusted only with a key beside it (`NAME.key`), which is written last and names what the content was made from. A
step that was ended in its middle, by a signal or a power cut, leaves no key: it is made again, and what it left is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

from . import syscalls

_NEW = ".new-"
# Names of unfinished work of earlier versions, which had no key and no lock.
_UNFINISHED = (f"{_NEW}*", "*.new", "tmp????????")


def key_of(*made_of: object) -> str:
    """Returns a digest of what something is made from: of functions the source counts, of files the content, of everything else its
    text."""
    state = hashlib.sha256()
    for part in made_of:
        if isinstance(part, FunctionType):
            data = inspect.getsource(part).encode()
        elif isinstance(part, Path):
            data = part.read_bytes() if part.exists() else b""
        else:
            data = str(part).encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def key_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.key")


def key_at(target: Path) -> str:
    """Returns the key of what is there; empty where there is none to be trusted."""
    try:
        return key_path(target).read_text(encoding="ascii") if target.exists() else ""
    except OSError:
        return ""


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """One process at a time makes what is missing in a cache. What others left unfinished is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for pattern in _UNFINISHED:
            for left in directory.glob(pattern):
                remove(left)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def alone_unless_busy(directory: Path) -> Iterator[bool]:
    """As `alone`, without a wait: whether nobody else is at it."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def remembered(memory: Path, key: str, ask: Callable[[], str]) -> str:
    """Returns what was answered under this very key, else what is answered now."""
    with contextlib.suppress(OSError, ValueError):
        known, _, answer = memory.read_text(encoding="utf-8").partition("\n")
        if known == key:
            return answer
    answer = ask()
    with contextlib.suppress(OSError):
        unfinished = memory.with_name(f"{memory.name}.{os.getpid()}")
        unfinished.write_text(f"{key}\n{answer}", encoding="utf-8")
        unfinished.rename(memory)
    return answer


def make(target: Path, key: str, work: Callable[[Path], None]) -> None:
    """Has `work` make a file or directory at the path that it is given, and puts that in the place of `target` when it is on the disk.

    Raises what `work` raises; `target` is then as it was, or without a key.
    """
    directory = Path(tempfile.mkdtemp(prefix=_NEW, dir=target.parent))
    try:
        directory.chmod(0o755)
        made = directory / target.name
        work(made)
        syscalls.sync_file_system(directory)
        key_path(target).unlink(missing_ok=True)
        remove(target)
        made.rename(target)
        (directory / "key").write_text(key, encoding="ascii")
        syscalls.sync_file_system(directory)
        (directory / "key").rename(key_path(target))
    finally:
        remove(directory)


def remove(path: Path) -> None:
    """Removes it, whatever it is. Mounts that a command left below it go first: what is mounted there is somebody else's."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for point in reversed(syscalls.mount_points()):
        if Path(point).is_relative_to(path.resolve()):
            syscalls.umount(point)
    shutil.rmtree(path)
