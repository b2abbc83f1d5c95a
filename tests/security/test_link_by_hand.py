"""The link itself: what a guest's root can send on it by hand, beside what its filter is for (test_way_out.py).

There is one guest on a link, so that nobody on it is to be deceived but the host's end; and nothing passes on from there but TCP over IPv4,
whole and as it is. What arrives in the world is looked at there, until a packet has come that passes for certain.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from test_way_out import LINK, STRANGER, SYN, TARGET, WORLD, Way, _sum, _tcp
from test_way_out import _write as write

from gateway.addresses import CLOSED
from vmm.egress import link_rules
from vmm.namespaces import run_batch
from vmm.network import _SO_RCVBUFFORCE, GUEST_ADDRESS, GUEST_ADDRESS6, GUEST_MAC, HOST_ADDRESS, HOST_ADDRESS6, HOST_MAC, TAP, harden

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
ARP, VLAN, IPV4, IPV6 = 0x0806, 0x8100, 0x0800, 0x86DD
OTHER_MAC, BROADCAST = "02:fc:00:00:00:99", "ff:ff:ff:ff:ff:ff"
INSIDE = "10.9.0.7"
LAST = 9  # the port of a packet that passes for certain
ALL = 3  # ETH_P_ALL


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def frame(kind: int, body: bytes, source: str = GUEST_MAC, target: str = HOST_MAC) -> bytes:
    return mac(target) + mac(source) + struct.pack("!H", kind) + body


def ip(source: str, target: str, protocol: int, body: bytes, ttl: int = 64, options: bytes = b"", fragment: int = 0) -> bytes:
    """`fragment`: the field of flags and offset."""
    length = 20 + len(options)
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x40 | length // 4, 0, length + len(body), 7, fragment, ttl, protocol, 0) + ends + options
    return head[:10] + struct.pack("!H", _sum(head)) + head[12:] + body


def tcp(source: str = GUEST_ADDRESS, target: str = TARGET, port: int = 443, payload: bytes = b"") -> bytes:
    head = _tcp(source, target, SYN, port)[20:36] + bytes(4)
    ends = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, 20 + len(payload))
    return head[:16] + struct.pack("!H", _sum(ends + head + payload)) + head[18:] + payload


def syn(target: str = TARGET, port: int = 443, source: str = GUEST_ADDRESS, ttl: int = 64, options: bytes = b"") -> bytes:
    return frame(IPV4, ip(source, target, 6, tcp(source, target, port), ttl, options))


def icmp6(source: str, target: str, kind: int, body: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    message = struct.pack("!BBH", kind, 0, 0) + body
    message = message[:2] + struct.pack("!H", _sum(addresses + struct.pack("!II", len(message), 58) + message)) + message[4:]
    return struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + addresses + message


class Link(Way):
    """With the addresses and the neighbours that links have (vmm/network.py), and a guest that writes frames."""

    def __init__(self, is_walled: bool = True) -> None:
        super().__init__(harden if is_walled else lambda: None)
        nud = "permanent" if is_walled else "reachable"
        self.link.inside(lambda: write(f"/proc/sys/net/ipv4/neigh/{TAP}/locktime", "0"))
        self.link.inside(lambda: run_batch(
            f"link set {TAP} address {HOST_MAC}\naddr add {HOST_ADDRESS6}/128 dev lo nodad\nroute add {GUEST_ADDRESS6}/128 dev {TAP}\n"
            f"neigh replace {GUEST_ADDRESS6} lladdr {GUEST_MAC} dev {TAP} nud permanent\n"
            f"neigh replace {GUEST_ADDRESS} lladdr {GUEST_MAC} dev {TAP} nud {nud}\n"
        ))  # fmt: skip
        self.guest.ip("link", "set", "eth0", "address", GUEST_MAC)
        self.guest.ip("route", "replace", "default", "via", HOST_ADDRESS)
        self.wire = self.guest.inside(lambda: listening("eth0"))
        self.outside = self.world.inside(lambda: listening("w0"))
        self.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], list(CLOSED)))

    def put(self, *frames: bytes) -> None:
        for one in frames:
            self.wire.send(one)

    def passed(self) -> list[tuple[int, bytes]]:
        """(ethertype, packet) of what left for the world, but for what the link itself says to its neighbour there."""
        self.put(syn(port=LAST))
        return self.come(lambda packet: packet[9] == 6 and struct.unpack_from("!H", packet, (packet[0] & 15) * 4 + 2)[0] == LAST)

    def come(self, is_last: Callable[[bytes], bool]) -> list[tuple[int, bytes]]:
        found, deadline = [], time.monotonic() + 5
        while select.select([self.outside], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data, (_, _, direction, _, _) = self.outside.recvfrom(4096)
            kind, packet = struct.unpack_from("!H", data, 12)[0], data[14:]
            if direction == socket.PACKET_OUTGOING or kind == ARP or (kind == IPV6 and packet[6] in (0, 58)):
                continue
            if kind == IPV4 and is_last(packet):
                return found
            found.append((kind, packet))
        raise AssertionError("the last packet did not pass: nothing here shows anything")

    def close(self) -> None:
        self.wire.close()
        self.outside.close()
        super().close()


def listening(device: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    one.bind((device, ALL))
    one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
    return one


@pytest.fixture
def link() -> Iterator[Link]:
    one = Link()
    yield one
    one.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Link]:
    """For tests that leave nothing behind."""
    one = Link()
    yield one
    one.close()


@pytest.fixture(scope="module")
def opened() -> Iterator[Link]:
    """Without the list of what is no internet."""
    one = Link()
    one.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], []))
    yield one
    one.close()


@pytest.fixture
def bare() -> Iterator[Link]:
    """Without what `harden` sets, and without a neighbour that is permanent."""
    one = Link(is_walled=False)
    yield one
    one.close()


def addresses(found: list[tuple[int, bytes]]) -> list[tuple[str, str]]:
    return [(socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])) for kind, packet in found if kind == IPV4]


def test_a_connection_by_hand_passes(link: Link) -> None:
    """The control of all the others: such a frame leaves, as the link's."""
    link.put(syn())
    assert addresses(link.passed()) == [(LINK, TARGET)]


# ---- who somebody is ----


def test_a_frame_of_another_card_is_still_the_guests(link: Link) -> None:
    """Its source in Ethernet says nothing to anybody: answers go to the one neighbour that there is."""
    link.put(frame(IPV4, ip(GUEST_ADDRESS, TARGET, 6, tcp()), source=OTHER_MAC))
    assert addresses(link.passed()) == [(LINK, TARGET)]
    assert GUEST_MAC in link.link.ip("neigh", "show", GUEST_ADDRESS)


def arp(operation: int, address: str, hardware: str, target: str, target_hardware: str = BROADCAST) -> bytes:
    body = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + mac(hardware) + socket.inet_aton(address)
    return frame(ARP, body + mac(target_hardware) + socket.inet_aton(target), hardware, BROADCAST)


def claims() -> list[bytes]:
    return [arp(2, address, OTHER_MAC, HOST_ADDRESS, HOST_MAC) for address in (GUEST_ADDRESS, WORLD, HOST_ADDRESS)]


def test_arp_moves_nobody(link: Link) -> None:
    before = link.link.ip("neigh", "show")
    link.put(*claims(), *claims(), syn())
    assert addresses(link.passed()) == [(LINK, TARGET)], "the world is where it was"
    after = link.link.ip("neigh", "show")
    assert GUEST_MAC in before and GUEST_MAC in after and OTHER_MAC not in after


def test_without_a_permanent_neighbour_arp_moves_it(bare: Link) -> None:
    bare.put(*claims())
    bare.passed()
    assert OTHER_MAC in bare.link.ip("neigh", "show", GUEST_ADDRESS)


def advertisement() -> bytes:
    """A router's, with itself as the default way, and a network (RFC 4861, 4.2)."""
    prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 86_400, 86_400, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:1::")
    own = struct.pack("!BB", 1, 1) + mac(GUEST_MAC)
    body = struct.pack("!BBHII", 64, 0, 1800, 0, 0) + own + prefix
    return frame(IPV6, icmp6("fe80::1", "ff02::1", 134, body), target="33:33:00:00:00:01")


def routes6(one: Link) -> str:
    return one.link.ip("-6", "route", "show", "dev", TAP)


def test_a_guest_is_no_router_of_its_hosts(link: Link) -> None:
    before = routes6(link)
    link.put(advertisement())
    link.passed()
    assert routes6(link) == before and "default" not in before


def test_without_the_setting_it_is(bare: Link) -> None:
    bare.put(advertisement())
    bare.passed()
    assert "default via fe80::1" in routes6(bare)


def redirect() -> list[bytes]:
    """From the link's own gateway, as it says: the way to TARGET is by the guest (RFC 792)."""
    about = ip(LINK, TARGET, 6, tcp(LINK))[:28]
    body = struct.pack("!BBH4s", 5, 1, 0, socket.inet_aton(GUEST_ADDRESS)) + about
    return [
        frame(IPV4, ip(source, to, 1, body[:2] + struct.pack("!H", _sum(body)) + body[4:]))
        for source in (WORLD, HOST_ADDRESS, TARGET)
        for to in (LINK, HOST_ADDRESS)
    ]


def test_a_redirect_leads_nobody_to_the_guest(link: Link) -> None:
    link.put(*redirect(), syn())
    assert addresses(link.passed()) == [(LINK, TARGET)]
    assert "169.254" not in link.link.ip("route", "get", TARGET).replace("uid", "")


# ---- what else there is than TCP ----


@pytest.mark.parametrize("protocol", [1, 2, 4, 17, 41, 47, 50, 51, 58, 89, 103, 112, 132, 136, 255])
def test_nothing_but_tcp_leaves(shared: Link, protocol: int) -> None:
    body = struct.pack("!BBHHH", 8, 0, 0xF7FD, 1, 1) if protocol == 1 else struct.pack("!HHHH", 4000, 443, 8, 0)
    shared.put(frame(IPV4, ip(GUEST_ADDRESS, TARGET, protocol, body)))
    assert shared.passed() == []


@pytest.mark.parametrize("protocol", [1, 17, 47])
def test_without_that_rule_it_does(link: Link, protocol: int) -> None:
    link.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol != 0"], []))
    body = struct.pack("!BBHHH", 8, 0, 0xF7FD, 1, 1) if protocol == 1 else struct.pack("!HHHH", 4000, 443, 8, 0)
    link.put(frame(IPV4, ip(GUEST_ADDRESS, TARGET, protocol, body)))
    assert [packet[9] for _, packet in link.passed()] == [protocol]


@pytest.mark.parametrize("tag", [0, 1, 5, 4095])
def test_a_tagged_frame_is_judged_as_any_other(link: Link, tag: int) -> None:
    """Tag 0 is a priority and no network of its own; others have no device here."""
    for inner in (syn(), syn(INSIDE), syn(source=STRANGER)):
        link.put(inner[:12] + struct.pack("!HH", VLAN, tag) + inner[12:])
    assert addresses(link.passed()) == ([(LINK, TARGET)] if tag == 0 else [])


@pytest.mark.parametrize("target", ["224.0.0.1", "224.0.0.251", "239.255.255.250", "255.255.255.255", "100.64.0.3", "100.64.0.2"])
def test_what_is_for_all_is_for_nobody(shared: Link, target: str) -> None:
    shared.put(syn(target), frame(IPV4, ip(GUEST_ADDRESS, target, 17, struct.pack("!HHHH", 4000, 5353, 8, 0)), target=BROADCAST))
    assert shared.passed() == []


@pytest.mark.parametrize("target", ["2001:db8::5", "fd00:ec2::254", "::ffff:203.0.113.5", "64:ff9b::cb00:7105", "ff02::1", "fe80::1"])
def test_ipv6_leads_nowhere(shared: Link, target: str) -> None:
    segment = tcp()
    addresses6 = socket.inet_pton(socket.AF_INET6, GUEST_ADDRESS6) + socket.inet_pton(socket.AF_INET6, target)
    shared.put(frame(IPV6, struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + addresses6 + segment))
    assert shared.passed() == []


def test_the_world_sees_ipv6_where_the_link_forwards_it(link: Link) -> None:
    """The control: a link that did would be seen here."""
    link.link.ip("-6", "addr", "add", "2001:db8::3/64", "dev", "up0", "nodad")
    link.world.ip("-6", "addr", "add", "2001:db8::5/64", "dev", "w0", "nodad")

    link.link.inside(lambda: write("/proc/sys/net/ipv6/conf/all/forwarding", "1"))
    segment = tcp()
    ends = socket.inet_pton(socket.AF_INET6, GUEST_ADDRESS6) + socket.inet_pton(socket.AF_INET6, "2001:db8::5")
    link.put(frame(IPV6, struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + ends + segment))
    deadline = time.monotonic() + 5
    while not [kind for kind, packet in link.passed() if kind == IPV6 and packet[6] == 6]:
        assert time.monotonic() < deadline, "the neighbour has to be found first"


# ---- headers ----


def route_of(kind: int, by: str) -> bytes:
    """An option that says the way (RFC 791): loose 131, strict 137."""
    return bytes([kind, 7, 4]) + socket.inet_aton(by) + b"\0"


@pytest.mark.parametrize("kind", [131, 137])
def test_a_packet_does_not_say_its_own_way(link: Link, kind: int) -> None:
    link.put(syn(HOST_ADDRESS, options=route_of(kind, INSIDE)), syn(TARGET, options=route_of(kind, INSIDE)))
    assert INSIDE not in [to for _, to in addresses(link.passed())]


def test_a_packet_that_dies_here_names_the_link_and_no_more(link: Link) -> None:
    link.put(syn(ttl=1))
    assert link.passed() == []
    deadline = time.monotonic() + 5
    while select.select([link.wire], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = link.wire.recv(4096)
        if data[12:14] == b"\x08\0" and data[23] == 1 and data[34] == 11:
            assert socket.inet_ntoa(data[26:30]) == HOST_ADDRESS
            return
    raise AssertionError("nobody said that it died")


def fragments(target: str, first: int, protocol: int = 6, port: int = 443) -> list[bytes]:
    """A segment whose first piece has so many bytes."""
    segment = tcp(target=target, port=port, payload=bytes(32))
    more = 0x2000
    return [
        frame(IPV4, ip(GUEST_ADDRESS, target, protocol, segment[:first], fragment=more)),
        frame(IPV4, ip(GUEST_ADDRESS, target, protocol, segment[first:], fragment=first // 8)),
    ]


@pytest.mark.parametrize("first", [8, 16, 24])
def test_pieces_are_put_together_and_judged_as_a_whole(link: Link, first: int) -> None:
    link.put(*fragments(INSIDE, first), *fragments("169.254.169.253", first), *fragments(TARGET, first, protocol=17))
    assert link.passed() == []
    link.put(*fragments(TARGET, first))
    assert set(addresses(link.passed())) == {(LINK, TARGET)}, "whole ones pass"


def test_a_piece_that_covers_another_changes_no_port(link: Link) -> None:
    """The first says 443, the second, which overlaps it, 22: the kernel drops both (RFC 5722's rule, for IPv4 too)."""
    link.rules(link_rules(TAP, GUEST_ADDRESS, ["tcp dport { 443, 9 }"], []))
    segment, other = tcp(payload=bytes(32)), tcp(port=22, payload=bytes(32))
    link.put(
        frame(IPV4, ip(GUEST_ADDRESS, TARGET, 6, segment[:24], fragment=0x2000)),
        frame(IPV4, ip(GUEST_ADDRESS, TARGET, 6, other[:16], fragment=0x2000)),
        frame(IPV4, ip(GUEST_ADDRESS, TARGET, 6, segment[24:], fragment=3)),
    )
    ports = [struct.unpack_from("!H", packet, 22)[0] for _, packet in link.passed()]
    assert 22 not in ports


def test_pieces_without_a_beginning_stay(link: Link) -> None:
    link.put(*(frame(IPV4, ip(GUEST_ADDRESS, target, 6, bytes(64), fragment=8)) for target in (TARGET, INSIDE)))
    assert link.passed() == []


# ---- where to ----

# Each cloud's metadata, and its resolvers and helpers: AWS (EC2, ECS, EKS, time, DNS), Google, Azure (and its WireServer), Oracle, Alibaba, Tencent,
# IBM, DigitalOcean, Hetzner, OpenStack.
CLOUDS = ["169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.169.123", "169.254.169.253", "168.63.129.16", "192.0.0.192",
          "100.100.100.200", "169.254.0.23", "169.254.10.10", "161.26.0.0", "192.168.0.1"]  # fmt: skip
SPECIAL = ["0.0.0.1", "10.0.0.1", "10.255.255.254", "100.64.9.9", "100.127.255.254", "127.0.0.1", "127.1.2.3", "169.254.77.9", "172.16.0.1", "172.31.255.254",
           "192.0.0.8", "192.168.255.254", "198.18.0.1", "198.19.255.254", "224.0.0.5", "240.0.0.1", "255.255.255.254"]  # fmt: skip


@pytest.mark.parametrize("target", sorted({*CLOUDS, *SPECIAL} - {"161.26.0.0"}))
def test_what_is_no_internet_is_shut(shared: Link, target: str) -> None:
    shared.put(syn(target))
    assert shared.passed() == []


@pytest.mark.parametrize(
    "target", [one for one in (*CLOUDS, *SPECIAL) if not one.startswith(("127.", "0.", "169.254.169.254", "224.", "255."))]
)
def test_without_the_list_it_is_open(opened: Link, target: str) -> None:
    opened.put(syn(target))
    found = addresses(opened.passed())
    assert found == ([(LINK, target)] if not target.startswith(("169.254.77.", "240.")) else found)


@pytest.mark.parametrize("written", ["0xa9fea9fe", "2852039166", "0251.0376.0251.0376", "169.254.43518", "169.16689662"])
def test_an_address_written_otherwise_is_the_same_address(written: str) -> None:
    """The filter sees four bytes, whatever a client was given."""
    assert socket.inet_ntoa(socket.inet_aton(written)) == "169.254.169.254"
