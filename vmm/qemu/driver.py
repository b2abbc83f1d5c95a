"""QEMU behind vmm.driver.Driver: images in, clones out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import disks, host, jail, memory
from ..cgroups import Cgroups, Limits
from ..driver import DiskFull, Machine, Process, Sealed, Shape, StateLost, VmmError
from ..mapping import Mapper
from ..network import Link, Network
from ..snapshots import sync
from . import machine as topology
from .process import DEVICES, RECORD, QemuMachine, child_of, is_alive, listen
from .qmp import QmpError

MANIFEST = "manifest.json"
_OVERHEAD_BYTES = 256 << 20  # the hypervisor's own memory: heap, translated code
_SPAWN_SECONDS = 20
_IO_BYTES_PER_SECOND = 128 << 20  # for each 512 MiB of the size asked for
_USERS = 4096


class Manifest(msgspec.Struct):
    """What an image directory holds; written last, so its presence says that the image is whole."""

    shape: Shape
    memory_bytes: int
    boot_bytes: int


@dataclass(frozen=True)
class Assets:
    """What was made once per host: the jail's root, the guest's kernel and initramfs."""

    jail_root: Path
    kernel: Path
    initrd: Path


class QemuDriver:
    def __init__(self, assets: Assets, directory: Path, cgroups: Cgroups, network: Network, first_uid: int) -> None:
        self._assets = assets
        self._directory = directory
        self._cgroups = cgroups
        self._network = network
        self._first_uid = first_uid
        self._uids: set[int] = set()
        self._memories: dict[str, asyncio.Task[int]] = {}
        self._machines: set[QemuMachine] = set()
        self._numbers = itertools.count(1)
        self._shapes: dict[str, Shape] = {}  # by vm

    def manifest(self, image: Path) -> Manifest:
        """Raises StateLost when the image is not whole."""
        try:
            return msgspec.json.decode((image / MANIFEST).read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError) as error:
            raise StateLost(f"image {image.name} cannot be read: {error}") from error

    async def standby(self, image: Path) -> QemuMachine:
        manifest = self.manifest(image)
        descriptor = await self._memory(image)
        with contextlib.ExitStack() as files:
            base = files.enter_context((image / "disk.raw").open("rb")).fileno()
            boot = files.enter_context((image / "boot.qcow2").open("rb")).fileno()
            return await self._spawn(
                image.name, manifest.shape,
                lambda qmp, agent: topology.standby(manifest.shape, descriptor, base, boot, qmp, agent),
            )  # fmt: skip

    async def boot(self, image: Path, shape: Shape, link: Link, console: int) -> QemuMachine:
        overlay_path = image / "boot.qcow2"
        await disks.create_overlay(overlay_path, shape.disk_bytes)
        descriptor = memory.new_memory(image.name, shape.memory_mib << 20)
        tap = await self._network.tap(link)
        try:
            with contextlib.ExitStack() as files:
                base = files.enter_context((image / "disk.raw").open("rb")).fileno()
                kernel = files.enter_context(self._assets.kernel.open("rb")).fileno()
                initrd = files.enter_context(self._assets.initrd.open("rb")).fileno()
                overlay = files.enter_context(overlay_path.open("r+b")).fileno()
                machine = await self._spawn(
                    image.name, shape,
                    lambda qmp, agent: topology.boot(
                        shape, descriptor, base, overlay, kernel, initrd, tap, qmp, agent, console
                    ),
                )  # fmt: skip
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            os.close(tap)
        machine.record.phase = "running"
        machine.record.link = link.name
        machine.image_memory = descriptor
        machine.save_record()
        return machine

    async def seal(self, machine: Machine, image: Path) -> Sealed:
        assert isinstance(machine, QemuMachine) and machine.image_memory is not None
        shape = self._shapes[machine.record.vm]
        try:
            await machine.stop()
            await machine.save_devices(image)
            await asyncio.to_thread(sync, [image / DEVICES])
            stored = await asyncio.to_thread(memory.store_memory, machine.image_memory, image / "memory.raw")
            await disks.create_overlay(image / "overlay.qcow2", shape.disk_bytes)
        except (QmpError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DiskFull(f"no room for image {image.name}: free some, or move --root") from error
            raise VmmError(f"image {image.name} could not be stored: {error}") from error
        finally:
            await machine.kill()
        for name in ("disk.raw", "boot.qcow2", "overlay.qcow2"):
            with (image / name).open("rb") as file:
                os.fsync(file.fileno())
        manifest = Manifest(shape, stored, disks.stored_bytes(image / "boot.qcow2"))
        temporary = image / f"{MANIFEST}.new"
        temporary.write_bytes(msgspec.json.encode(manifest))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(image / MANIFEST)
        disks.sync_directory(image)
        return Sealed(stored, disks.stored_bytes(image / "disk.raw"), int((image / "code_bytes").read_text(encoding="ascii")))

    async def adopt(self, record: Process) -> QemuMachine | None:
        directory = self._directory / record.vm
        if not is_alive(record):
            self._cgroups.remove(record.vm)
            shutil.rmtree(directory, ignore_errors=True)
            return None
        self._uids.add(record.uid)
        machine = QemuMachine(record, directory, self._network, lambda: self._remove(record))
        self._machines.add(machine)
        try:
            await machine.connect()
        except QmpError:
            await machine.kill()
            return None
        return machine

    def records(self) -> list[Process]:
        """Every process that a daemon of this instance recorded, alive or not."""
        found = []
        self._directory.mkdir(parents=True, exist_ok=True)
        for directory in sorted(self._directory.iterdir()):
            try:
                found.append(msgspec.json.decode((directory / RECORD).read_bytes(), type=Process))
            except (OSError, msgspec.DecodeError):
                self._cgroups.remove(directory.name)
                shutil.rmtree(directory, ignore_errors=True)
        return found

    async def forget_image(self, image: str) -> None:
        """Lets go of an image's memory; clones that still run keep theirs."""
        task = self._memories.pop(image, None)
        if task is not None:
            with contextlib.suppress(OSError, StateLost):
                os.close(await task)
        self._cgroups.remove(f"image-{image}")

    async def _memory(self, image: Path) -> int:
        task = self._memories.get(image.name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load_memory(image))
            self._memories[image.name] = task
        try:
            return await asyncio.shield(task)
        except OSError as error:
            self._memories.pop(image.name, None)
            raise StateLost(str(error)) from error

    async def _load_memory(self, image: Path) -> int:
        pids = [machine.record.pid for machine in self._machines if machine.record.image == image.name]
        adopted = memory.adopt_image_memory(image.name, pids)
        if adopted is not None:
            return adopted
        group = f"image-{image.name}"
        self._cgroups.create(group)
        return await memory.load_image_memory(
            image.name, image / "memory.raw", [image / "disk.raw", image / "boot.qcow2"], self._cgroups.joins(group)
        )

    async def _spawn(self, image: str, shape: Shape, compose: Callable[[int, int], topology.Command]) -> QemuMachine:
        vm = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        directory = self._directory / vm
        directory.mkdir(mode=0o700, parents=True)
        uid = self._take_uid()
        self._cgroups.create(vm, limits(shape))
        self._shapes[vm] = shape
        qmp, agent = listen(directory / "qmp.sock"), listen(directory / "agent.sock")
        ours, theirs = socket.socketpair()
        mapper = Mapper(ours)
        try:
            command = compose(qmp.fileno(), agent.fileno())
            process = await asyncio.create_subprocess_exec(
                *jail.command(self._assets.jail_root, self._cgroups.joins(vm), uid, command.arguments),
                pass_fds=[*command.descriptors, theirs.fileno()], start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=(directory / "stderr").open("wb"),
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TORPOR_MAPPER": str(theirs.fileno())}
                | ({"TORPOR_KVM": "1"} if shape.accelerator == "kvm" else {}),
            )  # fmt: skip
        except BaseException:
            mapper.close()
            raise
        finally:
            theirs.close()
            qmp.close()
            agent.close()
        record = Process(vm, 0, 0, image, uid)
        try:
            async with asyncio.timeout(_SPAWN_SECONDS):
                while (pid := child_of(process.pid)) is None:
                    if process.returncode is not None:
                        raise VmmError(self._why(directory))
                    await asyncio.sleep(0.0005)
                record.pid, record.started = pid, host.start_time(pid) or 0
                machine = QemuMachine(record, directory, self._network, lambda: self._remove(record), mapper)
                self._machines.add(machine)
                machine.save_record()
                await machine.connect()
                machine.mapping()
                machine.save_record()
        except BaseException as error:
            reason = self._why(directory)
            mapper.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # and with it, by --kill-child, what runs inside
            await asyncio.shield(self._remove(record))
            if isinstance(error, TimeoutError | QmpError | VmmError | OSError | LookupError):
                raise VmmError(f"the hypervisor of image {image} did not start: {reason or error}") from error
            raise
        return machine

    def _why(self, directory: Path) -> str:
        try:
            return (directory / "stderr").read_text(encoding="utf-8", errors="replace").strip()[-400:]
        except OSError:
            return ""

    def _take_uid(self) -> int:
        uid = next(uid for uid in range(self._first_uid, self._first_uid + _USERS) if uid not in self._uids)
        self._uids.add(uid)
        return uid

    async def _remove(self, record: Process) -> None:
        self._machines = {machine for machine in self._machines if machine.record is not record}
        await asyncio.to_thread(self._cgroups.remove, record.vm)
        shutil.rmtree(self._directory / record.vm, ignore_errors=True)
        self._shapes.pop(record.vm, None)
        self._uids.discard(record.uid)


def limits(shape: Shape) -> Limits:
    """A microVM's share of the host: its peak as the bound, its baseline as its weight (reference, section 4)."""
    return Limits(
        memory_bytes=(shape.memory_mib << 20) + _OVERHEAD_BYTES,
        cpus=shape.vcpus,
        weight=max(1, shape.baseline_mib // 20),
        pids=256,
        io_bytes_per_second=_IO_BYTES_PER_SECOND * max(1, shape.baseline_mib // 512),
    )
