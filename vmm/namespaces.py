"""Network namespaces that a bind mount pins (ip-netns(8) does the same under /run/netns), and work done inside them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import host

_DEADLINE_SECONDS = 20
T = TypeVar("T")


def make_namespace(path: Path, setup: Callable[[], None]) -> None:
    """Makes a network namespace pinned at `path` and runs `setup` inside it; nothing is left when that fails."""
    path.touch(mode=0o600)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            host.unshare(host.CLONE_NEWNET)
            host.mount("/proc/thread-self/ns/net", str(path), None, host.MS_BIND)
            setup()
        except BaseException as error:
            failure.append(error)

    # A thread that ends with its namespace: a pool's thread would have to find its way back.
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    if failure:
        destroy_namespace(path)
        raise failure[0]


def destroy_namespace(path: Path) -> None:
    with contextlib.suppress(OSError):
        host.umount(str(path))
    path.unlink(missing_ok=True)


def inside(path: Path, work: Callable[[], T]) -> T:
    """What `work` returns, run by the calling thread while it is in the namespace at `path`. Raises OSError."""
    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            host.setns(target, host.CLONE_NEWNET)
            try:
                return work()
            finally:
                host.setns(back, host.CLONE_NEWNET)
        finally:
            os.close(back)
    finally:
        os.close(target)


def run_batch(commands: str) -> None:
    """Runs ip(8) commands in the calling thread's namespace. Raises OSError with its words."""
    _run(["ip", "-batch", "-"], commands)


def run_nft(rules: str) -> None:
    """Loads rules in the calling thread's namespace. Raises OSError with nft's words."""
    _run(["nft", "-f", "-"], rules)


def _run(command: list[str], commands: str) -> None:
    done = subprocess.run(command, check=False, input=commands.encode(), capture_output=True, timeout=_DEADLINE_SECONDS)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
