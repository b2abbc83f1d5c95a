"""Container builds: buildah in a jail of its own, with a network of its own, never as the host's root.

The jail (build-jail.sh) holds /usr read-only, the layer store, the context and the lent settings; its root is a user
namespace's. The network is slirp4netns with private ranges, metadata addresses and the host's loopback closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from gateway.messages import BuildRequest, BuildResult
from gateway.observe.room import disk_free_bytes

from . import lending
from .cgroups import Cgroups, Limits
from .driver import VmmError
from .making import key_at
from .namespaces import destroy_namespace, make_namespace, run_batch
from .places import QUOTED_CHARACTERS

_HERE = Path(__file__).parent
_MEMORY_BYTES = 3 << 30
_BUILD_SECONDS = 1800
_SLIRP_SECONDS = 10
_STOP_SECONDS = 10
_DNS = "10.0.2.3"
_CLOSED = "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16, 100.64.0.0/10, 127.0.0.0/8, 224.0.0.0/3"


@dataclass(frozen=True)
class BuildSettings:
    base_archive: Path
    modules: Path
    base_names: tuple[str, ...]
    pull: bool
    first_uid: int
    registry_ca: str = ""


@dataclass
class _Build:
    task: asyncio.Task[BuildResult]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    tether: int | None = None  # a pipe's end: when it closes, however the daemon ends, its network ends


class Builder:
    def __init__(self, directory: Path, namespaces: Path, cgroups: Cgroups, settings: BuildSettings) -> None:
        self._directory = directory
        self._namespaces = namespaces
        self._cgroups = cgroups
        self._settings = settings
        self._builds: dict[str, _Build] = {}
        self._one_at_a_time = asyncio.Lock()  # buildah's store is shared, and the machine is small
        self._lent = directory / "settings"

    def start(self) -> None:
        """Ends and removes what builds of an earlier daemon left; lends the host's settings afresh."""
        for name in self._cgroups.names():
            if name.startswith("build-"):
                self._cgroups.remove(name)
        self._namespaces.mkdir(parents=True, exist_ok=True)
        for path in self._namespaces.iterdir():
            destroy_namespace(path)
        for name in ("store", "runroot", "tmp", "work"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        for entry in (self._directory / "work").iterdir():
            shutil.rmtree(entry, ignore_errors=True)
        for name in ("store", "runroot", "tmp"):
            os.chown(self._directory / name, self._settings.first_uid, self._settings.first_uid)
        lending.prepare(self._lent)
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
        try:
            async with self._one_at_a_time, asyncio.timeout(_BUILD_SECONDS):
                return await self._jailed(request, image, log, phases)
        except TimeoutError:
            os.write(log, f"torpor: the build took longer than {_BUILD_SECONDS} s\n".encode())
            return BuildResult(124, "", False, False)
        finally:
            os.close(log)
            os.close(phases)

    async def _jailed(self, request: BuildRequest, image: Path, log: int, phases: int) -> BuildResult:
        group = f"build-{request.build}"
        work = self._directory / "work" / request.build
        namespace = self._namespaces / request.build
        build = self._builds[request.build]
        (work / "root").mkdir(parents=True)
        (work / "out").mkdir()
        free = disk_free_bytes(work)
        self._log_in(work / "auth.json", request.logins)
        self._cgroups.create(group, Limits(_MEMORY_BYTES, os.cpu_count() or 1, 50, 4096, 1 << 30))
        try:
            await asyncio.to_thread(make_namespace, namespace, lambda: run_batch("link set lo up\n"))
            await self._connect(build, work, namespace, {host.rpartition(":")[0] or host for host in request.logins})
            process = await asyncio.create_subprocess_exec(
                "nsenter", f"--net={namespace}", "unshare", "--mount", "--fork", "--kill-child", "/bin/sh", str(_HERE / "build-jail.sh"),
                str(work / "root"), str(self._settings.first_uid), str(self._directory), request.context, str(work / "out"),
                str(self._lent), str(self._settings.base_archive), str(_HERE / "build.sh"), str(work / "auth.json"),
                str(self._settings.modules / "lib/modules") if request.modules else "",
                *map(str, self._cgroups.joins(group)), "--",
                " ".join(self._settings.base_names), f"localhost/torpor-build:{request.build}", str(request.disk_bytes),
                "pull" if self._settings.pull else "never", str(phases), key_at(self._settings.base_archive),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[phases], start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
            build.processes.append(process)
            status = await process.wait()
            full = status != 0 and (disk_free_bytes(work) < 64 << 20 <= free)
            if status:
                return BuildResult(status, "", full, status in (137, -9))
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

    def _log_in(self, path: Path, logins: dict[str, str]) -> None:
        """Writes containers-auth.json(5), for the builder's eyes only: RUN steps have another root directory."""
        path.write_text(json.dumps({"auths": {host: {"auth": login} for host, login in logins.items()}}), encoding="utf-8")
        os.chown(path, self._settings.first_uid, self._settings.first_uid)
        path.chmod(0o400)

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
            ready = await asyncio.wait_for(asyncio.to_thread(os.read, ready_out, 1), _SLIRP_SECONDS)
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
        await asyncio.to_thread(self._close_private, namespace, registries)

    def _close_private(self, namespace: Path, registries: set[str]) -> None:
        allowed = {_DNS}
        for name in {*lending.mirror_hosts(self._lent), *registries}:
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
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._cgroups.remove, group)
        for process in build.processes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        await asyncio.to_thread(destroy_namespace, namespace)
        await asyncio.to_thread(shutil.rmtree, work, True)
