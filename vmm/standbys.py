"""Hypervisors that wait: started ahead for the images in use, so that a resume starts with a process that is ready.

How many is by demand: as many as were wanted at once in the last minutes may be again, as far as memory allows. With the last
hypervisor of an image that nobody uses goes what its clones share, its memory above all: the next one reads it again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import structlog

from gateway.observe.demand import Demand

from .driver import Driver, Machine

log = structlog.get_logger()

STANDBY_DESCRIPTORS = 6
_QUIET_SECONDS = 0.6  # after a take: a refill must not compete with the resume that it follows


class Standbys:
    def __init__(self, driver: Driver, least: int, most: int, unused_seconds: float, has_room: Callable[[], bool]) -> None:
        """Keeps `least` for each image in use, up to `most` where that many are taken, and more than `least` only while `has_room`. An
        image is in use for `unused_seconds` after the last take."""
        self._driver = driver
        self._least, self._most = least, most
        self._unused_seconds = unused_seconds
        self._has_room = has_room
        self._demand: dict[Path, Demand] = {}
        self._ready: dict[Path, deque[Machine]] = {}
        self._used: dict[Path, float] = {}
        self._shared: dict[Path, float] = {}  # images with memory on the host, and when somebody had it last
        self._starting: Counter[Path] = Counter()
        self._refills: dict[Path, asyncio.Task[None]] = {}

    async def take(self, image: Path) -> Machine:
        """Returns a standby of the image; without one, a fresh process. Raises VmmError."""
        self.want(image)
        self._demand.setdefault(image, Demand()).note(asyncio.get_running_loop().time())
        ready = self._ready[image]
        while ready:
            machine = ready.popleft()
            if not _has_ended(machine):
                return machine
        return await self._start(image)

    async def _start(self, image: Path) -> Machine:
        self._starting[image] += 1
        try:
            return await self._driver.standby(image)
        finally:
            self._starting[image] -= 1
            self._starting += Counter()  # without those of which none starts

    def want(self, image: Path) -> None:
        """Keeps standbys of this image from now on."""
        self._ready.setdefault(image, deque())
        self._used[image] = self._shared[image] = asyncio.get_running_loop().time()
        self._begin_refill(image)

    def _begin_refill(self, image: Path) -> None:
        task = self._refills.get(image)
        if task is None or task.done():
            self._refills[image] = asyncio.get_running_loop().create_task(self._refill(image))

    async def drop(self, image: Path) -> None:
        """Ends all standbys of an image that is deleted or unused. Who takes one meanwhile begins anew."""
        task, ready = self._refills.pop(image, None), self._ready.pop(image, ())
        self._used.pop(image, None)
        self._demand.pop(image, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._end(ready, image)

    async def _end(self, machines: Iterable[Machine], image: Path) -> None:
        """One that does not end in time stops nothing else; its sandbox is released whenever it does."""
        failures = await asyncio.gather(*(machine.kill() for machine in machines), return_exceptions=True)
        for error in filter(None, failures):
            log.error("standby.not_ended", image=image.name, error=repr(error))

    async def forget(self, image: Path) -> None:
        """Ends all standbys of an image that is deleted."""
        await self.drop(image)
        self._shared.pop(image, None)
        await self._driver.forget_image(image.name)

    def _wanted(self, image: Path) -> int:
        demand = self._demand.get(image)
        if not self._least or demand is None or not self._has_room():
            return self._least
        return max(self._least, min(self._most, demand.burst(asyncio.get_running_loop().time())))

    async def drop_unused(self, held: Collection[Path] = ()) -> None:
        """Ends what nobody has wanted for long, and what there is too much of; replaces what has ended by itself. `held`: images of which
        there are hypervisors that are taken, running or paused."""
        now = asyncio.get_running_loop().time()
        for image, ready in list(self._ready.items()):
            if any(map(_has_ended, ready)):
                self._ready[image] = ready = deque(one for one in ready if not _has_ended(one))
                self._begin_refill(image)
            while len(ready) > self._wanted(image):
                await self._end([ready.popleft()], image)
        for image in [image for image, used in self._used.items() if now - used > self._unused_seconds]:
            await self.drop(image)
        self._shared |= dict.fromkeys((*held, *self._starting), now)
        for image in list(self._shared):
            if image not in self._ready and now - self._shared[image] > self._unused_seconds:
                del self._shared[image]
                log.info("image.let_go", image=image.name)
                await self._driver.forget_image(image.name)

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
                self._ready[image].append(await self._start(image))
            except Exception as error:  # the next take begins again
                log.warning("standby.failed", image=image.name, error=repr(error))
                return


def _has_ended(machine: Machine) -> bool:
    return machine.record.phase == "ended"
