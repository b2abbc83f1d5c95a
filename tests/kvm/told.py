"""A plugin of pytest(1): each test's outcome goes to the descriptor TOLD_TO, when it is known; and one that has not ended after TOLD_SECONDS
fails, with where everything stood."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.kvm import stacks

SECONDS = float(os.environ["TOLD_SECONDS"])
_AGAIN_SECONDS = 60.0  # for what holds up the test's end
_MOST = 24_000
_errors = os.dup(2)  # what pytest(1) does not capture


class Stuck(BaseException):
    """Nobody handles it by mistake."""


def _interrupt(*_: object) -> None:
    raise Stuck(f"not done after {SECONDS:g} s; where everything stood:\n{stacks.all_of_them()}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    told = set(json.loads(os.environ.get("TOLD_BEFORE", "[]")))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in told])
    items[:] = [item for item in items if item.nodeid not in told]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, _AGAIN_SECONDS)
    faulthandler.dump_traceback_later(SECONDS + _AGAIN_SECONDS / 2, file=_errors)  # where Python's handler of a signal has no turn
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test counts once: by its call, or by whatever kept it from that, or came after it and failed."""
    if report.when == "call" or not report.passed:
        error = "" if not report.failed else "\n".join([str(report.longrepr), *stacks.logs()])[-_MOST:]
        line = {
            "part": os.environ["TOLD"],
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "error": error,
        }
        os.write(int(os.environ["TOLD_TO"]), f"{json.dumps(line)}\n".encode())
