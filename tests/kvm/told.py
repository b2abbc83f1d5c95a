"""A plugin of pytest(1): each test's outcome goes to the descriptor TOLD_TO, when it is known."""

from __future__ import annotations

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test counts once: by its call, or by whatever kept it from that, or came after it and failed."""
    if report.when == "call" or not report.passed:
        error = "" if report.passed else str(report.longrepr)[-6000:]
        line = {
            "part": os.environ["TOLD"],
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "error": error,
        }
        os.write(int(os.environ["TOLD_TO"]), f"{json.dumps(line)}\n".encode())
