"""The process of a hypervisor, watched until it has ended, however it does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from . import sandboxes
from .driver import Process

log = structlog.get_logger()

_KILL_SECONDS = 10


class WatchedProcess(ABC):
    """Knows its process by a descriptor (pidfd_open(2)): once it has ended, its number may be another's.

    `directory` holds its record and its last words; `remove` undoes what was made for it (control group, directory).
    """

    def __init__(self, record: Process, directory: Path, remove: Callable[[], Awaitable[None]]) -> None:
        self.record = record
        self._directory = directory
        self._remove = remove
        self._pidfd: int | None = None  # while it runs
        self._last_words = ""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ending: asyncio.Task[None] | None = None

    def save_record(self) -> None:
        sandboxes.save_record(self._directory, self.record)

    def _watch(self, pid: int) -> None:
        """Raises OSError when it is gone."""
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._gone)

    async def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self._ending is None:  # nothing was started
            self._ending = asyncio.get_running_loop().create_task(self._clean())
        async with asyncio.timeout(_KILL_SECONDS):
            await self.wait()

    async def wait(self) -> None:
        await asyncio.shield(self._ended)

    def _gone(self) -> None:
        assert self._pidfd is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None
        self.record.phase = "ended"  # at once: what is left is cleared away meanwhile
        self._ending = asyncio.get_running_loop().create_task(self._clean())

    async def _clean(self) -> None:
        """It has ended when this is done, whatever is left of it: the next start removes that."""
        self.record.phase = "ended"
        try:
            await self._let_go()
            self._last_words = sandboxes.last_words(self._directory)
            await self._remove()
        except Exception as error:
            log.error("vm.not_cleaned", vm=self.record.vm, error=repr(error))
        finally:
            self._ended.set_result(None)

    @abstractmethod
    async def _let_go(self) -> None:
        """Closes what this daemon has of the process: each driver knows what that is."""
