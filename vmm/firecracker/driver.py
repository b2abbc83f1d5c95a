"""Firecracker behind vmm.driver.Driver, for hosts whose /dev/kvm works.

Written against Firecracker's published contract (its API description, docs/snapshotting, docs/jailer.md, docs/vsock.md), release
1.13 or later. An image is a raw disk, the guest's memory in a sparse file that its clones map, and the devices' state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from gateway import executors
from gateway.config import Devices

from .. import disks, generators, kernel, manifest, memory, processor, syscalls
from ..cgroups import Cgroups
from ..driver import DEVICES, GUEST_CID, UNSAVED, Machine, Process, Sealed, Shape
from ..errors import Missing, explained, not_loaded, not_written
from ..manifest import Manifest
from ..network import GUEST_MAC, TAP, Link, Network
from ..provenance import Provenance
from ..sandboxes import SandboxAllocator, VmSandbox, is_alive
from ..snapshots import sync
from . import limits
from .api import ApiError
from .jail import DISK, INITRD, KERNEL, KERNEL_LINE, MEMORY, VSOCK, Jail, Programs, remove_others
from .machine import DRIVE, NETWORK, FirecrackerMachine

log = structlog.get_logger()

NAME = "firecracker"


@dataclass(frozen=True)
class Assets:
    """What was made once per host, in its cache: the guest's kernel as an ELF file, and its initramfs with the modules for this machine."""

    cache: Path

    @property
    def kernel(self) -> Path:
        return self.cache / "vmlinux"

    @property
    def initrd(self) -> Path:
        return self.cache / "initrd-firecracker"


class FirecrackerDriver:
    """Implements vmm.driver.Driver. `jails` must be on the file system of images and sessions."""

    name = NAME
    disk_template = DISK
    takes_taps = False

    def __init__(
        self, programs: Programs, assets: Assets, jails: Path, sandboxes: SandboxAllocator, cgroups: Cgroups,
        devices: Devices | None = None, network: Network | None = None,
    ) -> None:  # fmt: skip
        """`network`: where standbys wait; without one they are started when their sessions come."""
        self._programs, self._assets, self._jails, self._sandboxes, self._cgroups = programs, assets, jails, sandboxes, cgroups
        self._devices = devices or Devices()
        self._network = network
        self._warmed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._lent: list[str] = []

    async def standby(self, image: Path, link: Link | None = None) -> FirecrackerMachine:
        known = manifest.read(image, NAME)
        try:
            await executors.LATENCY.run(self._check_processor, image.name, known)
        except OSError as error:
            raise explained(error, f"image {image.name} cannot be loaded: {processor.KVM}: {error}") from error
        if image.name not in self._warmed:
            self._warmed.add(image.name)
            await executors.LATENCY.run(_read_ahead, [image / MEMORY, image / DISK])
        machine = await self._machine(image, known.shape)
        machine.record.made = msgspec.structs.replace(known.made, features=[])
        try:
            machine.jail.give(image / MEMORY, MEMORY)
        except OSError as error:
            await machine.kill()
            raise not_loaded(error, f"image {image.name} could not be put into a jail: {error}", image / MEMORY) from error
        try:
            if link is None and self._network is not None:
                link = machine.own_link = await self._network.take()
            if link is not None:
                await machine.spawn(link)
        except BaseException:
            await asyncio.shield(machine.kill())
            raise
        return machine

    async def boot(self, image: Path, shape: Shape, link: Link, console: int) -> FirecrackerMachine:
        machine = await self._machine(image, shape)
        try:
            machine.record.made = await executors.LATENCY.run(self._makes, shape)
            for file, name in ((self._assets.kernel, KERNEL), (self._assets.initrd, INITRD)):
                machine.jail.give_copy(file, name)
            machine.jail.give(image / DISK, DISK, writable=True)
            await machine.spawn(link, console)
            await self._configure(machine, shape)
        except (ApiError, OSError) as error:
            why = await machine.why(error)
            await machine.kill()
            raise explained(error, f"image {image.name} did not boot: {why}") from error
        except BaseException:
            await asyncio.shield(machine.kill())
            raise
        machine.record.phase, machine.boots = "running", True
        machine.save_record()
        return machine

    async def give_disk(self, machine: Machine, image: Path) -> None:
        """It was there from the start: a drive cannot be given to a machine that runs."""

    async def _configure(self, machine: FirecrackerMachine, shape: Shape) -> None:
        """Everything before InstanceStart; none of it is possible after. There is no metadata service (MMDS) unless it is asked for: what
        guests ask is answered by gateway/guest/metadata.py. Raises ApiError."""
        api = machine.api
        await api.put("/cpu-config", cpuid_modifiers=processor.MODIFIERS)
        await api.put("/machine-config", vcpu_count=shape.vcpus, mem_size_mib=shape.memory_mib)
        await api.put("/boot-source", kernel_image_path=f"/{KERNEL}", initrd_path=f"/{INITRD}", boot_args=KERNEL_LINE)
        await api.put(
            f"/drives/{DRIVE}", drive_id=DRIVE, path_on_host=f"/{DISK}", is_root_device=False, is_read_only=False, cache_type="Unsafe"
        )
        await api.put(f"/network-interfaces/{NETWORK}", iface_id=NETWORK, host_dev_name=TAP, guest_mac=GUEST_MAC)
        await api.put("/entropy", rate_limiter=limits.entropy())
        await api.put("/vsock", guest_cid=GUEST_CID, uds_path=f"/{VSOCK}")
        await api.put("/actions", action_type="InstanceStart")

    async def seal(self, machine: Machine, image: Path, account: str = "") -> Sealed:
        assert isinstance(machine, FirecrackerMachine)
        shape = machine.record.shape
        try:
            if shape is None:
                raise Missing(f"image {image.name} was not booted by this service")
            written = await machine.seal(image / DEVICES)
            stored, seeded = await executors.BULK.run(_store, written, image / MEMORY)
            features = processor.shown(await executors.LATENCY.run(self._features, shape))
            made = msgspec.structs.replace(machine.record.made or Provenance(NAME), features=features)
        except (ApiError, OSError) as error:
            raise not_written(error, f"image {image.name}", f"image {image.name} could not be stored") from error
        finally:
            await machine.kill()
        os.chown(image / DISK, 0, 0)
        await executors.LATENCY.run(sync, [image / DEVICES, image / MEMORY, image / DISK])
        sums = await executors.LATENCY.run(manifest.sums, image)
        await executors.LATENCY.run(manifest.write, image, Manifest(shape, stored, 0, NAME, made, account=account, files=sums))
        return Sealed(stored, disks.stored_bytes(image / DISK), int((image / "code_bytes").read_text(encoding="ascii")), seeded)

    def _makes(self, shape: Shape) -> Provenance:
        """Returns what an image that boots now is made by; the version is what its process will say, and the features are in its manifest
        alone. Raises OSError."""
        guest, agent, protocol = kernel.guest(self._assets.cache)
        model = processor.model() if shape.accelerator == "kvm" else ""
        return Provenance(NAME, processor=processor.FIRECRACKER, model=model, kernel=guest, agent=agent, protocol=protocol)

    def _features(self, shape: Shape) -> list[str]:
        """What KVM lends here; it stays so while it is loaded. Raises OSError."""
        if not self._lent and shape.accelerator == "kvm":  # everything else is no processor of the host's (tests/contract)
            self._lent = processor.lent()
        return self._lent

    def _check_processor(self, image: str, known: Manifest) -> None:
        """Firecracker loads a state on any processor that takes it. Raises Refused, OSError."""
        if known.shape.accelerator == "kvm":
            processor.check(f"image {image}", known.made, processor.model(), self._features(known.shape))

    async def adopt(self, record: Process) -> FirecrackerMachine | None:
        sandbox = self._sandboxes.of(record)
        jail = Jail(self._jails, self._programs, sandbox, record.shape)
        if not is_alive(record):
            await self._sandboxes.release(sandbox)
            jail.remove()
            return None
        machine = self._made(record, sandbox, jail)
        try:
            await machine.connect()
        except (ApiError, OSError) as error:
            if record.phase not in UNSAVED or not machine.is_attached:
                await machine.kill()
                return None
            log.warning("adopt.not_connected", session=record.session, vm=record.vm, error=str(error))
        return machine

    def records(self) -> list[Process]:
        found = self._sandboxes.records()
        remove_others(self._jails, self._programs, [record.vm for record in found])
        return found

    async def forget_image(self, image: str) -> None:
        """Nothing is kept: clones have the image's files open."""
        self._warmed.discard(image)

    async def _machine(self, image: Path, shape: Shape) -> FirecrackerMachine:
        sandbox = self._sandboxes.allocate(shape)
        jail = Jail(self._jails, self._programs, sandbox, shape)
        try:
            jail.make()
            record = Process(sandbox.vm, 0, 0, image.name, sandbox.uid, shape=shape)
            machine = self._made(record, sandbox, jail)
            machine.save_record()
        except OSError as error:
            jail.remove()
            await self._sandboxes.release(sandbox)
            raise explained(error, f"the jail of image {image.name} could not be made: {error}") from error
        return machine

    def _made(self, record: Process, sandbox: VmSandbox, jail: Jail) -> FirecrackerMachine:
        machine = FirecrackerMachine(record, sandbox, jail, self._cgroups, lambda: self._remove(machine), self._devices, self._counts)
        return machine

    def counts(self) -> Mapping[str, int]:
        return self._counts

    async def _remove(self, machine: FirecrackerMachine) -> None:
        if self._network is not None and (link := machine.take_link()) is not None:
            await self._network.release(link)
        await self._sandboxes.release(machine.sandbox)
        machine.jail.remove()


def _store(written: Path, target: Path) -> tuple[int, int]:
    """The memory that Firecracker wrote in full, without its zero pages; returns the bytes stored, and how many generators were in it."""
    with written.open("r+b") as file:
        stored = memory.store_memory(file.fileno(), target)
    written.unlink()
    return stored, generators.make_due(target)


def _read_ahead(files: list[Path]) -> None:
    """Into the page cache, in order: touching cold pages one by one is what makes a first resume slow."""
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            for start, end in syscalls.data_segments(file.fileno()):
                os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
