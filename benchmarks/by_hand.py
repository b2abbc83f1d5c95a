"""Firecracker by its API alone, on files of the driver's: what `curl` would do, with nothing around it but a root and a namespace."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.sessions.agent import wake_frame
from vmm import diffs, disks, memory, probe
from vmm.driver import DEVICES, VSOCK_PORT
from vmm.firecracker.jail import DISK, MEMORY, STATE, VSOCK
from vmm.firecracker.machine import NETWORK, tracking
from vmm.network import TAP, Link, Network

_NODES = (("dev/kvm", 10, 232), ("dev/net/tun", 10, 200), ("dev/urandom", 1, 9))
_START_SECONDS, _WOKEN_SECONDS, _TRY_SECONDS = 60.0, 60.0, 0.1


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


@dataclass
class Process:
    """One that has loaded nothing yet."""

    root: Path
    process: subprocess.Popen[bytes]

    def connect(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.api = _Connection(self.root / "api.sock")
            try:
                self.api.connect()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.0005)

    def call(self, method: str, path: str, **body: object) -> dict[str, object]:
        self.api.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = self.api.getresponse()
        said = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {said.decode()}")
        return dict(json.loads(said)) if said else {}

    def load(self, backend: str = "File", path: str = MEMORY) -> None:
        version = str(self.call("GET", "/")["vmm_version"])
        self.call(
            "PUT", "/snapshot/load", snapshot_path=f"/{STATE}", mem_backend={"backend_type": backend, "backend_path": f"/{path}"},
            network_overrides=[{"iface_id": NETWORK, "host_dev_name": TAP}], resume_vm=True, **tracking(version),
        )  # fmt: skip

    def wake(self) -> None:
        """Its vsock was reset by the load, and loses connections until the guest knows: so each try is short, on one of its own."""
        message, wait = wake_frame(secrets.randbits(63), reset_tcp=False, wall_ns=time.time_ns()), _TRY_SECONDS
        deadline = time.monotonic() + _WOKEN_SECONDS
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(wait)
                try:
                    sock.connect(str(self.root / VSOCK))
                    sock.sendall(f"CONNECT {VSOCK_PORT}\n".encode())
                    while (said := sock.recv(1)) != b"\n":
                        if not said:
                            raise ConnectionResetError
                    sock.sendall(message)
                    if sock.recv(1):
                        return
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    wait *= 2

    def end(self) -> None:
        self.api.close()
        self.process.kill()
        self.process.wait()


@dataclass
class ByHand:
    """`socket_of` and `first_byte` are the drivers' own."""

    directory: Path
    network: Network
    socket_of: Callable[[Link], Awaitable[socket.socket]]
    first_byte: Callable[[socket.socket], Awaitable[None]]
    seen: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir()

    def root(self, memory_file: Path, state: Path, disk: Path) -> Path:
        """What is made ahead: a root with the files under the names that the state remembers."""
        root = self.directory / secrets.token_hex(4)
        programs = probe.firecracker_programs()
        assert programs is not None
        (root / "dev/net").mkdir(parents=True)
        for name, major, minor in _NODES:
            os.mknod(root / name, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        shutil.copy(programs.firecracker, root / "firecracker")
        os.link(memory_file, root / MEMORY)
        os.link(state, root / STATE)
        disks.copy_overlay(disk, root / DISK)
        return root

    def start(self, root: Path, link: Link) -> Process:
        command = ["nsenter", f"--net={link.path}", "chroot", str(root), "/firecracker", "--api-sock", "/api.sock"]
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return Process(root, started)

    async def launch(self, image: Path, is_woken: bool) -> None:
        await self._run("launch", image / MEMORY, image / DEVICES, image / DISK, is_woken)

    async def resume(self, memory_file: Path, snapshot: Path, disk: Path, is_woken: bool) -> None:
        """From memory into which the sleeper's pages were written before."""
        await self._run("resume", memory_file, snapshot / DEVICES, disk, is_woken)

    async def _run(self, what: str, memory_file: Path, state: Path, disk: Path, is_woken: bool) -> None:
        root, link = self.root(memory_file, state, disk), await self.network.take()
        with await self.socket_of(link) as ready:
            name, started = f"{what}_woken" if is_woken else what, time.perf_counter()
            one = self.start(root, link)
            for step, work in (("process started", one.connect), ("loaded and let run", one.load), ("the guest answered", one.wake)):
                if step != "the guest answered" or is_woken:
                    await asyncio.to_thread(work)
                    self.record(f"{name}: until {step}", time.perf_counter() - started)
            await self.first_byte(ready)
            self.record(name, time.perf_counter() - started)
        if what == "launch" and is_woken:
            self.record("suspend", await asyncio.to_thread(self._suspend, one))
        await self.end(one, link)

    def record(self, what: str, seconds: float) -> None:
        self.seen.setdefault(what, []).append(seconds * 1000)

    def _suspend(self, one: Process) -> float:
        started = time.perf_counter()
        one.call("PATCH", "/vm", state="Paused")
        one.call("PUT", "/snapshot/create", snapshot_type="Diff", snapshot_path="/saved.state", mem_file_path="/saved.memory")
        for name in ("saved.state", "saved.memory", DISK):
            disks.sync_path(one.root / name)
        disks.sync_path(one.root)
        return time.perf_counter() - started

    async def end(self, one: Process, link: Link) -> None:
        one.end()
        await self.network.release(link)
        shutil.rmtree(one.root)


def merged(image: Path, snapshot: Path, target: Path) -> Path:
    """An image's memory with a sleeper's pages in their places, as Firecracker's snapshot-editor makes it."""
    target.unlink(missing_ok=True)
    disks.copy_overlay(image / MEMORY, target)
    chain = diffs.read_manifest(snapshot).chain
    with target.open("r+b") as file:
        for one in diffs.shown(snapshot, chain):
            with diffs.open_pages(snapshot, one.diff) as pages:
                size = memory.PAGE * (one.after - one.first)
                os.pwrite(file.fileno(), os.pread(pages.fileno(), size, memory.PAGE * one.at), memory.PAGE * one.first)
    return target
