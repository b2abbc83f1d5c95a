"""Heads: what is refused (smuggling above all), what goes on, and that what goes on reads the same to another parser."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.head import CHUNKED, FIXED, NO_BODY, UNTIL_CLOSE, Malformed, RequestHead, parse_request, parse_response

HOST = b"x.lambda-microvm.us-east-1.localhost"


def request(*fields: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes | None = HOST) -> RequestHead:
    lines = ([b"Host: " + host] if host is not None else []) + list(fields)
    return parse_request(line, b"".join(b"\r\n" + one for one in lines), 200)


REFUSED = {
    "both framings": ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], 400),
    "two lengths": ([b"Content-Length: 5", b"Content-Length: 6"], 400),
    "two equal lengths": ([b"Content-Length: 5", b"Content-Length: 5"], 400),
    "a list of lengths": ([b"Content-Length: 5, 5"], 400),
    "a signed length": ([b"Content-Length: +5"], 400),
    "a negative length": ([b"Content-Length: -1"], 400),
    "a hexadecimal length": ([b"Content-Length: 0x5"], 400),
    "a length with a separator": ([b"Content-Length: 1_0"], 400),
    "a huge length": ([b"Content-Length: 9999999999999999999999"], 400),
    "an empty length": ([b"Content-Length:"], 400),
    "chunked twice": ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], 501),
    "a coding before chunked": ([b"Transfer-Encoding: gzip, chunked"], 501),
    "chunked before a coding": ([b"Transfer-Encoding: chunked, identity"], 501),
    "an unknown coding": ([b"Transfer-Encoding: xchunked"], 501),
    "chunked with a tab": ([b"Transfer-Encoding: \x0bchunked"], 400),
    "a space before the colon": ([b"Transfer-Encoding : chunked"], 400),
    "a folded line": ([b"X: a", b" b: c"], 400),
    "a bare LF": ([b"X: a\nContent-Length: 5"], 400),
    "a bare CR": ([b"X: a\rContent-Length: 5"], 400),
    "a NUL": ([b"X: a\0"], 400),
    "an empty name": ([b": x"], 400),
    "no colon": ([b"nonsense"], 400),
    "a name with a space": ([b"X Y: z"], 400),
    "two hosts": ([b"Host: other"], 400),
    "a host with a path": ([b"Host: a/b"], 400),
    "two tokens": ([b"X-aws-proxy-auth: a", b"X-aws-proxy-auth: b"], 400),
    "two ports": ([b"X-aws-proxy-port: 1", b"X-aws-proxy-port: 2"], 400),
    "too many fields": ([b"X: y"] * 201, 431),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, status = REFUSED[case]
    host = None if case == "a host with a path" else HOST
    with pytest.raises(Malformed) as refused:
        request(*fields, host=host)
    assert refused.value.status == status


LINES = [
    b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET / HTTP/2.0", b"GET / http/1.1", b"GET /", b"GET / HTTP/1.2",
    b"GET /a b HTTP/1.1", b"G\x00T / HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET example.com HTTP/1.1", b"CONNECT a:1 HTTP/1.1",
    b"GET ftp://a/ HTTP/1.1", b"* * HTTP/1.1", b"GET * HTTP/1.1", b"GET http://user@a/ HTTP/1.1", b"\x16\x03\x01\x02",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_refused_request_lines(line: bytes) -> None:
    with pytest.raises(Malformed):
        request(line=line)


def test_host_is_required_in_http_1_1_only() -> None:
    with pytest.raises(Malformed):
        request(host=None)
    assert request(host=None, line=b"GET / HTTP/1.0").host == ""


@pytest.mark.parametrize(
    ("value", "host"),
    [(b"A.B", "a.b"), (b"a:443", "a"), (b"a.:80", "a"), (b"[::1]:80", "[::1]"), (b"[::1]", "[::1]")],
)
def test_host(value: bytes, host: str) -> None:
    assert request(host=value).host == host


def test_absolute_form_overrides_host_and_is_never_remembered() -> None:
    head = request(line=b"GET http://Other.example:80?a=b HTTP/1.1")
    assert (head.host, head.target, head.is_memorable) == ("other.example", b"/?a=b", False)
    assert b"Host: Other.example:80" in head.block and HOST not in head.block


def test_target_goes_on_untouched() -> None:
    target = b"/a/../%2e%2E/b//c;p?x=%zz&y=\xc3\xa4#f"
    assert request(line=b"GET " + target + b" HTTP/1.1").target == target


def test_our_own_and_hop_by_hop_fields_are_taken_away() -> None:
    head = request(
        b"X-aws-proxy-auth: secret", b"X-Aws-Proxy-Port: 80", b"x-aws-proxy-anything: 1", b"Connection: keep-alive, X-Private",
        b"X-Private: 1", b"Keep-Alive: 5", b"TE: trailers", b"Proxy-Connection: x", b"Accept: a", b"X-Two: 1", b"X-Two: 2",
    )  # fmt: skip
    assert head.block == b"\r\nHost: " + HOST + b"\r\nAccept: a\r\nX-Two: 1\r\nX-Two: 2"
    assert (head.token, head.port) == ("secret", b"80")


def test_connection_cannot_take_framing_away() -> None:
    head = request(b"Connection: close, Content-Length, Host, Transfer-Encoding", b"Content-Length: 5", line=b"POST / HTTP/1.1")
    assert b"Content-Length: 5" in head.block and b"Host: " in head.block and not head.keep_alive
    assert (head.framing, head.length) == (FIXED, 5)


def test_upgrade_only_where_connection_says_so() -> None:
    assert request(b"Upgrade: websocket").upgrade is None
    head = request(b"Upgrade: websocket", b"Connection: Upgrade")
    assert head.upgrade == b"websocket" and head.block.endswith(b"\r\nConnection: upgrade\r\nUpgrade: websocket")


def test_subprotocols() -> None:
    offers = b"lambda-microvms, lambda-microvms.authentication.TOKEN, chat.v1, lambda-microvms.port.9000, chat.v2"
    head = request(b"Sec-WebSocket-Protocol: " + offers, b"Upgrade: websocket", b"Connection: upgrade")
    assert (head.token, head.port, head.marker_offered, head.subprotocol_auth) == ("TOKEN", b"9000", True, True)
    assert b"Sec-WebSocket-Protocol: chat.v1, chat.v2\r\n" in head.block and b"TOKEN" not in head.block


def test_field_wins_over_subprotocol() -> None:
    offers = b"lambda-microvms, lambda-microvms.authentication.B, lambda-microvms.port.2"
    head = request(b"X-aws-proxy-auth: A", b"X-aws-proxy-port: 1", b"Sec-WebSocket-Protocol: " + offers)
    assert (head.token, head.port) == ("A", b"1")


@pytest.mark.parametrize(
    ("line", "fields", "keep"),
    [
        (b"GET / HTTP/1.1", (), True),
        (b"GET / HTTP/1.1", (b"Connection: CLOSE",), False),
        (b"GET / HTTP/1.0", (), False),
        (b"GET / HTTP/1.0", (b"Connection: keep-alive",), True),
    ],
)
def test_keep_alive(line: bytes, fields: tuple[bytes, ...], keep: bool) -> None:
    assert request(*fields, line=line).keep_alive is keep


TOKEN = st.text("!#$%&'*+-.^_`|~abcXYZ019", min_size=1, max_size=20).map(str.encode)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40).map(lambda s: s.strip().encode())


@given(st.lists(st.tuples(TOKEN, VALUE), max_size=30))
def test_what_goes_on_reads_the_same(fields: list[tuple[bytes, bytes]]) -> None:
    """Written and parsed again, the head says the same: nothing can hide in the first reading."""
    lines = [name + b": " + value for name, value in fields]
    try:
        first = request(*lines)
    except Malformed:
        return
    second = parse_request(b"GET / HTTP/1.1", first.block, 200)
    assert (second.host, second.framing, second.length) == (first.host, first.framing, first.length)
    if first.upgrade is None:
        assert second.block == first.block
    assert b"x-aws-proxy" not in first.block.lower()


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_parsed_never_worse(data: bytes) -> None:
    line, _, rest = data.partition(b"\r\n")
    for parse in (lambda: parse_request(line, b"\r\n" + rest, 200), lambda: parse_response(line, b"\r\n" + rest, 200, False)):
        with contextlib.suppress(Malformed):
            parse()


# ---- responses ----


def response(line: bytes, *fields: bytes, is_head: bool = False):  # type: ignore[no-untyped-def]
    return parse_response(line, b"".join(b"\r\n" + one for one in fields), 200, is_head)


@pytest.mark.parametrize(
    ("line", "fields", "is_head", "framing"),
    [
        (b"HTTP/1.1 200 OK", (b"Content-Length: 5",), False, FIXED),
        (b"HTTP/1.1 200", (b"Transfer-Encoding: chunked",), False, CHUNKED),
        (b"HTTP/1.1 200 ", (), False, UNTIL_CLOSE),
        (b"HTTP/1.1 200 OK", (b"Content-Length: 5",), True, NO_BODY),
        (b"HTTP/1.1 204 No Content", (), False, NO_BODY),
        (b"HTTP/1.1 304 Not Modified", (b"Content-Length: 5",), False, NO_BODY),
        (b"HTTP/1.1 103 Early Hints", (b"Link: </a>",), False, NO_BODY),
    ],
)
def test_response_framing(line: bytes, fields: tuple[bytes, ...], is_head: bool, framing: int) -> None:
    assert response(line, *fields, is_head=is_head).framing == framing


@pytest.mark.parametrize(
    "fields",
    [(b"Content-Length: 5", b"Content-Length: 6"), (b"Content-Length: 5", b"Transfer-Encoding: chunked"), (b"A : b",), (b"A: \0",)],
)
def test_response_that_could_be_read_two_ways(fields: tuple[bytes, ...]) -> None:
    with pytest.raises(Malformed):
        response(b"HTTP/1.1 200 OK", *fields)


@pytest.mark.parametrize("line", [b"HTTP/1.1 2000 OK", b"HTTP/2 200", b"HTTP/1.1 20", b"hello", b"HTTP/1.1 099 x", b""])
def test_refused_status_lines(line: bytes) -> None:
    with pytest.raises(Malformed):
        response(line)


def test_response_fields() -> None:
    head = response(b"HTTP/1.0 200 Fine", b"Connection: close, X-Hop", b"X-Hop: 1", b"Keep-Alive: 5", b"Set-Cookie: a", b"Set-Cookie: b")
    assert (head.status_line, head.block, head.keep_alive) == (b"HTTP/1.1 200 Fine", b"\r\nSet-Cookie: a\r\nSet-Cookie: b", False)
