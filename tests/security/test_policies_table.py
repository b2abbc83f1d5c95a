"""The evaluator beside IAM's documentation, sentence by sentence (IAM User Guide; the page's file name stands in each row, the sentence is
in our words). Each row is asked twice: as it is, and with the one thing changed that the sentence is about, which must turn the answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from api_rig import ACCOUNT, ApiRig, image_arn
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts import policy as language
from gateway.accounts.glob import MANY, MANY_IN_PART, ONE, ONE_IN_PART, Glob, elements
from gateway.accounts.model import CONDITION_KEYS, Caller
from gateway.accounts.policy import Decision, Policy, PolicyError, check, parse
from gateway.api.permissions import _request_context

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:app"
OPERATORS, SETS, VARIABLES = "elements_condition_operators", "multi-value-conditions", "variables"
LOGIC, TAGS, CONDITION, RESOURCE, ACTION = "evaluation-logic", "access_tags", "elements_condition", "elements_resource", "elements_action"


class Ask(NamedTuple):
    """A request: `keys` are its context."""

    keys: dict[str, list[str]] = {}  # noqa: RUF012 - never changed
    action: str = "lambda:GetMicrovm"
    resource: str = ARN


def one(**more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": "*", "Resource": "*"} | more


def when(operator: str, values: Any, key: str = "aws:UserAgent") -> dict[str, Any]:
    return one(Condition={operator: {key: values}})


def agent(*values: str) -> Ask:
    return Ask({"aws:useragent": list(values)})


def ask(**keys: Any) -> Ask:
    return Ask({f"aws:{name.replace('__', '/')}": [value] if isinstance(value, str) else value for name, value in keys.items()})


def tags(*names: str) -> Ask:
    return Ask({"aws:tagkeys": list(names)})


def decide(statements: Any, asked: Ask, version: str | None = "2012-10-17") -> Decision:
    document = {"Statement": statements} | ({"Version": version} if version else {})
    return parse(document).decide(asked.action, asked.resource, asked.keys)


# (page, what it says, statement, a request that it allows, one that it does not)
ROWS: list[tuple[str, str, Any, Ask, Ask]] = [
    # ---- strings ----
    (OPERATORS, "StringEquals: exact, case counts", when("StringEquals", "Go"), agent("Go"), agent("go")),
    (OPERATORS, "StringEquals: a star is a star", when("StringEquals", "G*"), agent("G*"), agent("Go")),
    (OPERATORS, "StringNotEquals: negated", when("StringNotEquals", "Go"), agent("go"), agent("Go")),
    (OPERATORS, "StringEqualsIgnoreCase: case does not count", when("StringEqualsIgnoreCase", "GO"), agent("go"), agent("gp")),
    (OPERATORS, "StringNotEqualsIgnoreCase: negated", when("StringNotEqualsIgnoreCase", "GO"), agent("gp"), agent("go")),
    (OPERATORS, "StringLike: * for any number of characters, case counts", when("StringLike", "a*c"), agent("abbc"), agent("ABC")),
    (OPERATORS, "StringLike: * for none too", when("StringLike", "a*c"), agent("ac"), agent("ca")),
    (OPERATORS, "StringLike: ? for exactly one", when("StringLike", "a?c"), agent("abc"), agent("ac")),
    (OPERATORS, "StringNotLike: negated", when("StringNotLike", "a*"), agent("b"), agent("ab")),
    # ---- numbers ----
    (OPERATORS, "NumericEquals", when("NumericEquals", "5", "aws:EpochTime"), ask(epochtime="5.0"), ask(epochtime="6")),
    (OPERATORS, "NumericNotEquals: negated", when("NumericNotEquals", 5, "aws:EpochTime"), ask(epochtime="6"), ask(epochtime="5")),
    (OPERATORS, "NumericLessThan", when("NumericLessThan", "5", "aws:EpochTime"), ask(epochtime="4.9"), ask(epochtime="5")),
    (OPERATORS, "NumericLessThanEquals", when("NumericLessThanEquals", "5", "aws:EpochTime"), ask(epochtime="5"), ask(epochtime="5.1")),
    (OPERATORS, "NumericGreaterThan", when("NumericGreaterThan", "-5", "aws:EpochTime"), ask(epochtime="-4"), ask(epochtime="-5")),
    (OPERATORS, "NumericGreaterThanEquals", when("NumericGreaterThanEquals", "5", "aws:EpochTime"), ask(epochtime="5"), ask(epochtime="4")),
    (OPERATORS, "a number is an integer or a decimal", when("NumericLessThan", "5", "aws:EpochTime"), ask(epochtime="1"), ask(epochtime="-inf")),
    # ---- dates ----
    (OPERATORS, "DateEquals: ISO 8601", when("DateEquals", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:00Z"), ask(currenttime="2026-01-01T00:00:01Z")),
    (OPERATORS, "DateNotEquals: negated", when("DateNotEquals", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:01Z"), ask(currenttime="2026-01-01T00:00:00Z")),
    (OPERATORS, "DateLessThan: before", when("DateLessThan", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2025-12-31T23:59:59Z"), ask(currenttime="2026-01-01T00:00:00Z")),
    (OPERATORS, "DateLessThanEquals: at or before", when("DateLessThanEquals", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:00Z"), ask(currenttime="2026-01-01T00:00:01Z")),
    (OPERATORS, "DateGreaterThan: after", when("DateGreaterThan", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:01Z"), ask(currenttime="2026-01-01T00:00:00Z")),
    (OPERATORS, "DateGreaterThanEquals: at or after", when("DateGreaterThanEquals", "2026-01-01T00:00:00Z", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:00Z"), ask(currenttime="2025-12-31T23:59:59Z")),
    (OPERATORS, "dates may be seconds since the epoch", when("DateGreaterThan", "1767225600", "aws:CurrentTime"), ask(currenttime="2026-01-01T00:00:01Z"), ask(currenttime="2026-01-01T00:00:00Z")),
    (OPERATORS, "a date has a zone", when("DateLessThan", "2026-01-01T01:00:00+01:00", "aws:CurrentTime"), ask(currenttime="2025-12-31T23:59:59Z"), ask(currenttime="2026-01-01T00:00:00Z")),
    # ---- booleans, addresses, ARNs ----
    (OPERATORS, "Bool", when("Bool", "true", "aws:SecureTransport"), ask(securetransport="true"), ask(securetransport="false")),
    (OPERATORS, "Bool: JSON's own too", when("Bool", False, "aws:SecureTransport"), ask(securetransport="false"), ask(securetransport="true")),
    (OPERATORS, "IpAddress: a CIDR range", when("IpAddress", "203.0.113.0/24", "aws:SourceIp"), ask(sourceip="203.0.113.9"), ask(sourceip="203.0.114.9")),
    (OPERATORS, "IpAddress: without a prefix it is one address", when("IpAddress", "203.0.113.9", "aws:SourceIp"), ask(sourceip="203.0.113.9"), ask(sourceip="203.0.113.8")),
    (OPERATORS, "IpAddress: IPv6", when("IpAddress", "2001:db8::/32", "aws:SourceIp"), ask(sourceip="2001:db8::9"), ask(sourceip="203.0.113.9")),
    (OPERATORS, "NotIpAddress: all but the range", when("NotIpAddress", "203.0.113.0/24", "aws:SourceIp"), ask(sourceip="203.0.114.9"), ask(sourceip="203.0.113.9")),
    (OPERATORS, "ArnEquals and ArnLike are the same: wildcards in both", when("ArnEquals", "arn:aws:iam::*:user/a*", "aws:PrincipalArn"), ask(principalarn="arn:aws:iam::1:user/ann"), ask(principalarn="arn:aws:iam::1:user/bob")),
    (OPERATORS, "ArnLike: each of six parts by itself", when("ArnLike", "arn:aws:iam::*:user/ann", "aws:PrincipalArn"), ask(principalarn="arn:aws:iam::1:user/ann"), ask(principalarn="arn:aws:iam::1:x:user/ann")),
    (OPERATORS, "ArnNotEquals: negated", when("ArnNotEquals", "arn:aws:iam::1:user/ann", "aws:PrincipalArn"), ask(principalarn="arn:aws:iam::1:user/bob"), ask(principalarn="arn:aws:iam::1:user/ann")),
    (OPERATORS, "ArnNotLike: negated", when("ArnNotLike", "arn:aws:iam::*:user/a*", "aws:PrincipalArn"), ask(principalarn="arn:aws:iam::1:user/bob"), ask(principalarn="arn:aws:iam::1:user/ann")),
    # ---- keys that are not there ----
    (OPERATORS, "a key that is not there does not match", when("StringEquals", "Go"), agent("Go"), Ask()),
    (OPERATORS, "… and is not matched by what must not match", when("StringNotEquals", "Go"), Ask(), agent("Go")),
    (OPERATORS, "… nor by NotIpAddress", when("NotIpAddress", "10.0.0.0/8", "aws:SourceIp"), Ask(), ask(sourceip="10.0.0.1")),
    (OPERATORS, "IfExists: true where the key is not there", when("StringLikeIfExists", "G*"), Ask(), agent("x")),
    (OPERATORS, "IfExists: evaluated where it is", when("NumericLessThanIfExists", 5, "aws:EpochTime"), ask(epochtime="4"), ask(epochtime="5")),
    (OPERATORS, "IfExists goes with set operators", when("ForAnyValue:StringEqualsIfExists", "a", "aws:TagKeys"), Ask(), tags("b")),
    (OPERATORS, "Null true: the key is not there", when("Null", "true", "aws:TokenIssueTime"), Ask(), ask(tokenissuetime="2026-01-01T00:00:00Z")),
    (OPERATORS, "Null false: it is, with a value", when("Null", False, "aws:TokenIssueTime"), ask(tokenissuetime="2026-01-01T00:00:00Z"), Ask()),
    (CONDITION, "Null: several values are alternatives, as everywhere", one(Condition={"Null": {"aws:TokenIssueTime": ["true", "false"]}, "StringEquals": {"aws:UserAgent": "Go"}}), agent("Go"), Ask()),
    # ---- several conditions, several values ----
    (CONDITION, "several operators: all of them", one(Condition={"StringLike": {"aws:UserAgent": "G*"}, "Bool": {"aws:SecureTransport": "true"}}), ask(useragent="Go", securetransport="true"), ask(useragent="Go", securetransport="false")),
    (CONDITION, "several keys of one operator: all of them", one(Condition={"StringEquals": {"aws:UserAgent": "Go", "aws:username": "ann"}}), ask(useragent="Go", username="ann"), ask(useragent="Go", username="bob")),
    (CONDITION, "several values of a key: one of them", when("StringEquals", ["a", "b"]), agent("b"), agent("c")),
    (CONDITION, "several values of a negated operator: none of them", when("StringNotEquals", ["a", "b"]), agent("c"), agent("b")),
    (CONDITION, "names of keys fold case", when("StringEquals", "Go", "AWS:USERAGENT"), agent("Go"), agent("go")),
    # ---- set operators ----
    (SETS, "ForAllValues: each of the request's is one of the policy's", when("ForAllValues:StringEquals", ["a", "b"], "aws:TagKeys"), tags("b", "a"), tags("a", "c")),
    (SETS, "ForAllValues: true for none", when("ForAllValues:StringEquals", ["a"], "aws:TagKeys"), Ask(), tags("b")),
    (SETS, "ForAllValues: true for an empty text, which is an empty set", when("ForAllValues:StringEquals", ["a"], "aws:TagKeys"), tags(""), tags("b")),
    (SETS, "ForAnyValue: one of the request's is one of the policy's", when("ForAnyValue:StringEquals", ["a", "b"], "aws:TagKeys"), tags("c", "b"), tags("c")),
    (SETS, "ForAnyValue: false for none", when("ForAnyValue:StringEquals", ["a"], "aws:TagKeys"), tags("a"), Ask()),
    (SETS, "ForAnyValue: false for none, of a negated operator too", when("ForAnyValue:StringNotEquals", ["a"], "aws:TagKeys"), tags("b"), Ask()),
    (SETS, "ForAnyValue: false for an empty text", when("ForAnyValue:StringLike", "*", "aws:TagKeys"), tags("a"), tags("")),
    (SETS, "ForAnyValue, negated: one that is none of them", when("ForAnyValue:StringNotEquals", ["a", "b"], "aws:TagKeys"), tags("a", "c"), tags("a", "b")),
    (SETS, "ForAllValues, negated: none is one of them", when("ForAllValues:StringNotEquals", ["a", "b"], "aws:TagKeys"), tags("c", "d"), tags("c", "a")),
    # ---- tags ----
    (TAGS, "a tag's name in a key folds case", when("StringEquals", "blue", "aws:ResourceTag/Team"), ask(resourcetag__team="blue"), ask(resourcetag__team="Blue")),
    (TAGS, "two that differ by case only match neither", when("StringEquals", "blue", "aws:ResourceTag/Team"), ask(resourcetag__team=["blue"]), ask(resourcetag__team=["blue", "red"])),
    # ---- variables ----
    (VARIABLES, "a variable in a resource's last part", one(Resource="arn:aws:lambda:*:*:microvm-image:${aws:username}"), Ask({"aws:username": ["app"]}), Ask({"aws:username": ["other"]})),
    (VARIABLES, "… by a name that folds case", one(Resource="arn:aws:lambda:*:*:microvm-image:${AWS:UserName}"), Ask({"aws:username": ["app"]}), Ask()),
    (VARIABLES, "in string operators", when("StringLike", "${aws:username}-*"), ask(useragent="ann-x", username="ann"), ask(useragent="bob-x", username="ann")),
    (VARIABLES, "in ARN operators", when("ArnLike", "arn:aws:iam::1:user/${aws:username}", "aws:PrincipalArn"), ask(principalarn="arn:aws:iam::1:user/ann", username="ann"), ask(principalarn="arn:aws:iam::1:user/ann", username="bob")),
    (VARIABLES, "not in Bool", when("BoolIfExists", "${aws:SecureTransport}", "aws:SecureTransport"), Ask(), ask(securetransport="true")),
    (VARIABLES, "not in Numeric", when("NumericEqualsIfExists", "${aws:EpochTime}", "aws:EpochTime"), Ask(), ask(epochtime="5")),
    (VARIABLES, "not in Date", when("DateEqualsIfExists", "${aws:CurrentTime}", "aws:CurrentTime"), Ask(), ask(currenttime="2026-01-01T00:00:00Z")),
    (VARIABLES, "not in IpAddress", when("IpAddressIfExists", "${aws:SourceIp}", "aws:SourceIp"), Ask(), ask(sourceip="10.0.0.1")),
    (VARIABLES, "a tag's value", one(Resource="arn:aws:lambda:*:*:microvm-image:${aws:ResourceTag/Name}"), ask(resourcetag__name="app"), ask(resourcetag__name="other")),
    (VARIABLES, "a default, where there is no value", one(Resource="arn:aws:lambda:*:*:microvm-image:${aws:username, 'app'}"), Ask(), Ask({"aws:username": ["ann"]})),
    (VARIABLES, "no value and no default: the statement is none, whatever else it names", one(Resource=["arn:aws:lambda:*:*:microvm-image:${aws:username}", "*"]), Ask({"aws:username": ["ann"]}), Ask()),
    (VARIABLES, "… of a negated operator too", when("StringNotEquals", "${aws:username}"), ask(useragent="x", username="ann"), ask(useragent="x")),
    (VARIABLES, "… and of NotResource", {"Effect": "Allow", "Action": "*", "NotResource": "arn:aws:lambda:*:*:microvm-image:${aws:username}"}, Ask({"aws:username": ["ann"]}), Ask()),
    (VARIABLES, "${*} is a star", when("StringLike", "a${*}"), agent("a*"), agent("ab")),
    (VARIABLES, "${?} is a question mark", when("StringLike", "a${?}"), agent("a?"), agent("ab")),
    (VARIABLES, "${$} is a dollar sign", when("StringLike", "a${$}*"), agent("a$b"), agent("ab")),
    (VARIABLES, "a value's own wildcards are none", when("StringLike", "${aws:username}"), ask(useragent="a*", username="a*"), ask(useragent="ab", username="a*")),
    # ---- actions and resources ----
    (ACTION, "names of actions fold case", one(Action="LAMBDA:getMICROVM"), Ask(), Ask(action="lambda:GetMicrovms")),
    (ACTION, "wildcards anywhere in a name", one(Action="lambda:*Micro?m"), Ask(), Ask(action="lambda:GetMicrovmImage")),
    (ACTION, "a list: one of them", one(Action=["lambda:RunMicrovm", "lambda:Get*"]), Ask(), Ask(action="lambda:ListMicrovms")),
    ("elements_notaction", "all but these", {"Effect": "Allow", "NotAction": ["lambda:Run*", "iam:*"], "Resource": "*"}, Ask(), Ask(action="iam:PassRole")),
    (RESOURCE, "case counts", one(Resource=ARN), Ask(), Ask(resource=ARN.replace("app", "App"))),
    (RESOURCE, "a wildcard stays in its part", one(Resource="arn:aws:lambda:us-*-1:123456789012:microvm-image:app"), Ask(), Ask(resource="arn:aws:lambda:us-x:y-1:123456789012:microvm-image:app")),
    (RESOURCE, "… but for a star at a part's end", one(Resource="arn:aws:lambda:*"), Ask(), Ask(resource="arn:aws:iam::1:role/x")),
    (RESOURCE, "? for one character", one(Resource=ARN[:-1] + "?"), Ask(), Ask(resource=ARN[:-1])),
    ("elements_notresource", "all but these", {"Effect": "Allow", "Action": "*", "NotResource": [ARN + "*", "arn:aws:iam::1:role/x"]}, Ask(resource=ARN[:-3] + "other"), Ask(resource=ARN + "2")),
    # ---- the decision ----
    (LOGIC, "what nothing allows is denied", [one(Action="lambda:Get*")], Ask(), Ask(action="lambda:RunMicrovm")),
    (LOGIC, "an explicit deny wins, before", [one(Effect="Deny", Action="lambda:Run*"), one()], Ask(), Ask(action="lambda:RunMicrovm")),
    (LOGIC, "… and behind an allow", [one(), one(Effect="Deny", Action="lambda:Run*")], Ask(), Ask(action="lambda:RunMicrovm")),
    (LOGIC, "a deny whose condition does not hold denies nothing", [one(), one(Effect="Deny", Condition={"Bool": {"aws:SecureTransport": "false"}})], ask(securetransport="true"), ask(securetransport="false")),
    (LOGIC, "a deny with NotAction: all but these", [one(), {"Effect": "Deny", "NotAction": "lambda:Get*", "Resource": "*"}], Ask(), Ask(action="lambda:RunMicrovm")),
    (LOGIC, "a deny with NotResource: all but these", [one(), {"Effect": "Deny", "Action": "*", "NotResource": ARN}], Ask(), Ask(resource=ARN + "2")),
    (LOGIC, "a deny whose key is not there: not matched, so not denied", [one(), one(Effect="Deny", Condition={"StringEquals": {"aws:username": "ann"}})], Ask(), ask(username="ann")),
    (LOGIC, "a deny of what is not so: denied where the key is not there", [one(), one(Effect="Deny", Condition={"StringNotEquals": {"aws:username": "ann"}})], ask(username="ann"), Ask()),
]  # fmt: skip


@pytest.mark.parametrize(("page", "says", "statement", "allowed", "refused"), ROWS, ids=[f"{page}: {says}" for page, says, *_ in ROWS])
def test_what_the_documentation_says(page: str, says: str, statement: Any, allowed: Ask, refused: Ask) -> None:
    assert decide(statement, allowed) is Decision.ALLOW
    assert decide(statement, refused) is not Decision.ALLOW


def test_every_operator_has_a_row() -> None:
    named = {
        operator.rpartition(":")[2].removesuffix("IfExists")
        for _, _, statement, *_ in ROWS
        for one in (statement if isinstance(statement, list) else [statement])
        for operator in one.get("Condition", {})
    }
    assert named == set(language._OPERATORS) | set(language._NEGATED) | {"Null"}


@pytest.mark.parametrize(("version", "is_variable"), [("2012-10-17", True), ("2008-10-17", False), (None, False)])
def test_variables_are_text_before_their_version(version: str | None, is_variable: bool) -> None:
    """elements_version: without the element it is 2008-10-17, where ${aws:username} is these characters."""
    rule = when("StringEquals", "${aws:username}")
    assert (decide(rule, ask(useragent="ann", username="ann"), version) is Decision.ALLOW) is is_variable
    assert (decide(rule, ask(useragent="${aws:username}", username="ann"), version) is Decision.ALLOW) is not is_variable


def test_a_key_with_several_values_restricts_also_without_a_quantifier() -> None:
    """multi-value-conditions has no answer for this; ours is the one that lets less through. A caller who sends a second tag beside the one
    that is denied is denied."""
    denies = [one(), one(Effect="Deny", Condition={"StringEquals": {"aws:TagKeys": "admin"}})]
    assert decide(denies, tags("other", "admin")) is Decision.EXPLICIT_DENY
    assert decide(denies, tags("other", "others")) is Decision.ALLOW
    allows = when("StringEquals", "mine", "aws:TagKeys")
    assert decide(allows, tags("mine", "admin")) is Decision.IMPLICIT_DENY and decide(allows, tags("mine")) is Decision.ALLOW


def test_a_variable_without_a_value_leaves_a_deny_as_it_is_written() -> None:
    """variables: a statement "might be invalid"; a Deny that is not so denies more."""
    assert (
        decide([one(), one(Effect="Deny", Condition={"StringNotEquals": {"aws:UserAgent": "${aws:username}"}})], agent("x"))
        is Decision.EXPLICIT_DENY
    )
    assert decide([one(), one(Effect="Deny", Resource="arn:aws:lambda:*:*:microvm-image:${aws:username}")], Ask()) is Decision.ALLOW


# ---- what is no policy, or cannot be judged ----


@pytest.mark.parametrize(
    ("page", "statement", "text"),
    [
        (OPERATORS, when("NullIfExists", "true"), "operator NullIfExists is not known"), (OPERATORS, when("BinaryEquals", "QQ=="), "BinaryEquals is not known"),
        (OPERATORS, when("ForEach:StringEquals", "a"), "is not known"), (OPERATORS, when("Null", "perhaps"), "no value for Null"),
        (OPERATORS, when("NumericEquals", "nan", "aws:EpochTime"), "no value"), (OPERATORS, when("NumericEquals", "1e3", "aws:EpochTime"), "no value"),
        (OPERATORS, when("ArnLike", "*", "aws:PrincipalArn"), "no value for ArnLike"), (OPERATORS, when("IpAddress", "10.0.0.0/33", "aws:SourceIp"), "no value"),
        (VARIABLES, when("Bool", "${aws:SecureTransport}", "aws:SecureTransport"), "no value for Bool"),
        (VARIABLES, when("DateLessThan", "${aws:CurrentTime}", "aws:CurrentTime"), "no value for DateLessThan"),
        (VARIABLES, when("IpAddress", "${aws:SourceIp}", "aws:SourceIp"), "no value for IpAddress"),
        (VARIABLES, one(Resource="arn:aws:lambda:*:${aws:PrincipalAccount}:microvm-image:x"), "behind an ARN's fifth colon"),
        (VARIABLES, one(Resource="arn:aws:lambda:*:*:microvm-image:${aws:usernam}"), "the variable aws:usernam is not evaluated"),
        (VARIABLES, one(Resource="arn:aws:lambda:*:*:microvm-image:${aws:username"), "does not end"),
        (VARIABLES, when("StringEquals", "${aws:PrincipalTag/team}"), "the variable aws:PrincipalTag/team is not evaluated"),
        (SETS, when("StringEquals", "a", "aws:TagKeys"), "several values: ask with ForAllValues or ForAnyValue"),
        (CONDITION, when("StringEquals", "a", "aws:PrincipalOrgID"), "aws:principalorgid is not evaluated"), (CONDITION, when("StringEquals", "a", "aws:RequestTag/"), "not evaluated"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused(page: str, statement: Any, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        check({"Version": "2012-10-17", "Statement": [statement]}, CONDITION_KEYS)


def test_documents_that_are_none() -> None:
    with pytest.raises(PolicyError, match="variables are text without Version"):
        check({"Statement": [when("StringEquals", "${aws:username}")]}, CONDITION_KEYS)
    with pytest.raises(PolicyError, match="has a Statement"):
        check({}, CONDITION_KEYS)


def test_every_row_that_may_be_given_is_taken() -> None:
    """The rows above are policies as somebody may give them, but for those whose sentence is that it is none."""
    unsaid = ("not in Bool", "not in Numeric", "not in Date", "not in IpAddress")
    for _, says, statement, *_ in ROWS:
        if says not in unsaid:
            check({"Version": "2012-10-17", "Statement": statement}, CONDITION_KEYS)


# ---- keys ----


def test_the_keys_that_may_be_asked_about_are_those_of_requests() -> None:
    caller = Caller("1", "arn:aws:iam::1:user/ann", "IAMUser", "AKIA", Policy(), "10.0.0.1", "Go", True, "us-east-1", 1.8e9, 1.7e9)
    brought = set(caller.context()) | set(_request_context({"tags": {}}))
    assert all(caller.context().values()), "each has a value in such a request"
    assert brought < CONDITION_KEYS
    assert CONDITION_KEYS - brought == {"iam:passedtoservice", "aws:multifactorauthpresent", "aws:multifactorauthage"}


def test_what_a_request_does_not_have_is_no_empty_text() -> None:
    context = Caller("1", "arn:aws:iam::1:root", "Root", "AKIA", Policy()).context()
    assert [name for name in ("aws:useragent", "aws:sourceip", "aws:username", "aws:tokenissuetime") if context[name]] == []


def test_a_session_is_its_role_to_policies() -> None:
    """condition-keys, aws:PrincipalArn: of a role's session it is the role's ARN."""
    caller = Caller("1", "arn:aws:sts::1:assumed-role/r/me", "AssumedRole", "ASIA", Policy(), role="arn:aws:iam::1:role/r")
    assert caller.context()["aws:principalarn"] == ["arn:aws:iam::1:role/r"]


def test_tags_that_differ_by_case_are_one_key() -> None:
    assert _request_context({"tags": {"Team": "blue", "team": "red", "b": "c"}}) == {
        "aws:tagkeys": ["Team", "team", "b"], "aws:requesttag/team": ["blue", "red"], "aws:requesttag/b": ["c"],
    }  # fmt: skip


# ---- session policies ----


@pytest.mark.parametrize(
    ("role", "session", "decision"),
    [
        ([one()], [one(Action="lambda:Get*")], Decision.ALLOW), ([one(Action="lambda:Get*")], [one()], Decision.ALLOW),
        ([one(Action="lambda:Run*")], [one()], Decision.IMPLICIT_DENY), ([one()], [one(Action="lambda:Run*")], Decision.IMPLICIT_DENY),
        ([one()], [one(), one(Effect="Deny", Action="lambda:Get*")], Decision.EXPLICIT_DENY),
        ([one(), one(Effect="Deny", Action="lambda:Get*")], [one()], Decision.EXPLICIT_DENY), ([], [one()], Decision.IMPLICIT_DENY), ([one()], [], Decision.IMPLICIT_DENY),
    ],
)  # fmt: skip
def test_a_session_may_what_both_policies_allow(role: Any, session: Any, decision: Decision) -> None:
    """evaluation-logic: the intersection of the role's and the session's; a deny of either wins."""
    narrow = Policy(parse({"Statement": role}).statements, within=parse({"Statement": session}))
    assert narrow.decide("lambda:GetMicrovm", ARN, {}) is decision


def test_sts_narrows_credentials_by_the_policy_that_it_is_given(tmp_path: Path) -> None:
    """With AssumeRole's Policy they list and do not run; without, the same role's run. What is no policy, or too long, gives none."""
    api = ApiRig(tmp_path)
    role = f"arn:aws:iam::{ACCOUNT}:role/narrow"
    api.image("app")
    api.do(api.accounts.put_role(role, {"Version": "2012-10-17", "Statement": [one()]}))
    sts = api.client("sts")

    def key(**more: str) -> tuple[str, ...]:
        made = sts.assume_role(RoleArn=role, RoleSessionName="me", **more)["Credentials"]
        return made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"]

    narrow = key(Policy=json.dumps({"Version": "2012-10-17", "Statement": [one(Action="lambda:List*")]}))
    run = {"imageIdentifier": image_arn("app")}
    assert api.call("GET", "/2025-09-09/microvms", key=narrow)[0] == 200
    assert api.call("POST", "/2025-09-09/microvms", run, key=narrow)[1] == "AccessDeniedException"
    assert api.call("POST", "/2025-09-09/microvms", run, key=key())[0] == 200
    for policy, code in (
        ("{", "MalformedPolicyDocument"), ("[]", "MalformedPolicyDocument"), ("{}", "MalformedPolicyDocument"),
        (json.dumps({"Statement": [when("StringEquals", "x", "aws:PrincipalOrgID")]}), "MalformedPolicyDocument"), (" " * 2049, "ValidationError"),
    ):  # fmt: skip
        with pytest.raises(ClientError) as refused:
            key(Policy=policy)
        assert refused.value.response["Error"]["Code"] == code, policy[:40]
    api.close()


# ---- who gives both the policy and what it is about ----


@pytest.mark.parametrize("wall", [True, False])
def test_a_pattern_of_a_strangers_holds_nobody_up(wall: bool) -> None:
    """A session's policy is its caller's, and so is the text: with a matcher that tries again, this takes longer than anybody waits."""
    pattern, text = "*a" * 200 + "*b", "a" * (8000 if wall else 300)
    work = (
        "from gateway.accounts.policy import parse; import sys; p, t = sys.argv[1:]; "
        "print(parse({'Statement': {'Effect': 'Allow', 'Action': '*', 'Resource': '*', 'Condition': {'StringLike': {'aws:UserAgent': p}}}})"
        ".decide('a:b', '*', {'aws:useragent': [t]}).value)"
        if wall
        else "import re, sys; p, t = sys.argv[1:]; print(re.fullmatch(p.replace('*', '.*'), t))"
    )
    command = [sys.executable, "-c", work, pattern, text]
    if wall:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[2])
        assert done.stdout == "implicit\n"
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=3, check=False)


_TEXTS = st.text("ab:*?", max_size=8)


@given(_TEXTS, st.text("ab:", max_size=10))
def test_a_glob_matches_as_its_expression_does(pattern: str, text: str) -> None:
    for one, many, any_char in ((ONE, MANY, "."), (ONE_IN_PART, MANY_IN_PART, "[^:]")):
        expression = "".join(f"{any_char}*" if char == "*" else any_char if char == "?" else re.escape(char) for char in pattern)
        assert Glob(elements(pattern, one, many)).match(text) == bool(re.fullmatch(expression, text))


@given(_TEXTS, _TEXTS, st.text("ab:", max_size=10))
def test_a_glob_of_both_kinds_matches_as_its_expression_does(first: str, second: str, text: str) -> None:
    found = [*elements(first), *elements(second, ONE_IN_PART, MANY_IN_PART)]
    expression = "".join({ONE: ".", MANY: ".*", ONE_IN_PART: "[^:]", MANY_IN_PART: "[^:]*"}.get(one, re.escape(one)) for one in found)
    assert Glob(found).match(text) == bool(re.fullmatch(expression, text))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["Version", "Statement", "Effect", "Action", "Resource", "Condition", "StringEquals", "DateLessThan", "aws:CurrentTime", "x"]), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_any_document_is_checked_or_refused(document: Any) -> None:
    with contextlib.suppress(PolicyError):
        check(document, CONDITION_KEYS)


@pytest.mark.parametrize("value", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "9" * 400, "\u0663"])
def test_dates_at_the_ends_of_time_are_dates_or_none(value: str) -> None:
    rule = when("DateLessThan", value, "aws:CurrentTime")
    assert decide(rule, ask(currenttime="2026-01-01T00:00:00Z")) in (Decision.ALLOW, Decision.IMPLICIT_DENY)
    try:
        check({"Version": "2012-10-17", "Statement": [rule]}, CONDITION_KEYS)
    except PolicyError as error:
        assert "no value" in str(error)
