"""A chunked body is followed to its end (RFC 9112, 7.1): what it carries is taken out, or its chunks go on.

A body goes on in the chunks that it came in, but what an intermediary must not pass on unseen is written anew: chunk
extensions are left out, and so is the end (last chunk and trailer section), which whoever forwards the body writes with
`encode_end` and the trailers that may go on.
"""

from __future__ import annotations

import re
from typing import Final

from .http1_head import Malformed, Trailers, allowed_trailers

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*)\Z")
_TRAILER = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\Z")
_LINE_MAX_BYTES: Final = 4096
_EXTENSIONS_MAX_BYTES: Final = 16384  # of one body, in all: a recipient ought to bound them (RFC 9112, 7.1.1)
_TRAILERS_MAX_BYTES: Final = 16384
_TRAILER_OVERHEAD: Final = 32  # of each field, beside its bytes

_AT_SIZE: Final = 0
_IN_DATA: Final = 1
_AFTER_DATA: Final = 2
_IN_TRAILERS: Final = 3
_DONE: Final = 4


class ChunkedBody:
    """Takes bytes in any cut, and knows how many belong to the body, and when the body is complete."""

    __slots__ = ("_extensions", "_line", "_remaining", "_state", "_trailers", "trailers")

    def __init__(self) -> None:
        self.trailers: Trailers = []  # once the body is complete: those that may go on
        self._state = _AT_SIZE
        self._remaining = 0
        self._line = b""  # of a line whose end has not come yet
        self._extensions = 0
        self._trailers = 0

    @property
    def is_complete(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes, out: list[bytes] | None = None, in_chunks: bool = False) -> int:
        """Returns the number of leading bytes of `data` that are the body's. To `out` goes what they carry or, with `in_chunks`, the chunks
        to forward. Raises Malformed."""
        at, end = 0, len(data)
        kept = 0  # where in `data` the chunks begin that go on as they came
        while at < end and self._state != _DONE:
            if self._state == _IN_DATA:
                step = min(self._remaining, end - at)
                self._remaining -= step
                if out is not None and not in_chunks:
                    out.append(data[at : at + step])
                at += step
                if not self._remaining:
                    self._state = _AFTER_DATA
                continue
            start = at
            newline = data.find(b"\n", at)
            at = end if newline < 0 else newline + 1
            line = self._line + data[start:at]
            if len(line) > _LINE_MAX_BYTES:
                raise Malformed(f"chunked body has a line of more than {_LINE_MAX_BYTES} bytes (RFC 9112 7.1)")
            is_cut = bool(self._line) or newline < 0
            self._line = line if newline < 0 else b""
            instead = line
            if newline >= 0:
                instead = self._end_of_line(line)
            if is_cut or instead is not line:
                if out is not None and in_chunks:
                    if start > kept:
                        out.append(data[kept:start])
                    if newline >= 0 and instead:
                        out.append(instead)
                kept = at
        if out is not None and in_chunks and at > kept:
            out.append(data[kept:at] if kept or at < end else data)  # a compiled slice is a copy, also of all there is
        return at

    def _end_of_line(self, line: bytes) -> bytes:
        """Returns the line as it goes on."""
        if not line.endswith(b"\r\n") or line.find(b"\r") != len(line) - 2:
            raise Malformed("chunked body has a bare CR or LF (RFC 9112 7.1)")
        if self._state == _AFTER_DATA:
            if len(line) > 2:
                raise Malformed("chunked body has a chunk longer than its size (RFC 9112 7.1)")
            self._state = _AT_SIZE
            return line
        if self._state == _IN_TRAILERS:
            self._trailer(line[:-2])
            return b""
        match = _SIZE.match(line[:-2])
        if match is None:
            raise Malformed("chunked body has a malformed chunk size or extension (RFC 9112 7.1)")
        self._remaining = int(match[1], 16)
        self._state = _IN_DATA if self._remaining else _IN_TRAILERS
        if not self._remaining:
            return b""
        extension = len(match[2])
        if not extension:
            return line
        self._extensions += extension
        if self._extensions > _EXTENSIONS_MAX_BYTES:
            raise Malformed(f"chunked body has more than {_EXTENSIONS_MAX_BYTES} bytes of chunk extensions (RFC 9112 7.1.1)")
        return match[1] + b"\r\n"

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.trailers = allowed_trailers(self.trailers)
            self._state = _DONE
            return
        self._trailers += len(line) + _TRAILER_OVERHEAD
        if not _TRAILER.match(line):
            raise Malformed("chunked body has a malformed trailer field (RFC 9112 7.1.2)")
        if self._trailers > _TRAILERS_MAX_BYTES:
            raise Malformed(f"chunked body has more than {_TRAILERS_MAX_BYTES} bytes of trailers (RFC 9112 7.1.2)")
        name, _, value = line.partition(b":")
        self.trailers.append((name.lower(), value.strip(b" \t")))


def encode_end(trailers: Trailers | None) -> bytes:
    """Returns the last chunk and the trailers."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % trailer for trailer in trailers) + b"\r\n"
