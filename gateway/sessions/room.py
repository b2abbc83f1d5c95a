"""Whether the host has room for one more microVM: by what is really used, never by adding sizes up."""

from __future__ import annotations

import asyncio

from gateway.config import Limits
from gateway.messages import Usage

from .host import Host

_SHOWS_SECONDS = 2.0  # until what an admitted microVM uses shows in the host's figures
_KNOWN_SECONDS = 0.1  # a herd asks once


class Room:
    """Asks the host for each launch and resume. What was admitted a moment ago counts as expected to grow."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self._host = host
        self._limits = limits
        self._promised = 0
        self._usage: Usage | None = None
        self._asked = 0.0

    async def take(self) -> bool:
        """True when memory and disk have room for one more, which then counts. Raises RpcError."""
        now = asyncio.get_running_loop().time()
        if self._usage is None or now - self._asked > _KNOWN_SECONDS:
            self._usage, self._asked = await self._host.usage(), now
        usage = self._usage
        free = usage.memory_available - (self._limits.reserve_mib << 20) - self._promised * usage.expected_growth
        if free < usage.expected_growth or usage.disk_free < self._limits.disk_reserve_mib << 20:
            return False
        self._promised += 1
        asyncio.get_running_loop().call_later(_SHOWS_SECONDS, self._shown)
        return True

    def _shown(self) -> None:
        self._promised -= 1
