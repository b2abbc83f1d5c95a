"""A host that a test scripts: what vmm does, without machines."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import defaultdict

from gateway import messages as m
from gateway.rpc import RpcError, RpcLost
from gateway.sessions.agent import frame

_HELLO, _STOP, _IS_HELLO, _WOKEN, _EXIT = 0x01, 0x0B, 0x81, 0x82, 0x84


class ScriptedHost:
    """Does what vmm does, without machines. `fail[call]` raises instead; `calls` says what was asked, with the stored state.

    Each session has a ledger, in its memory and on its disk, which counts its runs. A guest that is started from a snapshot compares the
    two, as databases do: they differ where the disk was written to after the snapshot was made.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.prepared: list[str] = []
        self.released: list[tuple[str, int, bool, bool]] = []
        self.fail: dict[str, list[Exception]] = {}
        self.held: dict[str, m.SessionState] = {}
        self.snapshots: dict[str, int] = {}
        self.disks: dict[str, int] = {}  # by session: the ledger on its disk, for as long as its files are here
        self.memories: dict[str, int] = {}  # by session: the ledger in its newest snapshot
        self.torn: list[str] = []  # sessions whose ledgers differed
        self.images: list[str] = []
        self.marked = m.Marks("", "")
        self.aside: dict[str, m.Quarantined] = {}
        self.kept: dict[str, tuple[int, int]] = {}  # by session that is aside: its ledgers
        self.stored: dict[str, str] = {}
        self.guests: list[socket.socket] = []
        self.heeds: dict[str, asyncio.Event] = {}  # by session: applications that heed a stop signal, and when they end then
        self.block: dict[str, asyncio.Event] = {}
        self.reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by call: it was made
        self.lose: dict[str, int] = {}  # by call: how many answers are lost, after what was asked for has been done
        self.looks = 0  # at the room that there is
        self.application = (1, 0)  # as an agent that is connected to again has it
        self.memory_available = 64 << 30

    async def _call(self, name: str, session: str) -> None:
        self.calls.append(f"{name} {self.stored.get(session, '-')}")
        self.reached[name].set()
        if name in self.block:
            await self.block[name].wait()
        if self.fail.get(name):
            raise self.fail[name].pop(0)

    def _answer(self, name: str) -> None:
        if self.lose.get(name):
            self.lose[name] -= 1
            raise RpcLost(f"{name}: no answer in 30 s")

    async def prepare(self, session: str, incarnation: int, image: str, from_snapshot: bool, egress: object = None, size: int = 0) -> None:
        await self._call("prepare", session)
        held = self.held.get(session)
        if held is not None and held.incarnation != incarnation and held.phase != "warm":
            raise RpcError("Unavailable", f"session {session} is held by incarnation {held.incarnation}")
        if from_snapshot and session not in self.snapshots:
            raise RpcError("Missing", f"session {session} has no snapshot on this host")
        if not from_snapshot:
            self.disks[session] = self.memories[session] = 0
        self.prepared.append(session)
        self.held[session] = m.SessionState(session, incarnation, "prepared", 0, 0.0)
        self._answer("prepare")

    async def start(self, session: str, incarnation: int, wake: bytes, size: int = 0) -> int:
        await self._call("start", session)
        held = self.held.get(session)
        if held is None or held.incarnation != incarnation:
            raise RpcError("NeverRan", f"the hypervisor that was prepared for session {session} is gone")
        if held.phase == "prepared":
            self._run(held)
        self._answer("start")
        ours, guest = socket.socketpair()
        self.guests.append(guest)
        guest.sendall(woken(wake))
        asyncio.get_running_loop().add_reader(guest, self._heard, session, guest)
        return ours.detach()

    def _run(self, held: m.SessionState) -> None:
        """What was saved is void from now on."""
        held.phase = "running"
        if self.memories[held.session] != self.disks[held.session]:
            self.torn.append(held.session)
        self.disks[held.session] += 1
        if self.snapshots.get(held.session, held.incarnation) < held.incarnation:
            del self.snapshots[held.session]

    def _heard(self, session: str, guest: socket.socket) -> None:
        """What a running guest is told: of that HELLO and the order to stop are answered."""
        data = guest.recv(1 << 16)
        if not data:
            asyncio.get_running_loop().remove_reader(guest)
        elif len(data) >= 8 and data[4] == _HELLO:
            guest.sendall(frame(_IS_HELLO, data[-8:] + struct.pack("<Ii", 1, 0)))
        elif len(data) >= 8 and data[4] == _STOP:
            self.calls.append(f"stop signal {self.stored.get(session, '-')}")
            heeds = self.heeds.get(session)
            guest.sendall(frame(_WOKEN, data[-8:] + struct.pack("<II", heeds is not None, 0)))
            if heeds is not None:
                task = asyncio.get_running_loop().create_task(heeds.wait())
                task.add_done_callback(lambda done: done.cancelled() or guest.sendall(frame(_EXIT, struct.pack("<i", 0))))

    async def unpause(self, session: str, incarnation: int) -> None:
        await self._call("unpause", session)
        self.held[session].phase = "running"
        self.snapshots.pop(session, None)

    async def agent(self, session: str, incarnation: int) -> int:
        """Of a guest that runs: it answers HELLO, its application is up."""
        await self._call("agent", session)
        ours, guest = socket.socketpair()
        self.guests.append(guest)

        def answer() -> None:
            data = guest.recv(1 << 16)
            if len(data) >= 8:
                guest.sendall(frame(_IS_HELLO, data[-8:] + struct.pack("<Ii", *self.application)))
            else:
                asyncio.get_running_loop().remove_reader(guest)

        asyncio.get_running_loop().add_reader(guest, answer)
        return ours.detach()

    async def socket(self, session: str, incarnation: int) -> socket.socket:
        """Of a guest whose application answers no hook: its connection is never made."""
        await asyncio.Event().wait()
        raise AssertionError

    async def claim(self, ahead: str, session: str, incarnation: int, egress: object) -> None:
        await self._call("claim", session)
        self.held[session] = m.SessionState(session, incarnation, self.held.pop(ahead).phase, 0, 0.0)
        self.disks[session], self.memories[session] = self.disks.pop(ahead), self.memories.pop(ahead)

    async def pause(self, session: str, incarnation: int) -> None:
        await self._call("pause", session)
        self.held[session].phase = "prepared"

    async def services(self, session: str, incarnation: int, is_named: bool = False) -> list[socket.socket]:
        return []

    async def suspend(self, session: str, incarnation: int, size: int = 0) -> m.Suspended:
        await self._call("suspend", session)
        held = self.held.get(session)
        if held is None or held.incarnation != incarnation:
            raise RpcError("Ended", f"session {session} has no hypervisor of incarnation {incarnation}")
        held.phase = "stopped"
        self.snapshots[session] = incarnation
        self.memories[session] = self.disks[session]
        self._answer("suspend")
        return m.Suspended(10, 20, 30, 0.01)

    async def kill(self, session: str, incarnation: int) -> None:
        await self._call("kill", session)
        self.held.pop(session, None)
        self._answer("kill")

    async def release_vm(self, session: str, incarnation: int, keep_warm: bool, parked: bool) -> None:
        self.released.append((session, incarnation, keep_warm, parked))
        self.reached["release_vm"].set()
        if "release_vm" in self.block:
            await self.block["release_vm"].wait()
        if self.fail.get("release_vm"):
            raise self.fail["release_vm"].pop(0)
        await self.kill(session, incarnation)

    async def forget(self, session: str) -> None:
        await self._call("forget", session)
        self._drop(session)

    def _drop(self, session: str) -> None:
        for table in (self.held, self.snapshots, self.disks, self.memories):
            table.pop(session, None)

    async def quarantine(self, session: str, incarnation: int, image: str, reason: str) -> m.Quarantined:
        await self._call("quarantine", session)
        if session in self.disks:
            at = float(len(self.aside))
            self.aside[session] = m.Quarantined(session, incarnation, image, reason, at, 1 << 20, self.snapshots.get(session, 0))
            self.kept[session] = self.memories[session], self.disks[session]
            self._drop(session)
            self._answer("quarantine")
        elif session not in self.aside:
            raise RpcError("Missing", f"session {session} has no files, here or set aside")
        return self.aside[session]

    async def quarantined(self) -> list[m.Quarantined]:
        return list(self.aside.values())

    async def recover(self, session: str, size: int = 0) -> m.Quarantined:
        await self._call("recover", session)
        record = self.aside.get(session)
        if record is None and session in self.disks:  # done, and the answer was lost
            self._answer("recover")
            return m.Quarantined(session, 0, "", "", 0.0, 0, self.snapshots[session])
        if record is None or not record.snapshot:
            raise RpcError("Missing", f"session {session} has no snapshot among its files")
        self.memories[session], self.disks[session] = self.kept.pop(session)
        self.snapshots[session] = record.snapshot
        del self.aside[session]
        self._answer("recover")
        return record

    async def marks(self) -> m.Marks:
        return self.marked

    async def mark(self, instance: str) -> None:
        await self._call("mark", instance)
        self.marked = m.Marks(instance, instance)

    async def quarantine_image(self, image: str, reason: str) -> None:
        await self._call("quarantine_image", image)
        self.images.remove(image)

    async def release_quarantined(self, session: str) -> None:
        await self._call("release_quarantined", session)
        self.aside.pop(session, None)
        self.kept.pop(session, None)

    def free(self) -> tuple[int, int, int]:
        self.looks += 1
        return self.memory_available, 1 << 40, 1 << 40

    async def reclaim_capacity(self) -> m.Capacity:
        return m.Capacity(self.memory_available, 1 << 40, 1 << 40, 96 << 20)

    async def warm(self) -> list[m.SessionState]:
        return [one for one in self.held.values() if one.phase == "warm"]

    async def state(self) -> m.HostState:
        return m.HostState(list(self.held.values()), self.snapshots, self.images, [])


def woken(wake: bytes) -> bytes:
    """The agent's answer to a wake frame: its nonce back."""
    (nonce,) = struct.unpack_from("<Q", wake, 12 + 8)
    return frame(_WOKEN, struct.pack("<Q", nonce))


class NoServices:
    """What answers a scripted guest: nothing."""

    def close(self) -> None:
        pass


async def no_services(*_: object) -> NoServices:
    return NoServices()
