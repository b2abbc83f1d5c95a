"""A stream's window towards its sender, and the budget of what costs a peer nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sources import source

flow = source("wire.http2_flow")
MANY = 1 << 40


class Stream(flow.Flow):  # type: ignore[misc,name-defined]
    def __init__(self, now: float = 100.0) -> None:
        self.open_flow(1, 1000, now)

    def receive(self, size: int) -> None:
        self.receive_window -= size
        self.uncredited += size


def test_half_of_the_window_is_credited_and_no_less() -> None:
    stream = Stream()
    stream.receive(flow.STREAM_WINDOW // 2 - 1)
    assert stream.credit(200.0, MANY) == (0, 0)
    stream.receive(1)
    assert stream.credit(200.0, MANY) == (flow.STREAM_WINDOW // 2, 0)
    assert stream.receive_window == flow.STREAM_WINDOW


def test_nothing_is_credited_behind_the_end() -> None:
    stream = Stream()
    stream.receive(flow.STREAM_WINDOW)
    stream.received_end = True
    assert stream.credit(200.0, MANY) == (0, 0)


def test_a_window_that_is_used_up_fast_doubles_to_its_bound() -> None:
    stream, now, sizes = Stream(), 100.0, []
    for _ in range(10):
        now += 0.1
        stream.receive(stream.receive_size)
        stream.credit(now, MANY)
        sizes.append(stream.receive_size)
        assert stream.receive_window == stream.receive_size
    assert sizes == [flow.STREAM_WINDOW << n for n in range(1, 8)] + [flow.STREAM_WINDOW_MOST] * 3


def test_a_window_that_is_used_slowly_or_has_no_room_stays() -> None:
    stream = Stream()
    for number in range(1, 5):
        stream.receive(stream.receive_size)
        assert stream.credit(100.0 + 0.6 * number, MANY) == (flow.STREAM_WINDOW, 0)
    stream.receive(stream.receive_size)
    assert stream.credit(102.5, 0) == (flow.STREAM_WINDOW, 0)
    stream.receive(stream.receive_size)
    assert stream.credit(102.6, 100) == (flow.STREAM_WINDOW + 100, 100)


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 200_000), st.integers(0, 1 << 20)), max_size=50))
def test_the_peer_never_has_more_than_the_window(steps: list[tuple[float, int, int]]) -> None:
    stream, now = Stream(), 100.0
    for seconds, size, left in steps:
        now += seconds
        stream.receive(min(size, stream.receive_window))
        before = stream.receive_size
        _, growth = stream.credit(now, left)
        assert 0 <= growth <= left and stream.receive_size == before + growth <= flow.STREAM_WINDOW_MOST
        assert stream.receive_window + stream.uncredited == stream.receive_size


def test_a_budget_is_a_burst_that_time_refills() -> None:
    budget = flow.Budget(5.0, 2.0)
    assert [budget.spend(10.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [budget.spend(12.5) for _ in range(4)] == [True] * 3 + [False], "what was refused counts as well"
    assert [budget.spend(1000.0) for _ in range(5)] == [True] * 4 + [False]
