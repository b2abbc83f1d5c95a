"""What listens in a guest, as its init says (vmm/guest/listeners.c), in words for a log."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable

_LISTENER = struct.Struct("<HH16s")
_SAID_MAX = 8
# A listener on one of these is reached (gateway/reach.py); of any other address the log says which it is.
_REACHED = ("0.0.0.0", "127.0.0.1", "::", "::1")

Listener = tuple[str, int]


def parse(payload: bytes) -> list[Listener]:
    """Returns address and port of each; what is not a whole entry is a guest's word, and left out."""
    whole = len(payload) // _LISTENER.size * _LISTENER.size
    return [(_address(family, raw), port) for family, port, raw in _LISTENER.iter_unpack(payload[:whole])]


def _address(family: int, raw: bytes) -> str:
    if family == 4:
        return str(ipaddress.IPv4Address(raw[:4]))
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def in_words(listeners: Iterable[Listener]) -> str:
    """Returns the end of a sentence that says that nothing listens on a port: what does."""
    found = sorted({(port, "" if address in _REACHED else address) for address, port in listeners})
    names = [_name(address, port) for port, address in found[:_SAID_MAX]]
    if len(found) > _SAID_MAX:
        names.append(f"{len(found) - _SAID_MAX} more")
    if not names:
        return ", on no other port either"
    several = len(found) > 1
    return f"; {', '.join(names[:-1])} and {names[-1]} do" if several else f"; {names[0]} does"


def _name(address: str, port: int) -> str:
    if not address:
        return str(port)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
