"""A microVM whose connector names hosts, without the microVM: namespaces stand for guest, link and world, with the link's real rules and
control's real resolver, decisions and relay between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from namespaces import Namespace

from gateway.addresses import CLOSED
from gateway.config import Settings
from gateway.guest import proxy, relay, resolver
from gateway.guest.egress_audit import EgressAudit
from gateway.guest.services import Guests
from gateway.messages import EgressRules
from gateway.peers import RELAY_ASKS_CONTROL
from gateway.rpc import Connection, Service
from vmm.egress import DEVICE, METADATA_ADDRESS, RELAY_PORT, accepts_of, link_rules, named_rules
from vmm.namespaces import run_nft
from vmm.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, _listening, _services, _sockets

NAME, ADDRESS = "api.example.org", "203.0.113.5"
OTHER, OTHERS_ADDRESS = "evil.example.com", "203.0.113.6"
PRIVATE = "10.9.0.7"
SERVER = "203.0.113.53"  # for names
_LINK, _WORLD = "100.64.0.3", "100.64.0.2"
_SECONDS = 10.0


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


class World:
    """Says to each client what it said; answers names. `heard` is what came, by address and port."""

    def __init__(self) -> None:
        self.namespace = Namespace()
        self.heard: list[tuple[str, int, bytes]] = []
        self.names: dict[str, list[str]] = {NAME: [ADDRESS], OTHER: [OTHERS_ADDRESS]}
        self.asked: list[str] = []
        self._sockets: list[socket.socket] = []
        self._clients: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self, ports: tuple[int, ...] = (80, 443, 8443, 5432), has_names: bool = True) -> None:
        for address in (ADDRESS, OTHERS_ADDRESS, PRIVATE, SERVER):
            self.namespace.ip("addr", "add", f"{address}/32", "dev", "lo")
        for port in ports:
            self._thread(self.bound(socket.SOCK_STREAM, "0.0.0.0", port), self._accept)
        if has_names:
            self._thread(self.bound(socket.SOCK_DGRAM, SERVER, 53), self._answer)

    def bound(self, kind: int, address: str, port: int) -> socket.socket:
        def make() -> socket.socket:
            one = socket.socket(socket.AF_INET, kind)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address, port))
            if kind == socket.SOCK_STREAM:
                one.listen(512)
            one.settimeout(0.2)
            return one

        return self.namespace.inside(make)  # type: ignore[no-any-return]

    def _thread(self, sock: socket.socket, work: Any) -> None:
        self._sockets.append(sock)
        self._threads.append(threading.Thread(target=work, args=(sock,), daemon=True))
        self._threads[-1].start()

    def _accept(self, listener: socket.socket) -> None:
        while listener.fileno() >= 0:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(_SECONDS)
            self._clients.append(client)
            thread = threading.Thread(target=self._echo, args=(client,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _echo(self, client: socket.socket) -> None:
        with client:
            address, port = client.getsockname()
            try:
                while data := client.recv(65536):
                    self.heard.append((address, port, data))
                    client.sendall(data)
            except OSError:
                return

    def _answer(self, sock: socket.socket) -> None:
        while sock.fileno() >= 0:
            try:
                data, peer = sock.recvfrom(4096)
            except TimeoutError:
                continue
            except OSError:
                return
            labels, at = [], 12
            while data[at]:
                labels.append(data[at + 1 : at + 1 + data[at]].decode("latin-1"))
                at += data[at] + 1
            name = ".".join(labels).lower()
            self.asked.append(name)
            found = self.names.get(name, [])
            records = b"".join(b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(one) for one in found)
            head = data[:2] + b"\x81" + (b"\x80" if found else b"\x83") + struct.pack(">HHHH", 1, len(found), 0, 0)
            sock.sendto(head + data[12 : at + 5] + records, peer)

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        for one in self._clients:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_SECONDS)
        self.namespace.close()


class InProcess(proxy.Proxy):
    """With a relay in this process, so that a test can take a wall of it away."""

    async def _run_once(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        other = Connection(theirs, Service(relay.Relay()))
        self._relay = mine = Connection(ours, Service(self).only(RELAY_ASKS_CONTROL))
        try:
            for session in list(self._served):
                await self._hand_over(mine, session)
            await asyncio.wait([mine.closed])
        finally:
            mine.close()
            other.close()
            self._relay = None


class NamedWay:
    """`hosts` of None: INTERNET_EGRESS."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guest, self.link, self.world = Namespace(), Namespace(), World()
        self.audit = EgressAudit(directory / "egress")
        self._directory = directory
        self._opened: list[Any] = []
        self.guests: Any = None
        self.issue: Any = None  # gives credentials, where the microVM has a role
        link, guest, world = self.link, self.guest, self.world.namespace
        link.ip("link", "add", TAP, "type", "veth", "peer", "name", "eth0", "netns", guest.path)
        link.ip("link", "add", DEVICE, "type", "veth", "peer", "name", "w0", "netns", world.path)
        for one, device, address in (
            (link, TAP, f"{HOST_ADDRESS}/30"), (guest, "eth0", f"{GUEST_ADDRESS}/30"), (link, DEVICE, f"{_LINK}/31"),
            (world, "w0", f"{_WORLD}/31"), (link, "lo", f"{METADATA_ADDRESS}/32"),
        ):  # fmt: skip
            one.ip("addr", "add", address, "dev", device)
            one.ip("link", "set", device, "up")
        guest.ip("route", "add", "default", "via", HOST_ADDRESS)
        link.ip("route", "add", "default", "via", _WORLD)
        link.inside(lambda: write("/proc/sys/net/ipv4/ip_forward", "1"))
        connected = resolver._connected
        monkeypatch.setattr(resolver, "_connected", lambda server: world.inside(lambda: connected(server)))

    async def open(
        self, *hosts: str, networks: tuple[str, ...] = (), ports: tuple[str, ...] = (), closed: tuple[str, ...] = CLOSED,
        is_walled: bool = True, process: bool = False, account: str = "1", guests: Guests | None = None,
    ) -> None:  # fmt: skip
        rules = EgressRules(False, list(networks), list(ports), list(hosts)) if is_walled else EgressRules()
        text = link_rules(TAP, GUEST_ADDRESS, accepts_of(rules) if is_walled else ["ip protocol tcp"], [])
        text += named_rules(TAP, GUEST_ADDRESS, (HOST_ADDRESS, METADATA_ADDRESS), rules, list(closed)) if closed else ""
        self.link.inside(lambda: run_nft(text))
        sockets = list(self.link.inside(_services))
        if rules.hosts:
            sockets.append(self.link.inside(lambda: _listening(HOST_ADDRESS, RELAY_PORT)))
        settings = Settings(root=self._directory, egress={"resolvers": [SERVER]})
        host = SimpleNamespace(socket=self._socket)
        self.guests = guests or Guests(settings, SimpleNamespace(of=lambda role, name: self.issue), None, host, self.audit)  # type: ignore[arg-type]
        if not process:
            self.guests._proxies[account] = InProcess()
        session = SimpleNamespace(id=f"vm-{account}", incarnation=1, account=account, execution_role="role" if self.issue else None)
        self._opened.append(await self.guests.for_session(session, sockets, rules))
        if rules.hosts:
            async with asyncio.timeout(30):
                while self.guests._proxies[account]._relay is None:
                    await asyncio.sleep(0.01)

    async def _socket(self, session: str, incarnation: int) -> socket.socket:
        return self.link.inside(lambda: _sockets(1)[0])  # type: ignore[no-any-return]

    # ---- what a guest does ----

    def socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        return self.guest.inside(lambda: socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK))  # type: ignore[no-any-return]

    async def say(self, address: str, port: int, *pieces: bytes, seconds: float = _SECONDS) -> bytes | None:
        """What comes back where a client says these; None where nobody answers, or it is reset."""
        loop = asyncio.get_running_loop()
        with self.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.timeout(seconds):
                    await loop.sock_connect(sock, (address, port))
                    for piece in pieces:
                        await loop.sock_sendall(sock, piece)
                        await asyncio.sleep(0.002 if len(pieces) > 1 else 0)
                    wanted, found = sum(map(len, pieces)), b""
                    while len(found) < wanted and (data := await loop.sock_recv(sock, 65536)):
                        found += data
                    return found
            except (OSError, TimeoutError):
                return None

    async def ask(self, name: str, kind: int = 1) -> tuple[int, list[str]] | None:
        """The resolver's code and addresses."""
        asked = b"\0\7\1\0\0\1\0\0\0\0\0\0" + b"".join(bytes([len(one)]) + one.encode() for one in name.split(".")) + b"\0"
        asked += struct.pack(">HH", kind, 1)
        loop = asyncio.get_running_loop()
        with self.socket(socket.SOCK_DGRAM) as sock:
            try:
                async with asyncio.timeout(_SECONDS):
                    await loop.sock_connect(sock, (HOST_ADDRESS, 53))
                    await loop.sock_sendall(sock, asked)
                    reply = await loop.sock_recv(sock, 4096)
            except (OSError, TimeoutError):
                return None
        count = int.from_bytes(reply[6:8], "big")
        return reply[3] & 15, [socket.inet_ntoa(reply[at + 12 : at + 16]) for at in range(len(asked), len(asked) + 16 * count, 16)]

    def lines(self, what: str = "connection") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.audit.read("1", "vm-1", 0)]
        return [line for line in found if line["what"] == what]

    def verdicts(self) -> list[tuple[str, str]]:
        return [(line["verdict"], line["reason"]) for line in self.lines() if line["verdict"] != "ended"]

    def shut(self) -> None:
        """The microVM sleeps."""
        for one in self._opened:
            one.close()
        self._opened.clear()

    async def close_services(self) -> None:
        self.shut()
        if self.guests is not None:
            await self.guests.close()

    async def close(self) -> None:
        await self.close_services()
        self.world.close()
        self.guest.close()
        self.link.close()
