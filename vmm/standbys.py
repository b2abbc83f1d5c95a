"""Hypervisors that wait: started ahead for the images in use, so that a resume starts with a process that is ready.

How many is by use: what was taken in the last minutes may be wanted again, all at once, as far as memory allows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

import structlog

from gateway.observe.use import Use

from .driver import Driver, Machine, StateLost, VmmError

log = structlog.get_logger()

_QUIET_SECONDS = 0.6  # after a take: a refill must not compete with the resume that it follows
_UNUSED_SECONDS = 900.0


class Standbys:
    def __init__(self, driver: Driver, least: int, most: int, has_memory: Callable[[], bool]) -> None:
        """`least` for each image in use, `most` where that many are taken; more than `least` only while `has_memory`."""
        self._driver = driver
        self._least, self._most = least, most
        self._has_memory = has_memory
        self._use: dict[Path, Use] = {}
        self._ready: dict[Path, deque[Machine]] = {}
        self._used: dict[Path, float] = {}
        self._refills: dict[Path, asyncio.Task[None]] = {}

    async def take(self, image: Path) -> Machine:
        """A standby of the image; without one, a fresh process. Raises VmmError."""
        self.want(image)
        self._use.setdefault(image, Use()).note(asyncio.get_running_loop().time())
        ready = self._ready[image]
        while ready:
            machine = ready.popleft()
            if not _has_ended(machine):
                return machine
        return await self._driver.standby(image)

    def want(self, image: Path) -> None:
        """Keeps standbys of this image from now on."""
        self._ready.setdefault(image, deque())
        self._used[image] = asyncio.get_running_loop().time()
        task = self._refills.get(image)
        if task is None or task.done():
            self._refills[image] = asyncio.get_running_loop().create_task(self._refill(image))

    async def drop(self, image: Path) -> None:
        """Ends all standbys of an image that is deleted or unused."""
        task = self._refills.pop(image, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._used.pop(image, None)
        self._use.pop(image, None)
        for machine in self._ready.pop(image, ()):
            await machine.kill()

    def _wanted(self, image: Path) -> int:
        use = self._use.get(image)
        if not self._least or use is None or not self._has_memory():
            return self._least
        return max(self._least, min(self._most, use.recent(asyncio.get_running_loop().time())))

    async def drop_unused(self) -> None:
        """Ends what nobody has wanted for long, and what there is too much of."""
        now = asyncio.get_running_loop().time()
        for image, ready in list(self._ready.items()):
            for _ in range(len(ready) - self._wanted(image)):
                await ready.popleft().kill()
        for image in [image for image, used in self._used.items() if now - used > _UNUSED_SECONDS]:
            await self.drop(image)

    async def close(self) -> None:
        for image in list(self._ready):
            await self.drop(image)

    def statistics(self) -> dict[str, int]:
        return {image.name: len(ready) for image, ready in self._ready.items()}

    async def _refill(self, image: Path) -> None:
        while True:
            quiet = self._used[image] + _QUIET_SECONDS - asyncio.get_running_loop().time()
            if quiet > 0:
                await asyncio.sleep(quiet)
                continue
            if len(self._ready[image]) >= self._wanted(image):
                return
            try:
                self._ready[image].append(await self._driver.standby(image))
            except (VmmError, StateLost) as error:
                log.warning("standby.failed", image=image.name, error=str(error))
                return


def _has_ended(machine: Machine) -> bool:
    return machine.record.phase == "ended"
