"""A request's body: its end in any cut, and by an injected clock when its client is late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire.http1_head import CHUNKED, FIXED, Malformed
from gateway.edge.wire.request_body import PUNCTUAL, STANDS_STILL, TOO_SLOW, RequestBody


@given(st.binary(min_size=1, max_size=80), st.binary(max_size=20), st.booleans(), st.booleans(), st.data())
def test_any_cut_gives_the_content_and_leaves_what_follows(
    content: bytes, rest: bytes, is_chunked: bool, in_chunks: bool, data: st.DataObject
) -> None:
    whole = b"%x;a=b\r\n%b\r\n0\r\nSum: 1\r\n\r\n" % (len(content), content) if is_chunked else content
    body = RequestBody(CHUNKED if is_chunked else FIXED, 0 if is_chunked else len(content), 0.0)
    stream, at, out = whole + rest, 0, b""
    while not body.is_complete:
        step = data.draw(st.integers(1, len(stream) - at))
        used, piece = body.take(stream[at : at + step], in_chunks, 0.0)
        assert used == step or body.is_complete
        at, out = at + used, out + piece
    assert at == len(whole)
    assert out == (b"%x\r\n%b\r\n" % (len(content), content) if is_chunked and in_chunks else content)
    assert body.trailers == ([(b"sum", b"1")] if is_chunked else None)


def test_content_goes_on_without_a_copy() -> None:
    piece = b"x" * 1000
    assert RequestBody(FIXED, 5000, 0.0).take(piece, True, 0.0)[1] is piece


def test_malformed_chunks_are_refused() -> None:
    with pytest.raises(Malformed):
        RequestBody(CHUNKED, 0, 0.0).take(b"zz\r\n", False, 0.0)


def test_a_body_that_stands_still_is_late() -> None:
    body = RequestBody(FIXED, 5000, 0.0)
    assert body.check(1.0, False, 10.0, 0) == PUNCTUAL
    body.take(b"x", False, 9.0)
    assert body.check(18.0, False, 10.0, 0) == PUNCTUAL
    assert body.check(19.5, False, 10.0, 0) == STANDS_STILL


def test_a_body_that_drips_is_too_slow_and_a_span_counts_for_itself() -> None:
    body = RequestBody(FIXED, 5000, 0.0)
    body.check(0.5, False, 10.0, 10)
    for second in range(1, 11):
        body.take(b"x" * 10, False, float(second))
    assert body.check(11.0, False, 10.0, 10) == PUNCTUAL
    for second in range(12, 22):
        body.take(b"x" * 9, False, float(second))
    assert body.check(21.5, False, 10.0, 10) == TOO_SLOW


def test_a_body_that_is_not_read_is_not_late() -> None:
    body = RequestBody(FIXED, 5000, 0.0)
    for second in range(1, 100):
        assert body.check(float(second), True, 10.0, 10) == PUNCTUAL
    assert body.check(100.0, False, 10.0, 10) == PUNCTUAL
    assert body.check(120.0, False, 10.0, 10) == STANDS_STILL
