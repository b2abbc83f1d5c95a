"""Sixty-four clients on one microVM at once: every reply is one that the table allows, and what is left is one session."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from api_rig import ApiRig, image_arn

VMS = "/2025-09-09/microvms"
TOKEN = {"expirationInMinutes": 5, "allowedPorts": [{"port": 80}]}
# Status by call: what the table of states has in any state.
_ALLOWED = {
    "suspend": {200: None, 409: "ConflictException", 400: "ValidationException"},
    "resume": {200: None, 400: "ValidationException"},
    "auth-token": {200: None, 400: "ValidationException"},
    "": {200: None},
}


@pytest.fixture
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("race"))
    one.image("race")
    yield one
    one.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_race_on_one_session(api: ApiRig, seed: int) -> None:
    policy = {"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 600, "autoResumeEnabled": True}
    one = api.run(image_arn("race"), idlePolicy=policy)
    session = api.store.sessions[one]
    chance = random.Random(seed)
    plans = [[chance.choice(["suspend", "resume", "auth-token", "", "request"]) for _ in range(6)] for _ in range(63)]
    seen: Counter[tuple[str, int]] = Counter()

    def client(plan: list[str]) -> None:
        for call in plan:
            if call == "request":
                api.do(api.lifecycle.request(session))
                continue
            method, tail = ("GET", "") if call == "" else ("POST", f"/{call}")
            status, kind, body = api.call(method, f"{VMS}/{one}{tail}", TOKEN if call == "auth-token" else None)
            assert status in _ALLOWED[call] and kind == (_ALLOWED[call][status] or ""), (call, status, kind, body)
            seen[call, status] += 1

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        running = [pool.submit(client, plan) for plan in plans]
        last = pool.submit(client, ["", "", ""])
        for future in [*running[:40], last]:
            future.result(60)
        assert api.call("DELETE", f"{VMS}/{one}")[0] == 200
        for future in running[40:]:
            future.result(60)
    api.reach(one, "TERMINATED")
    assert seen["suspend", 200] and seen["resume", 200] and seen["auth-token", 200]
    assert not api.host.held and not api.host.snapshots
    rows = api.do(api.store.events(one))
    assert [row.new for row in rows][-1] == "TERMINATED"
    assert all(after.old == before.new for before, after in itertools.pairwise(rows))
