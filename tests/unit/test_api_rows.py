"""What calls on microVMs, images and tags answer, row by row, over HTTP (service reference, 1.2, 1.3, 1.5, 2)."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import Any

import pytest
from api_rig import (
    ACCOUNT,
    BASE,
    DETAILS,
    HOOKED,
    IMAGES,
    PLAIN,
    REGION,
    ROLE,
    TAGS,
    VMS,
    ApiRig,
    connector,
    create,
    encoded,
    image_arn,
    refused,
    run,
    with_images,
)
from rows import row
from waiting import until

from gateway.sessions.states import Event


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    with with_images(tmp_path_factory.mktemp("api")) as one:
        yield one


# ---- bodies ----


@row("RunMicrovm", "answers PENDING at once, with every member, null where absent, and the unmodelled `terminationReasonCode`", "R")
def test_run_body(api: ApiRig) -> None:
    status, _, body = run(api)
    assert status == 200
    assert body["microvmId"].startswith("microvm-") and body["endpoint"].endswith(f".lambda-microvm.{REGION}.localhost")
    assert isinstance(body["startedAt"], float)
    assert {name: body[name] for name in body if name not in ("microvmId", "endpoint", "startedAt")} == {
        "state": "PENDING", "imageArn": PLAIN, "imageVersion": "1.0", "executionRoleArn": None, "idlePolicy": None,
        "maximumDurationInSeconds": 28800, "terminatedAt": None, "stateReason": None, "terminationReasonCode": None,
        "ingressNetworkConnectors": [connector("HTTP_INGRESS")], "egressNetworkConnectors": [connector("INTERNET_EGRESS")],
    }  # fmt: skip


@row("GetMicrovm", "has RunMicrovm's members; `idlePolicy` with its three; payload, logging, token and size are not echoed", "R")
def test_get_body(api: ApiRig) -> None:
    policy = {"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 0, "autoResumeEnabled": False}
    one = api.run(HOOKED, wait="PENDING", idlePolicy=policy, runHookPayload="x", logging={"disabled": {}}, clientToken="t1")
    body = api.call("GET", f"{VMS}/{one}")[2]
    assert body["idlePolicy"] == policy
    assert not set(body) & {"runHookPayload", "logging", "clientToken", "resources"}


@row("ListMicrovms", "items have five members, and `nextToken` is null at the end", "R")
def test_list_body(api: ApiRig) -> None:
    one = api.run(PLAIN)
    body = api.call("GET", VMS)[2]
    assert body["nextToken"] is None
    assert set(next(item for item in body["items"] if item["microvmId"] == one)) == {
        "microvmId", "state", "imageArn", "imageVersion", "startedAt",
    }  # fmt: skip


@row("CreateMicrovmImage", "201: the request with its defaults, `id`, version 1.0, CREATING, and the unmodelled nulls", "R")
def test_create_body(api: ApiRig) -> None:
    status, _, body = create(api, "made", tags={"a": "b"})
    assert status == 201
    assert len(body["id"]) == 36 and isinstance(body["createdAt"], float)
    assert {name: body[name] for name in body if name not in ("id", "createdAt", "updatedAt")} == {
        "imageArn": image_arn("made"), "name": "made", "state": "CREATING", "imageVersion": "1.0", "latestActiveImageVersion": None,
        "latestFailedImageVersion": None, "buildPhaseOverrides": None, "roleConfiguration": None, "baseImageArn": BASE,
        "baseImageVersion": "1.0", "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/app.zip"}, "description": None,
        "logging": None, "egressNetworkConnectors": [connector("INTERNET_EGRESS")], "cpuConfigurations": None,
        "resources": [{"minimumMemoryInMiB": 2048}], "additionalOsCapabilities": None, "hooks": None, "environmentVariables": None,
        "tags": {"a": "b"},
    }  # fmt: skip
    api.settled(body["imageArn"])


@row("GetMicrovmImage", "has nine members; a list item lacks `updatedAt` and `tags`", "R")
def test_image_bodies(api: ApiRig) -> None:
    members = {"id", "imageArn", "name", "state", "latestActiveImageVersion", "latestFailedImageVersion", "createdAt"}
    assert set(api.call("GET", f"{IMAGES}/{encoded(PLAIN)}")[2]) == members | {"updatedAt", "tags"}
    assert all(set(item) == members for item in api.call("GET", IMAGES)[2]["items"])


@row("GetMicrovmImageVersion", "echoes the request, and has `versionStateTimeBucket`, `stateReason` and `tags` null", "R")
def test_version_body(api: ApiRig) -> None:
    body = api.call("GET", f"{IMAGES}/{encoded(PLAIN)}/versions/1.0")[2]
    assert (body["state"], body["status"], body["stateReason"], body["tags"]) == ("SUCCESSFUL", "ACTIVE", None, None)
    assert body["versionStateTimeBucket"].startswith("SUCCESSFUL#") and len(body["versionStateTimeBucket"]) == 19
    assert body["codeArtifact"] == {"uri": "s3://bucket/app.zip"}


@row("GetMicrovmImageBuild", "says the host's architecture and chipset, and the sizes once it is built; one build a version", "ours")
def test_build_body(api: ApiRig) -> None:
    path = f"{IMAGES}/{encoded(PLAIN)}/versions/1.0/builds"
    (item,) = api.call("GET", path)[2]["items"]
    body = api.call("GET", f"{path}/{item['buildId']}")[2]
    assert (body["architecture"], body["chipset"], body["buildState"], body["stateReason"]) == ("X86_64", "INTEL", "SUCCESSFUL", None)
    assert body["snapshotBuild"] == {
        "memorySnapshotSizeInBytes": 1 << 20, "diskSnapshotSizeInBytes": 2 << 20, "codeInstallSizeInBytes": 3 << 20,
    }  # fmt: skip
    assert api.call("GET", f"{path}?architecture=ARM_64")[2]["items"] == []


@row("ListManagedMicrovmImages", "the one base image; its versions are 1 and 0, newest first, AVAILABLE", "R")
@row("ListManagedMicrovmImageVersions", "`supportedCpuConfigurations` has the host's architecture", "D")
def test_managed_images(api: ApiRig) -> None:
    (item,) = api.call("GET", "/2025-09-09/managed-microvm-images")[2]["items"]
    assert item["imageArn"] == BASE and set(item) == {"imageArn", "createdAt", "updatedAt"}
    versions = api.call("GET", f"/2025-09-09/managed-microvm-images/{encoded(BASE)}/versions")[2]["items"]
    assert [(one["imageVersion"], one["status"]) for one in versions] == [("1", "AVAILABLE"), ("0", "AVAILABLE")]
    assert set(versions[0]) == {"imageArn", "imageVersion", "status", "createdAt", "updatedAt", "supportedCpuConfigurations"}
    assert versions[0]["supportedCpuConfigurations"] == [{"architecture": "X86_64"}]


@row("CreateMicrovmAuthToken", "one member, `authToken`, with the field's name and the token", "R")
def test_token_body(api: ApiRig) -> None:
    one = api.run(PLAIN)
    body = api.call("POST", f"{VMS}/{one}/auth-token", {"expirationInMinutes": 5, "allowedPorts": [{"port": 80}]})[2]
    assert list(body) == ["authToken"] and list(body["authToken"]) == ["X-aws-proxy-auth"]
    assert body["authToken"]["X-aws-proxy-auth"].count(".") == 4


@row("every operation", "an unknown member is ignored", "R")
def test_unknown_members(api: ApiRig) -> None:
    assert run(api, nonsense=1)[0] == 200


# ---- images (4) ----


@row("UpdateMicrovmImage", "while UPDATING: 409 `MicroVM Image is already in state: UPDATING`; so for UpdateMicrovmImageVersion", "R")
@row("DeleteMicrovmImage", "while UPDATING: 400 `Cannot delete MicroVM image in its current state: <arn>`", "R")
@row("DeleteMicrovmImageVersion", "its build under way: the build is called off and the version goes", "ours")
def test_busy_image(api: ApiRig) -> None:
    arn = api.image("busy")
    api.pipeline.held["busy"] = asyncio.Event()
    body = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/two.zip"}}
    status, _, made = api.call("PUT", f"{IMAGES}/{encoded(arn)}", body)
    assert (status, made["state"], made["imageVersion"]) == (200, "UPDATING", "2.0")
    text = "MicroVM Image is already in state: UPDATING"
    refused(api.call("PUT", f"{IMAGES}/{encoded(arn)}", body), 409, "ConflictException", text, **DETAILS)
    refused(api.call("PATCH", f"{IMAGES}/{encoded(arn)}/versions/1.0", {"status": "INACTIVE"}), 409, "ConflictException", text, **DETAILS)
    text = f"Cannot delete MicroVM image in its current state: {arn}"
    refused(api.call("DELETE", f"{IMAGES}/{encoded(arn)}"), 400, "ValidationException", text)
    assert run(api, arn)[2]["imageVersion"] == "1.0"
    answer = api.call("DELETE", f"{IMAGES}/{encoded(arn)}/versions/2.0")
    assert answer[::2] == (200, {"imageIdentifier": arn, "imageVersion": "2.0", "state": "DELETING"})
    assert api.settled(arn)["state"] == "CREATED"
    del api.pipeline.held["busy"]
    made = api.call("PUT", f"{IMAGES}/{encoded(arn)}", body)[2]
    assert made["imageVersion"] == "3.0", "a number is used once"
    assert api.settled(arn)["latestActiveImageVersion"] == "3.0"


@row("DeleteMicrovmImage", "with live microVMs: 400 `Cannot delete microvm image with running microvms.`", "R")
@row("DeleteMicrovmImage", "`{imageIdentifier, state: DELETING}`; then it is gone, and the name free", "R")
def test_delete_image(api: ApiRig) -> None:
    arn = api.image("goes")
    one = api.run(arn)
    refused(
        api.call("DELETE", f"{IMAGES}/{encoded(arn)}"), 400, "ValidationException", "Cannot delete microvm image with running microvms."
    )
    api.call("DELETE", f"{VMS}/{one}")
    api.reach(one, "TERMINATED")
    assert api.call("DELETE", f"{IMAGES}/{encoded(arn)}")[::2] == (200, {"imageIdentifier": arn, "state": "DELETING"})
    api.do(until(lambda: arn not in api.store.images, 30))
    assert create(api, "goes")[0] == 201
    api.settled(arn)


@row("DeleteMicrovmImageVersion", "the last one: 400 `This is the last version. Please delete the entire image`", "M")
@row("DeleteMicrovmImageVersion", "with live microVMs of it: 400, as for the image", "ours")
def test_delete_version(api: ApiRig) -> None:
    arn = api.image("versions")
    text = "This is the last version. Please delete the entire image"
    refused(api.call("DELETE", f"{IMAGES}/{encoded(arn)}/versions/1.0"), 400, "ValidationException", text)
    one = api.run(arn)
    api.call("PUT", f"{IMAGES}/{encoded(arn)}", {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://b-b/k"}})
    api.settled(arn)
    assert [one["imageVersion"] for one in api.call("GET", f"{IMAGES}/{encoded(arn)}/versions")[2]["items"]] == ["2.0", "1.0"]
    text = "Cannot delete microvm image with running microvms."
    refused(api.call("DELETE", f"{IMAGES}/{encoded(arn)}/versions/1.0"), 400, "ValidationException", text)
    api.call("DELETE", f"{VMS}/{one}")
    api.reach(one, "TERMINATED")
    assert api.call("DELETE", f"{IMAGES}/{encoded(arn)}/versions/1.0")[0] == 200
    assert api.settled(arn)["state"] == "UPDATED"
    assert [one["imageVersion"] for one in api.call("GET", f"{IMAGES}/{encoded(arn)}/versions")[2]["items"]] == ["2.0"]


@row("UpdateMicrovmImage", "a failed update keeps the older version active and sets `latestFailedImageVersion`", "R")
@row("GetMicrovmImageBuild", "the reason of a failure is on the build only", "R")
def test_failed_update(api: ApiRig) -> None:
    arn = api.image("fails")
    api.pipeline.failing["fails"] = "The container image build failed."
    api.call("PUT", f"{IMAGES}/{encoded(arn)}", {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://b-b/k"}})
    image = api.settled(arn)
    assert (image["state"], image["latestActiveImageVersion"], image["latestFailedImageVersion"]) == ("UPDATE_FAILED", "1.0", "2.0")
    assert api.call("GET", f"{IMAGES}/{encoded(arn)}/versions/2.0")[2]["stateReason"] is None
    (build,) = api.call("GET", f"{IMAGES}/{encoded(arn)}/versions/2.0/builds")[2]["items"]
    assert (build["buildState"], build["stateReason"]) == ("FAILED", "The container image build failed.")
    assert run(api, arn)[2]["imageVersion"] == "1.0"


@row(
    "CreateMicrovmImage",
    "at most `images.concurrent_builds` at once, `images.account_builds` of an account; the rest wait in order, PENDING, accounts take turns, "
    "and they go on after a restart",
    "ours",
)
def test_build_queue(api: ApiRig) -> None:
    names = ["queue1", "queue2", "queue3", "queue4"]
    for name in names:
        api.pipeline.held[name] = asyncio.Event()
        api.image(name, built=False)

    def states() -> list[str]:
        return [api.call("GET", f"{IMAGES}/{encoded(image_arn(name))}/versions/1.0")[2]["state"] for name in names]

    def started(count: int) -> None:
        api.do(until(lambda: sum(one.startswith("queue") for one in api.pipeline.order) >= count, 30))

    started(2)
    assert states() == ["IN_PROGRESS", "IN_PROGRESS", "PENDING", "PENDING"]
    api.restart()
    started(4)
    assert [one for one in api.pipeline.order if one.startswith("queue")][2:] == ["queue3 1.0", "queue4 1.0"]
    assert states()[:2] == ["FAILED", "FAILED"]
    for name in names:
        api.loop.call_soon_threadsafe(api.pipeline.held.pop(name).set)
    for name in names[2:]:
        assert api.settled(image_arn(name))["state"] == "CREATED"


@row("CreateMicrovmImage", "a waiting build says in its log for how many; what cannot be built fails without waiting", "ours")
def test_the_queue_says_how_long_it_is(api: ApiRig) -> None:
    names = ["wait1", "wait2", "wait3", "wait4"]
    for name in names:
        api.pipeline.held[name] = asyncio.Event()
        api.image(name, built=False)
    api.pipeline.refused["bad"] = "CONTAINER_BUILD_FAILED: Dockerfile, line 1: no"
    bad = api.image("bad", built=False)
    assert api.settled(bad)["state"] == "CREATE_FAILED"
    (build,) = api.call("GET", f"{IMAGES}/{encoded(bad)}/versions/1.0/builds")[2]["items"]
    assert build["stateReason"] == "CONTAINER_BUILD_FAILED: Dockerfile, line 1: no"
    (build,) = api.call("GET", f"{IMAGES}/{encoded(image_arn('wait4'))}/versions/1.0/builds")[2]["items"]

    def said() -> list[str]:
        events, _ = api.logs.read(ACCOUNT, "/aws/lambda-microvms/wait4", f"build/1.0/{build['buildId']}")
        return [event.m for event in events]

    assert said() == ["torpor: waiting for 2 builds"]
    for name in names:
        api.loop.call_soon_threadsafe(api.pipeline.held[name].set)
        api.settled(image_arn(name))
    assert said() == ["torpor: waiting for 2 builds", "torpor: waiting for 1 build", "torpor: the image is ready"]


@row(
    "CreateMicrovmImage",
    "a build that fails in words that are no text (of a Dockerfile in Latin-1) ends all the same, and says them",
    "ours",
)
@pytest.mark.parametrize("where", ["refused", "failing", "broken"])
def test_a_failure_whose_words_are_no_text(api: ApiRig, where: str) -> None:
    words = "CONTAINER_BUILD_FAILED: COPY --chmod=\udcff"
    name = f"words-{where}"
    getattr(api.pipeline, where)[name] = words
    arn = api.image(name, built=False)
    assert api.settled(arn)["state"] == "CREATE_FAILED"
    (build,) = api.call("GET", f"{IMAGES}/{encoded(arn)}/versions/1.0/builds")[2]["items"]
    assert build["stateReason"].endswith("CONTAINER_BUILD_FAILED: COPY --chmod=\ufffd")
    events, _ = api.logs.read(ACCOUNT, f"/aws/lambda-microvms/{name}", f"build/1.0/{build['buildId']}")
    assert events[-1].m == f"torpor: {build['stateReason']}"


# ---- tags ----


@row("TagResource", "204, UntagResource 204, ListTags `{Tags: {…}}`, empty without tags", "R")
def test_tags(api: ApiRig) -> None:
    path = f"{TAGS}/{encoded(PLAIN)}"
    assert api.call("GET", path)[2] == {"Tags": {}}
    assert api.raw("POST", path, {"Tags": {"a": "1", "b": "2"}})[::2] == (204, b"")
    assert api.raw("DELETE", f"{path}?tagKeys=a&tagKeys=z")[::2] == (204, b"")
    assert api.call("GET", path)[2] == {"Tags": {"b": "2"}}
    assert api.call("GET", f"{IMAGES}/{encoded(PLAIN)}")[2]["tags"] == {"b": "2"}
    api.raw("DELETE", f"{path}?tagKeys=b")


@row("TagResource", "a microVM has no tags: its id is refused by the pattern", "R")
def test_vm_has_no_tags(api: ApiRig) -> None:
    status, kind, body = api.call("POST", f"{TAGS}/microvm-1", {"Tags": {"a": "b"}})
    assert (status, kind) == (400, "ValidationException") and "failed to satisfy constraint: Member must satisfy regular" in body["message"]


@row("TagResource", "at most 50 tags, and none that begins with `aws:`", "ours")
def test_tag_limits(api: ApiRig) -> None:
    path = f"{TAGS}/{encoded(PLAIN)}"
    assert api.call("POST", path, {"Tags": {f"k{n}": "" for n in range(51)}})[0] == 400
    assert api.call("POST", path, {"Tags": {"aws:x": ""}})[:2] == (400, "InvalidParameterValueException")
    assert create(api, tags={f"k{n}": "" for n in range(51)})[:2] == (400, "ValidationException")
    assert create(api, tags={"aws:x": ""})[:2] == (400, "ValidationException")
    assert image_arn("refused") not in api.store.images


@row("ListTags", "of what is not there: 404 with the small `message` that its model has", "D")
def test_tags_of_nothing(api: ApiRig) -> None:
    none = image_arn("none")
    refused(api.call("GET", f"{TAGS}/{encoded(none)}"), 404, "ResourceNotFoundException", f"Resource not found: {none}", **DETAILS)


# ---- paging, tokens, consistency (1.5) ----


@row("ListMicrovmImages", "`maxResults` counts before `nameFilter`: empty pages with a token occur; the filter is a substring", "M")
def test_filter_after_page(api: ApiRig) -> None:
    for name in ("filter-a", "filter-b", "wanted-c"):
        api.image(name)
    found, token, pages = [], "", 0
    while True:
        body = api.call("GET", f"{IMAGES}?maxResults=1&nameFilter=anted{f'&nextToken={encoded(token)}' if token else ''}")[2]
        found += body["items"]
        pages += 1
        token = body["nextToken"]
        if token is None:
            break
    assert [item["name"] for item in found] == ["wanted-c"] and pages >= 3


@row("every list", "tokens are opaque and sealed, and each account's own: a made-up one is a 400", "ours")
def test_page_tokens(api: ApiRig) -> None:
    status, kind, _ = api.call("GET", f"{VMS}?nextToken=made-up")
    assert (status, kind) == (400, "ValidationException")
    assert api.call("GET", f"{VMS}?maxResults=51")[0] == api.call("GET", f"{VMS}?maxResults=0")[0] == 400
    for text in ("1_0", "%2B5", "%205", "5.0", "%D9%A3", "", "9" * 19, "9" * 400):
        assert api.call("GET", f"{VMS}?maxResults={text}")[0] == 400, text


@row("RunMicrovm", "same token and parameters: the original reply, also at once, also after a restart; others: 409", "M")
def test_client_tokens(api: ApiRig) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: run(api, clientToken="same"), range(8)))
    assert all(answer == answers[0] for answer in answers) and answers[0][0] == 200
    api.reach(answers[0][2]["microvmId"], "RUNNING")
    assert run(api, clientToken="same") == answers[0], "the first reply, PENDING, not a fresh read"
    api.restart()
    assert run(api, clientToken="same") == answers[0]
    status, kind, _ = run(api, clientToken="same", maximumDurationInSeconds=60)
    assert (status, kind) == (409, "ConflictException")
    assert run(api, clientToken="other")[2]["microvmId"] != answers[0][2]["microvmId"]


@row("CreateMicrovmImage", "the same client token and parameters: the first reply; others: 409", "ours")
def test_image_client_tokens(api: ApiRig) -> None:
    first = create(api, "token", clientToken="img")
    assert create(api, "token", clientToken="img") == first
    assert create(api, "token2", clientToken="img")[:2] == (409, "ConflictException")
    assert create(api, "token")[0] == 400
    api.settled(image_arn("token"))


@row("every operation", "a Get after a reply sees it: consistency is strong", "ours")
def test_consistency(api: ApiRig) -> None:
    one = run(api)[2]["microvmId"]
    assert api.call("GET", f"{VMS}/{one}")[0] == 200
    assert any(item["microvmId"] == one for item in _all(api))
    api.call("DELETE", f"{VMS}/{one}")
    assert api.call("GET", f"{VMS}/{one}")[2]["state"] in ("TERMINATING", "TERMINATED")


def _all(api: ApiRig) -> list[dict[str, Any]]:
    return [item for page in api.client().get_paginator("list_microvms").paginate() for item in page["items"]]


# ---- state by call (2.1) ----

_CELLS = {
    "PENDING": {"suspend": 409, "resume": 200, "auth-token": 200},
    "RUNNING": {"resume": 200, "auth-token": 200, "suspend": 200},
    "SUSPENDED": {"suspend": 200, "auth-token": 200, "resume": 200},
    "TERMINATED": {"suspend": 400, "resume": 400, "auth-token": 400, "": 200},
}


@row("SuspendMicrovm", "while PENDING: 409, wait until it is RUNNING; SUSPENDED: 200 and nothing happens", "ours")
@row("ResumeMicrovm", "200 in PENDING, RUNNING and SUSPENDED", "M")
@row("CreateMicrovmAuthToken", "200 in every state but TERMINATED, which is 400", "ours")
@pytest.mark.parametrize("state", _CELLS)
def test_calls_by_state(api: ApiRig, state: str) -> None:
    for call, status in _CELLS[state].items():
        if state == "PENDING":
            api.host.block["prepare"] = asyncio.Event()
        one = api.run(PLAIN, wait="PENDING" if state == "PENDING" else "RUNNING")
        if state == "SUSPENDED":
            api.call("POST", f"{VMS}/{one}/suspend")
            api.reach(one, "SUSPENDED")
        if state == "TERMINATED":
            api.call("DELETE", f"{VMS}/{one}")
            api.reach(one, "TERMINATED")
        body = {"expirationInMinutes": 1, "allowedPorts": [{"port": 80}]} if call == "auth-token" else None
        answer = api.call("POST" if call else "DELETE", f"{VMS}/{one}{f'/{call}' if call else ''}", body)
        assert answer[0] == status, (call, answer)
        if state == "PENDING":
            api.loop.call_soon_threadsafe(api.host.block.pop("prepare").set)
            api.reach(one, "RUNNING")


@row("stateReason", "`MicroVM exceeded maximum lifetime.`, `Container Stopped with Exit Code: N`, `Success.`; null while healthy", "M")
def test_reasons(api: ApiRig) -> None:
    one, two = api.run(PLAIN), api.run(PLAIN)
    assert api.call("GET", f"{VMS}/{one}")[2]["stateReason"] is None
    for name, event, text in (
        (one, Event.EXPIRED, "MicroVM exceeded maximum lifetime."), (two, Event.EXITED, "Container Stopped with Exit Code: 3"),
    ):  # fmt: skip
        api.do(api.lifecycle.fire(api.store.sessions[name], event, text))
        api.reach(name, "TERMINATED")
        body = api.call("GET", f"{VMS}/{name}")[2]
        assert body["stateReason"] == text and body["terminatedAt"] >= body["startedAt"]
