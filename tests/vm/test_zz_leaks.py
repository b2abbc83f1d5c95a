"""Runs last: what the tests before it left behind while the service is up, and that it forgets what is over."""

from __future__ import annotations

import pytest
from service import Instance, until

pytestmark = pytest.mark.vm


def test_nothing_is_left_of_sessions_that_are_over(instance: Instance, app: str) -> None:
    listed = instance.client().list_microvms(maxResults=50)["items"]
    alive = {item["microvmId"] for item in listed if item["state"] != "TERMINATED"}
    until(lambda: set(instance.hypervisors()) == alive)  # none that ran ahead either: their images are gone
    until(lambda: {path.name for path in (instance.root / "sessions").iterdir()} == alive)
    images = {path.name for path in (instance.root / "images").iterdir()}
    assert not [name for name in images if name.startswith(".")]
    assert not list((instance.root / "builds/work").iterdir())
    assert not list((instance.root / "control/builds").iterdir())
    # Links: one for each session that is awake, and the ones kept ready, which are as many as were wanted lately.
    assert len(list((instance.run / instance.name / "netns").iterdir())) <= len(alive) + 48
