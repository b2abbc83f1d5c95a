"""What takes its real time: the service's own idle times, and ten minutes of sleeping and waking under load."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Instance, app_files, served
from websockets.sync.client import ClientConnection, connect
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.long]
SESSIONS, LOAD_SECONDS = 30, float(os.environ.get("LOAD_SECONDS", "600"))
IDLE_SECONDS = 3  # an application that is owed processors by twenty others may need one to answer a WebSocket's message


@pytest.fixture(scope="module")
def real(host_before: dict[str, set[str]]) -> Iterator[tuple[Instance, str]]:
    """An instance with the service's own bounds."""
    one = Instance("testr", 700_000 + 6 * 262_144, LIMITS__MIN_IDLE_SECONDS="60")
    with served(one):
        arn = one.create("app", one.upload(app_files()))
        assert one.built(arn)["buildState"] == "SUCCESSFUL"
        yield one, arn


def test_idle_window_and_lifetime_to_the_second(real: tuple[Instance, str]) -> None:
    instance, arn = real
    idle = {"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 20, "autoResumeEnabled": True}
    sleeper, mortal = instance.launch(arn, idlePolicy=idle), instance.launch(arn, maximumDurationInSeconds=75)
    started = time.time()
    instance.state(sleeper["microvmId"], "SUSPENDED", seconds=90)
    assert 59 <= time.time() - started <= 70
    ended = instance.state(mortal["microvmId"], "TERMINATED", seconds=60)
    assert ended["stateReason"] == "MicroVM exceeded maximum lifetime."
    lived = ended["terminatedAt"].timestamp() - ended["startedAt"].timestamp()
    assert 75 <= lived <= 80
    over = instance.state(sleeper["microvmId"], "TERMINATED", seconds=40)
    assert over["stateReason"] == "MicroVM exceeded maximum lifetime." and 79 <= time.time() - started <= 95


def test_a_request_starts_the_idle_time_anew(real: tuple[Instance, str]) -> None:
    instance, arn = real
    vm = instance.launch(arn, idlePolicy={"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 600, "autoResumeEnabled": True})
    token = instance.token(vm["microvmId"])
    time.sleep(40)
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", token).status == 200
    asked = time.time()
    time.sleep(45)
    assert instance.describe(vm["microvmId"])["state"] == "RUNNING"
    instance.state(vm["microvmId"], "SUSPENDED", seconds=40)
    assert 59 <= time.time() - asked <= 70
    instance.terminate(vm["microvmId"])


def most(instance: Instance, until: float) -> dict[str, tuple[int, int]]:
    """The most descriptors and KiB of memory that each process has at any moment until then."""
    seen = dict.fromkeys(("control", "vmm", "edge-0", "edge-1"), (0, 0))
    while time.monotonic() < until:
        for name, (files, memory) in seen.items():
            process = Path(f"/proc/{instance.pid_of(name)}")
            resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]
            seen[name] = (max(files, len(list((process / "fd").iterdir()))), max(memory, int(resident)))
        time.sleep(1)
    return seen


class User(threading.Thread):
    """Talks to one microVM now and then, by requests or over one WebSocket for ever; it counts what it should have seen."""

    def __init__(self, instance: Instance, vm: dict[str, Any], number: int, until: float) -> None:
        super().__init__()
        self.instance, self.vm, self.number, self.until = instance, vm, number, until
        self.chance = random.Random(number)
        self.said = 0
        self.failure = ""

    def run(self) -> None:
        try:
            if self.number % 3:
                self._requests()
            else:
                self._websocket()
        except Exception as error:
            self.failure = f"{self.number}: {type(error).__name__}: {error}"

    def _pause(self) -> bool:
        time.sleep(self.chance.choice([0.5, 5.0, 7.0, 10.0]))  # some four wakes a second in all: this machine makes eight
        return time.monotonic() < self.until

    def _requests(self) -> None:
        while self._pause():
            answer = get(self.vm["endpoint"], self.instance.root / "tls/ca.crt", self.vm["token"])
            self.said += 1
            assert (answer.status, answer.json()["counter"]) == (200, self.said)

    def _websocket(self) -> None:
        with self._open() as one:
            while self._pause():
                one.send(f"{self.said}")
                assert one.recv(timeout=60) == f"{self.said}"
                self.said += 1

    def _open(self) -> ClientConnection:
        host, _, port = self.vm["endpoint"].partition(":")
        context = ssl.create_default_context(cafile=str(self.instance.root / "tls/ca.crt"))
        raw = socket.create_connection(("127.0.0.1", int(port)))
        fields = {"X-aws-proxy-auth": self.vm["token"]}
        return connect(f"wss://{host}:{port}/", sock=raw, ssl=context, additional_headers=fields, ping_interval=5, ping_timeout=60)


def test_sleeping_and_waking_under_load(instance: Instance, app: str) -> None:
    policy = {"maxIdleDurationSeconds": IDLE_SECONDS, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    vms = [instance.launch(app, idlePolicy=policy) for _ in range(SESSIONS)]
    for vm in vms:
        vm["token"] = instance.token(vm["microvmId"], minutes=60)
    until = time.monotonic() + LOAD_SECONDS
    users = [User(instance, vm, number, until) for number, vm in enumerate(vms)]
    for user in users:
        user.start()
    time.sleep(LOAD_SECONDS / 5)
    halves = [most(instance, until - LOAD_SECONDS * 0.4), most(instance, until)]
    for user in users:
        user.join()
    assert not [user.failure for user in users if user.failure]
    assert sum(user.said for user in users) > SESSIONS * LOAD_SECONDS / 20
    for vm in vms:
        instance.state(vm["microvmId"], "SUSPENDED")
    for name, (files, memory) in halves[0].items():
        assert halves[1][name][0] <= files + 50 and halves[1][name][1] <= memory * 1.2 + 10_000, (name, halves)
    instance.terminate(*(vm["microvmId"] for vm in vms))
