"""The API against botocore's models as a whole: every operation, time, enum value, exception, sensitive shape, idempotent delete."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import output_shapes
import pytest
from api_rig import BASE, HOOKS, IMAGES, REGION, ROLE, TAGS, VMS, ApiRig, create, encoded, image_arn, refused, run
from botocore.model import ListShape, MapShape, Shape, StructureShape
from rows import row
from test_coverage import never_answered
from waiting import until

from gateway.api.errors import ApiError, InternalServer, Throttling, as_modelled
from gateway.api.model import Model, is_secret

MODEL = Model()
OFFERED = [operation for operation in MODEL.operations if operation.is_offered]
CONNECTORS = "/2026-04-04/network-connectors"
AGAIN = {"baseImageArn": BASE, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://bucket/two.zip"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("models"), egress={"subnets": {"subnet-1": ["10.1.0.0/16"]}})
    one.image("plain")
    yield one
    one.close()


def path(arn: str, version: str = "") -> str:
    return f"{IMAGES}/{encoded(arn)}" + (f"/versions/{version}" if version else "")


def walk(api: ApiRig) -> None:
    """Every operation in every state of what it is about; the rig holds each answer against the models."""
    _walk_images(api)
    _walk_microvms(api)
    _walk_connectors(api)


def _look(api: ApiRig, arn: str, version: str) -> None:
    for what in (path(arn), path(arn, version), f"{path(arn)}/versions", f"{path(arn, version)}/builds", IMAGES):
        assert api.call("GET", what)[0] == 200
    for build in api.call("GET", f"{path(arn, version)}/builds")[2]["items"]:
        assert api.call("GET", f"{path(arn, version)}/builds/{build['buildId']}")[0] == 200


def _walk_images(api: ApiRig) -> None:
    arn, held, third = image_arn("walked"), asyncio.Event(), image_arn("third")
    api.pipeline.held = dict.fromkeys(("walked", "second", "third"), held)
    for name in ("walked", "second", "third"):
        echoed = {"cpuConfigurations": [{"architecture": "ARM_64"}], "additionalOsCapabilities": ["ALL"], "description": "d"}
        hooks = {**HOOKS, "microvmImageHooks": {"ready": "ENABLED", "validate": "DISABLED"}}
        assert create(api, name, hooks=hooks, tags={"a": "b"}, environmentVariables={"A": "b"}, **echoed)[0] == 201
    _look(api, arn, "1.0")
    _look(api, third, "1.0")
    api.loop.call_soon_threadsafe(held.set)
    for name in ("walked", "second", "third"):
        api.settled(image_arn(name))
    _look(api, arn, "1.0")
    for reason in ("", "The container image build failed."):
        api.pipeline.failing = {"walked": reason, "fourth": reason} if reason else {}
        assert api.call("PUT", path(arn), AGAIN)[0] == 200
        api.settled(arn)
        _look(api, arn, "2.0")
    _look(api, create(api, "fourth")[2]["imageArn"], "1.0")
    api.settled(image_arn("fourth"))
    _look(api, image_arn("fourth"), "1.0")
    for status in ("INACTIVE", "ACTIVE"):
        assert api.call("PATCH", path(arn, "1.0"), {"status": status})[0] == 200
    version = api.store.images[arn].versions[1]
    api.pipeline.stuck = {version.key}
    assert api.call("DELETE", path(arn, "2.0"))[0] == 200
    _look(api, arn, "2.0")
    api.do(until(lambda: version.state == "DELETE_FAILED", 30))
    _look(api, arn, "2.0")
    assert api.call("DELETE", path(arn))[0] == 200
    _look(api, arn, "2.0")
    api.do(until(lambda: api.store.images[arn].state == "DELETE_FAILED", 30))
    _look(api, arn, "2.0")
    gone(api, third)
    assert api.call("DELETE", path(third))[0] == api.call("DELETE", path(third, "1.0"))[0] == 200
    for what in ("", f"/{encoded(BASE)}/versions"):
        assert api.call("GET", f"/2025-09-09/managed-microvm-images{what}")[0] == 200


def _walk_microvms(api: ApiRig) -> None:
    def look(one: str, state: str) -> None:
        api.reach(one, state)
        assert api.call("GET", f"{VMS}/{one}")[2]["state"] == state
        assert api.call("GET", VMS)[0] == 200

    arn, policy = image_arn("plain"), {"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 0, "autoResumeEnabled": True}
    waits = {name: asyncio.Event() for name in ("prepare", "suspend", "forget")}
    api.host.block = dict(waits)
    one = api.run(arn, wait="PENDING", idlePolicy=policy, executionRoleArn=ROLE)
    look(one, "PENDING")
    api.loop.call_soon_threadsafe(waits["prepare"].set)
    look(one, "RUNNING")
    assert api.call("POST", f"{VMS}/{one}/suspend")[0] == 200
    look(one, "SUSPENDING")
    api.loop.call_soon_threadsafe(waits["suspend"].set)
    look(one, "SUSPENDED")
    assert api.call("POST", f"{VMS}/{one}/suspend")[0] == api.call("POST", f"{VMS}/{one}/resume")[0] == 200
    ports = [{"port": 80}, {"range": {"startPort": 1, "endPort": 2}}, {"allPorts": {}}]
    assert api.call("POST", f"{VMS}/{one}/auth-token", {"expirationInMinutes": 5, "allowedPorts": ports})[0] == 200
    shell = api.run(arn, ingressNetworkConnectors=[f"arn:aws:lambda:{REGION}:aws:network-connector:aws-network-connector:SHELL_INGRESS"])
    assert api.call("POST", f"{VMS}/{shell}/shell-auth-token", {"expirationInMinutes": 5})[0] == 200
    for each in (one, shell):
        api.call("DELETE", f"{VMS}/{each}")
        look(each, "TERMINATING")
    api.loop.call_soon_threadsafe(waits["forget"].set)
    look(one, "TERMINATED")
    api.host.block = {}


def _walk_connectors(api: ApiRig) -> None:
    for at, (protocol, kind, address) in enumerate((("DualStack", "WebFunction", "ServiceManaged"), ("IPv4", "MicroVm", "None"))):
        egress = {"NetworkProtocol": protocol, "AssociatedComputeResourceTypes": [kind], "ElasticIpConfiguration": {"Type": address}}
        made = connect(api, f"c{at}", f"t{at}", **egress)[2]
    for what in (CONNECTORS, f"{CONNECTORS}/{made['Id']}", f"{CONNECTORS}/{made['Id']}/versions"):
        assert api.call("GET", what)[0] == 200
    assert api.call("PUT", f"{CONNECTORS}/{made['Id']}", {"ClientToken": "u", "OperatorRole": f"{ROLE}-2"})[0] == 202
    for what in (f"{TAGS}/{encoded(made['Arn'])}", f"{TAGS}/{encoded(image_arn('plain'))}"):
        assert api.raw("POST", what, {"Tags": {"a": "b"}})[0] == api.raw("DELETE", f"{what}?tagKeys=a")[0] == 204
        assert api.call("GET", what)[0] == 200
    assert api.call("DELETE", f"{CONNECTORS}/{made['Id']}")[0] == 202


def connect(api: ApiRig, name: str, token: str, **more: Any) -> tuple[int, str, dict[str, Any]]:
    egress = {"SubnetIds": ["subnet-1"], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"], **more}
    body = {"Name": name, "OperatorRole": ROLE, "ClientToken": token, "Configuration": {"VpcEgressConfiguration": egress}}
    return api.call("POST", CONNECTORS, body)


def enums(shape: Shape) -> Iterator[Shape]:
    if isinstance(shape, StructureShape):
        for member in shape.members.values():
            yield from enums(member)
    elif isinstance(shape, ListShape):
        yield from enums(shape.member)
    elif isinstance(shape, MapShape):
        yield from enums(shape.value)
    elif getattr(shape, "enum", None):
        yield shape


@row(
    "every operation", "its answer has the model's members, types, constraints and formats of times; unmodelled are recorded ones only", "D"
)
@row("every operation", "each value of an enum is answered where it is true; those that cannot be are in docs/api-coverage.md", "D")
def test_every_operation_and_enum_value_is_as_modelled(api: ApiRig) -> None:
    output_shapes.SEEN.clear()
    walk(api)
    assert api.answered == {operation.name for operation in OFFERED}
    modelled = {shape.name: set(shape.enum) for one in OFFERED if one.model.output_shape for shape in enums(one.model.output_shape)}
    never = never_answered()
    for name, values in modelled.items():
        assert values - output_shapes.SEEN[name] == never.get(name, set()), name
    assert set(never) <= set(modelled)


# ---- exceptions ----


@pytest.mark.parametrize("operation", OFFERED, ids=lambda one: one.name)
@pytest.mark.parametrize("error", [InternalServer("it broke", retry_after=1), Throttling("Rate exceeded", 2)], ids=["fault", "rate"])
def test_our_faults_and_rates_are_errors_that_the_operation_models(operation: Any, error: ApiError) -> None:
    answer = as_modelled(error, operation.errors)
    body = {name: value for name, value in answer.body().items() if value is not None}
    assert set(body) <= set(operation.errors[answer.kind].members)
    assert answer.status == operation.errors[answer.kind].metadata["error"]["httpStatusCode"] and answer.retry_after == error.retry_after


@row("network connectors", "our own faults are ServiceException, for tags too; calls that come too fast TooManyRequestsException", "D")
def test_a_store_that_fails_is_the_operations_own_exception(api: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise sqlite3.OperationalError("full")

    monkeypatch.setattr(api.store, "_transaction", fail)
    text = f"{api.directory}/state.db: full"
    status, kind, body = connect(api, "failing", "f")
    assert (status, kind, body) == (500, "ServiceException", {"Type": "Service", "Message": text})
    status, kind, body = api.call("POST", f"{TAGS}/{encoded(image_arn('plain'))}", {"Tags": {"a": "b"}})
    assert (status, kind, body) == (500, "ServiceException", {"Type": "Service", "message": text})
    assert api.call("PATCH", path(image_arn("plain"), "1.0"), {"status": "INACTIVE"})[:2] == (500, "InternalServerException")


@row("TagResource", "of an image that is being deleted: 409 ResourceConflictException", "D")
def test_tags_of_what_is_being_deleted(api: ApiRig) -> None:
    arn = api.image("tagged")
    image = api.store.images[arn]
    image.state = "DELETING"
    for method, tail, body in (("POST", "", {"Tags": {"a": "b"}}), ("DELETE", "?tagKeys=a", None)):
        assert api.call(method, f"{TAGS}/{encoded(arn)}{tail}", body)[:2] == (409, "ResourceConflictException")
    image.state = "CREATED"


# ---- sensitive shapes ----


def secrets(shape: Shape, at: str = "") -> Iterator[tuple[str, Any]]:
    """Where a value of an input is sensitive: the member's path, and what nests a text there."""
    if isinstance(shape, StructureShape):
        for name, member in shape.members.items():
            for inner, nest in secrets(member, f"{at}.{name}"):
                yield inner, lambda text, name=name, nest=nest: {name: nest(text)}
    elif isinstance(shape, MapShape) and is_secret(shape):
        yield at, lambda text: {"K": text}
    elif isinstance(shape, ListShape):
        for inner, nest in secrets(shape.member, f"{at}[]"):
            yield inner, lambda text, nest=nest: [nest(text)]
    elif is_secret(shape):
        yield at, lambda text: text


SECRETS = [(one, at, nest) for one in OFFERED if one.input is not None for at, nest in secrets(one.input)]
MARK = "hunter2-"


@row("every operation", "a value whose shape is sensitive is in no message, audit line or log: `Value at 'runHookPayload' failed …`", "M")
@pytest.mark.parametrize(("operation", "at", "nest"), SECRETS, ids=[f"{one.name}{at}" for one, at, _ in SECRETS])
def test_sensitive_values_are_nowhere(api: ApiRig, capfd: pytest.CaptureFixture[str], operation: Any, at: str, nest: Any) -> None:
    target = IMAGES if "Image" in operation.name else VMS
    target = path(image_arn("plain")) if operation.method == "PUT" else target
    valid = {**AGAIN, "name": "secret"} if "Image" in operation.name else {"imageIdentifier": image_arn("plain")}
    values: list[Any] = [MARK * 600, [MARK], {MARK: {"x": MARK}}]
    if at.endswith("environmentVariables"):
        many = {"environmentVariables": {f"K{n}": MARK for n in range(101)}}
        answer = api.call(operation.method, target, valid | many)
        assert answer[0] == 400 and "at 'environmentVariables' failed" in answer[2]["message"] and MARK not in answer[2]["message"]
    for value in values:
        status, _, body = api.call(operation.method, target, valid | nest(value))
        assert status == 400 and MARK not in json.dumps(body), body
    assert api.call(operation.method, target, {**valid, **nest(MARK), "imageIdentifier": "x", "baseImageArn": "a b"})[0] == 400
    said = capfd.readouterr()
    assert MARK not in json.dumps(api.records()) and MARK not in said.out + said.err


def test_sensitive_members_are_hidden_in_the_audit_trail() -> None:
    assert MODEL.secret_members == {"authToken", "environmentVariables", "runHookPayload"}


def test_the_message_of_a_payload_that_is_too_long(api: ApiRig) -> None:
    text = "Value at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096"
    refused(run(api, runHookPayload="x" * 4097), 400, "ValidationException", f"1 validation error detected: {text}")


# ---- images: what is gone, what failed ----


def gone(api: ApiRig, arn: str) -> None:
    assert api.call("DELETE", path(arn))[2]["state"] == "DELETING"
    api.do(until(lambda: arn not in api.store.images, 30))


@row("CreateMicrovmImage", "the client token of what was deleted makes a new one, an update's too (the service wedges: not copied)", "ours")
def test_a_token_of_what_was_deleted_makes_a_new_one(api: ApiRig) -> None:
    first = create(api, "token", clientToken="T")[2]
    arn = first["imageArn"]
    api.settled(arn)
    assert create(api, "token", clientToken="T")[2] == first
    updated = api.call("PUT", path(arn), {**AGAIN, "clientToken": "U"})[2]
    api.settled(arn)
    assert api.call("PUT", path(arn), {**AGAIN, "clientToken": "U"})[2] == updated
    assert api.call("DELETE", path(arn, "2.0"))[0] == 200
    api.settled_in(arn)
    again = api.call("PUT", path(arn), {**AGAIN, "clientToken": "U"})[2]
    assert again["imageVersion"] == "3.0"
    assert api.settled(arn)["latestActiveImageVersion"] == "3.0"
    gone(api, arn)
    second = create(api, "token", clientToken="T")[2]
    assert second["id"] != first["id"] and second["state"] == "CREATING"
    assert api.settled(arn)["state"] == "CREATED"


@row("DeleteMicrovmImage", "idempotent: one that is being deleted, or was, is 200; one that never was is 404. So for a version", "D")
def test_deleting_twice(api: ApiRig) -> None:
    arn = api.image("again")
    api.call("PUT", path(arn), AGAIN)
    api.settled(arn)
    for state in ("DELETING", "DELETED"):
        assert api.call("DELETE", path(arn, "1.0"))[::2] == (200, {"imageIdentifier": arn, "imageVersion": "1.0", "state": state})
        api.settled_in(arn)
        api.do(until(lambda: api.store.images[arn].find("1.0") is None, 30))
    assert api.call("DELETE", path(arn, "9.0"))[0] == 404
    gone(api, arn)
    for _ in range(2):
        assert api.call("DELETE", path(arn))[::2] == (200, {"imageIdentifier": arn, "state": "DELETED"})
    assert api.call("DELETE", path(arn, "2.0"))[::2] == (200, {"imageIdentifier": arn, "imageVersion": "2.0", "state": "DELETED"})
    assert api.call("DELETE", path(image_arn("never")))[0] == 404
    api.image("again")
    assert api.call("GET", path(arn))[2]["state"] == "CREATED"


@row(
    "DeleteMicrovmImage",
    "one that the host cannot delete is DELETE_FAILED, launches nothing, and may be deleted again. So for a version",
    "D",
)
def test_a_delete_that_fails_may_be_made_again(api: ApiRig) -> None:
    arn = api.image("stuck")
    image = api.store.images[arn]
    api.pipeline.stuck = {image.versions[0].key}
    api.call("DELETE", path(arn))
    api.do(until(lambda: image.state == "DELETE_FAILED", 30))
    assert run(api, arn)[0] == 404 and api.call("PUT", path(arn), AGAIN)[0] == 409
    api.restart()
    assert api.call("GET", path(arn))[2]["state"] == "DELETE_FAILED"
    api.pipeline.stuck = set()
    gone(api, arn)


@row("ListMicrovmImageVersions", "of an image that is not there: an empty list", "M")
def test_versions_of_no_image(api: ApiRig) -> None:
    assert api.call("GET", f"{path(image_arn('none'))}/versions")[::2] == (200, {"items": [], "nextToken": None})


@row("GetMicrovmImageVersion", "a FAILED version is INACTIVE, and cannot be made ACTIVE: 400", "M")
def test_a_failed_version_is_inactive(api: ApiRig) -> None:
    arn = api.image("failed")
    api.pipeline.failing = {"failed": "The container image build failed."}
    api.call("PUT", path(arn), AGAIN)
    api.settled(arn)
    assert [one["status"] for one in api.call("GET", f"{path(arn)}/versions")[2]["items"]] == ["INACTIVE", "ACTIVE"]
    text = "MicroVM Image version 2.0 is FAILED: only a SUCCESSFUL one can be ACTIVE"
    refused(api.call("PATCH", path(arn, "2.0"), {"status": "ACTIVE"}), 400, "ValidationException", text)
    assert api.call("PATCH", path(arn, "2.0"), {"status": "INACTIVE"})[0] == 200
    api.store.images[arn].versions[1].status = "ACTIVE"  # as older services stored it
    api.do(api.registry.recover())
    assert api.call("GET", path(arn, "2.0"))[2]["status"] == "INACTIVE"


@row("GetMicrovmImage", "without tags `tags` is {}; UpdateMicrovmImage's answer has no `tags`", "R")
def test_no_tags(api: ApiRig) -> None:
    arn = api.image("untagged")
    assert api.call("GET", path(arn))[2]["tags"] == {}
    assert "tags" not in api.call("PUT", path(arn), AGAIN)[2]
    api.settled(arn)


@row("ListMicrovms", "`imageIdentifier` and `imageVersion` come before the page: no empty page with a token", "M")
def test_the_filter_comes_before_the_page(api: ApiRig) -> None:
    wanted, other = api.image("wanted"), image_arn("plain")
    first = api.run(wanted)
    for _ in range(3):
        api.run(other)
    last = api.run(wanted)
    page = api.call("GET", f"{VMS}?maxResults=1&imageIdentifier={encoded(wanted)}&imageVersion=1.0")[2]
    assert [item["microvmId"] for item in page["items"]] == [first]
    token = encoded(page["nextToken"])
    page = api.call("GET", f"{VMS}?maxResults=1&imageIdentifier={encoded(wanted)}&nextToken={token}")[2]
    assert [item["microvmId"] for item in page["items"]] == [last] and page["nextToken"] is None
    assert api.call("GET", f"{VMS}?imageIdentifier={encoded(wanted)}&imageVersion=9.0")[2] == {"items": [], "nextToken": None}


def test_the_smallest_idle_time_is_found_whatever_its_shape_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.loaders

    load = botocore.loaders.Loader.load_service_model

    def renamed(self: Any, name: str, kind: str) -> Any:
        text = json.dumps(load(self, name, kind)).replace("IdlePolicyMaxIdleDurationSecondsInteger", "Renamed")
        return json.loads(text)

    monkeypatch.setattr(botocore.loaders.Loader, "load_service_model", renamed)
    operation = next(one for one in Model(5).operations if one.name == "RunMicrovm")
    assert operation.input is not None and operation.input.members["idlePolicy"].members["maxIdleDurationSeconds"].metadata["min"] == 5
