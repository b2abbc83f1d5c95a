"""What is stored about accounts, and who a call comes from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from .policy import TAG_KEYS, Policy

PASSED_TO = "iam:passedtoservice"
ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


class Account(msgspec.Struct):
    """`id` is twelve digits."""

    id: str
    name: str
    created_at: float


class AccessKey(msgspec.Struct):
    """A user's key. `policy` is the user's, as IAM's JSON; without one nothing is allowed."""

    id: str
    secret: str
    account: str
    user: str
    created_at: float
    policy: dict[str, Any] | None = None


class Role(msgspec.Struct):
    """What a microVM with this role may ask of our own API. A role that is not stored may be passed and allows nothing."""

    arn: str
    policy: dict[str, Any]


@dataclass(frozen=True)
class Caller:
    """A verified request's principal (CloudTrail's userIdentity): `kind` is Root, IAMUser or AssumedRole."""

    account: str
    arn: str
    kind: str
    access_key: str
    policy: Policy
    source: str = ""
    user_agent: str = ""
    secure: bool = False
    region: str = ""
    at: float = 0.0  # of the request
    issued_at: float = 0.0  # of temporary credentials
    role: str = ""  # whose they are

    @property
    def name(self) -> str:
        return self.arn.rpartition("/")[2] if "/" in self.arn else self.account

    def context(self) -> dict[str, list[str]]:
        """Returns the global condition keys that a request brings (IAM User Guide: AWS global condition context keys)."""
        return {
            "aws:sourceip": [self.source] if self.source else [],
            "aws:securetransport": ["true" if self.secure else "false"],
            "aws:principalarn": [self.role or self.arn],  # of a session its role's
            "aws:principalaccount": [self.account],
            "aws:principaltype": [{"Root": "Account", "IAMUser": "User"}.get(self.kind, self.kind)],
            "aws:username": [self.name] if self.kind == "IAMUser" else [],
            "aws:useragent": [self.user_agent] if self.user_agent else [],
            "aws:userid": [{"Root": self.account, "AssumedRole": f"{self.access_key}:{self.name}"}.get(self.kind, self.access_key)],
            "aws:requestedregion": [self.region] if self.region else [],
            "aws:currenttime": [_stamp(self.at)],
            "aws:epochtime": [str(int(self.at))],
            "aws:tokenissuetime": [_stamp(self.issued_at)] if self.issued_at else [],
            "aws:viaawsservice": ["false"],
        }


def _stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


# What a policy may ask about, beside tags: what a request brings (above, gateway/api/permissions.py), or would bring if there were such a
# thing here: nobody has a second factor, which policies ask about by its absence.
CONDITION_KEYS = frozenset(Caller("", "", "", "", Policy()).context()) | {
    TAG_KEYS, PASSED_TO, "aws:multifactorauthpresent", "aws:multifactorauthage",
}  # fmt: skip
