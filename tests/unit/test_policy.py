"""IAM's policy language: every operator, negation and quantifier, wildcards, variables, and what is no policy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.policy import Decision, PolicyError, parse

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:app"


def decide(
    statement: dict[str, Any] | list[dict[str, Any]], action: str = "lambda:GetMicrovm", resource: str = ARN, **context: Any
) -> Decision:
    keys = {name.replace("__", ":").lower(): value if isinstance(value, list) else [value] for name, value in context.items()}
    return parse({"Version": "2012-10-17", "Statement": statement}).decide(action, resource, keys)


def allow(**changes: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": "lambda:*", "Resource": "*", **changes}


@pytest.mark.parametrize(
    ("action", "matches"),
    [("lambda:GetMicrovm", True), ("LAMBDA:getmicrovm", True), ("lambda:Get*", True), ("lambda:GetMicrov?", True), ("*", True),
     ("lambda:GetMicro", False), ("lambda:Run*", False), ("iam:*", False)],
)  # fmt: skip
def test_actions(action: str, matches: bool) -> None:
    assert (decide(allow(Action=action)) is Decision.ALLOW) is matches


@pytest.mark.parametrize(
    ("resource", "matches"),
    [
        (ARN, True),
        (ARN[:-3] + "*", True),
        ("arn:aws:lambda:*:*:microvm-image:a?p", True),
        ("*", True),
        (ARN.upper(), False),
        (ARN + "x", False),
    ],
)
def test_resources(resource: str, matches: bool) -> None:
    assert (decide(allow(Resource=resource)) is Decision.ALLOW) is matches


def test_not_action_and_not_resource() -> None:
    assert decide({"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}) is Decision.ALLOW
    assert decide({"Effect": "Allow", "NotAction": "lambda:*", "Resource": "*"}) is Decision.IMPLICIT_DENY
    assert decide({"Effect": "Allow", "Action": "*", "NotResource": ARN}) is Decision.IMPLICIT_DENY


def test_deny_wins_wherever_it_stands() -> None:
    no = {"Effect": "Deny", "Action": "lambda:Get*", "Resource": "*"}
    for order in ([no, allow()], [allow(), no]):
        assert decide(order) is Decision.EXPLICIT_DENY


@pytest.mark.parametrize(
    ("operator", "want", "have", "holds"),
    [
        ("StringEquals", "a", "a", True), ("StringEquals", "a", "A", False), ("StringNotEquals", "a", "b", True),
        ("StringEqualsIgnoreCase", "a", "A", True), ("StringLike", "a*c", "abc", True), ("StringNotLike", "a*", "abc", False),
        ("ArnLike", "arn:aws:lambda:*:*:microvm-image:*", ARN, True), ("ArnLike", "arn:*", ARN, False), ("ArnNotLike", "arn:aws:s3:*:*:*", ARN, True),
        ("Bool", "true", "True", True), ("Bool", "true", "false", False),
        ("IpAddress", "10.0.0.0/8", "10.1.2.3", True), ("IpAddress", "10.0.0.0/8", "11.0.0.1", False), ("IpAddress", "10.0.0.0/8", "::1", False),
        ("IpAddress", "2001:db8::/32", "2001:db8::1", True), ("NotIpAddress", "10.0.0.0/8", "11.0.0.1", True), ("IpAddress", "x", "10.0.0.1", False),
        ("NumericLessThan", "5", "4", True), ("NumericGreaterThanEquals", "5", "4", False), ("NumericEquals", "5", "x", False),
        ("DateLessThan", "2030-01-01T00:00:00Z", "2026-11-25T00:00:00Z", True), ("DateGreaterThan", "1700000000", "2026-11-25T00:00:00Z", True),
        ("Null", "true", "set", False), ("Null", "false", "set", True),
    ],
)  # fmt: skip
def test_operators(operator: str, want: str, have: str, holds: bool) -> None:
    found = decide(allow(Condition={operator: {"aws:Key": want}}), aws__key=have)
    assert (found is Decision.ALLOW) is holds


@pytest.mark.parametrize(
    ("operator", "holds"),
    [("StringEquals", False), ("StringNotEquals", True), ("StringEqualsIfExists", True), ("ForAllValues:StringEquals", True),
     ("ForAnyValue:StringEquals", False)],
)  # fmt: skip
def test_a_key_that_is_not_there(operator: str, holds: bool) -> None:
    assert (decide(allow(Condition={operator: {"aws:Key": "a"}})) is Decision.ALLOW) is holds
    assert decide(allow(Condition={"Null": {"aws:Key": "true"}})) is Decision.ALLOW


@pytest.mark.parametrize(
    ("operator", "have", "holds"),
    [("ForAllValues:StringEquals", ["a", "b"], True), ("ForAllValues:StringEquals", ["a", "c"], False),
     ("ForAnyValue:StringEquals", ["c", "b"], True), ("ForAnyValue:StringEquals", ["c"], False)],
)  # fmt: skip
def test_quantifiers(operator: str, have: list[str], holds: bool) -> None:
    assert (decide(allow(Condition={operator: {"aws:TagKeys": ["a", "b"]}}), aws__tagkeys=have) is Decision.ALLOW) is holds


def test_conditions_are_and_values_are_or() -> None:
    both = {"StringEquals": {"aws:A": ["1", "2"], "aws:B": "3"}}
    assert decide(allow(Condition=both), aws__a="2", aws__b="3") is Decision.ALLOW
    assert decide(allow(Condition=both), aws__a="2", aws__b="4") is Decision.IMPLICIT_DENY


def test_keys_and_the_tags_in_them_fold_case() -> None:
    policy = parse({"Statement": allow(Condition={"StringEquals": {"AWS:resourcetag/Team": "blue"}})})
    assert policy.decide("lambda:x", ARN, {"aws:resourcetag/team": ["blue"]}) is Decision.ALLOW
    assert policy.decide("lambda:x", ARN, {"aws:resourcetag/team": ["red"]}) is Decision.IMPLICIT_DENY


def test_variables() -> None:
    own = allow(Resource="arn:aws:lambda:us-east-1:123456789012:microvm-image:${aws:username}-*")
    assert decide(own, resource=ARN.replace("app", "ann-app"), aws__username="ann") is Decision.ALLOW
    assert decide(own, resource=ARN.replace("app", "bob-app"), aws__username="ann") is Decision.IMPLICIT_DENY
    assert decide(own, resource=ARN.replace("app", "ann-app")) is Decision.IMPLICIT_DENY


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], "a policy is a JSON object"),
        ({"Version": "2020-01-01", "Statement": []}, "Version must be"),
        ({"Statment": []}, "unknown element Statment"),
        ({"Statement": [allow(Effect="allow")]}, "Statement 1: Effect must be Allow or Deny"),
        ({"Statement": [{"Effect": "Allow", "Action": "*"}]}, "one of Resource and NotResource"),
        ({"Statement": [allow(NotAction="*")]}, "one of Action and NotAction"),
        ({"Statement": [allow(Principal="*")]}, "unknown element Principal"),
        ({"Statement": [allow(Condition={"StringEqual": {"a": "b"}})]}, "the condition operator StringEqual is not known"),
        ({"Statement": [allow(Condition={"StringEquals": "b"})]}, "must be an object of condition keys"),
        ({"Statement": [allow(Action={})]}, "Action must be a string"),
        ({"Statement": ["x"]}, "Statement 1 must be an object"),
    ],
)
def test_what_is_no_policy(document: Any, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        parse(document)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Version", "Statement", "Effect", "Action", "Resource", "Condition", "StringEquals", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(_JSON)
def test_any_document_is_taken_or_refused(document: Any) -> None:
    try:
        policy = parse(document)
    except PolicyError:
        return
    policy.decide("lambda:GetMicrovm", ARN, {})


@given(st.text(max_size=20), st.text(max_size=20))
def test_wildcards_never_match_by_accident(pattern: str, text: str) -> None:
    found = decide(allow(Resource=pattern), resource=text) is Decision.ALLOW
    if "*" not in pattern and "?" not in pattern and "$" not in pattern:
        assert found is (pattern == text)
