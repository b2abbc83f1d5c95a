"""The machine of tests/unit/test_session_machine.py, shorter, against a real microVM: random lives, and what must hold in each."""

from __future__ import annotations

import random
import sqlite3
from typing import Any

import pytest
from service import Instance, until
from wire import get

from gateway.sessions.states import TABLE, Event, State

pytestmark = pytest.mark.vm
STEPS = 14


def rows(instance: Instance, identifier: str) -> list[tuple[str, str, str, str]]:
    with sqlite3.connect(f"file:{instance.root}/control/torpor.db?mode=ro", uri=True) as db:
        return db.execute("SELECT event, old, new, detail FROM events WHERE subject = ? ORDER BY number", (identifier,)).fetchall()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_life(instance: Instance, app: str, seed: int) -> None:
    chance = random.Random(seed)
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    vm = instance.launch(app, idlePolicy=policy)
    identifier, token, visits = vm["microvmId"], instance.token(vm["microvmId"], minutes=60), 0
    api = instance.client()
    steps = ["visit", "visit", "suspend", "suspend", "resume", "control", "vmm", "edge-0"]
    for step in chance.choices(steps, k=STEPS):
        if step == "visit":
            visits += 1
            facts = get(vm["endpoint"], instance.root / "tls/ca.crt", token).json()
            assert (facts["counter"], facts["lines"]) == (visits, visits), step
        elif step == "suspend":
            api.suspend_microvm(microvmIdentifier=identifier)
            if chance.random() < 0.5:
                instance.state(identifier, "SUSPENDED")
        elif step == "resume":
            api.resume_microvm(microvmIdentifier=identifier)
        else:
            instance.kill(step)
            until(lambda: _answers(api, identifier))
    instance.terminate(identifier)
    until(lambda: rows(instance, identifier)[-1][2] == "TERMINATED")  # said by the API a commit before
    state = ""
    for event, old, new, detail in rows(instance, identifier):
        assert old == state or not state, (event, old, new, state)
        if event != "run" and detail != "started":
            assert TABLE[State(old), Event(event)][0] is State(new), (event, old, new)
        state = new
    assert state == "TERMINATED" and identifier not in instance.hypervisors()
    assert not (instance.root / "sessions" / identifier).exists()


def _answers(api: Any, identifier: str) -> bool:
    return bool(api.get_microvm(microvmIdentifier=identifier)["state"])
