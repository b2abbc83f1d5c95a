"""Container builds: BuildKit in a jail, with a network of its own, never as the host's root, and one store for each account.

The jail (build-jail.sh) holds the builder's root read-only (builder_root.py), the account's layer store, the context and the lent
settings; its root is a user namespace's, whose ids no other account's builds have. The daemon is up while its build is, and ends with
it. The network is slirp4netns with private ranges, metadata addresses and the host's loopback closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from gateway import descriptors, executors
from gateway.messages import BuildRequest, BuildResult
from gateway.observe.room import disk_free_bytes

from . import build_mirrors
from .cgroups import Cgroups, Limits
from .errors import VmmError
from .making import key_at
from .namespaces import destroy_namespace, make_namespace, run_batch
from .sandboxes import QUOTED_CHARACTERS

_HERE = Path(__file__).parent
_BUILD_SECONDS = 1800
_SLIRP_SECONDS = 10
_STOP_SECONDS = 10
_SAY_SECONDS = 30
_STORE_FAILS = 75
_DNS = "10.0.2.3"
_CLOSED = "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16, 100.64.0.0/10, 127.0.0.0/8, 224.0.0.0/3"
RANGE = 1 << 20  # ids of one account's builds: an image's own, and after them those that it names beyond
_SINGLE = 256  # of them, for ids that an image names beyond; the kernel takes 340 lines (user_namespaces(7))
_WHOLE = RANGE - _SINGLE  # the first id that an image's own do not reach; the kernel takes none twice
_OLD = ("store", "runroot", "tmp")  # of buildah, which all accounts shared


@dataclass(frozen=True)
class BuildSettings:
    """`first_uid`: of the ranges that accounts get. `cache_mib` and `cache_days` bound each account's layer store."""

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


@dataclass
class _Build:
    task: asyncio.Task[BuildResult]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    tether: int | None = None  # a pipe's end: when it closes, however the daemon ends, its network ends


class Stores:
    """Each account's layer store, with its range of ids and the single ids that its images named.

    A store's directory is its record: the owner of its inside is the range's first id, the file `users` lists the single ids in the order
    in which they are mapped, and its time is that of the last build.
    """

    def __init__(self, directory: Path, first_uid: int) -> None:
        self._directory = directory
        self._first_uid = first_uid
        self._one_at_a_time = threading.Lock()  # or two accounts that are new at once would find the same range free

    def open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        """The store, made where it is missing; its first id, and all its single ids. Raises VmmError."""
        with self._one_at_a_time:
            return self._open(account, users)

    def _open(self, account: str, users: list[int]) -> tuple[Path, int, list[int]]:
        if not re.fullmatch(r"[\w-]+", account):
            raise VmmError(f"account {account!r} has no layer store")
        place = self._directory / account
        store = place / "store"
        if not store.exists():
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            taken = {one.stat().st_uid for one in self._directory.glob("*/store")}
            first = next(uid for uid in range(self._first_uid, 1 << 32, RANGE) if uid not in taken)
            if first + RANGE >= 1 << 32:
                raise VmmError("no range of user ids is free for another account's builds: users.builders says where they begin")
            made = place / "store.new"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(mode=0o700)
            os.chown(made, first, first)
            made.rename(store)
        known = self._users(place)
        wanted = known + [user for user in users if user >= _WHOLE and user not in known]
        if len(wanted) > _SINGLE:
            raise VmmError(f"this account's builds have named {_SINGLE} user ids beyond a million: no more are mapped")
        (place / "users.new").write_text(" ".join(map(str, wanted)), encoding="ascii")
        (place / "users.new").rename(place / "users")
        return store, store.stat().st_uid, wanted

    def drop(self, account: str) -> None:
        """It is only a cache."""
        place = self._directory / account
        shutil.rmtree(place / "store.old", ignore_errors=True)  # of a removal that was cut off
        with contextlib.suppress(FileNotFoundError):
            (place / "store").rename(place / "store.old")
        shutil.rmtree(place, ignore_errors=True)

    def drop_unused(self, days: float, used: set[str]) -> None:
        """Removes what no build has used for so long; `used` are of accounts that build now."""
        for place in self._directory.glob("*"):
            with contextlib.suppress(OSError), self._one_at_a_time:  # no build may begin in it meanwhile
                if place.name not in used and (place / "users").stat().st_mtime < time.time() - days * 86400:
                    self.drop(place.name)

    def _users(self, place: Path) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            return [user for user in map(int, (place / "users").read_text(encoding="ascii").split()) if user >= _WHOLE]
        return []


async def _say(log: int, text: str) -> None:
    """The pipe may be full, and its reader late: nobody else waits for it, and a log that nobody reads any more is no error."""
    with contextlib.suppress(TimeoutError, BrokenPipeError):
        async with asyncio.timeout(_SAY_SECONDS):
            await descriptors.writable(log)
        os.write(log, f"torpor: {text}\n".encode())


def id_maps(option: str, first: int, single: list[int]) -> str:
    """Arguments of unshare(1): an image's ids up to a million and some, then each of the single ones."""
    maps = [f"--{option}=0:{first}:{_WHOLE}", *(f"--{option}={user}:{first + _WHOLE + number}:1" for number, user in enumerate(single))]
    return " ".join(maps)


def source_policy(base_names: tuple[str, ...], pull: bool) -> dict[str, object]:
    """Where BuildKit takes images from (its sourcepolicy): every name, tag and digest of the local base means the one that is there;
    others are taken from registries, or from nowhere."""
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
    """A reference with the registry and the tag that Docker adds (its distribution/reference)."""
    first, slash, _ = name.partition("/")
    if not slash:
        name = f"docker.io/library/{name}"
    elif not ("." in first or ":" in first or first == "localhost"):
        name = f"docker.io/{name}"
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class Builder:
    def __init__(self, directory: Path, namespaces: Path, cgroups: Cgroups, settings: BuildSettings) -> None:
        self._directory = directory
        self._namespaces = namespaces
        self._cgroups = cgroups
        self._settings = settings
        self._builds: dict[str, _Build] = {}
        self._stores = Stores(directory / "accounts", settings.first_uid)
        self._one_at_a_time: dict[str, asyncio.Lock] = {}  # a store has one daemon
        self._lent = directory / "settings"

    def start(self) -> None:
        """Ends and removes what builds of an earlier daemon left; lends the host's settings afresh."""
        for name in self._cgroups.names():
            if name.startswith("build-"):
                self._cgroups.remove(name)
        self._namespaces.mkdir(parents=True, exist_ok=True)
        for path in self._namespaces.iterdir():
            destroy_namespace(path)
        for name in ("accounts", "work"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        for entry in (*(self._directory / "work").iterdir(), *(self._directory / name for name in _OLD)):
            shutil.rmtree(entry, ignore_errors=True)
        self._stores.drop_unused(self._settings.cache_days, set())
        build_mirrors.prepare(self._lent)
        self._trust()

    def _trust(self) -> None:
        """Whose certificates the builder itself takes: what the host trusts, and the settings' own authorities."""
        files = [self._lent / "ca.pem", *([Path(self._settings.registry_ca)] if self._settings.registry_ca else [])]
        (self._lent / "registries.pem").write_text("".join(path.read_text(encoding="utf-8") + "\n" for path in files if path.exists()))

    @property
    def names(self) -> list[str]:
        return list(self._builds)

    def begin(self, request: BuildRequest, image: Path) -> tuple[int, int]:
        """Starts a build; returns the reading ends of its log and of its phases' names."""
        if request.build in self._builds:
            raise VmmError(f"build {request.build} is already under way")
        log_out, log_in = os.pipe2(os.O_CLOEXEC)
        phase_out, phase_in = os.pipe2(os.O_CLOEXEC)
        build = _Build(asyncio.get_running_loop().create_task(self._run(request, image, log_in, phase_in)))
        self._builds[request.build] = build
        return log_out, phase_out

    async def result(self, name: str) -> BuildResult:
        """Waits for the end. Raises VmmError for a build that is not known."""
        build = self._builds.get(name)
        if build is None:
            raise VmmError(f"build {name} is not known: it was interrupted")
        try:
            return await asyncio.shield(build.task)
        finally:
            if build.task.done():
                self._builds.pop(name, None)

    async def cancel(self, name: str) -> None:
        build = self._builds.get(name)
        if build is not None:
            build.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await build.task
            self._builds.pop(name, None)

    async def _run(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        lock = self._one_at_a_time.setdefault(request.account, asyncio.Lock())
        try:
            if lock.locked():
                await _say(log, "another build of this account has the layer store: waiting for it")
            async with lock, asyncio.timeout(_BUILD_SECONDS):
                result = await self._jailed(request, image, log, phases)
                if result.status == _STORE_FAILS:
                    await _say(log, "the layer store is broken: building again with a new one")
                    await executors.BULK.run(self._stores.drop, request.account)
                    result = await self._jailed(request, image, log, phases)
                return result
        except TimeoutError:
            await _say(log, f"the build took longer than {_BUILD_SECONDS} s")
            return BuildResult(124, "", False, False)
        finally:
            os.close(log)
            os.close(phases)

    async def _jailed(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        group = f"build-{request.build}"
        work = self._directory / "work" / request.build
        namespace = self._namespaces / request.build
        build = self._builds[request.build]
        settings = self._settings
        store, first, single = await executors.LATENCY.run(self._stores.open, request.account, request.users)
        (work / "root").mkdir(parents=True)
        (work / "out").mkdir()
        os.chown(work / "out", first, first)
        free = disk_free_bytes(work)
        self._log_in(work / "out/login", first, request.logins)
        self._cgroups.create(group, Limits(settings.memory_mib << 20, os.cpu_count() or 1, 50, 4096, 1 << 30))
        try:
            await executors.LATENCY.run(make_namespace, namespace, lambda: run_batch("link set lo up\n"))
            await self._connect(build, work, namespace, {host.rpartition(":")[0] or host for host in request.logins})
            process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net={namespace}", "unshare", "--mount", "--fork", "--kill-child", "/bin/sh", str(_HERE / "build-jail.sh"),
                str(work / "root"), id_maps("map-users", first, single), id_maps("map-groups", first, single), str(first), str(RANGE),
                str(settings.tools), str(store), request.context, request.dockerfile, str(work / "out"), str(self._lent),
                str(settings.base_archive), str(_HERE), str(settings.modules / "lib/modules") if request.modules else "",
                *map(str, self._cgroups.joins(group)), "--",
                canonical(settings.base_names[0]) if settings.base_names else "", key_at(settings.base_archive),
                str(request.disk_bytes), str(settings.cache_mib), stdin=phases, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
            build.processes.append(process)
            status = await process.wait()
            full = status not in (0, _STORE_FAILS) and (disk_free_bytes(work) < 64 << 20 <= free)
            if status:
                return BuildResult(status, "", full, self._cgroups.oom_kills(group) > 0)
            return BuildResult(0, self._collect(work / "out", image), False, False)
        finally:
            await self._clean(build, group, namespace, work)

    def _collect(self, out: Path, image: Path) -> str:
        """Takes the disk over from the builder: plain files only, whatever the jail may have put there."""
        image.mkdir(parents=True, exist_ok=True)
        for name in ("disk.raw", "config.json", "code_bytes"):
            if (out / name).is_symlink() or not (out / name).is_file():
                raise VmmError(f"the build of {image.name} left no {name}")
        shutil.copyfile(out / "code_bytes", image / "code_bytes")
        os.rename(out / "disk.raw", image / "disk.raw")
        os.chown(image / "disk.raw", 0, 0)
        (image / "disk.raw").chmod(0o600)
        return (out / "config.json").read_text(encoding="utf-8")

    def _log_in(self, directory: Path, owner: int, logins: dict[str, str]) -> None:
        """Docker's own settings, for the builder's eyes only: RUN steps have another root directory."""
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

    async def _connect(self, build: _Build, work: Path, namespace: Path, registries: set[str]) -> None:
        """Raises VmmError with slirp4netns's own words."""
        said = work / "slirp4netns"
        ready_out, ready_in = os.pipe2(os.O_CLOEXEC)
        tethered, build.tether = os.pipe2(os.O_CLOEXEC)
        words = said.open("wb")
        try:
            # Its sandbox detaches what is mounted below "/", and where a mount is shared (/run/netns of ip-netns(8)), the
            # host's too: it gets mounts of its own.
            process = await asyncio.create_subprocess_exec(
                "unshare", "--mount", "--propagation=private",
                "slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                "--netns-type=path", f"--ready-fd={ready_in}", f"--exit-fd={tethered}", str(namespace), "tap0",
                pass_fds=[ready_in, tethered], stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=words, start_new_session=True,
            )  # fmt: skip
            build.processes.append(process)
            os.close(ready_in)
            ready_in = -1
            async with asyncio.timeout(_SLIRP_SECONDS):
                await descriptors.readable(ready_out)
            ready = os.read(ready_out, 1)
        except TimeoutError:
            ready = b""
        finally:
            words.close()
            os.close(tethered)
            os.close(ready_out)
            if ready_in >= 0:
                os.close(ready_in)
        if not ready:
            why = said.read_text(encoding="utf-8", errors="replace").strip()[-QUOTED_CHARACTERS:] or f"not within {_SLIRP_SECONDS} s"
            raise VmmError(f"slirp4netns did not start, and the build has no network: {why}")
        await executors.LATENCY.run(self._close_private, namespace, registries)

    def _close_private(self, namespace: Path, registries: set[str]) -> None:
        allowed = {_DNS}
        for name in {*build_mirrors.mirror_hosts(self._lent), *registries}:
            with contextlib.suppress(OSError):
                allowed |= {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
        rules = (
            "table inet build {\nchain out {\ntype filter hook output priority 0;\n"
            f"oif lo accept\nip daddr {{ {', '.join(sorted(allowed))} }} accept\n"
            f"ip daddr {{ {_CLOSED} }} reject\nmeta nfproto ipv6 reject\n}}\n}}\n"
        )
        subprocess.run(
            ["nsenter", f"--net={namespace}", "nft", "-f", "-"], input=rules.encode(), check=True, capture_output=True, timeout=20
        )

    async def _clean(self, build: _Build, group: str, namespace: Path, work: Path) -> None:
        if build.tether is not None:
            os.close(build.tether)
        for process in build.processes:
            if process.returncode is None:  # or its number may be another's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        await executors.UPKEEP.run(self._cgroups.remove, group)
        for process in build.processes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        build.processes.clear()
        build.tether = None
        await executors.UPKEEP.run(destroy_namespace, namespace)
        await executors.BULK.run(lambda: shutil.rmtree(work, ignore_errors=True))
        used = {account for account, lock in self._one_at_a_time.items() if lock.locked()}
        await executors.BULK.run(self._stores.drop_unused, self._settings.cache_days, used)
