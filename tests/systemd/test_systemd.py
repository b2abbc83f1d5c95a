"""The units in a real systemd: what trial.py found in the machine that tests/machine.py makes. `make test-long-systemd` runs it."""

from __future__ import annotations

import ast
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from machine import Job, machine
from scratch import scratch

pytestmark = [pytest.mark.vm, pytest.mark.long]
TRIAL = Path(__file__).with_name("trial.py")
STEPS = [
    node.name
    for node in ast.parse(TRIAL.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and [word.id for word in node.decorator_list if isinstance(word, ast.Name)] == ["step"]
]
DEADLINE_SECONDS = 3400


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    """What came of each step; they run one after the other, in one machine."""
    cache = Path(os.environ.get("TORPOR_CACHE", "/var/cache/torpor"))
    found: dict[str, dict[str, Any]] = {}
    with scratch(".torpor-systemd-") as directory:
        log = directory / "console.log"
        with machine(directory, cache, log, Job(".venv/bin/python tests/systemd/trial.py")) as (lines, end):
            timer = threading.Timer(DEADLINE_SECONDS, end)
            timer.start()
            for line in lines:
                found[line["step"]] = line
                print(f"{line['step']}: {line['seconds']} s {line['told'] or ''} {line['error']}", flush=True)
            timer.cancel()
        if len(found) < len(STEPS):
            print(log.read_text(errors="replace")[-6000:], flush=True)
    return found


@pytest.mark.parametrize("step", STEPS)
def test_unit(told: dict[str, dict[str, Any]], step: str) -> None:
    assert step in told, f"the machine ended before; it had done {list(told)}"
    assert not told[step]["error"], told[step]["error"]
