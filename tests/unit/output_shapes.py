"""Whether an answer of the API is what botocore's models say: members, types, constraints, enum values, formats of times, errors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import regex
from botocore.model import ListShape, MapShape, Shape, StructureShape

from gateway.api.model import CORE, Model, Operation

MODEL = Model()
# Members that no model has and recordings of the service show.
_RECORDED = {"id", "terminationReasonCode", "buildPhaseOverrides", "roleConfiguration", "versionStateTimeBucket"}
# Errors that every operation may answer, though not each models them: of the protocol and of signatures, and, recorded for Lambda
# Core, of constraints and permissions.
_ANYWHERE = {
    "SerializationException", "MissingAuthenticationTokenException", "IncompleteSignatureException", "InvalidSignatureException",
    "UnrecognizedClientException", "ExpiredTokenException", "ValidationException", "AccessDeniedException",
}  # fmt: skip
SEEN: defaultdict[str, set[str]] = defaultdict(set)  # by shape: the enum values that were answered
_ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_BITS = {"integer": 32, "long": 64}


def faults(method: str, path: str, status: int, kind: str, body: Any) -> tuple[Operation | None, list[str]]:
    """The operation that was asked, and what of the answer is not as its model says."""
    found = MODEL.find(method, path.partition("?")[0])
    if found is None or not found[0].is_offered:
        return None, []
    operation = found[0]
    if status >= 400:
        return operation, list(_of_error(operation, status, kind, body))
    wrong = [] if status == operation.status else [f"status {status}, not {operation.status}"]
    if operation.model.output_shape is None:
        return operation, wrong + ([f"a body: {body}"] if body else [])
    return operation, wrong + list(_of(operation.model.output_shape, body, operation.name, operation.service == CORE))


def _of_error(operation: Operation, status: int, kind: str, body: Any) -> Iterator[str]:
    shape = operation.errors.get(kind)
    if shape is None:
        if kind not in _ANYWHERE:
            yield f"{operation.name} does not model {kind}"
        return
    if status != shape.metadata["error"]["httpStatusCode"] and status != 413:
        yield f"{kind} with status {status}"
    if strange := {name for name in body if name not in shape.members and name.lower() != "message"}:
        yield f"{kind} has no {strange}"
    for name, value in body.items():
        if value is not None and name in shape.members:
            yield from _of(shape.members[name], value, f"{kind}.{name}", False)


def _of(shape: Shape, value: Any, path: str, is_core: bool) -> Iterator[str]:
    kinds: dict[str, tuple[type, ...]] = {
        "structure": (dict,), "list": (list,), "map": (dict,), "string": (str,), "boolean": (bool,), "integer": (int,), "long": (int,),
        "timestamp": (str,) if shape.serialization.get("timestampFormat") == "iso8601" else (int, float),
    }  # fmt: skip
    if not isinstance(value, kinds[shape.type_name]) or (isinstance(value, bool) and shape.type_name != "boolean"):
        yield f"{path}: {value!r} is no {shape.type_name}"
        return
    if isinstance(shape, StructureShape):
        yield from _of_structure(shape, value, path, is_core)
    elif isinstance(shape, ListShape):
        for item in value:
            yield from _of(shape.member, item, f"{path}[]", is_core)
    elif isinstance(shape, MapShape):
        for key, item in value.items():
            yield from _of(shape.key, key, f"{path}.key", is_core)
            yield from _of(shape.value, item, f"{path}.value", is_core)
    elif shape.type_name == "timestamp" and isinstance(value, str) and not _ISO.fullmatch(value):
        yield f"{path}: {value} is no ISO 8601 time in UTC"
    yield from _constraints(shape, value, path)


def _of_structure(shape: StructureShape, value: dict[str, Any], path: str, is_core: bool) -> Iterator[str]:
    for name in shape.required_members:
        if value.get(name) is None:
            yield f"{path}.{name}: required"
    if strange := set(value) - set(shape.members) - _RECORDED:
        yield f"{path}: not in the model: {strange}"
    for name, item in value.items():
        if item is None and is_core:
            yield f"{path}.{name}: null, where Lambda Core leaves members out"
        if item is not None and name in shape.members:
            yield from _of(shape.members[name], item, f"{path}.{name}", is_core)


def _constraints(shape: Shape, value: Any, path: str) -> Iterator[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    size = value if isinstance(value, int | float) else len(value)
    if shape.type_name != "timestamp" and ((low is not None and size < low) or (high is not None and size > high)):
        yield f"{path}: {value!r} is beyond {low} to {high}"
    bits = _BITS.get(shape.type_name)
    if bits and not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        yield f"{path}: {value} has more than {bits} bits"
    pattern, enum = shape.metadata.get("pattern"), getattr(shape, "enum", None)
    # The service's own sentences do not fit the pattern that its model gives a microVM's stateReason.
    if pattern is not None and not path.endswith("Microvm.stateReason") and not regex.fullmatch(pattern, value):
        yield f"{path}: {value!r} does not fit {pattern}"
    if enum:
        SEEN[shape.name].add(value)
    if enum and value not in enum:
        yield f"{path}: {value} is none of {enum}"
