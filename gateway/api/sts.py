"""AWS STS, the two calls that clients of this API make: GetCallerIdentity and AssumeRole (STS 2011-06-15, query protocol)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from gateway.accounts.directory import Credentials, Directory
from gateway.accounts.model import Caller
from gateway.accounts.policy import Decision, PolicyError

from .errors import AccessDenied, ApiError, Validation

VERSION = "2011-06-15"
_NAMESPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):role/[\w+=,.@/-]{1,512}", re.A)
_NAME = re.compile(r"[\w+=,.@-]{2,64}", re.A)
_SECONDS = re.compile(r"[0-9]{1,6}")
# What narrows or guards the credentials at STS and is not evaluated here: ignoring it would give more than was asked for.
_UNSERVED = ("PolicyArns", "SerialNumber", "TokenCode", "ProvidedContexts", "Tags", "TransitiveTagKeys", "SourceIdentity")
_POLICY_CHARACTERS = 2048
_SHORTEST, _LONGEST = 900, 43_200
_CHAINED = 3600  # IAM User Guide, "Roles terms and concepts", role chaining


class InvalidAction(ApiError):
    kind, status = "InvalidAction", 400


class MalformedPolicy(ApiError):
    kind, status = "MalformedPolicyDocument", 400


@dataclass(frozen=True)
class Answer:
    action: str
    xml: str


class Sts:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def answer(self, caller: Caller, body: bytes) -> Answer:
        """Raises ApiError."""
        form = {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).items()}
        action = form.get("Action", "")
        if action == "GetCallerIdentity":
            return self._identity(caller)
        if action == "AssumeRole":
            return self._assume(caller, form)
        raise InvalidAction(f"Could not find operation {action[:64]} for version {VERSION}")

    def _identity(self, caller: Caller) -> Answer:
        user = caller.access_key if caller.kind != "Root" else caller.account
        return Answer("GetCallerIdentity", _tags(Arn=caller.arn, UserId=user, Account=caller.account))

    def _assume(self, caller: Caller, form: dict[str, str]) -> Answer:
        role, name, seconds = form.get("RoleArn", ""), form.get("RoleSessionName", ""), form.get("DurationSeconds", "3600")
        match = _ROLE.fullmatch(role)
        unserved = sorted({one.split(".")[0] for one in form} & set(_UNSERVED))
        if unserved:
            raise Validation(f"{', '.join(unserved)} is not served here: of what narrows credentials, Policy is.")
        if match is None or not _NAME.fullmatch(name) or not _SECONDS.fullmatch(seconds) or not _SHORTEST <= int(seconds) <= _LONGEST:
            raise Validation(f"RoleArn, RoleSessionName or DurationSeconds ({_SHORTEST} to {_LONGEST}) is not valid.")
        allowed = caller.policy.decide("sts:AssumeRole", role, caller.context()) is Decision.ALLOW
        if not allowed or match[1] != caller.account:
            raise AccessDenied(f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {role}")
        if caller.kind == "AssumedRole" and int(seconds) > _CHAINED:
            raise Validation(f"The requested DurationSeconds exceeds the {_CHAINED} seconds of roles that a role's session assumes.")
        narrower = form.get("Policy", "")
        if len(narrower) > _POLICY_CHARACTERS or ("Policy" in form and not narrower):
            raise Validation(f"Policy has 1 to {_POLICY_CHARACTERS} characters.")
        try:
            made = self._directory.issue(role, name, int(seconds), narrower)
        except PolicyError as error:
            raise MalformedPolicy(str(error)) from error
        assumed = f"arn:aws:sts::{caller.account}:assumed-role/{role.rpartition('/')[2]}/{name}"
        user = f"<AssumedRoleUser>{_tags(AssumedRoleId=f'{made.access_key}:{name}', Arn=assumed)}</AssumedRoleUser>"
        return Answer("AssumeRole", _credentials(made) + user)


def _credentials(made: Credentials) -> str:
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made.expires_at))
    inside = _tags(AccessKeyId=made.access_key, SecretAccessKey=made.secret, SessionToken=made.token, Expiration=expires)
    return f"<Credentials>{inside}</Credentials>"


def _tags(**values: str) -> str:
    return "".join(f"<{name}>{escape(value)}</{name}>" for name, value in values.items())


def document(answer: Answer, request_id: str) -> str:
    return (
        f'<{answer.action}Response xmlns="{_NAMESPACE}"><{answer.action}Result>{answer.xml}</{answer.action}Result>'
        f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{answer.action}Response>"
    )


def failure(error: ApiError, request_id: str) -> str:
    kind = {"AccessDeniedException": "AccessDenied", "ValidationException": "ValidationError"}.get(error.kind, error.kind)
    inside = _tags(Type="Sender", Code=kind, Message=str(error))
    return f'<ErrorResponse xmlns="{_NAMESPACE}"><Error>{inside}</Error><RequestId>{request_id}</RequestId></ErrorResponse>'
