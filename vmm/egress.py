"""The way out of microVMs: a veth from each link to an uplink namespace, translated and filtered in the link's own.

A link's way out is shut until its session asks for it (`ip_forward` of its namespace is 0). The rules of INTERNET_EGRESS are
there ahead; those of a VPC_EGRESS connector replace them. In the uplink namespace, the host's own unless the settings name
another, one table drops what microVMs send to the host itself and to each other, whatever a link's rules say.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.config import Egress
from gateway.messages import EgressRules

from .errors import VmmError

DEVICE = "up0"
METADATA_ADDRESS = "169.254.169.254"
# RFC 6890: what is not the internet.
CLOSED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
    "198.18.0.0/15", "224.0.0.0/3",
)  # fmt: skip
_DEADLINE_SECONDS = 20


def run_batch(commands: str) -> None:
    """Runs ip(8) commands in the calling thread's namespace. Raises OSError with its words."""
    done = subprocess.run(["ip", "-batch", "-"], check=False, input=commands.encode(), capture_output=True, timeout=_DEADLINE_SECONDS)
    if done.returncode:
        raise OSError(f"ip: {done.stderr.decode(errors='replace').strip()}")


def run_nft(rules: str) -> None:
    """Loads rules in the calling thread's namespace. Raises OSError with nft's words."""
    done = subprocess.run(["nft", "-f", "-"], input=rules.encode(), capture_output=True, timeout=_DEADLINE_SECONDS, check=False)
    if done.returncode:
        raise OSError(f"nft: {done.stderr.decode(errors='replace').strip()}")


def link_rules(tap: str, accepts: list[str], closed: list[str]) -> str:
    """The table of one link: translation, and what may pass. `accepts` are nft matches."""
    drops = f"iifname {tap} ip daddr {{ {', '.join(closed)} }} drop\n" if closed else ""
    passes = "".join(f"iifname {tap} {match} accept\n" for match in accepts)
    return (
        "table ip egress\ndelete table ip egress\n"
        "table ip egress {\n"
        "chain forward {\ntype filter hook forward priority 0; policy drop;\nct state established,related accept\n"
        f"{drops}{passes}}}\n"
        f"chain translate {{\ntype nat hook postrouting priority srcnat;\noifname {DEVICE} masquerade\n}}\n}}\n"
    )


def accepts_of(rules: EgressRules) -> list[str]:
    """The matches of a connector's networks and ports (tcp:443, udp:53-60); without ports, all of TCP.

    Raises VmmError for what is none.
    """
    matches = []
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
    """The two addresses of a link to the uplink, and the name of its device there."""

    device: str
    outer: str
    inner: str


class Uplink:
    """`inside` runs a function in the uplink namespace."""

    def __init__(self, settings: Egress, instance: str, inside: Callable[[Callable[[], None]], None]) -> None:
        self._settings = settings
        self._inside = inside
        self._prefix = f"tp{zlib.crc32(instance.encode()) & 0xFFFFF:05x}"
        self._table = f"torpor_{self._prefix}"
        self._pool = ipaddress.IPv4Network(settings.pool)
        self._local: list[str] = []

    @property
    def is_open(self) -> bool:
        return not self._settings.closed

    def start(self) -> None:
        """Makes the uplink's table and lets it forward. Raises OSError."""
        if self.is_open:
            self._inside(self._prepare)

    def stop(self) -> None:
        """Takes the table away; forwarding stays as it is, since others may have asked for it."""
        if self.is_open:
            self._inside(lambda: run_nft(f"table inet {self._table}\ndelete table inet {self._table}\n"))

    def _prepare(self) -> None:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
        listed = subprocess.run(
            ["ip", "-j", "-4", "route", "show", "scope", "link"], capture_output=True, timeout=_DEADLINE_SECONDS, check=True
        )
        routes = {str(route["dst"]) for route in json.loads(listed.stdout or b"[]")} - {"default", str(self._pool)}
        # The host's networks, also where their addresses are public.
        self._local = [one for one in sorted(routes) if not any(_within(one, net) for net in CLOSED)]
        mine = f'"{self._prefix}.*"'
        run_nft(
            f"table inet {self._table}\ndelete table inet {self._table}\n"
            f"table inet {self._table} {{\n"
            f"chain input {{\ntype filter hook input priority -10;\niifname {mine} drop\n}}\n"
            f"chain forward {{\ntype filter hook forward priority -10;\niifname {mine} oifname {mine} drop\n}}\n"
            f"chain translate {{\ntype nat hook postrouting priority srcnat;\nip saddr {self._pool} oifname != {mine} masquerade\n}}\n}}\n"
        )

    def ends(self, number: int) -> Ends:
        """The link's addresses: pairs out of the pool, used again once it is through."""
        at = (2 * number) % self._pool.num_addresses
        return Ends(f"{self._prefix}.{number % 1_000_000:06d}", str(self._pool[at]), str(self._pool[at + 1]))

    def attach(self, number: int, namespace: Path) -> None:
        """Makes the veth, its inner end in `namespace`. Raises OSError."""
        ends = self.ends(number)
        self._inside(lambda: run_batch(
            f"link add {ends.device} type veth peer name {DEVICE} netns {namespace}\n"
            f"addr add {ends.outer}/31 dev {ends.device}\nlink set {ends.device} up\n"
        ))  # fmt: skip

    def inner_setup(self, number: int) -> str:
        """ip(8) commands for the link's own namespace."""
        ends = self.ends(number)
        return f"addr add {ends.inner}/31 dev {DEVICE}\nlink set {DEVICE} up\nroute add default via {ends.outer}\n"

    def internet(self, tap: str) -> str:
        """The rules of INTERNET_EGRESS: TCP, to the internet only; UDP is shut, as the service has it."""
        return link_rules(tap, ["ip protocol tcp"], [*CLOSED, *self._local])


def _within(network: str, outer: str) -> bool:
    return ipaddress.IPv4Network(network, strict=False).subnet_of(ipaddress.IPv4Network(outer))
