"""What the host's root asks of control about accounts: the calls behind `torpor account`, `key`, `role` and `quota`."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from gateway import messages as m
from gateway.config import Settings
from gateway.rpc import Connection
from gateway.sessions.store import Store

from . import quotas
from .directory import Directory, DirectoryError


class Admin:
    """Raises DirectoryError, PolicyError, StoreError. Only root may call: edges share the socket."""

    def __init__(self, settings: Settings, directory: Directory, store: Store) -> None:
        self._settings = settings
        self._directory = directory
        self._store = store

    def _check(self, connection: Connection) -> None:
        if connection.uid != 0:
            raise DirectoryError("only root may administer accounts")

    async def rpc_accounts(self, connection: Connection, body: None) -> list[m.AccountFacts]:
        self._check(connection)
        return [m.AccountFacts(account.id, account.name, account.created_at) for account in self._directory.accounts]

    async def rpc_account_create(self, connection: Connection, body: m.AccountName) -> m.AccountFacts:
        self._check(connection)
        made = await self._directory.create_account(body.name, body.account)
        return m.AccountFacts(made.id, made.name, made.created_at)

    async def rpc_account_delete(self, connection: Connection, body: m.AccountName) -> None:
        self._check(connection)
        await self._directory.delete_account(body.account)

    async def rpc_keys(self, connection: Connection, body: None) -> list[m.KeyFacts]:
        self._check(connection)
        keys = self._store.keys.values()
        return [m.KeyFacts(key.id, "", key.account, key.user, _text(key.policy), key.created_at) for key in keys]

    async def rpc_key_create(self, connection: Connection, body: m.KeyRequest) -> m.KeyFacts:
        self._check(connection)
        key = await self._directory.create_key(body.account or self._settings.account, body.user, _document(body.policy))
        return m.KeyFacts(key.id, key.secret, key.account, key.user, body.policy, key.created_at)

    async def rpc_key_delete(self, connection: Connection, body: m.KeyName) -> None:
        self._check(connection)
        await self._directory.delete_key(body.key)

    async def rpc_roles(self, connection: Connection, body: None) -> list[m.RoleFacts]:
        self._check(connection)
        return [m.RoleFacts(role.arn, _text(role.policy)) for role in self._store.roles.values()]

    async def rpc_role_put(self, connection: Connection, body: m.RoleFacts) -> None:
        self._check(connection)
        await self._directory.put_role(body.arn, _document(body.policy) or {"Statement": []})

    async def rpc_role_delete(self, connection: Connection, body: m.RoleFacts) -> None:
        self._check(connection)
        await self._directory.delete_role(body.arn)

    async def rpc_quota(self, connection: Connection, body: None) -> list[m.QuotaUse]:
        """Use and limit of each account's quotas; a limit of 0 is none."""
        self._check(connection)
        profile = quotas.of(self._settings.limits)
        rows = []
        for account in self._directory.accounts:
            images = [image for image in self._store.images.values() if image.account == account.id]
            live = [s.minimum_mib for s in self._store.sessions_of(account.id) if not s.state.is_ended]
            building = sum(image.state in ("CREATING", "UPDATING") for image in images)
            rows += [
                m.QuotaUse(account.id, "microVMs, running and suspended", len(live), profile.microvms),
                m.QuotaUse(account.id, "memory, MiB, running and suspended", sum(live), profile.memory_mib),
                m.QuotaUse(account.id, "disk, GiB, running and suspended", sum(map(quotas.disk_gib, live)), profile.disk_gib),
                m.QuotaUse(account.id, "images", len(images), profile.images),
                m.QuotaUse(account.id, "versions of one image", max((len(i.versions) for i in images), default=0), profile.versions),
                m.QuotaUse(account.id, "builds that wait or run", building, profile.builds),
            ]
        return rows


def _document(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DirectoryError(f"the policy is not JSON: {error}") from error
    return document if isinstance(document, dict) else {"Statement": document}


def _text(document: dict[str, Any] | None) -> str:
    return msgspec.json.encode(document).decode() if document is not None else ""
