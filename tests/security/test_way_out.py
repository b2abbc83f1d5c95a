"""The wall around a link: a guest sends as itself, within connections, and to what its connector names.

Three namespaces stand for guest, link and world, with the link's real rules (vmm/egress.py) and packets that a guest's root makes by hand.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from namespaces import Namespace

from gateway.addresses import CLOSED
from gateway.messages import EgressRules
from vmm import egress
from vmm.egress import DEVICE, accepts_of, link_rules
from vmm.namespaces import run_nft
from vmm.network import GUEST_ADDRESS, HOST_ADDRESS, TAP

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
LINK, WORLD, TARGET, STRANGER = "100.64.0.3", "100.64.0.2", "203.0.113.5", "198.51.100.77"
SYN, FIN, RST, ACK = 0x02, 0x01, 0x04, 0x10


class Way:
    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self.guest, self.link, self.world = Namespace(), Namespace(), Namespace()
        self.link.inside(prepare)
        self.link.ip("link", "add", TAP, "type", "veth", "peer", "name", "eth0", "netns", self.guest.path)
        self.link.ip("link", "add", DEVICE, "type", "veth", "peer", "name", "w0", "netns", self.world.path)
        for one, device, address in (
            (self.link, TAP, f"{HOST_ADDRESS}/30"), (self.guest, "eth0", f"{GUEST_ADDRESS}/30"), (self.link, DEVICE, f"{LINK}/31"),
            (self.world, "w0", f"{WORLD}/31"), (self.world, "lo", f"{TARGET}/32"), (self.world, "lo", "168.63.129.16/32"),
        ):  # fmt: skip
            one.ip("addr", "add", address, "dev", device)
            one.ip("link", "set", device, "up")
        self.guest.ip("route", "add", "default", "via", HOST_ADDRESS)
        self.link.ip("route", "add", "default", "via", WORLD)
        self.world.ip("route", "add", STRANGER, "via", LINK)
        self.link.inside(lambda: _write("/proc/sys/net/ipv4/ip_forward", "1"))
        self.seen = self.world.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))

    def rules(self, text: str) -> None:
        self.link.inside(lambda: run_nft(text))

    def send(self, source: str, target: str, flags: int, port: int = 443) -> None:
        packet = _tcp(source, target, flags, port)

        def work() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                raw.sendto(packet, (target, 0))

        self.guest.inside(work)

    def arrived(self, target: str = TARGET) -> list[str]:
        """Sources of what came for `target`, until one more packet that passes for certain has come."""
        self.send(GUEST_ADDRESS, TARGET, SYN, 9)
        sources, deadline = [], time.monotonic() + 5
        while select.select([self.seen], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data = self.seen.recv(2048)
            source, to = (socket.inet_ntoa(data[at : at + 4]) for at in (12, 16))
            head = (data[0] & 15) * 4
            if data[9] == socket.IPPROTO_TCP and to == TARGET and struct.unpack_from("!H", data, head + 2)[0] == 9:
                return sources
            if to == target:
                sources.append(source)
        raise AssertionError("the last packet did not pass: nothing here shows anything")

    def close(self) -> None:
        self.seen.close()
        for one in (self.guest, self.link, self.world):
            one.close()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _tcp(source: str, target: str, flags: int, port: int) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!HHIIBBHHH", 40_000, port, 1, 1, 5 << 4, flags, 1024, 0, 0)
    check = _sum(ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head)) + head)
    head = head[:16] + struct.pack("!H", check) + head[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(head), 1, 0, 64, socket.IPPROTO_TCP, 0) + ends + head


@pytest.fixture
def way() -> Iterator[Way]:
    one = Way()
    yield one
    one.close()


def internet(monkeypatch: pytest.MonkeyPatch | None = None) -> str:
    """INTERNET_EGRESS, and where a patch is given, as it was: without the look at connections and sources."""
    if monkeypatch is not None:
        monkeypatch.setattr(egress, "NOT_OURS", "")
    closed = [one for one in CLOSED if one != "100.64.0.0/10"]  # where the world itself is
    return link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], closed)


@pytest.mark.parametrize("flags", [RST, SYN | FIN, SYN | RST, 0])
def test_what_belongs_to_no_connection_stays(way: Way, flags: int) -> None:
    """It is not translated: it left with whatever source the guest had given it."""
    way.rules(internet())
    for source in (GUEST_ADDRESS, STRANGER, WORLD):
        way.send(source, TARGET, flags)
    assert way.arrived() == []
    way.send(GUEST_ADDRESS, TARGET, SYN)
    assert way.arrived() == [LINK], "a connection leaves, as the link"


def test_without_the_look_it_leaves_as_somebody_else(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    way.rules(internet(monkeypatch))
    way.send(STRANGER, TARGET, SYN | RST)
    assert way.arrived() == [STRANGER]


def test_a_guest_has_one_source(way: Way) -> None:
    """Connections of another source would be translated to the link's address, and their answers be the link's to find a place for."""
    way.rules(internet())
    way.send(STRANGER, TARGET, SYN)
    assert way.arrived() == []


def test_without_the_look_other_sources_leave(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    way.rules(internet(monkeypatch))
    way.send(STRANGER, TARGET, SYN)
    assert way.arrived() == [LINK]


@pytest.mark.parametrize("is_walled", [True, False])
def test_azures_own_address_is_no_internet(way: Way, is_walled: bool) -> None:
    address = "168.63.129.16"
    closed = [one for one in CLOSED if one != "100.64.0.0/10" and (is_walled or not one.startswith(address))]
    way.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], closed))
    way.send(GUEST_ADDRESS, address, SYN)
    assert way.arrived(address) == ([] if is_walled else [LINK])


def test_networks_that_overlap_are_rules_all_the_same(way: Way) -> None:
    """A host in 168.63.0.0/16, say: nft takes no set whose ranges overlap, and no microVM had a way out."""
    way.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], [*CLOSED, "168.63.0.0/16", "10.7.0.0/16"]))


@pytest.mark.parametrize(("port", "passes"), [(443, True), (444, False), (22, False)])
def test_an_allow_list_is_one(way: Way, port: int, passes: bool) -> None:
    way.rules(link_rules(TAP, GUEST_ADDRESS, accepts_of(EgressRules(False, [f"{TARGET}/32"], ["tcp:443", "tcp:9"])), []))
    way.send(GUEST_ADDRESS, TARGET, SYN, port)
    assert way.arrived() == ([LINK] if passes else [])
