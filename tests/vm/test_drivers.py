"""One life of a microVM by the driver protocol (vmm/driver.py): over QEMU for real, over Firecracker by its contract (tests/contract).

The guest's agent says what is in its memory: an application that was told to start without being configured has exited with 127,
in the session where that happened, for ever, and in no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.config import Egress, Settings
from gateway.messages import AGENT_PROTOCOL, Shape
from gateway.sessions.agent import Agent, start_frames, wake_frame
from vmm import diffs, disks, kernel, making, manifest, memory, probe, processor, syscalls
from vmm.cgroups import Cgroups, Limits
from vmm.driver import DEVICES, VSOCK_PORT, Driver, Machine
from vmm.errors import Damaged, Ended, Missing, NeverRan, Refused, Unavailable
from vmm.firecracker.api import Api, ApiError
from vmm.firecracker.driver import Assets as FirecrackerAssets
from vmm.firecracker.driver import FirecrackerDriver
from vmm.firecracker.jail import MEMORY, STATE, VSOCK, Programs
from vmm.firecracker.machine import FirecrackerMachine
from vmm.network import Network
from vmm.qemu import boot_snapshots
from vmm.qemu import machine as topology
from vmm.qemu.driver import Assets as QemuAssets
from vmm.qemu.driver import QemuDriver
from vmm.qemu.process import QemuMachine
from vmm.sandboxes import SandboxAllocator
from vmm.snapshots import Snapshots
from vmm.standbys import Standbys

pytestmark = pytest.mark.vm

CONTRACT = Path(__file__).parents[1] / "contract"
CONTRACTS = Programs(CONTRACT / "firecracker.py", CONTRACT / "jailer.py")
GUESTS = Path(__file__).parents[1] / "guests"
FIRST_UID = 700_000 + 5 * 262_144
SHAPE = Shape(memory_mib=128, vcpus=1, disk_bytes=64 << 20, accelerator="tcg", baseline_mib=128)
IMPOSSIBLE = 1000  # virtual processors


@dataclass
class Rig:
    directory: Path
    driver: Driver
    shape: Shape
    network: Network
    snapshots: Snapshots
    make: Callable[..., Driver]  # another daemon's, on the same host; of Firecracker, with these programs
    protocol: int  # of the guest's agent

    @property
    def image(self) -> Path:
        return self.directory / "images/one"

    async def woken(self, machine: Machine) -> Agent:
        nonce = secrets.randbits(63)
        agent = Agent(await machine.resume(wake_frame(nonce)), lambda channel, data: None, lambda code: None)
        async with asyncio.timeout(30):
            await agent.expect(nonce)
        return agent

    async def launched(self, session: str) -> Machine:
        """From the image; prepared."""
        overlay = self.snapshots.overlay(session)
        overlay.parent.mkdir(parents=True)
        disks.copy_overlay(self.image / self.driver.disk_template, overlay)
        return await self.prepared(session, 1, self.image)

    async def prepared(self, session: str, incarnation: int, source: Path) -> Machine:
        machine = await self.driver.standby(self.image)
        machine.record.session, machine.record.incarnation = session, incarnation
        await machine.prepare(source, self.snapshots.overlay(session), await self.network.take())
        return machine

    async def saved(self, machine: Machine) -> Path:
        session, number = machine.record.session, machine.record.incarnation
        work = self.snapshots.begin(session)
        written = await machine.save(work)
        self.snapshots.commit(session, number, work, machine.record.chain, written, machine.record.made)
        return self.snapshots.newest(session)


def disk(path: Path, size: int = SHAPE.disk_bytes) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)


@contextlib.contextmanager
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="torpor-driver-", dir="/var/tmp"))
    try:
        for name in ("images/one", "sessions", "run"):
            (directory / name).mkdir(parents=True)
        yield directory
    finally:
        shutil.rmtree(directory)


def cache_of(directory: Path, protocol: int = AGENT_PROTOCOL) -> Path:
    """The host's cache, with what the set-up makes where Firecracker is, and with the agent that speaks `protocol`."""
    cache = directory / "cache"
    if cache.exists():
        return cache
    cache.mkdir()
    for entry in Settings().cache.iterdir():
        (cache / entry.name).symlink_to(entry.readlink() if entry.is_symlink() else entry)
    if protocol != AGENT_PROTOCOL:
        with tarfile.open(GUESTS / f"protocol-{protocol}.tar.gz") as archive:
            archive.extractall(directory / "sources")
        for name in ("guest", "initrd"):
            (cache / name).unlink()
        kernel.make_init(cache / "guest", directory / "sources")
        kernel.make_initrd(cache / "kernel", cache / "guest/init", cache / "initrd")
    assets = FirecrackerAssets(cache)
    for path in (assets.kernel, assets.initrd):
        path.unlink(missing_ok=True)
    kernel.extract_elf(cache / "kernel/vmlinuz", assets.kernel)
    kernel.make_initrd(cache / "kernel", cache / "guest/init", assets.initrd, kernel.FIRECRACKER_MODULES)
    return cache


@contextlib.asynccontextmanager
async def rig(kind: str, shape: Shape, programs: Programs, protocol: int) -> AsyncIterator[Rig]:
    """An image that was booted and sealed by the driver, and what a daemon would have around it."""
    with place() as directory:
        cache = cache_of(directory, protocol)
        cgroups = Cgroups(f"drivers-{kind}", directory)
        cgroups.start()
        network = Network(directory / "run/netns", Egress(closed=True), f"drivers-{kind}")

        def make(programs: Programs = programs) -> Driver:
            sandboxes = SandboxAllocator(directory / "run/vms", cgroups, FIRST_UID)
            if kind == "qemu":
                return QemuDriver(QemuAssets(cache), directory / "boots", sandboxes, cgroups, network)
            (directory / "jails").mkdir(exist_ok=True)
            return FirecrackerDriver(programs, FirecrackerAssets(cache), directory / "jails", sandboxes, cgroups)

        one = Rig(directory, make(), shape, network, Snapshots(directory / "sessions"), make, protocol)
        network.start(set(), 1, one.driver.takes_taps)
        await booted(one)
        try:
            yield one
        finally:
            for record in one.driver.records():
                machine = await one.make().adopt(record)
                if machine is not None:
                    await machine.kill()
            await network.close(is_empty=True)
            assert not [name for name in cgroups.names() if not name.startswith("image-")], "control groups are left"
            assert not list((directory / "run/vms").iterdir()), "records are left"
            assert not [path for path in (directory / "jails").glob("*/*")], "jails are left"
            await one.driver.forget_image("one")
            cgroups.close()
            for namespace in (directory / "run/netns").iterdir():
                subprocess.run(["umount", str(namespace)], check=False)


async def booted(one: Rig) -> None:
    disk(one.image / "disk.raw", one.shape.disk_bytes)
    (one.image / "code_bytes").write_text("1")
    console = os.open(one.image / "console.log", os.O_WRONLY | os.O_CREAT)
    machine = await one.driver.boot(one.image, one.shape, await one.network.take(), console)
    os.close(console)
    machine.record.session = "booting"
    machine.save_record()
    agent = Agent(await machine.agent(), lambda channel, data: None, lambda code: None)
    assert await agent.hello(60) == (0, 0)
    await one.driver.give_disk(machine, one.image)
    sealed = await one.driver.seal(machine, one.image)
    agent.close()
    assert 0 < sealed.memory_bytes < one.shape.memory_mib << 20
    assert not [record for record in one.driver.records() if record.session == "booting"]


@dataclass(frozen=True)
class Life:
    """Runs a test in a rig of its own."""

    shape: Shape
    programs: Programs
    protocol: int = AGENT_PROTOCOL

    def __call__(self, test: Callable[[Rig], Coroutine[Any, Any, None]], kind: str) -> None:
        async def run() -> None:
            async with rig(kind, self.shape, self.programs, self.protocol) as one:
                await test(one)

        asyncio.run(run())


@pytest.fixture
def programs(request: pytest.FixtureRequest) -> Programs:
    """Those that `--firecracker` names."""
    if request.config.getoption("--firecracker") == "stand-in":
        return CONTRACTS
    found = probe.firecracker_programs()
    assert found is not None, "firecracker and jailer are not on the path"
    return found


@pytest.fixture
def life(request: pytest.FixtureRequest, programs: Programs) -> Life:
    """Under the accelerator that `--accelerator` names."""
    return Life(msgspec.structs.replace(SHAPE, accelerator=request.config.getoption("--accelerator")), programs)


@pytest.fixture
def stand_in(programs: Programs) -> None:
    """For what only it can be made to do."""
    if programs is not CONTRACTS:
        pytest.skip("of the stand-in")


@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_a_life(kind: str, life: Life) -> None:
    life(whole_life, kind)


def test_an_image_and_its_sleepers_keep_the_processor_that_they_booted_with(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made when guests still saw virtualisation: they load, and see it, while others see none."""
    before = topology.processor("tcg", "")
    monkeypatch.setattr(topology, "processor", lambda accelerator, recorded=None: before)

    async def older(one: Rig) -> None:
        assert manifest.read(one.image, "qemu").made.processor == before
        monkeypatch.undo()
        one.driver = one.make()
        standby = await one.driver.standby(one.image)
        assert before in Path(f"/proc/{standby.record.pid}/cmdline").read_text().split("\0")
        assert standby.record.made is not None and processor.virtualises(standby.record.made.processor)
        await standby.kill()
        await whole_life(one)

    life(older, "qemu")


@pytest.mark.long
@pytest.mark.parametrize("protocol", range(1, AGENT_PROTOCOL))
@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_a_life_with_an_older_agent(kind: str, protocol: int, life: Life) -> None:
    if kind == "firecracker" and life.programs is CONTRACTS:
        pytest.skip("its guest is no agent of ours")
    dataclasses.replace(life, protocol=protocol)(whole_life, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_a_life_of_a_large_guest(kind: str, life: Life) -> None:
    """8 GiB, in two pieces around the hole for devices, and several processors."""
    if kind == "firecracker" and life.programs is CONTRACTS:
        pytest.skip("its guest has no memory above the hole")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10 << 30:
        pytest.skip("the host is too small")
    dataclasses.replace(life, shape=msgspec.structs.replace(life.shape, memory_mib=8192, baseline_mib=8192, vcpus=2))(whole_life, kind)


DATA = 64 << 20


@pytest.mark.parametrize("kind", ["qemu", "firecracker"])
def test_a_launch_from_a_disk_of_32_gb_copies_none_of_it_where_blocks_are_shared(kind: str, life: Life) -> None:
    dataclasses.replace(life, shape=msgspec.structs.replace(life.shape, disk_bytes=32 << 30))(launch_from_a_large_disk, kind)


async def launch_from_a_large_disk(one: Rig) -> None:
    template = one.image / one.driver.disk_template
    if isinstance(one.driver, FirecrackerDriver):
        with template.open("r+b") as file:  # a container's files; where the guest has nothing, so that it does not matter
            file.seek(16 << 30)
            file.write(secrets.token_bytes(DATA))
    os.sync()
    before = os.statvfs(one.directory)
    machine = await one.launched("first")
    os.sync()
    after = os.statvfs(one.directory)
    overlay = one.snapshots.overlay("first")
    assert overlay.stat().st_size >= (32 << 30 if isinstance(one.driver, FirecrackerDriver) else 1)
    if not isinstance(one.driver, FirecrackerDriver):
        assert disks.stored_bytes(overlay) < 1 << 20, "its disk is a layer over the image's, on every file system"
    elif disks.shares_blocks(one.directory):
        assert (before.f_bfree - after.f_bfree) * before.f_frsize < DATA // 4
    else:  # of which `torpor doctor` and the log have a line
        assert disks.stored_bytes(overlay) >= DATA
    (await one.woken(machine)).close()
    await machine.kill()


@pytest.mark.usefixtures("stand_in")
def test_a_life_under_a_firecracker_that_names_its_log_of_dirty_pages_otherwise(life: Life) -> None:
    """1.12 refuses `track_dirty_pages`, by which later ones know it."""
    with of_release("1.12.1") as programs:
        dataclasses.replace(life, programs=programs)(whole_life, "firecracker")


@contextlib.contextmanager
def of_release(version: str) -> Iterator[Programs]:
    """The stand-in, of another release."""
    with place() as directory:
        for program in (CONTRACTS.firecracker, CONTRACTS.jailer):
            text = re.sub(r'^VERSION = "[^"]+"', f'VERSION = "{version}"', program.read_text(), flags=re.MULTILINE)
            (directory / program.name).write_text(text)
            (directory / program.name).chmod(0o755)
        yield Programs(directory / CONTRACTS.firecracker.name, directory / CONTRACTS.jailer.name)


@pytest.mark.usefixtures("stand_in")
def test_what_another_firecracker_wrote_is_refused_and_not_lost(life: Life) -> None:
    life(another_release, "firecracker")


async def another_release(one: Rig) -> None:
    """An image and a sleeper, under an older release; and they go on under the one that wrote them."""
    machine = await one.launched("first")
    (await one.woken(machine)).close()
    snapshot = await one.saved(machine)
    await machine.kill()
    ours = one.driver
    assert machine.record.made is not None and machine.record.made.in_words() == "Firecracker 1.16.2"
    assert manifest.read(one.image, "firecracker").made.version == diffs.read_manifest(snapshot).made.version == "1.16.2"
    with of_release("1.13.0") as programs:
        one.driver = one.make(programs)
        with pytest.raises(Refused, match=r"made by Firecracker 1\.16\.2, and this host has Firecracker 1\.13\.0"):
            await one.launched("second")
        with pytest.raises(Refused, match=r"first .*made by Firecracker 1\.16\.2, and this host has Firecracker 1\.13\.0"):
            await attempt(one, snapshot)
    one.driver = ours
    (await one.woken(await one.prepared("first", 2, snapshot))).close()


@pytest.mark.usefixtures("stand_in")
def test_a_firecracker_guest_that_is_not_heard_of_is_given_up_at_the_deadline(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(one: Rig) -> None:
        """It is stopped: what asks it waits, as with one that boots for ever."""
        machine = await one.launched("first")
        (await one.woken(machine)).close()
        await machine.pause()
        monkeypatch.setattr("vmm.firecracker.machine._AGENT_SECONDS", 0.5)
        with pytest.raises(Unavailable, match=r"agent channel: the guest did not answer in 0\.5 s"):
            await machine.agent()
        await machine.unpause()
        os.close(await machine.agent())

    life(silent, "firecracker")


def test_a_firecracker_guest_that_was_let_run_and_not_heard_of_is_woken_again(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unheard(one: Rig) -> None:
        """The daemon gives up, or is killed, between the two: the next one finds it starting."""
        machine = await one.launched("first")
        monkeypatch.setattr("vmm.firecracker.machine._WOKEN_SECONDS", 0.0)
        monkeypatch.setattr("vmm.firecracker.machine._PATIENCE_SECONDS", 0.0)
        with pytest.raises(Unavailable, match="did not answer"):
            await machine.resume(wake_frame(7))
        monkeypatch.undo()
        found = one.make()
        adopted = await found.adopt(next(record for record in found.records() if record.session == "first"))
        assert adopted is not None and adopted.record.phase == "starting"
        assert await (await one.woken(adopted)).hello(10) == (0, 0)
        assert adopted.record.phase == "running"
        await adopted.kill()
        await machine.wait()

    life(unheard, "firecracker")


def test_the_next_image_goes_on_from_a_boot_that_was_kept(life: Life) -> None:
    life(next_image, "qemu")


async def next_image(one: Rig) -> None:
    kept = next((one.image.parents[1] / "boots").iterdir())
    for damaged in (False, True):
        if damaged:
            (kept / "memory.raw").write_bytes(b"not a memory")
            one.driver = one.make()
        image = one.image.parent / f"two-{damaged}"
        image.mkdir()
        disk(image / "disk.raw")
        console = os.open(image / "console.log", os.O_WRONLY | os.O_CREAT)
        machine = await one.driver.boot(image, one.shape, await one.network.take(), console)
        os.close(console)
        assert isinstance(machine, QemuMachine)
        assert (b"-kernel" in Path(f"/proc/{machine.record.pid}/cmdline").read_bytes()) == damaged
        agent = Agent(await machine.agent(), lambda channel, data: None, lambda code: None)
        assert await agent.hello(60) == (0, 0)
        await one.driver.give_disk(machine, image)
        empty = (image / "boot.qcow2").stat().st_size
        assert kept.is_dir(), "a boot that could not be used was not made anew"
        for piece in start_frames([("GREETING", "hello")]):
            agent.send(piece)
        assert await settled(agent) == (2, 127)
        agent.close()
        await machine.kill()
        # The guest mounted the disk that it was given: what it wrote lies in this image's layer.
        assert (image / "boot.qcow2").stat().st_size > empty
    console = os.open("/dev/null", os.O_WRONLY)
    machine = await one.driver.boot(image, one.shape, await one.network.take(), console)
    os.close(console)
    await machine.kill()
    assert not kept.exists(), "a boot whose guest was never heard of would be used again"


def test_an_images_memory_leaves_the_host_with_its_last_hypervisor(life: Life) -> None:
    life(let_go, "qemu")


async def let_go(one: Rig) -> None:
    pool = Standbys(one.driver, 1, 1, 0.0, lambda: True)  # nothing is kept for longer than it is used
    machine = await pool.take(one.image)
    shared = memory_of(machine)
    assert os.getpid() in holders(shared)
    await pool.drop_unused(held={one.image})
    assert pool.statistics() == {}, "a hypervisor waits for an image that nobody launches"
    assert os.getpid() in holders(shared), "the image of a running microVM would be read again for the next one"
    await machine.kill()
    await pool.drop_unused()
    assert os.getpid() not in holders(shared)
    async with asyncio.timeout(10):  # the hypervisor's parent ends a little after it
        while holders(shared):
            await asyncio.sleep(0.01)
    machine = await one.launched("again")
    agent = await one.woken(machine)
    assert await agent.hello(10) == (0, 0)
    assert os.getpid() in holders(memory_of(machine))
    agent.close()
    await machine.kill()


_WRITER = """
import mmap, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
size = int(sys.argv[3])
memory = mmap.mmap(int(sys.argv[2]), size, mmap.MAP_PRIVATE)
for at in range(0, size, mmap.PAGESIZE):
    memory[at] = 1
"""


def test_a_group_that_is_full_drops_what_writing_in_holes_adds_to_a_file_on_the_disk() -> None:
    """Firecracker maps an image's memory from its file, holes and all, and so may: it costs a guest nothing of what it was promised. Of a
    file in memory nothing can be dropped (the same process was killed), so QEMU's guests have memory of their own there."""
    size = 64 << 20
    with place() as directory:
        cgroups = Cgroups("drivers-holes", directory)
        cgroups.start()
        cgroups.create("one", Limits(memory_bytes=size * 3 // 2, cpus=1, weight=100, pids=16, io_bytes_per_second=1 << 30))
        file = os.open(directory / "image", os.O_RDWR | os.O_CREAT)
        try:
            os.truncate(file, size)
            member = next(path for path in cgroups.joins("one") if cgroups.unified or "/memory/" in str(path))
            command = [sys.executable, "-c", _WRITER, str(member), str(file), str(size)]
            subprocess.run(command, check=True, pass_fds=[file], timeout=60)
        finally:
            os.close(file)
            cgroups.close()


def memory_of(machine: Machine) -> tuple[int, int]:
    """Which file its image's memory is."""
    for entry in Path(f"/proc/{machine.record.pid}/fd").iterdir():
        if os.readlink(entry).startswith(f"/memfd:{memory.memfd_name(machine.record.image)} "):
            return entry.stat().st_dev, entry.stat().st_ino
    raise LookupError


def holders(file: tuple[int, int]) -> set[int]:
    """Processes that have it open."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if (entry.stat().st_dev, entry.stat().st_ino) == file:
                found.add(int(entry.parts[2]))
    return found


async def whole_life(one: Rig) -> None:
    before = {name: contents(one.image / name) for name in ("memory.raw", DEVICES)}
    machine = await one.launched("first")
    agent = await one.woken(machine)
    assert await agent.hello(10) == (0, 0) and agent.protocol == one.protocol
    for piece in start_frames([]):
        agent.send(piece)
    assert await settled(agent) == (2, 127)

    # What was carried out is answered when it is asked for again.
    for frame in [wake_frame(11)] * 2:
        done = agent.expect(11)
        agent.send(frame)
        async with asyncio.timeout(10):
            await done

    # One that ran ahead is paused, and woken later as any other.
    await machine.pause()
    agent.close()
    agent = await one.woken(machine)
    assert await agent.hello(10) == (2, 127)

    # A suspend that is called off loses nothing, and neither does the one after it.
    await one.saved(machine)
    one.snapshots.called_off("first", 1)
    await machine.unpause()
    agent.close()
    agent = Agent(await machine.agent(), lambda channel, data: None, lambda code: None)
    assert await agent.hello(10) == (2, 127)

    # A daemon that is started again finds it, running; the snapshot is taken by the new one.
    agent.close()
    if isinstance(machine, QemuMachine):
        machine.qmp.close()
    found = one.make()
    record = next(record for record in found.records() if record.session == "first")
    adopted = await found.adopt(record)
    assert adopted is not None and adopted.record.phase == "running"
    agent = Agent(await adopted.agent(), lambda channel, data: None, lambda code: None)
    assert await agent.hello(10) == (2, 127)
    snapshot = await one.saved(adopted)
    agent.close()
    await adopted.kill()
    await machine.wait()
    one.driver = found

    # Lives after it, each from what the last one left; another session of the image knows nothing of it.
    for incarnation in (2, 3, 4):
        machine = await one.prepared("first", incarnation, snapshot)
        agent = await one.woken(machine)
        assert await agent.hello(10) == (2, 127)
        one.snapshots.started("first", incarnation)
        snapshot = await one.saved(machine)
        changed = (snapshot / f"{incarnation}.pages").stat().st_size  # by the hypervisor's log of dirty pages
        assert 0 < changed < one.shape.memory_mib << 20 >> 2, "what a guest that did nothing has changed"
        agent.close()
        await machine.kill()
        one.snapshots.rest("first")
    folded = one.snapshots.write_fold("first", lambda: None)
    one.snapshots.put_fold("first", folded)
    one.snapshots.drop_fold(folded)
    machine, other = await one.prepared("first", 5, one.snapshots.newest("first")), await one.launched("second")
    agents = [await one.woken(machine), await one.woken(other)]
    assert [await agent.hello(10) for agent in agents] == [(2, 127), (0, 0)]
    for agent in agents:
        agent.close()
    await asyncio.gather(machine.kill(), other.kill())
    assert {name: contents(one.image / name) for name in before} == before  # no clone changes its image


def contents(path: Path) -> str:
    """Of a file that may be larger than it has data."""
    found = hashlib.blake2b()
    with path.open("rb") as file:
        for start, end in syscalls.data_segments(file.fileno()):
            found.update(f"{start} {end}".encode())
            for at in range(start, end, 1 << 20):
                found.update(os.pread(file.fileno(), min(1 << 20, end - at), at))
    return found.hexdigest()


async def settled(agent: Agent) -> tuple[int, int]:
    async with asyncio.timeout(20):
        while (state := await agent.hello(10))[0] != 2:
            pass
    return state


@pytest.mark.parametrize("kind", [pytest.param("qemu", marks=pytest.mark.long), "firecracker"])
def test_bad_files(kind: str, life: Life) -> None:
    life(bad_files, kind)


async def bad_files(one: Rig) -> None:
    """A state that was damaged, a disk that is gone, a hypervisor that dies: a typed error, and nothing is left of the try."""
    machine = await one.launched("first")
    agent = await one.woken(machine)
    snapshot = await one.saved(machine)
    agent.close()
    await machine.kill()
    for name in (DEVICES, "1.pages"):
        good = (snapshot / name).read_bytes()
        (snapshot / name).chmod(0o600)
        (snapshot / name).write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
        with pytest.raises(Damaged):
            await attempt(one, snapshot)
        (snapshot / name).write_bytes(good)
    overlay = one.snapshots.overlay("first")
    overlay.rename(overlay.with_name("away"))
    with pytest.raises(Missing):
        await attempt(one, snapshot)
    overlay.with_name("away").rename(overlay)
    machine = await one.prepared("first", 2, snapshot)
    os.kill(machine.record.pid, 9)
    with pytest.raises((NeverRan, Ended)):  # by when it is gone
        await machine.resume(wake_frame(1))
    await machine.wait()
    machine = await one.prepared("first", 2, snapshot)  # untouched by all of that
    (await one.woken(machine)).close()
    await machine.kill()


async def attempt(one: Rig, snapshot: Path) -> None:
    machine = await one.driver.standby(one.image)
    machine.record.session = "first"
    try:
        await machine.prepare(snapshot, one.snapshots.overlay("first"), await one.network.take())
        os.close(await machine.resume(wake_frame(1)))  # files are compared beside it
    finally:
        await machine.kill()


def test_a_qemu_that_ends_at_its_start_is_quoted(life: Life) -> None:
    life(ends_at_its_start, "qemu")


async def ends_at_its_start(one: Rig) -> None:
    """At each way to start: it says why on its standard error, and that is the error's text, whatever else is noticed of its end."""
    impossible = msgspec.structs.replace(one.shape, vcpus=IMPOSSIBLE)
    image = another(one, "impossible")
    manifest.write(image, manifest.Manifest(impossible, 1, 1, "qemu"))
    console = os.open("/dev/null", os.O_WRONLY)
    for _ in range(5):  # each time in another order: the end of its connection, of the process, and what was written
        with pytest.raises(Unavailable, match=f"did not start: .*Invalid SMP CPUs {IMPOSSIBLE}"):
            await one.driver.standby(image)
    with pytest.raises(Unavailable, match=f"did not start: .*Invalid SMP CPUs {IMPOSSIBLE}"):
        await one.driver.boot(image, impossible, await one.network.take(), console)
    await one.driver.forget_image(image.name)

    image = another(one, "stateless")
    (image / DEVICES).unlink()
    (image / DEVICES).write_bytes(b"no state")
    manifest.write(image, msgspec.structs.replace(manifest.peek(one.image), files=[]))
    for _ in range(5):
        machine = await one.driver.standby(image)
        with pytest.raises(Refused, match=r"devices\.state is not what was written, .*Not a migration stream"):
            await machine.prepare(image, image / one.driver.disk_template, await one.network.take())
        await machine.kill()
    await one.driver.forget_image(image.name)

    kept = next((one.image.parents[1] / "boots").iterdir())
    (kept / DEVICES).write_bytes(b"no state")
    (kept / "checksum").write_text(boot_snapshots._checksum(kept))
    with pytest.raises(Unavailable, match=r"did not boot: .*Not a migration stream"):
        await one.make().boot(image, one.shape, await one.network.take(), console)
    os.close(console)


def another(one: Rig, name: str) -> Path:
    """An image with the same files."""
    image = one.image.parent / name
    shutil.copytree(one.image, image, copy_function=os.link)
    (image / "manifest.json").unlink()
    manifest.write(image, manifest.read(one.image, "qemu"))
    (image / "boot.qcow2").unlink()
    shutil.copy(one.image / "boot.qcow2", image / "boot.qcow2")
    return image


DYING_WORDS = 'Error: RunWithApi(FailedToBindAndRunHttpServer(ServerCreation("no room")))'
DIES = f"import sys; sys.exit({DYING_WORDS!r})"
ANSWERS_ONCE = f"""
import socket, sys
if "--version" in sys.argv:
    sys.exit()
server = socket.socket(socket.AF_UNIX)
server.bind("/api.sock")
server.listen()
client = server.accept()[0]
client.recv(65536)
client.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 23\\r\\n\\r\\n{{"state":"Not started"}}')
client.recv(65536)
sys.exit({DYING_WORDS!r})
"""


@pytest.mark.parametrize(
    ("name", "program"),
    [("firecracker.py", DIES), ("firecracker.py", ANSWERS_ONCE), ("jailer.py", DIES)],
    ids=["dies", "dies-later", "jailer"],
)
@pytest.mark.usefixtures("stand_in")
def test_a_firecracker_that_ends_at_its_start_is_quoted(name: str, program: str, life: Life) -> None:
    async def quoted(one: Rig) -> None:
        """Booted and as a clone; and its end is noticed, not waited for."""
        (one.directory / name).write_text(f"#!/usr/bin/python3\n{program}")
        (one.directory / name).chmod(0o755)
        paths = {"firecracker.py": CONTRACTS.firecracker, "jailer.py": CONTRACTS.jailer} | {name: one.directory / name}
        driver = one.make(Programs(paths["firecracker.py"], paths["jailer.py"]))
        overlay = one.snapshots.overlay("first")
        overlay.parent.mkdir(parents=True)
        disks.copy_overlay(one.image / driver.disk_template, overlay)
        async with asyncio.timeout(15):
            with pytest.raises(Unavailable, match=re.escape(DYING_WORDS)):
                await driver.boot(one.image, one.shape, await one.network.take(), asyncio.subprocess.DEVNULL)
            machine = await driver.standby(one.image)
            with pytest.raises(Unavailable, match=re.escape(DYING_WORDS)):
                await machine.prepare(one.image, overlay, await one.network.take())
            await machine.kill()

    life(quoted, "firecracker")


def processes(word: str) -> list[str]:
    """Those whose command line names it; ps(1) is no part of a bare Debian."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line.parent.name] if os.fsencode(word) in line.read_bytes() else []
    return found


def test_firecracker_is_probed_by_its_jailer(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> None:
    """Its guest speaks, and is ended; one that cannot be made is quoted; nothing is left of either."""
    monkeypatch.setattr(probe, "firecracker_programs", lambda: programs)
    device = Path("/dev/null") if programs is CONTRACTS else probe.KVM
    with place() as directory:
        cache = cache_of(directory)
        (cache / "firecracker-probe").unlink(missing_ok=True)
        settings = Settings(root=directory, cache=cache, oldest_firecracker="1.12.1")
        assets = FirecrackerAssets(cache)
        for path in (assets.kernel, assets.initrd):
            making.key_path(path).write_text("made")
        assert probe.why_not_firecracker(settings, device) == ""
        assets.kernel.write_bytes(b"no kernel")
        why = probe.why_not_firecracker(settings, device)
        assert re.fullmatch(r"no guest ran: Error: RunWithoutApiError\(BuildMicroVMFromJson\(StartMicroVM\(.*KernelLoader\(.*\)", why), why
        assert not list((directory / "jails").glob("*/*"))
        assert not processes(f"probe-{os.getpid()}")


def test_images_belong_to_their_hypervisor() -> None:
    with place() as directory:
        image = directory / "images/one"
        manifest.write(image, manifest.Manifest(SHAPE, 1, 1, "qemu"))
        with pytest.raises(Refused, match="made with qemu, and this host runs firecracker"):
            manifest.read(image, "firecracker")
        assert manifest.read(image, "qemu").shape == SHAPE


def test_the_contract_refuses_what_firecracker_refuses(life: Life) -> None:
    """The order of calls, unknown members, other paths: so that a driver that passed is one that obeys."""
    life(refusals, "firecracker")


async def refusals(one: Rig) -> None:
    machine = await one.launched("first")
    assert isinstance(machine, FirecrackerMachine)
    api: Api = machine.api
    said = await api.call("GET", "/")
    assert (said["app_name"], said["id"], said["state"], said["vmm_version"]) == ("Firecracker", machine.record.vm, "Paused", api.version)
    cases = [
        ("PUT", "/snapshot/create", {"snapshot_path": "/out/a", "mem_file_path": "/out/b", "kind": "Full"}, "unknown field `kind`"),
        ("PUT", "/snapshot/create", {"snapshot_path": "/out/a"}, "missing field `mem_file_path`"),
        ("PATCH", "/vm", {"state": "Stopped"}, "unknown variant `Stopped`"),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "/w.sock"}, "not supported after starting"),
        ("PUT", "/actions", {"action_type": "InstanceStart"}, "not supported after starting"),
        ("PUT", "/snapshot/load", {"snapshot_path": "/a", "mem_backend": {"backend_type": "File", "backend_path": "/b"}}, "after starting"),
        ("PUT", "/vm", {"state": "Paused"}, "Invalid request method and/or path"),
        ("PUT", "/machine-config", {"mem_size_mib": "128", "vcpu_count": 1}, 'invalid type: string "128"'),
    ]
    for method, path, body, words in cases:
        with pytest.raises(ApiError, match=words):
            await api.call(method, path, body)
    await machine.pause()  # which it is
    agent = await one.woken(machine)
    with pytest.raises(ApiError, match="Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"):
        await api.put("/snapshot/create", snapshot_path="/out/a", mem_file_path="/out/b")
    await machine._let_run()  # which it does
    with pytest.raises(ConnectionResetError, match="nobody listens"):
        await asyncio.wait_for(connected(machine, VSOCK_PORT + 1), 20)
    assert await agent.hello(10) == (0, 0)
    agent.close()
    await machine.kill()

    fresh = await spawned(one)
    loads: list[tuple[dict[str, object], str]] = [
        ({"mem_backend": {"backend_type": "File", "backend_path": "/y"}, "kind": 1}, "unknown field `kind`"),
        ({"mem_backend": {"backend_type": "Disk", "backend_path": "/y"}}, "unknown variant `Disk`"),
        ({}, "either `mem_backend` or `mem_file_path` is required"),
    ]
    if fresh.api.version.startswith("1.12."):
        loads.append(
            (
                {"mem_backend": {"backend_type": "File", "backend_path": "/y"}, "track_dirty_pages": True},
                "unknown field `track_dirty_pages`",
            )
        )
    for body, words in loads:
        with pytest.raises(ApiError, match=words):
            await fresh.api.put("/snapshot/load", snapshot_path="/x", **body)
    with pytest.raises(ApiError, match="not supported before starting"):
        await fresh.api.patch("/vm", state="Paused")
    with pytest.raises(ApiError, match="The kernel file cannot be opened: No such file"):
        await fresh.api.put("/boot-source", kernel_image_path="/nowhere")
    with pytest.raises(ApiError, match="Cannot start microvm without kernel configuration"):
        await fresh.api.put("/actions", action_type="InstanceStart")
    await fresh.api.put("/vsock", guest_cid=3, uds_path="/v.sock")
    with pytest.raises(ApiError, match="not allowed after configuring"):
        await fresh.api.put("/snapshot/load", snapshot_path="/x", mem_backend={"backend_type": "File", "backend_path": "/y"})
    await fresh.kill()

    for path, overrides, words in (
        ("/x", [], "Failed to open snapshot file: No such file"),
        (f"/{STATE}", [{"iface_id": "other", "host_dev_name": "tap0"}], "Unknown Network Device"),
    ):
        fresh = await spawned(one)
        with pytest.raises(ApiError, match=words):  # and it ends
            await fresh.api.put(
                "/snapshot/load",
                snapshot_path=path,
                mem_backend={"backend_type": "File", "backend_path": f"/{MEMORY}"},
                network_overrides=overrides,
            )
        async with asyncio.timeout(10):
            await fresh.wait()


async def spawned(one: Rig) -> FirecrackerMachine:
    """One that was told nothing yet, and finds a state and its memory."""
    fresh = await one.driver.standby(one.image)
    assert isinstance(fresh, FirecrackerMachine)
    fresh.jail.give(one.image / DEVICES, STATE)
    await fresh.spawn(await one.network.take())
    return fresh


async def connected(machine: FirecrackerMachine, port: int) -> str:
    """What is said of a connection to a port of the guest."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, f"{machine.api.path}/{VSOCK}")
        await asyncio.get_running_loop().sock_sendall(sock, f"CONNECT {port}\n".encode())
        said = await asyncio.get_running_loop().sock_recv(sock, 64)
    if not said:
        raise ConnectionResetError("nobody listens")
    return said.decode()


@pytest.mark.long
def test_the_kernel_for_firecracker_boots(tmp_path: Path) -> None:
    """The ELF file that is unpacked for it, by its PVH entry, which QEMU takes as well; and the initramfs with its modules."""
    cache = Settings().cache
    elf, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.extract_elf(cache / "kernel/vmlinuz", elf)
    kernel.make_initrd(cache / "kernel", cache / "guest/init", initrd, kernel.FIRECRACKER_MODULES)
    done = subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-M", "q35", "-m", "256", "-nodefaults", "-nographic", "-no-user-config",
         "-no-reboot", "-serial", "stdio", "-kernel", elf, "-initrd", initrd, "-append", "console=ttyS0 reboot=t panic=-1"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace")
    assert "find /dev/vda" in said and ".ko" not in said, said[-2000:]  # every module loaded; that machine has no disk
