"""What a guest's connections take of its host: entries in the kernel's table of connections, which all links and the host's own share.

A table that is full drops everybody's new connections. Each link has a bound, on the way out and at its own end.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from test_link_by_hand import GUEST_ADDRESS, HOST_ADDRESS, LINK, TARGET, Link, addresses, frame, ip, tcp

from gateway.addresses import CLOSED
from vmm import egress
from vmm.egress import link_rules
from vmm.namespaces import run_nft
from vmm.network import TAP

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
MOST = 40


@pytest.fixture
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """With a bound that a test reaches soon, of connections (True) or of questions; False: with none that it reaches."""
    monkeypatch.setattr(egress, "MOST_CONNECTIONS", MOST if request.param is True else 1 << 20)
    if request.param == "asks":
        monkeypatch.setattr(egress, "QUESTIONS_A_SECOND", 1)
        monkeypatch.setattr(egress, "QUESTIONS_AT_ONCE", MOST)
    one = Link()
    # Nobody answers, so that no connection ends.
    one.world.inside(lambda: run_nft("table ip w {\nchain i {\ntype filter hook input priority 0; policy drop;\n}\n}\n"))
    one.rules(link_rules(TAP, GUEST_ADDRESS, ["ip protocol tcp"], list(CLOSED)))
    yield one
    one.close()


def from_port(port: int, target: str = TARGET) -> bytes:
    segment = bytearray(tcp(target=target))
    struct.pack_into("!H", segment, 0, port)
    struct.pack_into("!H", segment, 16, 0)
    ends = socket.inet_aton(GUEST_ADDRESS) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, len(segment))
    total = sum(struct.unpack(f"!{(len(ends) + len(segment)) // 2}H", ends + segment))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", segment, 16, ~total & 0xFFFF)
    return frame(0x0800, ip(GUEST_ADDRESS, target, 6, bytes(segment)))


def entries(one: Link) -> int:
    def read() -> int:
        with open("/proc/sys/net/netfilter/nf_conntrack_count", encoding="ascii") as file:
            return int(file.read())

    return int(one.link.inside(read))


@pytest.mark.parametrize("link", [True], indirect=True)
def test_a_guest_has_so_many_connections_to_the_outside(link: Link) -> None:
    assert addresses(link.passed()) == [], "the connection by which the next look knows that all have come is one of them"
    link.put(*(from_port(10_000 + number) for number in range(4 * MOST)))
    seen = iter(range(1, MOST - 1))
    link.come(lambda packet: next(seen, None) is None)
    with link.link.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own:
        own.sendto(b"", (TARGET, 9))  # the link's own, on whose way no guest's bound is
    assert link.come(lambda packet: packet[9] == socket.IPPROTO_UDP) == [], "no more than these"
    assert entries(link) <= MOST + 1


@pytest.mark.parametrize("link", [False], indirect=True)
def test_without_the_bound_it_has_what_it_likes(link: Link) -> None:
    link.put(*(from_port(10_000 + number) for number in range(4 * MOST)))
    assert addresses(link.passed()) == [(LINK, TARGET)] * 4 * MOST
    assert entries(link) > 4 * MOST


def at_the_links_own_end(one: Link) -> int:
    """Entries that a guest makes with datagrams to its host's end, where a resolver listens at one port."""
    with one.link.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as resolver:
        resolver.bind((HOST_ADDRESS, 53))
        for number in range(4 * MOST):
            for port in (53, 54):
                datagram = struct.pack("!HHHH", 10_000 + number, port, 8, 0)
                one.put(frame(0x0800, ip(GUEST_ADDRESS, HOST_ADDRESS, 17, datagram)))
        return entries(one)


@pytest.mark.parametrize("link", [True], indirect=True)
def test_a_guest_has_so_many_at_the_links_own_end(link: Link) -> None:
    assert at_the_links_own_end(link) <= MOST + 1


@pytest.mark.parametrize("link", [False], indirect=True)
def test_without_the_bound_the_links_table_is_its_own_to_fill(link: Link) -> None:
    assert at_the_links_own_end(link) >= 8 * MOST


# ---- questions ----


def questions_heard(one: Link) -> int:
    """Of four times as many as may be asked at once."""
    with one.link.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as resolver:
        resolver.bind((HOST_ADDRESS, 53))
        for _ in range(4 * MOST):
            one.put(frame(0x0800, ip(GUEST_ADDRESS, HOST_ADDRESS, 17, struct.pack("!HHHH", 10_000, 53, 9, 0) + b"?")))
        with one.link.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own:
            own.sendto(b"last", (HOST_ADDRESS, 53))  # by lo, which has no bound
        resolver.settimeout(5)
        heard = 0
        while resolver.recv(10) != b"last":
            heard += 1
        return heard


@pytest.mark.parametrize("link", ["asks"], indirect=True)
def test_a_guest_asks_so_much_at_once(link: Link) -> None:
    """Control answers all guests: one that asks without end would have it do nothing else."""
    assert MOST <= questions_heard(link) <= MOST + 5


@pytest.mark.parametrize("link", [False], indirect=True)
def test_without_the_bound_all_is_heard(link: Link) -> None:
    assert questions_heard(link) == 4 * MOST


def test_the_bounds_are_above_what_programs_do() -> None:
    assert egress.QUESTIONS_AT_ONCE >= 1024 and egress.MOST_CONNECTIONS >= 1024
