"""Encryption of archives: AES-256-GCM in chunks, each archive under a key of its own.

An encrypted archive begins with a line: MAGIC, and JSON that names the account, its key, and 32 random octets. The archive's key is made of
the account's key and these (HKDF, RFC 5869), so that a chunk's nonce is its number, and whether it is the last: none can be cut off,
changed, or put into another's place (STREAM: Hoang, Reyhanitabar, Rogaway, Vizár 2015). The line and the session's name are authenticated
with each chunk.

The account's key is made of the instance's (vmm/seals.py), or asked of a command, as a key management service has one.
"""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, cast

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gateway.config import Archive

from . import seals
from .errors import Damaged, Refused, Unavailable

MAGIC = b"torpor-archive-1 "
CHUNK = 64 << 10
_TAG = 16
_LINE_MOST = 1024
_COMMAND_SECONDS = 30.0
_ANSWER = re.compile(r"([A-Za-z0-9._:/-]{1,200}) ([0-9a-f]{64})")


class _Head(msgspec.Struct):
    """`key`: whose it is, `instance` or `command`, and its id there. `salt` is hexadecimal."""

    account: str
    source: str
    key: str
    salt: str


@dataclass(frozen=True)
class ArchiveKeys:
    """Where keys of accounts come from."""

    settings: Archive = field(default_factory=Archive)

    @property
    def are_wanted(self) -> bool:
        return self.settings.encryption != "off"

    def newest(self, account: str) -> tuple[str, bytes]:
        """Returns the id and the key with which an account's archives are encrypted now. Raises Unavailable."""
        if self.settings.encryption == "command":
            return self._ask(account)
        keys = seals.held()
        return keys.current, seals.derived(keys.keys[keys.current], b"torpor archives 1", account)

    def named(self, source: str, account: str, name: str) -> bytes:
        """Raises Refused for a key that is not here, Unavailable."""
        if source == "command":
            return self._ask(account, name)[1]
        key = seals.held().keys.get(name)
        if key is None:
            raise Refused(
                f"an archive is encrypted under key {name[:16]!r}, which {seals.FILE} has not: put the key file of its instance back"
            )
        return seals.derived(key, b"torpor archives 1", account)

    def _ask(self, account: str, *name: str) -> tuple[str, bytes]:
        if not self.settings.key_command:
            raise Refused("an archive is under a key of archive.key_command, which is not set")
        command = [*self.settings.key_command, account, *name]
        what = f"archive.key_command ({command[0]})"
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{what} has given no key in {_COMMAND_SECONDS:.0f} s") from error
        except OSError as error:
            raise Unavailable(f"{what}: {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise Unavailable(f"{what} ended with status {done.returncode}: {said[-1][:200] if said else 'it said nothing'}")
        found = _ANSWER.fullmatch(done.stdout.decode(errors="replace").strip())
        if not found or (name and found[1] != name[0]):
            raise Unavailable(f"{what} has not answered with an id and a key: ID, a space, 64 hexadecimal digits")
        return found[1], bytes.fromhex(found[2])


class _Chunks:
    """What a chunk is encrypted with."""

    def __init__(self, key: bytes, line: bytes, salt: str, session: str) -> None:
        self._cipher = AESGCM(HKDF(hashes.SHA256(), 32, salt=bytes.fromhex(salt), info=b"torpor archive 1").derive(key))
        self._with = line + session.encode()
        self._number = 0

    def _nonce(self, is_last: bool) -> bytes:
        self._number += 1
        return self._number.to_bytes(11, "big") + bytes([is_last])

    def sealed(self, data: bytes, is_last: bool) -> bytes:
        return self._cipher.encrypt(self._nonce(is_last), data, self._with)

    def opened(self, data: bytes, is_last: bool) -> bytes:
        """Raises InvalidTag."""
        return self._cipher.decrypt(self._nonce(is_last), data, self._with)


class _Writer(io.RawIOBase):
    def __init__(self, file: io.RawIOBase, chunks: _Chunks) -> None:
        self._file, self._chunks = file, chunks
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self._waiting += view
        while len(self._waiting) > CHUNK:  # what is left may be the last
            self._file.write(self._chunks.sealed(bytes(self._waiting[:CHUNK]), is_last=False))
            del self._waiting[:CHUNK]
        return view.nbytes

    def finish(self) -> None:
        self._file.write(self._chunks.sealed(bytes(self._waiting), is_last=True))


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], chunks: _Chunks, session: str) -> None:
        self._file, self._chunks, self._session = file, chunks, session
        self._next = file.read(CHUNK + _TAG)
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: object) -> int:
        """Raises Damaged."""
        view = memoryview(into)  # type: ignore[arg-type]
        while not self._plain and self._next:
            data, self._next = self._next, self._file.read(CHUNK + _TAG)
            try:
                self._plain = memoryview(self._chunks.opened(data, is_last=not self._next))
            except InvalidTag as error:
                raise Damaged(f"the archive of session {self._session} is not what was encrypted, or not all of it") from error
        size = min(len(view), len(self._plain))
        view[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


@contextlib.contextmanager
def writing(file: io.RawIOBase, session: str, account: str, keys: ArchiveKeys) -> Iterator[io.RawIOBase]:
    """Gives what encrypts into `file`, or `file` itself where nothing is to be encrypted. Raises Refused, Unavailable."""
    if not keys.are_wanted:
        yield file
        return
    name, key = keys.newest(account)
    head = _Head(account, keys.settings.encryption, name, secrets.token_hex(32))
    line = MAGIC + msgspec.json.encode(head) + b"\n"
    file.write(line)
    writer = _Writer(file, _Chunks(key, line, head.salt, session))
    yield writer
    writer.finish()


def reading(file: IO[bytes], session: str, keys: ArchiveKeys) -> IO[bytes]:
    """Returns what reads a whole archive's plain stream; also of one that was stored while nothing was encrypted. Raises Damaged, Refused,
    Unavailable."""
    line = file.readline(_LINE_MOST)
    if not line.startswith(MAGIC):
        file.seek(0)
        return file
    try:
        head = msgspec.json.decode(line[len(MAGIC) :], type=_Head)
        chunks = _Chunks(keys.named(head.source, head.account, head.key), line, head.salt, session)
    except ValueError as error:
        raise Damaged(f"the archive of session {session} does not say how it was encrypted: {error}") from error
    return cast(IO[bytes], _Reader(file, chunks, session))
