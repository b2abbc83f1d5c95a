"""Network namespaces that a bind mount pins (ip-netns(8) does the same under /run/netns), and work done inside them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from gateway import executors

from . import syscalls

_DEADLINE_SECONDS = 20
_BACK_TRIES, _BACK_SECONDS = 100, 0.05
log = structlog.get_logger()
T = TypeVar("T")


def make_namespace(path: Path, setup: Callable[[], None]) -> None:
    """Makes a network namespace pinned at `path` and runs `setup` inside it; nothing is left when that fails."""
    path.touch(mode=0o600)

    def pinned() -> None:
        syscalls.mount("/proc/thread-self/ns/net", str(path), None, syscalls.MS_BIND)
        setup()

    try:
        apart(pinned)
    except BaseException:
        destroy_namespace(path)
        raise


def destroy_namespace(path: Path) -> None:
    with contextlib.suppress(OSError):
        syscalls.umount(str(path))
    path.unlink(missing_ok=True)


def apart(work: Callable[[], T]) -> T:
    """Returns what `work` returns, run by the calling thread while it is in a new namespace, which goes with what was opened in it. Raises
    OSError."""
    return _elsewhere(lambda: syscalls.unshare(syscalls.CLONE_NEWNET), work)


def inside(path: Path, work: Callable[[], T]) -> T:
    """Returns what `work` returns, run by the calling thread while it is in the namespace at `path`. Raises OSError."""
    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _elsewhere(lambda: syscalls.setns(target, syscalls.CLONE_NEWNET), work)
    finally:
        os.close(target)


def _elsewhere(go: Callable[[], None], work: Callable[[], T]) -> T:
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        go()
        try:
            return work()
        finally:
            _go_back(back)
    finally:
        os.close(back)


def _go_back(back: int) -> None:
    """setns(2) takes memory. A thread that stayed in one tenant's namespace would do its next work there, so the process ends first."""
    for _ in range(_BACK_TRIES):
        with contextlib.suppress(OSError):
            syscalls.setns(back, syscalls.CLONE_NEWNET)
            return
        time.sleep(_BACK_SECONDS)
    log.error("namespace.no_way_back")
    executors.replace_process()


def run_batch(commands: str, is_forced: bool = False) -> None:
    """Runs ip(8) commands in the calling thread's namespace, with `is_forced` also those after one that fails. Raises OSError with its
    words."""
    _run(["ip", *(["-force"] if is_forced else []), "-batch", "-"], commands)


def run_nft(rules: str) -> None:
    """Loads rules in the calling thread's namespace. Raises OSError with nft's words."""
    _run(["nft", "-f", "-"], rules)


def _run(command: list[str], commands: str) -> None:
    done = subprocess.run(command, check=False, input=commands.encode(), capture_output=True, timeout=_DEADLINE_SECONDS)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
