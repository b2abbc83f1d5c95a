"""Chunked bodies: the same end in any cut, and nothing that two parsers could read differently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.chunked import ChunkedBody
from gateway.edge.head import Malformed

CHUNKS = st.lists(st.binary(min_size=1, max_size=70), max_size=6)
EXTENSION = st.sampled_from([b"", b";a=b", b' ; a="x y"', b";\t"])


@given(CHUNKS, EXTENSION, st.sampled_from([b"", b"X: y\r\n", b"A: 1\r\nB: 2\r\n"]), st.binary(max_size=20), st.data())
def test_any_cut_finds_the_same_end(chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, data: st.DataObject) -> None:
    body = b"".join(b"%X%b\r\n%b\r\n" % (len(one), extension, one) for one in chunks) + b"0\r\n" + trailers + b"\r\n"
    stream, parser, at, used = body + rest, ChunkedBody(), 0, 0
    while at < len(stream) and not parser.is_complete:
        step = data.draw(st.integers(1, len(stream) - at))
        used += parser.feed(stream[at : at + step])
        at += step
    assert parser.is_complete and used == len(body)


@given(CHUNKS, st.integers(0, 400))
def test_incomplete_is_not_complete(chunks: list[bytes], length: int) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"
    if length < len(body):
        parser = ChunkedBody()
        assert parser.feed(body[:length]) == length and not parser.is_complete


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"-5\r\n", b"\r\n", b" 5\r\nhello\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n", b"5 5\r\nhello\r\n", b"5_\r\n", b"ffffffffffffffff\r\n", b"5\r\r\n", b"0\r\nX : y\r\n\r\n",
        b"0\r\n folded\r\n\r\n", b"0\r\nX: y\n\r\n", b"5;a=\x00\r\n", b"0\r\n: y\r\n\r\n", b"1" * 5000,
        b"0\r\n" + b"X: y\r\n" * 5000,
    ],
)  # fmt: skip
def test_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        ChunkedBody().feed(body)
