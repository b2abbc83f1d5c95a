"""Herds at a sleeping microVM, races with its suspend, and what keeps it awake."""

from __future__ import annotations

import random
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from service import PATIENCE, Instance, until
from websockets.sync.client import connect
from wire import Endpoint, get

pytestmark = pytest.mark.vm
ROUNDS = max(15, round(100 / PATIENCE))
SHORT_IDLE = {"maxIdleDurationSeconds": 2, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


def ca(instance: Instance) -> Path:
    return instance.root / "tls/ca.crt"


def events(instance: Instance, identifier: str) -> list[tuple[str, str, str]]:
    import sqlite3

    with sqlite3.connect(f"file:{instance.root}/control/torpor.db?mode=ro", uri=True) as db:
        return db.execute("SELECT event, old, new FROM events WHERE subject = ? ORDER BY number", (identifier,)).fetchall()


def asleep(instance: Instance, vm: dict[str, Any]) -> None:
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")


def test_hundred_requests_wake_it_once_and_all_are_answered(instance: Instance, vm: dict[str, Any]) -> None:
    asleep(instance, vm)
    start = threading.Barrier(100)

    def one(_: int) -> int:
        start.wait()
        return get(vm["endpoint"], ca(instance), vm["token"]).json()["counter"]

    with ThreadPoolExecutor(100) as pool:
        counters = list(pool.map(one, range(100)))
    assert sorted(counters) == list(range(1, 101))
    assert [event for event, _, _ in events(instance, vm["microvmId"])].count("resumed") == 1


def test_suspends_that_race_with_requests_lose_none(instance: Instance, app: str) -> None:
    """200 rounds over two microVMs, fewer where each takes half a minute. One POST of each starts within a few milliseconds of a suspend:
    all are answered, none is done twice."""
    policy = SHORT_IDLE | {"maxIdleDurationSeconds": 3600}
    vms = [instance.launch(app, idlePolicy=policy) for _ in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: race(instance, one[1], ROUNDS, random.Random(one[0])), enumerate(vms)))
    finally:
        instance.terminate(*(vm["microvmId"] for vm in vms))


def race(instance: Instance, vm: dict[str, Any], rounds: int, chance: random.Random) -> None:
    api, token = instance.client(), instance.token(vm["microvmId"])
    with ThreadPoolExecutor(1) as pool:
        for number in range(rounds):
            delay, body = chance.uniform(0, 0.06), f"round {number}".encode()

            def call(delay: float = delay, body: bytes = body) -> Any:
                time.sleep(delay)
                one = Endpoint(vm["endpoint"], ca(instance))
                one.request("/echo", token, "POST", body)
                answer = one.answer()
                one.close()
                return answer

            answered = pool.submit(call)
            api.suspend_microvm(microvmIdentifier=vm["microvmId"])
            answer = answered.result()
            assert (answer.status, answer.body) == (200, body)
            # The request may have been answered before the gate closed; either way the next round starts awake.
            if number % 20 == 0:
                assert get(vm["endpoint"], ca(instance), token, "/state").json()["counter"] == number + 1
            api.resume_microvm(microvmIdentifier=vm["microvmId"])
            instance.state(vm["microvmId"], "RUNNING")
    assert get(vm["endpoint"], ca(instance), token, "/state").json()["counter"] == rounds
    assert len([1 for event, _, _ in events(instance, vm["microvmId"]) if event == "saved"]) > rounds // 2


def test_what_it_slept_with_goes_once_it_runs(instance: Instance, vm: dict[str, Any]) -> None:
    """Also where it sleeps again before that: only its newest snapshot stays."""
    files = instance.root / "sessions" / vm["microvmId"]
    asleep(instance, vm)
    get(vm["endpoint"], ca(instance), vm["token"])
    until(lambda: not list(files.glob("snapshot-*")))
    for _ in range(2):
        asleep(instance, vm)
        get(vm["endpoint"], ca(instance), vm["token"])
    asleep(instance, vm)
    until(lambda: vm["microvmId"] not in instance.hypervisors() and not (files / "memory").exists())
    until(lambda: [path.name for path in files.glob("snapshot-*")] == ["snapshot-4"])
    assert get(vm["endpoint"], ca(instance), vm["token"]).status == 200


def test_idle_microvm_falls_asleep_and_the_next_request_wakes_it(instance: Instance, app: str) -> None:
    vm = instance.launch(app, idlePolicy=SHORT_IDLE)
    token = instance.token(vm["microvmId"])
    try:
        assert get(vm["endpoint"], ca(instance), token).json()["counter"] == 1
        started = time.monotonic()
        instance.state(vm["microvmId"], "SUSPENDED", seconds=15)
        assert time.monotonic() - started > 1.5
        assert get(vm["endpoint"], ca(instance), token).json()["counter"] == 2
    finally:
        instance.terminate(vm["microvmId"])


def test_websocket_with_traffic_keeps_it_awake_and_a_silent_one_does_not(instance: Instance, app: str) -> None:
    vm = instance.launch(app, idlePolicy=SHORT_IDLE)
    token = instance.token(vm["microvmId"])
    context = ssl.create_default_context(cafile=str(ca(instance)))
    offered = ["lambda-microvms", f"lambda-microvms.authentication.{token}", "lambda-microvms.port.8080"]
    try:
        with connect(f"wss://{vm['endpoint']}/ws", ssl=context, subprotocols=offered) as socket:
            assert socket.subprotocol == "lambda-microvms"
            until_ = time.monotonic() + 3 * SHORT_IDLE["maxIdleDurationSeconds"]
            while time.monotonic() < until_:
                socket.send("tick")
                assert socket.recv(timeout=5) == "tick"
                assert instance.describe(vm["microvmId"])["state"] == "RUNNING"
                time.sleep(1)  # the message's own rhythm, not a wait for a state
            assert "suspend" not in {event for event, _, _ in events(instance, vm["microvmId"])}
            instance.state(vm["microvmId"], "SUSPENDED", seconds=20)
    finally:
        instance.terminate(vm["microvmId"])


def test_request_under_way_keeps_it_awake(instance: Instance, app: str) -> None:
    vm = instance.launch(app, idlePolicy=SHORT_IDLE)
    token = instance.token(vm["microvmId"])
    try:
        assert get(vm["endpoint"], ca(instance), token, "/slow?s=6").body == b"slow"
        assert not [1 for event, _, _ in events(instance, vm["microvmId"]) if event == "saved"]
    finally:
        instance.terminate(vm["microvmId"])


def test_without_auto_resume_a_sleeping_microvm_stays_asleep(instance: Instance, app: str) -> None:
    vm = instance.launch(app, idlePolicy=SHORT_IDLE | {"autoResumeEnabled": False})
    token = instance.token(vm["microvmId"])
    try:
        asleep(instance, vm)
        answer = get(vm["endpoint"], ca(instance), token)
        assert (answer.status, answer.body) == (502, b"")
        assert instance.describe(vm["microvmId"])["state"] == "SUSPENDED"
        instance.client().resume_microvm(microvmIdentifier=vm["microvmId"])
        instance.state(vm["microvmId"], "RUNNING")
        assert get(vm["endpoint"], ca(instance), token).status == 200
    finally:
        instance.terminate(vm["microvmId"])


def test_suspended_window_and_lifetime_end_it(instance: Instance, app: str) -> None:
    api = instance.client()  # whose answer is not waited for any further: where a launch takes long, a lifetime may be over by then
    short = api.run_microvm(imageIdentifier=app, maximumDurationInSeconds=4)
    window = api.run_microvm(imageIdentifier=app, idlePolicy=SHORT_IDLE | {"maxIdleDurationSeconds": 1, "suspendedDurationSeconds": 1})
    for vm in (short, window):
        ended = instance.state(vm["microvmId"], "TERMINATED", seconds=20)
        assert ended["stateReason"] == "MicroVM exceeded maximum lifetime."
    assert "saved" in {event for event, _, _ in events(instance, window["microvmId"])}


def test_client_that_leaves_while_held_is_forgotten(instance: Instance, vm: dict[str, Any]) -> None:
    asleep(instance, vm)
    one = Endpoint(vm["endpoint"], ca(instance))
    one.request("/", vm["token"])
    one.close()
    instance.state(vm["microvmId"], "RUNNING")
    # Its request was never sent: nobody would have read the answer.
    assert get(vm["endpoint"], ca(instance), vm["token"], "/state").json()["counter"] in (0, 1)


def test_five_asleep_wake_at_once(instance: Instance, app: str) -> None:
    policy = SHORT_IDLE | {"maxIdleDurationSeconds": 3600}
    vms = [instance.client().run_microvm(imageIdentifier=app, idlePolicy=policy) for _ in range(5)]
    try:
        for vm in vms:
            instance.state(vm["microvmId"], "RUNNING")
            vm["token"] = instance.token(vm["microvmId"])
        for vm in vms:
            asleep(instance, vm)
        until(lambda: not set(instance.hypervisors()) & {vm["microvmId"] for vm in vms})
        with ThreadPoolExecutor(5) as pool:
            counters = list(pool.map(lambda vm: get(vm["endpoint"], ca(instance), vm["token"]).json()["counter"], vms))
        assert counters == [1] * 5
    finally:
        instance.terminate(*(vm["microvmId"] for vm in vms))


def test_it_falls_asleep_again_whichever_workers_were_busy(instance: Instance, app: str) -> None:
    """Each worker's count of activity outlives the sleep at the worker, and control must know it anew."""
    vm = instance.launch(app, idlePolicy={"maxIdleDurationSeconds": 1, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True})
    token = instance.token(vm["microvmId"])
    for round_ in range(3):
        for _ in range(12 if round_ == 0 else 1):  # connections of their own: they reach every worker
            assert get(vm["endpoint"], ca(instance), token).status == 200
        instance.state(vm["microvmId"], "SUSPENDED", seconds=15)
    instance.terminate(vm["microvmId"])
