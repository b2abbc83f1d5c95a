"""The service's own processes: one that stands still is replaced, one that cannot be started is tried again, and both are said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Instance, until

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def one() -> Iterator[Instance]:
    made = Instance("supervised", 9_300_000, SERVICE__SILENT_SECONDS="1.5", EDGE__WORKERS="1", SERVICE__STOP_SECONDS="30")
    try:
        made.start()
        yield made
        began = time.monotonic()
        assert made.stop() == 0 and time.monotonic() - began < 30
    finally:
        made.remove()


def ask(one: Instance, path: str) -> tuple[int, dict[str, Any]]:
    """0 where nobody answers in time."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{one.environment['TORPOR_API__METRICS_PORT']}/{path}", timeout=2) as answer:
            return answer.status, json.load(answer)["checks"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["checks"]
    except (OSError, ValueError):
        return 0, {}


def test_it_is_healthy_and_ready(one: Instance) -> None:
    status, checks = ask(one, "readyz")
    assert status == 200 and set(checks) == {"store", "vmm", "control", "edge-0", "vmm answers", "disk"}, checks
    assert ask(one, "healthz")[0] == 200


@pytest.mark.parametrize("name", ["vmm", "control", "edge-0", "store"])
def test_a_process_that_stands_still_is_replaced(one: Instance, name: str) -> None:
    old = one.pid_of(name)
    os.kill(old, signal.SIGSTOP)
    until(lambda: one.pid_of(name) != old, 20)
    until(lambda: ask(one, "readyz")[0] == 200, 20)
    assert "started again 1 times" in ask(one, "healthz")[1][name]["text"]
    assert not Path(f"/proc/{old}").exists()
    assert f'"name": "{name}"' in one.log.read_text() and "process.stands_still" in one.log.read_text()


def test_the_main_process_says_where_it_stands_and_goes_on(one: Instance) -> None:
    """It ended at the signal that is documented for it."""
    assert one.process is not None
    main = one.process
    os.kill(main.pid, signal.SIGUSR2)
    until(lambda: 'gateway/cli/host.py", line' in one.log.read_text() or main.poll() is not None, 20)
    assert main.poll() is None


@contextlib.contextmanager
def no_python(directory: Path) -> Iterator[None]:
    """As while a virtual environment is being replaced: it has no program for a moment."""
    program = directory / "python"
    target = os.readlink(program)
    program.unlink()
    try:
        yield
    finally:
        program.symlink_to(target)


def test_a_process_that_cannot_be_started_is_tried_until_it_can(one: Instance) -> None:
    """Once its watcher ended with the error, and nobody tried again."""
    edge = one.pid_of("edge-0")
    directory = Path(__file__).parents[2] / ".venv/bin"
    with no_python(directory):
        os.kill(edge, signal.SIGKILL)
        until(lambda: "did not start" in ask(one, "healthz")[1].get("edge-0", {}).get("text", ""), 20)
        status, checks = ask(one, "healthz")
        assert status == 503
        assert "does not serve" in checks["edge-0"]["text"] and checks["control"]["ok"]
    until(lambda: ask(one, "healthz")[0] == 200, 20)
    assert one.pid_of("edge-0") != edge


def test_what_root_writes_lies_where_only_root_may_write(one: Instance) -> None:
    """Control is unprivileged, and a link of its own making would lead root's hand."""
    owners = {path.name: path.stat().st_uid for path in [one.run / one.name, *(one.run / one.name).iterdir()]}
    control = one.first_uid + 1
    assert {name for name, uid in owners.items() if uid == control} == {"control"} and set(owners.values()) == {0, control}


def test_no_process_shows_the_settings_in_its_environment(one: Instance) -> None:
    for name in ("vmm", "control", "edge-0", "store"):
        assert b"object_store" not in Path(f"/proc/{one.pid_of(name)}/environ").read_bytes(), name
