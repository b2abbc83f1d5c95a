"""What every process of an instance does at its start, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from gateway.config import Settings
from gateway.process import READY_VARIABLE, SETTINGS_VARIABLE, SOCKETS_VARIABLE, passed

CHILD = """
import asyncio, os, uvloop
from gateway import process

async def main(settings):
    (listener,) = process.inherited()["api"]
    process.ready()
    process.ready()  # once is enough
    assert "TORPOR_PROCESS_SETTINGS" not in os.environ and "TORPOR_PROCESS_READY" not in os.environ
    print(settings.name, listener.getsockname()[1], isinstance(asyncio.get_running_loop(), uvloop.Loop))

process.run("test", main)
"""


def test_settings_sockets_and_the_word_that_it_serves(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with passed(Settings(root=tmp_path, name="named")) as settings:
            environment = {
                SETTINGS_VARIABLE: str(settings),
                SOCKETS_VARIABLE: json.dumps({"api": [listener.fileno()]}),
                READY_VARIABLE: str(writing),
                "PATH": os.environ["PATH"],
            }
            done = subprocess.run(
                [sys.executable, "-c", CHILD], env=environment, pass_fds=[writing, settings, listener.fileno()], capture_output=True,
                text=True, timeout=60, cwd=Path(__file__).resolve().parents[2], check=False,
            )  # fmt: skip
        os.close(writing)
        assert (done.returncode, done.stdout.split()) == (0, ["named", str(listener.getsockname()[1]), "True"]), done.stderr
    assert set(os.read(reading, 100)) == set(b"."), "the word that it serves, and signs of life"
    os.close(reading)
