"""A standby that waits in a link of its own, as Firecracker's do: its session takes that link, or has one that the process is started in."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from vmm_rig import IMAGE, Machine, Rig

from gateway import messages as m
from vmm.errors import Unavailable


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    made = Rig(tmp_path, monkeypatch)
    made.host.takes_taps, made.host.network = False, made.network
    return made


async def run(rig: Rig, work: Coroutine[Any, Any, None]) -> None:
    (error,) = await rig.points.run(work)
    if isinstance(error, BaseException):
        raise error


def machine_of(rig: Rig, session: str) -> Machine:
    entry = rig.vmm.vms.get(session)
    assert entry is not None and isinstance(entry.machine, Machine)
    assert entry.link == entry.machine.waits_in, "its process is in another namespace than its session"
    return entry.machine


async def test_a_session_has_the_link_that_its_process_waited_in_and_no_other(rig: Rig) -> None:
    async def life() -> None:
        await rig.launch("a")
        assert machine_of(rig, "a").own_link is None
        assert len(rig.network.links) == 1
        await rig.sleep("a", 1)
        await rig.wake("a", 2)
        machine_of(rig, "a")
        assert len(rig.network.links) == 1
        await rig.forget(m.SessionName("a"))

    await run(rig, life())
    await rig.settled()
    assert rig.network.links == set() and rig.host.alive == set()


async def test_a_session_that_kept_its_link_gets_a_process_in_it(rig: Rig) -> None:
    async def life() -> None:
        await rig.launch("a")
        entry = rig.vmm.vms.get("a")
        assert entry is not None
        kept = entry.link
        await rig.suspend(m.SessionRef("a", 1))
        await rig.release_vm(m.ReleaseVmRequest("a", 1, False, True))
        assert rig.vmm.vms.kept_links == {"a": kept}
        await rig.wake("a", 2)
        assert machine_of(rig, "a").waits_in == kept and rig.network.links == {kept.path}

    await run(rig, life())


async def test_a_load_that_fails_leaves_neither_a_process_nor_a_link(rig: Rig) -> None:
    async def fails() -> None:
        rig.host.failing["load"] = 2
        with pytest.raises((Unavailable, OSError)):
            await rig.prepare(m.PrepareRequest("a", 1, IMAGE, False))

    await run(rig, fails())
    assert rig.network.links == set() and rig.host.alive == set()


async def test_a_standby_that_nobody_takes_gives_its_link_back(rig: Rig) -> None:
    async def dropped() -> None:
        machine = await rig.host.standby(Path(IMAGE))
        assert len(rig.network.links) == 1
        await machine.kill()

    await run(rig, dropped())
    assert rig.network.links == set()
