"""The build of one image version: fetch, unpack, container, disk, boot, ready, snapshot, validate.

What can be refused without a builder is refused by `check`, before the build waits for its turn. Every step either succeeds or raises
BuildFailed with the code that the build then shows. Nothing of a failed build stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from gateway import executors
from gateway.accounts.directory import Credentials
from gateway.accounts.quotas import DISK_GIB
from gateway.config import Settings
from gateway.messages import BuildRequest, BuildResult, EgressRules, HostInfo, Shape
from gateway.observe.room import BUILD_INODES, BUILD_ROOM_BYTES
from gateway.sessions import hooks
from gateway.sessions.agent import Agent, AgentError, start_frames, sync_frame, wake_frame
from gateway.sessions.channels import GuestServices
from gateway.sessions.host import Host, RpcError, RpcLost, patiently
from gateway.sessions.line_writer import LineWriter
from gateway.sessions.model import Build, Hooks, Image, Version
from gateway.tasks import Tasks

from . import artifact, bases, dockerfile
from .artifact import BuildFailed, as_text
from .container import ContainerError, agent_entries, exposed_ports, parse_config, reserved_variables
from .hints import hints
from .readiness import Readiness
from .unpack import CONTEXT, DOCKERFILE, DOCKERFILE_BYTES

log = structlog.get_logger()

ARCHITECTURES = {"x86_64": "X86_64", "aarch64": "ARM_64"}  # the host's name for it, and the API's
_PEAK = 4  # the guest sees four times the size that was asked for
_BOOT_SECONDS = 60.0
_REST_SECONDS = 10.0  # for the rest of a build's log
_SYNC_SECONDS = 300.0  # for what an emulated application has written
_CONTAINER_TRIES = 2  # vmm may be restarted under a build
_CLEAN_TRIES, _CLEAN_FAILURES, _CLEAN_PAUSE_SECONDS = 20, 3, 0.25
_DELETE_SECONDS = 600.0  # then the image is DELETE_FAILED, and may be deleted again
_TAIL_BYTES = 16 << 10  # of a build's log, in which its failure is looked for
_LAYERS_FULL = (
    "the container build wrote more than it may: {mib} MiB beside what its account's layers have (images.store_mib; less where the host's "
    "disk has less), a file for each 16 KiB of them, or a tmpfs was full"
)
_PHASES = ("BASE", "CONTAINER", "DISK")  # that build.sh says
_PHASES_BYTES = 4096
_PLATFORMS = {"x86_64": "amd64", "aarch64": "arm64"}  # of OCI (image-spec, image-index.md)
_SEEDED = (
    "{count} random generators of OpenSSL were seeded before the snapshot: each microVM seeds them anew; it does not know of a language's "
    "own (Math.random, random.random, mt_rand) and of numbers that were drawn ahead (crypto.randomUUID): docs/clones.md"
)


def machine_shape(minimum_mib: int, info: HostInfo) -> Shape:
    """Returns the service's peak for a size, capped by the host (reference, section 4)."""
    return Shape(
        memory_mib=min(minimum_mib * _PEAK, info.memory_cap_mib),
        vcpus=max(1, min(minimum_mib * _PEAK // 2048, info.vcpus_cap)),
        disk_bytes=DISK_GIB[minimum_mib] << 30,
        accelerator=info.accelerator,
        baseline_mib=minimum_mib,
    )


def read_hooks(request: dict[str, object]) -> Hooks:
    """Returns the enabled hooks of a version, with their timeouts; runtime hooks default to 1 s, image hooks to 60 s."""
    given = request.get("hooks")
    if not isinstance(given, dict):
        return Hooks()
    enabled: dict[str, int] = {}
    for group, default in (("microvmImageHooks", 60), ("microvmHooks", 1)):
        settings = given.get(group) or {}
        for name in ("ready", "validate", "run", "resume", "suspend", "terminate"):
            if settings.get(name) == "ENABLED":
                enabled[name] = int(settings.get(f"{name}TimeoutInSeconds") or default)
    return Hooks(int(given.get("port") or 9000), enabled)


@dataclass
class Job:
    """A build under way."""

    image: Image
    version: Version
    build: Build
    log: LineWriter
    prepared: dockerfile.Prepared | None = None
    is_again: bool = False  # it was checked before it waited, and has said what there was to say
    exit_code: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def session(self) -> str:
        return f"build-{self.build.id}"

    def say(self, text: str) -> None:
        self.log.feed(0, f"torpor: {as_text(text)}\n".encode())


class Serve(Protocol):
    """What a build needs of gateway.guest."""

    def egress(self, version: Version) -> EgressRules | None: ...

    async def open(self, session: str, incarnation: int, version: Version) -> GuestServices: ...

    async def role(self, version: Version, session: str) -> Credentials: ...


class Pipeline:
    def __init__(
        self, settings: Settings, host: Host, reads: Callable[[str], Credentials], on_phase: Callable[[Job], None], serve: Serve,
    ) -> None:  # fmt: skip
        """`serve` answers what a build's microVM asks its host: names, and credentials of the build role.

        `reads` gives what an account's artifacts are read with, where no STS gives the build role credentials that the object store takes.
        """
        self._serve = serve
        self._settings = settings
        self._host = host
        self._reads = reads
        self._on_phase = on_phase
        self._tasks = Tasks()

    async def check(self, job: Job) -> None:
        """Fetches and reads what is to be built. Raises BuildFailed for what cannot be."""
        capacity = await patiently(self._host.reclaim_capacity)
        if capacity.disk_free < (self._settings.limits.disk_reserve_mib << 20) + BUILD_ROOM_BYTES:
            free = capacity.disk_free >> 20
            raise BuildFailed("DISK_STORAGE_FULL", f"the host has no room for another image ({free} MiB free): free some, or move --root")
        if capacity.inodes_free < BUILD_INODES:
            text = f"the host has no inodes for another image ({capacity.inodes_free} free): remove files, or move --root"
            raise BuildFailed("DISK_STORAGE_FULL", text)
        machine = (await self._host.info()).architecture
        wanted = [one["architecture"] for one in job.version.request.get("cpuConfigurations") or []]
        if wanted and not job.is_again and ARCHITECTURES[machine] not in wanted:
            job.say(f"cpuConfigurations asks for {', '.join(wanted)}: this host builds for {ARCHITECTURES[machine]}")
        await self._fetch(job)
        job.prepared = await executors.BULK.run(self._prepare, self._work(job) / "context" / DOCKERFILE, _PLATFORMS[machine])
        for note in dict.fromkeys(job.prepared.notes if not job.is_again else []):
            job.say(note)

    def _prepare(self, file: Path, platform: str) -> dockerfile.Prepared:
        """Raises BuildFailed."""
        images = self._settings.images
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(file, flags), "rb") as given:  # whose writer reads strangers' files, and may have been taken over by one
            data = given.read(DOCKERFILE_BYTES + 1)
        if len(data) > DOCKERFILE_BYTES:
            raise BuildFailed("ARCHIVE_INVALID", f"the Dockerfile has more than {DOCKERFILE_BYTES} bytes")
        made = dockerfile.prepare(data, images.base_names, images.pull, platform)
        file.write_text(made.text, encoding="utf-8", errors="surrogateescape")
        return made

    def set_aside(self, job: Job) -> None:
        """The build waits: what was fetched for it takes no room meanwhile. It has another name at once, and goes by and by: a context may
        have some 100,000 files."""
        job.prepared, job.is_again = None, True
        aside = self._work(job).with_name(f"{job.build.id}-{secrets.token_hex(4)}")  # what is left of it, `sweep` takes
        with contextlib.suppress(OSError):
            os.rename(self._work(job), aside)
            self._tasks.spawn(executors.BULK.run(partial(shutil.rmtree, aside, ignore_errors=True)))

    async def run(self, job: Job) -> None:
        """Builds what was checked, fetched again where it was set aside. Raises BuildFailed. On return the image exists on the host and the
        job's version and build are filled in."""
        try:
            await self._run(job)
        except (RpcError, AgentError) as error:
            is_full = isinstance(error, RpcError) and (error.kind == "DiskFull" or os.strerror(errno.ENOSPC) in str(error))
            code = "DISK_STORAGE_FULL" if is_full else "INTERNAL_PLATFORM_ERROR"
            raise BuildFailed(code, str(error)) from error
        finally:
            job.log.flush()

    async def clean(self, job: Job, keep_image: bool) -> None:
        """Removes what a build leaves behind, however it ended. Nothing is raised: what the host cannot end or remove now does not decide
        what became of the build, and goes when the image is deleted or the service starts."""
        with contextlib.suppress(OSError):
            await executors.BULK.run(lambda: shutil.rmtree(self._work(job), ignore_errors=True))
        sessions = (job.session, f"validate-{job.build.id}")
        steps = [partial(self._host.build_cancel, job.build.id), *(partial(self._host.forget, session) for session in sessions)]
        if not keep_image:
            steps.append(partial(self._host.image_delete, job.version.key))
        for step in steps:
            await self._clean_step(step)

    async def sweep(self, used: Callable[[], Set[str]]) -> None:
        """Removes what builds that are over have left in control's folder, where it could not be removed at their end. `used` are the ids
        of the others; it is asked after the look at what there is. Raises OSError."""
        folder = self._settings.control_dir / "builds"
        there = await executors.BULK.run(lambda: os.listdir(folder) if folder.exists() else [])
        for name in set(there) - used():
            await executors.BULK.run(shutil.rmtree, folder / name)

    async def _clean_step(self, step: Callable[[], Awaitable[None]]) -> None:
        """Does a step of a clean-up: again while vmm is away, and a few times where it fails."""
        failures = 0
        for attempt in range(1, _CLEAN_TRIES + 1):
            try:
                await step()
                return
            except RpcError as error:
                failures += not isinstance(error, RpcLost)
                if attempt == _CLEAN_TRIES or failures == _CLEAN_FAILURES:
                    log.error("build.not_cleaned", step=str(step), error=str(error))
                    return
            await asyncio.sleep(_CLEAN_PAUSE_SECONDS * attempt)

    async def set_image_aside(self, key: str) -> None:
        """Raises RpcError."""
        reason = "Its image was deleted; a microVM that is set aside, and its disk, can be read with it only."
        await patiently(lambda: self._host.quarantine_image(key, reason))

    async def delete(self, key: str) -> None:
        """Removes an image version from the host; asked again while vmm is away. Raises RpcError."""
        deadline = time.monotonic() + _DELETE_SECONDS
        while True:
            try:
                await self._host.image_delete(key)
                return
            except RpcLost:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def _run(self, job: Job) -> None:
        if job.prepared is None:
            await self.check(job)
        info = await self._host.info()
        minimum = int(job.version.request["resources"][0]["minimumMemoryInMiB"])
        shape = machine_shape(minimum, info)
        job.version.shape = shape
        config = await self._container(job, shape)
        await self._boot(job, shape, config)
        self._phase(job, "SNAPSHOT")
        sealed = await self._host.seal(job.session, job.version.key, shape.memory_mib, job.image.account)
        job.build.memory_bytes, job.build.disk_bytes, job.build.code_bytes = sealed.memory_bytes, sealed.disk_bytes, sealed.code_bytes
        if sealed.generators:
            job.say(_SEEDED.format(count=sealed.generators))
        job.version.config = config
        await self._validate(job)
        self._phase(job, "DONE")

    def _phase(self, job: Job, name: str) -> None:
        job.build.phase = name
        self._on_phase(job)

    def _work(self, job: Job) -> Path:
        return self._settings.control_dir / "builds" / job.build.id

    async def _role(self, job: Job) -> Credentials:
        try:
            return await self._serve.role(job.version, job.session)
        except ClientError as error:
            raise BuildFailed("S3_ACCESS_DENIED", f"the build role cannot be assumed: {error}") from error
        except BotoCoreError as error:
            raise BuildFailed("INTERNAL_PLATFORM_ERROR", f"the STS cannot be reached: {error}") from error

    async def _fetch(self, job: Job) -> None:
        self._phase(job, "FETCH")
        role = await self._role(job)
        work = self._work(job)
        work.mkdir(parents=True, exist_ok=True)
        uri = str(job.version.request["codeArtifact"]["uri"])
        credentials = role if self._settings.credentials.sts_endpoint else self._account_reads(job.image.account, uri)
        size = await executors.BULK.run(artifact.fetch, self._settings, credentials, uri, work / "artifact.zip")
        if not job.is_again:
            job.say(f"fetched {uri}, {size} bytes")
        await artifact.unpack(self._settings, work / "artifact.zip", work / "context")
        (work / "artifact.zip").unlink()

    def _account_reads(self, account: str, uri: str) -> Credentials:
        """Raises BuildFailed for a bucket of somebody else's: nobody is asked what is in it, or whether it is there."""
        store, named = self._settings.object_store, artifact.parse_uri(uri)
        if not store.is_embedded and named is not None and not store.may_read(account, self._settings.account, named[0]):
            raise BuildFailed("S3_ACCESS_DENIED", f"s3://{named[0]}/{named[1]} may not be read by account {account} (object_store.buckets)")
        return self._reads(account)

    async def _container(self, job: Job, shape: Shape) -> dict[str, object]:
        assert job.prepared is not None
        work = self._work(job) / "context"
        logins = {}
        if self._settings.images.pull:
            logins = await executors.LATENCY.run(self._logins, job, work / DOCKERFILE, await self._role(job))
        request = BuildRequest(
            job.build.id, job.version.key, job.image.account, job.prepared.users, shape.disk_bytes, logins,
            job.version.has_all_capabilities,
        )  # fmt: skip
        said = _Said()
        for attempt in range(1, _CONTAINER_TRIES + 1):
            try:
                output, phases = await self._host.build(request, work / CONTEXT, work / DOCKERFILE)
                try:
                    result = await self._watch(job, output, phases, said)
                    break
                except RpcError as error:
                    if error.kind != "Missing":
                        raise
                    raise RpcLost(str(error)) from error
            except RpcLost:
                if attempt == _CONTAINER_TRIES:
                    raise
                job.say("the host daemon was restarted; building again")
        if result.status:
            for hint in hints(said.tail.decode("utf-8", errors="replace")):
                job.say(hint)
            if result.reason:
                raise BuildFailed("DISK_STORAGE_FULL" if result.disk_full else "CONTAINER_BUILD_FAILED", result.reason)
            if said.disk_full and result.room_bytes and not result.disk_full:
                raise BuildFailed("DISK_STORAGE_FULL", _LAYERS_FULL.format(mib=result.room_bytes >> 20))
            if result.disk_full or said.disk_full:
                raise BuildFailed("DISK_STORAGE_FULL", "the disk was full during the container build")
            if result.out_of_memory:
                raise BuildFailed("CONTAINER_BUILD_FAILED", "The container image build ran out of memory.")
            raise BuildFailed("", "The container image build failed.")
        try:
            return parse_config(result.config)
        except ContainerError as error:
            raise BuildFailed("CONTAINER_BUILD_FAILED", str(error)) from error

    async def _watch(self, job: Job, output: int, phases: int, said: _Said) -> BuildResult:
        """Follows a build to its end. Raises RpcError: Missing where vmm knows of none any more; BuildFailed for one that says too much."""
        most = self._settings.images.build_log_mib << 20
        readers = [
            asyncio.ensure_future(_read(output, _both(lambda data: job.log.feed(0, data), said.feed), most)),
            asyncio.ensure_future(_read(phases, lambda data: self._enter(job, data), _PHASES_BYTES)),
        ]
        ending = asyncio.ensure_future(patiently(lambda: self._host.build_result(job.build.id)))
        try:
            await asyncio.wait([ending, readers[0]], return_when=asyncio.FIRST_COMPLETED)
            if readers[0].done() and readers[0].exception() is None and readers[0].result():  # whoever called `run` has the build ended
                raise BuildFailed("CONTAINER_BUILD_FAILED", f"the container build said more than {most >> 20} MiB (images.build_log_mib)")
            await asyncio.wait([ending])
            await asyncio.wait(readers, timeout=_REST_SECONDS)  # what a step has left behind may keep the pipe open
            return ending.result()
        finally:
            for reader in (ending, *readers):
                reader.cancel()
            await asyncio.gather(ending, *readers, return_exceptions=True)

    def _enter(self, job: Job, said: bytes) -> None:
        """The builder has said where it is: in its own words, each of which stands for a row."""
        for word in said.decode("ascii", "replace").split():
            if word in _PHASES:
                self._phase(job, word)

    def _logins(self, job: Job, dockerfile: Path, role: Credentials) -> dict[str, str]:
        real = self._settings.credentials.sts_endpoint or self._settings.images.ecr_endpoint
        arn = str(job.version.request["buildRoleArn"])
        text = dockerfile.read_text(encoding="utf-8", errors="replace")
        return bases.logins(self._settings.images, self._settings.region, arn, role if real else None, text, job.say)

    async def _boot(self, job: Job, shape: Shape, config: dict[str, object]) -> None:
        self._phase(job, "BOOT")
        descriptor = await self._host.boot(job.session, job.version.key, shape, self._serve.egress(job.version))
        agent = Agent(descriptor, job.log.feed, job.exit_code.set_result, job.say)
        services = await self._serve.open(job.session, 0, job.version)
        try:
            await agent.hello(_BOOT_SECONDS)
            await self._host.give_disk(job.session, job.version.key)
            # Its boot may have been kept from another build: the clock and the randomness are not.
            await self._tell(agent, lambda nonce: wake_frame(nonce, reset_tcp=False, wall_ns=time.time_ns()))
            request = job.version.request
            reserved = reserved_variables(job.image.arn, job.image.name, job.version.version, self._settings.region)
            capabilities = job.version.has_all_capabilities
            for frame in start_frames(agent_entries(config, request.get("environmentVariables") or {}, reserved, capabilities)):
                agent.send(frame)
            self._phase(job, "READY")
            await self._until_exit(job, self._ready(job, agent, config))
            await self._tell(agent, sync_frame, _SYNC_SECONDS)
        finally:
            agent.close()
            services.close()

    async def _tell(self, agent: Agent, order: Callable[[int], bytes], seconds: float = _BOOT_SECONDS) -> None:
        """Returns when the guest has done it. Raises AgentError."""
        nonce = secrets.randbits(63)
        done = agent.expect(nonce)
        agent.send(order(nonce))
        try:
            async with asyncio.timeout(seconds):
                await done
        except TimeoutError as error:
            raise AgentError(f"the guest did not do what it was told in {seconds:g} s") from error

    async def _until_exit(self, job: Job, work: object) -> None:
        """Runs `work` unless the application ends first."""
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        try:
            await asyncio.wait([task, job.exit_code], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise BuildFailed("", f"Container Stopped with Exit Code: {job.exit_code.result()}")
            await task
        finally:
            task.cancel()

    async def _ready(self, job: Job, agent: Agent, config: dict[str, object]) -> None:
        """The ready hook says when the application has started; without one, its ports do."""
        enabled = read_hooks(job.version.request)
        seconds = enabled.timeout("ready")
        if seconds is not None:
            job.say(f"waiting for the ready hook on port {enabled.port}, {seconds} s at most")
            await self._hook(job, "ready", job.session, 0, enabled, seconds)
            return
        await Readiness(self._host, self._settings.images, agent, job.session, job.say).wait(exposed_ports(config))

    async def _hook(self, job: Job, name: str, session: str, incarnation: int, enabled: Hooks, seconds: int) -> None:
        try:
            await hooks.poll(lambda: self._host.socket(session, incarnation), name, enabled.port, seconds, job.build.id)
        except hooks.HookError as error:
            raise BuildFailed("", hooks.image_reason(name, error, seconds)) from error

    async def _validate(self, job: Job) -> None:
        """A throw-away clone of the snapshot answers the validate hook."""
        enabled = read_hooks(job.version.request)
        seconds = enabled.timeout("validate")
        if seconds is None:
            return
        self._phase(job, "VALIDATE")
        session = f"validate-{job.build.id}"
        await self._host.prepare(session, 1, job.version.key, False, self._serve.egress(job.version))
        nonce = secrets.randbits(63)
        agent = Agent(await self._host.start(session, 1, wake_frame(nonce)), job.log.feed, lambda code: None)
        woken = agent.expect(nonce)
        services = await self._serve.open(session, 1, job.version)
        try:
            async with asyncio.timeout(_BOOT_SECONDS):
                await woken
            await self._hook(job, "validate", session, 1, enabled, seconds)
        except TimeoutError as error:
            raise BuildFailed("INTERNAL_PLATFORM_ERROR", "the snapshot's clone did not answer") from error
        finally:
            agent.close()
            services.close()
            await self._host.forget(session)


class _Said:
    """The end of a build's log, and whether the disk was full anywhere in it."""

    _FULL = b"No space left on device"

    def __init__(self) -> None:
        self.tail = b""
        self.disk_full = False

    def feed(self, data: bytes) -> None:
        self.disk_full = self.disk_full or self._FULL in self.tail[-len(self._FULL) :] + data
        self.tail = (self.tail + data)[-_TAIL_BYTES:]


def _both(*takers: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def take(data: bytes) -> None:
        for taker in takers:
            taker(data)

    return take


async def _read(descriptor: int, take: Callable[[bytes], None], most: int) -> bool:
    """Reads a pipe to its end, or until it has brought more than so many bytes: True."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb"))
    try:
        while data := await reader.read(65536):
            take(data)
            most -= len(data)
            if most < 0:
                return True
        return False
    finally:
        transport.close()
