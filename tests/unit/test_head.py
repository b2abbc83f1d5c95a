"""Heads: what is refused (smuggling above all), what goes on, and that what goes on reads the same to another parser."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire.http1_head import (
    CHUNKED,
    FIXED,
    NO_BODY,
    UNTIL_CLOSE,
    Malformed,
    RequestHead,
    find_end,
    parse_request,
    parse_response,
)

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
    "chunked twice": ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], 400),
    "chunked twice in one field": ([b"Transfer-Encoding: chunked, chunked"], 400),
    "a coding before chunked": ([b"Transfer-Encoding: gzip, chunked"], 501),
    "chunked before a coding": ([b"Transfer-Encoding: chunked, gzip"], 400),
    "a coding alone": ([b"Transfer-Encoding: gzip"], 400),
    "an empty coding": ([b"Transfer-Encoding: chunked,"], 400),
    "an unknown coding": ([b"Transfer-Encoding: xchunked"], 400),
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
    assert refused.value.status == status and str(refused.value).startswith("request has ")


LINES = [
    b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET / HTTP/2.0", b"GET / http/1.1", b"GET /", b"GET / HTTP/1.2",
    b"GET /a b HTTP/1.1", b"G\x00T / HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET example.com HTTP/1.1", b"CONNECT a:1 HTTP/1.1",
    b"CONNECT / HTTP/1.1", b"CONNECT http://a/ HTTP/1.1", b"GET ftp://a/ HTTP/1.1", b"* * HTTP/1.1", b"GET * HTTP/1.1", b"GET http://user@a/ HTTP/1.1", b"\x16\x03\x01\x02",
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
    head = request(b"Upgrade: WebSocket", b"Connection: Upgrade")
    assert head.upgrade == b"websocket" and head.block.endswith(b"\r\nConnection: upgrade\r\nUpgrade: websocket")
    head = request(b"Upgrade: h2c, websocket", b"Connection: Upgrade")
    assert head.upgrade == b"websocket" and head.block.endswith(b"\r\nUpgrade: websocket")


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        *[(b"GET / HTTP/1.1", (b"Upgrade: " + name,)) for name in (b"h2c", b"TLS/1.0", b"foo/1", b"websocket2", b"")],
        (b"GET / HTTP/1.0", (b"Upgrade: websocket",)),
        (b"POST / HTTP/1.1", (b"Upgrade: websocket",)),
        (b"GET / HTTP/1.1", (b"Upgrade: websocket", b"Content-Length: 1")),
        (b"GET / HTTP/1.1", (b"Upgrade: websocket", b"Transfer-Encoding: chunked")),
    ],
)
def test_no_other_upgrade_is_passed_on(line: bytes, fields: tuple[bytes, ...]) -> None:
    """RFC 9110, 7.8: what is not understood, and all of HTTP/1.0, is ignored; WebSocket is a GET without content."""
    head = request(b"Connection: upgrade", *fields, line=line)
    assert head.upgrade is None and b"pgrade" not in head.block


@pytest.mark.parametrize(("method", "sent", "forwarded"), [(b"OPTIONS", 5, 4), (b"TRACE", 1, 0), (b"TRACE", 0, 0), (b"GET", 5, 5)])
def test_max_forwards_counts_down(method: bytes, sent: int, forwarded: int) -> None:
    head = request(b"Max-Forwards: %d" % sent, line=method + b" / HTTP/1.1")
    assert head.block.endswith(b"\r\nMax-Forwards: %d" % forwarded) and not head.is_memorable
    assert head.max_forwards == (-1 if method == b"GET" else sent)


def test_a_request_id_of_the_clients_own_is_taken_away() -> None:
    assert request(b"X-Amzn-RequestId: spoofed", b"A: b").block == b"\r\nHost: " + HOST + b"\r\nA: b"


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


_LEGAL_BLOCK = re.compile(rb"(\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)*")  # RFC 9110, 5.1 and 5.5
_PIECES = [b"GET / HTTP/1.1", b"HTTP/1.1 200 OK", b"\r\n", b"\n", b"\r", b"\0", b": ", b":", b" ", b"\t", b"Host", b"a.example", b"Connection",
           b"close", b"Content-Length", b"1", b"Transfer-Encoding", b"chunked", b"\xff", b"(", b","]  # fmt: skip


@given(st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(_PIECES), max_size=40).map(b"".join)))
def test_garbage_is_refused_or_what_goes_on_is_legal(data: bytes) -> None:
    line, _, rest = data.partition(b"\r\n")
    for parse in (lambda: parse_request(line, b"\r\n" + rest, 200), lambda: parse_response(data, 200, False)):
        with contextlib.suppress(Malformed):
            assert _LEGAL_BLOCK.fullmatch(parse().block), data


# ---- responses ----


def response(line: bytes, *fields: bytes, is_head: bool = False):  # type: ignore[no-untyped-def]
    return parse_response(line + b"".join(b"\r\n" + one for one in fields), 200, is_head)


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


# Fields of a response with two meanings, made one; the block that goes on, its framing and length.
SLOPPY = {
    "both framings": (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked", CHUNKED, 0),
    "two equal lengths": (b"Content-Length: 5\r\nX: y\r\nContent-Length: 5", b"Content-Length: 5\r\nX: y", FIXED, 5),
    "a list of equal lengths": (b"Content-Length: 5, 5", b"Content-Length: 5", FIXED, 5),
    "a control character": (b"X: a\x01b\x7f\r\nContent-Length: 5", b"X: a b\r\nContent-Length: 5", FIXED, 5),
    "a bare LF": (b"X: a\nContent-Length: 5", b"X: a\r\nContent-Length: 5", FIXED, 5),
}


@pytest.mark.parametrize("case", SLOPPY)
def test_a_sloppy_response_goes_on_in_one_meaning(case: str) -> None:
    sent, block, framing, length = SLOPPY[case]
    head = response(b"HTTP/1.1 200 OK", sent)
    assert (head.block, head.framing, head.length) == (b"\r\n" + block, framing, length)
    assert head.keep_alive is (case != "both framings")  # RFC 9112, 6.1: that connection is not used again


AMBIGUOUS = {
    "two different Content-Length values (RFC 9112 6.3)": [b"Content-Length: 5", b"Content-Length: 6"],
    "a Content-Length that is not a number (RFC 9112 6.3)": [b"Content-Length: +5"],
    "a Transfer-Encoding other than one chunked (RFC 9112 6.1)": [b"Transfer-Encoding: gzip, chunked"],
    "white space before a colon (RFC 9112 5.1)": [b"A : b"],
    "a folded line (RFC 9112 5.2)": [b"A: b", b" c"],
    "a bare CR (RFC 9112 2.2)": [b"A: b\rc"],
    "a line without a colon (RFC 9112 5)": [b"A"],
    "a field name that is no token (RFC 9110 5.1)": [b"A B: c"],
    "a control character in a field value (RFC 9110 5.5)": [b"A: \0"],
    "more than 200 fields (edge.head_fields)": [b"A: b"] * 201,
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_response_that_could_be_read_two_ways_is_refused_by_its_rule(case: str) -> None:
    with pytest.raises(Malformed) as refused:
        response(b"HTTP/1.1 200 OK", *AMBIGUOUS[case])
    assert str(refused.value) == f"response has {case}"


def test_transfer_encoding_in_http_1_0_is_refused() -> None:
    with pytest.raises(Malformed, match=r"HTTP/1\.0 \(RFC 9112 6\.1\)"):
        response(b"HTTP/1.0 200 OK", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize("line", [b"HTTP/1.1 2000 OK", b"HTTP/2 200", b"HTTP/1.1 20", b"hello", b"HTTP/1.1 099 x", b"", b"http/1.1 200 OK"])
def test_refused_status_lines(line: bytes) -> None:
    with pytest.raises(Malformed, match=r"^response has a malformed status line \(RFC 9112 4\)$"):
        response(line)


def test_a_status_line_without_a_reason_has_its_space() -> None:
    """A server must send it (RFC 9112, 4)."""
    assert response(b"HTTP/1.1 200").status_line == response(b"HTTP/1.0 200 ").status_line == b"HTTP/1.1 200 "


@pytest.mark.parametrize("line", [b"HTTP/1.1 204 No Content", b"HTTP/1.1 103 Early Hints", b"HTTP/1.1 101 Switching Protocols"])
def test_no_framing_goes_on_where_there_is_no_content(line: bytes) -> None:
    """RFC 9110, 8.6; RFC 9112, 6.1."""
    assert (
        response(line, b"Content-Length: 5", b"A: b").block == response(line, b"Transfer-Encoding: chunked", b"A: b").block == b"\r\nA: b"
    )
    assert response(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5").block == b"\r\nContent-Length: 5"


def test_a_date_and_our_request_id_are_ours_to_add() -> None:
    assert response(b"HTTP/1.1 200 OK", b"Date: Sun, 06 Nov 1994 08:49:37 GMT").is_dated and response(b"HTTP/1.1 100 Continue").is_dated
    head = response(b"HTTP/1.1 200 OK", b"X-Amzn-Requestid: spoofed", b"A: b")
    assert head.block == b"\r\nA: b" and not head.is_dated


@given(st.sampled_from([b"\r\n", b"\n"]), st.sampled_from([b"\r\n\r\n", b"\n\n", b"\r\n\n", b"\n\r\n"]), st.binary(max_size=30))
def test_the_end_of_a_head_is_its_first_empty_line(line_end: bytes, head_end: bytes, rest: bytes) -> None:
    head = b"HTTP/1.1 200 OK" + line_end + b"A: b"
    data = head + head_end + rest
    assert find_end(data) == (len(head), len(head + head_end))
    for length in range(len(head) + len(head_end)):
        assert find_end(data[:length]) == (-1, 0)


def test_response_fields() -> None:
    head = response(b"HTTP/1.0 200 Fine", b"Connection: close, X-Hop", b"X-Hop: 1", b"Keep-Alive: 5", b"Set-Cookie: a", b"Set-Cookie: b")
    assert (head.status_line, head.block, head.keep_alive) == (b"HTTP/1.1 200 Fine", b"\r\nSet-Cookie: a\r\nSet-Cookie: b", False)


def test_what_a_field_block_asks_for_by_method_is_not_remembered() -> None:
    """GET with the same fields is a WebSocket's handshake."""
    block = b"\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket"
    assert not parse_request(b"POST / HTTP/1.1", block, 200).is_memorable
    assert parse_request(b"GET / HTTP/1.1", block, 200).upgrade == b"websocket"
