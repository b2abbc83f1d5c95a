"""Frames of the agent's channel (vmm/guest/port.h)."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<IBBHI")  # magic, kind, reserved, channel, length
MAGIC = 0x52505254
MAGIC_BYTES = struct.pack("<I", MAGIC)


def frame(kind: int, payload: bytes = b"", channel: int = 0) -> bytes:
    return HEADER.pack(MAGIC, kind, 0, channel, len(payload)) + payload
