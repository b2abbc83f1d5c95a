"""The service model: every operation has a route, and constraints read as recorded (service reference, 1.4)."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import Unserializable, Validation
from gateway.api.model import Model, parse_input
from gateway.api.paging import Pager

MODEL = Model()
OPERATIONS = {operation.name: operation for operation in MODEL.operations}


@cache
def client(service: str) -> Any:
    return Session().create_client(service, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")


@pytest.mark.parametrize("name", OPERATIONS)
def test_routes_are_found_as_boto3_writes_them(name: str) -> None:
    """What botocore's serializer makes of an input comes out of our parser again."""
    operation = OPERATIONS[name]
    serializer = client(operation.service)._serializer
    given_input = {member: "a/b c:d" for member in operation.names}
    members = {_member(operation, wire): value for wire, value in given_input.items()}
    if operation.input is not None:
        members = {member: sample(operation.input.members[member]) for member in operation.input.required_members} | members
    request = serializer.serialize_to_request(members, operation.model)
    found = MODEL.find(request["method"], request["url_path"])
    assert found is not None and found[0].name == name and found[1] == given_input


def sample(shape: Any) -> Any:
    """Some value of the shape's type."""
    if shape.type_name == "structure":
        names = shape.required_members or list(shape.members)[:1]
        return {name: sample(shape.members[name]) for name in names}
    if shape.type_name == "string":
        return next(iter(shape.enum), "a" * shape.metadata.get("min", 1))
    if shape.type_name == "list":
        return [sample(shape.member)]
    return {"map": {}, "boolean": True}.get(shape.type_name, 60)


def _member(operation: Any, wire: str) -> str:
    for name, shape in operation.input.members.items():
        if shape.serialization.get("location") == "uri" and shape.serialization.get("name", name) == wire:
            return str(name)
    raise KeyError(wire)


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("PATCH", "/2025-09-09/microvms"), ("GET", "/2025-09-09/nothing")])
def test_unknown_paths(method: str, path: str) -> None:
    assert MODEL.find(method, path) is None


def message(name: str, body: Any, path: dict[str, str] | None = None, query: str = "") -> str:
    with pytest.raises((Validation, Unserializable)) as error:
        parse_input(OPERATIONS[name], path or {}, query, body)
    return str(error.value)


def test_missing_members_are_named_together() -> None:
    text = message("CreateMicrovmImage", {})
    required = OPERATIONS["CreateMicrovmImage"].input.required_members  # type: ignore[union-attr]
    assert text.startswith(f"{len(required)} validation errors detected: ")
    for name in required:
        assert f"Value null at '{name}' failed to satisfy constraint: Member must not be null" in text


def test_bounds_read_as_recorded() -> None:
    policy = {"maxIdleDurationSeconds": 59, "suspendedDurationSeconds": 0, "autoResumeEnabled": True}
    assert message("RunMicrovm", {"imageIdentifier": "a", "idlePolicy": policy}) == (
        "1 validation error detected: Value '59' at 'idlePolicy.maxIdleDurationSeconds' failed to satisfy constraint: "
        "Member must have value greater than or equal to 60"
    )


def test_smallest_idle_time_is_the_hosts() -> None:
    policy = {"maxIdleDurationSeconds": 5, "suspendedDurationSeconds": 0, "autoResumeEnabled": True}
    operation = next(one for one in Model(5).operations if one.name == "RunMicrovm")
    assert parse_input(operation, {}, "", {"imageIdentifier": "a", "idlePolicy": policy})["idlePolicy"] == policy


def test_unknown_members_are_ignored_and_nulls_are_absent() -> None:
    assert parse_input(OPERATIONS["RunMicrovm"], {}, "", {"imageIdentifier": "a", "what": 1, "idlePolicy": None}) == {
        "imageIdentifier": "a"
    }


@pytest.mark.parametrize("body", [[], "x", 5, True])
def test_bodies_that_are_no_objects(body: Any) -> None:
    assert message("RunMicrovm", body) == "Expected a JSON object"


@pytest.mark.parametrize("value", [5, [], {}, True])
def test_wrong_types(value: Any) -> None:
    assert message("RunMicrovm", {"imageIdentifier": value}) == "Expected string or null"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
MEMBERS = sorted({member for one in MODEL.operations if one.input for member in one.input.members})


@given(st.sampled_from(sorted(OPERATIONS)), st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=6))
def test_any_body_is_taken_or_refused_never_worse(name: str, body: dict[str, Any]) -> None:
    operation = OPERATIONS[name]
    try:
        result = parse_input(operation, dict.fromkeys(operation.names, "x"), "", json.loads(json.dumps(body)))
    except (Validation, Unserializable):
        return
    assert set(result) <= set(operation.input.members if operation.input else ())


# ---- paging ----


def test_pages_go_on_while_items_come_and_go() -> None:
    pager = Pager(b"key")
    items = list(range(0, 20, 2))
    first, token = pager.page("list", items, lambda item: (item,), {"maxResults": 4})
    assert first == [0, 2, 4, 6] and token is not None
    second, token = pager.page(
        "list", [item for item in items if item != 6] + [1, 7], lambda item: (item,), {"maxResults": 4, "nextToken": token}
    )
    assert second == [7, 8, 10, 12] and token is not None
    third, token = pager.page("list", items, lambda item: (item,), {"maxResults": 4, "nextToken": token})
    assert third == [14, 16, 18] and token is None


def test_made_up_page_tokens() -> None:
    pager = Pager(b"key")
    _, token = pager.page("a", [1, 2], lambda item: (item,), {"maxResults": 1})
    assert (token is not None and not re.search("[12]", token[:40])) or token
    for bad in ("x", "", "ä", token[:-4], "A" + token[1:]):
        if bad:
            with pytest.raises(Validation, match="Invalid nextToken"):
                pager.page("a", [1, 2], lambda item: (item,), {"nextToken": bad})
    with pytest.raises(Validation):
        pager.page("b", [1, 2], lambda item: (item,), {"nextToken": token})
