"""Requests to an application that has not listened yet: they are held within their deadline, and one of them asks for all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import Rig
from waiting import until

from gateway import messages as m
from gateway.messages import NOTHING_LISTENS


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


async def close(rig: Rig) -> None:
    rig.application.close()
    await rig.application.wait_closed()


async def listen(rig: Rig) -> None:
    rig.application = await asyncio.start_server(rig._application, "127.0.0.1", rig.app_port)


async def ask(rig: Rig) -> int:
    ((status, _, _),) = await rig.ask(rig.request())
    return status


async def test_a_request_before_the_first_listen_is_held(rig: Rig) -> None:
    await rig.start(connect_seconds=0.05)
    await close(rig)
    asked = [asyncio.create_task(ask(rig)) for _ in range(20)]
    await until(lambda: rig.worker.upstream.pools() and rig.worker.upstream.pools()[0].asking.locked())
    await asyncio.sleep(0.1)  # longer than connect_seconds: what was refused then would be answered by now
    assert not any(one.done() for one in asked)
    await listen(rig)
    assert await asyncio.gather(*asked) == [200] * 20


async def test_it_is_held_no_longer_than_any_other(rig: Rig) -> None:
    await rig.start(connect_seconds=0.05, hold_seconds=0.3)
    await close(rig)
    started = time.monotonic()
    assert await asyncio.gather(*(ask(rig) for _ in range(80))) == [502] * 80
    assert 0.3 <= time.monotonic() - started < 2
    assert (await rig.control.fault()).startswith(f"s1 port {rig.app_port}: {NOTHING_LISTENS}")
    (pool,) = rig.worker.upstream.pools()
    assert pool.connecting == pool.waiting == 0 and not pool.asking.locked()


async def test_an_application_that_has_listened_is_just_down(rig: Rig) -> None:
    """For requests that come with its connection gone, and for those that its end cut off."""
    await rig.start(connect_seconds=0.05)
    assert await ask(rig) == 200
    await close(rig)
    for _ in range(2):
        await until(lambda: not rig.worker.upstream.pools()[0].open or rig.worker.upstream.close_idle("s1", 1) is None)
        started = time.monotonic()
        assert await ask(rig) == 502
        assert time.monotonic() - started < 1
    assert (await rig.control.fault()).startswith(f"s1 port {rig.app_port}: {NOTHING_LISTENS}")


async def test_what_one_worker_has_seen_the_others_know(rig: Rig) -> None:
    await rig.start(connect_seconds=0.05)
    assert await ask(rig) == 200
    await until(lambda: rig.control.listened == [("s1", 1, rig.app_port)])
    await rig.control.change("open", incarnation=2)
    await close(rig)
    asked = asyncio.create_task(ask(rig))
    await until(lambda: any(pool.key[1] == 2 and pool.asking.locked() for pool in rig.worker.upstream.pools()))
    ports = m.Listened([("s1", 1, rig.app_port), ("s9", 2, 80), ("s1", 2, rig.app_port)])
    await rig.control.connections[0].call("listened", ports)
    started = time.monotonic()
    assert await asked == 502
    assert await ask(rig) == 502 and time.monotonic() - started < 2
    assert set(rig.worker.upstream._incarnations) == {("s1", 2)}, "nothing is kept of what does not run"


async def test_a_new_incarnation_may_be_starting_again(rig: Rig) -> None:
    await rig.start(connect_seconds=0.05)
    assert await ask(rig) == 200
    await close(rig)
    await rig.control.change("open", incarnation=2)
    asked = asyncio.create_task(ask(rig))
    await until(lambda: any(pool.key[1] == 2 and pool.asking.locked() for pool in rig.worker.upstream.pools()))
    await listen(rig)
    assert await asked == 200


@pytest.fixture
def dials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The port of each connection that is tried."""
    from gateway.edge.origin import upstream

    ports: list[int] = []
    reach = upstream.reach

    async def counted(take: Any, port: int) -> Any:
        ports.append(port)
        return await reach(take, port)

    monkeypatch.setattr(upstream, "reach", counted)
    return ports


async def test_one_request_asks_for_all(rig: Rig, dials: list[int]) -> None:
    """However many wait, the application that is starting is asked ten times a second, as by one."""
    await rig.start(connect_seconds=0.001, hold_seconds=0.5)
    await close(rig)
    assert await asyncio.gather(*(ask(rig) for _ in range(50))) == [502] * 50
    assert len(dials) <= 50 + 50 + 10, "one each before, one each at the end, and what one asked meanwhile"


async def test_a_scan_of_ports_asks_a_few_at_a_time(rig: Rig, dials: list[int]) -> None:
    await rig.start(connect_seconds=0.001, hold_seconds=0.5)
    own = str(rig.app_port).encode()
    requests = [rig.request().replace(b"proxy-port: " + own, b"proxy-port: %d" % port) for port in range(1, 61)]
    answers = await asyncio.gather(*(rig.ask(request) for request in requests))
    assert [status for ((status, _, _),) in answers] == [502] * 60
    assert len(dials) <= 2 * 60 + 8 * 10, "some at once and at the end, and meanwhile ten times a second of eight"
    assert await ask(rig) == 200
    assert not rig.worker.upstream.incarnation("s1", 1).askers.locked()


async def test_ports_on_which_nothing_has_listened_are_forgotten(rig: Rig) -> None:
    """A client may name any of 65,535, and each that is kept costs memory until the incarnation ends."""
    await rig.start(connect_seconds=0.001, hold_seconds=0.2)
    own = str(rig.app_port).encode()
    requests = [rig.request().replace(b"proxy-port: " + own, b"proxy-port: %d" % port) for port in range(1, 31)]
    asked = [asyncio.create_task(rig.ask(request)) for request in requests]
    await until(lambda: len(rig.worker.upstream.pools()) == 30)
    rig.worker.upstream.sweep(asyncio.get_running_loop().time())
    assert len(rig.worker.upstream.pools()) == 30, "those that somebody waits for"
    await asyncio.gather(*asked)
    assert await ask(rig) == 200
    rig.worker.upstream.sweep(asyncio.get_running_loop().time())
    assert [pool.key for pool in rig.worker.upstream.pools()] == [("s1", 1, rig.app_port)]
    assert rig.worker.upstream.incarnation("s1", 1).pools == {rig.app_port: rig.worker.upstream.pools()[0]}
    assert await ask(rig) == 200


@pytest.mark.parametrize("queued", [False, True])
async def test_bodies_that_wait_for_an_application_are_bounded_as_those_of_a_sleeping_session(rig: Rig, queued: bool) -> None:
    """Whether they ask for a connection that is refused yet, or stand in the queue for one."""
    await rig.start(connect_seconds=0.05, held_bytes=400_000)
    await close(rig)
    if queued:
        first = [asyncio.create_task(ask(rig)) for _ in range(64)]
        await until(lambda: rig.worker.upstream.pools() and rig.worker.upstream.pools()[0].connecting == 64)
    uploads = []
    for _ in range(10):
        reader, writer = await rig.open()
        writer.write(rig.request("/", "Content-Length: 200000", method="POST") + bytes(100_000))
        uploads.append((reader, writer))
    refused = [asyncio.create_task(reader.readline()) for reader, _ in uploads]
    await until(lambda: sum(one.done() for one in refused) >= 6)
    assert {one.result() for one in refused if one.done()} == {b"HTTP/1.1 429 Too Many Requests\r\n"}
    assert rig.worker.holds.statistics()["bytes"] <= 400_000
    await listen(rig)
    for _, writer in uploads:
        writer.transport.abort()
    if queued:
        assert await asyncio.gather(*first) == [200] * 64
    await until(lambda: rig.worker.holds.statistics() == {"sessions": 0, "requests": 0, "bytes": 0})
    for one in refused:
        one.cancel()


async def test_a_client_that_leaves_lets_another_ask(rig: Rig) -> None:
    await rig.start(connect_seconds=0.001)
    await close(rig)
    _, writer = await rig.open()
    writer.write(rig.request())
    await until(lambda: rig.worker.upstream.pools() and rig.worker.upstream.pools()[0].asking.locked())
    second = asyncio.create_task(ask(rig))
    await until(lambda: rig.worker.upstream.pools()[0].connecting == 2)
    writer.transport.abort()
    await until(lambda: rig.worker.upstream.pools()[0].connecting == 1)
    await listen(rig)
    assert await second == 200
    assert not rig.worker.upstream.pools()[0].asking.locked()


async def test_a_suspend_takes_them_along(rig: Rig) -> None:
    """They are held for the next incarnation, and answered there."""
    await rig.start(connect_seconds=0.001)
    await close(rig)
    asked = [asyncio.create_task(ask(rig)) for _ in range(5)]
    await until(lambda: rig.worker.upstream.pools() and rig.worker.upstream.pools()[0].asking.locked())
    await rig.control.change("hold", is_live=False)
    await until(lambda: rig.worker.holds.statistics()["requests"] == 5)
    await listen(rig)
    await rig.control.change("open", incarnation=2)
    assert await asyncio.gather(*asked) == [200] * 5
