"""Runs last: what the tests before it left behind while the service is up, and that it forgets what is over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from service import Instance, until

pytestmark = pytest.mark.vm


def test_nothing_is_left_of_sessions_that_are_over(instance: Instance, app: str) -> None:
    listed = instance.client().list_microvms(maxResults=50)["items"]
    alive = {item["microvmId"] for item in listed if item["state"] != "TERMINATED"}
    until(lambda: set(instance.hypervisors()) == alive)  # none that ran ahead either: their images are gone
    until(lambda: {path.name for path in (instance.root / "sessions").iterdir()} == {*alive, "instance-id"})
    images = {path.name for path in (instance.root / "images").iterdir()}
    assert not [name for name in images if name.startswith(".")]
    assert not list((instance.root / "builds/work").iterdir())
    assert not list((instance.root / "control/builds").iterdir())
    # Links: one for each session that is awake, and the ones kept ready, which are as many as were wanted lately.
    assert len(list((instance.run / instance.name / "netns").iterdir())) <= len(alive) + 48


def test_a_service_at_rest_uses_no_processor(instance: Instance, app: str) -> None:
    """A reader that is left on a channel that ended, or a poll, would show here."""

    def used(name: str) -> float:
        fields = Path(f"/proc/{instance.pid_of(name)}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    names = ("control", "vmm", "edge-0", "edge-1")
    time.sleep(2)  # what is kept ready is made again after a while of quiet
    before = {name: used(name) for name in names}
    time.sleep(2)
    busy = {name: used(name) - before[name] for name in names}
    assert max(busy.values()) < 1.0, busy
