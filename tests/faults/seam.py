"""The one seam at which faults are made: every system call on files, and every call between processes, that our own code makes.

Each call is counted for the process whose code makes it. The one that a plan names fails as it says; a process that was killed makes no
call any more, and sends nothing.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import contextvars
import errno
import io
import os
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway import rpc
from gateway.sessions import store
from vmm import syscalls

VMM, CONTROL = "vmm", "control"
process: contextvars.ContextVar[str] = contextvars.ContextVar("process", default="")

ERRORS = ("EMFILE", "ENOMEM", "ENOSPC", "EIO")
KILL, LOST, LATE = "kill", "lost reply", "late reply"
CRASH = "end of all hypervisors"

# What a full disk and a process without free descriptors refuse.
_NEEDS = {
    "ENOSPC": {"open", "write", "mkdir", "link", "transaction", "copy_range"},
    "EMFILE": {"open", "scandir", "listdir", "dup", "pipe2"},
}
# What our code asks of the kernel about files, by name. Closing and waiting are left out: they take nothing that could be short.
_CALLS = (
    "open", "rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "fsync", "ftruncate", "write", "pwrite", "read", "scandir",
    "listdir", "stat", "lstat", "dup", "chmod", "chown", "utime", "pipe2",
)  # fmt: skip
_SYSCALLS = ("exchange", "copy_range", "data_segments")  # of vmm/syscalls.py


class Killed(BaseException):
    """The process is gone; whatever its code does when this passes has no effect."""


@dataclass(frozen=True)
class Plan:
    """The `nth` call of `process` (from 0) fails by `fault`: an error number's name, KILL, LOST or LATE (of a call to the other process).
    With CRASH it is made when all hypervisors have just ended."""

    process: str
    nth: int
    fault: str


@dataclass
class Seam:
    plan: Plan | None = None
    is_armed: bool = False
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dead: set[str] = field(default_factory=set)
    died: asyncio.Event = field(default_factory=asyncio.Event)
    has_struck: str = ""  # what the plan made fail
    crash: Callable[[], None] = lambda: None  # ends all hypervisors
    weather: str = ""  # an error number's name: every call that needs what is short then fails, until it is not any more

    def kill(self, owner: str) -> None:
        self.dead.add(owner)
        self.died.set()

    def check(self, owner: str) -> None:
        """Raises Killed for whoever is gone."""
        if owner in self.dead:
            raise Killed(owner)

    def next(self, owner: str, name: str) -> str:
        """Counts a call; returns the fault that it has, if any."""
        self.check(owner)
        if self.weather and name.split(maxsplit=1)[0] in _NEEDS[self.weather] and not name.startswith("open r"):
            return self.weather
        if self.weather == "EMFILE" and name.startswith("open"):
            return self.weather
        if not self.is_armed:
            return ""
        at = self.counts[owner]
        self.counts[owner] += 1
        self.names[owner].append(name)
        plan = self.plan
        if plan is None or (plan.process, plan.nth) != (owner, at):
            return ""
        self.has_struck = name
        if plan.fault == KILL:
            self.kill(owner)
            raise Killed(owner)
        if plan.fault == CRASH:
            self.crash()
            return ""
        return plan.fault


def _owner() -> str:
    """Whose code makes the call: that of the task it is made in, if it is code of ours at all."""
    frame = sys._getframe(2)
    for _ in range(14):
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("vmm.", "gateway.")) or name == "simulation":
            return process.get()
        if name in ("world", "harness", "asyncio.base_events") or frame.f_back is None:
            return ""
        frame = frame.f_back
    return ""


class _File:
    """A file whose writes are counted; all else is the file's own."""

    def __init__(self, file: Any, seam: Seam, owner: str) -> None:
        self._file, self._seam, self._owner = file, seam, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        return self._file.__exit__(*exception)

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, data: Any) -> Any:
        strike(self._seam, self._owner, "write")
        return self._file.write(data)


def strike(seam: Seam, owner: str, name: str) -> None:
    fault = seam.next(owner, name)
    if fault in ERRORS:
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), name)


@contextlib.contextmanager
def installed(seam: Seam) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for where, names in ((os, _CALLS), (syscalls, _SYSCALLS)):
            for name in names:
                if hasattr(where, name):
                    patch.setattr(where, name, _wrapped(seam, name, getattr(where, name)))
        opened = io.open

        def open_file(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            owner = _owner()
            if not owner:
                return opened(file, mode, *arguments, **named)
            strike(seam, owner, f"open {mode}")
            made = opened(file, mode, *arguments, **named)
            return _File(made, seam, owner) if "r" not in mode or "+" in mode else made

        patch.setattr(io, "open", open_file)
        patch.setattr(builtins, "open", open_file)
        _install_rpc(seam, patch)
        _install_transactions(seam, patch)
        yield


def _wrapped(seam: Seam, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any, **named: Any) -> Any:
        owner = _owner()
        if owner:
            strike(seam, owner, name)
            if name == "fsync":
                return None  # the simulated power never fails: what was written is there
        return call(*arguments, **named)

    return made


def _install_rpc(seam: Seam, patch: pytest.MonkeyPatch) -> None:
    start_call, send = rpc.Connection.start_call, rpc.Connection._send

    async def without_reply(answer: Any, method: str, timeout: float, is_late: bool) -> Any:
        """The call is carried out; its caller gives up before, or hears nothing."""
        answered = asyncio.ensure_future(answer)
        answered.add_done_callback(_close_descriptors)
        await asyncio.wait([answered], timeout=0 if is_late else timeout)
        raise rpc.RpcLost(f"{method}: no answer in {timeout:g} s")

    def call(self: Any, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: Any = None) -> Any:
        fault = seam.next(process.get(), f"call {method}")
        answer = start_call(self, method, body, kind, timeout, descriptors)
        if fault in (LOST, LATE):
            return without_reply(answer, method, timeout, fault == LATE)
        return answer

    def sent(self: Any, *arguments: Any) -> None:
        seam.check(process.get())
        send(self, *arguments)

    patch.setattr(rpc.Connection, "start_call", call)
    patch.setattr(rpc.Connection, "_send", sent)


def _close_descriptors(answered: asyncio.Future[Any]) -> None:
    if not answered.cancelled() and answered.exception() is None:
        for descriptor in answered.result()[1]:
            os.close(descriptor)


_SQLITE = {
    "ENOSPC": "database or disk is full",
    "EIO": "disk I/O error",
    "EMFILE": "unable to open database file",
    "ENOMEM": "out of memory",
}


def _install_transactions(seam: Seam, patch: pytest.MonkeyPatch) -> None:
    """A transaction of the store fails as SQLite does, or its process is killed before or after it."""
    made = store.transaction

    @contextlib.contextmanager
    def transaction(connection: sqlite3.Connection) -> Iterator[None]:
        owner = process.get()
        fault = seam.next(owner, "transaction") if owner else ""
        if fault in _SQLITE:
            raise sqlite3.OperationalError(_SQLITE[fault])
        with made(connection):
            yield
        if owner:
            seam.next(owner, "after the transaction")

    patch.setattr(store, "transaction", transaction)


def faults_of(name: str) -> tuple[str, ...]:
    """What may become of a call of this name."""
    if name == "after the transaction":
        return (KILL,)
    if name == "transaction":
        return ("ENOSPC", "EIO", KILL, CRASH)
    if name.startswith("call "):
        return (LOST, LATE, KILL, CRASH)
    return (*ERRORS, KILL, CRASH)
