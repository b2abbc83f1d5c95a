"""An intermediary must know three things of WebSocket (RFC 6455): frame boundaries, the closing frame, the handshake's key."""

from __future__ import annotations

import base64
import hashlib
import os
from typing import Final

# A close frame of a server with status 1001, going away (RFC 6455, 7.4.1).
GOING_AWAY = b"\x88\x02\x03\xe9"
PING: Final = 9
PONG: Final = 10
_CONTROL_MOST: Final = 125
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class FrameCounter:
    """Follows a server's frames as they pass, without touching payload: it knows where one ends and the next begins.

    Extensions change payloads and reserved bits, never a frame's length. A close frame ends what may be said: after it
    there is no boundary any more.
    """

    __slots__ = ("_closed", "_head", "_remaining")

    def __init__(self) -> None:
        self._head = b""  # of a frame whose length is not known yet
        self._remaining = 0  # of the frame's payload
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def at_boundary(self) -> bool:
        return not self._remaining and not self._head and not self._closed

    def only_control(self, data: bytes) -> list[tuple[int, bytes]] | None:
        """Returns the pings and pongs (opcode, payload unmasked) where `data` begins at a boundary and is nothing but whole ones of them;
        None otherwise. It need not be fed then."""
        if not data or not data[0] & 8 or not self.at_boundary:  # the usual case: a message
            return None
        found: list[tuple[int, bytes]] = []
        at = 0
        while at < len(data):
            first, second = data[at], data[at + 1] if at + 1 < len(data) else 0
            length, masked = second & 127, second & 128
            start = at + (6 if masked else 2)
            if first & 0x8F not in (0x80 | PING, 0x80 | PONG) or length > _CONTROL_MOST or start + length > len(data):
                return None
            payload = data[start : start + length]
            if masked:
                mask = data[at + 2 : start]
                payload = bytes(byte ^ mask[place & 3] for place, byte in enumerate(payload))
            found.append((first & 15, payload))
            at = start + length
        return found or None

    def end(self) -> None:
        """Notes that the server's half has ended: there is nothing more to say."""
        self._closed = True

    def feed(self, data: bytes) -> None:
        if not self._remaining and not self._head and len(data) > 3:  # the usual case: one whole frame
            length = data[1]
            size = 2 + length if length < 126 else 4 + (data[2] << 8 | data[3]) if length == 126 else 0
            if len(data) == size and data[0] & 15 != 8:
                return
        at, end = 0, len(data)
        while at < end:
            if self._remaining:
                step = min(self._remaining, end - at)
                self._remaining -= step
                at += step
                continue
            head = self._head + data[at : at + 14 - len(self._head)]
            size = _head_size(head)
            if size > len(head):
                self._head = head
                return
            at += size - len(self._head)
            self._head = b""
            self._remaining = _payload_size(head)
            if head[0] & 15 == 8:
                self._closed = True


def pong(payload: bytes) -> bytes:
    """Returns a server's answer to a ping (RFC 6455, 5.5.3)."""
    return bytes((0x80 | PONG, len(payload))) + payload


def _head_size(head: bytes) -> int:
    """Returns the bytes of a frame's head, or more than there are where that is not known yet."""
    if len(head) < 2:
        return 2
    length = head[1] & 127
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & 128 else 0)


def _payload_size(head: bytes) -> int:
    length = head[1] & 127
    if length == 126:
        return int.from_bytes(head[2:4], "big")
    return int.from_bytes(head[2:10], "big") if length == 127 else length


def new_key() -> bytes:
    """Returns the Sec-WebSocket-Key of a handshake that we make for a client of HTTP/2, which has none (RFC 8441, 5)."""
    return base64.b64encode(os.urandom(16))


def accept_of(key: bytes) -> bytes:
    """Returns the Sec-WebSocket-Accept that answers a key (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
