"""Pools of threads for what blocks: each kind of work has its own, so that an archive of minutes holds up no resume.

Threads are started when the process is, and never again: `threading.Thread.start()` waits until its thread says that it runs, which one
that dies of a moment without memory never says. Here nobody waits for ever for a thread, whether at its start or in its work. Each piece
of work has a deadline, which begins when a thread takes it up. A piece that stands longer is logged with where it stands, and whoever
waits for it is told; the thread itself cannot be called off. When all threads of a pool stand, the process is replaced: it exits with
STUCK, the supervisor starts another, and microVMs run on meanwhile.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import faulthandler
import itertools
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

import structlog

log = structlog.get_logger()
T = TypeVar("T")
Item = TypeVar("Item")
Ts = TypeVarTuple("Ts")

STUCK = 86  # the exit status of a process in which nothing else helped
_START_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 0.05
_BYTES_PER_SECOND = 5 << 20  # of a disk that is slow and works


class NotStarted(OSError):
    """There is no room for a pool's threads."""


class Overdue(TimeoutError):
    """Work in a thread has not ended by its deadline; whether it will is unknown."""


def seconds_for(size: int, least: float = 60.0) -> float:
    """Returns a deadline for work that reads or writes `size` bytes."""
    return least + size / _BYTES_PER_SECOND


class _Work:
    __slots__ = ("arguments", "begun", "call", "is_late", "is_unwanted", "report", "seconds")

    def __init__(
        self, call: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, report: Callable[[Any, BaseException | None], None],
        is_unwanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.call, self.arguments, self.seconds, self.report, self.is_unwanted = call, arguments, seconds, report, is_unwanted
        self.begun = math.inf  # not yet
        self.is_late = False

    @property
    def name(self) -> str:
        return getattr(self.call, "__qualname__", repr(self.call))


class _Worker:
    """What one thread does."""

    __slots__ = ("thread", "work")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.work: _Work | None = None


class Pool:
    """`threads` threads with one queue; `seconds` is the deadline of work that names none."""

    def __init__(self, name: str, threads: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._threads = threads
        self._seconds = seconds
        self._clock = clock
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._joining = threading.Lock()
        self._is_started = False
        self.on_stuck: Callable[[], None] = replace_process

    def start(self) -> None:
        """Starts all threads. Raises NotStarted; it may be called again then."""
        with self._start:
            if self._is_started:
                return
            _watchdog.watch(self)
            deadline, tries = time.monotonic() + _START_SECONDS, itertools.count()
            asked = 0
            while len(self._workers) < self._threads:
                if asked < self._threads:  # each once; those that are missing then have died, and are started again one by one
                    asked += self._start_thread()
                elif next(tries) % 200 == 199:
                    self._start_thread()
                if time.monotonic() > deadline:
                    raise NotStarted(f"only {len(self._workers)} of {self._threads} threads ({self.name}) could be started")
                time.sleep(0.0005)
            self._is_started = True

    def _start_thread(self) -> bool:
        try:
            _thread.start_new_thread(self._run, ())  # unlike threading.Thread.start, this waits for nothing
        except (RuntimeError, MemoryError):
            return False
        return True

    async def run(self, call: Callable[[Unpack[Ts]], T], *arguments: *Ts, seconds: float | None = None) -> T:
        """Returns what `call` returns in a thread. Raises what it raises; Overdue, NotStarted.

        A caller that is cancelled leaves work behind that has begun; what has not begun is not done."""
        self.start()
        if self._stands:
            raise Overdue(f"all {self._threads} threads ({self.name}) stand")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def report(result: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._queue.put(_Work(call, arguments, seconds or self._seconds, report, future.cancelled))
        return await future

    def map(self, call: Callable[[Item], T], items: Iterable[Item], seconds: float | None = None) -> list[T]:
        """Does work for each item at once, and waits: for use in a thread, of another pool. Raises the first error, when all have ended."""
        self.start()
        done: list[queue.SimpleQueue[tuple[Any, BaseException | None]]] = []
        for item in items:
            answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
            self._queue.put(_Work(call, (item,), seconds or self._seconds, lambda *outcome, put=answer.put: put(outcome), lambda: False))
            done.append(answer)
        outcomes = [answer.get() for answer in done]
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def close(self, seconds: float = 10.0) -> None:
        """Waits for what is under way, for so long. What is left then is cut off by the end of the process."""
        if not self._is_started:
            return
        self._is_started = False
        deadline = time.monotonic() + seconds
        workers, self._workers = self._workers, []
        for _ in workers:
            self._queue.put(None)
        with contextlib.suppress(queue.Empty):
            for _ in workers:
                self._ended.get(timeout=max(0.0, deadline - time.monotonic()))
        self._workers = []
        _watchdog.forget(self)

    def look(self) -> None:
        """Reports work that stands; where all threads do, `on_stuck` is called."""
        now = self._clock()
        for worker in self._workers:
            work = worker.work
            if work is None or work.is_late or now - work.begun <= work.seconds:
                continue
            work.is_late = True
            frame = sys._current_frames().get(worker.thread)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else ""
            log.error("work.stands", pool=self.name, work=work.name, seconds=round(now - work.begun, 1), where=where)
            work.report(None, Overdue(f"{work.name} has not ended in {work.seconds:g} s"))
        if self._stands:
            log.error("pool.stands", pool=self.name, threads=len(self._workers), waiting=self._queue.qsize())
            with contextlib.suppress(queue.Empty):
                while (waiting := self._queue.get_nowait()) is not None:
                    waiting.report(None, Overdue(f"all {self._threads} threads ({self.name}) stand"))
            self.on_stuck()

    @property
    def _stands(self) -> bool:
        """Every thread is past its deadline."""
        return bool(self._workers) and all((work := worker.work) is not None and work.is_late for worker in self._workers)

    def _run(self) -> None:
        worker = _Worker()
        with self._joining:
            if len(self._workers) >= self._threads:  # one that was taken for dead, and was late: SQLite wants the same thread each time
                return
            self._workers.append(worker)
        while True:
            try:
                if not self._one(worker):
                    self._ended.put(None)
                    return
            except BaseException as error:  # out of memory, beside the work itself: whoever waits for it is told all the same
                _tell(worker, error)

    def _one(self, worker: _Worker) -> bool:
        """Does one piece of work; nothing of it stays behind in the thread. False for the word to end."""
        worker.work = work = self._queue.get()
        if work is None:
            return False
        if not work.is_unwanted():
            work.begun = self._clock()
            try:
                result = work.call(*work.arguments)
            except BaseException as error:
                work.report(None, RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
            else:
                work.report(result, None)
        worker.work = None
        if work.is_late:
            log.warning("work.ended_late", pool=self.name, work=work.name, seconds=round(self._clock() - work.begun, 1))
        return True


def _tell(worker: _Worker, error: BaseException) -> None:
    work = worker.work
    while work is not None:
        try:
            work.report(None, error)
            worker.work = work = None
        except BaseException:
            time.sleep(_AGAIN_SECONDS)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class Watched(Protocol):
    def look(self) -> None: ...


class _Watchdog:
    """One thread that looks at all threads; it is the process's, so it looks also while the event loop stands."""

    def __init__(self) -> None:
        self._watched: tuple[Watched, ...] = ()
        self._is_started = False

    def watch(self, watched: Watched) -> None:
        """Raises NotStarted."""
        self._watched = (*(one for one in self._watched if one is not watched), watched)
        if not self._is_started:
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError as error:
                raise NotStarted(f"the watchdog could not be started: {error}") from error
            self._is_started = True

    def forget(self, watched: Watched) -> None:
        self._watched = tuple(one for one in self._watched if one is not watched)

    def _run(self) -> None:
        while True:
            try:
                time.sleep(_LOOK_SECONDS)
                for one in self._watched:
                    one.look()
            except BaseException:
                continue


def replace_process() -> None:
    """Ends this process at once, so that the supervisor starts another."""
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STUCK)


_watchdog = _Watchdog()


def watch(watched: Watched) -> None:
    """Has a thread that is none of a pool's looked at as well. Raises NotStarted."""
    _watchdog.watch(watched)


def unwatch(watched: Watched) -> None:
    _watchdog.forget(watched)


# Work that somebody waits for: the steps of launches, resumes and suspends.
LATENCY = Pool("latency", 8, 300.0)
# Work of minutes: archives, folds, checksums of large files, transfers, removal of trees.
BULK = Pool("bulk", 2, 3600.0)
# What follows an end and nobody waits for: control groups, namespaces, small directories.
UPKEEP = Pool("upkeep", 2, 120.0)
# fsync(2) of several files at once, from a thread of another pool.
SYNC = Pool("sync", 8, 300.0)
_ALL = (LATENCY, BULK, UPKEEP, SYNC)


def start() -> None:
    """Starts the pools of this process. Raises NotStarted."""
    for pool in _ALL:
        pool.start()


def close(seconds: float = 10.0) -> None:
    """Waits for what is under way in all of them, for so long together."""
    deadline = time.monotonic() + seconds
    for pool in _ALL:
        pool.close(max(0.0, deadline - time.monotonic()))
