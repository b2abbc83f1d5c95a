"""A worker's routes: changes in order, whole tables, and what is reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.policy.routes import RouteTable
from gateway.messages import GateAnswer, Route, Table


def made() -> tuple[RouteTable, list[tuple[Route | None, Route]]]:
    changes: list[tuple[Route | None, Route]] = []
    return RouteTable(lambda: 7.0, lambda old, new: changes.append((old, new))), changes


def test_a_gate_is_confirmed_with_the_activity_until_it_closed() -> None:
    table, changes = made()
    table.replace(Table([Route("h", "s", 1, "open")], []))
    table.account("s").count, table.account("s").waiting, table.account("s").spoken = 7, 2, 3
    assert table.close_gate(Route("h", "s", 1, "hold")) == GateAnswer(7, 2, True)
    assert changes[-1][1].gate == "hold" and table.account("s").gated == (7, 3)
    assert not table.close_gate(Route("h", "s", 1, "open")).is_closed


def test_removal_says_that_nothing_lives() -> None:
    table, changes = made()
    table.replace(Table([Route("h", "s", 1, "open")], []))
    table.replace(Table([], []))
    assert table.get("h") is None and changes[-1][1].is_live is False


def test_looked_up_routes_do_not_replace_known_ones() -> None:
    table, _ = made()
    table.change(Route("h", "s", 2, "open"))
    table.add(Route("h", "s", 1, "hold"))
    assert table.get("h").route.incarnation == 2  # type: ignore[union-attr]


def test_reports_only_what_changed() -> None:
    table, _ = made()
    table.add(Route("h", "s", 1, "open"))
    account = table.account("s")
    assert table.report() is None
    account.count, account.waiting, account.last = 3, 1, 5.0
    report = table.report()
    assert report is not None and report.sessions == {"s": (3, 2.0, 1)}
    assert table.report() is None
    account.waiting = 0
    assert table.report() is not None


def test_sleepers_are_not_looked_at() -> None:
    """However many there are: what came for one meanwhile is said when it runs again."""
    table, _ = made()
    table.replace(Table([Route(f"h{n}", f"s{n}", 1, "hold", is_live=n == 0) for n in range(100)], []))
    for n in range(100):
        table.account(f"s{n}").waiting = 1
    assert list(table._awake) == ["s0"]
    report = table.report()
    assert report is not None and list(report.sessions) == ["s0"]
    table.change(Route("h7", "s7", 2, "open"))
    report = table.report()
    assert report is not None and report.sessions["s7"][2] == 1
    table.change(Route("h7", "", 0, "refuse", is_live=False))
    assert list(table._awake) == ["s0"]


ROUTES = st.builds(
    Route, st.sampled_from("abc"), st.sampled_from(["", "s", "t"]), st.integers(0, 3), st.sampled_from(["open", "hold", "refuse"])
)


@given(st.lists(ROUTES, max_size=30))
def test_changes_one_by_one_equal_the_whole_table(routes: list[Route]) -> None:
    one, heard = made()
    expected: dict[str, Route] = {}
    for route in routes:
        one.change(route)
        expected[route.endpoint] = route
        if not route.session:
            del expected[route.endpoint]
    assert {name: entry.route for name in "abc" if (entry := one.get(name)) is not None} == expected
    assert all(old != new for old, new in heard)


def test_counts_are_said_again_when_a_session_wakes_and_to_a_new_control() -> None:
    """Control forgets them while the session sleeps; an idle suspend compares them with what it was told."""
    table = RouteTable(lambda: 100.0, lambda old, new: None)
    table.replace(Table([Route("h", "s", 1, "open")], []))
    table.account("s").count = 7
    report = table.report()
    assert report is not None and report.sessions["s"][0] == 7 and table.report() is None
    table.change(Route("h", "s", 1, "hold", is_live=False))
    table.change(Route("h", "s", 2, "open"))
    again = table.report()
    assert again is not None and again.sessions["s"][0] == 7 and table.report() is None
    table.replace(Table([Route("h", "s", 2, "open")], []))
    assert table.report() is not None and table.report() is None
