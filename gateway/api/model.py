"""The API as botocore's service model has it: routes, input constraints, output members. Nothing of it is typed in here.

Constraint texts are in the service's recorded format (reference, 1.4), several joined with "; ".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, unquote

import botocore.loaders
import regex
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

from .errors import Unserializable, Validation

SERVICE = "lambda-microvms"
CORE = "lambda-core"  # network connectors; its Runtime operations are in preview, and refused as the service does


@dataclass(frozen=True)
class Operation:
    """One operation: its model, and where it is on the wire."""

    model: OperationModel
    service: str
    method: str
    pattern: re.Pattern[str]
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.model.name)

    @property
    def is_offered(self) -> bool:
        return self.service == SERVICE or "NetworkConnector" in self.name

    @cached_property
    def errors(self) -> dict[str, StructureShape]:
        """Returns the exceptions that the operation models, by name."""
        return {str(shape.name): shape for shape in self.model.error_shapes if isinstance(shape, StructureShape)}

    @property
    def status(self) -> int:
        return int(self.model.http.get("responseCode", 200))

    @cached_property
    def input(self) -> StructureShape | None:
        return self.model.input_shape


class Model:
    def __init__(self, min_idle_seconds: int = 60) -> None:
        """`min_idle_seconds` replaces the model's bound: a host's owner may allow shorter idle times."""
        self.operations: list[Operation] = []
        for name in (SERVICE, CORE):
            description = botocore.loaders.Loader().load_service_model(name, "service-2")
            if name == SERVICE:
                policy = description["shapes"]["IdlePolicy"]["members"]["maxIdleDurationSeconds"]
                description["shapes"][policy["shape"]]["min"] = min_idle_seconds
            service = ServiceModel(description, name)
            self.operations += [_operation(name, service.operation_model(operation)) for operation in service.operation_names]

    @property
    def secret_members(self) -> frozenset[str]:
        """Returns names of the members, anywhere in an input or output, whose values the models mark sensitive."""
        return frozenset(
            name
            for operation in self.operations
            for shape in (operation.model.input_shape, operation.model.output_shape)
            if shape is not None
            for name in _secret_members(shape)
        )

    def find(self, method: str, raw_path: str) -> tuple[Operation, dict[str, str]] | None:
        """Returns the operation of a request line and its path members, decoded."""
        for operation in self.operations:
            if operation.method == method and (match := operation.pattern.match(raw_path)):
                return operation, {name: unquote(match[name]) for name in operation.names}
        return None


def _secret_members(shape: Shape) -> set[str]:
    if isinstance(shape, ListShape):
        return _secret_members(shape.member)
    if not isinstance(shape, StructureShape):
        return set()
    own = {name for name, member in shape.members.items() if not _holds_structures(member) and is_secret(member)}
    return own.union(*map(_secret_members, shape.members.values()))


def _holds_structures(shape: Shape) -> bool:
    return _holds_structures(shape.member) if isinstance(shape, ListShape) else isinstance(shape, StructureShape)


def is_secret(shape: Shape) -> bool:
    """Whether a value of the shape may hold one that the model marks sensitive: no message says such a value."""
    if isinstance(shape, StructureShape):
        return any(map(is_secret, shape.members.values()))
    if isinstance(shape, ListShape):
        return is_secret(shape.member)
    if isinstance(shape, MapShape):
        return is_secret(shape.key) or is_secret(shape.value)
    return bool(shape.metadata.get("sensitive"))


def _operation(service: str, model: OperationModel) -> Operation:
    uri = str(model.http["requestUri"]).split("?")[0]
    names = tuple(re.findall(r"{([^}+]+)\+?}", uri))
    pattern = "".join(f"(?P<{part[1:-1]}>[^/]+)" if part.startswith("{") else re.escape(part) for part in re.split(r"({[^}]+})", uri))
    return Operation(model, service, str(model.http["method"]), re.compile(pattern + r"/?\Z"), names)


def parse_input(operation: Operation, path: dict[str, str], query: str, body: Any) -> dict[str, Any]:
    """Returns the operation's input from where the model puts each member; unknown members are ignored. Raises Validation."""
    if operation.input is None:
        return {}
    if body is not None and not isinstance(body, dict):
        raise Unserializable("Expected a JSON object")
    queries = parse_qsl(query, keep_blank_values=True)
    given: dict[str, Any] = {}
    for name, shape in operation.input.members.items():
        location = shape.serialization.get("location")
        wire = shape.serialization.get("name", name)
        if location == "uri":
            given[name] = path[wire]
        elif location == "querystring":
            values = [value for key, value in queries if key == wire]
            if values:
                given[name] = values if isinstance(shape, ListShape) else _from_query(shape, values[-1], name)
        elif body is not None and body.get(wire) is not None:
            given[name] = body[wire]
    problems: list[str] = []
    result = _check_structure(operation.input, given, "", problems)
    if operation.service == CORE:  # whose members are Capital, and whose texts are not
        problems = [
            _PATH.sub(lambda match: re.sub(r"(?<![a-zA-Z])[A-Z]", lambda c: c[0].lower(), match[0]), problem) for problem in problems
        ]
    if problems:
        noun = "error" if len(problems) == 1 else "errors"
        raise Validation(f"{len(problems)} validation {noun} detected: {'; '.join(problems)}")
    return result


_PATH = re.compile(r"(?<= at ')[^']*(?=' failed)")


def _from_query(shape: Shape, text: str, name: str) -> Any:
    if shape.type_name in ("integer", "long"):
        if not _INTEGER.fullmatch(text):
            raise Validation(f"1 validation error detected: Value '{text}' at '{name[0].lower()}{name[1:]}' must be a number")
        return int(text)
    return text


_INTEGER = re.compile(r"-?[0-9]{1,20}")  # as JSON has them, and no more digits than the longest type's
_BITS = {"integer": 32, "long": 64}


def _fails(problems: list[str], shape: Shape, value: Any, path: str, constraint: str) -> None:
    """A value that is sensitive is left out, as recorded for runHookPayload."""
    shown = "Value null" if value is None else "Value" if is_secret(shape) else f"Value '{_shown(value)}'"
    problems.append(f"{shown} at '{path}' failed to satisfy constraint: Member must {constraint}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}={_shown(item)}" for name, item in value.items()) + "}"
    return str(value)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "long": (int,), "boolean": (bool,), "structure": (dict,), "list": (list,),
    "map": (dict,), "timestamp": (int, float, str), "double": (int, float), "float": (int, float),
}  # fmt: skip


def _has_type(shape: Shape, value: Any) -> bool:
    kinds = _TYPES[shape.type_name]
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _expected(shape: Shape) -> str:
    """Returns what was expected, in words that were recorded for the empty structure allPorts; the others are made after these."""
    if isinstance(shape, StructureShape) and not shape.members:
        return "Expected null"
    return f"Expected {shape.type_name} or null"


def _check(shape: Shape, value: Any, path: str, problems: list[str]) -> Any:
    if not _has_type(shape, value):
        raise Unserializable(_expected(shape))
    if isinstance(shape, StructureShape):
        return _check_structure(shape, value, path, problems)
    if isinstance(shape, ListShape):
        _check_size(shape, len(value), value, path, problems)
        return [_check(shape.member, item, f"{path}.{at + 1}.member", problems) for at, item in enumerate(value)]
    if isinstance(shape, MapShape):
        _check_size(shape, len(value), value, path, problems)
        checked = {}
        for key, item in value.items():
            _check(shape.key, key, f"{path}.key", problems)
            checked[key] = _check(shape.value, item, f"{path}.{key}.member", problems)
        return checked
    if shape.type_name == "string":
        _check_string(shape, value, path, problems)
    elif shape.type_name in _BITS:
        if not -(1 << (_BITS[shape.type_name] - 1)) <= value < 1 << (_BITS[shape.type_name] - 1):
            raise Unserializable(_expected(shape))
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if low is not None and value < low:
            _fails(problems, shape, value, path, f"have value greater than or equal to {low}")
        if high is not None and value > high:
            _fails(problems, shape, value, path, f"have value less than or equal to {high}")
    return value


def _check_size(shape: Shape, length: int, value: Any, path: str, problems: list[str]) -> None:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if low is not None and length < low:
        _fails(problems, shape, value, path, f"have length greater than or equal to {low}")
    if high is not None and length > high:
        _fails(problems, shape, value, path, f"have length less than or equal to {high}")


def _check_string(shape: Shape, value: str, path: str, problems: list[str]) -> None:
    _check_size(shape, len(value), value, path, problems)
    pattern, enum = shape.metadata.get("pattern"), getattr(shape, "enum", None)
    if pattern is not None and not regex.fullmatch(pattern, value):
        _fails(problems, shape, value, path, f"satisfy regular expression pattern: {pattern}")
    if enum and value not in enum:
        _fails(problems, shape, value, path, f"satisfy enum value set: [{', '.join(enum)}]")


def _check_structure(shape: StructureShape, value: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    prefix = f"{path}." if path else ""
    for name, member in shape.members.items():
        item = value.get(name)
        if item is None:
            if name in shape.required_members:
                _fails(problems, member, None, prefix + name, "not be null")
            continue
        result[name] = _check(member, item, prefix + name, problems)
    if shape.metadata.get("union") and len(result) > 1:
        raise Validation(f"Value at '{path}' must have exactly one of its members set: {', '.join(shape.members)}")
    return result
