"""Shares of the loop's turns: alone a session has no bound, beside another one it waits in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig
from h2_client import Judge

from gateway.edge.table import Account
from gateway.edge.turns import SHARE, Turns


class Always(Turns):
    """Every request waits for another turn."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0

    def is_over(self, account: Account, now: float) -> bool:
        return True

    def wait(self, account: Account, go_on: Callable[[], None]) -> None:
        self.waited += 1
        super().wait(account, go_on)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


async def test_alone_nobody_waits() -> None:
    turns, account = Turns(), Account()
    assert not any(turns.is_over(account, 1.0) for _ in range(10 * SHARE))


async def test_beside_another_one_a_flood_gets_its_share_of_each_turn_in_order() -> None:
    turns, flood, quiet = Turns(), Account(), Account()
    served: list[int] = []
    assert not turns.is_over(quiet, 1.0)
    for number in range(3 * SHARE):
        if turns.is_over(flood, 1.0):
            turns.wait(flood, lambda number=number: served.append(number))  # type: ignore[misc]
        else:
            served.append(number)
    assert served == list(range(SHARE)) and not turns.is_over(quiet, 1.0)
    assert turns.is_over(flood, 1.001), "a new turn's request does not overtake"
    for turn in (2, 3):
        await asyncio.sleep(0)
        assert served == list(range(turn * SHARE))
    await asyncio.sleep(0)
    assert not turns.is_over(flood, 1.002)


async def test_a_second_after_the_other_one_it_is_alone_again() -> None:
    turns, flood, quiet = Turns(), Account(), Account()
    turns.is_over(quiet, 1.0)
    assert [turns.is_over(flood, 1.5) for _ in range(SHARE + 1)][-1]
    assert not any(turns.is_over(flood, 3.0) for _ in range(10 * SHARE))


@pytest.mark.parametrize("http2", [False, True])
async def test_requests_that_wait_for_a_turn_are_answered(rig: Rig, http2: bool) -> None:
    await rig.start(http2=http2)
    turns = rig.worker.turns = Always()
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
