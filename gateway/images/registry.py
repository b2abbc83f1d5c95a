"""The images' own state: which versions there are, what is built, in what order, and what a build's end means."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from gateway.sessions.ahead import Ahead
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.logs import LogStore, build_stream, default_group
from gateway.sessions.model import Build, Image, Version
from gateway.sessions.store import Store, StoreError

from .artifact import BuildFailed
from .pipeline import Job, Pipeline
from .turns import Turns

log = structlog.get_logger()

_UNDER_WAY = ("PENDING", "IN_PROGRESS", "DELETING")
_STORE_RETRY_SECONDS = 1.0
_CALLED_OFF_SECONDS = 15.0  # to clear away a build that is called off: the service stops, or the version's deletion does it again
INTERRUPTED = "INTERNAL_PLATFORM_ERROR: The build was interrupted by a restart of the service: create the image again."


class Registry:
    def __init__(
        self, store: Store, logs: LogStore, concurrent: int, of_account: int, clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        """So many builds at once, and of one account."""
        self._store = store
        self._logs = logs
        self._clock = clock
        self._checks = Turns(concurrent, of_account)  # artifacts that are slow to come hold up nobody else's
        self._turns = Turns(concurrent, of_account)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by image version's key, or by ARN for what is about all of it
        self._state_before: dict[str, str] = {}
        self.pipeline: Pipeline
        self.ahead: Ahead

    # ---- what calls ask ----

    def create(self, arn: str, name: str, request: dict[str, Any], tags: dict[str, str]) -> tuple[Image, Version]:
        """Puts a new image with its first version; `begin` stores it and starts the build."""
        now = self._clock()
        image = Image(str(uuid.uuid4()), arn, name, now, now, tags=tags)
        return image, self._add_version(image, request, "CREATING")

    def update(self, image: Image, request: dict[str, Any]) -> Version:
        return self._add_version(image, request, "UPDATING")

    async def begin(self, image: Image, version: Version) -> None:
        """Raises StoreError; the version is then as if it had never been."""
        try:
            await self._store.commit()
        except BaseException:
            image.versions.remove(version)
            image.state = self._state_before.pop(image.arn, image.state)
            if not image.versions:
                self._store.images.pop(image.arn, None)
            raise
        self._state_before.pop(image.arn, None)
        self._start(version.key, self._build(image, version))

    async def delete(self, image: Image) -> None:
        before = image.state
        self._set_state(image, "DELETING")
        try:
            await self._store.commit()
        except BaseException:
            image.state = before
            raise
        self._start(image.arn, self._delete(image))

    async def delete_version(self, image: Image, version: Version) -> None:
        """The image is UPDATING meanwhile. A build under way is called off."""
        building = self._tasks.get(version.key)
        after, before = self._settled(image, version), (version.state, image.state)
        version.state = "DELETING"
        self._set_state(image, "UPDATING")
        try:
            await self._store.commit()
        except BaseException:
            version.state, image.state = before
            raise
        if building is not None:
            building.cancel()
        self._start(version.key, self._delete_version(image, version, after, building))

    async def set_status(self, image: Image, version: Version, status: str) -> None:
        before, version.status, version.updated_at = version.status, status, self._clock()
        self._store.put_image(image)
        self._store.add_event(image.arn, "status", f"{version.version} {before}", status)
        try:
            await self._store.commit()
        except BaseException:
            version.status = before
            raise

    # ---- inside ----

    def _add_version(self, image: Image, request: dict[str, Any], state: str) -> Version:
        now = self._clock()
        image.last_number += 1
        number = f"{image.last_number}.0"
        version = Version(image.arn, number, request, now, now, "PENDING", key=f"{image.id}-{number}")
        version.build = Build(str(uuid.uuid4()), "PENDING", now)
        image.versions.append(version)
        self._state_before[image.arn] = image.state
        self._set_state(image, state)
        return version

    def _settled(self, image: Image, leaving: Version | None = None) -> str:
        """Returns the state of an image at rest without `leaving`: as its newest other version has it."""
        rest = [version for version in image.versions if version is not leaving]
        failed = rest[-1].state == "FAILED"
        first = len(rest) == 1 and rest[-1].version == "1.0"
        return ("CREATE_FAILED" if first else "UPDATE_FAILED") if failed else ("CREATED" if first else "UPDATED")

    def _set_state(self, image: Image, state: str) -> None:
        self._become(image, state)()

    def _become(self, image: Image, state: str, detail: str = "") -> Callable[[], None]:
        """Gives the image its next state. What is returned puts that, and its row, into the next commit."""
        old, image.state, image.updated_at = image.state, state, self._clock()

        def put() -> None:
            self._store.put_image(image)
            self._store.add_event(image.arn, "state", old, state, detail=detail)

        return put

    async def _until_stored(self, image: Image, put: Callable[[], None]) -> None:
        """Stores what has happened, which nobody can take back: it is tried until the store takes it. A service that ends before finds the
        state of before, and does the work again."""
        while True:
            put()
            try:
                await self._store.commit()
                return
            except StoreError as error:
                log.error("store.retry", image=image.arn, error=str(error))
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    def _start(self, key: str, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._done(key, done))

    def _done(self, key: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            log.error("image.task_failed", image=key, exc_info=task.exception())

    async def _build(self, image: Image, version: Version) -> None:
        """However it goes, the version ends as SUCCESSFUL or FAILED, unless the build is called off."""
        assert version.build is not None
        job = self._job(image, version, version.build, build_stream(version.version, version.build.id))
        try:
            async with self._checks.turn(image.account, lambda before: None):
                reason = await self._run(job, self.pipeline.check)  # what cannot succeed does not wait for its turn
            if reason is None:
                async with self._turns.turn(image.account, lambda before: self._waits(job, before)):
                    version.state = job.build.state = "IN_PROGRESS"
                    await self._until_stored(image, lambda: self._store.put_image(image))
                    reason = await self._run(job, self.pipeline.run)
            await self.pipeline.clean(job, keep_image=reason is None)
        except asyncio.CancelledError:  # the service stops: what the host has of it would stay there
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CALLED_OFF_SECONDS):
                    await self.pipeline.clean(job, keep_image=False)
            raise
        except Exception as error:
            log.exception("build.failed", image=image.arn)
            reason = str(BuildFailed("INTERNAL_PLATFORM_ERROR", str(error)))
        job.say(reason if reason is not None else "the image is ready")
        job.log.flush()  # before anybody can see that it is over
        await self._until_stored(image, self._built(image, version, reason))
        if reason is None:
            self.ahead.want(image.arn, version.version)

    def _waits(self, job: Job, before: int) -> None:
        text = f"waiting for {before} build{'s' if before > 1 else ''}"
        job.say(text)
        job.log.flush()
        self.pipeline.set_aside(job)
        self._store.add_event(job.image.arn, "build", job.version.version, text)

    async def _run(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> str | None:
        """Why it failed; None where it did not."""
        try:
            await work(job)
        except BuildFailed as error:
            return str(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return f"DISK_STORAGE_FULL: {error.strerror}: {error.filename or 'ROOT/control'}"
            log.exception("build.failed", image=job.image.arn)
            return str(BuildFailed("INTERNAL_PLATFORM_ERROR", str(error)))
        return None

    def _built(self, image: Image, version: Version, reason: str | None) -> Callable[[], None]:
        """The build has ended. What is returned puts that into the next commit."""
        assert version.build is not None
        failed = reason is not None
        version.state = version.build.state = "FAILED" if failed else "SUCCESSFUL"
        version.build.reason = reason
        version.status = "INACTIVE" if failed else version.status
        version.updated_at = self._clock()
        if image.state not in ("CREATING", "UPDATING"):
            return lambda: self._store.put_image(image)
        first = image.state == "CREATING"
        return self._become(image, ("CREATE_FAILED" if first else "UPDATE_FAILED") if failed else ("CREATED" if first else "UPDATED"))

    async def _interrupted(self, image: Image, version: Version, put: Callable[[], None]) -> None:
        """An earlier service was building; what the host has of that goes before it is stored that the build failed."""
        assert version.build is not None
        await self.pipeline.clean(self._job(image, version, version.build), keep_image=False)
        await self._until_stored(image, put)

    async def _delete_version(
        self, image: Image, version: Version, after: str, building: asyncio.Task[None] | None = None
    ) -> None:  # fmt: skip
        """Whatever goes wrong, the version may be deleted again, and the image is at rest."""
        if building is not None:
            await asyncio.wait([building])
        detail = ""
        try:
            if version.build is not None:
                await self.pipeline.clean(self._job(image, version, version.build), keep_image=self._is_needed(version))
            await self._remove(version)
            image.versions.remove(version)
        except Exception as error:
            log.exception("image.not_deleted", image=version.key)
            version.state, detail = "DELETE_FAILED", f"{version.version}: {error}"
        await self._until_stored(image, self._become(image, after, detail))

    async def _remove(self, version: Version) -> None:
        """Idempotent. Whose word deletes an image says nothing of microVMs that an error has ended: what their disks lie over is set aside
        with them, and goes as they do."""
        await self.ahead.drop(version.key)
        if self._is_needed(version):
            await self.pipeline.set_image_aside(version.key)
        await self.pipeline.delete(version.key)

    def _is_needed(self, version: Version) -> bool:
        """Whether a microVM of this version is set aside, or was brought back since its deletion was begun."""
        mine = (session for session in self._store.sessions.values() if session.image == version.key)
        return any(session.is_aside or session.terminated_at is None for session in mine)

    def _job(self, image: Image, version: Version, build: Build, stream: str = "recovery") -> Job:
        is_limited = not version.has_all_capabilities
        return Job(image, version, build, LineWriter(self._logs, image.account, log_group(image, version), stream, is_limited))

    async def _delete(self, image: Image) -> None:
        """Whatever goes wrong, the image may be deleted again."""
        try:
            for version in image.versions:
                await self._remove(version)
        except Exception as error:
            log.exception("image.not_deleted", image=image.arn)
            await self._until_stored(image, self._become(image, "DELETE_FAILED", str(error)))
            return
        while self._store.images.get(image.arn) is image:
            self._store.add_event(image.arn, "deleted", image.state, "DELETED")
            self._store.drop_image(image.arn)
            try:
                await self._store.commit()
            except StoreError as error:
                log.error("store.retry", image=image.arn, error=str(error))
                self._store.images.setdefault(image.arn, image)  # or another one has taken its name, and its row
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    # ---- after a restart ----

    async def recover(self) -> None:
        """Builds that were under way have failed, those that waited wait again; deletions go on. Images that the store does not know were
        looked at before (sessions/identity.py)."""
        for image in list(self._store.images.values()):
            for version in list(image.versions):
                if version.build is None:
                    continue
                if version.state == "FAILED":  # stored as ACTIVE by a service of before
                    version.status = "INACTIVE"
                if version.state == "PENDING":
                    self._start(version.key, self._build(image, version))
                elif version.state == "IN_PROGRESS":
                    self._start(version.key, self._interrupted(image, version, self._built(image, version, INTERRUPTED)))
                elif version.state == "DELETING" and image.state != "DELETING":
                    self._start(version.key, self._delete_version(image, version, self._settled(image, version)))
            if image.state == "DELETING":
                self._start(image.arn, self._delete(image))
            elif image.state in ("CREATING", "UPDATING") and not any(one.state in _UNDER_WAY for one in image.versions):
                self._start(image.arn, self._until_stored(image, self._become(image, self._settled(image))))

    async def sweep(self) -> None:
        """Removes what builds that are over have left. Raises OSError."""
        await self.pipeline.sweep(self._under_way)

    def _under_way(self) -> set[str]:
        """Returns the ids of builds that wait, run, or are called off."""
        versions = [version for image in self._store.images.values() for version in image.versions]
        return {version.build.id for version in versions if version.build is not None and version.state in _UNDER_WAY}

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def log_group(image: Image, version: Version) -> str:
    target = (version.request.get("logging") or {}).get("cloudWatch") or {}
    return str(target.get("logGroup") or default_group(image.name))
