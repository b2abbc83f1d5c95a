"""A whole host in one process and one event loop: control and vmm with their real code, store and files, and simulated hypervisors.

Each of the two processes can be killed at any call that it makes, and started again on what it left.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import shutil
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import seam as seams
import simulation
import structlog
from seam import CONTROL, VMM, Seam, process
from world import World

import vmm.builds
import vmm.daemon
import vmm.drivers
from gateway import control as control_module
from gateway import messages as m
from gateway.accounts.model import Caller
from gateway.accounts.policy import Policy
from gateway.api.images import Images
from gateway.config import Settings
from gateway.images import artifact, pipeline
from gateway.images.readiness import Readiness
from gateway.rpc import Connection, Server
from gateway.sessions.model import IdlePolicy, Image, Session, Version
from gateway.sessions.states import Event, State
from gateway.sessions.store import Store, StoreError
from vmm.driver import Process
from vmm.serving import service

IMAGE = "image-1"
ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
_INFO = m.HostInfo("tcg", "", "qemu", 4096, 2, "x86_64")
_BOUND_SECONDS = 3600.0  # of the loop's clock: whatever hangs longer hangs
_CALLER = Caller("123456789012", "arn:aws:iam::123456789012:root", "Root", "AKIASIMULATION", Policy())
_UNDER_WAY = ("PENDING", "IN_PROGRESS", "CREATING", "UPDATING", "DELETING")
AT_REST = (State.RUNNING, State.SUSPENDED, State.TERMINATED)


class Hung(AssertionError):
    """Something has not come to an end."""


class HostUnderTest:
    def __init__(self, directory: Path, seam: Seam, **settings: Any) -> None:
        self.directory = directory
        self.seam = seam
        self.world = World()
        self.settings = Settings(
            root=directory / "root", run=directory / "run", name="sim", account="123456789012",
            standbys=_standbys(settings.pop("warm", 0), settings.pop("warm_seconds", 300.0)), edge={"workers": 1},
            images={"settle_seconds": 0.5, "store_mib": 0}, **settings,
        )  # fmt: skip
        self.vmm: vmm.daemon.Vmm | None = None
        self.control: control_module.Control | None = None
        self._server: Server | None = None
        self._owned: weakref.WeakKeyDictionary[asyncio.Task[Any], str] = weakref.WeakKeyDictionary()
        self._connections: weakref.WeakKeyDictionary[Connection, str] = weakref.WeakKeyDictionary()
        self._patch = pytest.MonkeyPatch()
        self._watch: asyncio.Task[None] | None = None
        self.deaths = 0
        self.wall = time.time()
        seam.crash = self._crash
        self._prepare()

    def _prepare(self) -> None:
        settings = self.settings
        for path in (settings.images_dir, settings.sessions_dir, settings.control_dir, settings.runtime, settings.runtime / "vms"):
            path.mkdir(parents=True, exist_ok=True)
        (settings.control_dir / "access-keys.json").write_text(json.dumps({"AKIASIMULATION": "secret"}))
        simulation.make_image(settings.images_dir / IMAGE)
        network = lambda directory, *_: simulation.Network(self.world, directory, self.seam)  # noqa: E731
        self._patch.setattr(vmm.daemon, "Network", network)
        self._patch.setattr(vmm.daemon, "Builder", simulation.Builder)
        self._patch.setattr(vmm.builds, "make_namespace", lambda path, setup: path.touch())
        self._patch.setattr(vmm.builds, "destroy_namespace", lambda path: path.unlink(missing_ok=True))
        self._patch.setattr(vmm.builds.build_mirrors, "prepare", lambda directory: directory.mkdir(exist_ok=True))
        self._patch.setattr(vmm.builds.build_mirrors, "mirror_hosts", lambda directory: [])
        self._patch.setattr(asyncio, "create_subprocess_exec", simulation.starter(self.seam))
        self._patch.setattr(pipeline, "Readiness", lambda *given: Readiness(*given, clock=asyncio.get_running_loop().time))
        self._patch.setattr(artifact, "_client", lambda *_: simulation.ObjectStore(self.world, self.seam))
        driver = lambda settings, *_: simulation.Driver(self.world, settings.runtime / "vms", self.seam)  # noqa: E731
        self._patch.setattr(vmm.drivers, "choose", driver)
        self._patch.setattr(control_module, "default_store", lambda *_: simulation.ObjectStore(self.world, self.seam))
        made = Connection.__init__
        connections = self._connections

        def connected(connection: Connection, *arguments: Any, **named: Any) -> None:
            made(connection, *arguments, **named)
            connections[connection] = process.get()

        self._patch.setattr(Connection, "__init__", connected)

    def _crash(self) -> None:
        for record in (self.settings.runtime / "vms").glob("*/process.json"):
            known = msgspec.json.decode(record.read_bytes(), type=Process)
            if self.world.hypervisors[known.vm].is_unsaved:
                self.world.unsaved.add(known.session)
        self.world.end()

    # ---- processes ----

    async def start(self) -> None:
        store = Store(self.settings.control_dir / "torpor.db")
        await store.open()
        version = Version(ARN, "1.0", {}, self.wall, self.wall, "SUCCESSFUL", key=IMAGE, shape=simulation.SHAPE)
        store.put_image(Image("i-1", ARN, "a", self.wall, self.wall, "CREATED", versions=[version], last_number=1))
        await store.commit()
        await store.close()
        asyncio.get_running_loop().set_task_factory(self._task)
        self._watch = asyncio.get_running_loop().create_task(self._undertaker())
        await self.start_vmm()
        await self.start_control()

    def _task(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **named: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **named)
        self._owned[task] = process.get()
        return task

    async def _as(self, owner: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs work as a process: what it starts, and what that starts, is that process's."""
        context = contextvars.copy_context()
        context.run(process.set, owner)
        task = context.run(asyncio.get_running_loop().create_task, work())  # type: ignore[arg-type]
        await asyncio.wait([task])
        if task.cancelled() or task.exception() is not None:  # it did not start: it is tried again, as the supervisor does
            if not self.seam.is_armed and not self.seam.weather:
                task.result()
            self.seam.kill(owner)

    async def start_vmm(self) -> None:
        async def start() -> None:
            one = vmm.daemon.Vmm(self.settings, _INFO, simulation.Cgroups())  # type: ignore[arg-type]
            await one.start()
            self._server = Server(self.settings.vmm_socket, service(one.calls), {0})
            self._server.on_connect = one._controls.add  # whose user here is everybody's
            self.vmm = one

        await self._as(VMM, start)

    async def start_control(self) -> None:
        async def start() -> None:
            one = control_module.Control(self.settings)
            self.control = one
            await one.recover()

        await self._as(CONTROL, start)

    async def _undertaker(self) -> None:
        """Buries who was killed, and starts the successor, as the supervisor does."""
        while True:
            await self.seam.died.wait()
            self.seam.died.clear()
            for owner in sorted(self.seam.dead):
                await self.bury(owner)
                self.deaths += 1
                await asyncio.sleep(1.0)
                self.seam.dead.discard(owner)
                await (self.start_vmm if owner == VMM else self.start_control)()

    async def bury(self, owner: str) -> None:
        for connection, whose in list(self._connections.items()):
            if whose == owner:
                connection.close()
        if owner == VMM:
            server, self._server = self._server, None
            if server is not None:
                server.close()
        while mine := [task for task, whose in list(self._owned.items()) if whose == owner and not task.done()]:
            for task in mine:
                task.cancel()
            await asyncio.wait(mine, timeout=1)
        if owner == CONTROL and self.control is not None:
            one, self.control = self.control, None
            one.lifecycle.channels.close_all()
            one.audit.close()
            await abandon(one.store)
        if owner == VMM:
            self.vmm = None

    async def stop(self) -> None:
        assert self._watch is not None
        self._watch.cancel()
        for owner in (CONTROL, VMM):
            self.seam.dead.add(owner)
            await self.bury(owner)
        self.world.end()
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().set_task_factory(None)
        self._patch.undo()

    # ---- what users do ----

    def as_control(self, work: Callable[[control_module.Control], Any]) -> None:
        """Calls control's code as control; what it raises is its own affair, as a failed call of the API is."""
        one = self.control
        if one is None:
            return
        context = contextvars.copy_context()
        context.run(process.set, CONTROL)
        context.run(asyncio.get_running_loop().create_task, quietly(work, one))  # type: ignore[arg-type]

    def launch(self, name: str, arn: str = ARN, number: str = "1.0", key: str = IMAGE) -> None:
        async def go(one: control_module.Control) -> None:
            session = Session(name, f"h{name}", arn, number, key, 512, self.wall, 28_800)
            session.idle_policy = IdlePolicy(900, 28_000, True)
            one.store.put_session(session)
            one.store.add_event(session.id, "run", "", session.state.value)
            try:
                await one.store.commit()
            except StoreError:
                one.lifecycle.discard(session)
                raise
            one.lifecycle.launch(session)

        self.as_control(go)

    def fire(self, name: str, event: Event, reason: str = "") -> None:
        self.as_control(lambda one: one.lifecycle.fire(one.store.sessions[name], event, reason))

    def request(self, name: str) -> None:
        self.as_control(lambda one: one.lifecycle.request(one.store.sessions[name]))

    def call(self, operation: str, **arguments: Any) -> None:
        """A call of the API about the image that is built here."""

        async def go(one: control_module.Control) -> None:
            service = one.api()
            if operation in ("create_microvm_image", "update_microvm_image"):
                arguments.update(
                    baseImageArn=service.managed_base, buildRoleArn="arn:aws:iam::123456789012:role/build",
                    codeArtifact={"uri": "s3://artifacts/app.zip"}, resources=[{"minimumMemoryInMiB": 512}],
                )  # fmt: skip
            await getattr(Images(service, _INFO.architecture), operation)(_CALLER, arguments)

        self.as_control(go)

    def image(self, arn: str) -> Image | None:
        return None if self.control is None else self.control.store.images.get(arn)

    def session(self, name: str) -> Session | None:
        return None if self.control is None else self.control.store.sessions.get(name)

    async def settled(self, names: list[str], seconds: float = _BOUND_SECONDS) -> None:
        """Returns when all are at rest and both processes are there. Raises Hung."""
        until, sessions, images = asyncio.get_running_loop().time() + seconds, [], []
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
            if self.seam.dead or self.control is None or self.vmm is None:
                continue
            sessions = [self.control.store.sessions.get(name) for name in names]
            images = list(self.control.store.images.values())
            busy = [one.arn for one in images if {one.state, *(version.state for version in one.versions)} & {*_UNDER_WAY}]
            if not busy and not self.control.registry._tasks and all(one is None or one.state in AT_REST for one in sessions):
                return
        known = [(one.id, one.state, one.reason) for one in sessions if one is not None]
        raise Hung(f"after {seconds:g} s: {known}, {[(one.arn, one.state, one.versions) for one in images]}")

    async def reach(self, name: str, *states: State, seconds: float = _BOUND_SECONDS) -> Session:
        """Raises Hung."""
        await self.settled([name], seconds)
        one = self.session(name)
        if one is None or one.state not in states:
            raise Hung(f"{name} is not {'/'.join(states)}: {None if one is None else (one.state, one.reason)}")
        return one

    def guest(self, name: str) -> Any:
        """The hypervisor that runs a session."""
        assert self.vmm is not None
        entry = entry_of(self.vmm, name)
        return self.world.hypervisors[entry.machine.record.vm]

    def files(self) -> dict[str, list[str]]:
        """What there is by folder, but for the instance's own."""
        settings = self.settings
        places = [settings.root / name for name in ("sessions", "quarantine", "images", "builds/work", "control/builds")]
        return {
            str(place): sorted(path.name for path in place.iterdir() if path.name not in ("instance-id", IMAGE)) if place.exists() else []
            for place in (*places, settings.runtime / "build-netns")
        }


def _standbys(warm: int, warm_seconds: float) -> dict[str, Any]:
    return {"per_image": 1, "most_per_image": 1, "links": 0, "warm": warm, "ahead": 0, "warm_seconds": warm_seconds}


def entry_of(one: vmm.daemon.Vmm, name: str) -> Any:
    vms = getattr(one, "vms", None)
    entry = vms.get(name) if vms is not None else one._sessions.get(name)  # type: ignore[attr-defined]
    assert entry is not None, f"{name} has no hypervisor"
    return entry


async def quietly(work: Callable[[Any], Any], one: Any) -> None:
    with contextlib.suppress(Exception, seams.Killed):
        await work(one)


async def abandon(store: Any) -> None:
    """The store of a process that is gone: SQLite closes its file as the kernel would."""
    with contextlib.suppress(Exception):
        await store.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Thousands of faults are logged by nobody."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


@contextlib.asynccontextmanager
async def host(directory: Path, seam: Seam, **settings: Any) -> AsyncIterator[HostUnderTest]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    one = HostUnderTest(directory, seam, **settings)
    with seams.installed(seam), _silence():
        await one.start()
        try:
            yield one
        finally:
            seam.is_armed = False
            await one.stop()
