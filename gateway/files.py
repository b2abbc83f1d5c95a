"""Files that are whole or not there: what is written outlives a power cut, under its own mode, and never through a link."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

import msgspec

from .config import ConfigError

_SECRET_BYTES = 32


def write(path: Path, data: bytes, mode: int, owner: int | None = None) -> None:
    """Replaces a file (fsync(2), rename(2), fsync of its directory). A link under its name, or under its temporary one, is replaced
    and not followed: the directory may belong to a process with fewer rights. Raises OSError, and the old file is as it was then."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if owner is not None:
                os.fchown(descriptor, owner, owner)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path) -> bytes:
    """Reads a plain file and follows no link that stands in its place: root reads here what lies in another user's directory. Raises
    OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no plain file", str(path))
        return file.read()


def secret(path: Path, meaning: str) -> bytes:
    """Returns a random key that is made once, and read by its owner only. Raises ConfigError for a file that holds no whole key: an empty
    one, used as the key of an HMAC, would let anybody sign. `meaning`: what becomes invalid with another key."""
    if not path.exists():
        write(path, secrets.token_bytes(_SECRET_BYTES), 0o600)
    key = read(path)
    if len(key) != _SECRET_BYTES:
        raise ConfigError(
            f"{path} has {len(key)} bytes, a key has {_SECRET_BYTES}: restore it from a backup, or remove it ({meaning} become invalid)"
        )
    path.chmod(0o600)
    return key


def access_keys(path: Path) -> dict[str, str]:
    """Returns secrets by access key. Raises ConfigError for a file that holds none."""
    try:
        keys = msgspec.json.decode(read(path), type=dict[str, str])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}: restore it from a backup, or remove it (new access keys are made)") from error
    if not keys or not all(key and secret for key, secret in keys.items()):
        raise ConfigError(f"{path} holds no access key: restore it from a backup, or remove it (new access keys are made)")
    return keys
