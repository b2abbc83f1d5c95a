"""IPv4 addresses that are not the internet's."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

# RFC 6890, and Azure's own address for its virtual machines (its WireServer), which is a public one.
CLOSED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
    "198.18.0.0/15", "224.0.0.0/3", "168.63.129.16/32",
)  # fmt: skip
_CLOSED = tuple(ipaddress.IPv4Network(one) for one in CLOSED)


def is_internet(address: ipaddress.IPv4Address) -> bool:
    return not lies_in(address, _CLOSED)


def lies_in(address: ipaddress.IPv4Address, networks: Sequence[ipaddress.IPv4Network]) -> bool:
    return any(address in network for network in networks)
