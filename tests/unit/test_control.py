"""Control as its workers and root meet it, over real sockets, with a host that a test scripts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sqlite3
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scripted_host import ScriptedHost, no_services
from waiting import turns, until

from gateway import control as module
from gateway import messages as m
from gateway.config import Settings
from gateway.control import Control, every
from gateway.observe import metrics
from gateway.rpc import Connection, RpcError, Server, Service, connect
from gateway.sessions.agent import frame
from gateway.sessions.model import Archived, IdlePolicy, Session
from gateway.sessions.states import State
from gateway.tokens import SHELL

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"


class Rig:
    def __init__(self, directory: Path) -> None:
        self.settings = Settings(root=directory / "root", run=directory / "run", suspend={"workers_seconds": 0.0})  # type: ignore[arg-type]
        self.settings.control_dir.mkdir(parents=True)
        self.settings.control_runtime.mkdir(parents=True)
        (self.settings.control_dir / "access-keys.json").write_text(json.dumps({"AKIAEXAMPLE": "secret"}))
        self.host = ScriptedHost()
        self.left = 0

    async def start(self) -> None:
        self.control = Control(self.settings)
        host = self.control.lifecycle.host

        async def leave() -> None:
            self.left += 1

        async def traces(session: str) -> list[m.Trace]:
            return []

        for name in (
            "state",
            "warm",
            "prepare",
            "start",
            "suspend",
            "release_vm",
            "kill",
            "forget",
            "free",
            "reclaim_capacity",
            "services",
            "claim",
            "agent",
            "quarantine",
            "marks",
            "mark",
        ):
            setattr(host, name, getattr(self.host, name))
        host.leave, host.traces = leave, traces  # type: ignore[method-assign]
        self.control.lifecycle.channels._open_services = no_services  # type: ignore[assignment]
        await self.control.recover()
        self.server = Server(self.settings.control_socket, Service(self.control), {os.getuid()})

    async def stop(self) -> None:
        self.server.close()
        self.control.vmm.close()
        await self.control.lifecycle.close()
        await self.control.store.close()
        self.control.audit.close()
        for guest in self.host.guests:
            guest.close()

    def session(self, name: str, **changes: Any) -> Session:
        one = Session(name, f"host-{name}", ARN, "1.0", "image", 512, 2e9, 3600, idle_policy=IdlePolicy(600, 600, True), **changes)
        self.control.store.put_session(one)
        self.control.routes.publish(one)
        return one

    async def running(self, name: str) -> Session:
        one = self.session(name)
        self.control.lifecycle.launch(one)
        await self.control.lifecycle.quiet()
        assert one.state is State.RUNNING
        return one


class Worker:
    """A worker's connection: what it is told."""

    def __init__(self) -> None:
        self.routes: list[m.Route] = []
        self.keys: list[m.KeySet] = []
        self.listened: list[m.Listened] = []

    async def rpc_route(self, connection: Connection, body: m.Route) -> None:
        self.routes.append(body)

    async def rpc_tokens(self, connection: Connection, body: m.KeySet) -> bool:
        self.keys.append(body)
        return True

    async def rpc_listened(self, connection: Connection, body: m.Listened) -> None:
        self.listened.append(body)

    async def rpc_gate(self, connection: Connection, body: m.Route) -> m.GateAnswer:
        self.routes.append(body)
        return m.GateAnswer(0, 0, True)

    async def rpc_drain(self, connection: Connection, body: m.DrainRequest) -> m.Drained:
        return m.Drained()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    one = Rig(tmp_path)
    await one.start()
    yield one
    await one.stop()


async def joined(rig: Rig, name: str = "edge-0", worker: Worker | None = None) -> tuple[Connection, m.Table]:
    connection = await connect(rig.settings.control_socket, Service(worker or Worker()))
    return connection, await connection.call("hello", m.Hello(name), m.Table)


async def test_a_worker_takes_the_table_and_then_every_change(rig: Rig) -> None:
    one = rig.session("s1", state=State.SUSPENDED, incarnation=1)
    worker = Worker()
    connection, table = await joined(rig, worker=worker)
    assert [route.session for route in table.routes] == ["s1"] and table.keys == rig.control.minter.verifiers()
    one.state = State.TERMINATING
    rig.control.routes.publish(one)
    assert await connection.call("lookup", m.LookupRequest("host-s1"), m.Route | None) == rig.control.routes.find("host-s1")
    assert [route.gate for route in worker.routes] == ["refuse"]
    assert await connection.call("lookup", m.LookupRequest("unknown"), m.Route | None) is None
    connection.close()


async def test_what_one_worker_has_heard_the_others_are_told(rig: Rig) -> None:
    one, other = Worker(), Worker()
    first, _ = await joined(rig, worker=one)
    second, _ = await joined(rig, "edge-1", other)
    ports = m.Listened([("s1", 1, 8080)])
    await first.call("listened", ports)
    await second.call("lookup", m.LookupRequest("unknown"), m.Route | None)  # is answered after what was sent before
    assert one.listened == [] and other.listened == [ports]
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("says", "line"),
    [
        (frame(0x89, bytes(8) + struct.pack("<HH16s", 4, 3000, bytes(16))), "torpor: port 80: nothing listens; 3000 does"),
        (frame(0x89, bytes(8)), "torpor: port 80: nothing listens, on no other port either"),
        (b"", "torpor: port 80: nothing listens"),
    ],
)
async def test_a_line_says_what_listens_instead(rig: Rig, monkeypatch: pytest.MonkeyPatch, says: bytes, line: str) -> None:
    monkeypatch.setattr(module, "_LISTENERS_SECONDS", 0.2)
    one = await rig.running("s1")
    guest = rig.host.guests[-1]
    guest.setblocking(False)
    worker, _ = await joined(rig)
    worker.notify("faults", m.Faults({"s1": ["port 81: the connect took too long", "port 80: nothing listens"], "gone": ["x"]}))
    asked = b""
    while len(asked) < 20 or asked[-16] != 0x0C:  # the order, and its nonce
        asked += await asyncio.get_running_loop().sock_recv(guest, 1 << 12)
    worker.notify("faults", m.Faults({"s1": ["port 80: nothing listens (3 more in 10 s)"]}))
    if says:
        guest.sendall(says[:12] + asked[-8:] + says[20:])
    await until(lambda: len(rig.control.faults.read(one, 0).lines) == 3)
    assert line in [written.text for written in rig.control.faults.read(one, 0).lines]
    worker.close()


async def test_a_held_request_resumes_its_session(rig: Rig) -> None:
    one = await rig.running("s1")
    worker = Worker()
    connection, _ = await joined(rig, worker=worker)
    await rig.control.lifecycle.fire(one, module.Event.SUSPEND)
    await rig.control.lifecycle.quiet()
    for session, incarnation in (("unknown", 1), ("s1", 0)):  # what is out of date resumes nothing
        await connection.call("resume", m.ResumeRequest(session, incarnation))
    assert one.state is State.SUSPENDED
    await connection.call("resume", m.ResumeRequest("s1", 1))
    await rig.control.lifecycle.quiet()
    assert one.state is State.RUNNING and one.incarnation == 2
    await until(lambda: worker.routes[-1].gate == "open")
    connection.close()


async def test_two_processes_of_one_slot_are_two_workers(rig: Rig) -> None:
    """A worker that is being replaced drains while its successor serves."""
    one = await rig.running("s1")
    old, _ = await joined(rig)
    new, _ = await joined(rig)
    counts = metrics.edge_answers.labels("HTTP/1.1", "2xx")
    before = counts._value.get()
    for connection, answered, count in ((old, 100, 7), (new, 1, 2), (old, 101, 8)):
        await connection.call("counters", m.Counters({"HTTP/1.1": [0, 0, answered]}, 0, 0, {}))
        await connection.call("activity", m.Activity({one.id: (count, 0.0, 0), "unknown": (1, 0.0, 0)}))
    assert counts._value.get() - before == 102
    assert sorted(rig.control.lifecycle.liveness.counts(one.id).values()) == [2, 8]
    old.close()
    await until(lambda: len(rig.control.lifecycle.liveness.counts(one.id)) == 1)
    assert list(rig.control.lifecycle.liveness.counts(one.id).values()) == [2]
    new.close()


async def test_refusals_say_what_they_are(rig: Rig) -> None:
    connection, _ = await joined(rig)
    for method, body, kind in (
        ("traces", m.SessionName("unknown"), "NotFound"), ("microvm_log", m.LogRequest("unknown", 0), "NotFound"),
        ("shell", m.ShellRequest("unknown", 1, 80, 24, rig.control.minter.mint("unknown", [], 60, SHELL)), "AgentError"),
    ):  # fmt: skip
        with pytest.raises(RpcError) as refused:
            await connection.call(method, body)
        assert refused.value.kind == kind
    connection.close()


async def test_where_sleepers_are(rig: Rig) -> None:
    for name in ("warm", "cold"):
        rig.session(name, state=State.SUSPENDED, incarnation=1, snapshot_bytes=10)
    rig.session("archived", state=State.SUSPENDED, incarnation=1, archived=Archived("key", 5, "digest"))
    rig.session("awake", state=State.RUNNING, incarnation=1)
    rig.host.held["warm"] = m.SessionState("warm", 1, "warm", 77, 0.0)
    connection, _ = await joined(rig)
    tiers = await connection.call("tiers", None, dict[str, m.Tier])
    assert tiers == {"warm": m.Tier("warm", 77), "cold": m.Tier("cold", 10), "archived": m.Tier("archived", 5)}
    connection.close()


async def test_a_stop_suspends_what_runs_and_what_comes_to_run_meanwhile(rig: Rig) -> None:
    first = await rig.running("s1")
    late = rig.session("s2")
    rig.host.block["prepare"] = asyncio.Event()
    rig.control.lifecycle.launch(late)
    stop = asyncio.ensure_future(rig.control.suspend_all())
    await rig.host.reached["suspend"].wait()
    rig.host.block.pop("prepare").set()
    await stop
    assert first.state is late.state is State.SUSPENDED and rig.left == 1
    assert first.suspended_by == late.suspended_by == "stop"


async def test_a_request_that_comes_during_a_stop_wakes_nobody(rig: Rig) -> None:
    """It was woken once, ran on without a service, and was lost when its host stopped."""
    first, second = await rig.running("s1"), await rig.running("s2")
    connection, _ = await joined(rig)
    rig.host.block["leave"] = asyncio.Event()
    stop = asyncio.ensure_future(rig.control.suspend_all())
    await until(lambda: first.state is second.state is State.SUSPENDED)
    await connection.call("resume", m.ResumeRequest("s1", first.incarnation))
    rig.host.block.pop("leave").set()
    await stop
    await rig.control.lifecycle.quiet()
    assert first.state is second.state is State.SUSPENDED
    connection.close()


async def test_a_session_whose_suspend_cannot_be_stored_leaves_the_stop_to_the_others(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [await rig.running(name) for name in ("s1", "s2")]
    transaction, failed = rig.control.store._transaction, False

    def full_once(*arguments: Any) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise sqlite3.OperationalError("disk is full")
        transaction(*arguments)

    fire = rig.control.lifecycle.fire

    async def one_by_one(session: Session, *rest: Any) -> Any:
        if session is sessions[1]:
            await until(lambda: failed)
        return await fire(session, *rest)

    monkeypatch.setattr(rig.control.store, "_transaction", full_once)
    monkeypatch.setattr(rig.control.lifecycle, "fire", one_by_one)
    await rig.control.suspend_all()
    assert [one.state for one in sessions] == [State.RUNNING, State.SUSPENDED] and rig.left == 1


async def test_new_keys_reach_the_workers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.control.routes, "_expected", 1)
    worker = Worker()
    connection, table = await joined(rig, worker=worker)
    await rig.control.rotate_keys()
    await connection.call("lookup", m.LookupRequest("unknown"))
    assert worker.keys == []
    monkeypatch.setattr(rig.control.minter, "make_key_if_due", lambda: rig.control.minter.make_key() or True)
    await rig.control.rotate_keys()
    await connection.call("lookup", m.LookupRequest("unknown"))
    assert len(worker.keys) == 1 and len(worker.keys[0].keys) == len(table.keys) + 1
    connection.close()


async def test_without_all_workers_no_key_changes_and_no_token_is_said_to_be_revoked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is away would refuse what a new key signs, and takes what was revoked."""
    monkeypatch.setattr(rig.control.routes, "_expected", 2)
    connections = [(await joined(rig))[0]]
    minter = rig.control.minter
    before = minter.mint("s1", [(1, 1)], 60)
    with pytest.raises(RpcError, match="does not sign yet: edge workers are not connected"):
        await rig.control.rpc_tokens_rotate(connections[0], None)
    assert len(minter.verifiers()) == 2 and kid_of(minter.mint("s1", [(1, 1)], 60)) == kid_of(before)
    with pytest.raises(RpcError, match="edge workers are not connected and may take tokens"):
        await rig.control.rpc_tokens_revoke(connections[0], m.RevokeRequest(""))
    connections.append((await joined(rig, "edge-1"))[0])
    assert await rig.control.rpc_tokens_revoke(connections[0], m.RevokeRequest("")) > 0
    await rig.control.rotate_keys()
    assert kid_of(minter.mint("s1", [(1, 1)], 60)) == minter.verifiers()[-1].kid != kid_of(before)
    for connection in connections:
        connection.close()


def kid_of(token: str) -> str:
    header = token.partition(".")[0]
    return str(json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"])


async def test_what_background_work_raises_keeps_it_from_no_later_time() -> None:
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise OSError("disk is full")

    task = asyncio.ensure_future(every(0.0, work))
    await turns()
    assert times > 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_what_ended_while_vmm_was_away_is_known_when_it_is_back(rig: Rig) -> None:
    """Nobody told of it: the session counted as running, and refused every request, until somebody put it to sleep."""
    lost, kept, moved = [await rig.running(name) for name in ("s1", "s2", "s3")]
    del rig.host.held["s1"], rig.host.held["s3"]
    state, waits = rig.control.lifecycle.host.state, asyncio.Event()

    async def slow() -> m.HostState:
        await waits.wait()
        return await state()

    rig.control.lifecycle.host.state = slow  # type: ignore[method-assign]
    await rig.control._vmm_came(None)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    moved.incarnation += 1  # it has slept, and is awake again
    waits.set()
    await rig.control.lifecycle.quiet()
    assert lost.state is State.TERMINATED and lost.reason == "The hypervisor of the MicroVM stopped while its host was restarted."
    assert kept.state is State.RUNNING and moved.state is State.RUNNING


async def test_control_prunes_its_records_and_syncs_its_trail(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does the one every hour, the other every second."""
    store = rig.control.store
    days = rig.settings.store.events_days
    for age in (days + 1, days - 1):
        monkeypatch.setattr(store, "_clock", lambda age=age: time.time() - age * 86_400)
        store.add_event("s1", f"{age:g} days ago", "", "")
    monkeypatch.setattr(store, "_clock", time.time)
    await store.commit()
    await rig.control.prune()
    assert [row.event for row in await store.events("s1")] == [f"{days - 1:g} days ago"]
    rig.control.audit.write("RunMicrovm", "123456789012")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
    await rig.control.sync_audit()
    assert "audit.jsonl" in synced
