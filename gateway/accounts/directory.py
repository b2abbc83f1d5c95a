"""The directory: accounts, their keys and roles; who signed a request; credentials for what runs inside microVMs.

Session tokens are sealed statements of ours, so that nothing is stored for them: key, role, account, end.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.sessions.store import Store

from . import policy
from .model import ALL, CONDITION_KEYS, AccessKey, Account, Caller, Role

SESSION_SECONDS = 3300  # reference, 6: 55 minutes
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PARSED_ALL = policy.parse(ALL)


class DirectoryError(Exception):
    """An account, key or role is not there, is in use, or is not well-formed; the text says which."""


@dataclass(frozen=True)
class Credentials:
    """Temporary credentials; `expires_at` in seconds since the epoch."""

    access_key: str
    secret: str
    token: str
    expires_at: float


class _Sealed(msgspec.Struct, array_like=True):
    key: str
    account: str
    role: str
    name: str
    expires_at: float
    issued_at: float = 0.0  # 0: an older version did not say
    policy: str = ""  # the session's own


def _decoded(text: str) -> Any:
    """Raises PolicyError."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise policy.PolicyError(f"the policy is not JSON: {error}") from error


@functools.lru_cache(256)
def _session_policy(text: str) -> policy.Policy:
    return policy.parse(_decoded(text))


def role_account(arn: str) -> str:
    return arn.split(":")[4]


class Directory:
    """`root_keys` are the instance's own: they may do everything in `home`, the instance's first account."""

    def __init__(
        self, store: Store, home: str, root_keys: dict[str, str], seal: bytes, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._store = store
        self._home = home
        self._root_keys = root_keys
        self._seal = seal
        self._clock = clock
        self._parsed: dict[str, tuple[object, policy.Policy]] = {}
        self.remains: Callable[[str], bool] = lambda account: False  # whether something is kept of an account that is no more

    # ---- who signs ----

    def secret(self, access_key: str, token: str) -> str | None:
        """Returns the secret that a request with this key is signed with; None where there is no such key."""
        if access_key in self._root_keys:
            return self._root_keys[access_key]
        if token:
            sealed = self._open(token)
            return self._secret_of(access_key) if sealed is not None and sealed.key == access_key else None
        key = self._store.keys.get(access_key)
        return key.secret if key is not None else None

    def is_expired(self, token: str) -> bool:
        sealed = self._open(token) if token else None
        return sealed is not None and sealed.expires_at <= self._clock()

    def caller(self, access_key: str, token: str, **request: Any) -> Caller:
        """Returns the principal of a key whose signature was right."""
        if access_key in self._root_keys:
            return Caller(self._home, f"arn:aws:iam::{self._home}:root", "Root", access_key, _PARSED_ALL, **request)
        if token and (sealed := self._open(token)) is not None:
            role = self._store.roles.get(sealed.role)
            arn = f"arn:aws:sts::{sealed.account}:assumed-role/{sealed.role.rpartition('/')[2]}/{sealed.name}"
            allowed = self._policy(sealed.role, role.policy if role is not None else None)
            if sealed.policy:
                allowed = policy.Policy(allowed.statements, within=_session_policy(sealed.policy))
            return Caller(sealed.account, arn, "AssumedRole", access_key, allowed, issued_at=sealed.issued_at, role=sealed.role, **request)
        key = self._store.keys[access_key]
        arn = f"arn:aws:iam::{key.account}:user/{key.user}"
        return Caller(key.account, arn, "IAMUser", access_key, self._policy(key.id, key.policy), **request)

    def _policy(self, name: str, document: dict[str, Any] | None) -> policy.Policy:
        known = self._parsed.get(name)
        if known is None or known[0] is not document:
            known = self._parsed[name] = (document, policy.parse(document) if document is not None else policy.Policy())
        return known[1]

    # ---- temporary credentials ----

    def issue(self, role: str, name: str, seconds: float = SESSION_SECONDS, session_policy: str = "") -> Credentials:
        """Credentials of a role for one microVM (STS AssumeRole's form). Raises PolicyError for a session's policy that is none."""
        if session_policy:
            policy.check(_decoded(session_policy), CONDITION_KEYS)
        key = "ASIA" + "".join(secrets.choice(_LETTERS) for _ in range(16))
        expires = self._clock() + seconds
        text = msgspec.msgpack.encode(_Sealed(key, role_account(role), role, name, expires, self._clock(), session_policy))
        token = base64.b64encode(self._tag(b"token", text) + text).decode()
        return Credentials(key, self._secret_of(key), token, expires)

    def _tag(self, purpose: bytes, text: bytes) -> bytes:
        return hmac.new(self._seal, purpose + b"\0" + text, hashlib.sha256).digest()

    def _secret_of(self, key: str) -> str:
        return base64.b64encode(self._tag(b"secret", key.encode())).decode()[:40]

    def _open(self, token: str) -> _Sealed | None:
        try:
            data = base64.b64decode(token, validate=True)
            if not hmac.compare_digest(data[:32], self._tag(b"token", data[32:])):
                return None
            return msgspec.msgpack.decode(data[32:], type=_Sealed)
        except (ValueError, binascii.Error, msgspec.DecodeError):
            return None

    # ---- administration ----

    @property
    def accounts(self) -> list[Account]:
        home = Account(self._home, "home", 0.0)
        return [home, *self._store.accounts.values()]

    def has(self, account: str) -> bool:
        return account == self._home or account in self._store.accounts

    async def create_account(self, name: str, identifier: str = "") -> Account:
        """Raises DirectoryError, StoreError."""
        identifier = identifier or "".join(secrets.choice("0123456789") for _ in range(12))
        if not (len(identifier) == 12 and identifier.isascii() and identifier.isdigit()):
            raise DirectoryError(f"an account's number has 12 digits: {identifier}")
        if self.has(identifier):
            raise DirectoryError(f"account {identifier} exists already")
        if self.remains(identifier):  # which whoever gets the number would read
            raise DirectoryError(f"account {identifier} was here before, and its logs are kept: choose another number")
        account = Account(identifier, name, self._clock())
        self._store.put("accounts", identifier, account)
        await self._store.commit()
        return account

    async def delete_account(self, identifier: str) -> None:
        """Raises DirectoryError while the account still has something, StoreError."""
        store = self._store
        if identifier not in store.accounts:
            raise DirectoryError(f"account {identifier} does not exist" if identifier != self._home else "the first account stays")
        live = any(s.account == identifier and not s.state.is_ended for s in store.sessions.values())
        if live or any(image.account == identifier for image in store.images.values()):
            raise DirectoryError(f"account {identifier} still has microVMs or images: delete them first")
        if any(connector.account == identifier for connector in store.connectors.values()):
            raise DirectoryError(f"account {identifier} still has network connectors: delete them first")
        for key in [key for key in store.keys.values() if key.account == identifier]:
            store.drop("keys", key.id)
        for arn in [arn for arn in store.roles if role_account(arn) == identifier]:
            store.drop("roles", arn)
        store.drop("accounts", identifier)
        await store.commit()

    async def create_key(self, account: str, user: str, document: dict[str, Any] | None) -> AccessKey:
        """Raises DirectoryError, PolicyError, StoreError."""
        if not self.has(account):
            raise DirectoryError(f"account {account} does not exist")
        if document is not None:
            policy.check(document, CONDITION_KEYS)
        identifier = "AKIA" + "".join(secrets.choice(_LETTERS) for _ in range(16))
        key = AccessKey(identifier, secrets.token_urlsafe(30), account, user, self._clock(), document)
        self._store.put("keys", identifier, key)
        await self._store.commit()
        return key

    async def delete_key(self, identifier: str) -> None:
        if identifier not in self._store.keys:
            raise DirectoryError(f"access key {identifier} does not exist")
        self._store.drop("keys", identifier)
        await self._store.commit()

    async def put_role(self, arn: str, document: dict[str, Any]) -> None:
        """Raises DirectoryError, PolicyError, StoreError."""
        parts = arn.split(":", 5)
        if len(parts) != 6 or parts[2] != "iam" or not parts[5].startswith("role/") or not self.has(parts[4]):
            raise DirectoryError(f"{arn} is not of the form arn:aws:iam::<account>:role/<name>, or its account does not exist")
        policy.check(document, CONDITION_KEYS)
        self._store.put("roles", arn, Role(arn, document))
        await self._store.commit()

    async def delete_role(self, arn: str) -> None:
        if arn not in self._store.roles:
            raise DirectoryError(f"role {arn} has no policy here")
        self._store.drop("roles", arn)
        await self._store.commit()
