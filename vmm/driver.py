"""What every hypervisor driver can do, and the values that pass between it and the daemon.

A *snapshot* is a directory: device state, memory diff, overlay (vmm/memory.py, vmm/disks.py). An *image* is a directory
under `images/` with the full memory, the disks and the device state of the machine that all its clones start from.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from gateway.messages import Sealed, Shape
from gateway.observe.steps import Steps

from .diffs import Sum
from .network import Link
from .provenance import Provenance

DEVICES = "devices.state"  # of an image or a snapshot: the state of the machine's devices
WALL_CLOCK_AT = 12  # in a wake message, behind the frame's header (vmm/guest/wake.h)
VSOCK_PORT = 1024  # of the guest's vsock, where its agent has no virtio-serial port
GUEST_CID = 3
_HELLO = (0x52505254, 0x01)  # the magic number and kind of a frame that its agent answers whatever it does
UNSAVED = ("starting", "running", "stopped")  # phases of a process that may have what is nowhere else

__all__ = ["Driver", "Machine", "Process", "Sealed", "Shape", "hello"]


def hello() -> bytes:
    """Makes a frame that a guest's agent answers, with a nonce that nobody waits for (vmm/guest/port.h)."""
    return struct.pack("<IBBHIQ", _HELLO[0], _HELLO[1], 0, 0, 8, secrets.randbits(63))


class Process(msgspec.Struct):
    """One hypervisor process, as recorded in its directory so that a restarted daemon finds it again."""

    vm: str
    pid: int
    started: int
    image: str
    uid: int
    session: str = ""
    incarnation: int = 0
    link: str = ""
    phase: str = "standby"  # standby, prepared, starting, running, stopped, warm, ended
    memory: tuple[int, int] = (0, 0)  # where the guest's lies in the process: first address, and the one after
    chain: list[int] = []  # the diffs that lie mapped over it
    shape: Shape | None = None
    unchecked: str = ""  # a snapshot whose diffs have yet to be compared with their checksums
    saved: bool = False  # a snapshot was taken of this incarnation; it may have been called off
    image_memory: tuple[int, int] = (0, 0)  # which file that is (vmm/memory.py)
    made: Provenance | None = None  # what its states are made by; an image's features are in its manifest alone


class Machine(Protocol):
    """A hypervisor process that holds, or is about to hold, one session."""

    record: Process
    steps: Steps

    def save_record(self) -> None:
        """Writes the record where a restarted daemon finds it."""

    def take_link(self) -> Link | None:
        """Returns the link in which a standby's process waits already: it is the caller's from then on, and its session's. None where the
        session's own will do."""

    async def prepare(self, snapshot: Path, overlay: Path, link: Link) -> None:
        """Gives a standby the session's disk, network, changed pages and device state (an image has no changed pages). It does
        not run yet. Raises VmmError: Unavailable for all that says nothing about the snapshot, and leaves that as it was."""

    async def resume(self, wake: bytes) -> int:
        """Writes the wake message, lets the guest run, returns a connected descriptor of the agent's channel. Where a channel may lose
        what is written to it, the message is repeated until the guest has answered, whose agent carries it out once (its nonce). Raises
        Ended, Damaged for a snapshot that turns out to be so, Unavailable where it may be asked for again."""

    async def checked(self) -> None:
        """Returns when the files that a running guest was loaded from have been compared with their checksums. Raises Damaged, Missing,
        Unavailable."""

    async def agent(self) -> int:
        """Returns the agent's channel of a running guest, for a control that restarted."""

    async def save(self, directory: Path) -> list[Sum]:
        """Stops the guest; writes device state and changed pages into `directory`, synced."""

    async def pause(self) -> None:
        """Stops a guest that runs; it is prepared again, and `resume` lets it go on."""

    async def unpause(self) -> None:
        """Lets a guest that was stopped for a snapshot run on."""

    async def kill(self) -> None:
        """Ends the process and waits until it is gone."""

    async def wait(self) -> None:
        """Returns when the process has ended, however it did."""


class Driver(Protocol):
    """One hypervisor. Implementations: vmm.qemu, vmm.firecracker."""

    @property
    def name(self) -> str:
        """As manifests of its images have it."""

    @property
    def disk_template(self) -> str:
        """The file of an image that a new session's disk is a copy of."""

    @property
    def takes_taps(self) -> bool:
        """Whether its processes are given open taps; otherwise they open them themselves, and nobody else may have them open."""

    async def standby(self, image: Path, link: Link | None = None) -> Machine:
        """Returns a process that waits for a session of this image; `link` is that session's, where it is known."""

    async def boot(self, image: Path, shape: Shape, link: Link, console: int) -> Machine:
        """Boots an image's machine for the first time, up to where its agent answers and waits for its disk."""

    async def give_disk(self, machine: Machine, image: Path) -> None:
        """The agent of a booted machine has answered: it gets its disk, which it enters when it is told of its application."""

    async def seal(self, machine: Machine, image: Path, account: str = "") -> Sealed:
        """Stops a booted machine and stores memory and device state as the image that clones start from."""

    async def adopt(self, record: Process) -> Machine | None:
        """Finds a process that another daemon started; None when it is gone."""

    def records(self) -> list[Process]:
        """Every process that a daemon of this instance recorded, alive or not."""

    async def forget_image(self, image: str) -> None:
        """Lets go of what is kept for an image's clones; those that still run keep theirs."""

    def counts(self) -> Mapping[str, int]:
        """What its hypervisors have counted since this daemon started, by name; these only grow."""
