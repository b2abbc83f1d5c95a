"""When an application that has no ready hook is taken to have started: all TCP ports that its Dockerfile EXPOSEs listen, then its
processors rest. What is waited for, for how long, and what came of it are lines of the build's log.

A guest whose processors wait for the host's does not rest, although it uses little; nor does one that waits for the host's disk. Its
deadlines count the time that it gets.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable

from gateway.config import Images
from gateway.messages import Effort
from gateway.reach import reach
from gateway.sessions.agent import Agent, AgentError
from gateway.sessions.host import Host
from gateway.sessions.listeners import in_words

_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 1.0
_LISTENERS_SECONDS = 5.0  # an emulated guest that is starting has little time for others
_ASKED_MOST, _NAMED_MOST = 64, 8  # of the ports that did not listen in time: an EXPOSEd range may have thousands
_QUIET_STEP_SECONDS = 0.5
_QUIET_SHARE = 0.15  # of one processor: an application below it has finished starting
# Of the time: a guest that could run, and waits, for more than that is busy. One that rests wakes for a moment now and then, and waits for
# it where the host is.
_WAITING_SHARE = 0.5
_READING_BYTES = 64 << 10  # in a step: of an application that is loaded from a disk
_BUSY_MOST_SECONDS = 60.0  # an application may never rest
_SLOW = 1.2
_STARVED_MOST = 4.0  # so many seconds count as one at most
_INSTEAD = "a ready hook (hooks.microvmImageHooks.ready) says better when an application has started"


class Readiness:
    def __init__(
        self, host: Host, settings: Images, agent: Agent, session: str, say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self._host = host
        self._settings = settings
        self._agent = agent
        self._session = session
        self._say = say
        self._clock = clock
        self._sleep = sleep
        self._had = 0.0  # the guest's own time so far
        self._looked = clock()
        self._seen: Effort | None = None

    async def wait(self, ports: list[int]) -> None:
        """Returns when the application has started, or its time (images.start_seconds) is up."""
        settle = self._settings.settle_seconds
        if ports:
            settle = min(settle, _QUIET_STEP_SECONDS)  # it says itself when it has started
            await self._until_listening(ports)
        else:
            self._say(f"no TCP port is EXPOSEd: the snapshot is taken when the application's processors rest; {_INSTEAD}")
        await self._until_quiet(settle)

    async def _until_listening(self, ports: list[int]) -> None:
        seconds = self._settings.start_seconds
        self._say(f"waiting for EXPOSEd {_named(ports)} to listen, {seconds:g} s at most (images.start_seconds); {_INSTEAD}")
        started, missing = self._clock(), deque(ports)
        while missing:
            if await self._listens(missing[0]):  # all have to: the first that does not is asked again
                missing.popleft()
                continue
            if self._clock() - self._looked >= _QUIET_STEP_SECONDS:
                await self._look()
            if self._had > seconds:
                took = self._clock() - started
                slowly = f" (it had {seconds:g} s of {took:.0f}: the host is busy)" if took > _SLOW * self._had else ""
                silent = [port for port in itertools.islice(missing, 1, _ASKED_MOST) if not await self._listens(port)]
                left = [missing[0], *silent, *itertools.islice(missing, _ASKED_MOST, None)]
                nothing = f"nothing listens on EXPOSEd {_named(left)} after {seconds:g} s{slowly}{await self._others()}"
                self._say(f"{nothing}. The snapshot is taken all the same, and a request waits for the port edge.hold_seconds long")
                return
            await self._sleep(_POLL_SECONDS)
        self._say(f"{_named(ports)} {'listens' if len(ports) == 1 else 'listen'} after {self._clock() - started:.1f} s")

    async def _others(self) -> str:
        try:
            return in_words(await self._agent.listeners(_LISTENERS_SECONDS))
        except AgentError:
            return ""

    async def _listens(self, port: int) -> bool:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                (await reach(lambda: self._host.socket(self._session, 0), port)).close()
        except (OSError, TimeoutError):
            return False
        return True

    async def _until_quiet(self, settle_seconds: float) -> None:
        settle = self._had + settle_seconds
        most = max(min(_BUSY_MOST_SECONDS, self._settings.start_seconds), settle)
        await self._look()
        while self._had < most:
            await self._sleep(_QUIET_STEP_SECONDS)
            if await self._look() and self._had >= settle:
                return

    async def _look(self) -> bool:
        """Whether the guest has rested since the last look. Its own time goes on."""
        before, now = self._seen, await self._host.effort(self._session, 0)
        passed, self._looked, self._seen = self._clock() - self._looked, self._clock(), now
        if before is None:
            self._had += passed
            return False
        used, waited = now.cpu_seconds - before.cpu_seconds, now.waited_seconds - before.waited_seconds
        is_waiting = used + waited > passed * _WAITING_SHARE
        self._had += passed * (max(used / (used + waited), 1 / _STARVED_MOST) if is_waiting else 1.0)
        is_reading = now.read_bytes - before.read_bytes > _READING_BYTES
        return used < passed * _QUIET_SHARE and not is_waiting and not is_reading


def _named(ports: list[int]) -> str:
    more = f" and {len(ports) - _NAMED_MOST} more" if len(ports) > _NAMED_MOST else ""
    return f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports[:_NAMED_MOST]))}{more}"
