"""The supervisor: reloads one after the other, what it records, and whose sockets it takes over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import structlog
from waiting import until

from gateway import instance, supervisor
from gateway.children import Child, Process
from gateway.config import ConfigError, Settings
from gateway.status import Recorded, State, living, read_state, state_file
from gateway.supervisor import Supervisor
from vmm import syscalls

SERVES = "printf 1 >/dev/fd/$READY; exec sleep 600"


class Scripted(Supervisor):
    """Two workers that are shell scripts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.script = SERVES
        self.spawned: list[str] = []
        self.may_spawn = asyncio.Event()
        self.may_spawn.set()
        self.edges = [Child(f"edge-{slot}", [], 0) for slot in range(2)]
        self._children = [*self.edges, Child("vmm", [], 0)]

    async def _spawn(self, child: Child, ready: int) -> Process:
        await self.may_spawn.wait()
        self.spawned.append(child.name)
        return await asyncio.create_subprocess_exec("/bin/sh", "-c", self.script, pass_fds=[ready], env={"READY": str(ready)})

    def serving(self) -> list[int]:
        return [child.serving.pid for child in self.edges if child.serving is not None]


@pytest.fixture
async def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scripted]:
    monkeypatch.setattr(instance, "update_certificates", lambda settings: None)
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run")
    settings.runtime.mkdir(parents=True)
    made = Scripted(settings)
    for child in made._children:
        await made._processes.start(child)
    reloads = asyncio.ensure_future(made.keep_reloading())
    yield made
    reloads.cancel()
    await made.stop_started()


async def test_a_reload_replaces_each_worker_once(one: Scripted) -> None:
    before = one.serving()
    one.spawned.clear()
    one.want_reload()
    await until(lambda: not set(one.serving()) & set(before))
    assert one.spawned == ["edge-0", "edge-1"]


async def test_a_reload_that_fails_is_recorded_and_the_next_one_works(one: Scripted) -> None:
    """A line of a worker's module is broken, and mended."""
    path, before = state_file(one._settings), one.serving()
    one.script = "exit 1"
    one.want_reload()
    await until(lambda: read_state(path).failure)
    assert read_state(path).failure == "edge-0 did not start: its words are above" and read_state(path).failed_at > 0
    assert one.serving() == before and {entry.pid for entry in read_state(path).processes if entry.name != "vmm"} == set(before)
    one.script = SERVES
    one.want_reload()
    await until(lambda: not set(one.serving()) & set(before))


async def test_a_state_that_cannot_be_saved_keeps_nothing_from_being_started_again(one: Scripted) -> None:
    """As with a full tmpfs: the task that watched the process once ended with the error, and the process was never started again."""
    path, before = state_file(one._settings), one.serving()
    path.unlink(missing_ok=True)
    path.mkdir()
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: len(one.serving()) == 2 and before[0] not in one.serving())
    one.script = "exit 1"
    one.want_reload()
    await until(lambda: one._state.failure)
    one.script = SERVES
    before = one.serving()
    one.want_reload()
    await until(lambda: not set(one.serving()) & set(before))
    path.rmdir()
    one._save_state()
    assert {entry.pid for entry in read_state(path).processes if entry.serves and entry.name != "vmm"} == set(one.serving())


async def test_a_stop_ends_though_the_certificates_file_server_stands_still(one: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that looks at them also removes the sockets and directories: those are the next start's then."""
    stands, is_over = threading.Event(), threading.Event()

    def look(settings: Settings) -> None:
        stands.set()
        assert is_over.wait(30)

    monkeypatch.setattr(instance, "update_certificates", look)
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.4)
    one._files.start()
    one.want_reload()
    try:
        await until(stands.is_set, 5)
        with structlog.testing.capture_logs() as said:
            await asyncio.wait_for(one.stop(), 10)
        assert [line["event"] for line in said if line["log_level"] == "error"] == ["stop.not_cleared"]
    finally:
        is_over.set()
        one._files.close()


async def test_certificates_are_looked_at_again_whatever_went_wrong_once(one: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def update(settings: Settings) -> None:
        looked.append(1)
        raise TypeError("a key of a kind that the library does not know")

    monkeypatch.setattr(instance, "update_certificates", update)
    monkeypatch.setattr(supervisor, "_CERTIFICATES_SECONDS", 0.001)
    keeper = asyncio.ensure_future(one.keep_certificates())
    await until(lambda: len(looked) > 2)
    keeper.cancel()


async def test_reloads_that_are_asked_for_during_one_are_one_more(one: Scripted) -> None:
    one.may_spawn.clear()
    one.spawned.clear()
    one.want_reload()
    await until(lambda: not one._reload_wanted.is_set())
    for _ in range(3):
        one.want_reload()
    one.may_spawn.set()
    await until(lambda: len(one.spawned) == 4 and not one._reload_wanted.is_set())
    assert one.spawned == ["edge-0", "edge-1"] * 2


async def test_every_process_that_lives_is_recorded(one: Scripted) -> None:
    """One that starts or has been replaced too: the next supervisor ends it."""
    path = state_file(one._settings)
    one.script = "exec sleep 600"
    one.want_reload()
    await until(lambda: len(read_state(path).processes) == 4)
    assert [entry.serves for entry in read_state(path).processes if entry.name == "edge-0"] == [True, False]
    assert all(syscalls.start_time(entry.pid) == entry.started for entry in read_state(path).processes)
    for process in one.edges[0].processes:
        if process is not one.edges[0].serving:
            process.kill()
    await until(lambda: len(read_state(path).processes) == 3)


def test_the_processes_of_an_earlier_supervisor_are_those_that_still_run(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.json"
    assert living(path) == []
    path.write_text("{")
    assert living(path) == []
    mine = Recorded("edge-0", os.getpid(), syscalls.start_time(os.getpid()), True, {})
    others = [Recorded("edge-1", os.getpid(), 1, True, {}), Recorded("vmm", 2**22 + 1, None, True, {})]
    path.write_bytes(msgspec.json.encode(State([mine, *others])))
    assert living(path) == [mine]


def test_sockets_that_two_processes_share_are_taken_over_once() -> None:
    """A worker and its successor, where a supervisor was killed during a reload."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    recorded = [Recorded("edge-0", os.getpid(), None, True, {"edge": [one.fileno()]}) for one in (*listeners, listeners[0])]
    taken = supervisor._adopt_sockets(recorded)
    assert [[one.getsockname() for one in group] for group in taken["edge"]] == [[one.getsockname()] for one in listeners]
    for group in [*taken.values()]:
        for sockets in group:
            for one in sockets:
                one.close()
    for one in listeners:
        one.close()


def test_no_thread_is_started_for_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_watcher: None) -> None:
    """The supervisor starts again what a moment without memory has ended: a thread that dies of the same one is waited for for ever."""
    began: list[threading.Thread] = []

    class Starting(Scripted):
        async def start(self) -> Settings:
            await self._processes.start(self._children[-1])
            process = self._children[-1].serving
            assert process is not None
            process.kill()
            raise ConfigError(f"it ended with {await process.wait()}")

    monkeypatch.setattr(supervisor, "Supervisor", Starting)
    monkeypatch.setattr(threading.Thread, "start", began.append)
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run")
    settings.runtime.mkdir(parents=True)
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner, pytest.raises(ConfigError, match="ended with -9"):
        runner.run(asyncio.wait_for(supervisor.serve(settings, lambda started: None), 10))
    assert not began


async def test_a_stop_during_the_start_ends_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_watcher: None) -> None:
    made: list[Scripted] = []
    hangs = asyncio.Event()

    class Hanging(Scripted):
        async def start(self) -> Settings:
            made.append(self)
            await self._processes.start(self._children[-1])
            self.script = "exec sleep 600"
            hangs.set()
            await self._processes.start(self.edges[0])
            raise AssertionError

    monkeypatch.setattr(supervisor, "Supervisor", Hanging)
    settings = Settings(root=tmp_path / "root", run=tmp_path / "run")
    settings.runtime.mkdir(parents=True)
    serving = asyncio.ensure_future(supervisor.serve(settings, lambda started: None))
    async with asyncio.timeout(10):
        await hangs.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert not any(child.processes for child in made[0]._children)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


def test_children_that_nobody_waits_for_are_gone_at_the_second_look() -> None:
    """Hypervisors of a vmm that was replaced were left for good, each with a process id: the supervisor is given them, as a subreaper."""
    orphan = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as living:
        first = supervisor._reap(set())
        assert orphan in first and living.pid not in first and Path(f"/proc/{orphan}").exists(), "whoever waits for it has had no time yet"
        assert orphan not in supervisor._reap(first)
        assert not Path(f"/proc/{orphan}").exists()
