"""What outlives the processes of a simulated host: hypervisors with guests that count, links, objects; and the programs that it starts. No
fault strikes here."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.images import unpack
from gateway.sessions.frame import HEADER, MAGIC_BYTES, frame

PAGE = 4096
COUNTER = 7  # the page in which a guest counts; one more page is written each time
_HELLO, _WAKE, _SYNC, _STOP, _IS_HELLO, _WOKEN = 0x01, 0x02, 0x0A, 0x0B, 0x81, 0x82  # vmm/guest/port.h
_DOCKERFILE = 'FROM public.ecr.aws/lambda/microvms:al2023-minimal\nCMD ["/count"]\n'
_BUILT = {"Cmd": ["/count"]}
_STEP_SECONDS = 0.05  # of a program


@dataclass(eq=False)
class Hypervisor:
    """One process: `pages` are those that differ from its image's, `dirty` those since it was loaded."""

    vm: str
    pages: dict[int, bytes] = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    disk: int | None = None  # an open file, as a hypervisor has it: it stays through renames
    runs: bool = False
    is_unsaved: bool = False  # its guest has run since it was loaded, or saved
    is_gone: bool = False
    guests: list[socket.socket] = field(default_factory=list)
    ended: list[asyncio.Future[None]] = field(default_factory=list)  # who waits for its end

    @property
    def counter(self) -> int:
        page = self.pages.get(COUNTER)
        return struct.unpack_from("<Q", page)[0] if page else 0

    @property
    def counter_on_disk(self) -> int:
        assert self.disk is not None
        return os.fstat(self.disk).st_size - PAGE

    def count(self) -> int:
        """What a request does: the guest counts in its memory and on its disk."""
        assert self.runs and self.disk is not None, f"{self.vm} does not run"
        now = self.counter + 1
        self.write(COUNTER, struct.pack("<Q", now))
        self.write(100 + now, struct.pack("<Q", now))
        os.pwrite(self.disk, b"x", PAGE + now - 1)
        return now

    def write(self, page: int, data: bytes) -> None:
        self.pages[page] = data.ljust(PAGE, b"\0")
        self.dirty.add(page)

    def end(self) -> None:
        """It is killed, or ends by itself."""
        if self.is_gone:
            return
        self.is_gone, self.runs = True, False
        if self.disk is not None:
            os.close(self.disk)
            self.disk = None
        loop = asyncio.get_running_loop()
        for guest in self.guests:
            loop.remove_reader(guest)
            guest.close()
        for one in self.ended:
            if not one.done():
                one.set_result(None)

    def channel(self) -> int:
        """A descriptor of the agent's channel; the guest answers on it once it runs."""
        ours, guest = socket.socketpair()
        ours.setblocking(False)
        guest.setblocking(False)
        self.guests.append(guest)
        asyncio.get_running_loop().add_reader(guest, self._heard, guest)
        return ours.detach()

    def _heard(self, guest: socket.socket) -> None:
        if not self.runs:  # it reads when it goes on
            asyncio.get_running_loop().remove_reader(guest)
            return
        try:
            data = guest.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(guest)
            self.guests.remove(guest)
            guest.close()
            return
        at = data.find(MAGIC_BYTES)
        while 0 <= at <= len(data) - HEADER.size:
            _, kind, _, _, length = HEADER.unpack_from(data, at)
            start = at + HEADER.size
            with contextlib.suppress(OSError):  # whoever asked has gone
                self._answer(guest, kind, data[start : start + length])
            at = data.find(MAGIC_BYTES, start + length)

    def _answer(self, guest: socket.socket, kind: int, payload: bytes) -> None:
        if kind == _HELLO:
            guest.sendall(frame(_IS_HELLO, payload[:8] + struct.pack("<Ii", 1, 0)))
        elif kind == _WAKE:
            guest.sendall(frame(_WOKEN, payload[8:16]))
        elif kind == _SYNC:
            guest.sendall(frame(_WOKEN, payload[:8]))
        elif kind == _STOP:  # nothing in it heeds the signal
            guest.sendall(frame(_WOKEN, payload[:8] + struct.pack("<II", 0, 0)))

    def go_on(self) -> None:
        assert not self.is_gone
        self.runs = self.is_unsaved = True
        for guest in self.guests:
            asyncio.get_running_loop().add_reader(guest, self._heard, guest)


class Program:
    """A process that vmm or control has started: it does its work in a moment, unless it is killed before."""

    pid = 1 << 22  # no process has that number (proc_sys_kernel(5), pid_max)

    def __init__(self, arguments: tuple[str, ...], named: dict[str, Any]) -> None:
        self.returncode: int | None = None
        self.arguments, self.named = arguments, named

    async def wait(self) -> int:
        await asyncio.sleep(_STEP_SECONDS)
        if self.returncode is None:
            self.returncode = 0
            self.work()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            self.returncode = -9

    def work(self) -> None: ...


class Unpacker(Program):
    """python -m gateway.images.unpack."""

    def __init__(self, arguments: tuple[str, ...], named: dict[str, Any]) -> None:
        super().__init__(arguments, named)
        self.said: dict[str, str] = {}
        self.stdout = self.stderr = self

    async def read(self, size: int) -> bytes:
        """The end of both pipes, and once, of one of them, what it says."""
        await self.wait()
        said, self.said = self.said, {}
        return json.dumps(said).encode() if said else b""

    def work(self) -> None:
        archive, target, *bounds = self.arguments[3:]
        self.said = unpack.answer(Path(archive), Path(target), *(int(float(bound)) for bound in bounds))


class Slirp(Program):
    """Is ready at once."""

    def __init__(self, arguments: tuple[str, ...], named: dict[str, Any]) -> None:
        super().__init__(arguments, named)
        (ready,) = (one.partition("=")[2] for one in arguments if one.startswith("--ready-fd="))
        os.write(int(ready), b"1")


class Jail(Program):
    """build-jail.sh: builds a container, and leaves its disk."""

    def __init__(self, arguments: tuple[str, ...], named: dict[str, Any]) -> None:
        super().__init__(arguments, named)
        os.write(named["stdout"], b"STEP 1/1: CMD\n")
        (phases,) = (one for one in arguments if one.startswith(f"/proc/{os.getpid()}/fd/"))
        os.write(int(phases.rpartition("/")[2]), b"CONTAINER\n")

    def work(self) -> None:
        out = next(Path(word) for word in self.arguments if word.endswith("/out"))
        (out / "disk.raw").write_bytes(b"\0" * PAGE)
        (out / "config.json").write_text(json.dumps(_BUILT))
        (out / "code_bytes").write_text("1")


def program(arguments: tuple[str, ...], named: dict[str, Any]) -> Program:
    kinds = {"nsenter": Jail, "unshare": Slirp, sys.executable: Unpacker}
    return kinds[arguments[0]](arguments, named)


def artifact() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("Dockerfile", _DOCKERFILE)
    return made.getvalue()


@dataclass
class World:
    hypervisors: dict[str, Hypervisor] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)  # of an object store
    wrong: list[str] = field(default_factory=list)  # what no session may see
    unsaved: set[str] = field(default_factory=set)  # sessions whose hypervisor has ended with what was nowhere else

    def hypervisor(self, vm: str) -> Hypervisor:
        made = self.hypervisors[vm] = Hypervisor(vm)
        return made

    def alive(self) -> list[Hypervisor]:
        return [one for one in self.hypervisors.values() if not one.is_gone]

    def end(self) -> None:
        for one in self.alive():
            one.end()
