"""`torpor doctor --inside`: what is typed into a shell runs the program there, and what it prints is judged (gateway/cli/inside.py)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.cli import inside
from vmm import kernel


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="the set-up has not been made")
def test_the_program_arrives_through_a_shell_and_leaves_nothing(tmp_path: Path) -> None:
    """By nobody, without a network: it finds the way shut, and says so of each try."""
    kernel.make_inside(tmp_path / "inside")
    typed = inside.script((tmp_path / "inside").read_bytes()).replace(inside._FILE.encode(), str(tmp_path / "tries").encode())
    assert max(map(len, typed.splitlines())) < 4096, "no line that a terminal would cut"
    done = subprocess.run(["unshare", "--user", "--net", "sh"], input=typed, capture_output=True, timeout=60, check=True)
    rows = {name.removeprefix("inside: "): (is_well, text) for name, is_well, text in inside.verdicts(done.stdout.decode())}
    assert len(rows) > 25
    assert rows["a private address"] == (True, "refused: Network unreachable") and rows["mount"][0] and rows["memory"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_what_was_done_is_not_well_and_what_is_only_told_is() -> None:
    said = (
        "λ $ stty -echo\r\n"
        '{"try": "capabilities", "done": true, "text": "00000000a80425fb"}\r\n'
        '{"try": "processor", "done": true, "text": "fpu svm"}\r\n'
        '{"try": "memory", "done": false, "text": "No such file or directory"}\r\n'
        '{"try": "mount", "done": true, "text": ""}\r\n'
        '{"try": "raw socket", "done": true, "text": ""}\r\n'
        "$ exit\r\n"
    )
    assert list(inside.verdicts(said)) == [
        ("inside: capabilities", True, "00000000a80425fb"),
        ("inside: virtualisation is seen", False, "svm"),
        ("inside: memory", True, "refused: No such file or directory"),
        ("inside: mount", False, "it was done"),
        ("inside: raw socket", True, "done"),
    ]


def test_a_program_that_did_not_run_is_not_taken_for_a_wall() -> None:
    assert [is_well for _, is_well, _ in inside.verdicts("sh: base64: not found\r\n")] == [False]
