"""A hypervisor's driver, links and control groups as vmm sees them, without machines. Its files are real, and of the real formats: every
system call here is one of vmm's and may fail."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from seam import Seam, process, strike
from world import COUNTER, PAGE, Hypervisor, Program, World, artifact, program

from gateway import messages as m
from gateway.observe.steps import Steps
from vmm import builds, diffs, disks, manifest, sandboxes
from vmm.driver import DEVICES, Process, Shape
from vmm.errors import Damaged, Ended, NeverRan, Unavailable, not_loaded, not_written
from vmm.network import Link

SHAPE = Shape(512, 1, 1 << 20, "tcg", 512)


class Machine:
    def __init__(self, driver: Driver, record: Process, inside: Hypervisor, directory: Path) -> None:
        self.record = record
        self.steps = Steps("vmm", "")
        self._driver = driver
        self._inside = inside
        self._directory = directory
        self._ended = asyncio.get_running_loop().create_future()
        inside.ended.append(self._ended)
        if inside.is_gone:
            self._ended.set_result(None)
        self._ended.add_done_callback(self._gone)

    def _gone(self, _: object) -> None:
        if process.get() not in self._driver.seam.dead:
            self.record.phase = "ended"
            self._driver.drop(self)

    def save_record(self) -> None:
        sandboxes.save_record(self._directory, self.record)

    def take_link(self) -> Link | None:
        return None

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        self.record.link = link.name
        try:
            self.save_record()
            made = diffs.read_manifest(snapshot) if (snapshot / diffs.MANIFEST).exists() else None
            self._load(snapshot, overlay, made)
            await asyncio.sleep(0.02)  # the devices
            diffs.verify_whole(snapshot)
            self.record.chain = made.chain if made is not None else []
            self.record.phase = "prepared"
            self.save_record()
        except OSError as error:
            raise not_loaded(error, f"session {self.record.session} could not be loaded: {error}", overlay, snapshot / DEVICES) from error

    def _load(self, snapshot: Path, overlay: Path, made: diffs.Manifest | None) -> None:
        inside = self._alive()
        disk = os.open(overlay, os.O_RDWR)
        pages: dict[int, bytes] = {}
        for number in made.chain if made is not None else []:
            data, at = (snapshot / f"{number}.pages").read_bytes(), 0
            for first, after in diffs.runs_of(snapshot / f"{number}.runs"):
                for page in range(first, after):
                    pages[page] = data[at : at + PAGE]
                    at += PAGE
        said = (snapshot / DEVICES).read_bytes()
        if inside.disk is not None:
            os.close(inside.disk)
        inside.disk, inside.pages, inside.dirty = disk, pages, set()
        if said != b"devices %d" % inside.counter:
            raise Damaged(f"{snapshot}: the devices' state {said!r} is not that of a memory of {inside.counter}")
        if inside.counter_on_disk != inside.counter:
            self._driver.world.wrong.append(
                f"{self.record.session}: memory of {inside.counter} was loaded with a disk of {inside.counter_on_disk}"
            )

    def _alive(self) -> Hypervisor:
        self._driver.seam.check(process.get())
        if self._inside.is_gone:
            raise Ended(f"hypervisor {self.record.vm} has ended")
        return self._inside

    async def resume(self, wake: bytes) -> int:
        channel = await self.agent()
        try:
            self.record.phase = "starting"
            self.save_record()
            os.write(channel, wake)
            self._alive().go_on()
            self.record.phase = "running"
        except ConnectionError as error:
            os.close(channel)
            self.record.phase = "prepared"
            raise NeverRan(f"session {self.record.session} could not be started: {error}") from error
        except OSError as error:
            os.close(channel)
            self.record.phase = "prepared"  # its guest has not run
            raise Unavailable(f"session {self.record.session} could not be started: {error}") from error
        except BaseException:
            os.close(channel)
            raise
        return channel

    async def checked(self) -> None:
        """Its files were, when they were loaded."""

    async def agent(self) -> int:
        await asyncio.sleep(0.001)
        return self._alive().channel()

    async def save(self, directory: Path) -> list[diffs.Sum]:
        inside = self._alive()
        inside.runs = False
        self.record.phase = "stopped"
        await asyncio.sleep(0.02)
        inside = self._alive()
        number = self.record.incarnation
        pages = sorted(inside.pages if not self.record.chain else inside.dirty | {COUNTER} if inside.pages else inside.dirty)
        try:
            diffs.write_runs(directory / f"{number}.runs", [(page, page + 1) for page in pages])
            (directory / f"{number}.pages").write_bytes(b"".join(inside.pages[page] for page in pages))
            (directory / DEVICES).write_bytes(b"devices %d" % inside.counter)
            inside.is_unsaved = False
            return [diffs.checksum(directory / name) for name in (DEVICES, f"{number}.runs", f"{number}.pages")]
        except OSError as error:
            raise Unavailable(f"session {self.record.session} could not be saved: {error}") from error

    async def pause(self) -> None:
        self._alive().runs = False
        self.record.phase = "prepared"
        self.save_record()

    async def unpause(self) -> None:
        self._alive().go_on()
        self.record.phase = "running"
        self.save_record()

    async def kill(self) -> None:
        self._driver.seam.check(process.get())
        self._inside.end()
        await asyncio.sleep(0.005)
        await self.wait()

    async def wait(self) -> None:
        await asyncio.shield(self._ended)


class Driver:
    """What the lives of sessions and images ask of a driver."""

    name = "qemu"
    disk_template = "overlay.qcow2"
    takes_taps = True

    def __init__(self, world: World, directory: Path, seam: Seam) -> None:
        self.world = world
        self.seam = seam
        self._directory = directory
        self.started = 0

    def counts(self) -> dict[str, int]:
        return {}

    async def standby(self, image: Path, link: Link | None = None) -> Machine:
        return await self._spawn(image, manifest.read(image, "qemu").shape)

    async def boot(self, image: Path, shape: Shape, link: Link, console: int) -> Machine:
        (image / "boot.qcow2").write_bytes(b"")
        machine = await self._spawn(image, shape)
        try:
            machine._alive().go_on()
            machine.record.link, machine.record.phase = link.name, "running"
            machine.save_record()
        except OSError as error:
            await machine.kill()
            raise Unavailable(f"image {image.name} did not boot: {error}") from error
        return machine

    async def give_disk(self, machine: Machine, image: Path) -> None:
        inside = machine._alive()
        try:
            inside.disk = os.open(image / "disk.raw", os.O_RDWR)
        except OSError as error:
            raise Unavailable(f"image {image.name} could not be given its disk: {error}") from error

    async def seal(self, machine: Machine, image: Path, account: str = "") -> m.Sealed:
        shape = machine.record.shape
        assert shape is not None
        machine._alive().runs = False
        try:
            await asyncio.sleep(0.02)
            write_image(image)
        except OSError as error:
            raise not_written(error, f"image {image.name}", f"image {image.name} could not be stored") from error
        finally:
            await machine.kill()
        for name in (DEVICES, self.disk_template, "disk.raw", "boot.qcow2"):
            disks.sync_path(image / name)
        manifest.write(image, manifest.Manifest(shape, PAGE, 0, account=account))
        return m.Sealed(PAGE, PAGE, int((image / "code_bytes").read_text()))

    async def _spawn(self, image: Path, shape: Shape) -> Machine:
        vm, machine = f"vm{os.urandom(6).hex()}", None
        directory = self._directory / vm
        try:
            directory.mkdir(parents=True)
            self.seam.check(process.get())
            inside = self.world.hypervisor(vm)
            record = Process(vm, 1, 1, image.name, 1, shape=shape)
            machine = Machine(self, record, inside, directory)
            machine.save_record()
            await asyncio.sleep(0.02)
        except BaseException as error:
            if machine is not None:
                await asyncio.shield(machine.kill())
            else:
                sandboxes.shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError):
                raise Unavailable(f"the hypervisor of image {image.name} did not start: {error}") from error
            raise
        return machine

    def drop(self, machine: Machine) -> None:
        """Its process has ended: what it had on the host goes."""
        sandboxes.shutil.rmtree(self._directory / machine.record.vm, ignore_errors=True)

    async def adopt(self, record: Process) -> Machine | None:
        inside = self.world.hypervisors.get(record.vm)
        if inside is None or inside.is_gone:
            sandboxes.shutil.rmtree(self._directory / record.vm, ignore_errors=True)
            return None
        if record.phase == "starting":  # who reads this asks the hypervisor
            record.phase = "running" if inside.runs else "prepared"
        if record.phase == "running" and not inside.runs:
            record.phase = "stopped"
        return Machine(self, record, inside, self._directory / record.vm)

    def records(self) -> list[Process]:
        found = []
        for vm in os.listdir(self._directory):
            try:
                text = (self._directory / vm / sandboxes.RECORD).read_bytes()
            except FileNotFoundError:  # it was never recorded: what runs in its control group ends
                if vm in self.world.hypervisors:
                    self.world.hypervisors[vm].end()
                sandboxes.shutil.rmtree(self._directory / vm, ignore_errors=True)
                continue
            found.append(msgspec.json.decode(text, type=Process))
        return found

    async def forget_image(self, image: str) -> None:
        pass


class Network:
    def __init__(self, world: World, directory: Path, seam: Seam) -> None:
        self._world = world
        self._directory = directory
        self._seam = seam

    def start(self, keep: set[Path], wanted: int, opens_taps: bool = False) -> None:
        for name in set(self._world.links) - {path.name for path in keep}:
            self._world.links.discard(name)

    async def take(self) -> Link:
        await asyncio.sleep(0.001)
        self._seam.check(process.get())
        name = f"{len(self._world.links) + 1}-{os.urandom(4).hex()}"
        self._world.links.add(name)
        return Link(self._directory / name)

    async def release(self, link: Link) -> None:
        self._seam.check(process.get())
        self._world.links.discard(link.name)

    async def enable_egress(self, link: Link, rules: m.EgressRules) -> None: ...

    async def services(self, link: Link, is_named: bool = False) -> list[int]:
        """Nobody asks anything there."""
        return [_listening().detach(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(), _listening().detach()]

    async def sockets(self, link: Link, count: int) -> list[Any]:
        return []

    async def restock(self, link: Link) -> None: ...

    async def trim(self) -> None: ...

    async def close(self, is_empty: bool) -> None: ...


def _listening() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.setblocking(False)
    made.bind("")  # a name that nobody has (unix(7), autobind)
    made.listen()
    return made


class Cgroups:
    def start(self) -> None: ...

    def names(self) -> list[str]:
        return []

    def joins(self, vm: str) -> list[Path]:
        return []

    def memory_bytes(self, vm: str) -> int:
        return 10 << 20

    def cpu_seconds(self, vm: str) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


class Builder(builds.Builder):
    """vmm's own, whose jail builds nothing that could fail by itself."""

    def _close_private(self, namespace: Path, registries: set[str]) -> None: ...


def starter(seam: Seam) -> Callable[..., Any]:
    """What starts a program, in place of asyncio's."""

    async def start(*arguments: str, **named: Any) -> Program:
        strike(seam, process.get(), "fork")
        await asyncio.sleep(0.001)
        return program(arguments, named)

    return start


class _Body:
    def __init__(self, data: bytes) -> None:
        self._raw_stream = io.BytesIO(data)


class ObjectStore:
    """An S3 client's calls, over what the world keeps."""

    def __init__(self, world: World, seam: Seam) -> None:
        self._objects = world.objects
        self._seam = seam

    def list_buckets(self) -> dict[str, Any]:
        return {"Buckets": [{"Name": "torpor-archive"}]}

    def upload_fileobj(self, file: Any, bucket: str, key: str, **more: Any) -> None:
        strike(self._seam, process.get(), "put object")
        self._objects[key] = file.read()
        strike(self._seam, process.get(), "object is put")

    def download_fileobj(self, bucket: str, key: str, file: Any, **more: Any) -> None:
        strike(self._seam, process.get(), "get object")
        file.write(self._objects[key])

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        """An artifact, which every bucket has."""
        strike(self._seam, process.get(), "get object")
        data = artifact()
        return {"Body": _Body(data), "ContentLength": len(data)}

    def delete_object(self, Bucket: str, Key: str) -> None:
        strike(self._seam, process.get(), "delete object")
        self._objects.pop(Key, None)


def make_image(directory: Path) -> None:
    """An image whose guests have counted nothing yet."""
    directory.mkdir(parents=True)
    write_image(directory)
    manifest.write(directory, manifest.Manifest(SHAPE, PAGE, 0))


def write_image(directory: Path) -> None:
    (directory / Driver.disk_template).write_bytes(b"\0" * PAGE)
    (directory / DEVICES).write_bytes(b"devices 0")
