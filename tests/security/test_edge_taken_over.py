"""The wall between an edge that was taken over and microVMs: it opens no shell without its token, and its ids count nothing.

Taken away by name: control's own look at the token (Control._check_shell).
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from test_control import Rig, joined

from gateway import messages as m
from gateway.control import Control
from gateway.edge.records.counters import Counters
from gateway.rpc import RpcError
from gateway.tokens import PROXY, SHELL

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the rig's socket is root's")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    one = Rig(tmp_path)
    await one.start()
    yield one
    await one.stop()


ATTACKS: dict[str, Callable[[Rig], str]] = {
    "none": lambda rig: "", "made up": lambda rig: "a..b.c.d", "a request's": lambda rig: rig.control.minter.mint("s1", [(1, 65535)], 60, PROXY),
    "another microVM's": lambda rig: rig.control.minter.mint("s2", [], 60, SHELL),
    "of last week": lambda rig: rig.control.minter.mint("s1", [], -7 * 86_400, SHELL),
    "cut short": lambda rig: rig.control.minter.mint("s1", [], 60, SHELL)[:-2],
}  # fmt: skip


@pytest.mark.parametrize("token", ATTACKS)
async def test_a_shell_needs_its_own_token(rig: Rig, token: str) -> None:
    one = await rig.running("s1")
    edge, _ = await joined(rig)
    with pytest.raises(RpcError) as refused:
        await edge.call_with_descriptors("shell", m.ShellRequest("s1", one.incarnation, 80, 24, ATTACKS[token](rig)))
    assert refused.value.kind == "NotAllowed"
    assert not rig.control.lifecycle.agent(one).shells.count
    edge.close()


@pytest.mark.parametrize("expired_seconds", [-60, 10])
async def test_with_its_token_it_opens(rig: Rig, expired_seconds: int) -> None:
    """Also where that has expired while the request was held."""
    one = await rig.running("s1")
    edge, _ = await joined(rig)
    token = rig.control.minter.mint("s1", [], -expired_seconds, SHELL)
    _, descriptors = await edge.call_with_descriptors("shell", m.ShellRequest("s1", one.incarnation, 80, 24, token))
    assert len(descriptors) == 1 and rig.control.lifecycle.agent(one).shells.count == 1
    os.close(descriptors[0])
    edge.close()


async def test_without_controls_look_any_edge_is_root_in_any_microvm(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Control, "_check_shell", lambda self, body: None)
    one = await rig.running("s1")
    edge, _ = await joined(rig)
    _, descriptors = await edge.call_with_descriptors("shell", m.ShellRequest("s1", one.incarnation, 80, 24, ""))
    assert rig.control.lifecycle.agent(one).shells.count == 1
    os.close(descriptors[0])
    edge.close()


async def test_keys_that_are_rotated_still_open(rig: Rig) -> None:
    one = await rig.running("s1")
    edge, _ = await joined(rig)
    before = rig.control.minter.mint("s1", [], 60, SHELL)
    rig.control.minter._clock = lambda: time.time() + 31 * 86_400
    await rig.control.rotate_keys()
    rig.control.minter._clock = time.time
    for token in (before, rig.control.minter.mint("s1", [], 60, SHELL)):
        _, descriptors = await edge.call_with_descriptors("shell", m.ShellRequest("s1", one.incarnation, 80, 24, token))
        os.close(descriptors[0])
    edge.close()


def test_request_ids_say_nothing_of_other_requests() -> None:
    """The attacker asks, waits and asks again: by a counter the difference is what the others made, by ours it is noise."""
    quiet, busy = Counters(None), Counters(None)
    differences = []
    for counters, others in ((quiet, 0), (busy, 500)):
        first = int(counters.request_id().rpartition(b"-")[2], 16)
        for _ in range(others):
            counters.request_id()
        differences.append(abs(int(counters.request_id().rpartition(b"-")[2], 16) - first))
    assert all(difference > 100_000 for difference in differences), "a difference this small has one chance in a thousand million"
    ids = {counters.request_id() for _ in range(100_000)}
    assert len(ids) == 100_000
