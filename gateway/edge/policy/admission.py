"""Admission is a pure function of head, route, token and clock (service reference, 3.2 and 3.4).

The order of the checks is part of the contract. A refusal must not reveal what exists: an unknown host and another
session's token read the same; and nothing is looked up, and nothing wakes, before the token is verified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from gateway.messages import Route
from gateway.tokens import SHELL, Checker, Grant, MalformedToken, TokenError

from ..wire.http1_head import RequestHead, split_block

DEFAULT_PORT: Final = 8080
SHELL_PORT: Final = 0  # in place of a port: the microVM's shell
_PORT = re.compile(rb"[0-9]{1,5}\Z")
_WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==\Z")  # 16 bytes in base64

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
    """Refuses the request. `reason` is for the logs where the body, which the client sees, must not say it."""

    status: int
    body: bytes = b""
    reason: str = field(default="", compare=False)

    @property
    def why(self) -> str:
        return self.reason or self.body.decode("latin-1")


Decision = Forward | Hold | Lookup | Refuse
MISSING_TOKEN = Refuse(403, MISSING)
BAD_TOKEN = Refuse(403, FAILED)
NOT_RUNNING = Refuse(502, reason="the MicroVM is not running, and no request resumes it")
NO_TRACE = Refuse(501, b"TRACE with Max-Forwards: 0 is not answered here")


def check_token(head: RequestHead, checker: Checker, now: float) -> Grant | Refuse:
    """Returns the token's grant, or why there is none."""
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


def _check_shell(head: RequestHead) -> Refuse | None:
    """Checks a shell's handshake, which is answered by the edge and not by an application (RFC 6455, 4.2.1 and 4.4)."""
    if head.upgrade is None:
        return Refuse(502, reason="a shell needs a WebSocket upgrade")
    fields = dict(split_block(head.block))
    if fields.get(b"sec-websocket-version") != b"13":
        return Refuse(426, b"Sec-WebSocket-Version must be 13")
    if not _WEBSOCKET_KEY.match(fields.get(b"sec-websocket-key", b"")):
        return Refuse(400, b"Sec-WebSocket-Key must be 16 bytes in base64")
    return None


def admit(head: RequestHead, grant: Grant | Refuse, route: Route | None, is_known: bool, now: float) -> Decision:
    """Decides about a request. `is_known` says that `route` is final: None then means that the host names nothing."""
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
        return Refuse(403, PORT_DENIED)  # no ingress connector for this kind of traffic: unspecified by the service, our choice
    if grant.kind == SHELL:
        refusal = _check_shell(head)
        if refusal is not None:
            return refusal
    elif not grant.allows(port):
        return Refuse(403, PORT_DENIED)
    if head.max_forwards == 0:  # RFC 9110, 7.6.2: it goes no further than here
        return Refuse(200) if head.method == b"OPTIONS" else NO_TRACE
    return _by_gate(route, port)


def admit_again(session: str, port: int, route: Route | None) -> Decision:
    """Decides again about a request whose token was verified and allows the port (SHELL_PORT: a shell): only its route can have changed."""
    if route is None or route.session != session:
        return BAD_TOKEN
    if not (route.opens_shell if port == SHELL_PORT else route.opens_http):
        return Refuse(403, PORT_DENIED)
    return _by_gate(route, port)


def _by_gate(route: Route, port: int) -> Decision:
    if route.gate == "open":
        return Forward(port)
    return Hold(port) if route.gate == "hold" else NOT_RUNNING
