"""How many hypervisors wait: by use, by memory, never for what nobody wants."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.observe.use import USE_SECONDS, Use
from vmm import standbys
from vmm.driver import Process
from vmm.standbys import Standbys

IMAGE = Path("/images/a")


class Machine:
    def __init__(self) -> None:
        self.record = Process("vm", 1, 1, "a", 1)
        self.killed = False

    async def kill(self) -> None:
        self.killed = True


class Driver:
    def __init__(self) -> None:
        self.made: list[Machine] = []

    async def standby(self, image: Path) -> Machine:
        self.made.append(Machine())
        return self.made[-1]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standbys, "_QUIET_SECONDS", 0.0)


def pool(driver: Driver, has_memory: bool = True) -> Standbys:
    return Standbys(driver, 2, 5, lambda: has_memory)  # type: ignore[arg-type]


async def settled(one: Standbys) -> int:
    await asyncio.gather(*one._refills.values())
    return one.statistics()["a"]


async def test_the_least_wait_for_an_image_in_use() -> None:
    one = pool(Driver())
    one.want(IMAGE)
    assert await settled(one) == 2
    await one.close()


@pytest.mark.parametrize(("takes", "has_memory", "wait"), [(1, True, 2), (4, True, 4), (9, True, 5), (9, False, 2)])
async def test_as_many_as_were_taken_lately(takes: int, has_memory: bool, wait: int) -> None:
    one = pool(Driver(), has_memory)
    for _ in range(takes):
        await one.take(IMAGE)
    assert await settled(one) == wait
    await one.close()


async def test_too_many_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    one = pool(driver)
    for _ in range(5):
        await one.take(IMAGE)
    assert await settled(one) == 5
    monkeypatch.setattr(one, "_has_memory", lambda: False)
    await one.drop_unused()
    assert one.statistics()["a"] == 2 and sum(machine.killed for machine in driver.made) == 3
    await one.close()


def test_use_is_forgotten() -> None:
    use: Any = Use()
    for at in (0.0, 1.0, 2.0):
        use.note(at)
    assert use.recent(2.0) == 3
    assert use.recent(USE_SECONDS + 1.5) == 1
    assert use.recent(10 * USE_SECONDS) == 0
