"""A stand-in for the outside, in network namespaces of the tests': an uplink, a server behind it, and a name server."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial

from namespaces import Namespace

SERVER = "198.51.100.7"  # TEST-NET-2: beyond the uplink's own networks
UPLINK = "203.0.113.1"  # TEST-NET-3: the uplink itself, as the guests' host
NEIGHBOUR = "203.0.113.2"  # in the uplink's own network
PRIVATE = "10.9.0.7"  # a network that only a connector opens
NAME_SERVER = "127.0.0.153"
PORT = 7777


class Outside:
    def __init__(self) -> None:
        self._uplink, self._beyond = Namespace(), Namespace()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def path(self) -> str:
        return self._uplink.path

    def start(self) -> None:
        self._uplink.ip("link", "add", "wan0", "type", "veth", "peer", "name", "lan0", "netns", self._beyond.path)
        self._uplink.ip("addr", "add", f"{UPLINK}/30", "dev", "wan0")
        self._uplink.ip("link", "set", "wan0", "up")
        self._beyond.ip("addr", "add", f"{NEIGHBOUR}/30", "dev", "lan0")
        self._beyond.ip("link", "set", "lan0", "up")
        for address in (SERVER, PRIVATE):
            self._beyond.ip("addr", "add", f"{address}/32", "dev", "lo")
            self._uplink.ip("route", "add", f"{address}/32", "via", NEIGHBOUR)
        for namespace in (self._uplink, self._beyond):
            for port in (PORT, PORT + 1):
                self._listen(namespace.inside(partial(bound, socket.SOCK_STREAM, ("0.0.0.0", port))))
            self._answer(namespace.inside(lambda: bound(socket.SOCK_DGRAM, ("0.0.0.0", PORT))), lambda data: data)
        self._answer(bound(socket.SOCK_DGRAM, (NAME_SERVER, 53)), name_answer)
        self._listen(bound(socket.SOCK_STREAM, (NAME_SERVER, 53)))

    def stop(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)
        for namespace in (self._uplink, self._beyond):
            namespace.close()

    def devices(self) -> list[str]:
        """The devices that lead to instances' microVMs."""
        listed = self._uplink.ip("-o", "link")
        return [line.split()[1].rstrip(":").partition("@")[0] for line in listed.splitlines() if line.split()[1].startswith("tp")]

    def addresses(self) -> str:
        return self._uplink.ip("-o", "-4", "addr")

    def rules(self) -> str:
        return subprocess.run(self._uplink.enter("nft", "list", "ruleset"), capture_output=True, text=True, check=True).stdout

    def _listen(self, listener: socket.socket) -> None:
        """Says to each client how it looks from here, and what it said."""

        def serve() -> None:
            while True:
                try:
                    client, peer = listener.accept()
                except OSError:
                    return
                with client:
                    client.settimeout(5)
                    with contextlib.suppress(OSError):
                        client.sendall(f"{peer[0]} {client.recv(100).decode()}".encode())

        self._start(listener, serve)

    def _answer(self, sock: socket.socket, reply: Callable[[bytes], bytes]) -> None:
        sock.settimeout(0.2)

        def serve() -> None:
            while sock.fileno() >= 0:
                try:
                    data, peer = sock.recvfrom(4096)
                    sock.sendto(reply(data), peer)
                except TimeoutError:
                    continue
                except OSError:
                    return

        self._start(sock, serve)

    def _start(self, sock: socket.socket, serve: Callable[[], None]) -> None:
        self._sockets.append(sock)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self._threads.append(thread)


def name_answer(question: bytes) -> bytes:
    """An A record of SERVER for every name that is asked for IPv4, none for others (RFC 1035)."""
    end = question.index(b"\0", 12) + 5
    (kind,) = struct.unpack(">H", question[end - 4 : end - 2])
    record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(SERVER) if kind == 1 else b""
    return question[:2] + b"\x81\x80" + struct.pack(">HHHH", 1, 1 if record else 0, 0, 0) + question[12:end] + record


def bound(kind: int, address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    one = Outside()
    try:
        one.start()
        yield one
    finally:
        one.stop()
