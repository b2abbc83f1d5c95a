"""The images' own state: which versions there are, what is built, in what order, and what a build's end means."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog

from gateway.sessions.logs import LineWriter, LogStore, build_stream, default_group
from gateway.sessions.model import Build, Image, Version
from gateway.sessions.store import Store, StoreError

from .artifact import BuildFailed
from .pipeline import Job, Pipeline

log = structlog.get_logger()

INTERRUPTED = "INTERNAL_PLATFORM_ERROR: The build was interrupted by a restart of the service: create the image again."


class Registry:
    def __init__(self, store: Store, logs: LogStore, concurrent: int, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._logs = logs
        self._clock = clock
        self._slots = asyncio.Semaphore(concurrent)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.pipeline: Pipeline

    # ---- what calls ask ----

    async def create(self, arn: str, name: str, request: dict[str, Any], tags: dict[str, str]) -> tuple[Image, Version]:
        now = self._clock()
        image = Image(str(uuid.uuid4()), arn, name, now, now, tags=tags)
        return image, await self._add_version(image, request, "CREATING")

    async def update(self, image: Image, request: dict[str, Any]) -> Version:
        return await self._add_version(image, request, "UPDATING")

    async def delete(self, image: Image) -> None:
        self._set_state(image, "DELETING")
        await self._store.commit()
        self._start(image.arn, self._delete(image))

    # ---- inside ----

    async def _add_version(self, image: Image, request: dict[str, Any], state: str) -> Version:
        now = self._clock()
        number = f"{len(image.versions) + 1}.0"
        version = Version(image.arn, number, request, now, now, "IN_PROGRESS", key=f"{image.id}-{number}")
        version.build = Build(str(uuid.uuid4()), "IN_PROGRESS", now)
        image.versions.append(version)
        old = image.state
        self._set_state(image, state)
        try:
            await self._store.commit()
        except StoreError:
            image.versions.remove(version)
            image.state = old
            if not image.versions:
                self._store.images.pop(image.arn, None)
            raise
        self._start(image.arn, self._build(image, version))
        return version

    def _set_state(self, image: Image, state: str) -> None:
        old, image.state, image.updated_at = image.state, state, self._clock()
        self._store.put_image(image)
        self._store.add_event(image.arn, "state", old, state)

    def _start(self, arn: str, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[arn] = task
        task.add_done_callback(lambda done: self._done(arn, done))

    def _done(self, arn: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(arn) is task:
            del self._tasks[arn]
        if not task.cancelled() and task.exception() is not None:
            log.error("image.task_failed", image=arn, exc_info=task.exception())

    async def _build(self, image: Image, version: Version) -> None:
        assert version.build is not None
        async with self._slots:
            writer = LineWriter(self._logs, log_group(image, version), build_stream(version.version, version.build.id))
            job = Job(image, version, version.build, writer)
            reason: str | None = None
            try:
                await self.pipeline.run(job)
            except BuildFailed as error:
                reason = str(error)
            except Exception as error:
                log.exception("build.failed", image=image.arn)
                reason = f"INTERNAL_PLATFORM_ERROR: {error}"
            await self.pipeline.clean(job, keep_image=reason is None)
            await self._built(image, version, reason)
            job.say(reason if reason is not None else "the image is ready")
            job.log.flush()

    async def _built(self, image: Image, version: Version, reason: str | None) -> None:
        assert version.build is not None
        failed = reason is not None
        version.state = version.build.state = "FAILED" if failed else "SUCCESSFUL"
        version.build.reason = reason
        version.updated_at = self._clock()
        if image.state in ("CREATING", "UPDATING"):
            first = image.state == "CREATING"
            self._set_state(image, ("CREATE_FAILED" if first else "UPDATE_FAILED") if failed else ("CREATED" if first else "UPDATED"))
        self._store.put_image(image)
        await self._store.commit()

    async def _delete(self, image: Image) -> None:
        for version in image.versions:
            await self.pipeline.delete(version.key)
        self._store.add_event(image.arn, "deleted", image.state, "DELETED")
        self._store.drop_image(image.arn)
        await self._store.commit()

    # ---- after a restart ----

    async def recover(self, known: set[str]) -> None:
        """Builds that were under way have failed; deletions go on; images that nobody knows go."""
        for image in list(self._store.images.values()):
            for version in image.versions:
                if version.state in ("PENDING", "IN_PROGRESS") and version.build is not None:
                    job = Job(image, version, version.build, LineWriter(self._logs, log_group(image, version), "recovery"))
                    await self.pipeline.clean(job, keep_image=False)
                    await self._built(image, version, INTERRUPTED)
            if image.state == "DELETING":
                self._start(image.arn, self._delete(image))
        wanted = {version.key for image in self._store.images.values() for version in image.versions}
        for key in known - wanted:
            await self.pipeline.delete(key)

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def log_group(image: Image, version: Version) -> str:
    target = (version.request.get("logging") or {}).get("cloudWatch") or {}
    return str(target.get("logGroup") or default_group(image.name))
