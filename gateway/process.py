"""What every process of an instance does at its start: settings, logs, inherited sockets, the word that it is ready."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
import uvloop

from . import executors
from .config import ConfigError, Settings
from .observe import log

SETTINGS_VARIABLE = "TORPOR_PROCESS_SETTINGS"
SOCKETS_VARIABLE = "TORPOR_PROCESS_SOCKETS"
READY_VARIABLE = "TORPOR_PROCESS_READY"
_SWITCH_SECONDS = 0.0002


def inherited() -> dict[str, list[socket.socket]]:
    """The listening sockets that the supervisor opened, by purpose."""
    numbers: dict[str, list[int]] = json.loads(os.environ.get(SOCKETS_VARIABLE, "{}"))
    return {purpose: [socket.socket(fileno=number) for number in fds] for purpose, fds in numbers.items()}


def ready() -> None:
    """Tells the supervisor that this process serves."""
    number = os.environ.pop(READY_VARIABLE, "")
    if number:
        os.write(int(number), b"1")
        os.close(int(number))


def run(name: str, main: Callable[[Settings], Coroutine[Any, Any, None]], has_threads: bool = True) -> None:
    """`has_threads`: the process does blocking work in the pools of gateway/executors.py, which are there before anything else is."""
    log.configure(name)
    faulthandler.register(signal.SIGUSR2)  # a stack trace on standard error, for a process that seems stuck
    settings = Settings.model_validate_json(os.environ.pop(SETTINGS_VARIABLE))
    os.umask(0o022)
    # What is loaded stays: the collector need not look at it again, and looks less often at the rest.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # A thread that has a request's commit or files in hand need not wait 5 ms, the default, for the loop to let it begin.
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            if has_threads:
                executors.start()
            runner.run(main(settings))
        except (ConfigError, executors.NotStarted) as error:  # what is to be done is in its line, not in a traceback
            structlog.get_logger().error("process.not_started", error=str(error))
            raise SystemExit(1) from None
        finally:
            executors.close()
