"""Who may ask the embedded object store: every user's key, for his account's buckets; and control itself, as each account.

The store knows no secret. It asks control for a key that signs for S3 alone, on one day.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

from gateway import messages as m
from gateway.accounts.directory import Credentials, Directory

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
            return m.StoreKey(account, signing_key(self._secret(asked.key), asked.day, asked.region, "s3"))
        directory = self._directory
        secret = directory.secret(asked.key, asked.token)
        if not secret or directory.is_expired(asked.token):
            return None
        account = directory.caller(asked.key, asked.token).account
        return m.StoreKey(account, signing_key(secret, asked.day, asked.region, "s3"))
