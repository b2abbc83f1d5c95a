"""Pools of threads: nobody waits for ever, neither for a thread nor for its work."""

from __future__ import annotations

import _thread
import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from gateway import executors
from gateway.executors import NotStarted, Overdue, Pool

REPO = Path(__file__).resolve().parents[2]


class Rig:
    """A pool of two threads whose deadlines pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pool = Pool("test", 2, 10.0, lambda: self.now)
        self.stuck: list[int] = []
        self.pool.on_stuck = lambda: self.stuck.append(1)
        self.may_end = threading.Event()
        self.begun: list[int] = []

    def hang(self, number: int) -> int:
        self.begun.append(number)
        assert self.may_end.wait(30)
        return number


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.may_end.set()
    made.pool.close()


async def test_work_is_done_and_its_outcome_is_the_callers(rig: Rig) -> None:
    assert await rig.pool.run(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await rig.pool.run(divmod, 7, 0)
    with pytest.raises(RuntimeError, match="StopIteration"):  # asyncio takes none as a future's outcome
        await rig.pool.run(next, iter(()))
    assert await asyncio.gather(*(rig.pool.run(str, number) for number in range(100))) == [str(number) for number in range(100)]


async def test_no_thread_is_started_after_the_start(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.pool.start()

    def none(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(_thread, "start_new_thread", none)
    works = [asyncio.ensure_future(rig.pool.run(rig.hang, number)) for number in range(4)]
    await until(lambda: len(rig.begun) == 2)
    rig.may_end.set()
    assert await asyncio.gather(*works) == [0, 1, 2, 3]


async def test_work_past_its_deadline_fails_for_its_caller_and_says_where_it_stands(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    late = asyncio.ensure_future(rig.pool.run(rig.hang, 1, seconds=5.0))
    await until(lambda: rig.begun)
    rig.now = 5.0
    rig.pool.look()
    assert not late.done()
    rig.now = 5.1
    rig.pool.look()
    with pytest.raises(Overdue, match=r"hang has not ended in 5 s"):
        await late
    said = capsys.readouterr()
    assert "work.stands" in said.out + said.err and "may_end.wait" in said.out + said.err
    assert not rig.stuck, "another thread goes on"
    assert await rig.pool.run(str, 1) == "1"


async def test_a_deadline_begins_when_the_work_does(rig: Rig) -> None:
    """Else a queue would make everything behind it late."""
    works = [asyncio.ensure_future(rig.pool.run(rig.hang, number)) for number in range(2)]
    await until(lambda: len(rig.begun) == 2)
    behind = asyncio.ensure_future(rig.pool.run(str, 1))
    rig.now = 9.0
    rig.pool.look()
    rig.may_end.set()
    assert await behind == "1" and await asyncio.gather(*works) == [0, 1]


async def test_a_pool_whose_threads_all_stand_has_the_process_replaced(rig: Rig) -> None:
    works = [asyncio.ensure_future(rig.pool.run(rig.hang, number)) for number in range(2)]
    await until(lambda: len(rig.begun) == 2)
    behind = asyncio.ensure_future(rig.pool.run(str, 1))
    await asyncio.sleep(0)
    rig.now = 10.1
    rig.pool.look()
    for work in (*works, behind):
        with pytest.raises(Overdue):
            await work
    assert rig.stuck == [1]
    with pytest.raises(Overdue, match="all 2 threads"):
        await rig.pool.run(str, 1)
    rig.may_end.set()
    await until(lambda: not rig.pool._stands)
    assert await rig.pool.run(str, 1) == "1"


async def test_what_nobody_waits_for_any_more_is_not_begun(rig: Rig) -> None:
    works = [asyncio.ensure_future(rig.pool.run(rig.hang, number)) for number in range(2)]
    await until(lambda: len(rig.begun) == 2)
    behind = asyncio.ensure_future(rig.pool.run(rig.hang, 3))
    await asyncio.sleep(0)
    behind.cancel()
    await asyncio.gather(behind, return_exceptions=True)
    rig.may_end.set()
    await asyncio.gather(*works)
    assert await rig.pool.run(str, 1) == "1" and rig.begun == [0, 1]


def test_a_thread_that_dies_before_it_could_say_so_is_started_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One moment without memory: `Thread.start` waits for ever then."""
    real, tries = _thread.start_new_thread, []

    def dies(work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        tries.append(1)
        if len(tries) == 1:
            return real(lambda: None, ())
        if len(tries) == 2:
            raise RuntimeError("can't start new thread")
        return real(work, arguments)

    rig.pool.start()  # the watchdog's thread is there
    other = Pool("other", 2, 10.0)
    monkeypatch.setattr(_thread, "start_new_thread", dies)
    other.start()
    assert len(other._workers) == 2 and other.map(str, [1, 2, 3]) == ["1", "2", "3"]
    other.close()


def test_a_thread_that_is_late_and_was_started_again_is_one_too_many(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host the first one comes when it was taken for dead; a pool of one has one all the same, as SQLite wants it."""
    real, late, ended = _thread.start_new_thread, [], []

    def start(work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        late.append(work)
        for one in late if len(late) == 2 else []:
            real(lambda one=one: (one(), ended.append(1)), ())
        return 0

    rig.pool.start()  # the watchdog's thread is there
    other = Pool("other", 1, 10.0)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    other.start()
    while not ended:
        time.sleep(0.001)
    assert len(other._workers) == len(set(other.map(lambda _: threading.get_ident(), range(50)))) == 1
    other.close()


def test_a_start_without_room_for_threads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", none)
    monkeypatch.setattr(executors, "_START_SECONDS", 0.01)
    with pytest.raises(NotStarted, match=r"0 of 3 threads|watchdog"):
        Pool("none", 3, 10.0).start()


async def test_memory_that_is_short_beside_the_work_is_told_to_the_caller(rig: Rig) -> None:
    rig.pool.start()
    short = [MemoryError(), MemoryError()]
    told: list[object] = []

    def report(result: object, error: BaseException | None) -> None:
        if short:
            raise short.pop()
        told.append(error)

    rig.pool._queue.put(executors._Work(str, (1,), 10.0, report, lambda: False))
    await until(lambda: told)
    assert isinstance(told[0], MemoryError) and await rig.pool.run(str, 1) == "1"


def test_the_first_error_of_many_is_raised_when_all_have_ended(rig: Rig) -> None:
    done = []

    def work(number: int) -> None:
        if number == 1:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError):
        rig.pool.map(work, range(5))
    assert done == [0, 2, 3, 4]


def test_deadlines_grow_with_bytes() -> None:
    assert executors.seconds_for(0) == 60 and executors.seconds_for(5 << 30) == 60 + 1024


def test_a_close_waits_for_what_is_under_way_and_not_for_ever(rig: Rig) -> None:
    rig.pool.start()
    rig.pool._queue.put(executors._Work(rig.hang, (1,), 10.0, lambda *_: None, lambda: False))
    began = time.monotonic()
    rig.pool.close(0.05)
    assert 0.05 <= time.monotonic() - began < 5


CHILD = """
import asyncio, resource, sys, threading, time
from gateway import executors

executors._LOOK_SECONDS = 0.01

async def main():
    pool = executors.Pool("only", 1, 0.05)
    try:
        await pool.run(time.sleep, 60)
    finally:
        await asyncio.sleep(30)

asyncio.run(main())
"""


def test_a_process_whose_only_thread_stands_ends_with_a_status_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=30, cwd=REPO, check=False)
    assert done.returncode == executors.STUCK, done.stderr
    assert "pool.stands" in done.stdout + done.stderr and "Thread 0x" in done.stderr


SHORT = """
import ctypes, json, os, resource, sys, threading, time
from gateway import executors

threads = int(sys.argv[1])
soft = 64 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + soft, resource.RLIM_INFINITY))
executors._START_SECONDS = 0.5
try:
    executors.Pool("short", threads, 10.0).start()
    print("started")
except executors.NotStarted as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
pool = executors.Pool("again", 2, 10.0)
pool.start()
print(pool.map(str, [1, 2]))
os._exit(0)
"""


def test_threads_for_which_there_is_no_memory_end_a_start_and_not_the_next_one() -> None:
    """A real limit: the stacks of 100 threads do not fit."""
    done = subprocess.run([sys.executable, "-u", "-c", SHORT, "100"], capture_output=True, text=True, timeout=30, cwd=REPO, check=False)
    lines = done.stdout.splitlines()
    assert lines[0].endswith("of 100 threads (short) could be started") and lines[1] == "['1', '2']", done.stderr
