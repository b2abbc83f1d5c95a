"""What sessions wait for, and how active they were: against a clock of the test's own."""

from __future__ import annotations

import pytest
from test_deadlines import FakeTimer

from gateway.sessions.liveness import Liveness
from gateway.sessions.model import Archived, IdlePolicy, Session
from gateway.sessions.timers import Deadline, Timers

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:a"


class Rig:
    def __init__(self, archive_after: float = 0.0) -> None:
        self.timer = FakeTimer()
        self.wall = 1_000_000.0
        self.due: list[tuple[Deadline, str]] = []
        self.timers = Timers(self.timer, lambda deadline, name: self.due.append((deadline, name)), archive_after, lambda: self.wall)

    def session(self, **changes: object) -> Session:
        return Session("s1", "h1", ARN, "1.0", "image", 512, self.wall, 3600, **changes)  # type: ignore[arg-type]

    def passes(self, seconds: float) -> list[Deadline]:
        """What became due in this time."""
        before = len(self.due)
        self.wall += seconds
        self.timer.advance(seconds)
        return [deadline for deadline, _ in self.due[before:]]


def test_idle_counts_from_the_last_activity_and_is_set_anew() -> None:
    rig = Rig()
    one = rig.session(idle_policy=IdlePolicy(60, 60, True))
    rig.timers.watch_idle(one, rig.timer.time())
    assert rig.passes(59) == []
    rig.timers.watch_idle(one, rig.timer.time())
    assert rig.passes(59) == [] and rig.passes(2) == [Deadline.IDLE]
    rig.timers.watch_idle(rig.session(), rig.timer.time())
    assert rig.passes(1000) == [], "without a policy a session is never idle"


@pytest.mark.parametrize(("suspended_by", "expected"), [("idle", [Deadline.WINDOW]), ("api", [])])
def test_the_window_is_that_of_sleep_by_policy(suspended_by: str, expected: list[Deadline]) -> None:
    rig = Rig()
    one = rig.session(idle_policy=IdlePolicy(60, 30, True), suspended_at=rig.wall, suspended_by=suspended_by)
    rig.wall += 10  # control was away
    rig.timers.watch_window(one)
    assert rig.passes(19) == [] and rig.passes(2) == expected


def test_a_lifetime_that_passed_while_control_was_away_is_over_at_once() -> None:
    rig = Rig()
    one = rig.session()
    rig.wall += 10_000
    rig.timers.watch_lifetime(one)
    assert rig.passes(0.001) == [Deadline.LIFETIME]


def test_archives_are_due_where_they_are_wanted() -> None:
    rig = Rig(archive_after=100.0)
    one = rig.session(suspended_at=rig.wall)
    rig.timers.watch_archive(one)
    assert rig.timers.is_set(one, Deadline.ARCHIVE) and rig.passes(101) == [Deadline.ARCHIVE]
    rig.timers.archive_later(one)
    assert rig.passes(99) == [] and rig.passes(2) == [Deadline.ARCHIVE]
    one.archived = Archived("key", 1, "digest")
    rig.timers.watch_archive(one)
    assert rig.passes(1000) == []
    without = Rig()
    without.timers.watch_archive(without.session(suspended_at=without.wall))
    assert without.passes(100_000) == []


def test_each_deadline_is_cleared_by_itself() -> None:
    rig = Rig(archive_after=5.0)
    one = rig.session(suspended_at=rig.wall, terminated_at=rig.wall)
    rig.timers.watch_archive(one)
    rig.timers.retry_later(one)
    rig.timers.watch_purge(one)
    rig.timers.clear(one, Deadline.ARCHIVE, Deadline.IDLE)
    assert rig.passes(10) == [Deadline.RETRY] and rig.passes(3600) == [Deadline.PURGE]


def test_activity_is_the_last_that_any_worker_reported() -> None:
    now = 100.0
    liveness = Liveness(lambda: now)
    liveness.report("w1", "s1", 7, 50.0, 0)
    assert liveness.last_active("s1") == 100.0, "since it is known"
    now = 200.0
    liveness.report("w1", "s1", 8, 20.0, 0)
    liveness.report("w2", "s1", 3, 90.0, 0)
    assert liveness.last_active("s1") == 180.0 and liveness.counts("s1") == {"w1": 8, "w2": 3}
    liveness.counts("s1").clear()
    assert liveness.counts("s1"), "a copy"


def test_a_request_that_waits_is_activity() -> None:
    now = 100.0
    liveness = Liveness(lambda: now)
    liveness.report("w1", "s1", 7, 0.0, 1)
    now = 300.0
    assert liveness.last_active("s1") == 300.0
    liveness.report("w1", "s1", 7, 200.0, 0)
    now = 400.0
    assert liveness.last_active("s1") == 300.0


def test_what_a_worker_has_not_reported_when_it_leaves_is_activity() -> None:
    now = 100.0
    liveness = Liveness(lambda: now)
    liveness.report("w1", "s1", 7, 0.0, 1)
    liveness.report("w2", "s2", 7, 0.0, 0)
    now = 200.0
    liveness.worker_left("w1")
    assert liveness.last_active("s1") == 200.0 and liveness.last_active("s2") == 100.0
    assert liveness.counts("s1") == {} and liveness.counts("s2") == {"w2": 7}
    now = 300.0
    assert liveness.last_active("s1") == 200.0, "its requests do not wait any more"
    liveness.forget("s1")
    assert liveness.last_active("s1") == 300.0
