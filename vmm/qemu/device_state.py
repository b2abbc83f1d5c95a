"""The state of a QEMU machine's devices: into the process over a socket, out of it into a file in memory.

Both ends are there from the process's start, so that a resume and a suspend have nothing to make.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from gateway import executors

from .. import seals
from ..diffs import Sum
from . import machine as topology
from .qmp import Qmp, QmpError

FILE = "torpor-state"  # the name of the memfd
_LOAD_SECONDS = 30
_ENDING_SECONDS = 1.0
_MOST_BYTES = 256 << 20  # some 100 KiB, as a rule; more is no state of ours


class StateRefused(QmpError):
    """QEMU read a state of devices and did not take it."""


class DeviceState:
    """`file` is what QEMU writes the state to; it is closed with this."""

    def __init__(self, file: int) -> None:
        self._file: int | None = file
        self._incoming: socket.socket | None = None  # where QEMU waits for a state
        self._loaded: asyncio.Future[str] | None = None

    def close(self) -> None:
        if self._incoming is not None:
            self._incoming.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    async def give_file(self, qmp: Qmp) -> None:
        """Gives the file to a process that another daemon started: QEMU forgets descriptor sets that nothing uses when a connection
        ends. Raises QmpError, OSError."""
        with contextlib.suppress(QmpError):
            await qmp.run("remove-fd", fdset_id=topology.STATE_SET)
        await qmp.give("add-fd", os.dup(self._open()), fdset_id=topology.STATE_SET)

    async def await_load(self, qmp: Qmp) -> None:
        """Has QEMU load a state as it comes over a socket. Raises QmpError."""
        self._loaded = asyncio.get_running_loop().create_future()
        self._incoming, theirs = socket.socketpair()
        self._incoming.settimeout(_LOAD_SECONDS)
        await qmp.give("getfd", theirs.detach(), fdname="state")
        await qmp.run("migrate-incoming", uri="fd:state")

    def note_loaded(self, status: str) -> None:
        """QEMU has said what became of a load: completed or failed."""
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(status)

    async def load(self, qmp: Qmp, path: Path) -> None:
        """The state is loaded when its event says so: asking again and again would hold up who loads it. Raises QmpError, OSError."""
        assert self._loaded is not None
        sent = asyncio.ensure_future(executors.LATENCY.run(self._send, path))
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())  # where it was refused, that says more
        await asyncio.wait([self._loaded, qmp.closed], timeout=_LOAD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not self._loaded.done():
            raise QmpError("the hypervisor has ended" if qmp.closed.done() else f"device state not loaded in {_LOAD_SECONDS} s")
        if self._loaded.result() != "completed":
            await asyncio.wait([qmp.closed], timeout=_ENDING_SECONDS)  # it ends when it has said why
            raise StateRefused("the hypervisor refused the device state")
        await sent

    def _send(self, path: Path) -> None:
        assert self._incoming is not None
        with self._incoming, path.open("rb") as file:
            self._incoming.sendfile(file)

    def empty(self) -> None:
        """Empties the file. Raises QmpError, OSError."""
        file = self._open()
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)  # QEMU goes on where it was

    def save(self, qmp: Qmp) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        """Returns what is answered when the guest has stopped, and when its state is written to the file, which is empty.

        The first answer says that QEMU has been round its loop, so that what the host sent before (the ends of connections) lies in
        the guest's ring, and with it in the snapshot. `live` off: disks stay open, and `cont` need not activate them again.
        """
        stopped = asyncio.ensure_future(qmp.run("stop"))
        filename = f"/dev/fdset/{topology.STATE_SET}"
        saved = asyncio.ensure_future(qmp.run("xen-save-devices-state", filename=filename, live=False))
        for future in (stopped, saved):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # whichever is waited for first
        return stopped, saved

    def store(self, path: Path) -> Sum:
        """Writes what QEMU wrote to `path`, and does not sync. Raises QmpError, OSError."""
        written = self._open()
        size = os.fstat(written).st_size  # the hypervisor has it open: nothing of it is believed
        if not 0 < size <= _MOST_BYTES:
            raise QmpError(f"the hypervisor wrote a device state of {size} bytes")
        with open(f"/proc/self/fd/{written}", "rb") as file:
            state = file.read(_MOST_BYTES)
        os.ftruncate(written, 0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(state)
        checksum = seals.Checksum()
        checksum.update(state)
        return Sum(path.name, len(state), checksum.digest())

    def _open(self) -> int:
        if self._file is None:
            raise QmpError("the hypervisor has ended")
        return self._file
