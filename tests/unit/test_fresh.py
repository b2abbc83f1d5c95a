"""What `make test-fresh` runs and records; the machine that it makes is tried by itself."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import scratch


def git(repo: Path, *words: str) -> None:
    names = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    subprocess.run(["git", "-C", repo, *words], check=True, capture_output=True, env=os.environ | names)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fresh, "REPO", tmp_path)
    monkeypatch.setattr(fresh, "RECORD", tmp_path / ".ci/fresh")
    (tmp_path / ".ci").mkdir()
    git(tmp_path, "init", "-q")
    commit(tmp_path, "one")
    return tmp_path


def commit(repo: Path, text: str, name: str = "file") -> None:
    (repo / name).write_text(text)
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", text)


def record(status: int, left: list[str]) -> int:
    return fresh.report(
        argparse.Namespace(record=True), ["make demo"], [["make demo", 3.2, status, left, {}]], fresh.tree_hash(repo=fresh.REPO)
    )


def test_the_commands_are_the_readmes() -> None:
    assert [command.partition("#")[0].strip() for command in fresh.readme_commands()] == ["make demo", "make test"]


def test_a_record_is_as_old_as_the_tree_that_it_is_of(repo: Path) -> None:
    assert fresh.recorded() == "test-fresh: never recorded (make test-fresh)"
    assert record(0, []) == 0
    assert "test-fresh: result: passed\n" in fresh.recorded() and "make demo: 3 s, exit status 0" in fresh.recorded()
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "the record")
    assert fresh.recorded().endswith("test-fresh: 0 commits behind")
    for number in range(2):
        commit(repo, f"more {number}")
    assert fresh.recorded().endswith("test-fresh: 2 commits behind")
    (repo / ".ci/fresh").write_text("tree: 0123\n")
    assert fresh.recorded().endswith("of no tree among the last 4 commits")


@pytest.mark.parametrize(("status", "left"), [(2, []), (0, ["mounts: /run/netns"])])
def test_a_command_that_fails_or_leaves_something_is_a_failure(repo: Path, status: int, left: list[str]) -> None:
    assert record(status, left) == 1
    assert "result: failed" in fresh.RECORD.read_text()


def test_a_command_that_was_never_run_is_a_failure(repo: Path) -> None:
    assert fresh.report(argparse.Namespace(record=False), ["make demo", "make test"], [["make demo", 1.0, 0, [], {}]], "") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a machine needs root")
def test_the_record_is_of_what_was_cloned(repo: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of what was committed while the machine ran, which takes a quarter of an hour."""
    commit(repo, "```\nmake demo\n```\n", "README.md")
    commit(repo, "tested")
    tested = fresh.tree_hash(repo=repo)

    def on_the_machine(directory: Path, plan: dict[str, object]) -> list[list[object]]:
        assert (directory / "root/root/torpor/file").read_text() == "tested"
        commit(repo, "committed meanwhile")
        return [["make demo", 1.0, 0, [], {}]]

    monkeypatch.setattr(scratch, "PLACE", tmp_path_factory.mktemp("place"))
    monkeypatch.setattr(fresh, "make_root", lambda root, release: root.mkdir())
    monkeypatch.setattr(fresh, "lend_sources", lambda root: {})
    monkeypatch.setattr(fresh, "on_the_machine", on_the_machine)
    monkeypatch.setattr(fresh.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["fresh.py", "--record"])
    assert fresh.main() == 0
    assert f"tree: {tested}\n" in fresh.RECORD.read_text() and fresh.recorded().endswith("test-fresh: 1 commits behind")


@pytest.mark.parametrize("words", [["true"], ["--odd"], ["--release", "trixie"]])
def test_nothing_but_the_readmes_commands_on_debian_12_is_recorded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "make_root", None)
    monkeypatch.setattr(sys, "argv", ["fresh.py", "--record", *words])
    with pytest.raises(SystemExit) as refused:
        fresh.main()
    assert refused.value.code == 2


def test_nothing_of_the_hosts_variables_reaches_the_programs_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has its temporary files, the machine has no directory."""
    seen: list[object] = []
    monkeypatch.setattr(fresh, "run", lambda *command, **options: seen.append((command[0], options["env"])))
    monkeypatch.setenv("TMPDIR", "/of/the/host")
    fresh.lend_sources(tmp_path)
    assert seen == [("chroot", {"PATH": fresh.PATH})]


def test_package_indexes_on_the_hosts_disk_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wheels", "index/simple"):
        (tmp_path / name).mkdir(parents=True)
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nindex-url = https://host{tmp_path}/wheels\nextra-index-url = file://{tmp_path}/index/simple\n")
    monkeypatch.setattr(fresh, "PIP_FILES", (str(settings),))
    assert fresh.indexes(tmp_path / "root", {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CERT": str(settings)}) == [
        tmp_path / "index",
        tmp_path / "wheels",
    ]
    assert fresh.indexes(tmp_path / "root", {}) == [tmp_path / "index"]  # what another host calls so is not ours


def test_a_directory_of_a_run_that_was_killed_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PLACE", tmp_path)
    (tmp_path / "run-killed/inside").mkdir(parents=True)
    with scratch.scratch("run-") as one:
        assert [path.name for path in tmp_path.iterdir()] == [one.name]
        with scratch.scratch("run-") as other:  # whose neighbour lives
            assert {path.name for path in tmp_path.iterdir()} == {one.name, other.name}
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import fresh
fresh.__file__ = {machine!r}
fresh.make_groups = lambda name: []
fresh.connect = lambda pid, end: (print(pid, flush=True), time.sleep(60))
fresh.on_the_machine(Path("none"), {{}})
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_the_machine_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """Or the next run finds its control groups in use, and its commands go on for as long as they like."""
    machine = tmp_path / "machine.py"
    machine.write_text("import sys, time\nsys.stdin.readline()\ntime.sleep(600)\n")
    program = KILLED.format(tests=str(Path(fresh.__file__).parent), machine=str(machine))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        first = int(run.stdout.readline())
        run.kill()
    try:
        deadline = time.monotonic() + 10
        while is_running(first):
            assert time.monotonic() < deadline
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_needs_nothing_but_the_interpreter() -> None:
    """It runs before there is a virtual environment."""
    there = f"import sys; sys.path.insert(0, {str(Path(fresh.__file__).parent)!r}); import fresh"
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", there], check=True, timeout=60, cwd="/")
