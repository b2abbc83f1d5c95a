"""How many hypervisors wait: by use, by memory, never for what nobody wants."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

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

        self.forgotten: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def standby(self, image: Path) -> Machine:
        await self.go_on.wait()
        self.made.append(Machine())
        return self.made[-1]

    async def forget_image(self, image: str) -> None:
        self.forgotten.append(image)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standbys, "_QUIET_SECONDS", 0.0)


def pool(driver: Driver, has_room: bool = True) -> Standbys:
    return Standbys(driver, 2, 5, 900.0, lambda: has_room)  # type: ignore[arg-type]


async def settled(one: Standbys) -> int:
    await asyncio.gather(*one._refills.values())
    return one.statistics()["a"]


async def test_the_least_wait_for_an_image_in_use() -> None:
    one = pool(Driver())
    one.want(IMAGE)
    assert await settled(one) == 2
    await one.close()


@pytest.mark.parametrize(("takes", "has_room", "wait"), [(1, True, 2), (4, True, 4), (9, True, 5), (9, False, 2)])
async def test_as_many_as_were_taken_lately(takes: int, has_room: bool, wait: int) -> None:
    one = pool(Driver(), has_room)
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
    monkeypatch.setattr(one, "_has_room", lambda: False)
    await one.drop_unused()
    assert one.statistics()["a"] == 2 and sum(machine.killed for machine in driver.made) == 3
    await one.close()


async def test_one_that_has_ended_by_itself_is_replaced() -> None:
    """It was counted as one that waits, until the next launch found that there was none."""
    driver = Driver()
    one = pool(driver)
    await one.take(IMAGE)
    await settled(one)
    driver.made[-1].record.phase = "ended"
    await one.drop_unused()
    assert await settled(one) == 2 and len(driver.made) == 4
    await one.close()


async def test_an_image_that_nobody_uses_leaves_the_hosts_memory() -> None:
    """Its hypervisors that wait end, then what its clones share is let go, once, until somebody wants it again."""
    driver = Driver()
    one = pool(driver)
    await one.take(IMAGE)
    await settled(one)
    await one.drop_unused()
    assert not driver.forgotten and one.statistics() == {"a": 2}
    one._unused_seconds = -1.0  # all of it is over
    await one.drop_unused()
    await one.drop_unused()
    assert driver.forgotten == ["a"] and one.statistics() == {} and [machine.killed for machine in driver.made] == [False, True, True]
    one._unused_seconds = 900.0
    await one.take(IMAGE)
    await one.drop_unused()
    assert driver.forgotten == ["a"] and await settled(one) == 2
    await one.close()


async def test_an_images_memory_stays_for_so_long_after_its_last_hypervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a hypervisor that an earlier daemon started, of whose image nobody has taken one since."""
    driver = Driver()
    one = pool(driver)
    await one.drop_unused(held={IMAGE})
    await one.drop_unused()
    assert not driver.forgotten
    one._shared[IMAGE] -= 901.0
    await one.drop_unused(held={IMAGE})
    assert not driver.forgotten
    one._shared[IMAGE] -= 901.0
    await one.drop_unused()
    assert driver.forgotten == ["a"]


async def test_memory_is_not_let_go_under_a_hypervisor_that_starts() -> None:
    driver = Driver()
    driver.go_on.clear()
    one = pool(driver)
    one._least = 0
    taking = asyncio.create_task(one.take(IMAGE))
    await asyncio.sleep(0)
    one._used[IMAGE] -= 901.0
    one._shared[IMAGE] -= 901.0
    await one.drop_unused()
    assert not driver.forgotten
    driver.go_on.set()
    await taking
    one._shared[IMAGE] -= 901.0
    await one.drop_unused()
    assert driver.forgotten == ["a"]


async def test_too_many_are_ended_although_some_are_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pool(Driver())
    for _ in range(5):
        await one.take(IMAGE)
    await settled(one)
    monkeypatch.setattr(one, "_has_room", lambda: False)

    async def kill(machine: Machine) -> None:
        one._ready[IMAGE].clear()

    monkeypatch.setattr(Machine, "kill", kill)
    await one.drop_unused()
    monkeypatch.undo()
    await one.close()
