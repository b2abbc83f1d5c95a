"""What is kept of sessions that came, slept, woke and went: nothing but caches, and records, which are bounded."""

from __future__ import annotations

import time
import uuid
from collections import deque
from pathlib import Path

from api_rig import PLAIN, ApiRig
from edge_rig import Rig
from waiting import until

from gateway import messages as m
from gateway.sessions.model import IdlePolicy, Session
from gateway.sessions.states import Event as SessionEvent
from gateway.sessions.states import State
from gateway.sessions.timers import Deadline


def kept(rig: Rig) -> dict[str, int]:
    """How much each of the worker's tables holds that has something for each session."""
    worker = rig.worker
    found = {}
    for owner in (worker.routes, worker.link, worker.upstream, worker.parking, worker.holds, worker.link._faults):
        kind = type(owner)
        for name in getattr(kind, "__mypyc_attrs__", None) or getattr(kind, "__slots__", None) or vars(owner):
            table = getattr(owner, name, None)
            if isinstance(table, dict | set | list) and name not in ("_misses", "_counted", "_contexts"):
                found[f"{kind.__name__}.{name}"] = len(table)
    return found


async def live(rig: Rig, number: int) -> None:
    (connection,) = rig.control.connections
    session, host = f"microvm-{uuid.UUID(int=number)}", f"{uuid.UUID(int=number)}.lambda-microvm.us-east-1.localhost"

    async def change(gate: str, incarnation: int, name: str = session, is_live: bool = True) -> None:
        await connection.call("route", m.Route(host, name, incarnation, gate, is_live))

    token = rig.minter.mint(session, [(1, 65535)], 600)
    for incarnation in (1, 2):
        await change("open", incarnation)
        fields = f"Host: {host}\r\nX-aws-proxy-auth: {token}\r\nX-aws-proxy-port: {rig.app_port}\r\n\r\n"
        ((status, _, _),) = await rig.ask(f"GET / HTTP/1.1\r\n{fields}".encode())
        assert status == 200
        await connection.call("gate", m.Route(host, session, incarnation, "hold"), m.GateAnswer)
        await connection.call("drain", m.DrainRequest(session, incarnation, 0.0, True), m.Drained)
    await change("refuse", 2, is_live=False)
    await change("refuse", 0, name="", is_live=False)
    # Control may still ask, of a session that ended meanwhile.
    await connection.call("drain", m.DrainRequest(session, 2, 0.0, True), m.Drained)


async def test_an_edge_keeps_nothing_of_sessions_that_went(rig: Rig) -> None:
    await live(rig, 1)
    await until(lambda: bool(kept(rig)["Upstream._incarnations"]))  # the rig's own session is prepared for
    rig.worker.link.report()
    before = kept(rig)
    assert len(before) > 10 and before["RouteTable._entries"] == 1
    for number in range(2, 12):
        await live(rig, number)
    rig.worker.link.report()
    after = kept(rig)
    assert after == before


# ---- control ----

# What grows to a bound of its own: so many client tokens, streams whose end is known, deadlines that were cleared (a quarter of the heap counts).
_BOUNDED = ("client_tokens", "_tails", "_heap", "calls", "guests", "stored", "_named", "records", "free_calls")


def tables(root: object) -> dict[str, int]:
    """How much each table holds of the objects of control that can be reached from `root`."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(owner: object, path: str) -> None:
        if id(owner) in seen or not type(owner).__module__.startswith("gateway."):
            return
        seen.add(id(owner))
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, dict | set | list | deque) and name not in _BOUNDED:
                found[f"{path}.{name}"] = len(value)
            walk(value, f"{path}.{name}")

    walk(root, "control")
    return found


def test_control_keeps_nothing_of_sessions_that_went(tmp_path: Path) -> None:
    api = ApiRig(tmp_path)
    try:
        api.image("plain")
        api.do(_come_and_go(api, 2))
        before = tables(api.lifecycle) | tables(api.registry) | tables(api.store)
        api.do(_come_and_go(api, 8))
        assert tables(api.lifecycle) | tables(api.registry) | tables(api.store) == before and len(before) > 20
    finally:
        api.close()


async def _come_and_go(api: ApiRig, count: int) -> None:
    lifecycle, store = api.lifecycle, api.store
    for number in range(count):
        one = Session(
            f"microvm-{uuid.uuid4()}", f"{number}.host", PLAIN, "1.0", "key", 512, time.time(), 3600, log_group="g", log_stream=f"{number}",
            idle_policy=IdlePolicy(600, 600, True),
        )  # fmt: skip
        store.put_session(one)
        lifecycle.launch(one)
        await lifecycle.quiet()
        for event in (SessionEvent.SUSPEND, SessionEvent.RESUME, SessionEvent.TERMINATE):
            await lifecycle.fire(one, event)
            await lifecycle.quiet()
        assert one.state is State.TERMINATED
        assert lifecycle.timers.is_set(one, Deadline.PURGE)
        lifecycle.timers.clear(one, Deadline.PURGE)  # as when its time has come
        lifecycle._due(Deadline.PURGE, one.id)
        await lifecycle.quiet()
