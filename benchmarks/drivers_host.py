"""Inside the machine of `make bench-drivers`: both drivers under KVM, and Firecracker by hand, in turn; then what a launch touches.

A line of JSON for each figure, on standard output. By hand is Firecracker's API on the driver's own files, without jailer, user, control
group, checksums or record: a process is started, loads, and runs. `hand_woken` also has the guest's clock and randomness set, as every
clone must have, in the exchange that its vsock needs after a load.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from by_hand import ByHand, merged  # noqa: E402
from report import figure, note, percentile, percentiles  # noqa: E402
from touched import touched  # noqa: E402

from gateway.config import Egress, Settings  # noqa: E402
from gateway.messages import Shape  # noqa: E402
from gateway.observe.steps import Steps  # noqa: E402
from gateway.sessions.agent import Agent, start_frames, sync_frame, wake_frame  # noqa: E402
from vmm import disks, probe, seals  # noqa: E402
from vmm.cgroups import Cgroups  # noqa: E402
from vmm.driver import Driver, Machine  # noqa: E402
from vmm.firecracker.driver import Assets as FirecrackerAssets  # noqa: E402
from vmm.firecracker.driver import FirecrackerDriver  # noqa: E402
from vmm.namespaces import inside  # noqa: E402
from vmm.network import GUEST_ADDRESS, Link, Network  # noqa: E402
from vmm.qemu.driver import Assets as QemuAssets  # noqa: E402
from vmm.qemu.driver import QemuDriver  # noqa: E402
from vmm.sandboxes import SandboxAllocator  # noqa: E402
from vmm.snapshots import Snapshots  # noqa: E402

ROUNDS, CLONES, PORT = int(os.environ.get("ROUNDS", "7")), 10, 8080
ROUNDS_SECONDS = 600.0  # no further one is begun after that
SHAPE = Shape(memory_mib=512, vcpus=1, disk_bytes=64 << 20, accelerator="kvm", baseline_mib=512)
FIRST_USER = 700_000 + 6 * 262_144
_SECONDS = 120.0
_DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "etc", "var", "root")
_REQUEST = b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n"


async def first_byte(ready: socket.socket) -> None:
    """Connects with a socket of the guest's link, asks, and returns when the answer begins. The guest may not listen yet."""
    loop = asyncio.get_running_loop()
    await loop.sock_connect(ready, (GUEST_ADDRESS, PORT))
    await loop.sock_sendall(ready, _REQUEST)
    if not await loop.sock_recv(ready, 1):
        raise ConnectionResetError("the application closed the connection")


@dataclass
class Side:
    """One driver with an image of the small server, sealed once it has answered."""

    name: str
    driver: Driver
    network: Network
    directory: Path
    seen: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.image = self.directory / self.name / "images/one"
        self.image.mkdir(parents=True)
        self.snapshots = Snapshots(self.directory / self.name / "sessions")
        self.launched = 0

    def record(self, what: str, seconds: float) -> None:
        self.seen.setdefault(what, []).append(seconds * 1000)

    async def socket(self, link: Link) -> socket.socket:
        """Made ahead, as the service's are; of IPv4, whatever the link has."""
        (one,) = await self.network.sockets(link, 1)
        if one.family == socket.AF_INET:
            return one
        one.close()
        return inside(link.path, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))

    async def make_image(self, disk: Path) -> None:
        shutil.copy(disk, self.image / "disk.raw")
        (self.image / "code_bytes").write_text("1", encoding="ascii")
        console = os.open(self.image / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        link = await self.network.take()
        machine = await self.driver.boot(self.image, SHAPE, link, console)
        os.close(console)
        machine.record.session = "booting"
        agent = Agent(await machine.agent(), lambda channel, data: None, lambda code: note(f"{self.name}: the server ended: {code}"))
        await agent.hello(_SECONDS)
        await self.driver.give_disk(machine, self.image)
        for one in start_frames([("arg", "/server"), ("user", ""), ("dir", "/"), ("stop", "15")]):
            agent.send(one)
        async with asyncio.timeout(_SECONDS):
            while True:
                ready = await self.socket(link)
                with ready, contextlib.suppress(OSError):
                    await first_byte(ready)
                    break
                await asyncio.sleep(0.1)
        nonce = secrets.randbits(63)
        done = agent.expect(nonce)
        agent.send(sync_frame(nonce))
        await asyncio.wait_for(done, _SECONDS)
        await self.driver.seal(machine, self.image)
        agent.close()
        await self.network.release(link)

    async def load(self, what: str, session: str, incarnation: int, source: Path) -> tuple[Machine, Link]:
        """Until the first byte of an answer; what the service makes ahead is there before."""
        machine = await self.driver.standby(self.image)
        link = machine.take_link() or await self.network.take()
        machine.record.session, machine.record.incarnation = session, incarnation
        nonce = secrets.randbits(63)
        with await self.socket(link) as ready:
            machine.steps = Steps("vmm", what)
            started = time.perf_counter()
            await machine.prepare(source, self.snapshots.overlay(session), link)
            agent = Agent(await machine.resume(wake_frame(nonce, reset_tcp=False)), lambda channel, data: None, lambda code: None)
            await asyncio.wait_for(agent.expect(nonce), _SECONDS)
            await first_byte(ready)
            self.record(what, time.perf_counter() - started)
        self.keep(machine, what)
        await machine.checked()
        agent.close()
        return machine, link

    def keep(self, machine: Machine, what: str) -> None:
        for step in machine.steps.steps:
            self.seen.setdefault(f"{what}: {step.what}", []).append(step.took_ms)

    async def launch(self, what: str = "launch") -> tuple[Machine, Link]:
        self.launched += 1
        session = f"{self.name}-{self.launched}"
        overlay = self.snapshots.overlay(session)
        overlay.parent.mkdir(parents=True)
        disks.copy_overlay(self.image / self.driver.disk_template, overlay)
        return await self.load(what, session, 1, self.image)

    async def suspend(self, machine: Machine, link: Link) -> Path:
        """Returns the snapshot; its process has ended."""
        session, number = machine.record.session, machine.record.incarnation
        started = time.perf_counter()
        machine.steps = Steps("vmm", "suspend")
        work = self.snapshots.begin(session)
        written = await machine.save(work)
        self.snapshots.commit(session, number, work, machine.record.chain, written, machine.record.made)
        machine.steps.mark("committed")
        self.record("suspend", time.perf_counter() - started)
        self.keep(machine, "suspend")
        await self.end(machine, link)
        return self.snapshots.newest(session)

    async def end(self, machine: Machine, link: Link) -> None:
        await machine.kill()
        await self.network.release(link)

    async def clones(self) -> None:
        """Each page of memory counts for as much as its share is of those who have it (proc(5), Pss)."""
        running = [await self.launch("launch_of_a_clone") for _ in range(CLONES)]
        sizes = [share(machine.record.pid) for machine, _ in running]
        figure(f"{self.name}_clones_{CLONES}_memory", sum(sizes) / 2**20, "MiB", "guests", CLONES * SHAPE.memory_mib)
        self.seen["clones_memory"] = [float(sum(sizes))]
        for machine, link in running:
            await self.end(machine, link)


def share(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def make_disk(directory: Path) -> Path:
    """The small server, and nothing else."""
    root, disk = directory / "root", directory / "disk.raw"
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    server = REPO / "benchmarks/guest/server.c"
    subprocess.run(["musl-gcc", "-static", "-O2", "-o", root / "server", server], check=True, timeout=300)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk, f"{SHAPE.disk_bytes >> 20}M"], check=True, timeout=300)
    return disk


@contextlib.asynccontextmanager
async def sides(directory: Path) -> AsyncIterator[tuple[Side, Side]]:
    cache, programs = Settings().cache, probe.firecracker_programs()
    assert programs is not None, "firecracker and jailer are not on the path"
    made = []
    for number, name in enumerate(("qemu", "firecracker")):
        place = directory / name
        place.mkdir()
        cgroups = Cgroups(f"bench-{name}", place)
        cgroups.start()
        network = Network(place / "netns", Egress(closed=True), f"bench-{name}")
        sandboxes = SandboxAllocator(place / "vms", cgroups, FIRST_USER + 4096 * number)
        driver: Driver
        if name == "qemu":
            driver = QemuDriver(QemuAssets(cache), place / "boots", sandboxes, cgroups, network)
        else:
            (place / "jails").mkdir()
            driver = FirecrackerDriver(programs, FirecrackerAssets(cache), place / "jails", sandboxes, cgroups, network=network)
        network.start(set(), 2, driver.takes_taps)
        made.append((Side(name, driver, network, directory), cgroups))
    try:
        yield made[0][0], made[1][0]
    finally:
        for side, cgroups in made:
            await side.network.close(is_empty=True)
            await side.driver.forget_image(side.image.name)
            cgroups.close()


async def one_round(qemu: Side, firecracker: Side, hand: ByHand, number: int) -> None:
    """Whoever goes first finds what the one before has left in caches: so they take turns."""
    order = (qemu, firecracker) if number % 2 else (firecracker, qemu)
    snapshots = {}
    for side in order:
        snapshots[side.name] = await side.suspend(*await side.launch())
    for is_woken in (False, True):
        await hand.launch(firecracker.image, is_woken)
    saved, session = snapshots["firecracker"], f"firecracker-{firecracker.launched}"
    memory = merged(firecracker.image, saved, hand.directory / "merged.raw")
    disk = hand.directory / "disk-of-the-sleeper.raw"
    disks.copy_overlay(firecracker.snapshots.overlay(session), disk)
    for is_woken in (False, True):
        await hand.resume(memory, saved, disk, is_woken)
    for side in order:
        await side.end(*await side.load("resume", f"{side.name}-{side.launched}", 2, snapshots[side.name]))


def report(qemu: Side, firecracker: Side, hand: ByHand) -> None:
    for what in ("launch", "resume", "suspend"):
        ours = firecracker.seen[what]
        percentiles(f"qemu_{what}", qemu.seen[what], "ms", "firecracker", ours)
        percentiles(f"firecracker_{what}", ours, "ms", "hand", hand.seen[what])
        if f"{what}_woken" in hand.seen:
            woken = hand.seen[f"{what}_woken"]
            percentiles(f"firecracker_{what}", ours, "ms", "hand_woken", woken)
            figure(f"hand_{what}_woken", percentile(woken, 0.5), "ms", "hand", percentile(hand.seen[what], 0.5))
    for name, seen in (("qemu", qemu.seen), ("firecracker", firecracker.seen), ("hand", hand.seen)):
        for what, values in seen.items():
            if ": " in what:
                figure(f"{name}_{what}", percentile(values, 0.5), "ms")


async def main() -> None:
    seals.use(seals.new())
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir="/var/tmp") as place:
        directory = Path(place)
        disk = make_disk(directory)
        async with sides(directory) as (qemu, firecracker):
            for side in (qemu, firecracker):
                note(f"{side.name}: making the image")
                await side.make_image(disk)
            hand = ByHand(directory / "hand", firecracker.network, firecracker.socket, first_byte)
            began = time.monotonic()
            for number in range(ROUNDS):
                note(f"round {number + 1} of {ROUNDS}, {time.monotonic() - began:.0f} s after the first")
                await one_round(qemu, firecracker, hand, number)
                if time.monotonic() - began > ROUNDS_SECONDS:
                    break
            figure("rounds", number + 1, "rounds")
            report(qemu, firecracker, hand)
            for side in (qemu, firecracker):
                note(f"{side.name}: {CLONES} clones")
                await side.clones()
            ratio = qemu.seen["clones_memory"][0], firecracker.seen["clones_memory"][0]
            figure("qemu_clones_memory", ratio[0] / 2**20, "MiB", "firecracker", ratio[1] / 2**20)
            note("what a launch touches")
            await touched(hand, firecracker.image)


if __name__ == "__main__":
    asyncio.run(main())
