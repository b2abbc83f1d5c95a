"""When an application is taken to have started, what the build's log says of it, and how what listens in a guest is told."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from gateway import reach
from gateway.config import Images
from gateway.images import readiness
from gateway.images.readiness import Readiness
from gateway.messages import Effort
from gateway.sessions.agent import Agent, AgentError, frame
from gateway.sessions.listeners import in_words, parse
from vmm import syscalls


class Host:
    """A guest that is this machine; its processors rest."""

    async def socket(self, session: str, incarnation: int) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        return sock

    async def effort(self, session: str, incarnation: int) -> Effort:
        return Effort(0.0, 0.0, 0)


class Guest:
    def __init__(self, *listeners: tuple[str, int]) -> None:
        self.found = list(listeners)

    async def listeners(self, seconds: float) -> list[tuple[str, int]]:
        if not self.found:
            raise AgentError("an older guest")
        return self.found


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Readiness, list[str]]]:
    monkeypatch.setattr(reach, "GUEST_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(readiness, "_QUIET_STEP_SECONDS", 0.01)
    monkeypatch.setattr(readiness, "_POLL_SECONDS", 0.01)

    def one(guest: Guest, **settings: Any) -> tuple[Readiness, list[str]]:
        said: list[str] = []
        return Readiness(Host(), Images(settle_seconds=0.01, **settings), guest, "s", said.append), said  # type: ignore[arg-type]

    return one


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


async def test_all_exposed_ports_are_waited_for(make: Any) -> None:
    first, second = ports = free_ports(2)
    one, said = make(Guest())
    task = asyncio.create_task(one.wait(ports))
    with socket.create_server(("127.0.0.1", first)):
        await asyncio.sleep(0.1)
        assert not task.done(), "one of two is not all"
        with socket.create_server(("127.0.0.1", second)):
            async with asyncio.timeout(5):
                await task
    waiting, done = said
    assert waiting.startswith(f"waiting for EXPOSEd ports {first}, {second} to listen, 120 s at most (images.start_seconds)")
    assert "a ready hook (hooks.microvmImageHooks.ready)" in waiting
    assert done.startswith(f"ports {first}, {second} listen after ")


async def test_what_does_not_listen_in_time_is_in_the_log(make: Any) -> None:
    first, second = free_ports(2)
    one, said = make(Guest(("0.0.0.0", first), ("10.0.0.1", 5173)), start_seconds=0.2)
    with socket.create_server(("127.0.0.1", first)):
        await one.wait([first, second])
    low, high = sorted([f"{first}", "10.0.0.1:5173"], key=lambda name: int(name.rpartition(":")[2]))
    nothing = f"nothing listens on EXPOSEd port {second} after 0.2 s; {low} and {high} do. The snapshot is taken all the same"
    assert said[-1].startswith(nothing) and "edge.hold_seconds" in said[-1]


async def test_a_range_of_ports_takes_no_longer_than_one(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXPOSE 20000-65535: each of them was asked before the time was looked at, and each was named in every line."""
    asked: list[int] = []

    async def refused(take: Any, port: int) -> socket.socket:
        asked.append(port)
        raise ConnectionRefusedError

    monkeypatch.setattr(readiness, "reach", refused)
    one, said = make(Guest(("0.0.0.0", 80)), start_seconds=0.05)
    await one.wait(list(range(20000, 65536)))
    assert len(asked) < 500 and max(map(len, said)) < 500
    named = ", ".join(map(str, range(20000, 20008)))
    assert said[-1].startswith(f"nothing listens on EXPOSEd ports {named} and 45528 more after 0.05 s; 80 does")


async def test_a_guest_that_does_not_say_what_listens(make: Any) -> None:
    (port,) = free_ports(1)
    one, said = make(Guest(), start_seconds=0.05)
    await one.wait([port])
    assert said[-1].startswith(f"nothing listens on EXPOSEd port {port} after 0.05 s. The snapshot")


async def test_no_port_and_no_hook_is_said(make: Any) -> None:
    one, said = make(Guest())
    await one.wait([])
    (line,) = said
    assert line.startswith("no TCP port is EXPOSEd: the snapshot is taken when the application's processors rest") and "ready hook" in line


# ---- on a host that is busy, or slow ----


class Busy:
    """A guest whose every half second is scripted: processor time, time that it waits for one, bytes read. The last goes on for ever."""

    def __init__(self, *steps: tuple[float, float, int]) -> None:
        self.steps = list(steps)
        self.now = 0.0
        self.effort_so_far = Effort(0.0, 0.0, 0)

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        share = seconds / 0.5
        used, waited, read = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        so_far = self.effort_so_far
        self.effort_so_far = Effort(
            so_far.cpu_seconds + used * share, so_far.waited_seconds + waited * share, so_far.read_bytes + int(read * share)
        )

    async def effort(self, session: str, incarnation: int) -> Effort:
        return self.effort_so_far

    async def socket(self, session: str, incarnation: int) -> socket.socket:
        raise OSError("refused")

    async def ready(self, *ports: int, **settings: Any) -> tuple[float, list[str]]:
        """When, on its clock; and what was said."""
        said: list[str] = []
        one = Readiness(
            self, Images(settle_seconds=1.0, **settings), Guest(), "s", said.append, self.clock, self.sleep  # type: ignore[arg-type]
        )  # fmt: skip
        await one.wait(list(ports))
        return self.now, said


RESTS = (0.01, 0.0, 0)


@pytest.mark.parametrize(
    ("steps", "at"),
    [
        ([RESTS], 1.0),
        ([(0.5, 0.0, 0)] * 6 + [RESTS], 3.5),
        ([(0.02, 0.48, 0)] * 40 + [RESTS], 20.5),  # starved: it uses little, and does not rest
        ([(0.04, 0.96, 0)] * 10 + [RESTS], 5.5),  # two processors that wait
        ([(0.01, 0.0, 1 << 20)] * 10 + [RESTS], 5.5),  # it is loaded from a slow disk
        ([(0.01, 0.08, 0)], 1.0),  # at rest on a busy host: it wakes now and then, and waits for its moment
        ([(0.01, 0.0, 4096)], 1.0),
    ],
)
async def test_a_guest_that_waits_for_the_host_does_not_rest(steps: list[tuple[float, float, int]], at: float) -> None:
    took, _ = await Busy(*steps).ready()
    assert at <= took <= at + 1.0


async def test_an_application_that_never_rests_has_a_minute_of_its_own_time() -> None:
    assert (await Busy((0.5, 0.0, 0)).ready())[0] == 60.0
    assert (await Busy((0.25, 0.25, 0)).ready())[0] == pytest.approx(120.0, abs=1.0)
    assert (await Busy((0.0, 0.5, 0)).ready())[0] == pytest.approx(240.0, abs=1.0), "four times as long at most"
    assert (await Busy((0.5, 0.0, 0)).ready(start_seconds=20.0))[0] == 20.0


async def test_ports_are_waited_for_in_the_guests_own_time() -> None:
    _, said = await Busy((0.5, 0.0, 0)).ready(8080, start_seconds=10.0)
    assert said[-1].startswith("nothing listens on EXPOSEd port 8080 after 10 s. The snapshot")
    _, said = await Busy((0.25, 0.25, 0)).ready(8080, start_seconds=10.0)
    assert said[-1].startswith("nothing listens on EXPOSEd port 8080 after 10 s (it had 10 s of 20: the host is busy). The snapshot")


def test_what_a_process_waited_for_is_read_of_the_kernel() -> None:
    assert syscalls.waited_seconds(os.getpid()) > 0 == syscalls.waited_seconds(1 << 30)
    assert syscalls.read_bytes(os.getpid()) >= 0 == syscalls.read_bytes(1 << 30)


# ---- what listens ----


def entry(family: int, port: int, address: str) -> bytes:
    raw = socket.inet_pton(socket.AF_INET if family == 4 else socket.AF_INET6, address)
    return struct.pack("<HH16s", family, port, raw)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], ", on no other port either"),
        ([(4, 3000, "0.0.0.0")], "; 3000 does"),
        ([(4, 3000, "127.0.0.1"), (6, 3000, "::"), (6, 5173, "::1")], "; 3000 and 5173 do"),
        ([(6, 80, "::ffff:127.0.0.1"), (4, 81, "10.0.0.1"), (6, 82, "fe80::1")], "; 80, 10.0.0.1:81 and [fe80::1]:82 do"),
        ([(4, port, "0.0.0.0") for port in range(1, 21)], "; 1, 2, 3, 4, 5, 6, 7, 8 and 12 more do"),
    ],
)
def test_listeners_in_words(found: list[tuple[int, int, str]], words: str) -> None:
    assert in_words(parse(b"".join(entry(*one) for one in found) + b"rest")) == words


async def test_an_agent_is_asked_what_listens() -> None:
    ours, guest = socket.socketpair()
    with guest:
        agent = Agent(ours.detach(), lambda channel, data: None, lambda code: None)
        asked = asyncio.create_task(agent.listeners(5))
        await asyncio.sleep(0)
        order = guest.recv(1 << 12)
        assert order[4] == 0x0C
        guest.sendall(frame(0x89, order[-8:] + entry(4, 8080, "0.0.0.0")))
        assert await asked == [("0.0.0.0", 8080)]
        with pytest.raises(AgentError, match=r"did not answer in 0\.01 s"):
            await agent.listeners(0.01)
        assert not agent._nonces, "an order that is not answered is forgotten"
        agent.close()
