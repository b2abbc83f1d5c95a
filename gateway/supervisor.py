"""`torpor serve`: starts edge, control, vmm and the object store, each as the user it should be, and keeps them running.

It opens the listeners and keeps them: a worker inherits its slot's sockets, and its successor the same ones before the old
worker stops accepting. A supervisor that starts over living processes takes their sockets from them and replaces them one
by one; microVMs go on all the while. How processes are started, watched and replaced is gateway/children.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import structlog

from vmm import syscalls
from vmm.own_groups import OwnGroups

from . import executors, instance, listeners, notify, own_walls
from .children import STOP_SECONDS, Child, Children, Process, StartError, watch_without_threads
from .config import END_SECONDS, ConfigError, Settings
from .observe.log import LEVEL_VARIABLE
from .process import READY_VARIABLE, SETTINGS_VARIABLE, SOCKETS_VARIABLE, passed
from .status import ChildState, Recorded, State, is_living, living, state_file

log = structlog.get_logger()

_READY_SECONDS = 60.0
_CERTIFICATES_SECONDS = 30.0
_FILES_SECONDS = 60.0
_ORPHANS_SECONDS = 10.0
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_EC2_METADATA_DISABLED", "AWS_CA_BUNDLE",
}  # fmt: skip
_PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
_CODE = Path(__file__).resolve().parents[1]


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = state_file(settings)
        self._state = State(pid=os.getpid(), started=syscalls.start_time(os.getpid()) or 0)
        self._said = ""
        self._children: list[Child] = []
        ready_seconds = _READY_SECONDS + 2 * settings.probe_seconds  # vmm may have to probe both hypervisors
        self._processes = Children(self._spawn, self._save_state, ready_seconds, settings.service.silent_seconds)
        self._reload_wanted = asyncio.Event()
        self._bound = self._code_mount()
        self._lock = -1
        self._groups = OwnGroups(settings.name)
        self._files = executors.Pool("files", 1, _FILES_SECONDS)
        self._files.on_stuck = lambda: None  # certificates on a server that is away: the next look fails too, and all else goes on

    # ---- start ----

    async def start(self) -> Settings:
        """Has everything up and serving; returns the settings with the ports that were chosen. Raises ConfigError, StartError."""
        self._files.start()
        self._take_lock()
        syscalls.become_subreaper()
        old = living(self._path)
        sockets = _adopt_sockets(old)
        port = listeners.choose_edge_port(self._settings, in_use=bool(sockets.get("edge")))
        self._settings = self._settings.model_copy(update={"edge": self._settings.edge.model_copy(update={"port": port})})
        self._settings = instance.prepare(self._settings)
        self._make_children(sockets)
        edges = self._edges()
        for child in self._children:
            if child not in edges:
                await _stop_old([process for process in old if process.name == child.name])
                await self._processes.start(child)
        try:
            async with asyncio.TaskGroup() as group:
                for child in edges:
                    group.create_task(self._processes.start(child))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        for process in old:
            if process.name.startswith("edge"):
                _signal(process, signal.SIGTERM)
        return self._settings

    def _edges(self) -> list[Child]:
        return [child for child in self._children if child.name.startswith("edge")]

    def _take_lock(self) -> None:
        for path in (self._settings.root, self._settings.runtime):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._settings.runtime / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"instance {self._settings.name} is already served by another process") from error
        os.truncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def _make_children(self, sockets: dict[str, list[list[socket.socket]]]) -> None:
        settings, users = self._settings, self._settings.users
        python = [self._python(), "-m"]

        def listening(purpose: str, address: str, port: int) -> list[socket.socket]:
            adopted = sockets.get(purpose)
            return adopted.pop() if adopted else [listeners.listen(address, port, purpose)]

        if settings.object_store.is_embedded:
            store = listening("store", "127.0.0.1", settings.object_store.port)
            self._children.append(Child("store", [*python, "gateway.objectstore"], users.store, {"store": store}))
        self._children.append(Child("vmm", [*python, "vmm"], 0))
        control = {
            "api": listening("api", settings.api.address, settings.api.port),
            "metrics": listening("metrics", settings.api.metrics_address, settings.api.metrics_port),
        }
        self._children.append(Child("control", [*python, "gateway.control"], users.control, control))
        shared: list[socket.socket] = []  # sockets of which there is only one, whatever the number of workers
        for slot in range(settings.edge.worker_count):
            mine = {"edge": self._slot("edge", sockets, shared)}
            if settings.edge.redirect_port:
                mine["redirect"] = self._slot("redirect", sockets, shared)
            self._children.append(Child(f"edge-{slot}", [*python, "gateway.edge", str(slot)], users.edge, mine))

    def _slot(self, purpose: str, sockets: dict[str, list[list[socket.socket]]], shared: list[socket.socket]) -> list[socket.socket]:
        """Returns one worker's listeners: adopted from an earlier supervisor, or new."""
        adopted, edge = sockets.get(purpose), self._settings.edge
        if adopted:
            return adopted.pop()
        port = edge.port if purpose == "edge" else edge.redirect_port
        addresses = listeners.edge_addresses(self._settings)
        own = [listeners.listen(address, port, "edge") for address in addresses if listeners.is_inet(address)]
        if purpose != "edge":
            return own
        if not shared:
            shared += [listeners.listen(address, 0, "edge") for address in addresses if address.startswith(listeners.UNIX)]
            shared += listeners.from_systemd() if listeners.SYSTEMD in addresses else []
        return own + shared

    # ---- processes ----

    def _code_mount(self) -> bool:
        """Whether the code lies where its unprivileged processes cannot read it (a clone in /root, say): it is then bound
        to a place that they can, in their own mount namespace. Raises ConfigError for code that they may not read anywhere."""
        instance.check_readable(_CODE / "gateway")
        try:
            instance.check_reachable(_CODE / "gateway")
            instance.check_reachable(Path(sys.prefix))
            return False
        except ConfigError:
            if not Path(sys.prefix).is_relative_to(_CODE):
                raise
            return True

    def _python(self) -> str:
        relative = Path(sys.prefix).relative_to(_CODE) if self._bound else Path(sys.prefix)
        return str((self._code() / relative if self._bound else relative) / "bin/python")

    def _code(self) -> Path:
        return self._settings.runtime / "code" if self._bound else _CODE

    def _prefix(self, child: Child) -> list[str]:
        drop = []
        if child.uid:
            drop = [
                "setpriv", f"--reuid={child.uid}", f"--regid={child.uid}", "--clear-groups", "--inh-caps=-all",
                "--bounding-set=-all", "--no-new-privs", "--",
            ]  # fmt: skip
        if not self._bound:
            return drop
        self._code().mkdir(exist_ok=True)
        bind = 'mount --make-rprivate / && mount --bind "$1" "$2" && cd "$2" && shift 2 && exec "$@"'
        # vmm makes mounts that outlive it, so it stays in the host's namespace: it is root and can read the code anyway.
        return drop if not child.uid else ["unshare", "--mount", "/bin/sh", "-c", bind, "sh", str(_CODE), str(self._code()), *drop]

    def _in_group(self, child: Child) -> list[str]:
        """Returns what starts a child in its memory control group; where none can be made it goes without, and `torpor doctor` says so."""
        if self._groups.why_not:
            return []
        try:
            return self._groups.enter(child.name, own_walls.group_bound(child.name, self._settings))
        except OSError as error:
            log.warning("process.no_memory_group", name=child.name, error=str(error))
            return []

    async def _spawn(self, child: Child, ready: int) -> Process:
        numbers = {purpose: [sock.fileno() for sock in socks] for purpose, socks in child.sockets.items()}
        command = list(child.command)
        if self._bound and not child.uid:
            command[0] = str(Path(sys.prefix) / "bin/python")
        with passed(settings_for(child.name, self._settings)) as settings:
            environment = environment_for(child.name, os.environ) | {
                SETTINGS_VARIABLE: str(settings), SOCKETS_VARIABLE: json.dumps(numbers), READY_VARIABLE: str(ready),
            }  # fmt: skip
            return await asyncio.create_subprocess_exec(
                *self._in_group(child), *self._prefix(child), *command, env=environment, cwd=_CODE,
                start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[ready, settings, *(number for group in numbers.values() for number in group)],
            )  # fmt: skip

    def _save_state(self) -> None:
        self._state.processes = [
            Recorded(
                child.name, process.pid, syscalls.start_time(process.pid), process is child.serving,
                {purpose: [sock.fileno() for sock in socks] for purpose, socks in child.sockets.items()},
            )
            for child in self._children for process in child.processes
        ]  # fmt: skip
        self._state.children = [
            ChildState(child.name, child.serves, child.since, child.restarts, child.failure) for child in self._children
        ]
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_bytes(msgspec.json.encode(self._state))
            temporary.rename(self._path)
        except OSError as error:  # processes are watched, replaced and ended all the same
            log.error("state.not_saved", path=str(self._path), error=str(error))
        away = ", ".join(f"{child.name} ({child.failure})" for child in self._children if child.failure)
        if away != self._said:
            self._said = away
            notify.tell(f"STATUS=not serving, tried again: {away}" if away else "STATUS=serving")

    # ---- reload and stop ----

    def want_reload(self) -> None:
        """Asks for a reload; one that is under way is followed by another, because what it starts may be of before."""
        self._reload_wanted.set()

    async def keep_reloading(self) -> None:
        """Carries out one reload after the other. One that fails is reported, and leaves what serves in its place."""
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            notify.reloading()
            try:
                await self.reload()
            except Exception as error:
                log.error("reload.failed", error=str(error), exc_info=not isinstance(error, ConfigError | StartError))
                self._state.failed_at, self._state.failure = time.time(), str(error)
                self._save_state()
            finally:
                notify.tell("READY=1")

    async def reload(self) -> None:
        """Replaces the edge workers one by one; no request is refused or cut. Raises ConfigError, StartError."""
        await self._files.run(instance.update_certificates, self._settings)
        for child in self._edges():
            await self._processes.start(child)
        log.info("reloaded")

    async def keep_certificates(self) -> None:
        """Workers load their files again when they change: ours keep up with the ones that the settings name, and the session
        tickets' key is another one every so often."""
        while True:
            await asyncio.sleep(_CERTIFICATES_SECONDS)
            try:
                await self._files.run(instance.update_certificates, self._settings)
            except Exception as error:
                log.error("tls.not_updated", error=str(error), exc_info=not isinstance(error, ConfigError | OSError | ValueError))

    async def keep_watch(self) -> None:
        """Replaces children that stand still."""
        await self._processes.end_silent(self._children)

    async def stop(self) -> None:
        """Running sessions are suspended first; nothing stays behind but files in the instance's root. Ends in `service.stop_seconds`."""
        seconds = self._settings.service.stop_seconds
        notify.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((seconds + END_SECONDS) * 1e6)}")
        deadline = time.monotonic() + seconds
        control = [child for child in self._children if child.name == "control"]
        await self._processes.stop_restarts()
        await self._processes.end(control, signal.SIGUSR1, self._settings.suspend_seconds + END_SECONDS / 2)
        await self._processes.end(self._edges(), signal.SIGTERM, deadline - END_SECONDS / 2 - time.monotonic())
        await self._processes.end(self._children, signal.SIGTERM, deadline - time.monotonic())  # vmm and store
        try:
            async with asyncio.timeout(END_SECONDS / 2):  # also where the pool's thread stands, in front of a file server that is away
                await self._files.run(self._clear_runtime)
        except OSError as error:
            log.error("stop.not_cleared", where=str(self._settings.runtime), error=repr(error))

    async def stop_started(self) -> None:
        """After a start that failed: what was started ends."""
        await self._processes.stop_restarts()
        await self._processes.end(reversed(self._children), signal.SIGTERM)
        self._groups.remove()

    def _clear_runtime(self) -> None:
        """Sockets and empty directories go. A microVM that could not be suspended keeps its place, and runs on."""
        from vmm.cgroups import Cgroups

        runtime = self._settings.runtime
        self._groups.remove()
        if any((runtime / "vms").glob("*")):
            log.warning("stop.microvms_left", where=str(runtime / "vms"))
            return
        for name in ("control/socket", "vmm.sock", "supervisor.json", "lock"):
            (runtime / name).unlink(missing_ok=True)
        for name in ("vms", "netns", "build-netns", "code", "control", ""):
            with contextlib.suppress(OSError):
                (runtime / name).rmdir()
        with contextlib.suppress(OSError):
            self._settings.run.rmdir()
        Cgroups(self._settings.name, self._settings.root).close()


def _adopt_sockets(old: list[Recorded]) -> dict[str, list[list[socket.socket]]]:
    """Listening sockets of living processes, each once: closing the last holder of one would reset what is queued in it."""
    found: dict[str, list[list[socket.socket]]] = {}
    known: set[int] = set()
    for process in old:
        for purpose, numbers in process.sockets.items():
            with contextlib.suppress(OSError):
                taken = [socket.socket(fileno=syscalls.pidfd_getfd(process.pid, number)) for number in numbers]
                inodes = {os.fstat(sock.fileno()).st_ino for sock in taken}
                if inodes <= known:  # those of its predecessor or successor
                    for sock in taken:
                        sock.close()
                    continue
                known |= inodes
                found.setdefault(purpose, []).append(taken)
    return found


def _signal(process: Recorded, number: signal.Signals) -> None:
    if process.started is not None:
        with contextlib.suppress(ProcessLookupError):
            syscalls.signal_process(process.pid, process.started, number)


def settings_for(child: str, settings: Settings) -> Settings:
    """Those that a child has to know: control alone asks other endpoints, with their secrets."""
    if child == "control":
        return settings
    secrets = {"access_key": "", "secret_key": ""}
    return settings.model_copy(
        update={
            "object_store": settings.object_store.model_copy(update=secrets),
            "credentials": settings.credentials.model_copy(update=secrets),
            "images": settings.images.model_copy(update={"logins": {}}),
        }
    )  # fmt: skip


def environment_for(child: str, ours: Mapping[str, str]) -> dict[str, str]:
    """Control is the one that asks other services (object stores, STS, CloudWatch Logs, registries' tokens): it gets credentials and
    proxies, by which nothing on this host is ever reached. A profile's files are root's, so no names of profiles go on."""
    names = {"PATH", "LANG", "TZ", "SSL_CERT_FILE", LEVEL_VARIABLE}
    found = {name: value for name, value in ours.items() if name in names}
    found |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    if child != "control":
        return found
    found |= {name: value for name, value in ours.items() if name in _CREDENTIALS or name.lower() in _PROXIES}
    local = [name for name in (ours.get("no_proxy") or ours.get("NO_PROXY") or "").split(",") if name]
    return found | {"no_proxy": ",".join([*local, "localhost", "127.0.0.1", "::1"])}


async def _feed_watchdog() -> None:
    """For as long as this loop turns."""
    seconds = notify.watchdog_seconds()
    while seconds is not None:
        notify.tell("WATCHDOG=1")
        await asyncio.sleep(seconds / 3)


async def _reap_orphans() -> None:
    """Waits for what ends below a process that was replaced, as a hypervisor of an earlier vmm: it is given to this process, and to nobody
    else."""
    ended: set[int] = set()
    while True:
        await asyncio.sleep(_ORPHANS_SECONDS)
        ended = _reap(ended)


def _reap(before: set[int]) -> set[int]:
    """Removes ended children that had ended at the look before: who waits for one has done so since. Returns those of this look."""
    ended = syscalls.ended_children()
    for pid in ended & before:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return ended - before


async def _stop_old(old: list[Recorded]) -> None:
    """Tells processes of an earlier supervisor to end, and waits for it; kills those that do not end in time."""
    for process in old:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while left := [process for process in old if is_living(process)]:
        if time.monotonic() > deadline:
            for process in left:
                _signal(process, signal.SIGKILL)
        if time.monotonic() > deadline + END_SECONDS:
            raise StartError(f"{left[0].name} of an earlier service (process {left[0].pid}) does not end")
        await asyncio.sleep(0.02)


async def serve(settings: Settings, announce: Callable[[Settings], None]) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP replaces the edge workers. Raises ConfigError when something does not start."""
    watch_without_threads()
    supervisor = Supervisor(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    start = loop.create_task(supervisor.start())

    def end() -> None:
        stop.set()
        start.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, supervisor.want_reload)
    try:
        started = await start
    except BaseException as error:
        await supervisor.stop_started()
        if stop.is_set():
            return
        raise (ConfigError(str(error)) if isinstance(error, StartError) else error) from None
    work = (supervisor.keep_certificates(), supervisor.keep_reloading(), supervisor.keep_watch(), _feed_watchdog(), _reap_orphans())
    keepers = [loop.create_task(coroutine) for coroutine in work]
    announce(started)
    notify.tell("READY=1", "STATUS=serving")
    await stop.wait()
    for keeper in keepers:
        keeper.cancel()
    await asyncio.gather(*keepers, return_exceptions=True)
    await supervisor.stop()
