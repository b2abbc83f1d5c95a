"""What a TLS client names: the ClientHello's server name, read as its bytes come (RFC 8446, 4.1.2 and 5.1; RFC 6066, 3). No I/O.

It is strict where a server might read something else than this does: whatever a second parser could understand in another way is refused.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from gateway.messages import HOST_NAME

HANDSHAKE = 0x16  # the first byte of TLS
_MOST_BYTES = 16 << 10  # of a ClientHello; those with keys against quantum computers have some 2,000
_RECORD_MOST = 1 << 14
_CLIENT_HELLO = 1
_SERVER_NAME, _ENCRYPTED, _ENCRYPTED_DRAFT = 0, 0xFE0D, 0xFFCE  # RFC 9849, and the drafts that named it otherwise
_HOST_NAME = 0
_NAME = re.compile(HOST_NAME)
_NAME_BYTES = 253


class Malformed(Exception):
    """What came begins nothing that can be let through; the text says why."""


@dataclass(frozen=True)
class Hello:
    """`name` is in lower case, and empty where the client names no host."""

    name: str
    is_encrypted: bool  # it says more, to whom it concerns (ECH)


def host_name(text: bytes) -> str:
    """Returns a host's name in lower case. Raises Malformed for what is none, addresses among it."""
    name = text.decode("latin-1").lower()
    if len(name) > _NAME_BYTES or not _NAME.fullmatch(name):
        raise Malformed("no name of a host")
    return name


class _Bytes:
    """Takes from a message's beginning. Raises Malformed where there is less."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise Malformed("a length beyond its end")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Bytes:
        return _Bytes(self.take(self.number(size)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    @property
    def is_over(self) -> bool:
        return self._at == len(self._data)


class ClientHelloReader:
    """Of one connection: `feed` takes its first bytes, in whatever pieces they come."""

    def __init__(self) -> None:
        self._in = bytearray()  # what is no whole record yet
        self._message = bytearray()

    def feed(self, data: bytes) -> Hello | None:
        """Returns what the client says, once all of it is there. Raises Malformed."""
        self._in += data
        while len(self._in) >= 5:
            kind, major, _, length = struct.unpack_from(">BBBH", self._in)
            if kind != HANDSHAKE or major != 3 or not 1 <= length <= _RECORD_MOST:
                raise Malformed("no TLS handshake")
            if len(self._in) < 5 + length:
                break
            self._message += self._in[5 : 5 + length]
            del self._in[: 5 + length]
            if (hello := self._read()) is not None:
                return hello
        if self._in and self._in[0] != HANDSHAKE:
            raise Malformed("no TLS handshake")
        if len(self._message) + len(self._in) > _MOST_BYTES:
            raise Malformed("a ClientHello that is too long")
        return None

    def _read(self) -> Hello | None:
        if self._message[0] != _CLIENT_HELLO:
            raise Malformed("no ClientHello")
        if len(self._message) < 4:
            return None
        length = int.from_bytes(self._message[1:4], "big")
        if length > _MOST_BYTES:
            raise Malformed("a ClientHello that is too long")
        if len(self._message) < 4 + length:
            return None
        if len(self._message) > 4 + length:
            raise Malformed("more in a ClientHello's record than that")
        return _parse(_Bytes(bytes(self._message[4:])))


def _parse(body: _Bytes) -> Hello:
    body.take(2 + 32)  # version, random
    body.vector(1)  # session
    body.vector(2)  # cipher suites
    body.vector(1)  # compression methods
    if body.is_over:
        return Hello("", False)
    extensions = body.vector(2)
    if not body.is_over:
        raise Malformed("more behind a ClientHello's extensions")
    seen: dict[int, _Bytes] = {}
    while not extensions.is_over:
        kind, value = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise Malformed("an extension twice")
        seen[kind] = value
    name = _server_name(seen[_SERVER_NAME]) if _SERVER_NAME in seen else ""
    return Hello(name, _ENCRYPTED in seen or _ENCRYPTED_DRAFT in seen)


def _server_name(value: _Bytes) -> str:
    entries = value.vector(2)
    kind, name = entries.number(1), entries.vector(2).rest()
    if kind != _HOST_NAME or not entries.is_over or not value.is_over:
        raise Malformed("more than one server name")
    return host_name(name)
