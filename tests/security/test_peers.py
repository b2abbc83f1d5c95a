"""The wall between our own processes: an edge or a control that was taken over has the calls of its own work, and names that lead nowhere.

A stand-in with that process's user tries every call of its peers. Taken away by name: the table of who may call what
(gateway/peers.py), the types of names (gateway/messages.py) with the look at each name (vmm/beneath.py).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from stand_in import STRAYS, body_for, connected, fields_of, reachable
from vmm_rig import Rig

from gateway import messages as m
from gateway import peers
from gateway.accounts.admin import Admin
from gateway.control import Control, listen
from gateway.rpc import Connection, RpcError, Server, Service
from vmm import beneath, serving
from vmm.daemon import Vmm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sockets have other users' processes at their ends")
NAMES = (m.SessionId, m.ImageKey, m.BuildId, m.AsideName)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """vmm with its real calls, files and socket, and no machines."""
    one = Rig(tmp_path, monkeypatch)
    one.settings.runtime.mkdir(parents=True)
    (one.settings.images_dir / "image/manifest.json").touch()
    (tmp_path / "root/victim").mkdir()
    yield one
    await one.vmm._tasks.close()


def listening(rig: Rig, server: Server) -> Server:
    reachable(rig.settings.vmm_socket)
    return server


def unbounded(calls: Any) -> Service:
    """The calls, taking whatever is sent: names are texts."""
    service = serving.service(calls)

    def taken(kind: Any) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return kind
        loose = msgspec.defstruct(
            kind.__name__,
            [(field.name, Any, field.default if not field.required else msgspec.NODEFAULT) for field in msgspec.structs.fields(kind)],
        )
        return loose

    service.methods = {name: (handler, taken(kind), wants) for name, (handler, kind, wants) in service.methods.items()}
    return service


# ---- who may call what ----


async def test_an_edge_gets_sockets_of_vmm_and_nothing_else(rig: Rig) -> None:
    """With the edge's user, each of vmm's calls but `sockets` is refused, and no file goes."""
    server = listening(rig, serving.listen(rig.settings, rig.vmm.calls))
    edge = await connected(rig.settings.vmm_socket, rig.settings.users.edge)
    methods = serving.service(rig.vmm.calls).methods
    assert len(methods) > 30, "there is something to try"
    for name, (_, kind, _) in methods.items():
        with pytest.raises(RpcError) as refused:
            await edge.call(name, body_for(kind))
        assert refused.value.kind == ("Ended" if name == "sockets" else "NotOffered"), name
    with pytest.raises(RpcError):
        await edge.call("image_delete", m.ImageName("image"))
    assert (rig.settings.images_dir / "image").exists()
    edge.close()
    server.close()


async def test_without_the_table_an_edge_deletes_an_image(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "EDGE_ASKS_VMM", frozenset(serving.service(rig.vmm.calls).methods))
    server = listening(rig, serving.listen(rig.settings, rig.vmm.calls))
    edge = await connected(rig.settings.vmm_socket, rig.settings.users.edge)
    await edge.call("image_delete", m.ImageName("image"))
    assert not (rig.settings.images_dir / "image").exists()
    edge.close()
    server.close()


async def test_other_users_are_not_even_listened_to(rig: Rig) -> None:
    server = listening(rig, serving.listen(rig.settings, rig.vmm.calls))
    for uid in (rig.settings.users.store, rig.settings.users.machines, rig.settings.users.builders, 65534):
        stranger = await connected(rig.settings.vmm_socket, uid)
        with pytest.raises(RpcError) as refused:
            await stranger.call("host_info")
        assert refused.value.kind == "RpcLost", "the connection was closed"
        stranger.close()
    control = await connected(rig.settings.vmm_socket, rig.settings.users.control)
    assert await control.call("host_info", None, m.HostInfo)
    control.close()
    server.close()


def test_every_call_of_control_is_somebodys_and_of_one_peer_only() -> None:
    offered = {name[4:] for target in (Control, Admin) for name in dir(target) if name.startswith("rpc_")}
    tables = [peers.EDGE_ASKS_CONTROL, peers.VMM_ASKS_CONTROL, peers.ROOT_ASKS_CONTROL, peers.STORE_ASKS_CONTROL]
    assert sorted(name for table in tables for name in table) == sorted(offered)


async def test_an_edge_can_neither_end_a_session_nor_administer(tmp_path: Path) -> None:
    """`ended` is vmm's word, which ends any session; accounts, keys and logs are root's."""
    heard: list[str] = []

    class Stub:
        async def rpc_ended(self, connection: Connection, body: Any) -> None:
            heard.append("ended")

    for name in peers.EDGE_ASKS_CONTROL | peers.ROOT_ASKS_CONTROL | peers.STORE_ASKS_CONTROL:

        async def call(self: object, connection: Connection, body: Any, name: str = name) -> None:
            heard.append(name)

        setattr(Stub, f"rpc_{name}", call)
    users = SimpleNamespace(edge=640_000)
    settings = SimpleNamespace(users=users, control_socket=tmp_path / "socket")
    for is_walled in (True, False):
        heard.clear()
        service = Service(Stub())
        theirs = {640_000: service.only(peers.EDGE_ASKS_CONTROL)} if is_walled else {640_000: service}
        server = Server(settings.control_socket, service, theirs, theirs)
        reachable(settings.control_socket)
        edge = await connected(settings.control_socket, users.edge)
        for name in ("ended", *peers.ROOT_ASKS_CONTROL):
            if is_walled:
                with pytest.raises(RpcError, match="offered no such call"):
                    await edge.call(name)
            else:
                await edge.call(name)
        assert bool(heard) is not is_walled
        await edge.call("resume")
        assert heard[-1] == "resume"
        edge.close()
        server.close()


def test_controls_socket_is_served_by_these_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("gateway.control.Server", lambda *given: made.extend(given))
    control = object.__new__(Control)
    control.settings, control.directory, control.store = (
        SimpleNamespace(users=SimpleNamespace(edge=5, store=6), control_socket=tmp_path),
        None,
        None,
    )  # type: ignore[assignment]
    listen(control)
    assert {user: frozenset(service.methods) for user, service in made[3].items()} == {
        0: peers.ROOT_ASKS_CONTROL,
        5: peers.EDGE_ASKS_CONTROL,
        6: peers.STORE_ASKS_CONTROL,
    }
    assert set(made[2]) == {0, 5, 6}


# ---- names ----


def test_whatever_vmm_is_asked_has_bounds(rig: Rig) -> None:
    """Each text has a pattern or a length, each number both ends: nothing in a request can be a path, or a size that was never meant."""
    open_ended = []
    for method, (_, kind, _) in serving.service(rig.vmm.calls).methods.items():
        for where, type_, metas in fields_of(kind):
            if type_ in (str, bytes) and not any(meta.pattern or meta.max_length for meta in metas):
                open_ended.append(f"{method}{where}")
            if type_ is int and not any(meta.ge is not None and meta.le is not None for meta in metas):
                open_ended.append(f"{method}{where}")
    assert open_ended == []


@pytest.mark.parametrize("name", STRAYS)
def test_a_name_is_one_plain_component(name: str) -> None:
    for kind in NAMES:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(name, kind)


@pytest.mark.parametrize("name", ["", ".", "..", "../victim", "/etc", "a/b", "a\0b"])
def test_a_name_is_looked_at_again_where_it_is_used(tmp_path: Path, name: str) -> None:
    """The second layer, should a type be forgotten."""
    with pytest.raises(beneath.Stray):
        beneath.child(tmp_path, name)
    assert beneath.child(tmp_path, "uuid-1.0") == tmp_path / "uuid-1.0"


async def attack(rig: Rig, control: Connection) -> list[str]:
    """Control asks for what lies beside the images; returns what went wrong for it."""
    refused = []
    for method, body in (
        ("image_delete", {"image": "../victim"}), ("image_delete", {"image": str(rig.settings.root / "victim")}),
        ("forget", {"session": "../victim", "incarnation": 0}),
        ("quarantine_image", {"image": "../victim", "reason": ""}), ("release_quarantined", {"session": "../victim"}),
    ):  # fmt: skip
        try:
            await control.call(method, body)
        except RpcError as error:
            refused.append(error.kind)
    return refused


async def test_a_control_that_lies_moves_nothing_beside_its_directories(rig: Rig) -> None:
    server = listening(rig, serving.listen(rig.settings, rig.vmm.calls))
    control = await connected(rig.settings.vmm_socket, rig.settings.users.control)
    assert await attack(rig, control) == ["ValidationError"] * 5
    assert (rig.settings.root / "victim").exists()
    await control.call("image_delete", m.ImageName("image"))
    assert not (rig.settings.images_dir / "image").exists(), "what is its own it may delete"
    control.close()
    server.close()


async def test_without_the_types_the_second_layer_stands(rig: Rig) -> None:
    server = listening(rig, Server(rig.settings.vmm_socket, unbounded(rig.vmm.calls), {rig.settings.users.control}))
    control = await connected(rig.settings.vmm_socket, rig.settings.users.control)
    assert await attack(rig, control) == ["Stray"] * 5
    assert (rig.settings.root / "victim").exists()
    control.close()
    server.close()


async def test_without_both_layers_root_removes_what_control_names(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beneath, "child", lambda directory, name: directory / name)
    server = listening(rig, Server(rig.settings.vmm_socket, unbounded(rig.vmm.calls), {rig.settings.users.control}))
    control = await connected(rig.settings.vmm_socket, rig.settings.users.control)
    await attack(rig, control)
    assert not (rig.settings.root / "victim").exists()
    control.close()
    server.close()


@pytest.mark.parametrize("uid", ["control", "edge"])
async def test_whatever_is_said_the_daemon_answers_on(rig: Rig, uid: str) -> None:
    """Each call with bodies of other types, too few and too many descriptors, as a notification: the socket serves the next one."""
    server = listening(rig, serving.listen(rig.settings, rig.vmm.calls))
    user = getattr(rig.settings.users, uid)
    rig.host.give_disk = rig.host.seal = None  # type: ignore[attr-defined]  # no session is there to be given to them
    rig.host.counts = dict  # type: ignore[attr-defined]
    attacker = await connected(rig.settings.vmm_socket, user)
    calls = {
        name: call for name, call in serving.service(rig.vmm.calls).methods.items() if name not in ("leave", "prepare", "boot", "build")
    }
    for name, (_, kind, _) in calls.items():
        good = body_for(kind)
        bodies = [None, [], {}, "x", -1, 2**63, good]
        if isinstance(good, dict):
            bodies += [good | {field: value} for field in good for value in (None, -1, 2**62, "../x", "\0", [], {"a": 1})]
        for body in bodies:
            if attacker.closed.done():
                attacker = await connected(rig.settings.vmm_socket, user)
            if body is None:
                attacker.notify(name, body)
            try:
                await attacker.call(name, body, descriptors=[os.open("/dev/null", os.O_RDONLY)])
            except RpcError as error:
                assert error.kind not in ("KeyError", "TypeError", "AttributeError", "IndexError", "AssertionError"), f"{name} {body}"
    assert await (await connected(rig.settings.vmm_socket, rig.settings.users.control)).call("host_info", None, m.HostInfo)
    attacker.close()
    server.close()


# ---- what others may have put into a directory ----


def test_root_follows_no_link_in_a_directory_of_anothers(tmp_path: Path) -> None:
    """As a builder's output, which its daemon could have filled with links: by the wall nothing beyond is read, without it the secret is."""
    (tmp_path / "secret").write_text("secret")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "secret")
    (out / "up").symlink_to("..")
    os.mkfifo(out / "pipe")
    (out / "plain").write_text("plain")
    for name in ("link", "up/secret", "../secret", str(tmp_path / "secret"), "pipe", "."):
        with pytest.raises((OSError, beneath.Stray)):
            beneath.opened(out, name)
    with os.fdopen(beneath.opened(out, "plain")) as file:
        assert file.read() == "plain"
    assert (out / "link").read_text() == "secret", "the attack works where links are followed"


def test_vmm_is_what_is_tried_here(rig: Rig) -> None:
    assert isinstance(rig.vmm, Vmm)
