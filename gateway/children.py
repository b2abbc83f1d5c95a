"""Child processes of the supervisor: started, started again when they end, and replaced.

Every process is watched from the moment it exists until it has ended, also one that is starting and one that a successor has replaced;
`changed` is called whenever there is one more or one less. A process serves when it has said so (gateway/process.py, ready): until then
its predecessor goes on, and one that ends or says nothing in time is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import structlog

log = structlog.get_logger()

Process = asyncio.subprocess.Process
STOP_SECONDS = 90.0
_BACKOFF_FIRST, _BACKOFF_MOST = 0.05, 1.0  # longer would keep held requests past their deadline
_STEADY_SECONDS = 10.0  # a process that ran for longer is started again without a pause to speak of


class StartError(Exception):
    """A process ended before it served, or said nothing in time."""


@dataclass
class Child:
    """One process that is to run. `serving` is the one that does; `processes` are all that live (starting, serving, replaced), each with
    the task that waits for its end."""

    name: str
    command: list[str]
    uid: int
    sockets: dict[str, list[socket.socket]] = field(default_factory=dict)
    serving: Process | None = None
    processes: dict[Process, asyncio.Task[None]] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    backoff: float = _BACKOFF_FIRST
    served_at: float = 0.0


class Children:
    """`spawn(child, ready)` starts the child's command, which writes a byte to the descriptor `ready` when it serves: within
    `ready_seconds`."""

    def __init__(self, spawn: Callable[[Child, int], Awaitable[Process]], changed: Callable[[], None], ready_seconds: float) -> None:
        self._spawn = spawn
        self._changed = changed
        self.ready_seconds = ready_seconds
        self._restarts: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self, child: Child, ended: Process | None = None) -> None:
        """Starts a process of the child, which serves in its predecessor's place; the predecessor is then told to end. When it does
        not serve, StartError is raised and the predecessor goes on. `ended`: only where this one has not been replaced meanwhile."""
        async with child.lock:
            if ended is not None and child.serving is not ended:
                return
            process = await self._started(child)
            old, child.serving, child.served_at = child.serving, process, time.monotonic()
            self._changed()
            if old is not None:
                _send(old, signal.SIGTERM)
        if process.returncode is not None:  # it ended between its word and now, when it was nobody's
            self._start_again(child, process)

    async def _started(self, child: Child) -> Process:
        """A process of the child that serves. Raises StartError, and leaves none then."""
        reading, writing = os.pipe()
        process = None
        try:
            try:
                process = await self._spawn(child, writing)
            finally:
                os.close(writing)
            self._watch(child, process)
            async with asyncio.timeout(self.ready_seconds):
                word = await _first_byte(reading)
            if not word:
                raise StartError(f"{child.name} did not start: its words are above")
            return process
        except BaseException as error:
            if process is not None:
                _send(process, signal.SIGKILL)
                await process.wait()
            if isinstance(error, TimeoutError):
                raise StartError(f"{child.name} did not start within {self.ready_seconds:g} s") from error
            if isinstance(error, OSError):
                raise StartError(f"{child.name} did not start: {error}") from error
            raise
        finally:
            os.close(reading)

    def _watch(self, child: Child, process: Process) -> None:
        child.processes[process] = asyncio.get_running_loop().create_task(self._until_end(child, process))
        self._changed()

    async def _until_end(self, child: Child, process: Process) -> None:
        code = await process.wait()
        del child.processes[process]
        self._changed()
        if child.serving is process and not self._is_stopping:
            log.warning("process.ended", name=child.name, code=code)
            self._start_again(child, process)

    def _start_again(self, child: Child, ended: Process) -> None:
        task = asyncio.get_running_loop().create_task(self._until_it_serves(child, ended))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _until_it_serves(self, child: Child, ended: Process) -> None:
        """Tries until the child serves again; whatever goes wrong, it is tried once more."""
        if time.monotonic() - child.served_at > _STEADY_SECONDS:
            child.backoff = _BACKOFF_FIRST
        while True:
            await asyncio.sleep(child.backoff)
            child.backoff = min(child.backoff * 2, _BACKOFF_MOST)
            try:
                await self.start(child, ended)
                return
            except StartError as error:
                log.error("process.not_started", name=child.name, error=str(error))
            except Exception:
                log.exception("process.not_started", name=child.name)

    async def stop_restarts(self) -> None:
        """From now on what ends is not started again."""
        self._is_stopping = True
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)

    async def end(self, children: Iterable[Child], how: signal.Signals) -> None:
        """Sends every process of the children a signal, and waits for their end; kills those that do not end in time."""
        processes = [(child.name, *item) for child in children for item in child.processes.items()]
        for _, process, _ in processes:
            _send(process, how)
        for name, process, ended in processes:
            await asyncio.wait([ended], timeout=STOP_SECONDS)
            if not ended.done():
                log.warning("process.killed", name=name)
                _send(process, signal.SIGKILL)
                await asyncio.wait([ended])


async def _first_byte(reading: int) -> bytes:
    """Empty when all who could have written it have closed their end."""
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(reading, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(reading)
    return os.read(reading, 1)


def _send(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
