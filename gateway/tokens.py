"""Access tokens: outside a compact JWE (dir, A256GCM), so that claims are unreadable; inside a JWT signed with EdDSA.

Sources: RFC 7516 (JWE), RFC 7518 section 4.5 and 5.3, RFC 7519 (JWT), RFC 8037 (EdDSA). Algorithms are fixed here and
never read from a token. Control mints; an edge holds the JWE key and the public key and can only verify.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
import uuid
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jwt
import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import files
from .messages import Verifier

PROXY, SHELL = "proxy", "shell"
LONGEST_SECONDS = 3600
ROTATE_SECONDS = 30 * 86_400
_ALGORITHM, _ENCRYPTION = "dir", "A256GCM"
TOKEN_MAX_BYTES = 8000
_KEY_BYTES = 32
_REMEMBERED = 4096  # tokens
ALL_PORTS = [(1, 65535)]


class TokenError(Exception):
    """The token is not acceptable."""


class TokenTooLong(TokenError):
    """It would have more bytes than an edge takes."""


class MalformedToken(TokenError):
    """It is not a token at all."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a verified token allows. `ports` are merged ranges in order; `expires` is in seconds since the epoch."""

    session: str
    ports: tuple[tuple[int, int], ...]
    expires: float
    kind: str
    kid: str

    def allows(self, port: int) -> bool:
        at = bisect_right(self.ports, (port, 65536)) - 1
        return at >= 0 and self.ports[at][0] <= port <= self.ports[at][1]


class _Key(msgspec.Struct):
    kid: str
    created: float
    encryption_key: bytes
    private_key: bytes


def _whole(keys: list[_Key]) -> list[_Key]:
    """Raises ValueError for a key that is cut short: with an empty one anybody could read and make tokens."""
    for key in keys:
        if (len(key.encryption_key), len(key.private_key)) != (_KEY_BYTES, _KEY_BYTES):
            raise ValueError(f"key {key.kid} has {len(key.encryption_key)} and {len(key.private_key)} bytes, not {_KEY_BYTES} each")
    return keys


_signer = lru_cache(8)(Ed25519PrivateKey.from_private_bytes)  # a tenth of a token's making


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges without overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


class Minter:
    """Control's keys, in a file that only control can read. The newest signs; older ones stay valid for the longest
    token's life after they were replaced."""

    def __init__(self, path: Path, clock: object = time.time) -> None:
        """Raises ValueError for keys that are none."""
        self._path = path
        self._clock = clock
        self._keys: list[_Key] = []
        if path.exists():
            self._keys = _whole(msgspec.json.decode(files.read(path), type=list[_Key]))
            path.chmod(0o600)
        self.rotate_if_due()

    def _now(self) -> float:
        return float(self._clock())  # type: ignore[operator]

    def rotate_if_due(self) -> bool:
        """Makes a new key when the newest is old. True when edges must be told."""
        if self._keys and self._now() - self._keys[-1].created < ROTATE_SECONDS:
            return False
        self.rotate()
        return True

    def rotate(self) -> None:
        """Makes a new key. One that cannot be stored is not used: raises OSError."""
        now = self._now()
        replaced = [*(newer.created for newer in self._keys[1:]), now][: len(self._keys)]
        keys = [key for key, at in zip(self._keys, replaced, strict=True) if now - at < LONGEST_SECONDS]
        keys.append(_Key(str(uuid.uuid4()), now, secrets.token_bytes(32), Ed25519PrivateKey.generate().private_bytes_raw()))
        files.write(self._path, msgspec.json.encode(keys), 0o600)
        self._keys = keys

    def verifiers(self) -> list[Verifier]:
        """What edges need, without anything that signs."""
        return [Verifier(key.kid, key.encryption_key, _signer(key.private_key).public_key().public_bytes_raw()) for key in self._keys]

    def mint(self, session: str, ports: list[tuple[int, int]], seconds: int, kind: str = PROXY) -> str:
        """Raises TokenTooLong for more ranges of ports than a token has room for."""
        key = self._keys[-1]
        ranges = merge(ports)
        claims = {"sub": session, "ports": ranges, "exp": int(self._now()) + seconds, "kind": kind, "jti": secrets.token_hex(8)}
        inner = jwt.encode(claims, _signer(key.private_key), algorithm="EdDSA")
        header = _b64(json.dumps({"kid": key.kid, "alg": _ALGORITHM, "enc": _ENCRYPTION}, separators=(",", ":")).encode())
        vector = secrets.token_bytes(12)
        sealed = AESGCM(key.encryption_key).encrypt(vector, inner.encode(), header.encode())
        token = f"{header}..{_b64(vector)}.{_b64(sealed[:-16])}.{_b64(sealed[-16:])}"
        if len(token) > TOKEN_MAX_BYTES:
            raise TokenTooLong(f"{len(ranges)} separate ranges of ports make a token of {len(token)} bytes")
        return token


class Checker:
    """Verifies tokens with the keys that control sent. What a token grants is remembered: a request that is held is decided anew after
    each wait, and clients send the same token with other fields."""

    def __init__(self, keys: list[Verifier]) -> None:
        self._keys = {key.kid: (AESGCM(key.encryption_key), Ed25519PublicKey.from_public_bytes(key.public_key)) for key in keys}
        self._seen = lru_cache(_REMEMBERED)(self._open)

    def verify(self, token: str, now: float) -> Grant:
        """Raises MalformedToken for what is no token, TokenError for one that is not ours or has expired."""
        grant = self._seen(token)
        if grant.expires <= now:
            raise TokenError("expired")
        return grant

    def _open(self, token: str) -> Grant:
        kid, vector, sealed, header = _open_envelope(token)
        key = self._keys.get(kid)
        if key is None:
            raise TokenError("unknown key")
        try:
            inner = key[0].decrypt(vector, sealed, header)
        except InvalidTag as error:
            raise TokenError("not encrypted with our key") from error
        try:
            claims = jwt.decode(inner, key[1], algorithms=["EdDSA"], options={"verify_exp": False, "require": ["sub", "exp"]})
        except jwt.PyJWTError as error:
            raise TokenError("not signed with our key") from error
        ports = tuple((first, last) for first, last in claims["ports"])
        return Grant(claims["sub"], ports, float(claims["exp"]), claims["kind"], kid)


def _open_envelope(token: str) -> tuple[str, bytes, bytes, bytes]:
    """Key id, vector, ciphertext with tag, and the header as additional data (RFC 7516, section 5.2)."""
    parts = token.split(".")
    if len(parts) != 5 or parts[1] or len(token) > TOKEN_MAX_BYTES:
        raise MalformedToken("not a compact JWE with direct encryption")
    try:
        header = msgspec.json.decode(_unb64(parts[0]), type=dict[str, str])
        vector, text, tag = (_unb64(part) for part in parts[2:])
    except (ValueError, binascii.Error, msgspec.DecodeError) as error:
        raise MalformedToken("not base64url") from error
    if len(vector) != 12 or len(tag) != 16:
        raise MalformedToken("wrong lengths")
    return header.get("kid", ""), vector, text + tag, parts[0].encode("ascii")
