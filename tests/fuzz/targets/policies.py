"""Policies and their wildcards (gateway/accounts/policy.py, glob.py), beside a slow reading of both."""

from __future__ import annotations

import contextlib
import json
import random
from functools import lru_cache
from typing import Any

from gateway.accounts import glob
from gateway.accounts.directory import _decoded
from gateway.accounts.policy import Decision, PolicyError, parse
from gateway.accounts.policy import check as check_policy

TRACED = ("gateway.accounts.policy", "gateway.accounts.glob")
_KEYS = frozenset({"aws:username", "aws:currenttime", "aws:sourceip", "aws:useragent", "aws:securetransport", "aws:tagkeys"})
_OPERATORS = ("StringEquals", "StringLike", "StringNotLike", "ArnLike", "Bool", "IpAddress", "NotIpAddress", "NumericLessThan", "DateGreaterThan", "Null", "ForAnyValue:StringLike",
              "ForAllValues:StringEquals", "StringEqualsIfExists", "DateEqualsIfExists")  # fmt: skip
_VALUES = (
    "*",
    "a*b",
    "${aws:username}",
    "${aws:username, 'x'}",
    "${*}",
    "true",
    "1",
    "-1.5",
    "10.0.0.0/8",
    "::/0",
    "2026-01-01",
    "2026-01-01T00:00:00Z",
    "9" * 19,
    "arn:aws:a:b:c:d",
    "${",
    "",
)
_NAMES = ("Statement", "Version", "2012-10-17", "Effect", "Allow", "Deny", "Action", "NotAction", "Resource", "NotResource", "Condition")
WORDS = (
    *(json.dumps(word).encode() for word in (*_OPERATORS, *_VALUES, *sorted(_KEYS), *_NAMES)),
    b"[" * 600,
    b'{"a":' * 300,
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"1e999",
    b"\\ud800",
)
_ACTIONS = ("lambda:GetMicrovm", "lambda:RunMicrovm", "iam:PassRole")
_ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:app"
_CONTEXT = {
    "aws:username": ["alice"],
    "aws:sourceip": ["10.1.2.3"],
    "aws:currenttime": ["2026-05-01T00:00:00Z"],
    "aws:useragent": ["a*b"],
    "aws:tagkeys": ["a", "b"],
}


def seeds() -> list[bytes]:
    rng = random.Random(0)
    return [b"*\0a*b?\0axxbz", *(_document(rng) for _ in range(12))]


def make(rng: random.Random) -> bytes:
    if rng.randrange(3):
        return _document(rng)
    return (
        b"*\0"
        + "".join(rng.choices("ab:*?", k=rng.randrange(9))).encode()
        + b"\0"
        + "".join(rng.choices("ab:", k=rng.randrange(12))).encode()
    )


def _document(rng: random.Random) -> bytes:
    def some(words: tuple[str, ...]) -> Any:
        return rng.choice(words) if rng.randrange(2) else [rng.choice(words) for _ in range(rng.randrange(1, 4))]

    def statement() -> dict[str, Any]:
        made = {"Effect": rng.choice(("Allow", "Deny")), rng.choice(("Action", "NotAction")): some(("*", "lambda:*", "LAMBDA:get*", "lambda:???Microvm", "iam:Pass*", *_ACTIONS)),
                rng.choice(("Resource", "Resource", "NotResource")): some(("*", _ARN, _ARN + "*"))}  # fmt: skip
        if not rng.randrange(3):
            made["Condition"] = {rng.choice(_OPERATORS): {rng.choice(sorted(_KEYS)): some(_VALUES)}}
        return made

    return json.dumps(
        {"Version": rng.choice(("2012-10-17", "2008-10-17")), "Statement": [statement() for _ in range(rng.randrange(1, 4))]}
    ).encode()


def check(data: bytes) -> None:
    if data[:2] == b"*\0":
        pattern, _, text = data[2:200].decode("latin-1").partition("\0")
        assert glob.Glob(glob.elements(pattern)).match(text) == _slow(tuple(pattern), text, ""), "a glob and its slow reading differ"
        in_part = glob.elements(pattern, glob.ONE_IN_PART, glob.MANY_IN_PART)
        assert glob.Glob(in_part).match(text) == _slow(tuple(pattern), text, ":"), "a glob of parts and its slow reading differ"
        return
    with contextlib.suppress(PolicyError, UnicodeDecodeError):
        document = _decoded(data.decode())
        policy = parse(document)
        for action in _ACTIONS:
            decision = policy.decide(action, _ARN, _CONTEXT)
            if not any(statement.conditions for statement in policy.statements) and _is_plain(document):
                assert decision is _decided(document, action), "a policy and its slow reading differ"
        check_policy(document, _KEYS)


def _slow(pattern: tuple[str, ...], text: str, but: str) -> bool:
    """By its definition, place by place."""

    @lru_cache(None)
    def matches(at: int, to: int) -> bool:
        if at == len(pattern):
            return to == len(text)
        if pattern[at] == "*":
            return matches(at + 1, to) or (to < len(text) and text[to] != but and matches(at, to + 1))
        return to < len(text) and (text[to] == pattern[at] or (pattern[at] == "?" and text[to] != but)) and matches(at + 1, to + 1)

    return matches(0, 0)


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _statements(document: Any) -> list[dict[str, Any]]:
    found = document.get("Statement", [])
    return found if isinstance(found, list) else [found]


def _is_plain(document: Any) -> bool:
    """Only resources whose wildcard stands at the end, and no variables: the slow reading knows no others."""
    return all(
        len(word) < 100 and "?" not in word and "${" not in word and "*" not in word[:-1]
        for one in _statements(document)
        for word in _listed(one.get("Resource", one.get("NotResource")))
    )


def _decided(document: Any, action: str) -> Decision:
    found = set()
    for one in _statements(document):
        acts = any(
            _slow(tuple(word.lower()), action.lower(), "") for word in _listed(one.get("Action", one.get("NotAction"))) if len(word) < 100
        ) != ("NotAction" in one)
        is_its = any(_slow(tuple(word), _ARN, "") for word in _listed(one.get("Resource", one.get("NotResource")))) != (
            "NotResource" in one
        )
        if acts and is_its:
            found.add(one["Effect"])
    return Decision.EXPLICIT_DENY if "Deny" in found else Decision.ALLOW if found else Decision.IMPLICIT_DENY
