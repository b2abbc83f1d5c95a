"""`torpor serve`: starts edge, control, vmm and the object store, each as the user it should be, and keeps them running.

It opens the listeners and keeps them: a worker inherits its slot's sockets, and its successor the same ones before the old
worker stops accepting. A supervisor that starts over living processes takes their sockets from them and replaces them one
by one; microVMs go on all the while.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from vmm import host

from . import instance, listeners
from .config import ConfigError, Settings
from .process import READY_VARIABLE, SETTINGS_VARIABLE, SOCKETS_VARIABLE

log = structlog.get_logger()

_READY_SECONDS = 60.0
_STOP_SECONDS = 90.0
_CERTIFICATES_SECONDS = 30.0
_BACKOFF_FIRST, _BACKOFF_MOST = 0.05, 1.0  # longer would keep held requests past their deadline
_CODE = Path(__file__).resolve().parents[1]


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: list[str]
    uid: int
    sockets: dict[str, list[socket.socket]] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    stopping: bool = False
    backoff: float = _BACKOFF_FIRST
    started: float = 0.0


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = settings.runtime / "supervisor.json"
        self._children: list[Child] = []
        self._watchers: set[asyncio.Task[None]] = set()
        self._bound = self._code_mount()
        self._lock = -1

    # ---- start ----

    async def start(self) -> Settings:
        """Everything up and serving; returns the settings with the ports that were chosen. Raises ConfigError."""
        self._take_lock()
        host.become_subreaper()
        old = self._living()
        sockets = self._adopt_sockets(old)
        port = listeners.choose_edge_port(self._settings, in_use=bool(sockets.get("edge")))
        self._settings = self._settings.model_copy(update={"edge": self._settings.edge.model_copy(update={"port": port})})
        instance.prepare(self._settings)
        self._make_children(sockets)
        edges = [child for child in self._children if child.name.startswith("edge")]
        for child in self._children:
            if child not in edges:
                await self._stop_old(old, child.name)
                await self._launch(child)
        await asyncio.gather(*(self._launch(child) for child in edges))
        for name in [name for name in old if name.startswith("edge")]:
            await self._stop_old(old, name, wait=False)
        return self._settings

    def _take_lock(self) -> None:
        for path in (self._settings.root, self._settings.runtime):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._settings.runtime / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"instance {self._settings.name} is already served by another process") from error
        os.truncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())  # for `torpor reload`

    def _living(self) -> dict[str, dict[str, object]]:
        """Processes of an earlier supervisor that still run, by name."""
        try:
            recorded = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {
            name: entry
            for name, entry in recorded.items()
            if entry["started"] is not None and host.start_time(entry["pid"]) == entry["started"]
        }

    def _adopt_sockets(self, old: dict[str, dict[str, object]]) -> dict[str, list[list[socket.socket]]]:
        """Listening sockets of living processes: closing the last holder of one would reset what is queued in it."""
        found: dict[str, list[list[socket.socket]]] = {}
        for entry in old.values():
            for purpose, numbers in dict(entry["sockets"]).items():  # type: ignore[call-overload]
                with contextlib.suppress(OSError):
                    taken = [socket.socket(fileno=host.pidfd_getfd(int(str(entry["pid"])), number)) for number in numbers]
                    found.setdefault(purpose, []).append(taken)
        return found

    def _make_children(self, sockets: dict[str, list[list[socket.socket]]]) -> None:
        settings, users = self._settings, self._settings.users
        python = [self._python(), "-m"]

        def one(purpose: str, address: str, port: int) -> list[socket.socket]:
            adopted = sockets.get(purpose)
            return adopted.pop() if adopted else [listeners.listen(address, port, purpose)]

        if settings.object_store.embedded and not settings.object_store.endpoint:
            store = one("store", "127.0.0.1", settings.object_store.port)
            self._children.append(Child("store", [*python, "gateway.objectstore"], users.store, {"store": store}))
        self._children.append(Child("vmm", [*python, "vmm"], 0))
        control = {
            "api": one("api", settings.api.address, settings.api.port),
            "metrics": one("metrics", settings.api.address, settings.api.metrics_port),
        }
        self._children.append(Child("control", [*python, "gateway.control"], users.control, control))
        shared: list[socket.socket] = []  # sockets of which there is only one, whatever the number of workers
        for slot in range(settings.edge.worker_count):
            mine = {"edge": self._slot("edge", sockets, shared)}
            if settings.edge.redirect_port:
                mine["redirect"] = self._slot("redirect", sockets, shared)
            self._children.append(Child(f"edge-{slot}", [*python, "gateway.edge", str(slot)], users.edge, mine))

    def _slot(self, purpose: str, sockets: dict[str, list[list[socket.socket]]], shared: list[socket.socket]) -> list[socket.socket]:
        """One worker's listeners: adopted from an earlier supervisor, or new."""
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
        to a place that they can, in their own mount namespace."""
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

    async def _launch(self, child: Child) -> None:
        """Starts a process and waits for its word. Raises ConfigError when it does not come at the first start."""
        ready_out, ready_in = os.pipe()
        numbers = {purpose: [sock.fileno() for sock in socks] for purpose, socks in child.sockets.items()}
        environment = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "TZ", "SSL_CERT_FILE")}
        environment |= {
            SETTINGS_VARIABLE: self._settings.model_dump_json(), SOCKETS_VARIABLE: json.dumps(numbers),
            READY_VARIABLE: str(ready_in), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent",
        }  # fmt: skip
        command = list(child.command)
        if self._bound and not child.uid:
            command[0] = str(Path(sys.prefix) / "bin/python")
        child.started = time.monotonic()
        child.process = await asyncio.create_subprocess_exec(
            *self._prefix(child), *command, env=environment, cwd=_CODE, start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[ready_in, *(number for group in numbers.values() for number in group)],
        )  # fmt: skip
        os.close(ready_in)
        try:
            seconds = _READY_SECONDS + 2 * self._settings.probe_seconds  # vmm may have to probe both hypervisors
            word = await asyncio.wait_for(asyncio.to_thread(os.read, ready_out, 1), seconds)
        except TimeoutError:
            word = b""
        finally:
            os.close(ready_out)
        self._save_state()
        self._watch(child)
        if not word and not child.backoff > _BACKOFF_FIRST:
            child.stopping = True
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
            raise ConfigError(f"{child.name} did not start: its words are above")

    def _watch(self, child: Child) -> None:
        task = asyncio.get_running_loop().create_task(self._until_end(child, child.process))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _until_end(self, child: Child, process: asyncio.subprocess.Process | None) -> None:
        assert process is not None
        code = await process.wait()
        if child.stopping or child.process is not process:
            return
        log.warning("process.ended", name=child.name, code=code)
        if time.monotonic() - child.started > 10:
            child.backoff = _BACKOFF_FIRST
        child.backoff = min(child.backoff * 2, _BACKOFF_MOST)
        await asyncio.sleep(child.backoff)
        if not child.stopping:
            await self._launch(child)

    def _save_state(self) -> None:
        state = {
            child.name: {
                "pid": child.process.pid, "started": host.start_time(child.process.pid),
                "sockets": {purpose: [sock.fileno() for sock in socks] for purpose, socks in child.sockets.items()},
            }
            for child in self._children if child.process is not None
        }  # fmt: skip
        temporary = self._state.with_suffix(".new")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.rename(self._state)

    async def _stop_old(self, old: dict[str, dict[str, object]], name: str, wait: bool = True) -> None:
        entry = old.pop(name, None)
        if entry is None:
            return
        pid = int(str(entry["pid"]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while wait and host.start_time(pid) == entry["started"]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    # ---- reload and stop ----

    async def reload(self) -> None:
        """Replaces the edge workers one by one; no request is refused or cut."""
        await asyncio.to_thread(instance.update_certificates, self._settings)
        for child in [one for one in self._children if one.name.startswith("edge")]:
            old = child.process
            await self._launch(child)
            if old is not None:
                with contextlib.suppress(ProcessLookupError):
                    old.terminate()
        log.info("reloaded")

    async def keep_certificates(self) -> None:
        """Workers load their files again when they change: ours keep up with the ones that the settings name, and the session
        tickets' key is another one every so often."""
        while True:
            await asyncio.sleep(_CERTIFICATES_SECONDS)
            try:
                await asyncio.to_thread(instance.update_certificates, self._settings)
            except (ConfigError, OSError, ValueError) as error:
                log.error("tls.not_updated", error=str(error))

    async def stop(self) -> None:
        """Running sessions are suspended first; nothing stays behind but files in the instance's root."""
        by_name = {child.name: child for child in self._children}
        for child in self._children:
            child.stopping = True
        await self._end([by_name["control"]], signal.SIGUSR1)
        edges = [child for child in self._children if child.name.startswith("edge")]
        await self._end(edges, signal.SIGTERM)
        await self._end([child for name, child in by_name.items() if name in ("vmm", "store")], signal.SIGTERM)
        await asyncio.to_thread(self._clear_runtime)

    async def stop_started(self) -> None:
        """After a start that failed: what was started ends."""
        for child in self._children:
            child.stopping = True
        await self._end(list(reversed(self._children)), signal.SIGTERM)

    async def _end(self, children: list[Child], how: signal.Signals) -> None:
        for child in children:
            if child.process is not None and child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(how)
        for child in children:
            if child.process is None:
                continue
            try:
                await asyncio.wait_for(child.process.wait(), _STOP_SECONDS)
            except TimeoutError:
                log.warning("process.killed", name=child.name)
                child.process.kill()
                await child.process.wait()

    def _clear_runtime(self) -> None:
        """Sockets and empty directories go. A microVM that could not be suspended keeps its place, and runs on."""
        from vmm.cgroups import Cgroups

        runtime = self._settings.runtime
        if any((runtime / "vms").glob("*")):
            log.warning("stop.microvms_left", where=str(runtime / "vms"))
            return
        for name in ("control.sock", "vmm.sock", "supervisor.json", "lock"):
            (runtime / name).unlink(missing_ok=True)
        for name in ("vms", "netns", "build-netns", "code", ""):
            with contextlib.suppress(OSError):
                (runtime / name).rmdir()
        with contextlib.suppress(OSError):
            self._settings.run.rmdir()
        Cgroups(self._settings.name, self._settings.root).close()


async def serve(settings: Settings, announce: Callable[[Settings], None]) -> None:
    """Until SIGTERM or SIGINT; SIGHUP replaces the edge workers."""
    supervisor = Supervisor(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        started = await supervisor.start()
    except BaseException:
        await supervisor.stop_started()
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(supervisor.reload()))
    keeper = loop.create_task(supervisor.keep_certificates())
    announce(started)
    await stop.wait()
    keeper.cancel()
    await supervisor.stop()
