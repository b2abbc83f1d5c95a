"""When an application that has no ready hook is taken to have started: all TCP ports that its Dockerfile EXPOSEs listen, then its
processors rest. What is waited for, for how long, and what came of it are lines of the build's log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.config import Images
from gateway.reach import reach
from gateway.sessions.agent import Agent, AgentError
from gateway.sessions.host import Host
from gateway.sessions.listeners import in_words

_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 1.0
_LISTENERS_SECONDS = 5.0  # an emulated guest that is starting has little time for others
_QUIET_STEP_SECONDS = 0.5
_QUIET_SHARE = 0.15  # of one processor: an application below it has finished starting
_BUSY_MOST_SECONDS = 60.0  # an application may never rest
_INSTEAD = "a ready hook (hooks.microvmImageHooks.ready) says better when an application has started"


class Readiness:
    def __init__(self, host: Host, settings: Images, agent: Agent, session: str, say: Callable[[str], None]) -> None:
        self._host = host
        self._settings = settings
        self._agent = agent
        self._session = session
        self._say = say

    async def wait(self, ports: list[int]) -> None:
        """Returns when the application has started, or its time (images.start_seconds) is up."""
        started = time.monotonic()
        settle = self._settings.settle_seconds
        if ports:
            settle = min(settle, _QUIET_STEP_SECONDS)  # it says itself when it has started
            await self._until_listening(ports, started + self._settings.start_seconds)
        else:
            self._say(f"no TCP port is EXPOSEd: the snapshot is taken when the application's processors rest; {_INSTEAD}")
        await self._quiet(started + min(_BUSY_MOST_SECONDS, self._settings.start_seconds), settle)

    async def _until_listening(self, ports: list[int], deadline: float) -> None:
        seconds = self._settings.start_seconds
        self._say(f"waiting for EXPOSEd {_named(ports)} to listen, {seconds:g} s at most (images.start_seconds); {_INSTEAD}")
        started, missing = time.monotonic(), ports
        while missing := [port for port in missing if not await self._listens(port)]:
            if time.monotonic() > deadline:
                nothing = f"nothing listens on EXPOSEd {_named(missing)} after {seconds:g} s{await self._others()}"
                self._say(f"{nothing}. The snapshot is taken all the same, and a request waits for the port edge.hold_seconds long")
                return
            await asyncio.sleep(_POLL_SECONDS)
        self._say(f"{_named(ports)} {'listens' if len(ports) == 1 else 'listen'} after {time.monotonic() - started:.1f} s")

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

    async def _quiet(self, deadline: float, settle_seconds: float) -> None:
        """A guest whose processors rest has finished starting."""
        settle = time.monotonic() + settle_seconds
        used = -1.0
        while time.monotonic() < max(deadline, settle):
            state = await self._host.state()
            now = next((one.cpu_seconds for one in state.sessions if one.session == self._session), 0.0)
            if used >= 0 and now - used < _QUIET_STEP_SECONDS * _QUIET_SHARE and time.monotonic() >= settle:
                return
            used = now
            await asyncio.sleep(_QUIET_STEP_SECONDS)


def _named(ports: list[int]) -> str:
    return f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports))}"
