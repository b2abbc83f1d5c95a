"""A bad day: thirty sessions sleep and wake for hours of the loop's clock, while the disk fills and is freed, descriptors run short, calls
fail one by one, and vmm and control are killed. Who was told that something could not be done asks again. Nobody is lost."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from harness import host
from seam import CONTROL, ERRORS, KILL, LATE, LOST, VMM, Plan, Seam
from steps import Case
from test_matrix import directory
from timewarp import TimeWarp

from gateway.sessions.states import Event, State

__all__ = ["directory"]

_SESSIONS = 30
_HOURS = 3


async def _day(where: Path, seed: int, hours: int) -> str:
    chance, seam = random.Random(seed), Seam()
    async with host(where, seam, warm=4) as one:
        case = Case(one)
        names = [f"s{number}" for number in range(_SESSIONS)]
        for name in names:
            await case.launch(name, chance.randrange(1, 4))
        began, done = asyncio.get_running_loop().time(), 0
        while asyncio.get_running_loop().time() - began < hours * 3600:
            _something_happens(chance, seam)
            for name in chance.sample(names, 3):
                session = one.session(name)
                if session is not None and session.state is State.RUNNING:
                    _use(case, name)
                    one.fire(name, Event.SUSPEND)
                elif session is not None:
                    one.request(name)
                done += 1
            await asyncio.sleep(chance.expovariate(1 / 40))
        seam.weather, seam.plan, seam.is_armed = "", None, False
        await one.settled(names)
        lost = []
        for name in names:
            for _ in range(8):
                if (session := one.session(name)) is not None and session.state is State.SUSPENDED:
                    one.request(name)
                await asyncio.sleep(1)
                await one.settled([name])
            session = one.session(name)
            if session is None or session.state is not State.RUNNING:
                lost.append(f"{name}: {None if session is None else (session.state.value, session.reason)}")
            elif (found := one.guest(name).counter) != case.ledger[name]:
                lost.append(f"{name} has counted {found}, not {case.ledger[name]}")
        assert not lost + one.world.wrong, f"seed {seed}: {lost + one.world.wrong}"
        return f"seed {seed}: {done} sleeps and requests, {one.deaths} processes replaced, {_SESSIONS} sessions, 0 lost"


def _use(case: Case, name: str) -> None:
    """A request is answered, where the session's guest runs at this moment."""
    entry = case.host.vmm.vms.get(name) if case.host.vmm is not None else None
    inside = case.host.world.hypervisors[entry.machine.record.vm] if entry is not None else None
    if inside is not None and inside.runs:
        case.ledger[name] = inside.count()


def _something_happens(chance: random.Random, seam: Seam) -> None:
    what = chance.randrange(12)
    if what < 2 and not seam.weather:
        seam.weather = chance.choice(["ENOSPC", "EMFILE"])
    elif what < 6:
        seam.weather = ""
    elif what < 9:
        seam.is_armed, seam.has_struck = True, ""
        owner = chance.choice([VMM, CONTROL])
        seam.plan = Plan(owner, seam.counts[owner] + chance.randrange(30), chance.choice([*ERRORS, KILL, LOST, LATE]))
    elif what == 9:
        seam.kill(chance.choice([VMM, CONTROL]))


def play(where: Path, seed: int, hours: int) -> None:
    loop = TimeWarp()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(lambda *_: None)  # what the killed leave
    try:
        print(loop.run_until_complete(_day(where / "host", seed, hours)))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@pytest.mark.service
def test_an_hour_of_a_bad_day(directory: Path) -> None:
    play(directory, 1, 1)


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("seed", range(int(os.environ.get("DAYS", "10"))))
def test_three_hours_of_a_bad_day(directory: Path, seed: int) -> None:
    play(directory, seed, _HOURS)
