"""Child processes of the supervisor: started, started again when they end or stand still, and replaced.

Every process is watched from the moment it exists until it has ended, also one that is starting and one that a successor has replaced;
`changed` is called whenever there is one more or one less. A process serves when it has said so (gateway/process.py, ready): until then
its predecessor goes on, and one that ends or says nothing in time is killed. From then on its loop gives signs of life on the same
pipe; one that gives none for `silent_seconds` is killed, and another one is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVarTuple, Unpack

import structlog

from . import descriptors

log = structlog.get_logger()
_Ts = TypeVarTuple("_Ts")

Process = asyncio.subprocess.Process
STOP_SECONDS = 90.0
_BACKOFF_FIRST, _BACKOFF_MOST = 0.05, 1.0  # longer would keep held requests past their deadline
_STEADY_SECONDS = 10.0  # a process that ran for longer is started again without a pause to speak of
_TRACE_SECONDS = 1.0  # for one that stands still to write where it does
_KILLED_SECONDS = 10.0
_LOOKS = 10  # in the time after which silence counts


if sys.version_info < (3, 12):

    class _Watcher(asyncio.PidfdChildWatcher):
        def add_child_handler(self, pid: int, callback: Callable[[int, int, Unpack[_Ts]], object], *args: *_Ts) -> None:
            """What cannot be watched does not live on: nobody would know of it. Raises OSError."""
            try:
                super().add_child_handler(pid, callback, *args)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise


def watch_without_threads() -> None:
    """Has this loop told of its children's ends by their pidfds (pidfd_open(2)). By itself CPython 3.11 starts a thread for each child, to
    wait in, and `Thread.start()` waits for ever for one that dies of a moment without memory: whoever starts again what such a moment has
    ended must not stand still by it."""
    if sys.version_info < (3, 12):  # from there on it is asyncio's own way
        watcher = _Watcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


class StartError(Exception):
    """A process ended before it served, or said nothing in time."""


@dataclass
class Child:
    """One process that is to run. `serving` is the one that does; `processes` are all that live (starting, serving, replaced), each with
    the task that waits for its end. `failure` says why none serves, as long as that is so."""

    name: str
    command: list[str]
    uid: int
    sockets: dict[str, list[socket.socket]] = field(default_factory=dict)
    serving: Process | None = None
    processes: dict[Process, asyncio.Task[None]] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    backoff: float = _BACKOFF_FIRST
    served_at: float = 0.0
    since: float = field(default_factory=time.time)
    restarts: int = 0
    failure: str = ""

    @property
    def serves(self) -> bool:
        return self.serving in self.processes and not self.failure


class Children:
    """`spawn(child, ready)` starts the child's command, which writes a byte to the descriptor `ready` when it serves: within
    `ready_seconds`; and others, at least one in `silent_seconds`, as long as its loop turns."""

    def __init__(
        self, spawn: Callable[[Child, int], Awaitable[Process]], changed: Callable[[], None], ready_seconds: float,
        silent_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._spawn = spawn
        self._changed = changed
        self.ready_seconds = ready_seconds
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._pipes: dict[Process, int] = {}
        self._heard: dict[Process, float] = {}  # when each that serves, or did, last gave a sign of life
        self._restarts: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self, child: Child, ended: Process | None = None) -> None:
        """Starts a process of the child, which serves in its predecessor's place; the predecessor is then told to end. When it does
        not serve, StartError is raised and the predecessor goes on. With `ended` it does so only where that process has not been
        replaced meanwhile."""
        async with child.lock:
            if ended is not None and child.serving is not ended:
                return
            process = await self._started(child)
            old, child.serving, child.served_at = child.serving, process, self._clock()
            child.since, child.failure = time.time(), ""
            self._changed()
            if old is not None:
                _send(old, signal.SIGTERM)
        if process.returncode is not None:  # it ended between its word and now, when it was nobody's
            self._start_again(child, process, f"ended with status {process.returncode}")

    async def _started(self, child: Child) -> Process:
        """Returns a process of the child that serves. Raises StartError, and leaves none then."""
        try:
            reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise StartError(f"{child.name} did not start: {error}") from error
        process = None
        try:
            try:
                process = await self._spawn(child, writing)
            finally:
                os.close(writing)
            self._watch(child, process)
            async with asyncio.timeout(self.ready_seconds):
                await descriptors.readable(reading)
            if not os.read(reading, 1):  # all who could have written have closed their end
                raise StartError(f"{child.name} did not start: its words are above")
            self._listen(child.processes, process, reading)
            return process
        except BaseException as error:
            os.close(reading)
            if process is not None:
                _send(process, signal.SIGKILL)
                await process.wait()
            if isinstance(error, TimeoutError):
                raise StartError(f"{child.name} did not start within {self.ready_seconds:g} s") from error
            if isinstance(error, OSError):
                raise StartError(f"{child.name} did not start: {error}") from error
            raise

    def _watch(self, child: Child, process: Process) -> None:
        child.processes[process] = asyncio.get_running_loop().create_task(self._until_end(child, process))
        self._changed()

    async def _until_end(self, child: Child, process: Process) -> None:
        code = await process.wait()
        del child.processes[process]
        self._heard.pop(process, None)
        if (pipe := self._pipes.pop(process, None)) is not None:
            asyncio.get_running_loop().remove_reader(pipe)
            os.close(pipe)
        self._changed()
        if child.serving is process and not self._is_stopping:
            log.warning("process.ended", name=child.name, code=code)
            self._start_again(child, process, f"ended with status {code}")

    def _start_again(self, child: Child, ended: Process, why: str) -> None:
        child.since, child.failure = time.time(), why
        child.restarts += 1
        self._changed()
        task = asyncio.get_running_loop().create_task(self._until_it_serves(child, ended))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _until_it_serves(self, child: Child, ended: Process) -> None:
        """Tries until the child serves again; whatever goes wrong, it is tried once more."""
        if self._clock() - child.served_at > _STEADY_SECONDS:
            child.backoff = _BACKOFF_FIRST
        while True:
            await asyncio.sleep(child.backoff)
            child.backoff = min(child.backoff * 2, _BACKOFF_MOST)
            try:
                await self.start(child, ended)
                return
            except StartError as error:
                log.error("process.not_started", name=child.name, error=str(error))
                child.failure = str(error)
            except Exception as error:
                log.exception("process.not_started", name=child.name)
                child.failure = repr(error)
            self._changed()

    # ---- signs of life ----

    def _listen(self, processes: Collection[Process], process: Process, reading: int) -> None:
        """Notes signs of life until the process ends."""
        if process not in processes:  # it has ended since
            os.close(reading)
            return
        loop = asyncio.get_running_loop()
        self._pipes[process] = reading
        self._heard[process] = self._clock()

        def hear() -> None:
            with contextlib.suppress(BlockingIOError):
                if not os.read(reading, 4096):
                    loop.remove_reader(reading)
                elif process in self._heard:
                    self._heard[process] = self._clock()

        loop.add_reader(reading, hear)

    async def end_silent(self, children: Iterable[Child]) -> None:
        """Kills what gives no sign of life, for ever. It is started again as whatever ends."""
        every = self._silent_seconds / _LOOKS
        looked = self._clock()
        while True:
            await asyncio.sleep(every)
            now, before = self._clock(), looked
            looked = now
            if now - before > self._silent_seconds / 2:  # this process or the whole host stood still: who stood still cannot tell who did
                self._heard = dict.fromkeys(self._heard, now)
                continue
            for child in children:
                for process in list(child.processes):
                    if now - self._heard.get(process, now) > self._silent_seconds:
                        await self._end_silent(child, process)

    async def _end_silent(self, child: Child, process: Process) -> None:
        log.error("process.stands_still", name=child.name, pid=process.pid, seconds=self._silent_seconds)
        del self._heard[process]
        _send(process, signal.SIGUSR2)  # its stacks go to the log (gateway/process.py)
        await asyncio.wait([child.processes[process]], timeout=_TRACE_SECONDS)
        _send(process, signal.SIGKILL)

    # ---- the end ----

    async def stop_restarts(self) -> None:
        """From now on what ends is not started again."""
        self._is_stopping = True
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)

    async def end(self, children: Iterable[Child], how: signal.Signals, seconds: float = STOP_SECONDS) -> None:
        """Sends every process of the children a signal, and waits for their end; kills those that have not ended after so many seconds,
        which are those of all together."""
        processes = [(child.name, *item) for child in children for item in child.processes.items()]
        for _, process, _ in processes:
            _send(process, how)
        ends = [ended for _, _, ended in processes]
        if ends:
            await asyncio.wait(ends, timeout=max(0.0, seconds))
        for name, process, ended in processes:
            if not ended.done():
                log.warning("process.killed", name=name)
                _send(process, signal.SIGKILL)
        if ends:
            _, left = await asyncio.wait(ends, timeout=_KILLED_SECONDS)
            for name, process, ended in processes:
                if ended in left:  # in a system call that does not return: nothing more can be done about it here
                    log.error("process.does_not_end", name=name, pid=process.pid)
                    ended.cancel()


def _send(process: Process, number: signal.Signals) -> None:
    """By its id: `send_signal` looks first whether the process has ended (subprocess.Popen), and where it has just, takes its status from
    asyncio's watcher, which then makes it 255."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
