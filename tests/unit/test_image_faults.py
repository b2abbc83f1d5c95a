"""Images on a host that fails: whatever the store or the host refuses, a version ends in a state that can be deleted or tried again."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from api_rig import ScriptedPipeline
from waiting import until

from gateway.config import Settings
from gateway.images import artifact, pipeline, registry
from gateway.images.artifact import BuildFailed
from gateway.images.pipeline import Job, Pipeline
from gateway.images.registry import INTERRUPTED, Registry
from gateway.messages import ImageName
from gateway.sessions import store as store_module
from gateway.sessions.host import RpcError, RpcLost
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.logs import LogStore
from gateway.sessions.model import Build, Image, Session, Version
from gateway.sessions.states import State
from gateway.sessions.store import Store, StoreError
from vmm.errors import Unavailable
from vmm.images import Images
from vmm.rpc.images import ImageCalls

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
REQUEST = {"resources": [{"minimumMemoryInMiB": 512}]}


class Ahead:
    def __init__(self) -> None:
        self.fails: list[Exception] = []

    def want(self, arn: str, version: str) -> None:
        pass

    async def drop(self, key: str) -> None:
        if self.fails:
            raise self.fails.pop(0)


class FailingPipeline(ScriptedPipeline):
    """`fail[call]` is raised once each."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: dict[str, list[Exception]] = {}
        self.wanted: set[str] = set()

    def _may_fail(self, name: str) -> None:
        if self.fail.get(name):
            raise self.fail[name].pop(0)

    async def check(self, job: Job) -> None:
        self._may_fail("check")

    async def run(self, job: Job) -> None:
        self._may_fail("run")
        await super().run(job)

    async def clean(self, job: Job, keep_image: bool) -> None:
        self._may_fail("clean")
        if not keep_image and job.version.key in self.wanted:
            raise AssertionError("what is still wanted goes")

    async def delete(self, key: str) -> None:
        self._may_fail("delete")
        await super().delete(key)


class Rig:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "state.db"
        self.logs = LogStore(directory / "logs")
        self.pipeline = FailingPipeline()
        self.ahead = Ahead()
        self.commits = 0
        self.refused: set[int] = set()  # commits that the disk has no room for, by their number

    async def start(self) -> None:
        self.store = Store(self.path)
        await self.store.open()
        transaction = self.store._transaction

        def counted(*arguments: Any) -> None:
            self.commits += 1
            if self.commits in self.refused:
                raise sqlite3.OperationalError("database or disk is full")
            transaction(*arguments)

        self.store._transaction = counted  # type: ignore[method-assign]
        self.registry = Registry(self.store, self.logs, 2, 2)
        self.registry.pipeline, self.registry.ahead = self.pipeline, self.ahead  # type: ignore[assignment]

    async def stop(self) -> None:
        await self.registry.close()
        await self.store.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()
        await self.registry.recover()

    async def create(self) -> Image:
        image, version = self.registry.create(ARN, "a", REQUEST, {})
        await self.registry.begin(image, version)
        return image

    async def at_rest(self) -> None:
        await until(lambda: not self.registry._tasks)

    @property
    def state(self) -> str:
        """Of the image; GONE where there is none."""
        return self.store.images[ARN].state if ARN in self.store.images else "GONE"

    async def stored_state(self) -> str:
        """As a service that starts now finds it."""
        await self.at_rest()
        await self.stop()
        await self.start()
        return self.state


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(registry, "_STORE_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(store_module, "_ROOM_BYTES", 4096)  # each start fills it
    one = Rig(tmp_path)
    await one.start()
    yield one
    await one.stop()


@pytest.mark.parametrize("refused", [{2}, {3}, {2, 3, 4}])
async def test_a_build_goes_on_when_the_store_can_be_written_again(rig: Rig, refused: set[int]) -> None:
    """The commit that its turn has come, and the one of its end."""
    rig.refused = refused
    await rig.create()
    await rig.at_rest()
    assert rig.state == "CREATED" and rig.store.images[ARN].versions[0].state == "SUCCESSFUL" and rig.commits > max(refused)
    assert await rig.stored_state() == "CREATED"


async def test_what_could_not_be_begun_is_as_if_it_had_never_been(rig: Rig) -> None:
    rig.refused = {1}
    with pytest.raises(StoreError):
        await rig.create()
    assert rig.state == "GONE"
    await rig.create()
    assert await rig.stored_state() == "CREATED"


HOST_FAULTS = [RpcError("TimeoutError", "it did not end"), OSError(28, "No space left on device"), TimeoutError(), KeyError("x")]


@pytest.mark.parametrize("error", HOST_FAULTS, ids=repr)
@pytest.mark.parametrize("call", ["check", "run", "clean"])
async def test_a_build_that_meets_any_fault_of_the_host_ends(rig: Rig, call: str, error: Exception) -> None:
    rig.pipeline.fail[call] = [error]
    image = await rig.create()
    await rig.at_rest()
    assert rig.state == "CREATE_FAILED"
    version = image.versions[0]
    assert (version.state, version.status) == ("FAILED", "INACTIVE") and version.build is not None
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC and call != "clean"
    assert str(version.build.reason).startswith("DISK_STORAGE_FULL: " if is_full else "INTERNAL_PLATFORM_ERROR: ")
    rig.pipeline.fail[call] = [error]
    await rig.registry.begin(image, rig.registry.update(image, REQUEST))
    await rig.at_rest()
    assert rig.state == "UPDATE_FAILED"
    await rig.registry.delete(image)
    assert await rig.stored_state() == "GONE"


@pytest.mark.parametrize("error", HOST_FAULTS, ids=repr)
@pytest.mark.parametrize("where", ["delete", "ahead"])
async def test_a_deletion_that_fails_may_be_asked_for_again(rig: Rig, where: str, error: Exception) -> None:
    image = await rig.create()
    await rig.at_rest()
    if where == "ahead":
        rig.ahead.fails = [error]
    else:
        rig.pipeline.fail["delete"] = [error]
    await rig.registry.delete(image)
    assert await rig.stored_state() == "DELETE_FAILED"
    await rig.registry.delete(rig.store.images[ARN])
    assert await rig.stored_state() == "GONE"


@pytest.mark.parametrize("where", ["clean", "delete"])
async def test_a_versions_deletion_that_fails_may_be_asked_for_again(rig: Rig, where: str) -> None:
    image = await rig.create()
    await rig.at_rest()
    await rig.registry.begin(image, rig.registry.update(image, REQUEST))
    await rig.at_rest()
    rig.pipeline.fail[where] = [OSError(5, "Input/output error")]
    await rig.registry.delete_version(image, image.versions[0])
    assert await rig.stored_state() == "UPDATED"
    image = rig.store.images[ARN]
    assert [version.state for version in image.versions] == ["DELETE_FAILED", "SUCCESSFUL"]
    await rig.registry.delete_version(image, image.versions[0])
    assert await rig.stored_state() == "UPDATED"
    assert [version.version for version in rig.store.images[ARN].versions] == ["2.0"]


@pytest.mark.parametrize("what", ["set aside", "brought back", "let go"])
@pytest.mark.parametrize("of_version", [False, True])
async def test_what_a_microvm_in_the_quarantine_lies_over_is_set_aside_with_it(rig: Rig, of_version: bool, what: str) -> None:
    """Its image may be deleted, for it is TERMINATED; its disk could be read by nobody then."""
    image = await rig.create()
    await rig.registry.begin(image, rig.registry.update(image, REQUEST))
    await rig.at_rest()
    first = image.versions[0]
    one = Session("microvm-1", "h1", ARN, "1.0", first.key, 512, 0.0, 3600, state=State.TERMINATED, terminated_at=1.0)
    one.is_aside = what == "set aside"
    if what == "brought back":  # since the deletion was begun
        one.state, one.terminated_at = State.SUSPENDED, None
    rig.store.put_session(one)
    rig.pipeline.wanted = set() if what == "let go" else {first.key}
    if of_version:
        await rig.registry.delete_version(image, first)
    else:
        await rig.registry.delete(image)
    assert await rig.stored_state() == ("UPDATED" if of_version else "GONE")
    assert rig.pipeline.aside == ([] if what == "let go" else [first.key]) and first.key in rig.pipeline.deleted


@pytest.mark.parametrize("of_version", [False, True])
async def test_a_deletion_that_cannot_be_stored_goes_on_when_it_can(rig: Rig, of_version: bool) -> None:
    image = await rig.create()
    await rig.at_rest()
    await rig.registry.begin(image, rig.registry.update(image, REQUEST))
    await rig.at_rest()
    rig.refused = set(range(rig.commits + 2, rig.commits + 5))
    if of_version:
        await rig.registry.delete_version(image, image.versions[0])
    else:
        await rig.registry.delete(image)
    await rig.at_rest()
    assert rig.commits > max(rig.refused)
    assert await rig.stored_state() == ("UPDATED" if of_version else "GONE")


async def test_an_image_that_took_the_name_of_one_whose_end_was_not_stored_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await rig.create()
    await rig.at_rest()
    other, drop = Image("other", ARN, "a", 0.0, 0.0, "CREATED"), rig.store.drop_image

    def taken(arn: str) -> None:
        drop(arn)
        rig.store.images[arn] = other  # made while the commit is under way, and put into the next one

    monkeypatch.setattr(rig.store, "drop_image", taken)
    rig.refused = {rig.commits + 2}
    await rig.registry.delete(image)
    await rig.at_rest()
    assert rig.store.images[ARN] is other and rig.commits == max(rig.refused)


async def test_the_name_of_an_image_is_not_free_before_its_end_is_stored(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await rig.create()
    await rig.at_rest()
    monkeypatch.setattr(registry, "_STORE_RETRY_SECONDS", 60.0)
    rig.refused = {rig.commits + 2}
    await rig.registry.delete(image)
    await until(lambda: rig.commits == max(rig.refused) and rig.state == "DELETING")
    await rig.stop()  # in its pause: the next start deletes on
    await rig.start()
    await rig.registry.recover()
    assert await rig.stored_state() == "GONE"


@pytest.mark.parametrize("refused", [set(), {1}, {1, 2}])
async def test_builds_that_a_restart_interrupted_have_failed_although_the_store_is_full(rig: Rig, refused: set[int]) -> None:
    rig.pipeline.held["a"] = asyncio.Event()
    await rig.create()
    await until(lambda: rig.pipeline.order)
    await rig.stop()
    await rig.start()
    rig.commits, rig.refused = 0, refused
    await rig.registry.recover()
    assert await rig.stored_state() == "CREATE_FAILED"
    build = rig.store.images[ARN].versions[0].build
    assert build is not None and build.reason == INTERRUPTED


@pytest.mark.parametrize(("state", "after"), [("CREATING", "CREATED"), ("UPDATING", "CREATED")])
async def test_an_image_that_nothing_is_done_with_is_at_rest_after_a_start(rig: Rig, state: str, after: str) -> None:
    """As a service of before left it, whose task had ended with an error."""
    image = await rig.create()
    await rig.at_rest()
    image.state = state
    rig.store.put_image(image)
    await rig.store.commit()
    await rig.restart()
    assert await rig.stored_state() == after


# ---- what a build leaves on the host ----


class Host:
    def __init__(self, error: Callable[[], Exception] | None, times: int) -> None:
        self.error, self.times = error, times
        self.asked: list[str] = []

    async def _asked(self, name: str) -> None:
        self.asked.append(name)
        if self.error is not None and self.times:
            self.times -= 1
            raise self.error()

    async def build_cancel(self, build: str) -> None:
        await self._asked("cancel")

    async def forget(self, session: str) -> None:
        await self._asked(session)

    async def image_delete(self, key: str) -> None:
        await self._asked(f"delete {key}")


def cleaning(directory: Path, host: Host) -> tuple[Pipeline, Job]:
    settings = Settings(root=directory)
    one = Pipeline(settings, host, None, lambda job: None, None)  # type: ignore[arg-type]
    version = Version(ARN, "1.0", REQUEST, 0.0, 0.0, key="k")
    image, build = Image("i", ARN, "a", 0.0, 0.0), Build("b")
    return one, Job(image, version, build, LineWriter(LogStore(directory / "logs"), "1", "g", "s"))


@pytest.mark.parametrize("error", [lambda: RpcLost("away"), lambda: RpcError("TimeoutError", "it did not end")])
async def test_what_the_host_cannot_end_at_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "_CLEAN_PAUSE_SECONDS", 0.0)
    host = Host(error, 2)
    one, job = cleaning(tmp_path, host)
    await one.clean(job, keep_image=False)
    assert host.asked == ["cancel", "cancel", "cancel", "build-b", "validate-b", "delete k"]


async def test_what_the_host_can_never_end_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build has ended all the same: its state must say so."""
    monkeypatch.setattr(pipeline, "_CLEAN_PAUSE_SECONDS", 0.0)
    host = Host(lambda: RpcError("OSError", "Input/output error"), 1000)
    one, job = cleaning(tmp_path, host)
    await one.clean(job, keep_image=False)
    assert set(host.asked) == {"cancel", "build-b", "validate-b", "delete k"}


async def test_what_a_build_has_left_goes_later_and_never_that_of_another(rig: Rig, tmp_path: Path) -> None:
    """A removal that failed once left an artifact's files for ever."""
    rig.pipeline.sweep = cleaning(tmp_path, Host(None, 0))[0].sweep  # type: ignore[method-assign]
    folder = Settings(root=tmp_path).control_dir / "builds"
    await rig.registry.sweep()
    image = await rig.create()
    await rig.at_rest()
    over = image.versions[0].build
    running = rig.registry.update(image, REQUEST).build
    assert over is not None and running is not None
    for name in (over.id, running.id, "unknown"):
        (folder / name / "context").mkdir(parents=True)
    await rig.registry.sweep()
    assert [path.name for path in folder.iterdir()] == [running.id]


async def test_what_was_fetched_for_a_build_that_waits_goes_off_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context may have 100,000 files: launches and resumes waited for their removal."""
    one, job = cleaning(tmp_path, Host(None, 0))
    context = one._work(job) / "context"
    context.mkdir(parents=True)
    removed: list[int] = []
    rmtree = shutil.rmtree

    def remove(path: Path, *more: Any, **named: Any) -> None:
        removed.append(threading.get_ident())
        rmtree(path, *more, **named)

    monkeypatch.setattr(shutil, "rmtree", remove)
    one.set_aside(job)
    assert not one._work(job).exists(), "it is fetched again when its turn comes, maybe at once"
    one.set_aside(job)
    await until(lambda: not list(context.parent.parent.iterdir()))
    context.mkdir(parents=True)  # of an earlier service
    with pytest.raises(BuildFailed):
        await artifact.unpack(Settings(root=tmp_path), tmp_path / "nothing.zip", context)
    assert len(removed) == 2 and threading.get_ident() not in removed


async def test_an_image_is_not_deleted_by_a_host_that_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_DELETE_SECONDS", -1.0)
    host = Host(lambda: RpcLost("away"), 1)
    one, _ = cleaning(tmp_path, host)
    with pytest.raises(RpcLost):
        await one.delete("k")
    await one.delete("k")


# ---- an image's files ----


class Standbys:
    async def forget(self, image: Path) -> None:
        pass


async def test_an_image_whose_files_stay_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong with that was no error: the image was gone, and its gigabytes were not."""
    for name in ("k", ".k"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.raw").touch()
    nobody: Any = None
    calls, unlink = ImageCalls(Images(tmp_path), nobody, nobody, Standbys(), nobody, nobody), os.unlink  # type: ignore[arg-type]

    def fails(path: Any, **more: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "unlink", fails)
    with pytest.raises(Unavailable, match=r"image k could not be removed: .*Input/output error"):
        await calls.rpc_image_delete(None, ImageName("k"))  # type: ignore[arg-type]
    monkeypatch.setattr(os, "unlink", unlink)
    for _ in range(2):
        await calls.rpc_image_delete(None, ImageName("k"))  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
