"""Heads of HTTP/2 messages: what is malformed, what goes on, and that both protocols' readers come to the same head (RFC 9113, 8)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire import http2_frames as f
from gateway.edge.wire import http2_head
from gateway.edge.wire.http1_head import CHUNKED, FIXED, NO_BODY, Malformed, RequestHead, ResponseHead
from gateway.edge.wire.http1_head import parse_request as parse_http1

HOST = b"x.lambda-microvm.us-east-1.localhost"
PSEUDO = {b":method": b"GET", b":scheme": b"https", b":path": b"/", b":authority": HOST}
CONNECT = {b":method": b"CONNECT", b":protocol": b"websocket"}
Plain = list[tuple[bytes, bytes]]


def request(*fields: tuple[bytes, bytes], end: bool = True, pseudo: dict[bytes, bytes | None] | None = None) -> RequestHead:
    """`pseudo` replaces, adds or (None) removes pseudo-header fields."""
    special = [(name, value) for name, value in (PSEUDO | (pseudo or {})).items() if value is not None]
    return http2_head.parse_request([(name, value, False) for name, value in [*special, *fields]], end, 200)


def lines(head: RequestHead) -> list[bytes]:
    return head.block.split(b"\r\n")[1:]


REFUSED: dict[str, tuple[dict[bytes, bytes | None], Plain, bool, int]] = {
    "8.2.1 an upper case name": ({}, [(b"X-a", b"1")], True, 400),
    "8.2.1 an empty name": ({}, [(b"", b"1")], True, 400),
    "8.2.1 a name with a space": ({}, [(b"x a", b"1")], True, 400),
    "8.2.1 a name with a colon": ({}, [(b"x:a", b"1")], True, 400),
    "8.2.1 a name that is not ASCII": ({}, [(b"x\xe4", b"1")], True, 400),
    "8.2.1 a long name with a bad character": ({}, [(b"x" * 100 + b" ", b"1")], True, 400),
    "8.2.1 a CR in a value": ({}, [(b"x", b"a\rb")], True, 400),
    "8.2.1 a LF in a value": ({}, [(b"x", b"a\nhost: evil")], True, 400),
    "8.2.1 a NUL in a value": ({}, [(b"x", b"a\0")], True, 400),
    "8.2.1 a space before a value": ({}, [(b"x", b" a")], True, 400),
    "8.2.1 a tab behind a value": ({}, [(b"x", b"a\t")], True, 400),
    "8.2.1 a space before the second of two values": ({}, [(b"x", b"a"), (b"y", b" b")], True, 400),
    "8.2.2 connection": ({}, [(b"connection", b"close")], True, 400),
    "8.2.2 keep-alive": ({}, [(b"keep-alive", b"5")], True, 400),
    "8.2.2 proxy-connection": ({}, [(b"proxy-connection", b"close")], True, 400),
    "8.2.2 transfer-encoding": ({}, [(b"transfer-encoding", b"chunked")], False, 400),
    "8.2.2 upgrade": ({}, [(b"upgrade", b"websocket")], True, 400),
    "8.2.2 te with more than trailers": ({}, [(b"te", b"trailers, gzip")], True, 400),
    "8.3 an unknown pseudo-header field": ({b":extra": b"1"}, [], True, 400),
    "8.3 a response's pseudo-header field": ({b":status": b"200"}, [], True, 400),
    "8.3 a pseudo-header field behind a field": ({}, [(b"x", b"1"), (b":method", b"GET")], True, 400),
    "8.3.1 no method": ({b":method": None}, [], True, 400),
    "8.3.1 a method that is no token": ({b":method": b"G T"}, [], True, 400),
    "8.3.1 no scheme": ({b":scheme": None}, [], True, 400),
    "8.3.1 another scheme": ({b":scheme": b"ftp"}, [], True, 400),
    "8.3.1 no path": ({b":path": None}, [], True, 400),
    "8.3.1 an empty path": ({b":path": b""}, [], True, 400),
    "8.3.1 a path with a space": ({b":path": b"/a b"}, [], True, 400),
    "8.3.1 an absolute path": ({b":path": b"https://a/"}, [], True, 400),
    "8.3.1 an asterisk of GET": ({b":path": b"*"}, [], True, 400),
    "8.3.1 no authority": ({b":authority": None}, [], True, 400),
    "8.3.1 an authority with user information": ({b":authority": b"user@a"}, [], True, 400),
    "8.3.1 a Host that differs": ({}, [(b"host", b"other")], True, 400),
    "8.3.1 two Hosts that differ": ({b":authority": None}, [(b"host", b"a"), (b"host", b"b")], True, 400),
    "8.1.1 a length of a request without content": ({}, [(b"content-length", b"5")], True, 400),
    "8.1.1 two lengths": ({}, [(b"content-length", b"5"), (b"content-length", b"6")], False, 400),
    "8.1.1 a length that is no number": ({}, [(b"content-length", b"+5")], False, 400),
    "8.5 CONNECT": ({b":method": b"CONNECT"}, [], False, 400),
    "RFC 8441, 4: a protocol of GET": ({b":protocol": b"websocket"}, [], False, 400),
    "RFC 8441, 4: another protocol": (CONNECT | {b":protocol": b"connect-udp"}, [], False, 501),
    "RFC 9110, 9.3.6: a length of an extended CONNECT": ({**CONNECT}, [(b"content-length", b"5")], False, 400),
    "RFC 9110, 9.3.6: no length of an extended CONNECT": ({**CONNECT}, [(b"content-length", b"0")], True, 400),
    "two tokens": ({}, [(b"x-aws-proxy-auth", b"a"), (b"x-aws-proxy-auth", b"b")], True, 400),
    "too many fields": ({}, [(b"x", b"y")] * 201, True, 431),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    pseudo, fields, end, status = REFUSED[case]
    for _ in range(2):  # names that were seen before as well
        with pytest.raises(Malformed) as refused:
            request(*fields, end=end, pseudo=pseudo)
        assert refused.value.status == status


def test_a_pseudo_header_field_comes_once() -> None:
    fields = [(name, value, False) for name, value in PSEUDO.items()]
    with pytest.raises(Malformed):
        http2_head.parse_request([fields[0], *fields], True, 200)


@pytest.mark.parametrize(
    ("fields", "end", "framing", "length"),
    [
        ([], True, NO_BODY, 0),
        ([(b"content-length", b"0")], True, FIXED, 0),
        ([(b"content-length", b"7")], False, FIXED, 7),
        ([], False, CHUNKED, 0),
    ],
)
def test_framing(fields: Plain, end: bool, framing: int, length: int) -> None:
    head = request(*fields, end=end)
    assert (head.framing, head.length) == (framing, length)
    assert (b"transfer-encoding: chunked" in lines(head)) == (framing == CHUNKED)


def test_what_is_ours_and_what_is_the_connections_does_not_go_on() -> None:
    head = request((b"te", b"trailers"), (b"x-aws-proxy-auth", b"secret"), (b"x-amzn-requestid", b"mine"), (b"accept", b"a"))
    assert lines(head) == [b"Host: " + HOST, b"accept: a"]
    assert head.te_trailers and head.token == "secret"


def test_cookies_in_pieces_are_one() -> None:
    assert lines(request((b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")))[1:] == [b"x: y", b"cookie: a=1; b=2"]


def test_host_in_place_of_authority() -> None:
    head = request((b"host", b"A.B:443"), pseudo={b":authority": None})
    assert head.host == "a.b" and lines(head) == [b"Host: A.B:443"]
    assert lines(request((b"host", HOST.upper()))) == [b"Host: " + HOST]


def test_extended_connect_is_the_usual_upgrade_and_nothing_of_the_clients_own_handshake() -> None:
    head = request(
        (b"sec-websocket-key", b"bWluZQ=="), (b"expect", b"100-continue"), (b"sec-websocket-version", b"13"), (b"origin", b"https://a"),
        end=False, pseudo={**CONNECT},
    )  # fmt: skip
    assert (head.method, head.framing, head.upgrade, head.expects) == (b"GET", NO_BODY, b"websocket", False)
    assert [one for one in lines(head) if one.lower().startswith(b"sec-websocket-key")] == [b"Sec-WebSocket-Key: " + head.websocket_key]
    assert lines(head).count(b"sec-websocket-version: 13") == 1 and b"expect" not in head.block.lower()
    assert b"Connection: upgrade" in lines(head) and b"Upgrade: websocket" in lines(head) and not head.is_memorable


TOKEN = st.text("!#$%&'*+-.^_`|~abcxyz019", min_size=1, max_size=20).map(str.encode)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40).map(lambda text: text.strip().encode())


@given(st.lists(st.tuples(TOKEN, VALUE), max_size=30))
def test_what_goes_on_reads_the_same_in_http1(fields: Plain) -> None:
    try:
        first = request(*fields)
    except Malformed:
        return
    second = parse_http1(b"GET / HTTP/1.1", first.block, 250)
    assert (second.host, second.framing, second.length, second.upgrade) == (first.host, first.framing, first.length, None)
    assert second.block == first.block and b"x-aws-proxy" not in first.block.lower()


# ---- responses ----


def response(*fields: tuple[bytes, bytes], status: bytes = b"200", end: bool = False, is_head: bool = False) -> ResponseHead:
    return http2_head.parse_response([(name, value, False) for name, value in [(b":status", status), *fields]], end, 200, is_head)


@pytest.mark.parametrize(
    ("status", "fields", "end", "is_head", "framing", "length"),
    [
        (b"200", [], False, False, CHUNKED, 0),
        (b"200", [], True, False, FIXED, 0),
        (b"200", [(b"content-length", b"8")], False, False, FIXED, 8),
        (b"200", [(b"content-length", b"8")], True, False, FIXED, 8),  # which its stream refuses: there is no content
        (b"200", [(b"content-length", b"8")], True, True, NO_BODY, 0),
        (b"204", [], True, False, NO_BODY, 0),
        (b"304", [(b"content-length", b"8")], True, False, NO_BODY, 0),
        (b"103", [(b"link", b"</a>")], False, False, NO_BODY, 0),
    ],
)
def test_response_framing(status: bytes, fields: Plain, end: bool, is_head: bool, framing: int, length: int) -> None:
    head = response(*fields, status=status, end=end, is_head=is_head)
    assert (head.status, head.framing, head.length) == (int(status), framing, length)


RESPONSES_REFUSED: dict[str, tuple[bytes, Plain]] = {
    "no number": (b"20x", []),
    "two digits": (b"20", []),
    "switching protocols": (b"101", []),
    "two lengths": (b"200", [(b"content-length", b"1"), (b"content-length", b"2")]),
    "a length that is no number": (b"200", [(b"content-length", b"1a")]),
    "a field of the connection": (b"200", [(b"connection", b"close")]),
    "a request's pseudo-header field": (b"200", [(b":path", b"/")]),
    "a line feed": (b"200", [(b"x", b"a\nb")]),
    "too many fields": (b"200", [(b"x", b"a")] * 201),
}


@pytest.mark.parametrize("case", RESPONSES_REFUSED)
def test_refused_responses(case: str) -> None:
    status, fields = RESPONSES_REFUSED[case]
    with pytest.raises(Malformed) as refused:
        response(*fields, status=status)
    assert refused.value.status == 502
    assert "RFC 9113" in str(refused.value) or "edge.head_fields" in str(refused.value)


def decoded(block: bytes) -> Plain:
    return [(name, value) for name, value, _ in f.new_decoder(1 << 16).decode(block, True)]


def test_a_response_goes_on_in_both_protocols() -> None:
    head = response((b"x-amzn-requestid", b"the application's"), (b"x-a", b"1"), (b"set-cookie", b"a"), (b"set-cookie", b"b"))
    assert head.block == b"\r\nx-a: 1\r\nset-cookie: a\r\nset-cookie: b\r\nTransfer-Encoding: chunked"
    assert decoded(http2_head.response_block(head)) == [(b":status", b"200"), (b"x-a", b"1"), (b"set-cookie", b"a"), (b"set-cookie", b"b")]


def test_a_length_may_not_stand_where_there_is_never_content() -> None:
    assert b"content-length" not in response((b"content-length", b"0"), status=b"204", end=True).block


# ---- trailers ----


@pytest.mark.parametrize(
    "name", [b"content-length", b"host", b"authorization", b"x-aws-proxy-auth", b"x-amzn-requestid", b"content-type", b"te", b"trailer"]
)
def test_trailers_that_do_not_go_on(name: bytes) -> None:
    value = b"trailers" if name == b"te" else b"1"
    assert http2_head.parse_trailers([(name, value, False), (b"grpc-status", b"0", False)], 200) == [(b"grpc-status", b"0")]


@pytest.mark.parametrize(
    "fields", [[(b":status", b"200")], [(b"X", b"1")], [(b"connection", b"close")], [(b"x", b"\r")], [(b"x", b"1")] * 201]
)
def test_refused_trailers(fields: Plain) -> None:
    with pytest.raises(Malformed):
        http2_head.parse_trailers([(name, value, False) for name, value in fields], 200)


# ---- towards applications ----


def test_a_request_for_an_application_that_speaks_http2() -> None:
    head = request(
        (b"te", b"trailers"), (b"x", b"1"), (b"content-length", b"3"), end=False, pseudo={b":method": b"POST", b":path": b"/a?b"}
    )
    assert decoded(http2_head.request_block(head, b"id", b"http")) == [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a?b"), (b":authority", HOST), (b"x", b"1"), (b"content-length", b"3"),
        (b"te", b"trailers"), (b"x-amzn-requestid", b"id"),
    ]  # fmt: skip


def test_names_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_head, "_known_names", {})
    request((b"x" * 64, b"1"), (b"y" * 65, b"1"))
    assert set(http2_head._known_names) == {b"x" * 64}
    for number in range(50):
        request(*[(b"n%d-%d" % (number, other), b"1") for other in range(100)])
    assert len(http2_head._known_names) <= 4096
