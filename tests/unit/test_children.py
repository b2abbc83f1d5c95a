"""Children of the supervisor: real processes that start, end, hang, and are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from gateway import children as module
from gateway.children import Child, Children, Process, StartError

SERVES = "printf 1 >/dev/fd/$READY; exec sleep 600"
FAILS = "exit 1"
HANGS = "exec sleep 600"
SILENT = 0.5  # seconds, of the rig's own clock where it is compared


class Rig:
    """Children whose command is what `script` is when they are started."""

    def __init__(self) -> None:
        self.script = SERVES
        self.changes = asyncio.Event()
        self.spawned = 0
        self.now = 0.0
        self.children = Children(self._spawn, self.changes.set, 10.0, SILENT, lambda: self.now)
        self.child = Child("one", [], 0)

    async def _spawn(self, child: Child, ready: int) -> Process:
        self.spawned += 1
        if not self.script:
            raise FileNotFoundError(2, "no such program")
        return await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", self.script, pass_fds=[ready], env={"READY": str(ready), "SAID": os.devnull}
        )

    async def looked(self) -> None:
        """Returns when the watch has looked at what is."""
        await asyncio.sleep(3 * SILENT / module._LOOKS)

    async def until_another_serves(self, than: Process | None) -> Process:
        async with asyncio.timeout(10):
            while True:
                self.changes.clear()
                serving = self.child.serving
                if serving is not None and serving is not than and serving.returncode is None:
                    return serving
                await self.changes.wait()

    async def stop(self) -> None:
        await self.children.stop_restarts()
        await self.children.end([self.child], signal.SIGKILL)


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(module, "_BACKOFF_FIRST", 0.01)
    one = Rig()
    yield one
    await one.stop()
    assert not one.child.processes


async def started(rig: Rig) -> Process:
    await rig.children.start(rig.child)
    assert rig.child.serving is not None
    return rig.child.serving


def lives(process: Process) -> bool:
    return process.returncode is None and Path(f"/proc/{process.pid}").exists()


async def test_what_ends_is_started_again(rig: Rig) -> None:
    first = await started(rig)
    first.kill()
    second = await rig.until_another_serves(first)
    second.kill()
    await rig.until_another_serves(second)
    assert len(rig.child.processes) == 1


async def test_a_successor_takes_over_before_its_predecessor_ends(rig: Rig) -> None:
    rig.script = f"trap 'exit 0' TERM; {SERVES.replace('exec sleep 600', 'while :; do sleep 0.01; done')}"
    first = await started(rig)
    second = await started(rig)
    assert second is not first and lives(second)
    async with asyncio.timeout(10):
        assert await first.wait() == 0
    assert rig.spawned == 2, "its end was wanted"


@pytest.mark.parametrize("script", [FAILS, HANGS, ""])
async def test_a_successor_that_does_not_serve_leaves_its_predecessor_in_its_place(rig: Rig, script: str) -> None:
    """And watched: it is started again when it ends, and ended at the stop."""
    first = await started(rig)
    rig.script = script
    rig.children.ready_seconds = 0.3 if script == HANGS else 10.0
    with pytest.raises(StartError, match="one did not start"):
        await rig.children.start(rig.child)
    rig.children.ready_seconds = 10.0
    assert rig.child.serving is first and lives(first) and list(rig.child.processes) == [first]
    rig.script = SERVES
    first.kill()
    second = await rig.until_another_serves(first)
    await rig.stop()
    assert not lives(second)


@pytest.mark.parametrize("script", [FAILS, HANGS, ""])
async def test_what_cannot_be_started_again_is_tried_until_it_can(rig: Rig, script: str) -> None:
    rig.children.ready_seconds = 0.3 if script == HANGS else 10.0
    first = await started(rig)
    rig.script = script
    first.kill()
    await until(lambda: rig.spawned >= 4, 10)
    rig.script = SERVES
    await rig.until_another_serves(first)
    assert len(rig.child.processes) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), ValueError("whatever")], ids=repr)
async def test_whatever_a_start_meets_it_is_tried_again(rig: Rig, error: Exception) -> None:
    first = await started(rig)
    fails = [error, error]
    spawn = rig._spawn

    async def failing(child: Child, ready: int) -> Process:
        if fails:
            raise fails.pop()
        return await spawn(child, ready)

    rig.children._spawn = failing
    first.kill()
    await rig.until_another_serves(first)
    assert not fails


async def test_one_that_ends_as_soon_as_it_serves_is_started_again(rig: Rig) -> None:
    rig.script = "printf 1 >/dev/fd/$READY; exit 3"
    await rig.children.start(rig.child)
    rig.script = SERVES
    await rig.until_another_serves(None)


async def test_replacements_follow_each_other(rig: Rig) -> None:
    """Two at once would leave a process that nobody knows."""
    first = await started(rig)
    await asyncio.gather(*(rig.children.start(rig.child) for _ in range(3)))
    assert rig.spawned == 4 and rig.child.serving is not None and lives(rig.child.serving)
    async with asyncio.timeout(10):
        while len(rig.child.processes) > 1:
            rig.changes.clear()
            await rig.changes.wait()
    assert list(rig.child.processes) == [rig.child.serving] and not lives(first)


async def test_a_replacement_that_comes_while_it_is_started_again_is_the_only_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.child, "backoff", 0.0)
    first = await started(rig)
    first.kill()
    await first.wait()
    await asyncio.gather(rig.children.start(rig.child), rig.until_another_serves(first))
    await asyncio.gather(*rig.children._restarts)
    assert len(rig.child.processes) == 1 and rig.spawned <= 3


async def test_a_start_that_is_given_up_leaves_no_process(rig: Rig) -> None:
    rig.script = HANGS
    start = asyncio.ensure_future(rig.children.start(rig.child))
    async with asyncio.timeout(10):
        await rig.changes.wait()
    (process,) = rig.child.processes
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not lives(process) and rig.child.serving is None


async def test_a_stop_while_it_is_started_again_leaves_no_process(rig: Rig) -> None:
    first = await started(rig)
    rig.script = HANGS
    first.kill()
    async with asyncio.timeout(10):
        while rig.spawned < 2 or not rig.child.processes or first in rig.child.processes:
            rig.changes.clear()
            await rig.changes.wait()
    (second,) = rig.child.processes
    await rig.stop()
    assert not lives(second)


async def test_what_does_not_end_in_time_is_killed(rig: Rig) -> None:
    """The time is that of all together: three that hang took three times as long once."""
    rig.script = f"trap '' TERM; {SERVES.replace('exec sleep 600', 'while :; do sleep 0.01; done')}"
    others = [Child(str(number), [], 0) for number in range(3)]
    for child in others:
        await rig.children.start(child)
    processes = [next(iter(child.processes)) for child in others]
    await rig.children.stop_restarts()
    began = time.monotonic()
    await rig.children.end(others, signal.SIGTERM, 0.4)
    assert time.monotonic() - began < 1.1
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 3


LIVES = "trap 'echo stands >$SAID' USR2; printf 1 >/dev/fd/$READY; while :; do sleep 0.05; printf . >/dev/fd/$READY; done"


async def test_one_that_stands_still_says_where_is_killed_and_started_again(rig: Rig) -> None:
    """A loop that turns no more answers nothing, and ends by itself as little."""
    watch = asyncio.ensure_future(rig.children.end_silent([rig.child]))
    first = await started(rig)  # it says nothing but that it serves
    rig.now = SILENT * 0.4
    await rig.looked()
    rig.now = SILENT * 0.8
    await rig.looked()
    assert lives(first), "for so long it may be silent"
    rig.now = SILENT * 1.1
    rig.script = LIVES
    second = await rig.until_another_serves(first)
    assert first.returncode in (-signal.SIGUSR2, -signal.SIGKILL) and rig.child.restarts == 1
    rig.now = SILENT * 1.5
    await until(lambda: rig.children._heard[second] == rig.now)
    rig.now = SILENT * 1.9
    await until(lambda: rig.children._heard[second] == rig.now)
    assert lives(second), "it gives signs of life"
    watch.cancel()


async def test_one_that_was_replaced_and_stands_still_is_killed_too(rig: Rig) -> None:
    rig.script = f"trap '' TERM USR2; {SERVES.replace('exec sleep 600', 'while :; do sleep 0.01; done')}"
    first = await started(rig)
    rig.script = LIVES
    second = await started(rig)
    watch = asyncio.ensure_future(rig.children.end_silent([rig.child]))
    for share in (0.4, 0.8, 1.1):
        rig.now = SILENT * share
        await until(lambda: rig.children._heard[second] == rig.now)
        await rig.looked()
    await until(lambda: first.returncode is not None)
    assert lives(second) and rig.child.serving is second
    watch.cancel()


async def test_a_host_that_stood_still_accuses_nobody(rig: Rig) -> None:
    """As after a pause of a virtual machine: everybody was silent for as long."""
    watch = asyncio.ensure_future(rig.children.end_silent([rig.child]))
    first = await started(rig)
    await rig.looked()
    rig.now = SILENT * 50
    await rig.looked()
    assert lives(first) and rig.children._heard[first] == rig.now
    watch.cancel()


async def test_why_a_child_does_not_serve_is_known_until_it_does(rig: Rig) -> None:
    first = await started(rig)
    assert rig.child.serves and not rig.child.failure
    rig.script = ""
    first.kill()
    await until(lambda: "no such program" in rig.child.failure)
    assert not rig.child.serves and rig.child.restarts == 1
    rig.script = SERVES
    await rig.until_another_serves(first)
    assert rig.child.serves and not rig.child.failure


async def test_no_descriptor_for_the_pipe_is_a_failure_like_another(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await started(rig)

    def none(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe2", none)
        first.kill()
        await until(lambda: "Too many open files" in rig.child.failure)
    await rig.until_another_serves(first)


async def test_starts_leave_no_descriptors(rig: Rig) -> None:
    await started(rig)
    before = len(os.listdir("/proc/self/fd"))
    for script in (FAILS, "", SERVES):
        rig.script = script
        with contextlib.suppress(StartError):
            await rig.children.start(rig.child)
    async with asyncio.timeout(10):
        while len(rig.child.processes) > 1:
            rig.changes.clear()
            await rig.changes.wait()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_signal_takes_the_status_of_a_child_from_nobody(caplog: pytest.LogCaptureFixture, own_watcher: None) -> None:
    """One has just ended, and the loop has not heard of it."""

    async def ended() -> int:
        module.watch_without_threads()
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "read word; exit 3", stdin=reading)
        os.close(reading)
        os.close(writing)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - the loop must not hear of it
        module._send(process, signal.SIGTERM)
        async with asyncio.timeout(10):
            return await process.wait()

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        assert runner.run(ended()) == 3
    assert "exit status already read" not in caplog.text


def test_a_child_that_cannot_be_watched_does_not_live_on(monkeypatch: pytest.MonkeyPatch, own_watcher: None) -> None:
    """A second vmm, say, of which nobody knew."""
    begun: list[int] = []
    opened = os.pidfd_open

    def short(pid: int, flags: int = 0) -> int:
        begun.append(pid)
        if len(begun) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(pid, flags)

    async def tried() -> None:
        module.watch_without_threads()
        rig = Rig()
        with pytest.raises(StartError, match="Too many open files"):
            await rig.children.start(rig.child)
        assert not os.path.exists(f"/proc/{begun[0]}") and not rig.child.processes
        await rig.children.start(rig.child)
        await rig.stop()

    monkeypatch.setattr(os, "pidfd_open", short)
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(tried())
