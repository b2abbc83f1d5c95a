"""A process that was taken over: it has its user and its sockets, and says on them whatever it likes."""

from __future__ import annotations

import contextlib
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from gateway.rpc import Connection, connect

# For a name: ways out of a directory, and names that are ours.
STRAYS = ["", ".", "..", "../victim", "/etc", "a/b", "a\0b", "a\n", ".void-1-a", "instance-id", "a" * 300, "*", "[a]"]


@contextlib.contextmanager
def user(uid: int) -> Iterator[None]:
    """What is connected meanwhile is connected by that user, as SO_PEERCRED has it."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


async def connected(path: Path, uid: int) -> Connection:
    with user(uid):
        return await connect(path)


def reachable(path: Path) -> None:
    """Lets other users come to a socket below a test's own directory."""
    for parent in path.parents:
        if parent.stat().st_uid == os.getuid() and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o011)


def body_for(kind: Any) -> Any:
    """A body that the type takes, as plain data."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _annotated(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return body_for(arguments[0])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {field.name: body_for(hints[field.name]) for field in msgspec.structs.fields(kind) if field.required}
    if origin is dict:
        return {}
    if origin is list:
        return []
    if origin is tuple:
        return [body_for(one) for one in arguments]
    return {str: "a", int: 1, float: 1.0, bool: False, bytes: b""}.get(kind)


def _annotated(kind: Any, metas: Any) -> Any:
    patterns = [meta.pattern for meta in metas if isinstance(meta, msgspec.Meta) and meta.pattern]
    for text in ("a", "1" * 12, "0" * 64, "tcp:80", "10.0.0.0/8", "tcg", "HTTP/2", "edge-0"):
        if patterns and not all(_takes(kind, pattern, text) for pattern in patterns):
            continue
        return text if kind is str else body_for(kind)
    raise AssertionError(f"no example for {patterns}")


def _takes(kind: Any, pattern: str, text: str) -> bool:
    try:
        msgspec.convert(text, typing.Annotated[kind, msgspec.Meta(pattern=pattern)])
    except msgspec.ValidationError:
        return False
    return True


def fields_of(kind: Any, name: str = "") -> Iterator[tuple[str, Any, tuple[msgspec.Meta, ...]]]:
    """Every plain value in a type, with its bounds: (where, type, bounds)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        metas = tuple(one for one in arguments[1:] if isinstance(one, msgspec.Meta))
        if typing.get_origin(arguments[0]) is None:
            yield name, arguments[0], metas
        else:
            yield from fields_of(arguments[0], name)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from fields_of(hint, f"{name}.{field}")
    elif arguments:
        for number, one in enumerate(arguments):
            yield from fields_of(one, f"{name}[{number}]")
    else:
        yield name, kind, ()
