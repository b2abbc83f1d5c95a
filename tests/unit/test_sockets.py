"""The sockets of one incarnation: how many are kept, what is waited for, and who closes them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any

import pytest
from waiting import turns, until

from gateway.edge.origin.sockets import SessionGone, Sockets
from gateway.messages import SocketsRequest
from gateway.rpc import RpcError


class Vmm:
    """Gives as many sockets as it is asked for, when it may."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.calls = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fault: Exception | None = None

    async def call_with_descriptors(self, method: str, body: SocketsRequest, timeout: float) -> tuple[None, list[int]]:
        assert method == "sockets"
        self.calls += 1
        await self.may_answer.wait()
        if self.fault is not None:
            raise self.fault
        made = [socket.socket().detach() for _ in range(body.count)]
        self.given += made
        return None, made


def is_open(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


def sockets(vmm: Any) -> Sockets:
    return Sockets(vmm, "s1", 1)


async def test_more_are_fetched_before_the_last_is_gone() -> None:
    vmm = Vmm()
    stock = sockets(vmm)
    taken = [await stock.take() for _ in range(6)]
    assert vmm.calls == 1 and len(stock) == 2
    taken.append(await stock.take())
    await until(lambda: vmm.calls == 2 and len(stock) == 9)
    stock.close()
    assert len(set(taken)) == 7 and all(is_open(sock.fileno()) for sock in taken), "whoever took one closes it"
    numbers = {sock.fileno() for sock in taken}
    assert not any(is_open(descriptor) for descriptor in vmm.given if descriptor not in numbers)
    for sock in taken:
        sock.close()


async def test_requests_that_wait_share_one_fetch() -> None:
    vmm = Vmm()
    vmm.may_answer.clear()
    stock = sockets(vmm)
    waiting = [asyncio.create_task(stock.take()) for _ in range(5)]
    await turns()
    waiting.pop().cancel()  # its client has left; the others' fetch goes on
    await turns()
    vmm.may_answer.set()
    for sock in await asyncio.gather(*waiting):
        sock.close()
    assert vmm.calls == 1
    stock.close()


async def test_what_comes_for_an_incarnation_that_has_ended_is_closed() -> None:
    vmm = Vmm()
    vmm.may_answer.clear()
    stock = sockets(vmm)
    waiting = asyncio.create_task(stock.take())
    await turns()
    stock.close()
    vmm.may_answer.set()
    with pytest.raises(SessionGone):
        await waiting
    assert len(vmm.given) == 8 and not any(map(is_open, vmm.given))
    with pytest.raises(SessionGone):
        await stock.take()
    assert vmm.calls == 1


@pytest.mark.parametrize(("kind", "raised"), [("Ended", SessionGone), ("Unavailable", OSError)])
async def test_what_vmm_says_is_told_apart(kind: str, raised: type[Exception]) -> None:
    vmm = Vmm()
    vmm.fault = RpcError(kind, "no")
    stock = sockets(vmm)
    with pytest.raises(raised, match="no" if raised is SessionGone else None):
        await stock.take()
    vmm.fault = None
    (await stock.take()).close()  # and is asked again the next time
    stock.close()


async def test_a_worker_that_ends_waits_for_no_fetch() -> None:
    vmm = Vmm()
    vmm.may_answer.clear()
    stock = sockets(vmm)
    stock.prefetch()
    await turns()
    assert vmm.calls == 1
    stock.abort()
    await turns()
    vmm.may_answer.set()
    await turns()
    assert not vmm.given and not len(stock)
