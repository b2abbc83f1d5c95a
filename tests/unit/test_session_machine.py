"""Random sequences of calls, requests, clock jumps, failures, restarts and kills against the session table, with a simulated host.

Whatever comes: no illegal transition, no session without an owner, nothing left on the host, and the event rows tell the state. No session
that has slept is deleted unless its user or its policy said so, and none wakes with another memory than its disk's.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from test_lifecycle import POLICY, Rig

from gateway import config
from gateway.messages import Ended
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import actions, host, timers
from gateway.sessions.model import Session
from gateway.sessions.quarantine import Quarantine, RecoverError
from gateway.sessions.recovery import recover
from gateway.sessions.states import CALLS, TABLE, Event, State

_PASSING = [RpcError("Unavailable", "no descriptor left"), RpcError("KindOfAnotherDay", "?"), ValueError("unexpected")]
_FAILURES = {
    "prepare": [*_PASSING, RpcLost("late"), RpcError("Refused", "made by another one"), RpcError("Damaged", "checksum")],
    "start": [*_PASSING, RpcLost("late"), RpcError("Damaged", "checksum")],
    "suspend": [*_PASSING, RpcLost("late"), RpcError("DiskFull", "full"), RpcError("Missing", "a diff")],
    "agent": [*_PASSING, RpcLost("late")],
    "unpause": [*_PASSING, RpcLost("late")],
    "kill": [*_PASSING, RpcLost("late")],
    "release_vm": _PASSING,
    "forget": [*_PASSING, RpcLost("late")],
    "quarantine": [*_PASSING, RpcLost("late")],
    "recover": [RpcError("Damaged", "still"), *_PASSING],
}
_LOST = ["prepare", "start", "suspend", "kill", "quarantine"]  # calls whose answer may be lost when they are done
# The user's word, the policy's, and the end of the application itself.
_WORDS = {Event.TERMINATE, Event.EXPIRED, Event.WINDOW_OVER, Event.EXITED}


class Sessions(RuleBasedStateMachine):
    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="torpor-machine-")
        self._loop = asyncio.new_event_loop()
        self._rig = Rig(Path(self._directory.name))
        self._do(self._rig.start())
        self._count = 0

    def teardown(self) -> None:
        self._rig.host.fail.clear()
        self._rig.host.lose.clear()
        self._do(self._settle())
        self._check_wakes()
        for session in list(self._rig.store.sessions.values()):
            if not session.state.is_ended:
                self._do(self._rig.lifecycle.fire(session, Event.TERMINATE, "Success."))
        self._do(self._settle())
        assert all(session.state is State.TERMINATED for session in self._rig.store.sessions.values())
        host = self._rig.host
        assert not host.held and not host.snapshots
        self._check_events()
        self._check_losses()
        self._do(self._rig.stop())
        self._loop.close()
        self._directory.cleanup()

    def _do(self, work: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(20):
                return await work

        return self._loop.run_until_complete(bounded())

    async def _settle(self) -> None:
        """Until nothing is in transition."""
        await self._rig.lifecycle.quiet()

    def _session(self, name: str) -> Session | None:
        return self._rig.store.sessions.get(name)

    # ---- what may happen ----

    @rule(target=names, idle=st.booleans())
    def run(self, idle: bool) -> str:
        self._count += 1
        arn = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
        one = Session(f"s{self._count}", f"h{self._count}", arn, "1.0", "image", 512, self._rig.wall, 28_800)
        one.idle_policy = POLICY if idle else None

        async def launch() -> None:
            self._rig.store.put_session(one)
            self._rig.store.add_event(one.id, "run", "", one.state.value)
            await self._rig.store.commit()
            self._rig.lifecycle.launch(one)

        self._do(launch())
        return one.id

    @rule(name=names, event=st.sampled_from(sorted(CALLS)))
    def call(self, name: str, event: Event) -> None:
        session = self._session(name)
        if session is not None:
            self._do(self._rig.lifecycle.fire(session, event, "Success." if event is Event.TERMINATE else ""))

    @rule(name=names)
    def request(self, name: str) -> None:
        session = self._session(name)
        if session is not None:
            self._do(self._rig.lifecycle.request(session))

    @rule(name=names, event=st.sampled_from([Event.IDLE, Event.WINDOW_OVER, Event.EXPIRED, Event.EXITED]))
    def by_itself(self, name: str, event: Event) -> None:
        session = self._session(name)
        if session is None or (event is Event.IDLE and session.idle_policy is None):
            return
        self._do(self._rig.lifecycle.fire(session, event, "by itself"))

    @rule(name=names)
    def hypervisor_dies(self, name: str) -> None:
        session = self._session(name)
        if session is not None and name in self._rig.host.held:
            held = self._rig.host.held.pop(name)
            self._do(self._note(Ended(name, held.incarnation, "it died", held.phase != "prepared")))

    async def _note(self, ended: Ended) -> None:
        self._rig.lifecycle.hypervisor_ended(ended)

    @rule(call=st.sampled_from(_LOST))
    def an_answer_will_be_lost(self, call: str) -> None:
        self._rig.host.lose[call] = self._rig.host.lose.get(call, 0) + 1

    @rule(name=names)
    def operator_recovers(self, name: str) -> None:
        with contextlib.suppress(RecoverError, RpcError, ValueError):
            self._do(self._quarantine().recover(name))

    def _quarantine(self) -> Quarantine:
        rig = self._rig
        return Quarantine(config.Quarantine(), rig.store, rig.host, rig.lifecycle, lambda: rig.wall)  # type: ignore[arg-type]

    @rule(call=st.sampled_from(sorted(_FAILURES)), which=st.integers(0, 5))
    def host_will_fail(self, call: str, which: int) -> None:
        failures = _FAILURES[call]
        self._rig.host.fail.setdefault(call, []).append(failures[which % len(failures)])

    @rule(seconds=st.sampled_from([-3600.0, -1.0, 1.0, 60.0, 30_000.0]))
    def clock_jumps(self, seconds: float) -> None:
        self._rig.wall += seconds

    @rule(turns=st.integers(1, 30))
    def time_passes(self, turns: int) -> None:
        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self._do(some())

    @rule()
    def quiet(self) -> None:
        self._do(self._settle())

    @precondition(lambda self: self._count > 0)
    @rule()
    def control_is_killed(self) -> None:
        """What is in the store and on the host is all that its successor knows."""
        host = self._rig.host

        async def again() -> None:
            await self._rig.lifecycle.close()
            await self._rig.store.close()
            await self._rig.start()
            self._rig.host.__dict__.update(host.__dict__)
            await recover(self._rig.lifecycle, await host.state())

        self._do(again())

    # ---- what must hold ----

    @invariant()
    def every_session_at_rest_is_whole(self) -> None:
        for session in self._rig.store.sessions.values():
            work = self._rig.lifecycle._work.get(session.id)
            if work is not None and work.task is not None and not work.task.done():
                continue
            assert session.state in (State.RUNNING, State.SUSPENDED, State.TERMINATED, State.PENDING, *_MOVING), session

    @invariant()
    def memories_and_disks_are_of_one_time(self) -> None:
        assert not self._rig.host.torn

    def _check_losses(self) -> None:
        """What an error has ended is aside, whole; and comes back where it slept."""
        host = self._rig.host
        for session in list(self._rig.store.sessions.values()):
            rows = self._do(self._rig.store.events(session.id))
            has_slept = any(row.event == "saved" for row in rows)
            end = [row for row in rows if row.new == "TERMINATING"][-1]
            assert session.is_aside or end.event in _WORDS or not has_slept, (session, end)
            assert session.is_aside == (session.id in host.aside), session
            if session.is_aside and host.aside[session.id].snapshot == session.incarnation:
                self._do(self._quarantine().recover(session.id))
                self._do(self._rig.lifecycle.fire(session, Event.RESUME))
                self._do(self._settle())
                assert session.state is State.RUNNING or (session.state.is_ended and not session.is_aside), session
        assert not host.torn

    def _check_wakes(self) -> None:
        """With a host that works, whoever sleeps can be woken."""
        asleep = [session for session in self._rig.store.sessions.values() if session.state is State.SUSPENDED]
        for session in asleep:
            self._do(self._rig.lifecycle.fire(session, Event.RESUME))
        self._do(self._settle())
        assert all(session.state is State.RUNNING or session.state.is_ended for session in asleep), asleep

    def _check_events(self) -> None:
        for session in self._rig.store.sessions.values():
            state = ""
            for row in self._do(self._rig.store.events(session.id)):
                assert row.old == state or not state, (session.id, row, state)
                if row.event != "run" and row.detail != "started":
                    assert TABLE[State(row.old), Event(row.event)][0] is State(row.new), row
                state = row.new
            assert state == session.state.value


_MOVING = (State.SUSPENDING, State.RESUMING, State.TERMINATING)
Sessions.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestSessions = pytest.mark.service(Sessions.TestCase)


@pytest.fixture(autouse=True)
def tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "_SETTLE_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(actions, "_DESTROY_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(timers, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(host, "_AWAY_RETRY_SECONDS", 0.0)
