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


@functools.lru_cache(4096)
def _pattern(pieces: Pieces, fold: bool = False) -> re.Pattern[str]:
    return re.compile("".join(re.escape(text) if is_itself else _glob(text) for text, is_itself in pieces), re.S | (re.I if fold else 0))


def _glob(text: str, anything: str = ".") -> str:
    return "".join(f"{anything}*" if c == "*" else anything if c == "?" else re.escape(c) for c in text)


def _like(want: Pieces, have: str) -> bool:
    return _pattern(want).fullmatch(have) is not None


@functools.lru_cache(4096)
def _resource_pattern(pieces: Pieces) -> re.Pattern[str]:
    """A wildcard stays in its segment of an ARN, but for a star at a segment's end (IAM User Guide: JSON policy elements: Resource)."""
    made, colons = "", 0
    for number, (text, is_itself) in enumerate(pieces):
        if is_itself:
            made += re.escape(text)
            continue
        for at, segment in enumerate(text.split(":")):
            made += ":" if at else ""
            colons += bool(at)
            is_end = at < text.count(":") or number == len(pieces) - 1
            if colons >= _ARN_COLONS:
                made += _glob(segment)
            elif segment.endswith("*") and is_end:
                made += _glob(segment[:-1], "[^:]") + ".*"
            else:
                made += _glob(segment, "[^:]")
    return re.compile(made, re.S)


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


def _number(compare: Callable[[float, float], bool]) -> Callable[[str, str], bool]:
    def check(want: str, have: str) -> bool:
        try:
            return compare(float(have), float(want))
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
        except ValueError:
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


@dataclass(frozen=True)
class Condition:
    """One line of a Condition block: `quantifier` is "", ForAnyValue or ForAllValues."""

    operator: str
    key: str
    values: tuple[str, ...]
    quantifier: str = ""
    if_exists: bool = False

    def holds(self, context: Context) -> bool:
        given = context.get(self.key, [])
        if self.operator == "Null":
            return (not given) == (self.values[0].lower() == "true")
        if not given:
            return self.if_exists or self.quantifier == "ForAllValues" or self.operator in _NEGATED
        negated = self.operator in _NEGATED
        test = _OPERATORS[_NEGATED.get(self.operator, self.operator)]
        wanted = [_expanded(value, context) for value in self.values]
        matches = [any(test(want, have) for want in wanted) != negated for have in given]
        return any(matches) if self.quantifier == "ForAnyValue" else all(matches)


_VARIABLE = re.compile(r"\$\{([^},]+?)\s*(?:,\s*'([^']*)'\s*)?\}")


def _expanded(text: str, context: Context) -> Pieces:
    """Policy variables: ${aws:username}, ${aws:ResourceTag/owner}, with a default ${aws:username, 'nobody'}; ${*}, ${?} and ${$} stand for
    themselves. One without a value stays as it is written, which nothing is called."""
    if "${" not in text:
        return ((text, False),)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for match in _VARIABLE.finditer(text):
        pieces.append((text[at : match.start()], False))
        at = match.end()
        name, given = match[1], context.get(_key(match[1]), [])
        if name in ("*", "?", "$"):
            pieces.append((name, True))
        elif len(given) == 1:  # one of several values is nobody's in particular
            pieces.append((given[0], True))
        else:
            pieces.append((match[0] if match[2] is None else match[2], True))
    return (*pieces, (text[at:], False))


def _key(text: str) -> str:
    """Condition keys do not tell upper from lower case; the tag's name in one does."""
    head, slash, tag = text.partition("/")
    return head.lower() + slash + tag


@dataclass(frozen=True)
class Statement:
    allows: bool
    actions: tuple[str, ...]
    but_actions: bool
    resources: tuple[str, ...]
    but_resources: bool
    conditions: tuple[Condition, ...]

    def applies(self, action: str, resource: str, context: Context) -> bool:
        if any(_pattern(((want, False),), True).fullmatch(action) for want in self.actions) == self.but_actions:
            return False
        if any(_resource_pattern(_expanded(want, context)).fullmatch(resource) for want in self.resources) == self.but_resources:
            return False
        return all(condition.holds(context) for condition in self.conditions)


@dataclass(frozen=True)
class Policy:
    statements: tuple[Statement, ...] = ()

    def decide(self, action: str, resource: str, context: Context) -> Decision:
        applying = [statement.allows for statement in self.statements if statement.applies(action, resource, context)]
        if False in applying:
            return Decision.EXPLICIT_DENY
        return Decision.ALLOW if applying else Decision.IMPLICIT_DENY


def parse(document: Any) -> Policy:
    """Raises PolicyError: an element that is not known could have been meant as a restriction."""
    if not isinstance(document, dict):
        raise PolicyError("a policy is a JSON object with Version and Statement")
    _only(document, {"Version", "Id", "Statement"}, "the policy")
    if document.get("Version", "2012-10-17") not in ("2012-10-17", "2008-10-17"):
        raise PolicyError("Version must be 2012-10-17")
    statements = document.get("Statement", [])
    statements = statements if isinstance(statements, list) else [statements]
    return Policy(tuple(_statement(statement, f"Statement {at}") for at, statement in enumerate(statements, 1)))


# What a request brings (Caller.context, gateway/api/permissions.py), or would bring if there were such a thing here: no service calls on
# somebody's behalf, and nobody has a second factor, which policies ask about by its absence.
_KEYS = frozenset(
    {
        "aws:sourceip", "aws:securetransport", "aws:principalarn", "aws:principalaccount", "aws:principaltype", "aws:username",
        "aws:userid", "aws:useragent", "aws:currenttime", "aws:epochtime", "aws:tokenissuetime", "aws:requestedregion", "aws:tagkeys",
        "aws:multifactorauthpresent", "aws:multifactorauthage", "aws:viaawsservice", "iam:passedtoservice",
    }
)  # fmt: skip
_TAGS = ("aws:resourcetag/", "aws:requesttag/")


def check(document: Any) -> None:
    """For a policy that somebody gives us: also its conditions are such as can be judged. Raises PolicyError: a Deny by a key that no
    request has, or by a value that is none, would never deny."""
    for at, statement in enumerate(parse(document).statements, 1):
        for condition in statement.conditions:
            where = f"Statement {at}: Condition"
            if condition.key not in _KEYS and not condition.key.startswith(_TAGS):
                raise PolicyError(f"{where}: the key {condition.key} is not evaluated here")
            for value in condition.values:
                if "${" not in value and not _is_value(_NEGATED.get(condition.operator, condition.operator), value):
                    raise PolicyError(f"{where}: {value} is no value for {condition.operator}")


def _is_value(operator: str, value: str) -> bool:
    try:
        if operator == "IpAddress":
            ipaddress.ip_network(value, strict=False)
        elif operator.startswith("Numeric"):
            float(value)
        elif operator.startswith("Date"):
            _moment(value)
        elif operator in ("Bool", "Null"):
            return value.lower() in ("true", "false")
    except ValueError:
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


def _statement(given: Any, where: str) -> Statement:
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
        tuple(condition for name, keys in conditions.items() for condition in _conditions(name, keys, where)),
    )  # fmt: skip


def _conditions(name: str, keys: Any, where: str) -> list[Condition]:
    quantifier, _, operator = name.rpartition(":")
    if_exists = operator.endswith("IfExists")
    operator = operator.removesuffix("IfExists")
    if quantifier not in ("", "ForAnyValue", "ForAllValues") or not (operator in _OPERATORS or operator in _NEGATED or operator == "Null"):
        raise PolicyError(f"{where}: the condition operator {name} is not known")
    if not isinstance(keys, dict):
        raise PolicyError(f"{where}: {name} must be an object of condition keys")
    return [Condition(operator, _key(key), _strings(values, f"{where}: {key}"), quantifier, if_exists) for key, values in keys.items()]
