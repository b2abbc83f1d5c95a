"""kill -9 of every process, at any moment; a host that restarts; disks that are full. Nothing is lost but what was in flight."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Instance, app_files, served, until
from wire import get

pytestmark = pytest.mark.vm
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


def ca(instance: Instance) -> Path:
    return instance.root / "tls/ca.crt"


def call(instance: Instance, vm: dict[str, Any], path: str = "/") -> Any:
    return get(vm["endpoint"], ca(instance), vm["token"], path)


def retried(instance: Instance, vm: dict[str, Any], path: str = "/state") -> Any:
    """The first answer that is not a refused or reset connection."""

    def once() -> Any:
        try:
            return call(instance, vm, path)
        except (OSError, EOFError):
            return None

    return until(once, 30)


@pytest.mark.parametrize("victim", ["edge-0", "edge-1", "control", "vmm"])
def test_killed_process_is_replaced_and_running_microvms_go_on(instance: Instance, vm: dict[str, Any], victim: str) -> None:
    before = call(instance, vm).json()
    pid = instance.hypervisors()[vm["microvmId"]]["pid"]
    instance.kill(victim)
    after = retried(instance, vm, "/").json()
    assert after["counter"] == before["counter"] + 1 and after["pid"] == before["pid"]
    assert instance.hypervisors()[vm["microvmId"]]["pid"] == pid
    assert until(lambda: instance.describe(vm["microvmId"])["state"]) == "RUNNING"
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    assert retried(instance, vm, "/").json()["counter"] == before["counter"] + 2


@pytest.mark.parametrize("victim", ["control", "vmm"])
def test_request_to_a_sleeper_while_its_waker_is_dead_is_answered(instance: Instance, vm: dict[str, Any], victim: str) -> None:
    assert call(instance, vm).json()["counter"] == 1
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    os.kill(instance.pid_of(victim), signal.SIGKILL)
    assert call(instance, vm).json()["counter"] == 2


@pytest.mark.parametrize("victim", ["control", "vmm"])
@pytest.mark.parametrize("delay", [0.04])  # all of it, twenty times: test_killed_at_every_step.py
def test_killed_in_the_middle_of_suspend_and_resume(instance: Instance, vm: dict[str, Any], victim: str, delay: float) -> None:
    assert call(instance, vm).json()["counter"] == 1
    for action in ("suspend_microvm", "resume_microvm"):
        old = instance.pid_of(victim)
        getattr(instance.client(), action)(microvmIdentifier=vm["microvmId"])
        time.sleep(delay)
        os.kill(old, signal.SIGKILL)
        until(lambda old=old: instance.pid_of(victim) != old)
        state = until(
            lambda: (
                instance.describe(vm["microvmId"])
                if instance.describe(vm["microvmId"])["state"] in ("RUNNING", "SUSPENDED", "TERMINATED")
                else None
            )
        )
        # From `cont` until the guest has answered there is nothing to go back to: only then may a kill cost the session.
        assert state["state"] != "TERMINATED", state
    assert retried(instance, vm, "/").json()["counter"] == 2


def test_killed_hypervisor_ends_its_session_alone(instance: Instance, app: str, vm: dict[str, Any]) -> None:
    other = instance.launch(app)
    os.kill(instance.hypervisors()[other["microvmId"]]["pid"], signal.SIGKILL)
    ended = instance.state(other["microvmId"], "TERMINATED")
    assert ended["stateReason"] == "The hypervisor of the MicroVM stopped unexpectedly."
    assert not (instance.root / "sessions" / other["microvmId"]).exists()
    until(lambda: other["microvmId"] not in instance.hypervisors())
    assert call(instance, vm).status == 200


def test_container_exit_ends_the_session_with_its_code(instance: Instance, app: str) -> None:
    made = instance.launch(app)
    made["token"] = instance.token(made["microvmId"])
    assert call(instance, made, "/exit?code=7").body == b"bye"
    assert instance.state(made["microvmId"], "TERMINATED")["stateReason"] == "Container Stopped with Exit Code: 7"


def test_reload_under_load_fails_no_request(instance: Instance, vm: dict[str, Any]) -> None:
    failures: list[object] = []
    counts = [0] * 4
    done = threading.Event()

    def load(number: int) -> None:
        while not done.is_set():
            try:
                answer = call(instance, vm, "/state")
                if answer.status != 200:
                    failures.append(answer)
                counts[number] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    old = [instance.pid_of("edge-0"), instance.pid_of("edge-1")]
    for thread in threads:
        thread.start()
    until(lambda: all(counts) or failures)
    assert instance.process is not None
    instance.process.send_signal(signal.SIGHUP)
    until(lambda: instance.pid_of("edge-0") != old[0] and instance.pid_of("edge-1") != old[1])
    until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in old))
    seen = list(counts)
    until(lambda: all(now > then + 1 for now, then in zip(counts, seen, strict=True)) or failures)  # by the new workers, too
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.fixture(scope="module")
def second(host_before: object) -> Iterator[Instance]:
    """An instance of its own, because its whole host restarts."""
    with served(Instance("test2", 700_000 + 262_144)) as one:
        yield one


def everything(instance: Instance) -> list[int]:
    """Every process of the instance: by its users, and the supervisor and vmm."""
    return [instance.pid_of("vmm"), *of_users(instance)]


def of_users(instance: Instance) -> dict[int, str]:
    """Processes of the instance's users, with what they are and their state. One that has ended and waits to be reaped holds nothing."""
    pids = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if instance.first_uid <= int(fields["Uid"].split()[0]) < instance.first_uid + 262_144 and fields["State"][0] not in "ZX":
            pids[int(status.parent.name)] = f"{fields['Name']}, {fields['State']}"
    return pids


def networks(instance: Instance) -> set[str]:
    """Processes that are a build's network."""
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes().split(b"\0")
            if words[0] == b"slirp4netns" and any(word.startswith(os.fsencode(instance.run)) for word in words):
                found.add(line.parent.name)
    return found


def test_a_build_whose_host_is_killed_is_made_again_and_its_network_ends(second: Instance) -> None:
    arn = second.create("app", second.upload(app_files()))
    first = until(lambda: networks(second))
    second.kill("vmm")
    until(lambda: not first & networks(second))
    assert second.built(arn)["buildState"] == "SUCCESSFUL"
    assert not networks(second)


def phase(instance: Instance, arn: str) -> str:
    """How far an image's build has come, as the store has it."""
    with contextlib.closing(sqlite3.connect(f"file:{instance.root}/control/torpor.db?mode=ro", uri=True)) as store:
        found = store.execute("SELECT new FROM events WHERE subject = ? AND event = 'build' ORDER BY number DESC", (arn,)).fetchone()
    return str(found[0]) if found else ""


@pytest.mark.parametrize("at", ["BOOT", *(pytest.param(one, marks=pytest.mark.long) for one in ("container", "READY", "SNAPSHOT"))])
def test_a_stop_in_the_middle_of_a_build_takes_all_of_it_along(second: Instance, at: str) -> None:
    arn = second.create(f"stopped-{at.lower()}", second.upload(app_files()))
    until(lambda: networks(second) if at == "container" else phase(second, arn) == at, pause=0.001)
    assert second.stop() == 0
    assert not second.run.exists()
    assert not of_users(second), of_users(second)
    second.start()
    assert second.built(arn)["stateReason"].startswith("INTERNAL_PLATFORM_ERROR")
    second.client().delete_microvm_image(imageIdentifier=arn)


def test_supervisor_that_dies_is_replaced_without_losing_anything(second: Instance) -> None:
    arn = second.client().list_microvm_images()["items"][0]["imageArn"]
    vm = second.launch(arn, idlePolicy=POLICY)
    vm["token"] = second.token(vm["microvmId"])
    assert call(second, vm).json()["counter"] == 1
    assert second.process is not None
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    assert call(second, vm).json()["counter"] == 2
    second.start()
    assert call(second, vm).json()["counter"] == 3
    second.terminate(vm["microvmId"])


def test_host_restart_keeps_sleepers_and_reports_the_others(second: Instance) -> None:
    arn = second.client().list_microvm_images()["items"][0]["imageArn"]
    asleep, awake = (second.launch(arn, idlePolicy=POLICY) for _ in range(2))
    for vm in (asleep, awake):
        vm["token"] = second.token(vm["microvmId"])
        call(second, vm)
    second.client().suspend_microvm(microvmIdentifier=asleep["microvmId"])
    second.state(asleep["microvmId"], "SUSPENDED")
    until(lambda: asleep["microvmId"] not in second.hypervisors())
    assert second.process is not None
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    for pid in everything(second):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    second.start()
    assert second.state(awake["microvmId"], "TERMINATED")["stateReason"] == "The MicroVM was lost when its host stopped."
    assert retried(second, asleep, "/").json()["counter"] == 2
    second.terminate(asleep["microvmId"])


def test_orderly_stop_suspends_and_the_next_start_resumes(second: Instance) -> None:
    arn = second.client().list_microvm_images()["items"][0]["imageArn"]
    vm = second.launch(arn)
    vm["token"] = second.token(vm["microvmId"])
    call(second, vm)
    assert second.stop() == 0
    second.start()
    second.state(vm["microvmId"], "RUNNING")
    assert retried(second, vm, "/").json()["counter"] == 2
    second.terminate(vm["microvmId"])
