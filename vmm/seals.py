"""Seals over the manifests of images and snapshots: HMAC-SHA-256, under a key for each account.

A manifest names its files with sizes and checksums, and whose it is: the account, the image or session, and the incarnation that wrote it.
Who can write to the data directory and has not the instance's keys can so neither change one, nor put another's or an older one in its
place. The accounts' keys are made of the instance's (HKDF, RFC 5869). That one lies in ROOT/manifests.key, which root alone reads; it is
loaded once, by the processes that write or compare manifests (`use`). Without it nothing is sealed and nothing opened.

Checksums of files are GMAC (NIST SP 800-38D), each with a nonce of its own: as fast as a plain checksum, and none that somebody without the
key could find other bytes for.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import secrets
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gateway import files
from gateway.config import ConfigError

from . import beneath
from .beneath import Stray
from .errors import Damaged, Refused, Unavailable, unreadable

FILE = "manifests.key"
IMAGE, SNAPSHOT = "image", "snapshot"
_RESTORE = "restore it from a backup, without it no image and no sleeper is loaded"
_LABEL = b"torpor manifest 1"
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Keys(msgspec.Struct):
    """The file of keys. `keys`: by their ids; new seals are made with `current`. `archives`: SHA-256 of archives that are older than seals,
    by the sessions that they are of: those alone are unpacked without one, and get it then."""

    current: str
    keys: dict[str, _Key]
    archives: dict[str, str] = {}


class _Sealed(msgspec.Struct):
    """A manifest's file: `key` is the id of the instance's key, `manifest` is sealed as it lies there."""

    key: str
    account: str
    mac: str
    manifest: msgspec.Raw


class _Held:
    """This process's."""

    keys: Keys | None = None


_held = _Held()


def new() -> Keys:
    name = secrets.token_hex(4)
    return Keys(name, {name: secrets.token_hex(32)})


def read(path: Path) -> Keys:
    """Raises ConfigError for a file that holds no key, OSError."""
    try:
        keys = msgspec.json.decode(files.read(path), type=Keys)
    except ValueError as error:
        raise ConfigError(f"{path} holds no keys: {error}: {_RESTORE}") from error
    if keys.current not in keys.keys:
        raise ConfigError(f"{path} has no key {keys.current}: {_RESTORE}")
    return keys


def write(path: Path, keys: Keys) -> None:
    """Durable when it returns. Raises OSError."""
    files.write(path, msgspec.json.encode(keys), 0o600)


def use(keys: Keys | None) -> None:
    """Makes `keys` this process's."""
    _held.keys = keys


def held() -> Keys:
    """Raises Unavailable in a process that has none."""
    if _held.keys is None:
        raise Unavailable("this process has no keys of manifests")
    return _held.keys


def load(root: Path) -> None:
    """Makes the keys of the instance at `root` this process's, where it has none yet. Raises ConfigError, OSError."""
    if _held.keys is None and (root / FILE).exists():
        use(read(root / FILE))


@functools.lru_cache(4096)
def derived(key: str, purpose: bytes, account: str) -> bytes:
    """Returns a key of an account (HKDF-SHA-256, RFC 5869)."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"%s\0%s" % (purpose, account.encode())).derive(bytes.fromhex(key))


def _mac(key: str, kind: str, account: str, manifest: bytes) -> str:
    return hmac.digest(derived(key, b"%s %s" % (_LABEL, kind.encode()), account), manifest, hashlib.sha256).hex()


def seal(kind: str, account: str, manifest: bytes) -> bytes:
    """Returns what a manifest's file has. Raises Unavailable."""
    keys = held()
    mac = _mac(keys.keys[keys.current], kind, account, manifest)
    return msgspec.json.encode(_Sealed(keys.current, account, mac, msgspec.Raw(manifest)))


def opened(kind: str, path: Path) -> tuple[str, bytes]:
    """Returns the account and the manifest, as it was sealed. Raises Damaged for what was not sealed by this instance, Refused for what was
    under a key that is not here, Missing, Unavailable."""
    keys = held()
    try:
        sealed = msgspec.json.decode(content(path), type=_Sealed)
    except ValueError as error:
        raise Damaged(f"{path} is no sealed manifest: {error}") from error
    key = keys.keys.get(sealed.key)
    if key is None:
        raise Refused(f"{path} was sealed under key {sealed.key[:16]!r}, which {FILE} has not: put the key file of its instance back")
    if not hmac.compare_digest(_mac(key, kind, sealed.account, bytes(sealed.manifest)).encode(), sealed.mac.encode()):
        raise Damaged(f"{path} is not what this instance has written: its seal is of something else")
    return sealed.account, bytes(sealed.manifest)


def is_sealed(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=_Sealed)
    except ValueError:
        return False
    return True


def content(path: Path) -> bytes:
    """Returns what a manifest's file has; a link in its place is not followed. Raises Damaged, Missing, Unavailable."""
    try:
        descriptor = beneath.opened(path.parent, path.name)
        with open(descriptor, "rb", buffering=0) as file:
            return file.read()
    except Stray as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise unreadable(error, path) from error


class Checksum:
    """A file's, as its bytes pass. `again`: the one that the file had, to be compared. Raises Unavailable; Refused for a checksum under
    a key that is not here, Damaged for what is none."""

    def __init__(self, again: str = "") -> None:
        keys = held()
        if again and not _CHECKSUM.fullmatch(again):
            raise Damaged(f"{again[:80]!r} is no checksum of this version")
        self._key, nonce = (again[:8], bytes.fromhex(again[8:32])) if again else (keys.current, secrets.token_bytes(12))
        if self._key not in keys.keys:
            raise Refused(f"a file was written under key {self._key}, which {FILE} has not: put the key file of its instance back")
        self._nonce = nonce
        self._state = Cipher(algorithms.AES(derived(keys.keys[self._key], b"torpor files 1", "")), modes.GCM(nonce)).encryptor()

    def update(self, data: bytes | memoryview) -> None:
        self._state.authenticate_additional_data(data)

    def digest(self) -> str:
        """Returns it, once: the key's id, the nonce and the tag."""
        self._state.finalize()
        return f"{self._key}{self._nonce.hex()}{self._state.tag.hex()}"
