"""The wall around a build's layers: its store is not taken from under it, nor its ids given to another account, while others fill the disk.

Taken away by name: that what removes stores asks who builds at that moment (vmm/build_stores.py), and not before it waited for a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from gateway import executors
from gateway.messages import BuildRequest, BuildResult
from vmm.build_stores import RANGE, Stores
from vmm.builds import Builder, BuildSettings
from vmm.cgroups import Cgroups

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="stores have owners")
FIRST = 1 << 30
LATER = 1000.0  # seconds by which a pool is behind


class Behind:
    """A pool whose threads are all taken up by others' work when a step is asked of it."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.is_waiting = False
        self.may = asyncio.Event()

    async def run(self, call: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
        if call.__name__ == self.step:
            self.is_waiting = True
            await self.may.wait()
        return await asyncio.to_thread(call, *arguments)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """On a disk that has never room enough, of a service that keeps stores for a minute and a half."""
    settings = BuildSettings(tmp_path, tmp_path, tmp_path, (), False, FIRST, cache_days=0.001, room_bytes=1 << 62)
    one = Builder(tmp_path, tmp_path / "namespaces", Cgroups("builds-unit", tmp_path), settings)
    for place in (tmp_path / "accounts", tmp_path / "work", tmp_path / "namespaces"):
        place.mkdir()
    return one


@pytest.mark.parametrize("wall", [True, False])
@pytest.mark.parametrize("step", ["give_up", "drop_unused"])
async def test_a_build_that_began_while_a_thread_was_waited_for_keeps_its_store(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, wall: bool
) -> None:
    """It has run for longer than a store counts as just opened. Without the wall another account then gets the ids that it runs under."""
    pool, ends = Behind(step), asyncio.Event()
    monkeypatch.setattr(executors, "BULK", pool)
    if not wall:
        nobody = builder._is_building("111111111111")
        monkeypatch.setattr(builder, "_is_building", lambda account: nobody)
    users = tmp_path / "accounts/111111111111/users"

    async def jailed(request: BuildRequest, *_: object) -> BuildResult:
        builder._stores.open(request.account, [])
        await ends.wait()
        return BuildResult(0, "", False, False)

    monkeypatch.setattr(builder, "_jailed", jailed)
    trimming = asyncio.create_task(builder._drop_stores())
    await until(lambda: pool.is_waiting)
    log, phases = os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    building = asyncio.create_task(builder._run(BuildRequest("b", "image", "111111111111", [], 0, {}), tmp_path, log, phases))
    await until(users.exists)
    os.utime(users, (0, time.time() - LATER))
    pool.may.set()
    await trimming
    assert users.exists() is wall
    _, first, _ = Stores(tmp_path / "accounts", FIRST).open("222222222222", [])
    assert (first == FIRST + RANGE) is wall, "its ids"
    ends.set()
    await building


async def test_a_store_that_nobody_builds_with_is_given_up(builder: Builder, tmp_path: Path) -> None:
    """Once the build is over: it is a cache."""
    builder._stores.open("111111111111", [])
    os.utime(tmp_path / "accounts/111111111111/users", (0, time.time() - LATER))
    await builder._drop_stores()
    assert list((tmp_path / "accounts").iterdir()) == []
