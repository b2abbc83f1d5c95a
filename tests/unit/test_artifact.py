"""Artifacts from a store that is slow, breaks off or has no end; and a container build that control follows while vmm is away."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.accounts.directory import Credentials
from gateway.config import Settings
from gateway.images import artifact, dockerfile, pipeline
from gateway.images.artifact import BuildFailed
from gateway.images.dockerfile import Prepared
from gateway.images.pipeline import Job, Pipeline
from gateway.messages import BuildRequest, BuildResult, Capacity, HostInfo, Shape
from gateway.sessions import host as host_module
from gateway.sessions.host import RpcError, RpcLost
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.logs import LogStore
from gateway.sessions.model import Build, Image, Version

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"


@contextlib.contextmanager
def object_store(length: int, *pieces: bytes, pause: float = 0.0) -> Iterator[Settings]:
    """Answers each GET with `length`, and sends the pieces."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                one, _ = listener.accept()
                with one:
                    one.recv(1 << 16)
                    one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
                    for piece in pieces:
                        one.sendall(piece)
                        if stop.wait(pause):
                            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            port = listener.getsockname()[1]
            yield Settings(object_store={"embedded": False, "endpoint": f"http://127.0.0.1:{port}"})  # type: ignore[arg-type]
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def fetch(settings: Settings, target: Path) -> int:
    return artifact.fetch(settings, Credentials("AKIA", "s", "", 0.0), "s3://bucket/app.zip", target)


def test_an_artifact_is_fetched(tmp_path: Path) -> None:
    with object_store(6, b"abc", b"def") as settings:
        assert fetch(settings, tmp_path / "a") == 6
    assert (tmp_path / "a").read_bytes() == b"abcdef"


def test_an_object_store_that_drips_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte came within the time for one, so that the build had no end."""
    monkeypatch.setattr(artifact, "_FETCH_SECONDS", 0.1)
    with (
        object_store(1 << 20, *[b"x"] * 500, pause=0.02) as settings,
        pytest.raises(BuildFailed, match=r"INTERNAL_PLATFORM_ERROR: the object store is too slow: \d+ bytes of s3://bucket/app.zip in 0 s"),
    ):
        fetch(settings, tmp_path / "a")


def test_the_deadline_grows_with_what_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_FETCH_SECONDS", 0.0)
    monkeypatch.setattr(artifact, "_FETCH_BYTES_PER_SECOND", 1 << 10)
    with object_store(5 << 10, *[bytes(1 << 10)] * 5, pause=0.02) as settings:
        assert fetch(settings, tmp_path / "a") == 5 << 10


def test_an_artifact_that_breaks_off_is_no_artifact(tmp_path: Path) -> None:
    with object_store(100, b"short") as settings, pytest.raises(BuildFailed, match="broke off after 5 of 100 bytes of s3:"):
        fetch(settings, tmp_path / "a")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, data: bytes) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with object_store(3, b"abc") as settings:
        monkeypatch.setattr(Path, "open", lambda *_: Full())
        with pytest.raises(BuildFailed, match=r"DISK_STORAGE_FULL: no room for s3://bucket/app\.zip"):
            fetch(settings, tmp_path / "a")


# ---- a container build is followed ----


class Host:
    """vmm, whose answers to `build_result` are `answers`."""

    def __init__(self, *answers: BuildResult | Exception) -> None:
        self.answers = list(answers)
        self.builds = 0
        self.said = "step of build {}\n"

    async def reclaim_capacity(self) -> Capacity:
        return Capacity(1 << 40, 1 << 40, 1 << 30, 0)

    async def info(self) -> HostInfo:
        return HostInfo("tcg", "", "qemu", 4096, 2, "x86_64")

    async def build(self, request: BuildRequest, *sources: Path) -> tuple[int, int]:
        self.builds += 1
        ends = []
        for text in (self.said.format(self.builds), "BASE\nCONTAINER\n"):
            out, into = os.pipe()
            os.write(into, text.encode())
            os.close(into)
            ends.append(out)
        return ends[0], ends[1]

    async def build_result(self, build: str) -> BuildResult:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Building:
    def __init__(self, directory: Path, host: Host) -> None:
        self.logs = LogStore(directory / "logs")
        self.pipeline = Pipeline(Settings(root=directory), host, None, lambda job: None, None)  # type: ignore[arg-type]
        version = Version(ARN, "1.0", {"buildRoleArn": ""}, 0.0, 0.0, key="k")
        self.job = Job(Image("i", ARN, "a", 0.0, 0.0), version, Build("b"), LineWriter(self.logs, "1", "g", "s"), Prepared(""))

    async def container(self) -> dict[str, Any]:
        return await self.pipeline._container(self.job, Shape(512, 1, 1 << 30, "tcg", 512))

    @property
    def lines(self) -> list[str]:
        return [event.m for event in self.logs.read("1", "g", "s")[0]]


DONE = BuildResult(0, '{"Cmd":["/app"],"Labels":{"a":"b"}}', False, False)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_AWAY_RETRY_SECONDS", 0.0)


async def test_a_result_that_is_lost_is_asked_for_again(tmp_path: Path) -> None:
    """It was taken for a failure, and the build that went on was in the way of the next."""
    host = Host(RpcLost("timeout"), RpcLost("timeout"), DONE)
    one = Building(tmp_path, host)
    assert await one.container() == {"Cmd": ["/app"], "Env": []}, "labels are of no use to a guest"
    assert host.builds == 1 and one.lines == ["step of build 1"]


async def test_a_build_that_vmm_does_not_know_any_more_is_made_again(tmp_path: Path) -> None:
    host = Host(RpcLost("vmm restarts"), RpcError("Missing", "build b is not known: it was interrupted"), DONE)
    one = Building(tmp_path, host)
    await one.container()
    assert host.builds == 2
    assert one.lines == ["step of build 1", "torpor: the host daemon was restarted; building again", "step of build 2"]


async def test_a_long_dockerfile_is_not_read_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 16 MiB, which is a few KiB in an archive, held all of the API up for a hundred seconds."""
    one = Building(tmp_path, Host())
    file = tmp_path / "control/builds/b/context/Dockerfile"
    read_by: list[threading.Thread] = []
    prepare = dockerfile.prepare

    async def fetch(job: Job) -> None:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"FROM x\nRUN caf\xe9\n")

    def noted(*words: Any) -> Prepared:
        read_by.append(threading.current_thread())
        return prepare(*words)

    monkeypatch.setattr(one.pipeline, "_fetch", fetch)
    monkeypatch.setattr(dockerfile, "prepare", noted)
    await one.pipeline.check(one.job)
    assert one.job.prepared is not None and file.read_bytes() == b"FROM x\nRUN caf\xe9\n"
    assert read_by and threading.main_thread() not in read_by


async def test_what_was_built_and_is_not_taken_is_said(tmp_path: Path) -> None:
    one = Building(tmp_path, Host(BuildResult(1, "", False, False, "the image's configuration (ENV, LABEL, ...) has 5 bytes: 4 are taken")))
    with pytest.raises(BuildFailed, match=r"^CONTAINER_BUILD_FAILED: the image's configuration"):
        await one.container()


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (BuildResult(1, "", False, False, room_bytes=300 << 20), "DISK_STORAGE_FULL: the container build wrote more than it may: 300 MiB"),
        (BuildResult(1, "", True, False, room_bytes=300 << 20), "DISK_STORAGE_FULL: the disk was full during the container build"),
        (
            BuildResult(1, "", True, False, "the host's disk has no room for a build: 1 MiB"),
            "DISK_STORAGE_FULL: the host's disk has no room",
        ),
    ],
)
async def test_whose_room_was_full_is_said(tmp_path: Path, result: BuildResult, reason: str) -> None:
    host = Host(result)
    host.said = "fallocate: /x: No space left on device\n"
    with pytest.raises(BuildFailed, match=f"^{reason}"):
        await Building(tmp_path, host).container()


async def test_a_build_that_says_too_much_is_ended(tmp_path: Path) -> None:
    """It said what it liked for half an hour, and control read all of it."""
    host = Host()
    out, into = os.pipe()
    phases, into_phases = os.pipe()
    os.close(into_phases)
    ended = asyncio.Event()

    async def build(request: BuildRequest, *sources: Path) -> tuple[int, int]:
        return out, phases

    async def result(build: str) -> BuildResult:
        await ended.wait()
        raise AssertionError("it is not waited for")

    host.build, host.build_result = build, result  # type: ignore[method-assign]
    one = Building(tmp_path, host)
    one.pipeline._settings.images.build_log_mib = 1
    flood = threading.Thread(target=_flood, args=(into,))
    flood.start()
    with pytest.raises(BuildFailed, match=r"^CONTAINER_BUILD_FAILED: the container build said more than 1 MiB \(images.build_log_mib\)"):
        await one.container()
    flood.join(10)
    assert not flood.is_alive(), "nobody reads it any more"


def _flood(into: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(into, b"y\n" * 2048)
    os.close(into)


async def test_a_phase_is_one_that_there_is(tmp_path: Path) -> None:
    """Each word becomes a row in the store; an empty one was an error of control's."""
    one, entered = Building(tmp_path, Host(DONE)), []
    one.pipeline._on_phase = lambda job: entered.append(job.build.phase)
    for said in (b"\n", b"BASE\nCONTAINER\n", b"x" * 999, b"DISK \xff DONE\n"):
        one.pipeline._enter(one.job, said)
    assert entered == ["BASE", "CONTAINER", "DISK"]


async def test_a_log_that_a_steps_leftover_keeps_open_holds_up_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_REST_SECONDS", 0.01)
    host = Host(DONE)
    out, into = os.pipe()
    phases, into_phases = os.pipe()

    async def build(request: BuildRequest, *sources: Path) -> tuple[int, int]:
        return out, phases

    host.build = build  # type: ignore[method-assign]
    await Building(tmp_path, host).container()
    for end in (into, into_phases):
        with pytest.raises(BrokenPipeError):
            os.write(end, b"x")
        os.close(end)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RpcError("DiskFull", "no room for the build"), "DISK_STORAGE_FULL"),
        (RpcError("OSError", "[Errno 28] No space left on device: 'console.log'"), "DISK_STORAGE_FULL"),
        (RpcError("Unavailable", "the host is too slow"), "INTERNAL_PLATFORM_ERROR"),
    ],
)
async def test_a_full_disk_is_said_in_whatever_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RpcError, code: str) -> None:
    one = Building(tmp_path, Host())

    async def fails(job: Job) -> None:
        raise error

    monkeypatch.setattr(one.pipeline, "_run", fails)
    with pytest.raises(BuildFailed) as raised:
        await one.pipeline.run(one.job)
    assert raised.value.code == code


async def test_the_deadline_of_a_seal_grows_with_the_memory_that_is_written(tmp_path: Path) -> None:
    """On a slow disk the image of a large guest was given up, while it was being written."""
    asked: list[float] = []

    class Client:
        async def call(self, method: str, body: object, kind: object, timeout: float) -> None:
            asked.append(timeout)

    one = host_module.Host(Client(), tmp_path)  # type: ignore[arg-type]
    for memory_mib in (2048, 16384):
        await one.seal("s", "i", memory_mib, "123456789012")
    assert asked[0] > 2048 / 10 and asked[1] > 16384 / 10
