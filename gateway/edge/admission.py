"""Who may pass: a pure function of head, route, token and clock (service reference, 3.2 and 3.4).

The order of the checks is part of the contract. A refusal must not reveal what exists: an unknown host and another
session's token read the same; and nothing is looked up, and nothing wakes, before the token is verified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from gateway.messages import Route
from gateway.tokens import SHELL, Checker, Grant, MalformedToken, TokenError

from .head import RequestHead

DEFAULT_PORT: Final = 8080
SHELL_PORT: Final = 0  # in place of a port: the microVM's shell
_PORT = re.compile(rb"[0-9]{1,5}\Z")

MISSING = b"Request missing authentication"
FAILED = b"Token authentication failed"
PORT_DENIED = b"Access to port denied"


@dataclass(frozen=True, slots=True)
class Forward:
    port: int


@dataclass(frozen=True, slots=True)
class Hold:
    """The session sleeps or is in transition: keep the request, have it resumed."""

    port: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """The token is good and the host unknown here: ask control, once, then decide."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """`reason` is for the logs where the body, which the client sees, must not say it."""

    status: int
    body: bytes = b""
    reason: str = field(default="", compare=False)

    @property
    def why(self) -> str:
        return self.reason or self.body.decode("latin-1")


Decision = Forward | Hold | Lookup | Refuse
MISSING_TOKEN = Refuse(403, MISSING)
BAD_TOKEN = Refuse(403, FAILED)


def check_token(head: RequestHead, checker: Checker, now: float) -> Grant | Refuse:
    """The token's grant, or why there is none."""
    if head.subprotocol_auth and head.upgrade is None:
        return Refuse(400, b"Subprotocol authentication needs a WebSocket upgrade")
    if head.subprotocol_auth and not head.marker_offered:
        return MISSING_TOKEN
    if not head.token:
        return MISSING_TOKEN
    try:
        return checker.verify(head.token, now)
    except MalformedToken:
        return MISSING_TOKEN
    except TokenError:
        return BAD_TOKEN


def check_port(head: RequestHead) -> int | Refuse:
    if head.port is None:
        return DEFAULT_PORT
    if not _PORT.match(head.port) or not 1 <= int(head.port) <= 65535:
        return Refuse(400, b"X-aws-proxy-port must be a number from 1 to 65535")
    return int(head.port)


def admit(head: RequestHead, grant: Grant | Refuse, route: Route | None, is_known: bool, now: float) -> Decision:
    """`is_known` says that `route` is final: None then means that the host names nothing."""
    if isinstance(grant, Refuse):
        return grant
    if grant.expires <= now:
        return BAD_TOKEN
    if route is None or not route.session:
        return BAD_TOKEN if is_known else Lookup()
    if grant.session != route.session:
        return BAD_TOKEN
    port = check_port(head) if grant.kind != SHELL else SHELL_PORT
    if isinstance(port, Refuse):
        return port
    if not (route.opens_shell if grant.kind == SHELL else route.opens_http):
        return Refuse(403, PORT_DENIED)  # our choice: its connectors leave this door shut
    if grant.kind == SHELL:
        if head.upgrade is None or head.upgrade.lower() != b"websocket":
            return Refuse(502, reason="a shell needs a WebSocket upgrade")
    elif not grant.allows(port):
        return Refuse(403, PORT_DENIED)
    if route.gate == "open":
        return Forward(port)
    return Hold(port) if route.gate == "hold" else Refuse(502, reason="the MicroVM is not running, and no request resumes it")
