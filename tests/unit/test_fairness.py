"""Quotas within a turn of the loop: alone a session has no bound, beside another one it waits in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from waiting import turn

from gateway.edge.policy.fairness import QUOTA, FairQueue
from gateway.edge.policy.routes import Account


class Always(FairQueue):
    """Every request waits for another turn."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0

    def admit(self, account: Account, now: float) -> bool:
        return False

    def defer(self, account: Account, proceed: Callable[[], None]) -> None:
        self.waited += 1
        super().defer(account, proceed)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


async def test_alone_nobody_waits() -> None:
    turns, account = FairQueue(), Account()
    assert all(turns.admit(account, 1.0) for _ in range(10 * QUOTA))


async def test_beside_another_one_a_flood_gets_its_share_of_each_turn_in_order() -> None:
    turns, flood, quiet = FairQueue(), Account(), Account()
    served: list[int] = []
    assert turns.admit(quiet, 1.0)
    for number in range(3 * QUOTA):
        if not turns.admit(flood, 1.0):
            turns.defer(flood, lambda number=number: served.append(number))  # type: ignore[misc]
        else:
            served.append(number)
    assert served == list(range(QUOTA)) and turns.admit(quiet, 1.0)
    assert not turns.admit(flood, 1.001), "a new turn's request does not overtake"
    for number in (2, 3):
        await turn()
        assert served == list(range(number * QUOTA))
    await turn()
    assert turns.admit(flood, 1.002)


async def test_a_second_after_the_other_one_it_is_alone_again() -> None:
    turns, flood, quiet = FairQueue(), Account(), Account()
    turns.admit(quiet, 1.0)
    assert not [turns.admit(flood, 1.5) for _ in range(QUOTA + 1)][-1]
    assert all(turns.admit(flood, 3.0) for _ in range(10 * QUOTA))


@pytest.mark.parametrize("http2", [False, True])
async def test_requests_that_wait_for_a_turn_are_answered(rig: Rig, http2: bool) -> None:
    await rig.start(http2=http2)
    turns = rig.worker.fairness = Always()
    if http2:
        client = Judge(*await rig.open())
        fields = [
            (":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/x"), ("x-aws-proxy-auth", rig.token),
            ("x-aws-proxy-port", str(rig.app_port)),
        ]  # fmt: skip
    for _ in range(3):
        if http2:
            numbers = [client.ask(fields) for _ in range(3)]
            assert [(await client.answer(number)).fields[":status"] for number in numbers] == ["200"] * 3
        else:
            answers = await rig.ask(rig.request("/x") * 3, answers=3)
            assert [status for status, _, _ in answers] == [200] * 3
    assert turns.waited >= 6
