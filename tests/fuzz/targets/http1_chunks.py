"""Chunked bodies (gateway/edge/wire/chunked.py): in any cut, compiled or not, the same content, the same end, the same refusal."""

from __future__ import annotations

from typing import Any

from sources import source

from gateway.edge.wire import chunked as compiled
from gateway.edge.wire.http1_head import Malformed

written = source("wire.chunked")
_malformed = source("wire.http1_head").Malformed
TRACED = ("edge_sources.wire.chunked",)
WORDS = (
    b"\r\n",
    b"\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b";a=b",
    b';a="x"',
    b"0\r\nX: y\r\n\r\n",
    b"ffffffff\r\n",
    b"5 ",
    b"+",
    b"0x",
    b"\t",
    b"\\",
)


def seeds() -> list[bytes]:
    return [
        b"5\r\nhello\r\n0\r\n\r\nrest",
        b'5;a=b\r\nhello\r\n3 ; x="y"\r\nabc\r\n0\r\nX: y\r\nHost: z\r\n\r\n',
        b"a\r\n0123456789\r\n0\r\n\r\n",
    ]


def _fed(parser: Any, data: bytes, cut: int, in_chunks: bool) -> tuple[Any, ...]:
    out: list[bytes] = []
    used = 0
    try:
        for at in range(0, len(data), cut):
            used += parser.feed(data[at : at + cut], out, in_chunks)
            if parser.is_complete:
                break
    except (Malformed, _malformed):
        return ("malformed",)
    return used, b"".join(out) if not in_chunks or parser.is_complete else b"", parser.is_complete, parser.trailers


def check(data: bytes) -> None:
    contents = [
        _fed(parser, data, cut, False)
        for parser, cut in (
            (written.ChunkedBody(), len(data) or 1),
            (compiled.ChunkedBody(), 1 + len(data) // 5),
            (compiled.ChunkedBody(), 1),
        )
    ]
    assert contents[0] == contents[1] == contents[2], "two readings of a body"
    chunks = [
        _fed(parser, data, cut, True)
        for parser, cut in ((written.ChunkedBody(), len(data) or 1), (compiled.ChunkedBody(), 1 + len(data) // 3))
    ]
    assert chunks[0] == chunks[1], "two ways for chunks to go on"
    if len(chunks[0]) > 1 and chunks[0][2]:
        again = _fed(compiled.ChunkedBody(), chunks[0][1] + compiled.encode_end(chunks[0][3]), 1 << 20, False)
        assert again[1:] == contents[0][1:], "what goes on reads otherwise"
