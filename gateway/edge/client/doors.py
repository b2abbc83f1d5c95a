"""What stands between a listener and the endpoint's protocols: the PROXY header of a load balancer, the redirect to HTTPS."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from typing import Any, cast

from ..policy.replies import date_line

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD_BYTES = 16
_ADDRESSES_MAX_BYTES = 4096
_SECONDS = 5.0
_REQUEST_HEAD_MAX_BYTES = 16384
_LOCATION = re.compile(rb"[A-Z]+ (/[\x21-\x7e]*) HTTP/1\.[01]\r\n")
_HOST = re.compile(rb"\r\nhost:[ \t]*([A-Za-z0-9.-]+)(?::[0-9]+)?[ \t]*\r\n", re.I)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadHeader(Exception):
    """Not a PROXY header of version 2."""


def parse_proxy_header(data: bytes) -> tuple[int, str | None] | None:
    """Version 2 (haproxy's proxy-protocol.txt, 2.2): its length and the client's address, None where the balancer speaks for
    itself; None altogether while it is not complete. Raises BadHeader."""
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
    return _HEAD_BYTES + size, str(ipaddress.ip_address(data[_HEAD_BYTES : _HEAD_BYTES + needed]))


class ProxyDoor(asyncio.Protocol):
    """Reads the header, then hands the connection to the protocol behind. A peer that is not to be trusted with one is handed
    on at once: what it sends is its own."""

    def __init__(self, trusted: list[Network], inner: Callable[[str | None], asyncio.BaseProtocol]) -> None:
        self._trusted = trusted
        self._inner = inner
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if is_trusted(peer, self._trusted):
            self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._transport.abort)
        else:
            self._hand_on(None, b"")

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
            self._hand_on(address, self._buffer[size:])

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _hand_on(self, address: str | None, rest: bytes) -> None:
        transport = self._transport
        assert transport is not None
        if self._timer is not None:
            self._timer.cancel()
        inner: Any = self._inner(address)
        transport.set_protocol(inner)
        inner.connection_made(transport)
        while rest:
            buffer = inner.get_buffer(len(rest))
            step = min(len(buffer), len(rest))
            buffer[:step] = rest[:step]
            inner.buffer_updated(step)
            rest = rest[step:]


def is_trusted(peer: object, networks: list[Network]) -> bool:
    """Peers on a Unix socket are local, and trusted where anyone is."""
    if not isinstance(peer, tuple):
        return True
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    return any(address in network for network in networks if network.version == address.version)


class RedirectDoor(asyncio.Protocol):
    """Plain HTTP: the same address, with TLS (308, so that the method stays)."""

    def __init__(self, port: int) -> None:
        self._suffix = b"" if port == 443 else b":%d" % port
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        asyncio.get_running_loop().call_later(_SECONDS, self._transport.close)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._buffer += data
        if b"\r\n\r\n" in self._buffer or len(self._buffer) > _REQUEST_HEAD_MAX_BYTES:
            transport.write(redirect(self._buffer, self._suffix))
            transport.close()


def redirect(head: bytes, suffix: bytes) -> bytes:
    line, host = _LOCATION.match(head), _HOST.search(head)
    status = b"400 Bad Request"
    if line is not None and host is not None:
        status = b"308 Permanent Redirect\r\nLocation: https://%b%b%b" % (host[1], suffix, line[1])
    return b"HTTP/1.1 %b%b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, date_line())
