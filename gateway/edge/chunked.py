"""Chunked bodies (RFC 9112, 7.1): the end found while they pass through unchanged, or taken apart for another protocol."""

from __future__ import annotations

import re
from typing import Final

from .head import Malformed, Trailers

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\Z")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\Z")
_LINE_MAX_BYTES: Final = 4096
_TRAILERS_MAX_BYTES: Final = 16384

_AT_SIZE: Final = 0
_IN_DATA: Final = 1
_AFTER_DATA: Final = 2
_IN_TRAILERS: Final = 3
_DONE: Final = 4


class ChunkedBody:
    """Feed it bytes in any cut; it says how many belong to the body, and when the body is complete."""

    __slots__ = ("_left", "_line", "_state", "_trailers", "trailers")

    def __init__(self) -> None:
        self.trailers: Trailers = []
        self._state = _AT_SIZE
        self._left = 0
        self._line = b""  # of a size or trailer line whose end has not come yet
        self._trailers = 0

    @property
    def is_complete(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes, content: list[bytes] | None = None) -> int:
        """The number of leading bytes of `data` that are the body's; what they carry goes to `content`. Raises Malformed."""
        at, end = 0, len(data)
        while at < end and self._state != _DONE:
            if self._state == _IN_DATA:
                step = min(self._left, end - at)
                self._left -= step
                if content is not None:
                    content.append(data[at : at + step])
                at += step
                if not self._left:
                    self._state = _AFTER_DATA
                continue
            newline = data.find(b"\n", at)
            stop = end if newline < 0 else newline + 1
            self._line += data[at:stop]
            at = stop
            if len(self._line) > _LINE_MAX_BYTES:
                raise Malformed("chunk line too long")
            if newline >= 0:
                line, self._line = self._line, b""
                self._end_of_line(line)
        return at

    def _end_of_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or line.find(b"\r") != len(line) - 2:
            raise Malformed("bare CR or LF in chunked body")
        line = line[:-2]
        if self._state == _AFTER_DATA:
            if line:
                raise Malformed("chunk is longer than its size")
            self._state = _AT_SIZE
        elif self._state == _AT_SIZE:
            match = _SIZE.match(line)
            if match is None:
                raise Malformed("malformed chunk size")
            self._left = int(match[1], 16)
            self._state = _IN_DATA if self._left else _IN_TRAILERS
        else:
            self._trailer(line)

    def _trailer(self, line: bytes) -> None:
        if not line:
            self._state = _DONE
            return
        self._trailers += len(line)
        if not _TRAILER.match(line) or self._trailers > _TRAILERS_MAX_BYTES:
            raise Malformed("malformed or oversized trailer")
        name, _, value = line.partition(b":")
        self.trailers.append((name.lower(), value.strip(b" \t")))


def encode_end(trailers: Trailers | None) -> bytes:
    """The last chunk, and the trailers."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % one for one in trailers) + b"\r\n"
