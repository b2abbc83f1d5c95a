"""The relay reads what guests send: who takes it over has the connections that it passes on, and nothing else of control's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

OWN = "its own work"
ALL = [
    "read a file of control's", "write one", "connect", "make a socket", "make a pair", "signal control", "read control's memory",
    "start a program", OWN,
]  # fmt: skip


def tried(tmp_path: Path, is_confined: bool) -> list[str]:
    file = tmp_path / "keys.json"
    file.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        attack = Path(__file__).with_name("relay_attack.py")
        command = [sys.executable, str(attack), str(int(is_confined)), str(file), str(listener.getsockname()[1])]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_it_does_its_work_and_nothing_else(tmp_path: Path) -> None:
    assert tried(tmp_path, True) == [OWN]


def test_without_the_walls_it_is_control(tmp_path: Path) -> None:
    assert tried(tmp_path, False) == ALL
