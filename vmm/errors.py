"""What can go wrong on the host, by kind. The class's name is the error's kind on the wire (gateway/rpc.py).

Only Damaged, Missing and Ended say that something is wrong with a session. Whatever is not understood is Unavailable: it says nothing about
what was saved, and the call may be made again.
"""

from __future__ import annotations

import errno
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LINKS = (errno.ELOOP, errno.EXDEV)  # openat2(2), told to follow none
# What an operator can do about a resource that there is no more of; strerror(3) names none.
_SCARCE = {
    errno.EMFILE: "this process has all the descriptors that it may have: LimitNOFILE",
    errno.ENFILE: "the host has all the open files that it may have: fs.file-max",
    errno.EAGAIN: "no more processes may be started: kernel.pid_max, kernel.threads-max, TasksMax",
    errno.ENOMEM: "the host has no memory left",
}


class VmmError(Exception):
    """Something on the host failed; the text says what, where and what to do."""


class Unavailable(VmmError):
    """A resource, a deadline, an error number, a peer that is away: what was saved is as it was, and the call may be made again."""


class DiskFull(Unavailable):
    """A file could not be written for want of room."""


class NeverRan(Unavailable):
    """The hypervisor that was prepared for an incarnation is gone before its guest was told to run: what was saved before is good."""


class Refused(VmmError):
    """The hypervisor of this host cannot load what another one, or another version, wrote; the text says what could."""


class Damaged(VmmError):
    """A file is not what was written: its checksum differs, or it cannot be parsed."""


class Missing(VmmError):
    """A file that should be there is not."""


class Ended(VmmError):
    """The hypervisor of a running microVM is gone."""


def explained(error: BaseException, text: str) -> VmmError:
    """Returns `text` as an error of the kind that `error` is: DiskFull where there was no room, and Unavailable where it is no VmmError."""
    if isinstance(error, VmmError):
        return type(error)(text)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return DiskFull(text)
    scarce = _SCARCE.get(error.errno or 0) if isinstance(error, OSError) else None
    return Unavailable(f"{text} ({scarce})" if scarce else text)


def not_written(error: BaseException, what: str, otherwise: str) -> VmmError:
    """Returns DiskFull where there was no room for `what`, else `otherwise` with the error's own words, in the error's kind."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return DiskFull(f"no room for {what}: free some, or move --root")
    return explained(error, f"{otherwise}: {error}")


def of_the_host(error: OSError) -> Exception:
    """Returns an error number that nobody on its way has understood as an error with a kind, which says what there is no more of, at
    which file, and what to do."""
    if error.errno is None:
        return error
    text = f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror)
    return explained(error, f"{text}: free some, or move --root" if error.errno in _NO_ROOM else text)


def unreadable(error: OSError, path: Path) -> VmmError:
    """Returns why a file of a session or an image cannot be read: it is Missing only where its name is not there, and Damaged where
    somebody has put a link in its place."""
    if error.errno in _LINKS:
        return Damaged(f"{path} is a link, and none of ours is")
    if isinstance(error, FileNotFoundError):
        return Missing(f"{path} is not there")
    return Unavailable(f"{path} cannot be read: {error}")


def state_refused(image: str, path: Path, why: str) -> Refused:
    """Returns why an image's own device state was not taken, by the version that wrote it: damage, most likely, and nobody but the
    hypervisor can say so, for an image's state has no checksum."""
    return Refused(
        f"image {image} cannot be launched: {path} is not what was written, or cannot be loaded on this host ({why}): "
        "put that file back from a backup, or build a new version of the image"
    )


def not_loaded(error: BaseException, text: str, *needed: Path) -> VmmError:
    """Returns why a load failed: one of the files that it needed is Missing, or `text` in the error's kind. A name that was not found may
    also be one of /proc, of a process that has ended."""
    if isinstance(error, FileNotFoundError):
        for path in needed:
            if not path.exists():
                return Missing(f"{text}: {path} is not there")
    return explained(error, text)
