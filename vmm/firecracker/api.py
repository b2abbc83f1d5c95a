"""Firecracker's API: HTTP on a Unix socket inside the jail (src/firecracker/swagger/firecracker.yaml of its repository).

One process at a time answers, in order, and refuses what does not fit its state: pre-boot calls after the start, a load after
anything was configured, a snapshot of a guest that runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import aiohttp

SOCKET = "api.sock"
_SECONDS = 20.0
_POLL_SECONDS = 0.001


class ApiError(Exception):
    """Firecracker refused a call (its own words), or did not answer."""


class Unanswered(ApiError):
    """Firecracker did not answer a call; most likely it has ended."""


class Api:
    """A client of one process. `directory` holds its socket; its path may be longer than a socket's address can be."""

    def __init__(self, directory: Path) -> None:
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._directory}"
        self.version = ""  # of the process, once it has answered
        self._session = aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(f"{self.path}/{SOCKET}", limit=1))

    async def ready(self, seconds: float = _SECONDS) -> str:
        """Waits until the process answers; returns its state: Not started, Running or Paused. Raises ApiError, at once when the process
        has ended and this client was closed."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                said = await self.call("GET", "/")
                self.version = str(said.get("vmm_version", ""))
                return str(said["state"])
            except ApiError:
                if self._session.closed or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_POLL_SECONDS)

    async def put(self, path: str, seconds: float = _SECONDS, /, **body: object) -> None:
        await self.call("PUT", path, body, seconds)

    async def patch(self, path: str, **body: object) -> None:
        await self.call("PATCH", path, body)

    async def call(self, method: str, path: str, body: dict[str, object] | None = None, seconds: float = _SECONDS) -> Any:
        """Raises ApiError."""
        if self._session.closed:
            raise Unanswered(f"{method} {path}: the hypervisor has ended")
        try:
            async with self._session.request(method, path, json=body, timeout=aiohttp.ClientTimeout(seconds)) as answer:
                content = await answer.json() if answer.status != 204 else {}
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise Unanswered(f"{method} {path}: {error or f'no answer in {seconds:g} s'}") from error
        if answer.status >= 300:
            raise ApiError(f"{method} {path}: {content.get('fault_message', answer.reason)}")
        return content

    async def close(self) -> None:
        await self._session.close()
        with contextlib.suppress(OSError):
            os.close(self._directory)
