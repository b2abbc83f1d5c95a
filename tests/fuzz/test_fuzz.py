"""Every parser of what strangers say, by inputs that nobody thought of: only typed errors, bounded time and memory, and the same meaning in
any cut and to any second parser. What was found once is in corpus/, and tried each time."""

from __future__ import annotations

import os
import random
import sys
import types
from pathlib import Path

import pytest
from fuzz import fuzzing, stepwise

NAMES = fuzzing.names()
_SHORT_SECONDS, _LONG_SECONDS = 6.0, 3400.0  # of all targets together
FOUND = [(name, path) for name in NAMES for path in sorted((fuzzing.CORPUS / name).glob("*"))]


def seconds_of_each(default: float) -> float:
    return float(os.environ.get("FUZZ_SECONDS", default)) / len(NAMES)


@pytest.mark.parametrize(("name", "path"), FOUND, ids=[f"{name}-{path.name}" for name, path in FOUND])
def test_what_was_found_once(name: str, path: Path) -> None:
    fuzzing.replay(name, path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_are_none_of_them_a_finding(name: str) -> None:
    for data in fuzzing.target(name).seeds():
        fuzzing.replay(name, data)


def _run(name: str, seconds: float, seed: int, directory: Path) -> None:
    done = fuzzing.run(name, seconds, seed)
    print(f"\n{name}: FUZZ_SEED={seed}, {done.executions} inputs in {done.seconds:.1f} s, {done.kept} of them new")
    assert not done.findings, f"{done.findings[0]}; kept in {fuzzing.keep(done.findings[0], directory)}"
    assert done.kept > len(fuzzing.target(name).seeds()) / 2, "its inputs reach nothing"


@pytest.mark.service
@pytest.mark.parametrize("name", NAMES)
def test_seconds(name: str, tmp_path: Path) -> None:
    """The same inputs each time, as far as the time goes."""
    _run(name, seconds_of_each(_SHORT_SECONDS), fuzzing.seed_of_run(0), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_hour(name: str) -> None:
    """Others each time; a finding's input is kept in .fuzz/ below the tree."""
    _run(name, seconds_of_each(_LONG_SECONDS), fuzzing.seed_of_run(None), Path(__file__).parents[2] / ".fuzz")


def test_an_input_that_takes_too_long_or_too_much_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def for_ever(data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzzing, "_INPUT_SECONDS", 0.1)
    with fuzzing._timer():
        assert isinstance(fuzzing.try_once(for_ever, b""), fuzzing.TooLong)
    monkeypatch.setattr(fuzzing, "_INPUT_SECONDS", 10.0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that was held before (proc(5))
    with fuzzing._timer():
        assert isinstance(fuzzing.try_once(lambda data: len(data * (200 << 20)), b"x"), MemoryError)
        assert fuzzing.try_once(len, b"x") is None


def test_a_seed_gives_the_same_inputs() -> None:
    made = [[fuzzing.mutate(rng, [b"hello", b"world"], (b"x",)) for _ in range(200)] for rng in map(random.Random, (1, 1, 2))]
    assert made[0] == made[1] != made[2]


def test_what_reaches_new_lines_is_mutated_on() -> None:
    """A name that is made step by step would be found by chance alone in some billions of inputs."""
    tried = types.ModuleType("fuzz.targets.stepwise")
    tried.__dict__.update(TRACED=("fuzz.stepwise",), WORDS=(), seeds=lambda: [b"...."], check=stepwise.check)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fuzz.targets.stepwise", tried)
        found = fuzzing.run("stepwise", 60, 1).findings
    assert found and found[0].data.startswith(b"deep")
