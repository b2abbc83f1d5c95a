"""What control keeps of guests that run, what they may reach, whether there is room for one more, and where those go that sleep for long."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from scripted_host import ScriptedHost
from waiting import turns, until

from gateway import messages as m
from gateway.config import Egress, Limits, Settings
from gateway.rpc import RpcError, RpcLost
from gateway.sessions import channels as module
from gateway.sessions import host as hosting
from gateway.sessions import room as rooms
from gateway.sessions.agent import AgentError
from gateway.sessions.archive import Archive, ArchiveError
from gateway.sessions.channels import Channels
from gateway.sessions.egress import has_hosts, rules_of
from gateway.sessions.frame import frame
from gateway.sessions.logs import LogStore
from gateway.sessions.model import Archived, Connector, Session
from gateway.sessions.room import Room
from gateway.sessions.states import State
from gateway.sessions.store import Store
from gateway.tasks import Tasks

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"
INTERNET = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"
OUTPUT, EXIT, KILLED = 0x83, 0x84, 0x88


def session_of(**changes: Any) -> Session:
    return Session("s1", "h1", ARN, "1.0", "image", 512, 0.0, 3600, **{"state": State.RUNNING, "incarnation": 1, **changes})


class Services:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Rig:
    def __init__(self, directory: Path) -> None:
        self.host = ScriptedHost()
        self.logs = LogStore(directory / "logs")
        self.tasks = Tasks()
        self.exited: list[int] = []
        self.killed: list[str] = []
        self.gone: list[str] = []
        self.opened: list[Services] = []
        self.channels = Channels(
            self.host, Store(directory / "state.db"), Egress(), self.logs, self.tasks, self._open,  # type: ignore[arg-type]
            lambda session, code: self.exited.append(code), lambda session, line: self.killed.append(line),
            lambda session: self.gone.append(session.id),
        )  # fmt: skip
        self.guests: list[socket.socket] = []

    async def _open(self, session: Session, sockets: list[socket.socket], egress: m.EgressRules | None) -> Services:
        self.opened.append(Services())
        return self.opened[-1]

    def guest(self) -> int:
        """The host's end of a new channel."""
        ours, theirs = socket.socketpair()
        self.guests.append(theirs)
        return ours.detach()


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(module, "_SERVE_SECONDS", 0.0)
    one = Rig(tmp_path)
    yield one
    await one.tasks.close()
    one.channels.close_all()
    for guest in one.guests:
        guest.close()


async def test_a_guests_output_is_logged_and_its_end_is_told(rig: Rig) -> None:
    one = session_of(log_group="g", log_stream="s")
    agent = rig.channels.attach(one, rig.guest())
    rig.guests[0].sendall(frame(OUTPUT, b"a line\nhalf", 1) + frame(EXIT, struct.pack("<i", 3)))
    await until(lambda: rig.exited == [3])
    assert [event.m for event in rig.logs.read(one.account, "g", "s")[0]] == ["a line"]
    assert rig.channels.agent(one) is agent and rig.channels.is_attached(one)
    rig.channels.close(one)
    await turns()
    assert [event.m for event in rig.logs.read(one.account, "g", "s")[0]] == ["a line", "half"]
    with pytest.raises(AgentError):
        rig.channels.agent(one)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            b"Out of memory: Killed process 62 (hold) total-vm:1973120kB, anon-rss:1969220kB, file-rss:1052kB, shmem-rss:4kB, UID:0 pgtables:4kB",
            "out of memory: the guest's kernel killed hold, which held 1924 MiB",
        ),
        (
            b"Memory cgroup out of memory: Killed process 7 (a (b) c) total-vm:9kB, anon-rss:20480kB, file-rss:0kB, shmem-rss:0kB, UID:0",
            "a control group inside the guest is out of memory: the guest's kernel killed a (b) c, which held 20 MiB",
        ),
        (b"Out of memory: Killed process \xff", "out of memory: the guest's kernel killed a process"),
        (b"", "out of memory: the guest's kernel killed a process"),
    ],
)
async def test_what_a_guests_kernel_killed_is_told(rig: Rig, record: bytes, line: str) -> None:
    rig.channels.attach(session_of(), rig.guest())
    rig.guests[0].sendall(frame(KILLED, record))
    await until(lambda: rig.killed == [line])


async def test_only_a_running_sessions_agent_can_be_had(rig: Rig) -> None:
    one = session_of(state=State.SUSPENDING)
    rig.channels.attach(one, rig.guest())
    with pytest.raises(AgentError):
        rig.channels.agent(one)


async def test_a_guest_is_served_until_its_channel_goes(rig: Rig) -> None:
    one = session_of()
    rig.channels.attach(one, rig.guest())
    rig.channels.serve_guest(one)
    await rig.tasks.quiet()
    assert len(rig.opened) == 1 and not rig.opened[0].is_closed
    assert rig.channels.rested(one), "nothing sleeps with it"
    assert rig.opened[0].is_closed and not rig.channels.is_attached(one)


async def test_a_running_guest_whose_channel_ends_is_connected_to_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vsock may reset a connection that was just made; its shells go on, and the news of an application's end is asked for."""
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.0)
    one = session_of()
    agent = rig.channels.attach(one, rig.guest())
    edge = agent.shells.open(80, 24)
    asked = asyncio.ensure_future(agent.hello(10))
    await turns()
    rig.host.application = (2, 7)
    rig.guests[0].close()
    with pytest.raises(AgentError, match="channel closed"):
        await asked
    await until(lambda: rig.exited == [7])
    assert rig.channels.agent(one) is agent and not agent.closed.done() and agent.shells.count == 1
    rig.channels.close(one)
    edge.close()


@pytest.mark.parametrize("state", [State.RUNNING, State.SUSPENDING])
async def test_a_channel_that_nobody_makes_again_is_over(rig: Rig, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hypervisor has ended, or who suspends its session looks after it."""
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.0)
    one = session_of(state=state)
    agent = rig.channels.attach(one, rig.guest())
    rig.host.fail["agent"] = [RpcError("Ended", "gone")]
    rig.guests[0].close()
    await until(agent.closed.done)
    assert rig.host.calls == (["agent -"] if state is State.RUNNING else [])
    assert rig.gone == (["s1"] if state is State.RUNNING else [])


async def test_a_channel_is_made_again_however_long_the_host_is_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest went on without its log, its shells and the news of its end, where vmm took longer than some seconds to be back."""
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(hosting, "_AWAY_SECONDS", -1.0)
    monkeypatch.setattr(hosting, "_AWAY_RETRY_SECONDS", 0.0)
    one = session_of()
    agent = rig.channels.attach(one, rig.guest())
    rig.host.fail["agent"] = [RpcLost("away")] * 7 + [RpcError("Unavailable", "Too many open files")]
    rig.host.application = (2, 7)
    rig.guests[0].close()
    await until(lambda: rig.exited == [7])
    assert not agent.closed.done() and not rig.gone


async def test_services_that_open_late_are_closed(rig: Rig) -> None:
    one = session_of()
    rig.channels.attach(one, rig.guest())
    rig.channels.serve_guest(one)
    rig.channels.serve_guest(one)  # by who takes it over, too
    await rig.tasks.quiet()
    assert [services.is_closed for services in rig.opened] == [False, True]
    rig.channels.attach(one, rig.guest())
    assert rig.opened[0].is_closed, "they were of another incarnation"
    rig.channels.serve_guest(one)
    rig.channels.close(one)
    await rig.tasks.quiet()
    assert len(rig.opened) == 2


async def test_shells_sleep_with_their_session(rig: Rig) -> None:
    one = session_of()
    agent = rig.channels.attach(one, rig.guest())
    rig.channels.serve_guest(one)
    await rig.tasks.quiet()
    edge = agent.shells.open(80, 24)
    rig.channels.detach(one)
    async with asyncio.timeout(0.5):
        await rig.channels.stop(one, 60)  # nobody is asked: it sleeps
    assert not rig.channels.rested(one) and rig.opened[0].is_closed and rig.channels.is_attached(one)
    assert rig.channels.attach(one, rig.guest()) is agent and not agent.is_detached
    rig.channels.close(one)
    edge.close()


# ---- what a session may reach ----


def connector(store: Store, subnets: list[str], groups: list[str] | None = None) -> str:
    arn = "arn:aws:lambda:us-east-1:123456789012:network-connector:c"
    store._records["connectors"][arn] = Connector(
        arn, "c", "name", {"VpcEgressConfiguration": {"SubnetIds": subnets, "SecurityGroupIds": groups}}, "role", "ACTIVE", 0.0
    )
    return arn


async def test_what_connectors_let_a_session_reach(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    settings = Egress(subnets={"subnet-a": ["10.0.0.0/8"]}, security_groups={"sg-web": ["tcp:443"]})
    assert rules_of(settings, store, [INTERNET]) == m.EgressRules()
    assert rules_of(settings, store, []) is None
    assert rules_of(Egress(closed=True), store, [INTERNET]) is None
    arn = connector(store, ["subnet-a", "subnet-unknown"], ["sg-web"])
    assert rules_of(settings, store, [arn]) == m.EgressRules(False, ["10.0.0.0/8"], ["tcp:443"])
    assert not has_hosts(rules_of(settings, store, [arn])) and not has_hosts(None)
    named = Egress(subnets={"subnet-none": []}, security_groups={"sg-web": ["tcp:443", "https:api.example.org"]})
    connector(store, ["subnet-none"], ["sg-web"])
    assert rules_of(named, store, [arn]) == m.EgressRules(False, [], ["tcp:443"], ["https:api.example.org"])
    assert has_hosts(rules_of(named, store, [arn]))
    connector(store, ["subnet-unknown"])
    assert rules_of(settings, store, [arn]) is None, "it names nothing that is there"
    store._records["connectors"].clear()
    assert rules_of(settings, store, [arn]) is None, "it was deleted"


# ---- room ----


async def test_room_is_asked_for_behind_an_answer_that_was_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises then is nobody's; it is asked again all the same."""
    monkeypatch.setattr(rooms, "_SHOWS_SECONDS", 0.0)
    monkeypatch.setattr(rooms, "_PLENTY_SECONDS", -1.0)
    host, tasks, asked = ScriptedHost(), Tasks(), 0

    async def capacity() -> m.Capacity:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RpcError("Unavailable", "not now")
        if asked == 2:
            raise ValueError("unexpected")
        return m.Capacity(host.memory_available, 1 << 40, 1 << 40, 96 << 20)

    host.reclaim_capacity = capacity  # type: ignore[method-assign]
    room = Room(host, Limits(), tasks)  # type: ignore[arg-type]
    for expected in (1, 2, 3):
        room._asked = -1000.0
        assert await room.take()
        await until(lambda expected=expected: asked == expected)
        await tasks.quiet()


@pytest.mark.parametrize(
    ("memory", "disk", "inodes", "lack"),
    [
        (64 << 30, 1 << 40, 1 << 20, ""), (1 << 30, 1 << 40, 1 << 20, "memory: 1024 MiB are available, limits.reserve_mib is "),
        (64 << 30, 1 << 20, 1 << 20, "disk: 1 MiB are free, limits.disk_reserve_mib is "),
        (64 << 30, 1 << 40, 999, "inodes: 999 are free on the disk"),
    ],
)  # fmt: skip
async def test_memory_disk_and_inodes_decide(memory: int, disk: int, inodes: int, lack: str) -> None:
    """Whoever is refused is told what there is not enough of."""
    host = ScriptedHost()
    host.memory_available = memory
    host.free = lambda: (memory, disk, inodes)  # type: ignore[method-assign]

    async def capacity() -> m.Capacity:
        return m.Capacity(memory, disk, inodes, 96 << 20)

    host.reclaim_capacity = capacity  # type: ignore[method-assign]
    room = Room(host, Limits(), Tasks())  # type: ignore[arg-type]
    assert await room.take() is (not lack) and room.lack.startswith(lack)


async def test_a_launch_leaves_others_what_their_disks_may_grow_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sleeps may still wake. What was admitted lately is not yet among the disks that vmm has looked at."""
    host, gib = ScriptedHost(), 1 << 30
    host.free = lambda: (64 * gib, 20 * gib, 1 << 20)  # type: ignore[method-assign]

    async def capacity() -> m.Capacity:
        return m.Capacity(64 * gib, 20 * gib, 1 << 20, 96 << 20, disk_owed=8 * gib)

    host.reclaim_capacity = capacity  # type: ignore[method-assign]
    room = Room(host, Limits(disk_percent=50), Tasks())  # type: ignore[arg-type]
    await room._ask()
    assert await room.take(is_new=True, disk=8 * gib) and await room.take(is_new=True, disk=8 * gib)
    assert not await room.take(is_new=True, disk=8 * gib) and await room.take(), "19 are free, 8 and twice 4 are owed"
    assert room.lack == "disk: 20480 MiB are free, of which 16384 are kept for disks that grow (limits.disk_percent)"
    room._new_disks[0] = (0.0, room._new_disks[0][1])  # it is among vmm's now
    assert await room.take(is_new=True, disk=8 * gib)
    free = Room(host, Limits(disk_percent=0), Tasks())  # type: ignore[arg-type]
    assert all([await free.take(is_new=True, disk=8 * gib) for _ in range(9)])


async def test_who_is_new_is_refused_first_where_descriptors_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sleeps may still wake with the last ones."""
    host = ScriptedHost()
    vmm, own = 1 << 20, 1 << 20

    async def capacity() -> m.Capacity:
        return m.Capacity(64 << 30, 1 << 40, 1 << 40, 96 << 20, vmm)

    host.reclaim_capacity = capacity  # type: ignore[method-assign]
    monkeypatch.setattr(rooms, "descriptors_free", lambda: own)
    room = Room(host, Limits(), Tasks())  # type: ignore[arg-type]
    await room._ask()
    assert await room.take(is_new=True)
    vmm = 270
    await room._ask()
    assert not await room.take(is_new=True) and await room.take()
    assert room.lack.startswith("descriptors: 270 are free, ")
    vmm, own = 1 << 20, 3
    await room._ask()
    assert not await room.take(is_new=True) and await room.take()


# ---- the archive ----


class ObjectStore:
    """What boto3's client does, with a dictionary."""

    def __init__(self) -> None:
        self.buckets: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.is_away = False

    def _asked(self) -> None:
        if self.is_away:
            raise EndpointConnectionError(endpoint_url="http://away")

    def list_buckets(self) -> dict[str, Any]:
        self._asked()
        return {"Buckets": [{"Name": name} for name in self.buckets]}

    def create_bucket(self, Bucket: str) -> None:
        self.buckets.append(Bucket)

    def upload_fileobj(self, file: Any, bucket: str, key: str, **more: Any) -> None:
        self._asked()
        self.objects[key] = file.read()

    def download_fileobj(self, bucket: str, key: str, file: Any, **more: Any) -> None:
        self._asked()
        file.write(self.objects[key])

    def delete_object(self, Bucket: str, Key: str) -> None:
        self._asked()
        del self.objects[Key]


class PackingHost:
    def __init__(self) -> None:
        self.unpacked: list[bytes] = []

    async def pack(self, session: str, incarnation: int, target: int, size: int) -> m.Packed:
        os.write(target, b"files of " + session.encode())
        return m.Packed(11, hashlib.sha256(b"files of s1").hexdigest())

    async def unpack(self, session: str, digest: str, source: int, size: int) -> None:
        self.unpacked.append(os.pread(source, 1000, 0))


async def test_an_archive_goes_and_comes_back(tmp_path: Path) -> None:
    store, host = ObjectStore(), PackingHost()
    settings = Settings(root=tmp_path)
    settings.control_dir.mkdir()
    archive = Archive(settings, host, lambda: store)  # type: ignore[arg-type]
    key = archive.key(session_of())
    assert re.fullmatch(r"sessions/123456789012/s1/1-[0-9a-f]{8}\.tar\.zst", key) and key != archive.key(session_of())
    archived = await archive.store(session_of(), key)
    assert archived == Archived(key, 11, hashlib.sha256(b"files of s1").hexdigest())
    assert store.buckets == ["torpor-archive"] and store.objects == {archived.key: b"files of s1"}
    await archive.fetch(session_of(), archived)
    assert host.unpacked == [b"files of s1"] and not list((settings.control_dir / "archive").iterdir())
    store.is_away = True
    for work in (archive.store(session_of(), "again"), archive.fetch(session_of(), archived), archive.remove(archived.key)):
        with pytest.raises(ArchiveError, match="object store"):
            await work
    store.is_away = False
    await archive.remove(archived.key)
    assert store.objects == {}
