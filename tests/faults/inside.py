"""What a service under test has inside: a wall clock that the test sets, and calls of vmm's code on files that fail at its word.

It takes the place of the interpreter's sitecustomize in a mount namespace of the service's own (hand.py), and so is there before any
module of the service. `WHERE` is set before it: a file that the test and all processes of the service have mapped.
"""

import builtins
import io
import mmap
import os
import struct
import sys
import time

CLOCK = struct.Struct("=d")  # seconds that the clock is ahead
PLAN = struct.Struct("=qqqq")  # the process whose calls are counted, the call that fails, its error number, calls counted so far
PLAN_AT, STRUCK_AT, STRUCK_BYTES, SIZE = 8, 64, 256, 4096
CALLS = (
    "open", "rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "fsync", "ftruncate", "write", "pwrite", "read", "scandir",
    "listdir", "stat", "lstat", "dup", "chmod", "utime",
)  # fmt: skip


def _clock(shared):
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + CLOCK.unpack_from(shared)[0]
    time.time_ns = lambda: now_ns() + int(CLOCK.unpack_from(shared)[0] * 1e9)


def _is_ours():
    """Whether code of the service makes the call: modules are read by the interpreter's."""
    frame = sys._getframe(2)
    for _ in range(14):
        if frame is None or frame.f_globals.get("__name__", "").startswith("importlib"):
            return False
        if frame.f_globals.get("__name__", "").startswith(("vmm.", "gateway.")):
            return True
        frame = frame.f_back
    return False


def _strike(shared, name):
    process, nth, number, count = PLAN.unpack_from(shared, PLAN_AT)
    if process != os.getpid() or " /proc/" in name:  # what is read there is for figures, more or less often
        return
    PLAN.pack_into(shared, PLAN_AT, process, nth, number, count + 1)
    if count == nth:
        struck = name.encode()[:STRUCK_BYTES]
        shared[STRUCK_AT : STRUCK_AT + len(struck)] = struck
        raise OSError(number, os.strerror(number), name)


def _wrapped(shared, name, call):
    def made(*arguments, **named):
        if PLAN.unpack_from(shared, PLAN_AT)[0] and _is_ours():
            _strike(shared, f"{name} {arguments[0] if arguments else ''}")
        return call(*arguments, **named)

    return made


class _File:
    """A file whose writes are calls of their own; all else is the file's."""

    def __init__(self, file, shared, name):
        self._file, self._shared, self._name = file, shared, name

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception):
        return self._file.__exit__(*exception)

    def __iter__(self):
        return iter(self._file)

    def write(self, data):
        _strike(self._shared, f"write {self._name}")
        return self._file.write(data)


def _calls(shared):
    for name in CALLS:
        setattr(os, name, _wrapped(shared, name, getattr(os, name)))
    opened = io.open

    def open_file(file, mode="r", *arguments, **named):
        if not PLAN.unpack_from(shared, PLAN_AT)[0] or not _is_ours():
            return opened(file, mode, *arguments, **named)
        _strike(shared, f"open {file}")
        made = opened(file, mode, *arguments, **named)
        return _File(made, shared, file) if "r" not in mode or "+" in mode else made

    io.open = builtins.open = open_file


def _install(where):
    is_vmm = sys.orig_argv[1:3] == ["-m", "vmm"] and os.geteuid() == 0
    try:
        with open(where, "r+b" if is_vmm else "rb") as file:
            shared = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_WRITE if is_vmm else mmap.ACCESS_READ)
    except OSError:  # a program in another root
        return
    _clock(shared)
    if is_vmm:
        _calls(shared)


if "WHERE" in globals():
    _install(globals()["WHERE"])
