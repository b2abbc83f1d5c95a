"""Waiting in tests: for a condition, with a deadline, so that a fault fails a test instead of hanging it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

SECONDS = 5.0


async def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `condition` returns as soon as that is true. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not (value := condition()):
            await asyncio.sleep(0.001)
        return value


async def turns(count: int = 10) -> None:
    """Turns of the event loop: what is scheduled, and needs nobody else, has run then."""
    for _ in range(count):
        await asyncio.sleep(0)


async def turn() -> None:
    """One turn of the event loop."""
    await asyncio.sleep(0)
