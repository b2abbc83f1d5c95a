"""IAM's policy language, evaluated: explicit deny wins, then allow, else nothing (IAM User Guide, "Policy evaluation logic").

Pure: a parsed policy, an action, a resource and the request's condition keys in; a decision out.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .glob import MANY, MANY_IN_PART, ONE_IN_PART, Glob, elements

Context = Mapping[str, list[str]]


class PolicyError(Exception):
    """The document is no policy; the text says where and why."""


class Decision(enum.Enum):
    ALLOW = "allow"
    IMPLICIT_DENY = "implicit"
    EXPLICIT_DENY = "explicit"


# A policy's text with its variables replaced: pieces, and whether each stands for itself. What came with the request always does: a star
# in a caller's tag is a star.
Pieces = tuple[tuple[str, bool], ...]
_ARN_COLONS = 5
_ACTION = re.compile(r"[A-Za-z0-9*?-]+:[A-Za-z0-9*?]+")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")


@functools.lru_cache(4096)
def _pattern(pieces: Pieces) -> Glob:
    return Glob(element for text, is_itself in pieces for element in (text if is_itself else elements(text)))


@functools.lru_cache(4096)
def _action_pattern(text: str) -> Glob:
    return Glob(elements(text.lower()))


def _like(want: Pieces, have: str) -> bool:
    return _pattern(want).match(have)


@functools.lru_cache(4096)
def _resource_pattern(pieces: Pieces) -> Glob:
    """A wildcard stays in its segment of an ARN, but for a star at a segment's end (IAM User Guide: JSON policy elements: Resource)."""
    made: list[str] = []
    colons = 0
    for number, (text, is_itself) in enumerate(pieces):
        if is_itself:
            made += text
            continue
        for at, segment in enumerate(text.split(":")):
            made += ":" if at else ""
            colons += bool(at)
            is_end = at < text.count(":") or number == len(pieces) - 1
            if colons >= _ARN_COLONS:
                made += elements(segment)
            elif segment.endswith("*") and is_end:
                made += [*elements(segment[:-1], ONE_IN_PART, MANY_IN_PART), MANY]
            else:
                made += elements(segment, ONE_IN_PART, MANY_IN_PART)
    return Glob(made)


def _arn_like(want: Pieces, have: str) -> bool:
    """Each of the six parts by itself: a star does not pass a colon before the last."""
    wanted: list[list[tuple[str, bool]]] = [[]]
    for text, is_itself in want:
        if is_itself:
            wanted[-1].append((text, True))
            continue
        first, *rest = text.split(":", _ARN_COLONS + 1 - len(wanted))
        wanted[-1].append((first, False))
        wanted += [[(one, False)] for one in rest]
    had = have.split(":", _ARN_COLONS)
    return len(wanted) == len(had) == _ARN_COLONS + 1 and all(_like(tuple(w), h) for w, h in zip(wanted, had, strict=True))


def _text(want: Pieces) -> str:
    return "".join(text for text, _ in want)


def _plain(test: Callable[[str, str], bool]) -> Callable[[Pieces, str], bool]:
    """A test that knows no wildcards."""
    return lambda want, have: test(_text(want), have)


def _in_network(want: str, have: str) -> bool:
    try:
        return ipaddress.ip_address(have) in ipaddress.ip_network(want, strict=False)
    except ValueError:
        return False


def _decimal(text: str) -> float:
    """Raises ValueError: Python's own reading takes more than IAM's, "nan" among it."""
    if not _DECIMAL.fullmatch(text):
        raise ValueError(text)
    return float(text)


def _number(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def check(want: str, have: str) -> bool:
        try:
            return compare(_decimal(have), _decimal(want))
        except ValueError:
            return False

    return check


def _moment(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _date(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def check(want: str, have: str) -> bool:
        try:
            return compare(_moment(have), _moment(want))
        except (ValueError, OverflowError):
            return False

    return check


_OPERATORS: dict[str, Callable[[Pieces, str], bool]] = {
    "StringEquals": _plain(str.__eq__),
    "StringEqualsIgnoreCase": _plain(lambda want, have: want.casefold() == have.casefold()),
    "StringLike": _like,
    "ArnEquals": _arn_like,
    "ArnLike": _arn_like,
    "Bool": _plain(lambda want, have: want.lower() == have.lower()),
    "IpAddress": _plain(_in_network),
    "NumericEquals": _plain(_number(lambda have, want: have == want)),
    "NumericLessThan": _plain(_number(lambda have, want: have < want)),
    "NumericLessThanEquals": _plain(_number(lambda have, want: have <= want)),
    "NumericGreaterThan": _plain(_number(lambda have, want: have > want)),
    "NumericGreaterThanEquals": _plain(_number(lambda have, want: have >= want)),
    "DateEquals": _plain(_date(lambda have, want: have == want)),
    "DateLessThan": _plain(_date(lambda have, want: have < want)),
    "DateLessThanEquals": _plain(_date(lambda have, want: have <= want)),
    "DateGreaterThan": _plain(_date(lambda have, want: have > want)),
    "DateGreaterThanEquals": _plain(_date(lambda have, want: have >= want)),
}
_NEGATED = {
    "StringNotEquals": "StringEquals", "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase", "StringNotLike": "StringLike",
    "ArnNotEquals": "ArnEquals", "ArnNotLike": "ArnLike", "NotIpAddress": "IpAddress", "NumericNotEquals": "NumericEquals",
    "DateNotEquals": "DateEquals",
}  # fmt: skip


_WITH_VARIABLES = ("String", "Arn")  # operators, by what they begin with, negated ones too


class _NoValue(Exception):
    """A variable of an Allow has no value in the request: the statement allows nothing."""


@dataclass(frozen=True)
class Condition:
    """One line of a Condition block: `quantifier` is "", ForAnyValue or ForAllValues."""

    operator: str
    key: str
    values: tuple[str, ...]
    quantifier: str = ""
    if_exists: bool = False
    expands: bool = False

    def holds(self, context: Context, allows: bool) -> bool:
        """Raises _NoValue. A key with several values, asked about without a quantifier, is what restricts: for an Allow all of them must
        match, for a Deny one of them."""
        given = context.get(self.key, [])
        if self.quantifier:
            given = [value for value in given if value]  # an empty text is an empty set
        if self.operator == "Null":
            return any((not given) == (value.lower() == "true") for value in self.values)
        if not given:
            return self.if_exists or self.quantifier == "ForAllValues" or (not self.quantifier and self.operator in _NEGATED)
        negated = self.operator in _NEGATED
        test = _OPERATORS[_NEGATED.get(self.operator, self.operator)]
        wanted = [_expanded(value, context, allows) if self.expands else ((value, False),) for value in self.values]
        matches = [any(test(want, have) for want in wanted) != negated for have in given]
        is_any = self.quantifier == "ForAnyValue" or (not self.quantifier and not allows)
        return any(matches) if is_any else all(matches)


_VARIABLE = re.compile(r"\$\{([^},]+?)\s*(?:,\s*'([^']*)'\s*)?\}")
_THEMSELVES = ("*", "?", "$")


def _expanded(text: str, context: Context, allows: bool) -> Pieces:
    """Policy variables: ${aws:username}, ${aws:ResourceTag/owner}, with a default ${aws:username, 'nobody'}; ${*}, ${?} and ${$} stand for
    themselves. Raises _NoValue for one without a value in an Allow; in a Deny it stays as it is written, which nothing is called."""
    if "${" not in text:
        return ((text, False),)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for match in _VARIABLE.finditer(text):
        pieces.append((text[at : match.start()], False))
        at = match.end()
        name, given = match[1], context.get(match[1].lower(), [])
        if name in _THEMSELVES:
            pieces.append((name, True))
        elif len(given) == 1:  # one of several values is nobody's in particular
            pieces.append((given[0], True))
        elif match[2] is not None:
            pieces.append((match[2], True))
        elif allows:
            raise _NoValue
        else:
            pieces.append((match[0], True))
    return (*pieces, (text[at:], False))


@dataclass(frozen=True)
class Statement:
    allows: bool
    actions: tuple[str, ...]
    but_actions: bool
    resources: tuple[str, ...]
    but_resources: bool
    conditions: tuple[Condition, ...]
    expands: bool = False

    def applies(self, action: str, resource: str, context: Context) -> bool:
        if any(_action_pattern(want).match(action.lower()) for want in self.actions) == self.but_actions:
            return False
        try:
            wanted = [_expanded(want, context, self.allows) if self.expands else ((want, False),) for want in self.resources]
            if any(_resource_pattern(want).match(resource) for want in wanted) == self.but_resources:
                return False
            return all([condition.holds(context, self.allows) for condition in self.conditions])
        except _NoValue:
            return False


@dataclass(frozen=True)
class Policy:
    """`within`: a session's policy, which allows nothing by itself, and beyond which nothing is allowed."""

    statements: tuple[Statement, ...] = ()
    within: Policy | None = None

    def decide(self, action: str, resource: str, context: Context) -> Decision:
        applying = [statement.allows for statement in self.statements if statement.applies(action, resource, context)]
        narrower = self.within.decide(action, resource, context) if self.within is not None else Decision.ALLOW
        if False in applying or narrower is Decision.EXPLICIT_DENY:
            return Decision.EXPLICIT_DENY
        return Decision.ALLOW if applying and narrower is Decision.ALLOW else Decision.IMPLICIT_DENY


VERSIONS = ("2012-10-17", "2008-10-17")


def parse(document: Any) -> Policy:
    """Raises PolicyError: an element that is not known could have been meant as a restriction."""
    if not isinstance(document, dict):
        raise PolicyError("a policy is a JSON object with Version and Statement")
    _only(document, {"Version", "Id", "Statement"}, "the policy")
    version = document.get("Version", VERSIONS[1])
    if version not in VERSIONS:
        raise PolicyError("Version must be 2012-10-17")
    statements = document.get("Statement", [])
    statements = statements if isinstance(statements, list) else [statements]
    expands = version == VERSIONS[0]  # before, a variable was text
    return Policy(tuple(_statement(statement, expands, f"Statement {at}") for at, statement in enumerate(statements, 1)))


TAGS = ("aws:resourcetag/", "aws:requesttag/")
TAG_KEYS = "aws:tagkeys"  # the one key with several values


def check(document: Any, keys: frozenset[str]) -> None:
    """For a policy that somebody gives us: what it says is such as can be judged. Raises PolicyError: a Deny by a key that no request has
    (`keys` are those that one may have, beside tags), or by a value, a resource or an action that is none, would never deny."""
    statements = parse(document).statements
    if "Statement" not in document:
        raise PolicyError("a policy has a Statement")
    for at, statement in enumerate(statements, 1):
        where = f"Statement {at}"
        for action in statement.actions:
            if action != "*" and not _ACTION.fullmatch(action):
                raise PolicyError(f"{where}: {action!r} is no action: * or one like lambda:Get*")
        for resource in statement.resources:
            if not _is_resource(resource):
                raise PolicyError(f"{where}: {resource!r} is no resource: * or an ARN, or the beginning of one with a star at its end")
            _check_variables(resource, statement.expands, keys, where)
            if "${" in ":".join(resource.split(":", _ARN_COLONS)[:_ARN_COLONS]) and resource.count(":") >= _ARN_COLONS:
                raise PolicyError(f"{where}: {resource}: a variable stands behind an ARN's fifth colon")
        for condition in statement.conditions:
            _check_condition(condition, statement.expands, keys, f"{where}: Condition")


def _is_resource(text: str) -> bool:
    """A beginning has no variables, which stand behind the fifth colon alone."""
    is_beginning = text.endswith("*") and "${" not in text
    return text == "*" or (text.startswith("arn:") and (text.count(":") >= _ARN_COLONS or is_beginning))


def _check_condition(condition: Condition, expands: bool, keys: frozenset[str], where: str) -> None:
    if not _is_key(condition.key, keys):
        raise PolicyError(f"{where}: the key {condition.key} is not evaluated here")
    if condition.key == TAG_KEYS and not condition.quantifier and condition.operator != "Null":
        raise PolicyError(f"{where}: {condition.key} has several values: ask with ForAllValues or ForAnyValue")
    takes_variables = condition.operator.startswith(_WITH_VARIABLES)
    for value in condition.values:
        if takes_variables:
            _check_variables(value, expands, keys, where)
        if not (takes_variables and "${" in value) and not _is_value(_NEGATED.get(condition.operator, condition.operator), value):
            raise PolicyError(f"{where}: {value} is no value for {condition.operator}")


def _is_key(key: str, keys: frozenset[str]) -> bool:
    return key in keys or any(key.startswith(prefix) and len(key) > len(prefix) for prefix in TAGS)


def _check_variables(text: str, expands: bool, keys: frozenset[str], where: str) -> None:
    if "${" not in text:
        return
    if not expands:
        raise PolicyError(f"{where}: {text}: variables are text without Version 2012-10-17")
    names = [match[1] for match in _VARIABLE.finditer(text)]
    if len(names) != text.count("${"):
        raise PolicyError(f"{where}: {text} has a variable that does not end")
    for name in names:
        if name not in _THEMSELVES and not _is_key(name.lower(), keys):
            raise PolicyError(f"{where}: the variable {name} is not evaluated here")


def _is_value(operator: str, value: str) -> bool:
    try:
        if operator == "IpAddress":
            ipaddress.ip_network(value, strict=False)
        elif operator.startswith("Numeric"):
            _decimal(value)
        elif operator.startswith("Date"):
            _moment(value)
        elif operator in ("Bool", "Null"):
            return value.lower() in ("true", "false")
        elif operator.startswith("Arn"):
            return value.count(":") >= _ARN_COLONS
    except (ValueError, OverflowError):
        return False
    return True


def _only(given: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise PolicyError(f"{where} has an unknown element {unknown[0]}")


def _strings(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(value, str | int | float | bool) for value in values):
        raise PolicyError(f"{where} must be a string or a list of strings")
    return tuple(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


def _statement(given: Any, expands: bool, where: str) -> Statement:
    if not isinstance(given, dict):
        raise PolicyError(f"{where} must be an object")
    _only(given, {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition"}, where)
    if given.get("Effect") not in ("Allow", "Deny"):
        raise PolicyError(f"{where}: Effect must be Allow or Deny")
    for name in ("Action", "Resource"):
        if (name in given) == (f"Not{name}" in given):
            raise PolicyError(f"{where} must have one of {name} and Not{name}")
    conditions = given.get("Condition", {})
    if not isinstance(conditions, dict):
        raise PolicyError(f"{where}: Condition must be an object")
    return Statement(
        given["Effect"] == "Allow",
        _strings(given.get("Action", given.get("NotAction")), f"{where}: Action"), "NotAction" in given,
        _strings(given.get("Resource", given.get("NotResource")), f"{where}: Resource"), "NotResource" in given,
        tuple(condition for name, keys in conditions.items() for condition in _conditions(name, keys, expands, where)), expands,
    )  # fmt: skip


def _conditions(name: str, keys: Any, expands: bool, where: str) -> list[Condition]:
    quantifier, _, operator = name.rpartition(":")
    if_exists = operator.endswith("IfExists")
    operator = operator.removesuffix("IfExists")
    is_known = operator in _OPERATORS or operator in _NEGATED or (operator == "Null" and not if_exists)
    if quantifier not in ("", "ForAnyValue", "ForAllValues") or not is_known:
        raise PolicyError(f"{where}: the condition operator {name} is not known")
    if not isinstance(keys, dict):
        raise PolicyError(f"{where}: {name} must be an object of condition keys")
    expands = expands and operator.startswith(_WITH_VARIABLES)
    return [
        Condition(operator, key.lower(), _strings(values, f"{where}: {key}"), quantifier, if_exists, expands)
        for key, values in keys.items()
    ]
