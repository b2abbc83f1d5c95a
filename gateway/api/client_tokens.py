"""Idempotency tokens: the same token and parameters get the first reply again, also at once, also after a restart.

Kept for a day (our choice; the service says nothing).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from gateway.sessions.schema import digest
from gateway.sessions.store import Store

Remember = Callable[[dict[str, Any]], None]


class TokenMismatch(Exception):
    """The token came before, with other parameters."""


class ClientTokens:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[str, asyncio.Future[None]] = {}

    async def once(
        self, account: str, operation: str, token: str | None, call: dict[str, Any],
        work: Callable[[Remember], Awaitable[dict[str, Any]]], stands: Callable[[dict[str, Any]], bool],
    ) -> dict[str, Any]:  # fmt: skip
        """Runs `work`, which calls `remember(reply)` before it commits: reply and deed are one transaction.

        What fails is not remembered. A reply about what is there no more, as `stands` says, is as if it had never been given.
        Raises TokenMismatch, and what `work` raises.
        """
        if token is None:
            return await work(lambda reply: None)
        name = f"{account}:{operation}:{token}"
        while name in self._running:
            await asyncio.wait([self._running[name]])
        future = self._running[name] = asyncio.get_running_loop().create_future()
        parameters = digest(msgspec.json.encode(call, order="sorted"))

        def remember(reply: dict[str, Any]) -> None:
            self._store.put_client_token(name, parameters, msgspec.json.encode(reply).decode())

        try:
            known = await self._store.client_token(name)
            if known is not None and stands(msgspec.json.decode(known[1])):
                if known[0] != parameters:
                    raise TokenMismatch
                return msgspec.json.decode(known[1])  # type: ignore[no-any-return]
            try:
                return await work(remember)
            except BaseException:
                self._store.forget_client_token(name)
                raise
        finally:
            del self._running[name]
            future.set_result(None)
