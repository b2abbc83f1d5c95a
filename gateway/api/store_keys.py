"""Who may ask the embedded object store: users for what their policies allow in their account's buckets; and control itself, which reads as
each account.

The store knows no secret. It asks control for a key that signs for S3 alone, on one day.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time

from gateway import messages as m
from gateway.accounts.directory import Credentials, Directory
from gateway.accounts.policy import Decision

from .sigv4 import signing_key

_OWN = "TORPOR"


class StoreKeys:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._seal = secrets.token_bytes(32)  # whoever asks with such a key is this process

    def own(self, account: str) -> Credentials:
        """Returns credentials that may read what the account may, and are none at the API."""
        key = f"{_OWN}{account}"
        return Credentials(key, self._secret(key), "", math.inf)

    def _secret(self, key: str) -> str:
        return hmac.new(self._seal, key.encode(), hashlib.sha256).hexdigest()

    def find(self, asked: m.StoreKeyRequest) -> m.StoreKey | None:
        account = asked.key.removeprefix(_OWN)
        if account != asked.key:
            signing = signing_key(self._secret(asked.key), asked.day, asked.region, "s3")
            return m.StoreKey(account, signing, asked.action in ("s3:GetObject", "s3:GetObjectVersion"))
        directory = self._directory
        secret = directory.secret(asked.key, asked.token)
        if not secret or directory.is_expired(asked.token):
            return None
        caller = directory.caller(asked.key, asked.token, region=asked.region, at=time.time())
        is_allowed = caller.policy.decide(asked.action, asked.resource, caller.context()) is Decision.ALLOW
        return m.StoreKey(caller.account, signing_key(secret, asked.day, asked.region, "s3"), is_allowed)
