"""The PROXY protocol, version 2 (haproxy's proxy-protocol.txt): a load balancer names the client in front of the connection's bytes."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any, cast

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD_BYTES = 16
_ADDRESSES_MAX_BYTES = 4096
_HEADER_SECONDS = 5.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadHeader(Exception):
    """The connection does not begin with a PROXY header of version 2, and so is aborted."""


def parse_proxy_header(data: bytes) -> tuple[int, str | None] | None:
    """Returns the header's length and the client's address (2.2), which is None where the balancer speaks for itself; returns None
    while the header is not complete. Raises BadHeader."""
    if data[: len(_SIGNATURE)] != _SIGNATURE[: len(data)]:
        raise BadHeader
    if len(data) < _HEAD_BYTES:
        return None
    version, command = data[12] >> 4, data[12] & 15
    size = int.from_bytes(data[14:16], "big")
    if version != 2 or command > 1 or size > _ADDRESSES_MAX_BYTES:
        raise BadHeader
    if len(data) < _HEAD_BYTES + size:
        return None
    family = data[13] >> 4
    needed = {1: 4, 2: 16}.get(family)
    if command == 0 or needed is None:
        return _HEAD_BYTES + size, None
    if size < 2 * needed + 4:
        raise BadHeader
    return _HEAD_BYTES + size, str(_unmapped(ipaddress.ip_address(data[_HEAD_BYTES : _HEAD_BYTES + needed])))


class ProxyProtocol(asyncio.Protocol):
    """Reads the header, then gives the connection to the endpoint's protocol. From a peer outside the trusted
    networks, which could name any client, no header is read: the protocol gets its connection at once."""

    def __init__(self, trusted: list[Network], make_protocol: Callable[[str | None], asyncio.BaseProtocol]) -> None:
        self._trusted = trusted
        self._make_protocol = make_protocol
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if is_trusted(peer, self._trusted):
            self._timer = asyncio.get_running_loop().call_later(_HEADER_SECONDS, self._transport.abort)
        else:
            self._hand_over(None, b"")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            found = parse_proxy_header(self._buffer)
        except BadHeader:
            if self._transport is not None:
                self._transport.abort()
            return
        if found is not None:
            size, address = found
            self._hand_over(address, self._buffer[size:])

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _hand_over(self, address: str | None, rest: bytes) -> None:
        transport = self._transport
        assert transport is not None
        if self._timer is not None:
            self._timer.cancel()
        protocol: Any = self._make_protocol(address)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        while rest:
            buffer = protocol.get_buffer(len(rest))
            step = min(len(buffer), len(rest))
            buffer[:step] = rest[:step]
            protocol.buffer_updated(step)
            rest = rest[step:]


def is_trusted(peer: object, networks: list[Network]) -> bool:
    """A peer is trusted if it is in one of the networks. Peers on a Unix socket are local, and always trusted."""
    if not isinstance(peer, tuple):
        return True
    address = _unmapped(ipaddress.ip_address(str(peer[0]).partition("%")[0]))
    return any(address in network for network in networks if network.version == address.version)


def _unmapped(address: Address) -> Address:
    """Returns the IPv4 address that a socket of both families shows as one of IPv6 (RFC 4291, 2.5.5.2)."""
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address
