"""Requests made from the service models: valid, nearly valid and hostile. No 500, no hang, no answer larger than asked."""

from __future__ import annotations

import json
import os
import string
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from api_rig import BASE, ROLE, ApiRig, image_arn
from botocore.model import ListShape, MapShape, Shape, StructureShape
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.model import Model, Operation

OPERATIONS = {operation.name: operation for operation in Model(1).operations}
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50000"))
_ANSWERED = {200, 201, 202, 204, 400, 402, 403, 404, 409, 413, 429}
_CAPACITY = "InsufficientCapacityException"
_BODY_BYTES, _SECONDS = 1 << 20, 10.0

_KNOWN = st.sampled_from([image_arn("fuzz"), image_arn("none"), BASE, ROLE, "microvm-none", "1.0", "2.0", "fuzz", "s3://bucket/app.zip"])
_TEXT = st.text(max_size=30) | st.text(string.ascii_letters + string.digits + "-_:/.", max_size=300)
_NASTY = st.sampled_from(
    [
        "",
        "\0",
        "../../etc/passwd",
        "%00",
        "a" * 5000,
        "'; DROP TABLE sessions; --",
        "\u202e",
        "{{7*7}}",
        "\ud83d\ude00",
        "\ud800",
        "arn:aws:lambda:::",
        ":::::::",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT | _NASTY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=8,
)


def of_shape(shape: Shape, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that fit the shape mostly."""
    if depth > 6:
        return st.none()
    if isinstance(shape, StructureShape):
        required = {name: of_shape(shape.members[name], depth + 1) for name in shape.required_members}
        optional = {name: of_shape(member, depth + 1) for name, member in shape.members.items() if name not in shape.required_members}
        return st.fixed_dictionaries(required, optional=optional)
    if isinstance(shape, ListShape):
        return st.lists(of_shape(shape.member, depth + 1), max_size=3)
    if isinstance(shape, MapShape):
        return st.dictionaries(_TEXT, of_shape(shape.value, depth + 1), max_size=3)
    if shape.type_name in ("integer", "long"):
        low, high = shape.metadata.get("min", 0), shape.metadata.get("max", 100_000)
        return st.integers(low, high) | st.sampled_from([low, high, low - 1, high + 1, 2**63, -(2**63)])
    if shape.type_name == "boolean":
        return st.booleans()
    enum = list(getattr(shape, "enum", None) or [])
    pattern = shape.metadata.get("pattern")
    fitting = [st.sampled_from(enum)] if enum else []
    if pattern and "\\p" not in pattern and not enum:
        fitting.append(st.from_regex(pattern, fullmatch=True).filter(lambda text: len(text) < 300))
    return st.one_of(*fitting, _KNOWN, _TEXT, _NASTY)


def _quoted(text: str, safe: str) -> str:
    """Halves of surrogate pairs too, as some clients would send them."""
    return quote(text.encode("utf-8", "surrogatepass"), safe=safe)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path with query, body, fields) of some operation, spoilt now and then."""
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    members = draw(of_shape(operation.input)) if operation.input is not None else {}
    if draw(st.integers(0, 3)) == 0 and members:
        members[draw(st.sampled_from(sorted(members)))] = draw(_JSON)
    path, query, body = _placed(operation, members, draw)
    data = json.dumps(body).encode() if body or draw(st.booleans()) else b""
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.binary(max_size=200)) or data[: draw(st.integers(0, len(data)))]
    fields = {"Content-Type": draw(st.sampled_from(["application/json", "application/x-amz-json-1.1", "text/plain", "application/cbor"]))}
    method = operation.method if draw(st.integers(0, 9)) else draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]))
    return method, path + (f"?{query}" if query else ""), data, fields


def _placed(operation: Operation, members: dict[str, Any], draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    path = str(operation.model.http["requestUri"]).split("?")[0]
    query, body = [], {}
    shapes = operation.input.members if operation.input is not None else {}
    for name, value in members.items():
        location = shapes[name].serialization.get("location") if name in shapes else None
        wire = shapes[name].serialization.get("name", name) if name in shapes else name
        if location == "uri":
            text = _quoted(str(value) or "x", safe="" if draw(st.integers(0, 4)) else ":/")
            path = path.replace("{" + wire + "}", text)
        elif location == "querystring":
            query += [f"{wire}={_quoted(str(one), safe='')}" for one in (value if isinstance(value, list) else [value])]
        else:
            body[wire] = value
    return path, "&".join(query), body


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRig]:
    one = ApiRig(tmp_path_factory.mktemp("fuzz"))
    one.image("fuzz")
    yield one
    one.close()


def check(api: ApiRig, request: tuple[str, str, bytes, dict[str, str]]) -> None:
    method, path, body, fields = request
    started = time.monotonic()
    status, headers, data = api.raw(method, path, body, fields)
    assert time.monotonic() - started < _SECONDS
    assert len(data) <= _BODY_BYTES
    kind = headers.get("x-amzn-errortype", "")
    assert status in _ANSWERED or kind == _CAPACITY, (status, data[:500])
    if status != 204 and headers["content-type"].startswith("application/json"):
        assert isinstance(json.loads(data), dict)
        assert status < 300 or kind
    else:
        assert status in (204, 404) or (status == 400 and len(path) > 8000)  # a request line of no use


@pytest.mark.service
@settings(max_examples=1000)
@given(asked=requests())
def test_requests_from_the_models(api: ApiRig, asked: tuple[str, str, bytes, dict[str, str]]) -> None:
    check(api, asked)


@pytest.mark.long
@settings(max_examples=EXAMPLES)
@given(asked=requests())
def test_many_requests_from_the_models(api: ApiRig, asked: tuple[str, str, bytes, dict[str, str]]) -> None:
    check(api, asked)
