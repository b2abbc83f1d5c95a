"""Clients of all kinds at once: every request is answered, with what it asked for, and nothing stays behind when they have gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Control, Vmm
from load.clients import Http1Client, Request, Target
from load.content import digest
from load.mixed import Load
from service import REPO

from gateway.config import Edge, Settings
from gateway.instance import make_certificates
from gateway.rpc import Server, Service
from gateway.tokens import Minter

SECONDS = float(os.environ.get("MIXED_LOAD_SECONDS", "600"))
ROUNDS = 6
SETTLE_SECONDS = 20.0
# A worker that has worked for a round keeps some memory for the next; what it keeps grows with no round.
GROWTH_KIB = 24 << 10
# Few enough to be met: connections are refused, requests are refused, answers wait.
LIMITS = Edge(limits="custom", workers=1, limit_connections=12, limit_requests_per_second=150, limit_bytes_per_second=40_000_000)


@dataclass
class Running:
    """A worker's process, and a load on it."""

    process: asyncio.subprocess.Process
    load: Load

    async def condition(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"\n")
        async with asyncio.timeout(10):
            return dict(json.loads(await self.process.stdout.readline()))

    async def settled(self) -> dict[str, Any]:
        """Its condition when nothing is under way any more, which must be soon."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while not is_at_rest(seen := await self.condition()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"not at rest after {SETTLE_SECONDS:g} s: {seen}")
        return seen

    async def use_all_idle(self) -> None:
        """As many requests at once as there are idle connections to the application: each of them serves one."""
        clients = [Http1Client(self.load.target) for _ in range(min(8, (await self.condition())["idle"]))]
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(one.ask(Request("/content?seed=1&size=1&pause_ms=200")) for one in clients))
        assert [(answer.status, answer.digest) for answer in answers] == [(200, digest(1, 1))] * len(clients)
        for one in clients:
            one.close()


def is_at_rest(condition: dict[str, Any]) -> bool:
    return not any(condition[name] for name in ("waiting", "held", "clients", "busy", "queued"))


@contextlib.asynccontextmanager
async def child(*command: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A program that says its port when it listens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=REPO
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = int(await process.stdout.readline())
        yield process, port
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def loads(directory: Path, seed: int) -> AsyncIterator[list[Running]]:
    """A worker without limits and one with, in front of the same two applications, and a load for each."""
    settings = Settings(root=directory)
    settings.tls_dir.mkdir(parents=True)
    make_certificates(settings)
    minter = Minter(directory / "keys")
    users = {os.getuid()}
    servers = [
        Server(directory / "control.sock", Service(Control(minter)), users), Server(directory / "vmm.sock", Service(Vmm()), users),
    ]  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        ports = [(await stack.enter_async_context(child(f"tests/load/{name}.py")))[1] for name in ("application", "application2")]
        token = {"X-aws-proxy-auth": minter.mint("s1", [(1, 65535)], 36_000)}
        first, second = (token | {"X-aws-proxy-port": str(one)} for one in ports)
        second |= {"X-aws-proxy-force-h2": "true"}
        running = []
        for limits in (Edge(), LIMITS):
            command = ("tests/load/worker.py", limits.model_dump_json(), str(directory))
            process, port = await stack.enter_async_context(child(*command))
            targets = [Target(port, HOST, fields, str(settings.tls_dir / "ca.crt")) for fields in (first, second)]
            running.append(Running(process, Load(targets[0], targets[1], seed, is_limited=limits is LIMITS)))
        try:
            yield running
        finally:
            for server in servers:
                server.close()


async def under_load(directory: Path, seconds: float, rounds: int, size_bits: int) -> list[Counter[str]]:
    """Rounds of load, each followed by rest, in which all is as before; what was asked, and how often, of each worker."""
    async with loads(directory, seed=int(os.environ.get("MIXED_LOAD_SEED", "1"))) as both:
        for one in both:
            one.load.size_bits = size_bits
        before = [await one.settled() for one in both]
        after: list[list[dict[str, Any]]] = [[], []]
        for _ in range(rounds):
            await asyncio.gather(*(one.load.run(seconds / rounds) for one in both))
            for one, seen in zip(both, after, strict=True):
                assert not one.load.faults, one.load.faults
                seen.append(await one.settled())
                assert not seen[-1]["idle_paused"], seen[-1]
                await one.use_all_idle()
                await one.settled()
        for start, seen in zip(before, after, strict=True):
            descriptors = [one["descriptors"] - one["idle"] - one["stock"] - one["shared"] for one in (start, *seen)]
            assert max(descriptors[1:]) <= descriptors[0] + 1, descriptors
            memory = [one["memory_kib"] for one in seen]
            assert memory[-1] - min(memory[: (rounds + 1) // 2]) < GROWTH_KIB, memory
        return [one.load.counts for one in both]


def check(free: Counter[str], limited: Counter[str], kinds: int) -> None:
    """The load was what it should be."""
    assert len(free) >= kinds and not free["429"], free
    assert limited["429"] and sum(limited.values()) > 2 * limited["429"], limited


# Not on uvloop, whose TLS loses what a paused reader has yet to read when the connection's end comes: the clients would be at fault.
@pytest.mark.service
def test_some_seconds_of_mixed_load_leave_nothing_behind(tmp_path: Path) -> None:
    free, limited = asyncio.run(under_load(tmp_path, 2, 1, 18))
    check(free, limited, 10)


@pytest.mark.long
def test_minutes_of_mixed_load_leave_nothing_behind(tmp_path: Path) -> None:
    free, limited = asyncio.run(under_load(tmp_path, SECONDS, ROUNDS, 24))
    check(free, limited, 20)
    print(f"\nwithout limits: {dict(free)}\nwith limits: {dict(limited)}")
