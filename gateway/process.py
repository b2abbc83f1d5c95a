"""What every process of an instance does at its start: settings, logs, inherited sockets, the word that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import structlog
import uvloop

from . import executors, own_walls
from .config import ConfigError, Settings
from .observe import log, room

SETTINGS_VARIABLE = "TORPOR_PROCESS_SETTINGS"
SOCKETS_VARIABLE = "TORPOR_PROCESS_SOCKETS"
READY_VARIABLE = "TORPOR_PROCESS_READY"
_SWITCH_SECONDS = 0.0002
_SIGNS = 10  # of life, in the time after which none means that the process stands still


def inherited() -> dict[str, list[socket.socket]]:
    """Returns the listening sockets that the supervisor opened, by purpose."""
    numbers: dict[str, list[int]] = json.loads(os.environ.get(SOCKETS_VARIABLE, "{}"))
    return {purpose: [socket.socket(fileno=number) for number in fds] for purpose, fds in numbers.items()}


def ready() -> None:
    """Tells the supervisor that this process serves; from then on its event loop, if it has one, gives signs of life."""
    if _life.take():
        live()
        with contextlib.suppress(RuntimeError):
            _again(asyncio.get_running_loop())


def live() -> None:
    """Gives a sign of life."""
    if _life.pipe >= 0:
        with contextlib.suppress(OSError):  # the supervisor has gone, or has not read for a day
            os.write(_life.pipe, b".")


def _again(loop: asyncio.AbstractEventLoop) -> None:
    live()
    loop.call_later(_life.seconds, _again, loop)


class _Life:
    """The pipe on which the supervisor listens, and how often it wants to hear something."""

    pipe = -1
    seconds = 1.0

    def take(self) -> bool:
        """False where it was taken before, or there is none."""
        number = os.environ.pop(READY_VARIABLE, "")
        if number:
            self.pipe = int(number)
            os.set_inheritable(self.pipe, False)
        return bool(number)


_life = _Life()


@contextlib.contextmanager
def passed(known: Settings) -> Iterator[int]:
    """A descriptor through which a child gets its settings, which hold secrets: an environment can be read in /proc for a whole life."""
    descriptor = os.memfd_create("settings")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(known.model_dump_json().encode())
        yield descriptor
    finally:
        os.close(descriptor)


def settings() -> Settings:
    """Returns what `passed` gave. Once."""
    number = int(os.environ.pop(SETTINGS_VARIABLE))
    with os.fdopen(number, "rb") as file:
        file.seek(0)
        return Settings.model_validate_json(file.read())


def show_stacks() -> None:
    """On standard error: at SIGUSR2 of a process that seems stuck, and at the end of one that a fault or systemd's watchdog (SIGABRT)
    ends."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)


def run(name: str, main: Callable[[Settings], Coroutine[Any, Any, None]], has_threads: bool = True) -> None:
    """`has_threads`: the process does blocking work in the pools of gateway/executors.py, which are there before anything else is."""
    log.configure(name)
    show_stacks()
    given = settings()
    room.allow_descriptors()
    _life.seconds = given.service.silent_seconds / _SIGNS
    os.umask(0o022)
    own_walls.raise_walls(name, given)
    # What is loaded stays: the collector need not look at it again, and looks less often at the rest.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # A thread that has a request's commit or files in hand need not wait 5 ms, the default, for the loop to let it begin.
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            if has_threads:
                executors.start()
            runner.run(main(given))
        except (ConfigError, executors.NotStarted) as error:  # what is to be done is in its line, not in a traceback
            structlog.get_logger().error("process.not_started", error=str(error))
            raise SystemExit(1) from None
        finally:
            executors.close()
