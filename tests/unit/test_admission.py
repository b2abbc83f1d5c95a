"""Who may pass: the table of service reference 3.4, and that nothing is revealed or woken before the token is verified."""

from __future__ import annotations

import pytest

from gateway.edge.policy.admission import SHELL_PORT, Forward, Hold, Lookup, Refuse, admit, check_token
from gateway.edge.wire.http1_head import RequestHead
from gateway.messages import Route
from gateway.tokens import Checker, Grant, MalformedToken, TokenError

NOW = 1000.0
GRANT = Grant("s1", ((80, 90), (8080, 8080)), NOW + 60, "proxy", "k")
ROUTE = Route("h", "s1", 1, "open")
MISSING, FAILED = Refuse(403, b"Request missing authentication"), Refuse(403, b"Token authentication failed")
DENIED = Refuse(403, b"Access to port denied")


def head(port: bytes | None = None) -> RequestHead:
    return RequestHead(b"GET", b"/", 1, "h", port=port, token="t")


@pytest.mark.parametrize(
    ("port", "grant", "route", "is_known", "decision"),
    [
        (None, GRANT, ROUTE, False, Forward(8080)),
        (b"85", GRANT, ROUTE, False, Forward(85)),
        (b"085", GRANT, ROUTE, False, Forward(85)),
        (b"91", GRANT, ROUTE, False, DENIED),
        (b"0", GRANT, ROUTE, False, Refuse(400, b"X-aws-proxy-port must be a number from 1 to 65535")),
        (b"65536", GRANT, ROUTE, False, Refuse(400, b"X-aws-proxy-port must be a number from 1 to 65535")),
        (b"8o", GRANT, ROUTE, False, Refuse(400, b"X-aws-proxy-port must be a number from 1 to 65535")),
        (None, GRANT, None, False, Lookup()),
        (None, GRANT, None, True, FAILED),
        (None, GRANT, Route("h", "", 0, "refuse"), True, FAILED),
        (None, GRANT, Route("h", "s2", 1, "open"), False, FAILED),
        (b"91", GRANT, Route("h", "s2", 1, "open"), False, FAILED),
        (None, GRANT, Route("h", "s1", 1, "hold"), False, Hold(8080)),
        (None, GRANT, Route("h", "s1", 1, "refuse"), False, Refuse(502)),
        (b"91", GRANT, Route("h", "s1", 1, "hold"), False, DENIED),
        (None, GRANT, Route("h", "s1", 1, "open", opens_http=False), False, DENIED),
        (None, GRANT, Route("h", "s1", 1, "hold", opens_http=False, opens_shell=False), False, DENIED),
        (None, GRANT, Route("h", "s1", 1, "open", opens_shell=False), False, Forward(8080)),
        (b"91", GRANT, Route("h", "s1", 1, "refuse"), False, DENIED),
        (None, Grant("s1", ((1, 65535),), NOW, "proxy", "k"), ROUTE, False, FAILED),
        (None, Grant("s1", ((1, 65535),), NOW + 1, "shell", "k"), ROUTE, False, Refuse(502)),
        (None, MISSING, None, False, MISSING),
    ],
)
def test_admit(port: bytes | None, grant: Grant | Refuse, route: Route | None, is_known: bool, decision: object) -> None:
    assert admit(head(port), grant, route, is_known, NOW) == decision


class Fixed(Checker):
    """Answers what it is told."""

    def __init__(self, answer: Grant | Exception) -> None:
        super().__init__([])
        self.answer = answer

    def verify(self, token: str, now: float) -> Grant:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(("answer", "decision"), [(GRANT, GRANT), (MalformedToken("x"), MISSING), (TokenError("x"), FAILED)])
def test_check_token(answer: Grant | Exception, decision: object) -> None:
    assert check_token(head(), Fixed(answer), NOW) == decision


def test_no_token() -> None:
    assert check_token(RequestHead(b"GET", b"/", 1, "h"), Fixed(GRANT), NOW) == MISSING
    assert check_token(RequestHead(b"GET", b"/", 1, "h", token=""), Fixed(GRANT), NOW) == MISSING


@pytest.mark.parametrize(("upgrade", "marker", "status"), [(None, True, 400), (b"websocket", False, 403), (b"websocket", True, None)])
def test_subprotocol_token_needs_an_upgrade_and_the_marker(upgrade: bytes | None, marker: bool, status: int | None) -> None:
    one = RequestHead(b"GET", b"/", 1, "h", token="t", subprotocol_auth=True, marker_offered=marker, upgrade=upgrade)
    decision = check_token(one, Fixed(GRANT), NOW)
    assert decision == GRANT if status is None else isinstance(decision, Refuse) and decision.status == status


KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


@pytest.mark.parametrize(
    ("upgrade", "version", "key", "decision"),
    [
        (b"websocket", b"13", KEY, Forward(SHELL_PORT)),
        (b"websocket", b"12", KEY, Refuse(426, b"Sec-WebSocket-Version must be 13")),
        (b"websocket", b"", KEY, Refuse(426, b"Sec-WebSocket-Version must be 13")),
        (b"websocket", b"13", b"", Refuse(400, b"Sec-WebSocket-Key must be 16 bytes in base64")),
        (b"websocket", b"13", b"c2hvcnQ=", Refuse(400, b"Sec-WebSocket-Key must be 16 bytes in base64")),
        (b"websocket", b"13", KEY[:-3] + b"!==", Refuse(400, b"Sec-WebSocket-Key must be 16 bytes in base64")),
        (None, b"13", KEY, Refuse(502)),
    ],
)
def test_a_shells_handshake_is_checked_before_its_shell_is_opened(
    upgrade: bytes | None, version: bytes, key: bytes, decision: object
) -> None:
    one = head()
    one.upgrade = upgrade
    one.block = b"\r\nSec-WebSocket-Version: " + version + b"\r\nSec-WebSocket-Key: " + key
    grant = Grant("s1", (), NOW + 60, "shell", "k")
    assert admit(one, grant, Route("h", "s1", 1, "open", opens_shell=True), True, NOW) == decision


@pytest.mark.parametrize(("method", "status"), [(b"OPTIONS", 200), (b"TRACE", 501)])
def test_a_request_without_hops_left_goes_no_further_and_wakes_nobody(method: bytes, status: int) -> None:
    one = head()
    one.method, one.max_forwards = method, 0
    for gate in ("open", "hold"):
        decision = admit(one, GRANT, Route("h", "s1", 1, gate), True, NOW)
        assert isinstance(decision, Refuse) and decision.status == status
    assert admit(one, FAILED, None, False, NOW) == FAILED
