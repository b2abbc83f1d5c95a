"""Names below directories where root works, from whoever asked for it: each means one entry of that directory, or nothing.

What another user may have put there is opened by `opened`, which follows no link: the kernel looks the name up (openat2(2)). Files that a
process of another user has come by descriptor, never by path: root opens nothing for it.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from . import syscalls
from .errors import VmmError


class Stray(VmmError):
    """A name leads out of its directory, or to what is no plain file; a descriptor is not what its sender may read or write."""


def child(directory: Path, name: str) -> Path:
    """Raises Stray for a name that is not one component of a path."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise Stray(f"{name[:80]!r} is no name of a file in {directory}")
    return directory / name


def opened(directory: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Opens a plain file below a directory; no link on the way to it is followed, and no device or pipe is waited for. Raises Stray,
    OSError."""
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = syscalls.open_beneath(top, name, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(top)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Stray(f"{name} in {directory} is no plain file")
    return descriptor


def given(descriptors: Sequence[int], count: int, mode: int) -> None:
    """Checks descriptors that came with a call: so many, of plain files, which their sender has opened for `mode` (O_RDONLY or O_WRONLY)
    itself. One that only names a file (O_PATH) is none. Raises Stray."""
    if len(descriptors) != count:
        raise Stray(f"{len(descriptors)} descriptors came, where {count} are taken")
    for descriptor in descriptors:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE not in (mode, os.O_RDWR):
            raise Stray("a descriptor came that its sender has not opened for this")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Stray("a descriptor came that is of no plain file")
