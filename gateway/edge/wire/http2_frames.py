"""HTTP/2's frames and codes are written here (RFC 9113, 4, 6 and 7), and the HPACK codec stands behind two calls (RFC 7541)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, Protocol

from jh2._hazmat import Decoder as _Decoder
from jh2._hazmat import HPACKError, OversizedHeaderListError

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6
ENABLE_CONNECT_PROTOCOL: Final = 8  # RFC 8441, 3

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES: Final = 16384
WINDOW_BYTES: Final = 65535
WINDOW_MAX_BYTES: Final = 2**31 - 1
LAST_POSSIBLE: Final = 2**31 - 1  # a GOAWAY that refuses no stream yet (RFC 9113, 6.8)
_HEAD = struct.Struct(">BHBBL")
_SETTING = struct.Struct(">HL")

Field = tuple[bytes, bytes, bool]  # name, value, "never indexed"


class Code(IntEnum):
    """Error codes (RFC 9113, 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class H2ConnectionError(Exception):
    """A connection error: the connection cannot go on (RFC 9113, 5.4.1)."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


class H2StreamError(Exception):
    """A stream error: one stream cannot go on (RFC 9113, 5.4.2)."""

    def __init__(self, stream: int, code: Code, text: str) -> None:
        super().__init__(text)
        self.stream = stream
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    length = len(payload)
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in values.items()))


def window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def rst_stream(stream: int, code: Code) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last: int, code: Code, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + text.encode())


def headers(stream: int, block: bytes, end_stream: bool) -> bytes:
    """Returns HEADERS, with CONTINUATION where the block is longer than a frame."""
    end = END_STREAM if end_stream else 0
    if len(block) <= FRAME_BYTES:
        return frame(HEADERS, end | END_HEADERS, stream, block)
    pieces = [block[at : at + FRAME_BYTES] for at in range(0, len(block), FRAME_BYTES)]
    middle = b"".join(frame(CONTINUATION, 0, stream, piece) for piece in pieces[1:-1])
    return frame(HEADERS, end, stream, pieces[0]) + middle + frame(CONTINUATION, END_HEADERS, stream, pieces[-1])


# ---- HPACK ----


class FieldDecoder(Protocol):
    def decode(self, data: bytes, raw: bool | None = None) -> list[Field]: ...


def new_decoder(list_bytes: int) -> FieldDecoder:
    """Makes a decoder, one for each connection, because it holds the dynamic table. jh2's is a private module, so its version is pinned,
    and the tests compare it with another implementation."""
    decoder: FieldDecoder = _Decoder(list_bytes)
    return decoder


def decode(decoder: FieldDecoder, block: bytes) -> list[Field]:
    """Decodes a field block. Raises H2ConnectionError, because after an error the dynamic table differs from the peer's (RFC 7541, 2.2)."""
    try:
        return decoder.decode(block, True)
    except OversizedHeaderListError as error:
        raise H2ConnectionError(Code.ENHANCE_YOUR_CALM, "field list too large") from error
    except HPACKError as error:
        raise H2ConnectionError(Code.COMPRESSION_ERROR, "field block cannot be decoded") from error
    except BaseException as error:
        # jh2's decoder panics where a block ends before a string's length. Nothing else of Python's own is caught here.
        if type(error).__name__ != "PanicException":
            raise
        raise H2ConnectionError(Code.COMPRESSION_ERROR, "field block is cut short") from None


def _integer(value: int, first: int, bits: int) -> bytes:
    """Encodes an integer with a prefix (RFC 7541, 5.1)."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encodes fields as literals without indexing (RFC 7541, 6.2.2): no table is touched, so the result depends on the fields alone and can
    be kept for every connection."""
    out = []
    for name, value in fields:
        out += [b"\0", _integer(len(name), 0, 7), name, _integer(len(value), 0, 7), value]
    return b"".join(out)


_STATUS = {200: b"\x88", 204: b"\x89", 206: b"\x8a", 304: b"\x8b", 400: b"\x8c", 404: b"\x8d", 500: b"\x8e"}


def encode_status(status: int) -> bytes:
    return _STATUS.get(status) or b"\x08\x03%d" % status
