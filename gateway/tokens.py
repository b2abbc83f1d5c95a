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
from jwt.types import Options

from . import files
from .messages import KeySet, Revoked, Verifier

PROXY, SHELL = "proxy", "shell"
LONGEST_SECONDS = 3600
ROTATE_SECONDS = 30 * 86_400
_SWITCH_SECONDS = 600  # within which a key that was replaced still signs
_ALGORITHM, _ENCRYPTION = "dir", "A256GCM"
TOKEN_MAX_BYTES = 8000
_KEY_BYTES = 32
_REMEMBERED = 4096  # tokens
_JWT_OPTIONS: Options = {"verify_exp": False, "verify_iat": False, "require": ["sub", "exp"]}  # times are looked at each time
ALL_PORTS = [(1, 65535)]


class TokenError(Exception):
    """The token is not acceptable."""


class TokenTooLong(TokenError):
    """It would have more bytes than an edge takes."""


class MalformedToken(TokenError):
    """It is not a token at all."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a verified token allows. `ports` are merged ranges in order; `expires` and `issued` are in seconds since the epoch, `issued` 0
    where an older version minted it. `number` is that of the newest revocation of then."""

    session: str
    ports: tuple[tuple[int, int], ...]
    expires: float
    kind: str
    kid: str
    issued: float = 0.0
    number: int = 0

    def allows(self, port: int) -> bool:
        at = bisect_right(self.ports, (port, 65536)) - 1
        return at >= 0 and self.ports[at][0] <= port <= self.ports[at][1]


class _Key(msgspec.Struct):
    kid: str
    created: float
    encryption_key: bytes
    private_key: bytes


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


class _Stored(msgspec.Struct):
    """The file, where it says more than keys. `signing`: whose tokens every worker can verify; the newest key may not be there yet."""

    keys: list[_Key]
    signing: str
    revoked: Revoked


def _whole(stored: _Stored) -> _Stored:
    """Raises ValueError for a key that is cut short, with which anybody could read and make tokens, and where the one that signs is not
    there. None signs yet where the first start was cut off."""
    for key in stored.keys:
        if (len(key.encryption_key), len(key.private_key)) != (_KEY_BYTES, _KEY_BYTES):
            raise ValueError(f"key {key.kid} has {len(key.encryption_key)} and {len(key.private_key)} bytes, not {_KEY_BYTES} each")
    if stored.signing and stored.signing not in {key.kid for key in stored.keys}:
        raise ValueError(f"key {stored.signing}, which is to sign, is not among its {len(stored.keys)} keys")
    return stored


class Minter:
    """Control's keys, in a file that only control can read. One signs; older ones stay valid for the longest token's life after they were
    replaced. A new one is made first, and signs when every worker has it. What is revoked is kept for as long as it could be shown."""

    def __init__(self, path: Path, clock: object = time.time) -> None:
        """Raises ValueError for keys that are none."""
        self._path = path
        self._clock = clock
        self._keys: list[_Key] = []
        self._signing = ""
        self.revoked = Revoked()
        if path.exists():
            found = msgspec.json.decode(files.read(path), type=list[_Key] | _Stored)
            stored = _whole(found if isinstance(found, _Stored) else _Stored(found, found[-1].kid if found else "", Revoked()))
            self._keys, self._signing, self.revoked = stored.keys, stored.signing, stored.revoked
            path.chmod(0o600)
        if not self._keys:
            self.rotate()
        elif not self._signing:
            self.use_newest()

    def _now(self) -> float:
        return float(self._clock())  # type: ignore[operator]

    def make_key_if_due(self) -> bool:
        """Makes a key when the newest is old. True when there is one that does not sign yet: workers must be told before it does."""
        if self._keys[-1].kid == self._signing and self._now() - self._keys[-1].created >= ROTATE_SECONDS:
            self.make_key()
        return self._keys[-1].kid != self._signing

    def make_key(self) -> None:
        """One that cannot be stored is not used: raises OSError."""
        now = self._now()
        replaced = [*(newer.created for newer in self._keys[1:]), now][: len(self._keys)]
        kept = LONGEST_SECONDS + _SWITCH_SECONDS
        keys = [key for key, at in zip(self._keys, replaced, strict=True) if now - at < kept or key.kid == self._signing]
        keys.append(_Key(str(uuid.uuid4()), now, secrets.token_bytes(32), Ed25519PrivateKey.generate().private_bytes_raw()))
        self._store(keys, self._signing, self.revoked)

    def use_newest(self) -> None:
        """From now on the newest key signs. Raises OSError."""
        self._store(self._keys, self._keys[-1].kid, self.revoked)

    def rotate(self) -> None:
        """Both, where nobody need be told. Raises OSError."""
        self.make_key()
        self.use_newest()

    def revoke(self, before: float, session: str = "") -> float:
        """What was minted before a moment is none: of a session, or all. 0: before now, whatever the clock said when it was minted. Returns
        the moment. Raises OSError, ValueError for one that is yet to come."""
        now, was = self._now(), self.revoked
        if before > now:
            raise ValueError("that moment is yet to come: tokens that are not minted yet cannot be revoked")
        at, number = before or now, was.number + (not before)
        known = {name: when for name, when in was.sessions.items() if now - when < LONGEST_SECONDS}
        numbers = {name: one for name, one in was.numbers.items() if name in known}
        # Those of the others have expired, but by a clock that may be set back.
        gone = max((when for name, when in was.sessions.items() if name not in known), default=0.0)
        gone_number = max((one for name, one in was.numbers.items() if name not in known), default=0)
        everybody, below = max(gone, was.before), max(gone_number, was.below)
        if session:
            known[session] = max(at, known.get(session, 0.0))
            if not before:
                numbers[session] = number
        else:
            everybody, below = max(at, everybody), below if before else number
        self._store(self._keys, self._signing, Revoked(everybody, known, number, below, numbers))
        return at

    def _store(self, keys: list[_Key], signing: str, revoked: Revoked) -> None:
        is_plain = bool(keys) and keys[-1].kid == signing and revoked == Revoked()
        files.write(self._path, msgspec.json.encode(keys if is_plain else _Stored(keys, signing, revoked)), 0o600)
        self._keys, self._signing, self.revoked = keys, signing, revoked

    def verifiers(self) -> list[Verifier]:
        """What edges need, without anything that signs."""
        return [Verifier(key.kid, key.encryption_key, _signer(key.private_key).public_key().public_bytes_raw()) for key in self._keys]

    def key_set(self) -> KeySet:
        return KeySet(self.verifiers(), self.revoked)

    def mint(self, session: str, ports: list[tuple[int, int]], seconds: int, kind: str = PROXY) -> str:
        """Raises TokenTooLong for more ranges of ports than a token has room for."""
        key = next(key for key in self._keys if key.kid == self._signing)
        ranges, now = merge(ports), self._now()
        issued = max(now, self.revoked.moment(session))  # also where the clock was set back since
        claims = {"sub": session, "ports": ranges, "exp": int(now) + seconds, "iat": issued, "kind": kind, "jti": secrets.token_hex(8)}
        claims["rev"] = self.revoked.number
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

    def __init__(self, keys: list[Verifier], revoked: Revoked | None = None) -> None:
        self._revoked = revoked or Revoked()
        self._keys = {key.kid: (AESGCM(key.encryption_key), Ed25519PublicKey.from_public_bytes(key.public_key)) for key in keys}
        self._seen = lru_cache(_REMEMBERED)(self._open)

    def verify(self, token: str, now: float) -> Grant:
        """Raises MalformedToken for what is no token, TokenError for one that is not ours or has expired."""
        grant = self._seen(token)
        if grant.expires <= now:
            raise TokenError("expired")
        revoked = self._revoked
        if grant.issued < revoked.before or grant.number < revoked.below:
            raise TokenError("revoked")
        if revoked.sessions and (
            grant.issued < revoked.sessions.get(grant.session, 0.0) or grant.number < revoked.numbers.get(grant.session, 0)
        ):
            raise TokenError("revoked")
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
            claims = jwt.decode(inner, key[1], algorithms=["EdDSA"], options=_JWT_OPTIONS)
        except jwt.PyJWTError as error:
            raise TokenError("not signed with our key") from error
        ports = tuple((first, last) for first, last in claims["ports"])
        issued, number = float(claims.get("iat", 0.0)), int(claims.get("rev", 0))
        return Grant(claims["sub"], ports, float(claims["exp"]), claims["kind"], kid, issued, number)


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
