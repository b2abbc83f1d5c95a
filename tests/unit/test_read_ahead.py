"""What was read ahead comes back to the byte, and is not copied for each request of a pipeline."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire.read_ahead import ReadAhead


@given(st.binary(max_size=50), st.integers(0, 50), st.lists(st.binary(min_size=1, max_size=20), max_size=5))
def test_all_of_it_comes_back_in_order(first: bytes, at: int, more: list[bytes]) -> None:
    ahead = ReadAhead()
    ahead.keep(first, min(at, len(first)))
    for one in more:
        ahead.append(one)
    expected = first[at:] + b"".join(more)
    assert ahead.size == len(expected)
    data, begins = ahead.take()
    assert data[begins:] == expected
    assert ahead.size == 0 and ahead.take() == (b"", 0)


def test_the_rest_of_a_read_is_kept_without_a_copy() -> None:
    ahead, data = ReadAhead(), b"x" * 1000
    ahead.keep(data, 10)
    taken, at = ahead.take()
    assert taken is data and at == 10
