"""The relay reads what guests send: who takes it over has the connections that it passes on, and nothing else of control's."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import messages as m
from gateway.guest import allowed_names, dns
from gateway.guest.allow_list import AllowList
from gateway.guest.allowed_names import AllowedNames
from gateway.guest.egress_audit import EgressAudit
from gateway.guest.proxy import Gate, Proxy, _Served
from gateway.peers import RELAY_ASKS_CONTROL
from gateway.rpc import Connection, RpcError, Service

OWN = "its own work"
RULES = m.EgressRules(False, [], [], ["https:api.example.org"])
ALL = [
    "read a file of control's", "write one", "connect", "make a socket", "make a pair", "signal control", "read control's memory",
    "start a program", OWN,
]  # fmt: skip


def tried(tmp_path: Path, is_confined: bool) -> list[str]:
    file = tmp_path / "keys.json"
    file.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        attack = Path(__file__).with_name("relay_attack.py")
        command = [sys.executable, str(attack), str(int(is_confined)), str(file), str(listener.getsockname()[1])]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_it_does_its_work_and_nothing_else(tmp_path: Path) -> None:
    assert tried(tmp_path, True) == [OWN]


def test_without_the_walls_it_is_control(tmp_path: Path) -> None:
    assert tried(tmp_path, False) == ALL


class Lies:
    """A relay that was taken over, and control's side of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.proxy = Proxy()
        self.made: list[socket.socket] = []
        self.audit = EgressAudit(tmp_path)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.ours = Connection(ours, Service(self.proxy).only(RELAY_ASKS_CONTROL))
        self.relay = Connection(theirs)
        gate = Gate(AllowedNames(RULES, self._ask, lambda *note: None), self.audit.of("1", "vm-1"), self._make)
        self.proxy._served["vm-1"] = _Served(gate, ours)

    async def _ask(self, question: bytes) -> bytes:
        identifier = dns.read_question(question)
        return dns.make_answer(identifier, dns.NOERROR, (ipaddress.IPv4Address("127.0.0.9"),), 60)

    async def _make(self) -> socket.socket:
        self.made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        return self.made[-1]

    async def decide(self, **parts: Any) -> tuple[int, list[int]]:
        question = {"session": "vm-1", "scheme": "https", "name": "api.example.org", "address": "127.0.0.9", "port": 443} | parts
        verdict, descriptors = await self.relay.call_with_descriptors("decide", question, m.RelayVerdict)
        return verdict.connection, descriptors

    def close(self) -> None:
        self.ours.close()
        self.relay.close()
        for one in self.made:
            one.close()


@pytest.fixture
async def lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lies]:
    monkeypatch.setattr(allowed_names, "is_internet", lambda address: True)  # loopback stands for it
    one = Lies(tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize(
    "parts",
    [
        {"session": "vm-2"},  # another account's: its relay has it
        {"name": "evil.example.com"},
        {"address": "127.0.0.1"},  # the host's, or anybody's
        {"address": "169.254.169.254"},
        {"address": "not one"},
        {"port": 444},
        {"scheme": "http"},
        {"scheme": "tcp", "name": ""},
        {"name": ""},
        {"fault": "it says so itself"},
    ],
)
async def test_a_relay_that_lies_reaches_what_groups_name_and_no_other(lies: Lies, parts: dict[str, Any]) -> None:
    """Control believes it no more than a guest: it decides, and connects."""
    assert await lies.decide(**parts) == (0, [])
    assert lies.made == []


async def test_it_gets_sockets_that_are_connected_to_what_groups_name(lies: Lies) -> None:
    """The control: what it may ask for it gets."""
    with socket.create_server(("127.0.0.9", 0)) as listener:
        port = listener.getsockname()[1]
        lies.proxy._served["vm-1"].gate.names.allow = AllowList([f"https:api.example.org:{port}"])
        number, descriptors = await lies.decide(port=port)
        with socket.socket(fileno=descriptors[0]) as connected:
            assert number == 1 and connected.getpeername() == ("127.0.0.9", port)
        for forged in (2, 99):
            await lies.relay.call("ended", m.RelayEnd(forged, 1 << 50, 0))
        await lies.relay.call("ended", m.RelayEnd(1, 5, 6))
        await lies.relay.call("ended", m.RelayEnd(1, 7, 8))
    ends = [line for line in map(json.loads, lies.audit.read("1", "vm-1", 0)) if line["verdict"] == "ended"]
    assert [(line["sent"], line["received"]) for line in ends] == [(5, 6)], "once, and of its own"


@pytest.mark.parametrize(
    "parts", [{"scheme": "ssh"}, {"name": "a" * 300}, {"port": 70_000}, {"session": "../../etc"}, {"address": "1" * 40}]
)
async def test_what_is_no_question_is_not_taken(lies: Lies, parts: dict[str, Any]) -> None:
    with pytest.raises(RpcError):
        await lies.decide(**parts)


@pytest.mark.parametrize("method", ["hello", "role_put", "shell", "egress_log", "serve", "stop"])
async def test_it_has_no_other_calls(lies: Lies, method: str) -> None:
    with pytest.raises(RpcError, match=method):
        await lies.relay.call(method, {})
