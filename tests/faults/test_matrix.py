"""A matrix of faults: for every step of a session's and an image's life, each system call and each call between the processes fails once,
in each way that it can, and each process is killed at each of them. No session may be lost by any of it, and nothing may be left over.

    FAULTS="suspend" .venv/bin/python -m pytest -s -m long tests/faults     the whole of one step, with what was lost
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from seam import CRASH, ERRORS, KILL, LATE, LOST, Plan
from steps import STEPS, plans, run
from timewarp import in_turn

_SAMPLE = 45  # of a step's cases, in make test, and the first of each kind
_STRIDES = (17, 19, 23, 29, 31, 37, 41)  # primes, so that all kinds of faults come up
_ONLY = os.environ.get("FAULTS", "")


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory, where there is such a place: thousands of stores are made."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="torpor-faults-", dir=shared if shared.is_dir() else None) as made, in_turn():
        yield Path(made)


def cases(directory: Path, name: str) -> list[Plan]:
    """Every fault of every call that the step makes where nothing fails."""
    good = run(directory / "host", STEPS[name], None)
    assert not good.losses, f"without a fault: {good.losses}"
    return plans(good.names)


def play(directory: Path, name: str, chosen: list[Plan]) -> None:
    lost = []
    for plan in chosen:
        outcome = run(directory / "host", STEPS[name], plan)
        lost += [f"{plan.fault} of {plan.process}'s call {plan.nth} ({outcome.struck}): {what}" for what in outcome.losses]
    print(f"{name}: {len(chosen)} cases, {len(lost)} losses")
    assert not lost, "\n".join(lost)


@pytest.mark.service
@pytest.mark.parametrize("name", STEPS)
def test_some_faults_of(directory: Path, name: str) -> None:
    """A fixed sample: one of some, and the first of each kind."""
    everything = cases(directory, name)
    stride = next((one for one in _STRIDES if len(everything) <= one * _SAMPLE), _STRIDES[-1])
    kinds = (*ERRORS, KILL, LOST, LATE, CRASH)
    first = [next((plan for plan in everything if plan.fault == kind), None) for kind in kinds]
    play(directory, name, [*everything[::stride], *(plan for plan in first if plan is not None)])


@pytest.mark.service
def test_a_sleeper_that_cannot_be_recorded_as_paused_sleeps_without_its_hypervisor(directory: Path) -> None:
    """The last calls of its suspend write that record. It was held by an incarnation that nobody knew, and did not wake."""
    name = "suspend, kept warm"
    play(directory, name, [plan for plan in cases(directory, name) if plan.process == "vmm" and plan.fault == "EIO"][-4:])


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith(_ONLY)])
def test_all_faults_of(directory: Path, name: str) -> None:
    play(directory, name, cases(directory, name))


@pytest.mark.service
def test_the_matrix_finds_what_is_lost(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vmm that takes an error number for damage, as an older one did, loses sessions here."""
    from vmm import diffs, errors

    monkeypatch.setattr(diffs, "unreadable", lambda error, path: errors.Damaged(str(error)))
    chosen = [plan for plan in cases(directory, "resume") if plan.fault == "EMFILE"]
    outcomes = [run(directory / "host", STEPS["resume"], plan) for plan in chosen]
    assert any("is gone" in what for outcome in outcomes for what in outcome.losses)
