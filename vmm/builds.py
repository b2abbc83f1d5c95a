"""Container builds: BuildKit in a jail, with a network of its own, never as the host's root, and one store for each account.

The jail (build-jail.sh) holds the builder's root read-only (builder_root.py), the account's layer store, the context and the lent
settings; its root is a user namespace's, whose ids no other account's builds have (build_stores.py). The daemon is up while its build is,
and ends with it, as does the network (build_network.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import structlog

from gateway import descriptors, executors
from gateway.messages import BuildRequest, BuildResult
from gateway.observe.room import disk_free_bytes

from . import beneath, build_mirrors, build_network
from .build_network import BuildNetwork, Child
from .build_stores import DROPPED, RANGE, Stores, id_maps, remove_dropped
from .cgroups import Cgroups, Limits
from .errors import Missing, Unavailable, VmmError, not_written
from .making import key_at
from .namespaces import destroy_namespace, make_namespace, run_batch

log = structlog.get_logger()

_HERE = Path(__file__).parent
_STOP_SECONDS = 10
_SAY_SECONDS = 30
_STORE_FAILS = 75
_NUMBER_BYTES = 32
_DOCKERFILE_BYTES = 8 << 20  # as it is rewritten: an artifact's has a MiB (gateway/images/unpack.py)
_FULL_BYTES = 64 << 20  # of free disk, at which a build has failed for want of it
_CONFIG_BYTES = 4 << 20  # of an image's configuration: variables and commands, of which the kernel takes 2 MiB, and labels
_LOOK_SECONDS = 0.5
_LEAST_ROOM_BYTES = 256 << 20  # for the local base and some layers
_BLOCK_BYTES = 4096  # of a store's file system
_ENDED_KEPT = 64  # whose results nobody has collected
_OLD = ("store", "runroot", "tmp")  # of buildah, which all accounts shared


@dataclass(frozen=True)
class BuildSettings:
    """`first_uid`: of the ranges that accounts get. `store_mib` bounds each account's layer store, `cache_mib` and `cache_days` what stays
    in it."""

    base_archive: Path
    tools: Path
    modules: Path
    base_names: tuple[str, ...]
    pull: bool
    first_uid: int
    registry_ca: str = ""
    memory_mib: int = 3072
    cache_mib: int = 10_240
    cache_days: float = 30.0
    room_bytes: int = 0  # below so much free disk, stores are given up
    store_mib: int = 0  # 0: no bound
    kept_bytes: int = 0  # of free disk, which no build may take
    seconds: float = 1800.0
    processes: int = 4096


@dataclass
class _Build:
    """`context` is the tar archive's descriptor, `dockerfile` what is in the other one."""

    context: int
    dockerfile: bytes
    task: asyncio.Task[BuildResult]
    network: BuildNetwork | None = None
    jail: Child | None = None


async def _say(log: int, text: str) -> None:
    """Says it in the build's log. The pipe may be full, and its reader late: nobody else waits for it, and a log that nobody reads any more
    is no error."""
    with contextlib.suppress(TimeoutError, BrokenPipeError):
        async with asyncio.timeout(_SAY_SECONDS):
            await descriptors.writable(log)
        os.write(log, f"torpor: {text}\n".encode())


def source_policy(base_names: tuple[str, ...], pull: bool) -> dict[str, object]:
    """Returns where BuildKit takes images from (its sourcepolicy): every name, tag and digest of the local base means the one that is
    there; others are taken from registries, or from nowhere."""
    rules: list[dict[str, object]] = []
    if not pull:
        rules.append({"action": "DENY", "selector": {"identifier": "docker-image://*"}})
    if base_names:
        base = f"docker-image://{canonical(base_names[0])}"
        rules.append({"action": "ALLOW", "selector": {"identifier": base}})
        for name in base_names:
            repository = re.escape(canonical(name).rpartition(":")[0])
            pattern = f"^docker-image://{repository}(:[^@/]*)?(@sha256:[0-9a-f]+)?$"
            rules.append({"action": "CONVERT", "selector": {"identifier": pattern, "match_type": "REGEX"}, "updates": {"identifier": base}})
    return {"rules": rules}


def canonical(name: str) -> str:
    """Returns a reference with the registry and the tag that Docker adds (its distribution/reference)."""
    first, slash, _ = name.partition("/")
    if not slash:
        name = f"docker.io/library/{name}"
    elif not ("." in first or ":" in first or first == "localhost"):
        name = f"docker.io/{name}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class _NoRoom(Exception):
    """The host's disk cannot give a build what it needs at least."""


class Builder:
    def __init__(self, directory: Path, namespaces: Path, cgroups: Cgroups, settings: BuildSettings) -> None:
        self._directory = directory
        self._namespaces = namespaces
        self._cgroups = cgroups
        self._settings = settings
        self._builds: dict[str, _Build] = {}
        self._stores = Stores(directory / "accounts", settings.first_uid, settings.store_mib << 20)
        self._room: dict[str, int] = {}  # that builds under way may take in their stores, in bytes
        self._one_at_a_time: dict[str, asyncio.Lock] = {}  # a store has one daemon
        self._lent = directory / "settings"
        self._trimming: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ends what builds of an earlier daemon left and puts it away: `trim` removes it, because trees may be large, and microVMs wait for
        this start. Lends the host's settings afresh."""
        for name in self._cgroups.names():
            if name.startswith("build-"):
                self._cgroups.remove(name)
        self._namespaces.mkdir(parents=True, exist_ok=True)
        for path in self._namespaces.iterdir():
            destroy_namespace(path)
        for name in ("accounts", "work"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        work = self._directory / "work"
        for entry in (*work.iterdir(), *(self._directory / name for name in _OLD)):
            if not entry.name.startswith(DROPPED):
                with contextlib.suppress(OSError):
                    os.rename(entry, work / f"{DROPPED}{secrets.token_hex(4)}")
        build_mirrors.prepare(self._lent)
        self._trust()

    def _trust(self) -> None:
        """Writes down whose certificates the builder itself takes: those of the host's authorities, and of the settings' own."""
        files = [self._lent / "ca.pem", *([Path(self._settings.registry_ca)] if self._settings.registry_ca else [])]
        (self._lent / "registries.pem").write_text("".join(path.read_text(encoding="utf-8") + "\n" for path in files if path.exists()))

    @property
    def names(self) -> list[str]:
        """The names of builds under way."""
        return [name for name, build in self._builds.items() if not build.task.done()]

    async def begin(self, request: BuildRequest, image: Path, context: int, dockerfile: int) -> tuple[int, int]:
        """Starts a build; returns the reading ends of its log and of its phases' names. One that is under way by that name has lost whoever
        read them, and is ended first. Both descriptors are its own. Raises VmmError."""
        try:
            try:
                text = await executors.UPKEEP.run(os.pread, dockerfile, _DOCKERFILE_BYTES + 1, 0)
            finally:
                os.close(dockerfile)
            if len(text) > _DOCKERFILE_BYTES:
                raise VmmError(f"the Dockerfile has more than {_DOCKERFILE_BYTES} bytes")
            return await self._begin(request, image, context, text)
        except BaseException as error:
            os.close(context)
            if isinstance(error, OSError):
                raise not_written(error, "a build", "the build could not begin") from error
            raise

    async def _begin(self, request: BuildRequest, image: Path, context: int, dockerfile: bytes) -> tuple[int, int]:
        await self.cancel(request.build)
        for name in [name for name, build in self._builds.items() if build.task.done()][:-_ENDED_KEPT]:
            del self._builds[name]
        ends: list[int] = []
        try:
            ends += os.pipe2(os.O_CLOEXEC)
            ends += os.pipe2(os.O_CLOEXEC)
        except OSError:
            for end in ends:
                os.close(end)
            raise
        log_out, log_in, phase_out, phase_in = ends
        task = asyncio.get_running_loop().create_task(self._run(request, image, log_in, phase_in))
        task.add_done_callback(lambda _: os.close(context))
        build = _Build(context, dockerfile, task)
        build.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # which nobody may ever ask for
        self._builds[request.build] = build
        return log_out, phase_out

    async def result(self, name: str) -> BuildResult:
        """Waits for the end; it is kept until the build is cancelled, since an answer may be lost. Raises Missing for a build that is not
        known, and what the build raised."""
        build = self._builds.get(name)
        if build is None:
            raise Missing(f"build {name} is not known: it was interrupted")
        await asyncio.wait([build.task])
        if build.task.cancelled():
            raise Missing(f"build {name} was called off")
        return build.task.result()

    async def cancel(self, name: str) -> None:
        """Ends a build, or forgets one that has ended."""
        build = self._builds.get(name)
        if build is None:
            return
        if not build.task.cancelling():  # a second one would cut off what clears away after it
            build.task.cancel()
        await asyncio.wait([build.task])
        if self._builds.get(name) is build:
            del self._builds[name]

    def trim(self) -> None:
        """Begins to remove what builds that are over have left, and stores that nobody has used for long; and, where the disk has no room
        for what is more than a cache, the one that was used longest ago."""
        if self._trimming is None or self._trimming.done():
            self._trimming = asyncio.get_running_loop().create_task(self._trim())

    async def _trim(self) -> None:
        for step in (self._drop_left, self._drop_stores):
            try:
                await step()
            except OSError as error:
                log.warning("builds.not_trimmed", error=str(error))

    async def _drop_left(self) -> None:
        """Removes what a step that cleared away could not."""
        work = self._directory / "work"
        for path in (*work.iterdir(), *self._namespaces.iterdir()):
            if path.name not in self.names:
                self._put_away(path.name)
        await executors.BULK.run(remove_dropped, work)

    async def _drop_stores(self) -> None:
        await executors.BULK.run(self._stores.drop_unused, self._settings.cache_days, self._is_building)
        free = disk_free_bytes(self._directory)
        if free < self._settings.room_bytes and await executors.BULK.run(self._stores.give_up, self._is_building):
            log.warning("store.given_up", free=free)

    def _put_away(self, name: str) -> None:
        """Moves what a build that is over has left out of the way of the next one, which may have its name. Raises OSError."""
        destroy_namespace(self._namespaces / name)
        work = self._directory / "work"
        if not name.startswith(DROPPED) and (work / name).exists():
            os.rename(work / name, work / f"{DROPPED}{secrets.token_hex(4)}")

    def _is_building(self, account: str) -> bool:
        """Says whether the account's store is in use, now and from any thread."""
        lock = self._one_at_a_time.get(account)
        return lock is not None and lock.locked()

    async def _run(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        lock = self._one_at_a_time.setdefault(request.account, asyncio.Lock())
        try:
            if lock.locked():
                await _say(log, "another build of this account has the layer store: waiting for it")
            async with lock, asyncio.timeout(self._settings.seconds):
                result = await self._jailed(request, image, log, phases)
                if result.status == _STORE_FAILS:
                    await _say(log, "the layer store is broken: building again with a new one")
                    await executors.BULK.run(self._stores.drop, request.account)
                    result = await self._jailed(request, image, log, phases)
                if result.disk_full and self._settings.store_mib:  # what its file system had promised was not written
                    await executors.BULK.run(self._stores.drop, request.account)
                return result
        except _NoRoom as error:
            return BuildResult(1, "", True, False, str(error))
        except TimeoutError as error:
            if isinstance(error, executors.Overdue):
                raise Unavailable(f"the host is too slow for a build: {error}") from error
            reason = f"the build took longer than {self._settings.seconds:g} s (images.build_seconds)"
            await _say(log, reason)
            return BuildResult(124, "", False, False, reason)
        except (OSError, subprocess.SubprocessError) as error:
            raise not_written(error, "the build", "the host could not carry the build out") from error
        finally:
            os.close(log)
            os.close(phases)

    async def _jailed(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        group = f"build-{request.build}"
        work = beneath.child(self._directory / "work", request.build)
        namespace = beneath.child(self._namespaces, request.build)
        build = self._builds[request.build]
        settings = self._settings
        try:
            room = self._take_room(request.build)
            store, first, single = await executors.LATENCY.run(self._stores.open, request.account, request.users)
            self._put_away(request.build)
            (work / "root").mkdir(parents=True)
            (work / "out").mkdir()
            os.chown(work / "out", first, first)
            (work / "Dockerfile").write_bytes(build.dockerfile)
            os.lseek(build.context, 0, os.SEEK_SET)
            self._log_in(work / "out/login", first, request.logins)
            self._cgroups.create(group, Limits(settings.memory_mib << 20, os.cpu_count() or 1, 50, settings.processes, 1 << 30))
            await executors.LATENCY.run(make_namespace, namespace, lambda: run_batch("link set lo up\n"))
            build.network = BuildNetwork(namespace, work / "slirp4netns")
            await build.network.start()
            registries = {host.rpartition(":")[0] or host for host in request.logins}
            await executors.LATENCY.run(self._close_private, namespace, registries)
            process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net={namespace}", "unshare", "--mount", "--fork", "--kill-child", "/bin/sh", str(_HERE / "build-jail.sh"),
                str(work / "root"), id_maps("map-users", first, single), id_maps("map-groups", first, single), str(first), str(RANGE),
                str(settings.tools), str(store), f"/proc/{os.getpid()}/fd/{phases}", str(work / "Dockerfile"), str(work / "out"),
                str(self._lent),
                str(settings.base_archive), str(_HERE), str(settings.modules / "lib/modules") if request.modules else "",
                str(room // _BLOCK_BYTES),
                *map(str, self._cgroups.joins(group)), "--",
                canonical(settings.base_names[0]) if settings.base_names else "", key_at(settings.base_archive),
                str(request.disk_bytes), str(settings.cache_mib), str(settings.kept_bytes >> 10),
                stdin=build.context, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
            build.jail = Child(process)
            filling = asyncio.get_running_loop().create_task(self._until_full())
            try:
                status = await build.jail.wait()
            finally:
                filling.cancel()
            full = filling.done() or disk_free_bytes(work) < _FULL_BYTES
            if not status and full and settings.store_mib:
                return BuildResult(1, "", True, False, "the host's disk was full while the image was built: its layers may not be whole")
            if status:
                killed, bounded = self._cgroups.oom_kills(group) > 0, bool(settings.store_mib)
                reason = ""
                if not killed and self._cgroups.forks_refused(group):
                    reason = f"the container build wanted more than {settings.processes} processes (images.build_processes)"
                return BuildResult(status, "", full, killed, reason, room if bounded else 0)
            return self._collect(work / "out", image)
        finally:
            self._room.pop(request.build, None)
            await asyncio.shield(self._clean(build, group, namespace, work))

    async def _until_full(self) -> None:
        """Others fill the disk, too."""
        while disk_free_bytes(self._directory) >= _FULL_BYTES:
            await asyncio.sleep(_LOOK_SECONDS)

    def _take_room(self, build: str) -> int:
        """Returns how many bytes the build may add to its account's store: all that it has, or half of what the host's disk can give, since
        the image's disk takes as much again. What other builds were given is theirs. Raises _NoRoom."""
        free = disk_free_bytes(self._directory) - self._settings.kept_bytes - 2 * sum(self._room.values())
        room = min(free // 2, self._settings.store_mib << 20 or free)
        if room < _LEAST_ROOM_BYTES:
            left = max(0, free) >> 20
            raise _NoRoom(f"the host's disk has no room for a build: {left} MiB beside limits.disk_reserve_mib and other builds")
        self._room[build] = room
        return room

    def _collect(self, out: Path, image: Path) -> BuildResult:
        """Takes the disk over from the builder: plain files only, whatever the jail may have put there."""
        image.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            try:
                disk, config_file, number = [
                    files.enter_context(os.fdopen(beneath.opened(out, name), "rb")) for name in ("disk.raw", "config.json", "code_bytes")
                ]
            except (OSError, beneath.Stray) as error:
                raise VmmError(f"the build of {image.name} has not left what it should: {error}") from error
            config = config_file.read(_CONFIG_BYTES + 1)
            if len(config) > _CONFIG_BYTES:
                size = os.fstat(config_file.fileno()).st_size
                return BuildResult(
                    1, "", False, False, f"the image's configuration (ENV, LABEL, ...) has {size} bytes: {_CONFIG_BYTES} are taken"
                )
            (image / "code_bytes").write_bytes(number.read(_NUMBER_BYTES))
            os.rename(out / "disk.raw", image / "disk.raw")
            if not os.path.samestat(os.lstat(image / "disk.raw"), os.fstat(disk.fileno())):
                (image / "disk.raw").unlink()
                raise VmmError(f"the build of {image.name} has exchanged its disk")
            os.fchown(disk.fileno(), 0, 0)
            os.fchmod(disk.fileno(), 0o600)
        return BuildResult(0, config.decode("utf-8", errors="replace"), False, False)

    def _log_in(self, directory: Path, owner: int, logins: dict[str, str]) -> None:
        """Writes Docker's own settings, for the builder's eyes only: RUN steps have another root directory."""
        directory.mkdir(mode=0o700)
        files = {
            "config.json": {"auths": {host: {"auth": login} for host, login in logins.items()}},
            "policy.json": source_policy(self._settings.base_names, self._settings.pull),
        }
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
            os.chown(directory / name, owner, owner)
            (directory / name).chmod(0o400)
        os.chown(directory, owner, owner)

    def _close_private(self, namespace: Path, registries: set[str]) -> None:
        build_network.close_private(namespace, {*build_mirrors.mirror_hosts(self._lent), *registries})

    async def _clean(self, build: _Build, group: str, namespace: Path, work: Path) -> None:
        """A step that fails keeps no other from being taken; what is left then goes with the next `trim`, a control group at the next
        start."""
        network, jail = build.network, build.jail
        build.network = build.jail = None
        if network is not None:
            network.close()
        if jail is not None:
            jail.kill()
        await self._clean_step(executors.UPKEEP.run(self._cgroups.remove, group))
        for child in (network.child if network is not None else None, jail):
            if child is not None:
                await self._clean_step(asyncio.wait_for(child.wait(), _STOP_SECONDS))
        await self._clean_step(executors.UPKEEP.run(destroy_namespace, namespace))
        await self._clean_step(executors.BULK.run(lambda: shutil.rmtree(work, ignore_errors=True)))

    async def _clean_step(self, work: Awaitable[object]) -> None:
        try:
            await work
        except OSError as error:  # TimeoutError is one
            log.warning("build.not_cleaned", error=repr(error))
