"""What a caller is told when the host cannot do something now, and what is true before a wait is asked again after it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest
from api_rig import PLAIN, VMS, ApiRig, run
from rows import row

from gateway.rpc import RpcError
from gateway.sessions.states import State

POLICY = {"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 600, "autoResumeEnabled": False}


@pytest.fixture
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("bad"), limits={"memory_mib": 3 * 512})
    one.image("plain", resources=[{"minimumMemoryInMiB": 512}])
    yield one
    one.close()


def asleep(api: ApiRig) -> str:
    one = api.run(PLAIN, idlePolicy=POLICY)
    assert api.call("POST", f"{VMS}/{one}/suspend")[0] == 200
    api.reach(one, "SUSPENDED")
    api.do(api.lifecycle.quiet())
    return one


@row(
    "ResumeMicrovm", "again, after a resume that failed: 500 with Retry-After and what the host lacked, 409 where this host's hypervisor cannot "
    "load the snapshot; until then the stateReason says it", "ours",
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "status", "error", "seconds"),
    [("Unavailable", 500, "InternalServerException", "1"), ("Refused", 409, "ConflictException", None)],
)
def test_who_resumes_again_after_a_failure_is_told_what_becomes_of_it(
    api: ApiRig, kind: str, status: int, error: str, seconds: str | None
) -> None:
    one = asleep(api)
    api.host.fail["prepare"] = [RpcError(kind, "no descriptor left")] * 2
    assert api.call("POST", f"{VMS}/{one}/resume")[0] == 200  # it is not waited for: a resume that works is answered at once
    api.do(api.lifecycle.quiet())
    described = api.call("GET", f"{VMS}/{one}")[2]
    assert described["state"] == "SUSPENDED" and "no descriptor left" in described["stateReason"]
    code, fields, body = api.raw("POST", f"{VMS}/{one}/resume")
    assert (code, fields["x-amzn-errortype"], fields.get("retry-after")) == (status, error, seconds) and b"no descriptor left" in body
    assert api.call("POST", f"{VMS}/{one}/resume")[0] == 200
    api.reach(one, "RUNNING")
    assert api.call("GET", f"{VMS}/{one}")[2]["stateReason"] is None


def test_who_terminates_what_an_error_has_ended_gives_up_what_was_saved_of_it(api: ApiRig) -> None:
    one = asleep(api)
    api.host.fail["prepare"] = [RpcError("Damaged", "checksum of 1.pages")]
    assert api.call("POST", f"{VMS}/{one}/resume")[0] == 200
    api.reach(one, "TERMINATED")
    assert one in api.host.aside
    api.host.fail["release_quarantined"] = [RpcError("Unavailable", "the disk is away")]
    status, kind, body = api.call("DELETE", f"{VMS}/{one}")
    assert (status, kind) == (500, "InternalServerException") and "the disk is away: try again" in body["message"]
    assert one in api.host.aside
    for _ in range(2):
        assert api.call("DELETE", f"{VMS}/{one}")[0] == 200
        assert one not in api.host.aside and api.call("GET", f"{VMS}/{one}")[2]["state"] == "TERMINATED"


def test_calls_that_wait_for_room_share_one_quota(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fit into none but three of what the account may have: each has looked before any of them was counted."""
    may_go, waiting = asyncio.Event(), threading.Semaphore(0)

    async def take(is_new: bool = False, disk: int = 0) -> bool:
        waiting.release()
        await may_go.wait()
        return True

    monkeypatch.setattr(api.lifecycle.room, "take", take)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(run, api) for _ in range(4)]
        for _ in calls:
            assert waiting.acquire(timeout=30)
        api.loop.call_soon_threadsafe(may_go.set)
        assert sorted(call.result(30)[0] for call in calls) == [200, 200, 200, 402]


def test_an_image_that_goes_while_a_launch_waits_for_room_launches_nothing(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def take(is_new: bool = False, disk: int = 0) -> bool:
        api.store.images[PLAIN].state = "DELETING"
        return True

    monkeypatch.setattr(api.lifecycle.room, "take", take)
    assert run(api)[:2] == (404, "ResourceNotFoundException") and not api.store.sessions


@row("CreateMicrovmAuthToken", "more separate ranges of ports than a token has room for (some 250): 400", "ours")
def test_a_token_that_no_edge_would_take_is_refused(api: ApiRig) -> None:
    one = api.run(PLAIN)
    many = {"expirationInMinutes": 5, "allowedPorts": [{"port": port} for port in range(1, 2001, 2)]}
    status, kind, body = api.call("POST", f"{VMS}/{one}/auth-token", many)
    assert (status, kind) == (400, "ValidationException") and "1000 separate ranges of ports make a token of" in body["message"]
    few = {"expirationInMinutes": 5, "allowedPorts": [{"port": port} for port in range(1, 1001)]}
    assert api.call("POST", f"{VMS}/{one}/auth-token", few)[0] == 200


def test_a_host_that_is_away_is_no_mistake_of_ours(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = asleep(api)

    async def take(is_new: bool = False, disk: int = 0) -> bool:
        raise RpcError("Unavailable", "vmm is away")

    monkeypatch.setattr(api.lifecycle.room, "take", take)
    code, fields, body = api.raw("POST", f"{VMS}/{one}/resume")
    assert (code, fields["retry-after"]) == (500, "1") and b"vmm is away" in body
    assert api.store.sessions[one].state is State.SUSPENDED
