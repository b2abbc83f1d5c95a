"""What is kept ready follows demand, and not its echo: bursts are met again, busy clients that leave leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from gateway.observe.demand import KEPT_SECONDS, Demand, largest_burst

LEAST, MOST = 2, 48
QUIET = 0.6


def clients(count: int, seconds: float, seed: int, pace: float = 1.1) -> list[float]:
    """Times of takes by clients that launch, sleep, wake and go, each again and again: two in `pace` seconds each."""
    chance, times = random.Random(seed), list[float]()
    for _ in range(count):
        now = chance.random()
        while now < seconds:
            times.append(now)
            now += chance.uniform(0.7, 1.3) * pace / 2
    return sorted(times)


def burst(count: int, at: float, within: float) -> list[float]:
    return [at + within * number / count for number in range(count)]


def wanted(takes: Sequence[float], now: float) -> int:
    demand = Demand()
    for at in takes:
        demand.note(at)
    return max(LEAST, min(MOST, demand.burst(now)))


def started_for_nobody(takes: Sequence[float], making: float = 0.3) -> int:
    """How many hypervisors are started after the last take, one after the other, as vmm/standbys.py does it."""
    demand, ready, started, now, end = Demand(), LEAST, 0, 0.0, takes[-1]
    left = list(takes)
    while now < end + 60:
        used = max((at for at in takes if at <= now), default=-1.0)
        while left and left[0] <= now:
            demand.note(left.pop(0))
            ready = max(0, ready - 1)
        if now - used >= QUIET and ready < max(LEAST, min(MOST, demand.burst(now))):
            ready += 1
            started += now > end
        now += making
    return started


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seconds", [60, 300])
def test_nothing_is_started_for_clients_that_have_left(seed: int, seconds: int) -> None:
    """Seen with four of them: 48 hypervisors."""
    takes = clients(4, seconds, seed)
    assert len(takes) / seconds > 6
    assert started_for_nobody(takes) <= 10


@pytest.mark.parametrize("seed", range(3))
def test_busy_clients_have_some_in_stock(seed: int) -> None:
    assert LEAST <= wanted(clients(4, 300, seed), 300.5) <= 12


@pytest.mark.parametrize(("count", "within"), [(5, 0.1), (30, 0.1), (30, 3.0), (48, 2.5), (100, 3.0)])
def test_a_burst_finds_as_many_again(count: int, within: float) -> None:
    takes = burst(count, 1000.3, within)
    for later in (within + QUIET, 30.0, KEPT_SECONDS - 5.0):
        assert wanted(takes, 1000.3 + later) == min(MOST, count)
    assert wanted(takes, 1000.3 + KEPT_SECONDS + 10.0) == LEAST


@pytest.mark.parametrize("every", [10.0, 30.0, 110.0])
def test_bursts_that_come_again_and_again_find_as_many(every: float) -> None:
    takes = [at for number in range(12) for at in burst(20, number * every + 0.5, 1.0)]
    assert wanted(takes, takes[-1] + 1.0) == 20


def test_a_burst_while_clients_are_busy_is_met_the_next_time() -> None:
    takes = sorted(clients(2, 300, 1) + burst(20, 200.0, 1.0))
    assert 16 <= wanted(takes, 300.0) <= 28


def test_the_least_is_enough_for_one_now_and_then() -> None:
    assert wanted([number * 5.0 for number in range(100)], 500.0) == LEAST


def test_resumes_that_wake_one_after_the_other_are_no_burst() -> None:
    """As of a fleet of sleepers that is woken by a scheduler, one in a second."""
    assert wanted([float(number) for number in range(200)], 200.0) == LEAST


def test_what_nobody_took_is_nothing() -> None:
    assert largest_burst([]) == largest_burst([0] * 200) == 0 and wanted([], 5.0) == LEAST


def test_time_that_stands_still_or_leaps() -> None:
    demand = Demand()
    for _ in range(7):
        demand.note(50.0)
        assert demand.burst(50.0) > 0
    assert demand.burst(50.0) == demand.burst(49.0) == 7
    assert demand.burst(1e9) == 0
