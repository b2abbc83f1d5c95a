"""QEMU behind vmm.driver.Driver: images in, clones out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from gateway import executors
from gateway.config import Devices

from .. import disks, generators, jail, kernel, manifest, memory, processor, sparse, syscalls
from ..cgroups import Cgroups
from ..driver import DEVICES, UNSAVED, Machine, Process, Sealed, Shape
from ..errors import Missing, Refused, Unavailable, VmmError, explained, not_loaded, not_written
from ..manifest import Manifest
from ..mapping import Mapper
from ..network import Link, Network
from ..provenance import Provenance
from ..sandboxes import STDERR, SandboxAllocator, VmSandbox, is_alive, last_words
from ..snapshots import sync
from . import device_state
from . import machine as topology
from .boot_snapshots import MEMORY, BootSnapshotCache
from .process import QemuMachine, child_of, listen
from .qmp import QmpError
from .roots import Root, Roots, why_refused

log = structlog.get_logger()

NAME = "qemu"
_SPAWN_SECONDS = 20
_FAILURES = (TimeoutError, QmpError, VmmError, OSError, LookupError)  # of a start


@dataclass(frozen=True)
class Assets:
    """What was made once per host: jails' roots, the guest's kernel, init and initramfs."""

    cache: Path

    @property
    def kernel(self) -> Path:
        return self.cache / "kernel/vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.cache / "initrd"


class _Shared(NamedTuple):
    """What all clones of an image have open."""

    memory: int
    holes: list[tuple[int, int]]  # of the memory (vmm/sparse.py)
    disk: int  # a copy of the empty overlay, which nobody can write: it stands in for a session's


class QemuDriver:
    """Implements vmm.driver.Driver."""

    name = NAME
    disk_template = "overlay.qcow2"
    takes_taps = True

    def __init__(
        self, assets: Assets, boots: Path, sandboxes: SandboxAllocator, cgroups: Cgroups, network: Network, devices: Devices | None = None
    ) -> None:  # fmt: skip
        """`boots`: where boots are kept."""
        self._disk_limits = topology.disk_limits(devices or Devices())
        roots = Roots(assets.cache)
        self._assets = assets
        self._sandboxes = sandboxes
        self._cgroups = cgroups
        self._network = network
        # Of this daemon's start, when its need was written down (roots.collect): another instance's start may change the cache's.
        self._root = roots.current()
        self._roots = roots
        self._boots = BootSnapshotCache(boots, self._root.name, assets.kernel, assets.initrd)
        self._processors: dict[tuple[str, str, str], list[str]] = {}  # words of CPUID by root, accelerator and model
        self._shared: dict[str, asyncio.Task[_Shared]] = {}
        self._machines: set[QemuMachine] = set()

    async def standby(self, image: Path, link: Link | None = None) -> QemuMachine:
        known = manifest.read(image, NAME)
        shape, root = known.shape, self._root_of(known.made, f"image {image.name}")
        made = msgspec.structs.replace(
            known.made,
            version=root.version,
            machine=known.made.machine or root.machine,
            root=root.name,
            features=[],
            processor=topology.processor(shape.accelerator, known.made.processor),
        )
        shared = await self._share(image)
        placeholders = topology.PlaceholderDevices(shared.disk, await self._network.placeholder_tap())
        with contextlib.ExitStack() as files:
            base = files.enter_context((image / "disk.raw").open("rb")).fileno()
            boot = files.enter_context((image / "boot.qcow2").open("rb")).fileno()
            machine = await self._spawn(
                image.name, shape, root.path, made,
                lambda ends: topology.standby(
                    shape, made.processor, made.machine, shared.memory, base, boot, placeholders, ends, self._disk_limits
                ),
            )  # fmt: skip
        machine.record.image_memory = memory.identity(shared.memory)
        try:
            await self._compare_processor(machine, shape, known.made, f"image {image.name}")
            await executors.LATENCY.run(machine.clear, shared.holes)
            await machine.await_session(placeholders)
        except (QmpError, OSError, VmmError) as error:
            why = await machine.why(error)
            await machine.kill()
            text = f"the hypervisor of image {image.name} does not wait: {why}"
            raise (explained(error, text) if isinstance(error, Refused | OSError) else Unavailable(text)) from error
        except BaseException:
            await asyncio.shield(machine.kill())
            raise
        return machine

    async def boot(self, image: Path, shape: Shape, link: Link, console: int) -> QemuMachine:
        await disks.create_overlay(image / "boot.qcow2", shape.disk_bytes)
        kept = await executors.LATENCY.run(self._boots.find, shape)
        descriptor = memory.new_memory(image.name, shape.memory_mib << 20)
        tap = -1
        try:
            tap = await self._network.tap(link)
            with contextlib.ExitStack() as files:
                assets = (self._assets.kernel, self._assets.initrd)
                kernel_file, initrd = (files.enter_context(path.open("rb")).fileno() for path in assets)
                programs = (kernel_file, initrd) if kept is None else None
                machine = await self._spawn(
                    image.name, shape, self._root.path, await executors.LATENCY.run(self._makes, shape),
                    lambda ends: topology.boot(shape, self._root.machine, descriptor, programs, tap, ends, console),
                )  # fmt: skip
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            if tap >= 0:
                os.close(tap)
        machine.record.link, machine.record.image_memory = link.name, memory.identity(descriptor)
        machine.image_memory = descriptor
        if kept is not None:
            await self._restore(machine, kept, descriptor)
        try:
            machine.record.phase = "running"
            machine.save_record()
        except OSError as error:
            await machine.kill()
            raise explained(error, f"image {image.name} did not boot: {error}") from error
        return machine

    async def _restore(self, machine: QemuMachine, kept: Path, descriptor: int) -> None:
        """From a boot that was kept. One whose guest is not heard of until it is given its disk is not used again."""
        machine.restored_from = kept
        try:
            await memory.fill_apart(kept / MEMORY, descriptor, self._cgroups.joins(machine.record.vm))
            await machine.load_devices(kept / DEVICES)
            await machine.unpause()
        except (QmpError, OSError) as error:
            why = await machine.why(error)
            await machine.kill()
            raise explained(error, f"image {machine.record.image} did not boot: {why}") from error
        except BaseException:
            await asyncio.shield(machine.kill())
            raise

    async def give_disk(self, machine: Machine, image: Path) -> None:
        assert isinstance(machine, QemuMachine)
        shape = machine.record.shape
        try:
            if shape is not None and machine.image_memory is not None and await executors.LATENCY.run(self._boots.find, shape) is None:
                await self._keep(machine, shape, machine.image_memory)
            await machine.give_disk(image / "disk.raw", image / "boot.qcow2")
            machine.restored_from = None
        except (QmpError, OSError) as error:
            raise explained(error, f"image {image.name} could not be given its disk: {error}") from error

    async def _keep(self, machine: QemuMachine, shape: Shape, descriptor: int) -> None:
        """A boot that cannot be kept is no reason to fail: the next one is made anew."""
        try:
            work = self._boots.begin()
            try:
                await machine.save_devices(work / DEVICES)
                await executors.BULK.run(self._boots.keep, work, shape, descriptor)
            finally:
                self._boots.drop(work)  # where it has not become one
        except OSError as error:
            log.warning("boot.not_kept", error=str(error))
        await machine.unpause()

    async def seal(self, machine: Machine, image: Path, account: str = "") -> Sealed:
        assert isinstance(machine, QemuMachine)
        shape = machine.record.shape
        try:
            if machine.image_memory is None:  # booted by an earlier daemon
                machine.image_memory = memory.adopt_image_memory(machine.record.pid, machine.record.image_memory, False)
            if shape is None or machine.image_memory is None:
                raise Missing(f"image {image.name} was not booted by this service")
            made = msgspec.structs.replace(machine.record.made or Provenance(), features=await machine.processor())
            await machine.save_devices(image / DEVICES)
            stored = await executors.BULK.run(memory.store_memory, machine.image_memory, image / MEMORY)
            synced = executors.LATENCY.run(sync, [image / DEVICES, image / MEMORY])
            seeded, _ = await asyncio.gather(executors.BULK.run(generators.make_due, image / MEMORY), synced)
            await disks.create_overlay(image / self.disk_template, shape.disk_bytes)
        except (QmpError, OSError) as error:
            raise not_written(error, f"image {image.name}", f"image {image.name} could not be stored") from error
        finally:
            await machine.kill()
        await executors.LATENCY.run(sync, [image / name for name in (MEMORY, "disk.raw", "boot.qcow2", self.disk_template)])
        sums = await executors.LATENCY.run(manifest.sums, image)
        whole = Manifest(shape, stored, disks.stored_bytes(image / "boot.qcow2"), NAME, made, account=account, files=sums)
        await executors.LATENCY.run(manifest.write, image, whole)
        code_bytes = int((image / "code_bytes").read_text(encoding="ascii"))
        return Sealed(stored, disks.stored_bytes(image / "disk.raw"), code_bytes, seeded)

    async def adopt(self, record: Process) -> QemuMachine | None:
        sandbox = self._sandboxes.of(record)
        if not is_alive(record):
            await self._sandboxes.release(sandbox)
            return None
        state = memory.write_only(device_state.FILE)
        try:
            machine = QemuMachine(record, sandbox.directory, self._network, lambda: self._remove(machine, sandbox), state)
        except ProcessLookupError:  # just now
            os.close(state)
            await self._sandboxes.release(sandbox)
            return None
        self._machines.add(machine)
        try:
            async with asyncio.timeout(_SPAWN_SECONDS):
                await machine.connect()
                await machine.state.give_file(machine.qmp)
        except (QmpError, OSError) as error:
            if record.phase not in UNSAVED:
                await machine.kill()
                return None
            log.warning("adopt.not_connected", session=record.session, vm=record.vm, error=str(error))
            machine.reconnect()
        return machine

    def records(self) -> list[Process]:
        return self._sandboxes.records()

    async def forget_image(self, image: str) -> None:
        """Lets go of what an image's clones share; those that still run keep theirs."""
        task = self._shared.pop(image, None)
        if task is not None:
            with contextlib.suppress(Exception):
                shared = await task
                os.close(shared.memory)
                os.close(shared.disk)
        self._cgroups.remove(f"image-{image}")

    def counts(self) -> Mapping[str, int]:
        """QEMU counts nothing by itself."""
        return {}

    async def _share(self, image: Path) -> _Shared:
        task = self._shared.get(image.name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(image))
            task.add_done_callback(lambda done: self._loaded(image.name, done))
            self._shared[image.name] = task
        try:
            return await asyncio.shield(task)
        except OSError as error:
            text = f"image {image.name} could not be loaded: {error}"
            raise not_loaded(error, text, image / MEMORY, image / self.disk_template) from error

    def _loaded(self, image: str, task: asyncio.Task[_Shared]) -> None:
        """What failed, whoever still waits for it, is loaded again by who asks next."""
        if (task.cancelled() or task.exception() is not None) and self._shared.get(image) is task:
            del self._shared[image]

    async def _load(self, image: Path) -> _Shared:
        disk = memory.sealed(f"torpor-disk-{image.name}", (image / self.disk_template).read_bytes())
        made = [disk]
        try:
            made.append(await self._load_memory(image))
            return _Shared(made[1], await executors.LATENCY.run(sparse.holes, made[1]), disk)
        except BaseException:
            for descriptor in made:
                os.close(descriptor)
            raise

    async def _load_memory(self, image: Path) -> int:
        for record in [machine.record for machine in self._machines if machine.record.image == image.name]:
            adopted = memory.adopt_image_memory(record.pid, record.image_memory, True)
            if adopted is not None:
                return adopted
        group = f"image-{image.name}"
        self._cgroups.create(group)
        return await memory.load_image_memory(
            image.name, image / "memory.raw", [image / "disk.raw", image / "boot.qcow2"], self._cgroups.joins(group)
        )

    def _makes(self, shape: Shape) -> Provenance:
        """Returns what an image that boots now is made by. Raises OSError."""
        root, (guest, agent, protocol) = self._root, kernel.guest(self._assets.cache)
        return Provenance(
            NAME, root.version, root.machine, root.name, topology.processor(shape.accelerator), model=_model(shape), kernel=guest,
            agent=agent, protocol=protocol,
        )  # fmt: skip

    def _root_of(self, made: Provenance, what: str) -> Root:
        """Raises Refused."""
        root = self._roots.of(made, self._root)
        if root is None:
            raise Refused(why_refused(what, made, self._roots.all()))
        return root

    async def _compare_processor(self, machine: QemuMachine, shape: Shape, made: Provenance, what: str) -> None:
        """Once for each root, accelerator and model: what a guest sees is the same then. Raises Refused, QmpError."""
        assert machine.record.made is not None
        kind = (machine.record.made.root, shape.accelerator, machine.record.made.processor)
        if kind not in self._processors:
            self._processors[kind] = await machine.processor()
        processor.check(what, made, _model(shape), self._processors[kind])

    async def _spawn(
        self, image: str, shape: Shape, root: Path, made: Provenance, compose: Callable[[topology.Ends], topology.Command]
    ) -> QemuMachine:  # fmt: skip
        """Raises Unavailable, which quotes a hypervisor that ended; whatever it raises, nothing of the try is left."""
        machine: QemuMachine | None = None  # which closes what it was given, and releases its sandbox, when its process ends
        process: asyncio.subprocess.Process | None = None
        sandbox: VmSandbox | None = None
        with contextlib.ExitStack() as ours:
            try:
                sandbox = self._sandboxes.allocate(shape)
                end, theirs = socket.socketpair()
                mapper = ours.enter_context(contextlib.closing(Mapper(end)))
                with theirs:
                    state = memory.write_only(device_state.FILE)
                    ours.callback(os.close, state)
                    async with asyncio.timeout(_SPAWN_SECONDS):
                        process = await self._execute(sandbox, shape, root, theirs.fileno(), state, compose)
                async with asyncio.timeout(_SPAWN_SECONDS):
                    machine = await self._found(process, sandbox, image, shape, made, state, mapper)
                    ours.pop_all()
                    machine.save_record()
                    await machine.connect()
                    if walls := jail.missing(machine.record.pid, sandbox.uid):
                        raise Unavailable(f"its jail is not whole (not confirmed: {walls}): run `torpor assets`")
                    machine.mapping()
                    machine.save_record()
            except BaseException as error:
                why = await asyncio.shield(self._undo(error, machine, process, sandbox))
                if isinstance(error, _FAILURES):
                    text = f"the hypervisor of image {image} did not start: {why or f'not within {_SPAWN_SECONDS} s'}"
                    raise explained(error, text) from error
                raise
        return machine

    async def _found(
        self,
        process: asyncio.subprocess.Process,
        sandbox: VmSandbox,
        image: str,
        shape: Shape,
        made: Provenance,
        state: int,
        mapper: Mapper,
    ) -> QemuMachine:
        """The hypervisor is the child of what was started. Raises Unavailable, OSError."""
        while (pid := child_of(process.pid)) is None:
            if process.returncode is not None:
                raise Unavailable(f"it ended with code {process.returncode}")
            await asyncio.sleep(0.0005)
        record = Process(sandbox.vm, pid, syscalls.start_time(pid) or 0, image, sandbox.uid, shape=shape, made=made)
        machine = QemuMachine(record, sandbox.directory, self._network, lambda: self._remove(machine, sandbox), state, mapper)
        self._machines.add(machine)
        return machine

    async def _undo(
        self, error: BaseException, machine: QemuMachine | None, process: asyncio.subprocess.Process | None, sandbox: VmSandbox | None
    ) -> str:
        """Ends what a failed start has left; returns why it failed."""
        if machine is not None:
            why = await machine.why(error) if isinstance(error, _FAILURES) else ""
            try:
                await machine.kill()
            except TimeoutError:
                log.error("hypervisor.not_ended", vm=machine.record.vm)
            return why
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # and with it, by --kill-child, what runs inside
        why = (last_words(sandbox.directory) if sandbox is not None else "") or str(error)
        if sandbox is not None:
            await self._remove(None, sandbox)
        return why

    async def _execute(
        self, sandbox: VmSandbox, shape: Shape, root: Path, mapper: int, state: int, compose: Callable[[topology.Ends], topology.Command]
    ) -> asyncio.subprocess.Process:
        """Raises OSError."""
        with contextlib.ExitStack() as ends:
            qmp, agent = (ends.enter_context(listen(sandbox.directory / name)).fileno() for name in ("qmp.sock", "agent.sock"))
            stderr = ends.enter_context((sandbox.directory / STDERR).open("ab"))
            command = compose(topology.Ends(qmp, agent, state))
            has_kvm = shape.accelerator == "kvm"
            return await asyncio.create_subprocess_exec(
                *jail.command(root, self._cgroups.enter(sandbox.vm), sandbox.uid, has_kvm, command.arguments),
                pass_fds=[*command.descriptors, mapper], start_new_session=True, env={"PATH": jail.PATH, "TORPOR_MAPPER": str(mapper)},
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip

    async def _remove(self, machine: QemuMachine | None, sandbox: VmSandbox) -> None:
        if machine is not None:
            self._machines.discard(machine)
            if machine.restored_from is not None:
                await executors.UPKEEP.run(self._boots.drop, machine.restored_from)
        await self._sandboxes.release(sandbox)


def _model(shape: Shape) -> str:
    """Of the processor that a guest sees, where that is the host's."""
    return processor.model() if shape.accelerator == "kvm" else ""
