"""The way out of microVMs: a veth from each link to the instance's uplink namespace, and one from there to the outside.

A link's way out is shut until its session asks for it (`ip_forward` of its namespace is 0). The rules of INTERNET_EGRESS are
there ahead; those of a VPC_EGRESS connector replace them. Whatever a link's rules say, the uplink namespace passes nothing from one
link to another, and the outside (the host's own namespace, unless the settings name another) takes nothing for itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.addresses import CLOSED
from gateway.config import Egress
from gateway.messages import HOST_PORTS, EgressRules

from .errors import Unavailable, VmmError
from .namespaces import destroy_namespace, inside, make_namespace, run_batch, run_nft

DEVICE = "up0"
METADATA_ADDRESS = "169.254.169.254"
# Of a guest, to the outside and to its host's end: the kernel's table of connections, which is everybody's, the host's own too, has room
# for 262,144 by default.
MOST_CONNECTIONS = 4096
# To the link's own end, of questions for names, and of connections to metadata and to the relay: control answers them, for all guests.
QUESTIONS_A_SECOND, QUESTIONS_AT_ONCE = 500, 5000
RELAY_PORT = 3129  # on the link's own end
_DEADLINE_SECONDS = 20
_WAN = "wan0"
_LINK = "vm."  # begins the names of links' outer ends
_ROUTE_UP, _ROUTE_REJECT = 0x1, 0x200  # <linux/route.h>
# Links have addresses in this namespace, the outside knows one address of it; nothing here answers to anybody.
_UPLINK_RULES = f"""\
table inet uplink
delete table inet uplink
table inet uplink {{
chain input {{
type filter hook input priority 0; policy drop;
}}
chain forward {{
type filter hook forward priority 0; policy drop;
ct state invalid drop
ct state established,related accept
iifname != {_WAN} oifname {_WAN} ct state new accept
}}
chain translate {{
type nat hook postrouting priority srcnat;
oifname {_WAN} masquerade
}}
}}
"""


NOT_OURS = "ct state invalid drop\niifname {tap} ip saddr != {guest} drop\n"


def link_rules(tap: str, guest: str, accepts: list[str], closed: list[str]) -> str:
    """Returns the table of one link: translation, and what may pass. `accepts` are nft matches. What belongs to no connection is not
    translated, and would leave with whatever source a guest gave it; a guest has one address, and so many connections."""
    merged = ipaddress.collapse_addresses(map(ipaddress.IPv4Network, closed))  # an nft set takes no ranges that overlap
    drops = f"iifname {tap} ip daddr {{ {', '.join(map(str, merged))} }} drop\n" if closed else ""
    passes = "".join(f"iifname {tap} {match} accept\n" for match in accepts)
    return (
        "table ip egress\ndelete table ip egress\n"
        "table ip egress {\n"
        "chain forward {\ntype filter hook forward priority 0; policy drop;\n"
        f"{NOT_OURS.format(tap=tap, guest=guest)}ct state established,related accept\n"
        f"{drops}iifname {tap} ct count over {MOST_CONNECTIONS} drop\n{passes}}}\n"
        "chain input {\ntype filter hook input priority 0;\nmeta l4proto tcp ct state established accept\n"  # requests' answers: one look
        f"iifname {tap} udp dport 53 limit rate over {QUESTIONS_A_SECOND}/second burst {QUESTIONS_AT_ONCE} packets drop\n"
        "ct state established,related accept\n"
        f"iifname {tap} limit rate over {QUESTIONS_A_SECOND}/second burst {QUESTIONS_AT_ONCE} packets drop\n"
        f"iifname {tap} ct count over {MOST_CONNECTIONS} drop\n}}\n"
        f"chain translate {{\ntype nat hook postrouting priority srcnat;\noifname {DEVICE} masquerade\n}}\n}}\n"
    )


def named_rules(tap: str, guest: str, ours: Collection[str], rules: EgressRules, closed: list[str]) -> str:
    """Returns what a link's table has beside `link_rules` where a connector names hosts: connections to their ports come to the link's own
    end, where the relay's listener is (gateway/guest/relay.py), but for those that `link_rules` passes and those to `ours`. Whatever goes
    out of the namespace itself then keeps to the internet and to the connector's networks."""
    ports = sorted({port_of(rule) for rule in rules.hosts})
    if not ports:
        return ""
    merged = ipaddress.collapse_addresses(map(ipaddress.IPv4Network, closed))
    own = ipaddress.collapse_addresses(map(ipaddress.IPv4Network, rules.networks))
    networks = ", ".join(map(str, own))
    passes = "".join(f"iifname {tap} {match} accept\n" for match in accepts_of(rules))
    return (
        "table ip egress {\n"
        f"chain named {{\ntype nat hook prerouting priority dstnat;\niifname != {tap} accept\nip saddr != {guest} accept\n"
        f"ip daddr {{ {', '.join(sorted(ours))} }} accept\n{passes}"
        f"tcp dport {{ {', '.join(map(str, ports))} }} redirect to :{RELAY_PORT}\n}}\n"
        f"chain output {{\ntype filter hook output priority 0;\noifname != {DEVICE} accept\n"
        + (f"ip daddr {{ {networks} }} accept\n" if networks else "")
        + f"ip daddr {{ {', '.join(map(str, merged))} }} drop\n}}\n}}\n"
    )


def port_of(rule: str) -> int:
    """Returns the port of a rule for a host (gateway.messages.HOST_RULE)."""
    scheme, _, *port = rule.split(":")
    return int(port[0]) if port else HOST_PORTS[scheme]


def accepts_of(rules: EgressRules) -> list[str]:
    """Returns the matches of a connector's networks and ports (tcp:443, udp:53-60); without ports, all of TCP, unless hosts are named.

    Raises VmmError for what is none.
    """
    matches: list[str] = []
    if rules.hosts and not rules.ports:
        return matches
    for network in rules.networks:
        try:
            where = f"ip daddr {ipaddress.IPv4Network(network)}"
        except ValueError as error:
            raise VmmError(f"egress.subnets: {network} is no IPv4 network") from error
        for port in rules.ports or ["tcp:1-65535"]:
            protocol, _, numbers = port.partition(":")
            bounds = numbers.split("-")
            if protocol not in ("tcp", "udp") or not all(one.isdigit() and int(one) < 65536 for one in bounds) or len(bounds) > 2:
                raise VmmError(f"egress.security_groups: {port} is not of the form tcp:443 or udp:53-60")
            matches.append(f"{where} {protocol} dport {'-'.join(bounds)}")
    return matches


@dataclass(frozen=True)
class Ends:
    """The two addresses of a veth, a /31 (RFC 3021); `outer` is the end that lies nearer to the outside."""

    outer: str
    inner: str


class Pairs:
    """Pairs of a pool's addresses, by number, each one link's alone for as long as that lives."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._fresh = iter(range(count))  # nobody had them yet
        self._kept: set[int] = set()  # of these that somebody had when this began
        self._given: dict[str, int] = {}
        self._back: deque[tuple[int, str]] = deque()  # and whose they were; the one that was given back longest ago is first

    def keep(self, owner: str, pair: int) -> None:
        """Notes a pair that its owner has already; without an owner it never comes back."""
        self._kept.add(pair)
        if owner:
            self._given[owner] = pair

    def take(self, owner: str) -> tuple[int, str | None]:
        """Returns a pair, and who had it before. Raises Unavailable."""
        pair = next((pair for pair in self._fresh if pair not in self._kept), None)
        if pair is not None:
            self._given[owner] = pair
            return pair, None
        if not self._back:
            raise Unavailable(f"all {self._count} pairs of egress.pool's addresses are in use: end microVMs, or choose a larger pool")
        pair, before = self._back.popleft()
        self._given[owner] = pair
        return pair, before

    def give_back(self, owner: str) -> None:
        pair = self._given.pop(owner, None)
        if pair is not None:
            self._back.append((pair, owner))


class Uplink:
    """The instance's namespace at `path` in which links end, and the one veth that leads from it to the outside.

    It is made when the service starts, taken over by a daemon that is started again, and removed when the service stops. In between
    nothing changes in the outside's devices, addresses and routes, whatever microVMs come and go: browsers on the host end their
    connections at each such change.
    """

    def __init__(self, settings: Egress, instance: str, path: Path) -> None:
        self._settings = settings
        self.path = path
        self._outside = Path(settings.uplink or f"/proc/{os.getpid()}/ns/net")
        self._hash = zlib.crc32(instance.encode())
        prefix = f"tp{self._hash & 0xFFFFF:05x}"
        self.device = f"{prefix}.up"
        self._table = f"torpor_{prefix}"
        self._pool = ipaddress.IPv4Network(settings.pool)
        self._pair = 0  # the pair of the pool's addresses that the veth to the outside has
        self._local: list[str] = []
        self._links = Pairs(0)

    @property
    def is_open(self) -> bool:
        return not self._settings.closed

    @property
    def _pairs(self) -> int:
        return self._pool.num_addresses // 2

    def start(self, links: Collection[str] = ()) -> None:
        """Takes the namespace over or makes it, and loads the rules of both its sides. `links` are the names of those that live on; what
        is there of others goes. Raises OSError."""
        if not self.is_open:
            if self.path.exists():  # left by a daemon with other settings
                self.remove()
            return
        addresses = inside(self._outside, addresses_here)
        standing = self._standing(addresses)
        if standing is None:
            self.remove()
            self._pair = self._free_pair(addresses)
            self._make()
        else:
            self._pair = standing
        self._links = Pairs(self._pairs)
        self._links.keep("", self._pair)
        inside(self.path, lambda: self._take_over(links))
        self.look_around()
        inside(self.path, lambda: run_nft(_UPLINK_RULES))
        inside(self._outside, self._open_outside)

    def remove(self) -> None:
        """Removes the veth, the rules and the namespace. Forwarding stays on, since others may have asked for it. Raises OSError."""
        try:
            inside(self._outside, self._clear_outside)
        finally:
            destroy_namespace(self.path)

    def is_left(self) -> bool:
        """Whether anything of it is on the host. Raises OSError."""
        return self.path.exists() or inside(self._outside, self._has_left)

    def look_around(self) -> bool:
        """Learns the host's networks, also where their addresses are public. Returns whether they have changed. Raises OSError."""
        if not self.is_open:
            return False
        networks = [network for network, device in inside(self._outside, networks_here).items() if device != self.device]
        before, self._local = self._local, [one for one in sorted(networks) if not any(_within(one, closed) for closed in CLOSED)]
        return self._local != before

    def _take_over(self, links: Collection[str]) -> None:
        """In the uplink namespace: links that live on keep their addresses; veths of others may have stayed, where somebody holds a socket
        in their namespaces."""
        left = ""
        for device, addresses in addresses_here().items():
            name = device.removeprefix(_LINK)
            if name == device:
                continue
            if name in links and addresses and (pair := self._pair_of(addresses[0])) is not None:
                self._links.keep(name, pair)
            else:
                left += f"link del {device}\n"
        if left:
            with contextlib.suppress(OSError):  # some of them have just gone with their namespaces
                run_batch(left, is_forced=True)

    def attach(self, link: str, namespace: Path) -> str:
        """Makes the veth of a link, its inner end in `namespace`; returns ip(8) commands for that one. Raises Unavailable, OSError."""
        pair, before = self._links.take(link)
        ends, device = self._ends_of(pair), f"{_LINK}{link}"

        def work() -> None:
            if before is not None and _exists(f"{_LINK}{before}"):  # or its answers would go there
                try:
                    run_batch(f"link del {_LINK}{before}\n")
                except OSError:
                    if _exists(f"{_LINK}{before}"):  # otherwise it has just gone with its namespace
                        raise
            run_batch(
                f"link add {device} type veth peer name {DEVICE} netns {namespace}\n"
                f"addr add {ends.outer}/31 dev {device}\nlink set {device} up\n"
            )

        inside(self.path, work)
        return _inner_setup(DEVICE, ends)

    def detach(self, link: str) -> None:
        """The link is gone: its addresses are another one's some day. The veth went with its namespace."""
        self._links.give_back(link)

    @property
    def closed(self) -> list[str]:
        """What is not the internet, seen from this host."""
        return [*CLOSED, *self._local]

    def internet(self, tap: str, guest: str) -> str:
        """Returns the rules of INTERNET_EGRESS: TCP, to the internet only; UDP is shut, as the service has it."""
        return link_rules(tap, guest, ["ip protocol tcp"], self.closed)

    def _ends_of(self, pair: int) -> Ends:
        return Ends(str(self._pool[2 * pair]), str(self._pool[2 * pair + 1]))

    def _pair_of(self, address: str) -> int | None:
        pair = (int(ipaddress.IPv4Address(address)) - int(self._pool.network_address)) // 2
        return pair if 0 <= pair < self._pairs else None

    def _standing(self, addresses: Mapping[str, Sequence[str]]) -> int | None:
        """Returns the pair of a veth that an earlier daemon made and that is whole."""
        try:
            own = inside(self.path, addresses_here).get(_WAN, [])
        except OSError:
            return None
        for address in addresses.get(self.device, []):
            pair = self._pair_of(address)
            if pair is not None and [self._ends_of(pair).inner] == own:
                return pair
        return None

    def _free_pair(self, addresses: Mapping[str, Sequence[str]]) -> int:
        """By the instance's name, so that instances on one host seldom meet, and stepping aside where they do, and where the host has
        networks. Raises OSError."""
        used = {address for found in addresses.values() for address in found}
        networks = [ipaddress.IPv4Network(network) for network in inside(self._outside, networks_here)]
        near = [network for network in networks if network.overlaps(self._pool)]
        for step in range(self._pairs):
            ends = self._ends_of(pair := (self._hash + step) % self._pairs)
            if not used & {ends.outer, ends.inner} and not any(ipaddress.IPv4Address(ends.outer) in network for network in near):
                return pair
        raise OSError(f"egress.pool: no two addresses of {self._pool} are free on the host ({', '.join(map(str, near))})")

    def _make(self) -> None:
        ends = self._ends_of(self._pair)

        def setup() -> None:
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1", encoding="ascii")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
            inside(self._outside, lambda: run_batch(
                f"link add {self.device} type veth peer name {_WAN} netns {self.path}\nlink set {self.device} addrgenmode none\n"
                f"addr add {ends.outer}/31 dev {self.device}\nlink set {self.device} up\n"
            ))  # fmt: skip
            run_batch("link set lo up\n" + _inner_setup(_WAN, ends))

        make_namespace(self.path, setup)

    def _open_outside(self) -> None:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
        run_nft(
            f"table inet {self._table}\ndelete table inet {self._table}\n"
            f"table inet {self._table} {{\n"
            f"chain input {{\ntype filter hook input priority -10;\niifname {self.device} drop\n}}\n"
            "chain forward {\ntype filter hook forward priority -10;\n"
            f"oifname {self.device} ct state != {{ established, related }} drop\n}}\n"
            "chain translate {\ntype nat hook postrouting priority srcnat;\n"
            f"ip saddr {self._ends_of(self._pair).inner} oifname != {self.device} masquerade\n}}\n}}\n"
        )

    def _clear_outside(self) -> None:
        run_nft(f"table inet {self._table}\ndelete table inet {self._table}\n")
        if self.device in _devices():
            run_batch(f"link del {self.device}\n")

    def _has_left(self) -> bool:
        tables = _read("nft", "-j", "list", "tables")["nftables"]
        return self.device in _devices() or any(one.get("table", {}).get("name") == self._table for one in tables)


def _inner_setup(device: str, ends: Ends) -> str:
    return f"addr add {ends.inner}/31 dev {device}\nlink set {device} up\nroute add default via {ends.outer}\n"


def addresses_here() -> dict[str, list[str]]:
    """Returns the IPv4 addresses of the devices that are up in the calling thread's namespace. Raises OSError."""
    devices = _read("ip", "-j", "-4", "address", "show", "up")
    return {one["ifname"]: [address["local"] for address in one["addr_info"]] for one in devices if one}


def networks_here() -> dict[str, str]:
    """Returns the directly connected networks of the calling thread's namespace, with their devices (proc(5), /proc/net/route). Raises
    OSError."""
    found = {}
    for line in Path("/proc/thread-self/net/route").read_text(encoding="ascii").splitlines()[1:]:
        device, target, gateway, flags, *_, mask = line.split()[:8]
        if int(flags, 16) & (_ROUTE_UP | _ROUTE_REJECT) == _ROUTE_UP and gateway == "0" * 8 and mask != "0" * 8:
            network, prefix = (int.from_bytes(bytes.fromhex(text), sys.byteorder) for text in (target, mask))
            found[f"{ipaddress.IPv4Address(network)}/{prefix.bit_count()}"] = device
    return found


def _exists(device: str) -> bool:
    """Whether a device is there, in the calling thread's namespace."""
    try:
        socket.if_nametoindex(device)
    except OSError:
        return False
    return True


def _devices() -> set[str]:
    return {str(one["ifname"]) for one in _read("ip", "-j", "link", "show")}


def _read(*command: str) -> Any:
    """Returns the JSON that a command prints. Raises OSError."""
    done = subprocess.run(command, capture_output=True, timeout=_DEADLINE_SECONDS, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return json.loads(done.stdout or b"[]")


def _within(network: str, outer: str) -> bool:
    return ipaddress.IPv4Network(network, strict=False).subnet_of(ipaddress.IPv4Network(outer))
