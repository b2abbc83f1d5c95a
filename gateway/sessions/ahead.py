"""MicroVMs that ran ahead: launched from their image for nobody yet, asked a request, and stopped.

Under emulation a launch spends nearly all of its time on translating guest code anew; one that has run already answers at once
(docs/performance.md). The application then has seen that request, so this is only done where the image's owner allows it: by its
validate hook, which is the request, or by `images.run_ahead`. Such a microVM has no way out, no credentials and no name service until
a session claims it; each becomes one session, never two.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import uuid
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from gateway.config import Settings
from gateway.messages import EgressRules
from gateway.observe.demand import Demand

from . import hooks
from .agent import Agent, AgentError, wake_frame
from .host import Host, RpcError, RpcLost
from .model import Session, Version
from .store import Store

log = structlog.get_logger()

PREFIX = "ahead-"
_QUIET_SECONDS = 0.6  # after a launch: what is made for the next one must not compete with it
_MOST = 16
_SECONDS = 30.0
_TARGET = re.compile(r"(?::(\d{1,5}))?(/[!-~]*)")
_DEFAULT_PORT = 8080
_PASSES = 3  # of a named path: what an application does between two requests is translated too then


@dataclass
class _Pool:
    """The microVMs that ran ahead for one image version, and how many launches have wanted one lately."""

    arn: str
    version: str
    ready: deque[str] = field(default_factory=deque)
    demand: Demand = field(default_factory=Demand)
    used: float = 0.0
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    filling: asyncio.Task[Any] | None = None


class Ahead:
    def __init__(
        self, host: Host, store: Store, settings: Settings, spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]
    ) -> None:
        self._host, self._store, self._settings, self._spawn = host, store, settings, spawn
        self._loop = asyncio.get_running_loop()
        self._pools: dict[str, _Pool] = {}  # by image version's key
        self.on_count: Callable[[int], None] = lambda count: None

    async def claim(self, session: Session, egress: EgressRules | None) -> bool:
        """Makes a microVM that ran ahead this session, prepared to start. False where there is none."""
        pool = self.want(session.image_arn, session.image_version)
        if pool is None:
            return False
        pool.demand.note(self._loop.time())
        pool.taken.set()
        while pool.ready:
            name = pool.ready.popleft()
            self._counted()
            try:
                await self._host.claim(name, session.id, 1, egress)
                return True
            except RpcError as error:
                log.warning("ahead.lost", image=session.image, error=str(error))
                self._spawn(self._forget(name))
                if isinstance(error, RpcLost):  # it may be this session by now, which the host knows: another one would be nobody's
                    return False
        return False

    def want(self, arn: str, number: str) -> _Pool | None:
        """Has some microVMs run ahead for this image version from now on; returns None where the image's owner does not allow it."""
        version = self._version(arn, number)
        if version is None or not self._settings.standbys.ahead or self._request(version) is None:
            return None
        pool = self._pools.setdefault(version.key, _Pool(arn, number))
        pool.used = self._loop.time()
        if pool.filling is None or pool.filling.done():
            pool.filling = self._spawn(self._fill(version.key, pool))
        return pool

    async def drop(self, key: str) -> None:
        """Forgets the microVMs that ran ahead for an image version that is deleted."""
        pool = self._pools.pop(key, None)
        if pool is None:
            return
        if pool.filling is not None and pool.filling is not asyncio.current_task():
            pool.filling.cancel()
            await asyncio.wait([pool.filling])
        self._counted()
        for name in pool.ready:
            await self._forget(name)

    async def close(self) -> None:
        """Forgets them all: they belong to no session, and nothing of them outlives this process."""
        for key in list(self._pools):
            await self.drop(key)

    def _counted(self) -> None:
        self.on_count(sum(len(pool.ready) for pool in self._pools.values()))

    def _version(self, arn: str, number: str) -> Version | None:
        image = self._store.images.get(arn)
        version = image.find(number) if image is not None else None
        return version if version is not None and version.state == "SUCCESSFUL" else None

    def _request(self, version: Version) -> tuple[str, int, str] | None:
        """Returns what is asked of a microVM of this version: the hook's name or nothing, port, target."""
        given = version.request.get("hooks") or {}
        if (given.get("microvmImageHooks") or {}).get("validate") == "ENABLED":
            return "validate", int(given.get("port") or hooks.DEFAULT_PORT), ""
        name = version.image_arn.rpartition(":")[2]
        found = _TARGET.fullmatch(self._settings.images.run_ahead.get(name, ""))
        return ("", int(found[1] or _DEFAULT_PORT), found[2]) if found else None

    # ---- making them ----

    async def _fill(self, key: str, pool: _Pool) -> None:
        while self._pools.get(key) is pool:
            quiet = pool.used + _QUIET_SECONDS - self._loop.time()
            if quiet > 0:
                await asyncio.sleep(quiet)
                continue
            if len(pool.ready) >= max(self._settings.standbys.ahead, min(_MOST, pool.demand.burst(self._loop.time()))):
                if not await self._wanted_again(pool):
                    self._spawn(self.drop(key))
                    return
                continue
            version = self._version(pool.arn, pool.version)
            if version is None or not await self._has_room() or not await self._make(version, pool):
                return  # until the next launch asks

    async def _wanted_again(self, pool: _Pool) -> bool:
        """Waits for the next launch; False when there was none for long."""
        pool.taken.clear()
        try:
            async with asyncio.timeout(self._settings.standbys.unused_seconds):
                await pool.taken.wait()
        except TimeoutError:
            return False
        return True

    async def _has_room(self) -> bool:
        limits = self._settings.limits
        with contextlib.suppress(RpcError):
            return (await self._host.reclaim_capacity()).memory_available > (2 * limits.reserve_mib + 4 * limits.growth_mib) << 20
        return False

    async def _make(self, version: Version, pool: _Pool) -> bool:
        name = f"{PREFIX}{uuid.uuid4().hex}"
        try:
            await self._host.prepare(name, 1, version.key, False)
            await self._run(name, version)
            await self._host.pause(name, 1)
        except (RpcError, AgentError, hooks.HookError, OSError) as error:
            log.warning("ahead.failed", image=version.key, error=str(error))
            await self._forget(name)
            return False
        except BaseException:
            await asyncio.shield(self._forget(name))
            raise
        pool.ready.append(name)
        self._counted()
        return True

    async def _run(self, name: str, version: Version) -> None:
        """Wakes a prepared microVM and asks it its request. Raises what waking and asking raise."""
        request = self._request(version)
        assert request is not None
        hook, port, target = request
        nonce = secrets.randbits(63)
        agent = Agent(await self._host.start(name, 1, wake_frame(nonce)), lambda channel, data: None, lambda code: None)
        try:
            async with asyncio.timeout(_SECONDS):
                await agent.expect(nonce)
                connect = lambda: self._host.socket(name, 1)  # noqa: E731
                if hook:
                    status = await hooks.post(connect, hook, port, b"", str(uuid.uuid4()))
                else:
                    for _ in range(_PASSES):
                        status = await hooks.ask(connect, port, f"GET {target}")
        except TimeoutError as error:
            raise AgentError(f"no answer in {_SECONDS:g} s") from error
        finally:
            agent.close()
        if status != 200:
            raise hooks.HookError(f"returned HTTP status {status}", status)

    async def _forget(self, name: str) -> None:
        with contextlib.suppress(RpcError):
            await self._host.forget(name)
