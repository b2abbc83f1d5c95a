"""Chunked bodies: the same end in any cut, and nothing that two parsers could read differently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire.chunked import ChunkedBody, encode_end
from gateway.edge.wire.http1_head import Malformed

CHUNKS = st.lists(st.binary(min_size=1, max_size=70), max_size=6)
EXTENSION = st.sampled_from([b"", b";a=b", b' ; a="x y"', b";a;b = c", b';a="\\"\t\xe9"'])
TRAILERS = st.sampled_from([b"", b"X: y\r\n", b"A: 1\r\nB: 2\r\n", b"Content-Length: 5\r\nA: 1\r\n"])


def body_of(chunks: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    return b"".join(b"%X%b\r\n%b\r\n" % (len(one), extension, one) for one in chunks) + b"0" + extension + b"\r\n" + trailers + b"\r\n"


def fed(parser: ChunkedBody, stream: bytes, data: st.DataObject, in_chunks: bool) -> tuple[int, bytes]:
    """In any cut: the bytes that were the body's, and what came out."""
    out: list[bytes] = []
    at = used = 0
    while at < len(stream) and not parser.is_complete:
        step = data.draw(st.integers(1, len(stream) - at))
        used += parser.feed(stream[at : at + step], out, in_chunks)
        at += step
    return used, b"".join(out)


@given(CHUNKS, EXTENSION, TRAILERS, st.binary(max_size=20), st.data())
def test_any_cut_finds_the_same_end_and_content(
    chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, data: st.DataObject
) -> None:
    body, parser = body_of(chunks, extension, trailers), ChunkedBody()
    assert fed(parser, body + rest, data, False) == (len(body), b"".join(chunks)) and parser.is_complete


@given(CHUNKS, EXTENSION, TRAILERS, st.binary(max_size=20), st.data())
def test_any_cut_goes_on_in_its_chunks_without_extensions_and_with_the_trailers_that_may(
    chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, data: st.DataObject
) -> None:
    body, parser = body_of(chunks, extension, trailers), ChunkedBody()
    used, out = fed(parser, body + rest, data, True)
    allowed = [(b"x", b"y")] if b"X" in trailers else [(b"a", b"1"), (b"b", b"2")][: trailers.count(b"A") + trailers.count(b"B")]
    assert used == len(body) and parser.trailers == allowed
    assert out + encode_end(parser.trailers) == body_of(chunks)[:-5] + encode_end(allowed)


def test_a_whole_body_goes_on_as_it_came() -> None:
    """No copy is made of what may go on unchanged."""
    out: list[bytes] = []
    piece = body_of([b"hello", b"world"])[:-5]
    ChunkedBody().feed(piece, out, True)
    assert out[0] is piece


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
        # extensions that are none (RFC 9112, 7.1.1), in which two readers may find different bodies
        b"5;\r\nhello\r\n", b"5;;a\r\nhello\r\n", b'5;a="x\r\nhello\r\n', b"5 ;\r\nhello\r\n", b"5;\x80\r\nhello\r\n", b"5;a=\r\nhello\r\n",
        b'5;a="x"y\r\nhello\r\n', b"5;a b\r\nhello\r\n", b'5;a="\r\nx"\r\nhello\r\n', b"5;=a\r\nhello\r\n", b";a\r\nhello\r\n", b"5 \r\nhello\r\n",
        b"1;a=" + b"b" * 4100 + b"\r\n", b"0;\r\n\r\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_chunks", [False, True])
def test_refused(body: bytes, in_chunks: bool) -> None:
    with pytest.raises(Malformed, match=r"^chunked body has .* \(RFC 9112 7\.1(\.[12])?\)$"):
        ChunkedBody().feed(body, [], in_chunks)


def test_extensions_are_bounded_in_all() -> None:
    parser = ChunkedBody()
    with pytest.raises(Malformed, match="16384 bytes of chunk extensions"):
        for _ in range(9):
            parser.feed(b"1;a=%b\r\nx\r\n" % (b"b" * 2000))


FORBIDDEN = [
    "Content-Length", "transfer-encoding", "Host", "Connection", "Trailer", "TE", "Upgrade", "Authorization", "Proxy-Authorization", "Cookie",
    "Set-Cookie", "X-aws-proxy-auth", "X-aws-proxy-port", "x-amzn-requestid", "X-Forwarded-For", "Forwarded", "Via", "Max-Forwards", "Expect",
    "Content-Type", "Content-Encoding", "Content-Range", "Cache-Control", "If-Match", "Range", "Sec-WebSocket-Key",
]  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_trailer_may_not_bring(name: str) -> None:
    """Framing, routing, authentication, controls, content's form, and what only we write (RFC 9110, 6.5.1)."""
    parser = ChunkedBody()
    parser.feed(b"0\r\n%b: 1\r\nGrpc-Status: 0\r\n\r\n" % name.encode())
    assert parser.trailers == [(b"grpc-status", b"0")]
