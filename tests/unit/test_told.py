"""The plugin of `make test-kvm` (tests/kvm/told.py): a test that stands still fails with where it stands, and the next one has its turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TESTS = """
import asyncio, threading

async def inner():
    await asyncio.Event().wait()

def test_of_a_task():
    asyncio.run(inner())

def test_of_a_thread():
    thread = threading.Thread(target=threading.Event().wait, name="waiter", daemon=True)
    thread.start()
    thread.join()

def test_after_them():
    pass
"""


def test_what_stands_still_is_told_with_its_stack_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    reads, writes = os.pipe()
    environment = os.environ | {"TOLD": "one", "TOLD_TO": str(writes), "TOLD_SECONDS": "0.5"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kvm.told", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(
        [*command, "-c", "/dev/null"], cwd=REPO, env=environment, pass_fds=[writes], timeout=60, capture_output=True, text=True, check=False
    )
    os.close(writes)
    with os.fdopen(reads) as told:
        lines = {str(line["test"]).rpartition("::")[2]: line for line in map(json.loads, told)}
    assert [line["outcome"] for line in lines.values()] == ["failed", "failed", "passed"], done.stdout + done.stderr
    assert "in inner" in lines["test_of_a_task"]["error"] and "Event().wait()" in lines["test_of_a_task"]["error"]
    assert "thread waiter" in lines["test_of_a_thread"]["error"]
    assert f"{os.getpid()} of" in lines["test_of_a_thread"]["error"]  # each process, with what it waits for
