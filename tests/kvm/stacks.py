"""Where everything stands: the threads and tasks of this process, the services' processes, and what each process of the machine waits for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_LOG_BYTES, _LOG_SECONDS = 8000, 1.0


def all_of_them() -> str:
    """The longest first, of which a reader may miss something."""
    return "\n\n".join(["\n".join(_processes()), *_with_stacks(), *_threads(), *_tasks()])


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"


def _tasks() -> Iterator[str]:
    """Task.get_stack would show the outermost coroutine of a task that waits, and nothing of what it waits in."""
    for task in list(asyncio.tasks._all_tasks):  # type: ignore[attr-defined]  # of every loop
        if not task.done():
            where = "".join("".join(traceback.format_stack(frame, 1)) for frame in _frames(task.get_coro()))
            yield f"task {task.get_name()}\n{where}"


def _frames(awaited: Any) -> Iterator[FrameType]:
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            yield frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)


def logs() -> Iterator[str]:
    """The ends of those of the services' instances."""
    for log in Path("/var/tmp").glob("torpor-*/serve.log"):
        yield f"{log}\n{log.read_bytes()[-_LOG_BYTES:].decode(errors='replace')}"


def _with_stacks() -> Iterator[str]:
    """The services' processes write their stacks into their logs at SIGUSR2 (gateway/process.py)."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            pid = int(status.parent.name)
            if (
                pid != os.getpid()
                and "python" in os.readlink(status.parent / "exe")
                and int(fields["SigCgt"], 16) >> signal.SIGUSR2 - 1 & 1
            ):
                os.kill(pid, signal.SIGUSR2)
    time.sleep(_LOG_SECONDS)
    yield from logs()


def _processes() -> Iterator[str]:
    for directory in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
            if words:  # no thread of the kernel
                state, parent = (directory / "stat").read_text().rpartition(") ")[2].split()[:2]
                yield f"{directory.name} of {parent} {state} {(directory / 'wchan').read_text()} {words}"
