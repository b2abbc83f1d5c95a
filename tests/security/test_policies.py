"""The wall of a policy: what came with a request is a value and never a pattern, and what cannot be judged is no policy.

Each row is an attack on a policy as IAM's documentation reads it; the control is the caller whom the policy means.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.accounts.model import CONDITION_KEYS, Caller
from gateway.accounts.policy import Decision, Policy, PolicyError, check, parse
from gateway.api.errors import AccessDenied
from gateway.api.logs import Logs
from gateway.sessions.logs import LogStore

IMAGE = "arn:aws:lambda:us-east-1:123456789012:microvm-image:"


def statement(**more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": "*", "Resource": "*"} | more


def document(policy: Any) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": policy}


def allows(policy: dict[str, Any] | list[dict[str, Any]], resource: str = f"{IMAGE}app", **context: str | list[str]) -> bool:
    keys = {
        name.replace("__", ":").replace("_slash_", "/").lower(): [value] if isinstance(value, str) else value
        for name, value in context.items()
    }
    return parse(document(policy)).decide("lambda:RunMicrovm", resource, keys) is Decision.ALLOW


@pytest.mark.parametrize(
    ("resource", "context", "attack", "meant"),
    [
        (f"{IMAGE}${{*}}", {}, f"{IMAGE}app", f"{IMAGE}*"),
        (f"{IMAGE}a${{?}}c", {}, f"{IMAGE}abc", f"{IMAGE}a?c"),
        (f"{IMAGE}${{aws:RequestTag/project}}", {"aws__requesttag_slash_project": "*"}, f"{IMAGE}app", f"{IMAGE}*"),
        (f"{IMAGE}${{aws:username}}-*", {"aws__username": "*"}, f"{IMAGE}ann-app", f"{IMAGE}*-app"),
        ("arn:aws:lambda:us-*-1:123456789012:*", {}, "arn:aws:lambda:us-x:other-1:123456789012:y", "arn:aws:lambda:us-east-1:123456789012:y"),
        ("arn:aws:lambda:us-east-?:*", {}, "arn:aws:lambda:us-east-:x:y", "arn:aws:lambda:us-east-1:x:y"),
    ],
)  # fmt: skip
def test_what_is_no_wildcard_is_none(resource: str, context: dict[str, Any], attack: str, meant: str) -> None:
    assert not allows(statement(Resource=resource), attack, **context)
    assert allows(statement(Resource=resource), meant, **context)


def test_a_star_at_a_segments_end_passes_its_colon() -> None:
    """As the User Guide has it: "it can expand to match beyond the colon boundaries"."""
    assert allows(statement(Resource="arn:aws:lambda:*"), f"{IMAGE}app") and allows(
        statement(Resource="arn:aws:lambda:*:app"), f"{IMAGE}app"
    )


@pytest.mark.parametrize("operator", ["StringLike", "ArnLike", "ArnEquals"])
def test_a_callers_value_in_a_condition_is_no_pattern(operator: str) -> None:
    want = f"{IMAGE}${{aws:RequestTag/project}}"
    rule = statement(Condition={operator: {"aws:PrincipalArn": want}})
    assert not allows(rule, aws__principalarn=f"{IMAGE}app", aws__requesttag_slash_project="*")
    assert allows(rule, aws__principalarn=f"{IMAGE}app", aws__requesttag_slash_project="app")
    assert allows(statement(Condition={operator: {"aws:PrincipalArn": f"{IMAGE}*"}}), aws__principalarn=f"{IMAGE}app"), (
        "a policy's own star is one"
    )


def test_defaults_of_variables_deny() -> None:
    """They were literal text, and a Deny with one was inert."""
    rules = [statement(), statement(Effect="Deny", Resource=f"{IMAGE}${{aws:username, 'nobody'}}")]
    assert not allows(rules, f"{IMAGE}nobody")
    assert allows(rules, f"{IMAGE}nobody", aws__username="ann") and not allows(rules, f"{IMAGE}ann", aws__username="ann")


def caller(policy: list[dict[str, Any]], **more: Any) -> Caller:
    return Caller("123456789012", "arn:aws:iam::123456789012:user/ann", "IAMUser", "AKIA", parse(document(policy)), **more)


@pytest.mark.parametrize(
    "condition",
    [
        {"DateGreaterThan": {"aws:CurrentTime": "2000-01-01T00:00:00Z"}}, {"NumericGreaterThan": {"aws:EpochTime": "1"}},
        {"StringEquals": {"aws:RequestedRegion": "eu-west-1"}}, {"StringLike": {"aws:userid": "AKIA*"}},
        {"Bool": {"aws:ViaAWSService": "false"}}, {"StringEquals": {"aws:username": "ann"}}, {"DateGreaterThan": {"aws:TokenIssueTime": "2000-01-01"}},
    ],
)  # fmt: skip
def test_a_deny_by_what_every_request_has_denies(condition: dict[str, Any]) -> None:
    """Their keys were in no request, and a Deny by one never denied."""
    one = caller([statement(), statement(Effect="Deny", Condition=condition)], region="eu-west-1", at=1.8e9, issued_at=1.7e9)
    assert one.policy.decide("lambda:x", "*", one.context()) is Decision.EXPLICIT_DENY
    control = caller([statement(), statement(Effect="Deny", Condition={"StringEquals": {"aws:username": "bob"}})])
    assert control.policy.decide("lambda:x", "*", control.context()) is Decision.ALLOW


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ({"StringEquals": {"aws:PrincipalOrgID": "o-1"}}, "aws:principalorgid is not evaluated"), ({"StringEquals": {"aws:usernam": "x"}}, "not evaluated"),
        ({"NotIpAddress": {"aws:SourceIp": "10.0.0.0/33"}}, "no value for NotIpAddress"), ({"NumericLessThan": {"aws:EpochTime": "soon"}}, "no value"),
        ({"DateLessThan": {"aws:CurrentTime": "tomorrow"}}, "no value"), ({"Bool": {"aws:SecureTransport": "yes"}}, "no value"),
        ({"Null": {"aws:username": "maybe"}}, "no value"),
    ],
)  # fmt: skip
def test_what_is_not_evaluated_is_refused(condition: dict[str, Any], text: str) -> None:
    given = document([statement(Effect="Deny", Condition=condition)])
    with pytest.raises(PolicyError, match=text):
        check(given, CONDITION_KEYS)
    assert parse(given), "one that is stored since before is still read"


@pytest.mark.parametrize("effect", ["Allow", "Deny"])
@pytest.mark.parametrize("name", ["Resource", "NotResource"])
@pytest.mark.parametrize(
    "value",
    ["", "img", "*b*", "*b/x", "arn", "arn:aws", "arn:aws:s3:b", "arn:aws:lambda:us-east-1:1", " *", "ARN:aws:lambda:*:*:microvm-image:a", "arn:aws:s3:${aws:username}*"],
)  # fmt: skip
def test_what_is_no_resource_is_refused(effect: str, name: str, value: str) -> None:
    """A Deny of one never denies, and an Allow of all but one allows all. One of several is enough."""
    for values in (value, ["*", value]):
        given = document([{"Effect": effect, "Action": "*", name: values}])
        with pytest.raises(PolicyError, match="is no resource"):
            check(given, CONDITION_KEYS)
        assert parse(given).statements, "one that is stored since before is still read"


@pytest.mark.parametrize("name", ["Action", "NotAction"])
@pytest.mark.parametrize(
    "value", ["", ":", "lambda", "lambda:", ":RunMicrovm", "RunMicrovm", " lambda:Run*", "lambda:Run* ", "lambda:Run*\n", "lambda:Run:x", 5]
)
def test_what_is_no_action_is_refused(name: str, value: Any) -> None:
    for values in (value, ["*", value]):
        given = document([{"Effect": "Deny", name: values, "Resource": "*"}])
        with pytest.raises(PolicyError, match="is no action"):
            check(given, CONDITION_KEYS)
        assert parse(given).statements, "one that is stored since before is still read"


@pytest.mark.parametrize(
    "resource",
    ["*", "arn:*", "arn:aws:lambda:*", "arn:aws:lambda:us-*", "arn:aws:s3:::bucket/*", "arn:*:lambda:*:*:microvm-image:${aws:username}-*", "arn:aws:iam::1:role/x"],
)  # fmt: skip
@pytest.mark.parametrize("action", ["*", "lambda:*", "LAMBDA:get*", "lambda:???Microvm", "*:Get*", "iam:PassRole"])
def test_resources_and_actions_are_taken(resource: str, action: str) -> None:
    check(document([{"Effect": "Deny", "Action": action, "Resource": resource}]), CONDITION_KEYS)


def test_what_is_evaluated_is_taken() -> None:
    check(document([statement(Condition={
        "StringLikeIfExists": {"aws:ResourceTag/Team": ["b*", "${aws:username}"]}, "ForAllValues:StringEquals": {"aws:TagKeys": ["a"]},
        "IpAddress": {"aws:SourceIp": ["10.0.0.0/8", "::1"]}, "DateGreaterThan": {"aws:CurrentTime": "2026-01-01T00:00:00Z"},
        "Bool": {"aws:SecureTransport": "true"}, "Null": {"aws:TokenIssueTime": "false"}, "BoolIfExists": {"aws:MultiFactorAuthPresent": "false"},
    })]), CONDITION_KEYS)  # fmt: skip


# ---- one group, two spellings ----


@pytest.mark.parametrize("denied", ["/aws/lambda-microvms/x", "/aws/lambda/microvms/x"])
@pytest.mark.parametrize("asked", ["/aws/lambda-microvms/x", "/aws/lambda/microvms/x"])
def test_a_deny_of_a_group_holds_for_both_of_its_names(tmp_path: Path, denied: str, asked: str) -> None:
    """It was judged by the name that was asked for, before that became the group's."""
    store = LogStore(tmp_path)
    store.append("123456789012", "/aws/lambda-microvms/x", "s", ["secret"])
    logs = Logs(store, "us-east-1")
    logs_read = SimpleNamespace(run=lambda handler, *arguments: _now(handler(*arguments)))
    deny = statement(Effect="Deny", Action="logs:*", Resource=f"arn:aws:logs:us-east-1:123456789012:log-group:{denied}:*")
    for policy, is_open in ((parse({"Statement": [statement(), deny]}), False), (parse({"Statement": [statement()]}), True)):
        one = Caller("123456789012", "arn:aws:iam::123456789012:user/ann", "IAMUser", "AKIA", policy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gateway.api.logs._READS", logs_read)
            call = {"logGroupName": asked, "logStreamName": "s", "startFromHead": True}
            if is_open:
                found = asyncio.run(logs.answer(one, "GetLogEvents", call))
                assert [event["message"] for event in found["events"]] == ["secret"]
            else:
                with pytest.raises(AccessDenied):
                    asyncio.run(logs.answer(one, "GetLogEvents", call))


async def _now(value: Any) -> Any:
    return value


def test_nothing_is_allowed_by_no_policy() -> None:
    assert Policy().decide("lambda:x", "*", {}) is Decision.IMPLICIT_DENY
