"""The virtual environment is trusted by its key alone, which is void while anything in it is made or removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
OWN = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # these tests may be make's themselves
BROKEN = OWN | {"PYTHONHOME": "/nonexistent"}  # no interpreter comes up: whoever makes anything fails at once


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """With a virtual environment that its set-up takes to be whole."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/ready").write_text("of an older lock")
    return tmp_path


def key(clone: Path) -> str:
    words = ["make", "--no-print-directory", "--eval", "show: ; @echo $(KEY)", "show"]
    return subprocess.run(words, cwd=clone, env=OWN, check=True, capture_output=True, text=True).stdout


def is_waiting(make: int) -> bool:
    """Its shell's flock(1) runs."""
    for name in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            command, _, rest = name.read_text().rpartition(") ")
            if command.endswith("(flock") and int(rest.split()[3]) == make:  # its session
                return True
    return False


def test_an_environment_that_is_made_again_has_no_key_from_the_start(clone: Path) -> None:
    """Or, ended while the old one is removed, half of it would be trusted as soon as the older lock is checked out again."""
    done = subprocess.run(["make", "venv"], cwd=clone, env=BROKEN, capture_output=True, timeout=60, check=False)
    assert done.returncode and not (clone / ".venv/ready").exists()


def test_an_environment_that_is_removed_loses_its_key_first(clone: Path) -> None:
    said = subprocess.run(["make", "-n", "clean"], cwd=clone, env=OWN, capture_output=True, text=True, check=True).stdout
    assert said.split()[:3] == ["rm", "-rf", ".venv/ready"]


def test_one_set_up_at_a_time_makes_it_and_the_other_finds_it(clone: Path) -> None:
    lock = os.open(clone / ".venv", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with subprocess.Popen(["make", "venv"], cwd=clone, env=BROKEN, start_new_session=True) as other:
        deadline = time.monotonic() + 20
        while not is_waiting(other.pid):
            assert other.poll() is None and time.monotonic() < deadline, "it does not wait"
        (clone / ".venv/ready").write_text(key(clone))
        os.close(lock)
        assert other.wait(60) == 0
    assert (clone / ".venv/ready").read_text() == key(clone)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports each by its name alone: of two, neither folder's tests can be collected with the other's."""
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_every_part_of_the_long_tests_belongs_to_the_whole() -> None:
    text = (REPO / "Makefile").read_text()
    parts = set(re.findall(r"^(test-long-[\w-]+|test-fresh[\w-]*):", text, re.MULTILINE))
    (whole,) = re.findall(r"^test-long:(.*)##", text, re.MULTILINE)
    assert parts and parts <= set(whole.split())
