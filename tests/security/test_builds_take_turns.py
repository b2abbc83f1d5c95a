"""One account cannot hold the queue of builds: through the API, with a build pipeline that ends when it is told to.

Attacked: a hundred images of one account, then one of another's. The wall is the line that goes by accounts (gateway/images/turns.py); the
control takes it away, and the other account waits for all hundred.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import ACCOUNT, BASE, IMAGES, OTHER, ApiRig, image_arn
from waiting import until

from gateway.images import turns

MANY = 24
ALLOWED = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path)
    one.do(one.accounts.create_account("other", OTHER))
    yield one
    one.close()


def built_before_the_others(api: ApiRig) -> int:
    """How many of the flood's builds have their turn before the other account's one."""
    theirs = api.do(api.accounts.create_key(OTHER, "builder", ALLOWED))
    names = [f"flood{number:02}" for number in range(MANY)]
    for name in names:
        api.pipeline.held[name] = asyncio.Event()
        api.image(name, built=False)
    api.do(until(lambda: len(api.pipeline.order) == 2, 30))
    body = {
        "baseImageArn": BASE,
        "buildRoleArn": f"arn:aws:iam::{OTHER}:role/build",
        "codeArtifact": {"uri": "s3://bucket/app.zip"},
        "name": "one",
    }
    status, _, made = api.call("POST", IMAGES, body, key=(theirs.id, theirs.secret))
    assert status == 201, made
    for name in names:
        api.loop.call_soon_threadsafe(api.pipeline.held.pop(name).set)
        api.settled_in(image_arn(name, ACCOUNT))
    api.settled_in(image_arn("one", OTHER))
    return api.pipeline.order.index("one 1.0")


def test_a_flood_of_builds_delays_another_account_by_the_builds_under_way(api: ApiRig) -> None:
    assert built_before_the_others(api) == 2


def test_without_the_line_by_accounts_it_waits_for_all(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: as it was, all in one row."""
    join = turns.Line.join
    monkeypatch.setattr(turns.Line, "join", lambda line, account: join(line, "everybody"))
    assert built_before_the_others(api) == MANY


def test_an_account_leaves_a_place_to_others(api: ApiRig) -> None:
    """Its builds may take as long as they are let (half an hour each): with a place to spare nobody waits for them."""
    api.registry._turns = turns.Turns(3, 2)
    for name in ("long1", "long2", "long3"):
        api.pipeline.held[name] = asyncio.Event()
        api.image(name, built=False)
    api.do(until(lambda: len(api.pipeline.order) == 2, 30))
    theirs = api.do(api.accounts.create_key(OTHER, "builder", ALLOWED))
    body = {
        "baseImageArn": BASE,
        "buildRoleArn": f"arn:aws:iam::{OTHER}:role/build",
        "codeArtifact": {"uri": "s3://bucket/app.zip"},
        "name": "one",
    }
    assert api.call("POST", IMAGES, body, key=(theirs.id, theirs.secret))[0] == 201
    api.settled_in(image_arn("one", OTHER))
    assert api.pipeline.order == ["long1 1.0", "long2 1.0", "one 1.0"]
    for event in api.pipeline.held.values():
        api.loop.call_soon_threadsafe(event.set)
