"""RFC 9112: what a careful intermediary refuses, and what it must not. None of the refused reaches the application."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pytest
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.conformance]

CONTROLS = [*range(0, 9), 11, 12, *range(14, 32), 127]
GOOD = "HOST\r\nTOKEN\r\n\r\n"

# Line and fields; HOST and TOKEN stand for the right ones. The rest of a case follows the head.
REFUSED: dict[str, str] = {
    "3 no version": "GET /\r\n" + GOOD, "3 version 2": "GET / HTTP/2.0\r\n" + GOOD, "3 version 0.9": "GET / HTTP/0.9\r\n" + GOOD,
    "3 version 1.2": "GET / HTTP/1.2\r\n" + GOOD, "3 version 1": "GET / HTTP/1\r\n" + GOOD, "3 version 1.10": "GET / HTTP/1.10\r\n" + GOOD,
    "3 version in lower case": "GET / http/1.1\r\n" + GOOD, "3 version 1.1 and a space": "GET / HTTP/1.1 \r\n" + GOOD,
    "3 two spaces before the target": "GET  / HTTP/1.1\r\n" + GOOD, "3 two spaces before the version": "GET /  HTTP/1.1\r\n" + GOOD,
    "3 tab for a space": "GET\t/ HTTP/1.1\r\n" + GOOD, "3 space before the method": " GET / HTTP/1.1\r\n" + GOOD,
    "3 no method": "/ HTTP/1.1\r\n" + GOOD, "3 no target": "GET HTTP/1.1\r\n" + GOOD, "3 method with a slash": "GE/T / HTTP/1.1\r\n" + GOOD,
    "3 method with a colon": "GET: / HTTP/1.1\r\n" + GOOD, "3.1 method with a brace": "G{T / HTTP/1.1\r\n" + GOOD,
    "3.2 target without a slash": "GET state HTTP/1.1\r\n" + GOOD, "3.2 target with a space": "GET /a b HTTP/1.1\r\n" + GOOD,
    "3.2 CONNECT": "CONNECT example.com:80 HTTP/1.1\r\n" + GOOD, "3.2 CONNECT in origin form": "CONNECT / HTTP/1.1\r\n" + GOOD, "3.2 asterisk of GET": "GET * HTTP/1.1\r\n" + GOOD,
    "3.2 absolute form of another scheme": "GET ftp://x/ HTTP/1.1\r\n" + GOOD, "3.2 absolute form without a host": "GET http:/// HTTP/1.1\r\n" + GOOD,
    "3.2 absolute form with user information": "GET http://u@x/ HTTP/1.1\r\n" + GOOD, "3.2 authority form of GET": "GET x:80 HTTP/1.1\r\n" + GOOD,
    "3.2 no Host": "GET / HTTP/1.1\r\nTOKEN\r\n\r\n", "3.2 two Hosts": "GET / HTTP/1.1\r\nHOST\r\nHOST\r\nTOKEN\r\n\r\n",
    "3.2 two Hosts that differ": "GET / HTTP/1.1\r\nHOST\r\nHost: evil\r\nTOKEN\r\n\r\n", "3.2 empty Host": "GET / HTTP/1.1\r\nHost:\r\nTOKEN\r\n\r\n",
    "3.2 Host with a path": "GET / HTTP/1.1\r\nHost: a/b\r\nTOKEN\r\n\r\n", "3.2 Host with a space": "GET / HTTP/1.1\r\nHost: a b\r\nTOKEN\r\n\r\n",
    "3.2 Host with user information": "GET / HTTP/1.1\r\nHost: u@a\r\nTOKEN\r\n\r\n", "3.2 Host with a comma and a space": "GET / HTTP/1.1\r\nHost: a, b\r\nTOKEN\r\n\r\n",
    "3.2 Host with a port that is no number": "GET / HTTP/1.1\r\nHost: a:b\r\nTOKEN\r\n\r\n",
    "3.2 Host with a long port": "GET / HTTP/1.1\r\nHost: a:123456\r\nTOKEN\r\n\r\n",
    "5 no colon": "GET / HTTP/1.1\r\nHOST\r\nX\r\nTOKEN\r\n\r\n", "5 space before the colon": "GET / HTTP/1.1\r\nHOST\r\nX : y\r\nTOKEN\r\n\r\n",
    "5 tab before the colon": "GET / HTTP/1.1\r\nHOST\r\nX\t: y\r\nTOKEN\r\n\r\n", "5 empty name": "GET / HTTP/1.1\r\nHOST\r\n: y\r\nTOKEN\r\n\r\n",
    "5 name with a space": "GET / HTTP/1.1\r\nHOST\r\nX Y: y\r\nTOKEN\r\n\r\n", "5 name with a parenthesis": "GET / HTTP/1.1\r\nHOST\r\nX(y): y\r\nTOKEN\r\n\r\n",
    "5 name that is not ASCII": "GET / HTTP/1.1\r\nHOST\r\nXÿ: y\r\nTOKEN\r\n\r\n", "5 space before the first field": "GET / HTTP/1.1\r\n HOST\r\nTOKEN\r\n\r\n",
    "5.2 folded with a space": "GET / HTTP/1.1\r\nHOST\r\nX: y\r\n z\r\nTOKEN\r\n\r\n", "5.2 folded with a tab": "GET / HTTP/1.1\r\nHOST\r\nX: y\r\n\tz\r\nTOKEN\r\n\r\n",
    "5.2 folded token": "GET / HTTP/1.1\r\nHOST\r\nX-aws-proxy-auth:\r\n x\r\n\r\n", "2.2 bare line feed in the line": "GET / HTTP/1.1\nHOST\r\nTOKEN\r\n\r\n",
    "2.2 bare line feed between fields": "GET / HTTP/1.1\r\nHOST\nX: y\r\nTOKEN\r\n\r\n", "2.2 bare carriage return in a value": "GET / HTTP/1.1\r\nHOST\r\nX: a\rb\r\nTOKEN\r\n\r\n",
    "2.2 bare carriage return in the line": "GET /\r HTTP/1.1\r\n" + GOOD, "2.2 carriage return before a colon": "GET / HTTP/1.1\r\nHOST\r\nX\r: y\r\nTOKEN\r\n\r\n",
    "6.1 both framings": "POST /echo HTTP/1.1\r\nHOST\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n0\r\n\r\nG",
    "6.1 both framings, the other order": "POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\nTOKEN\r\n\r\n0\r\n\r\nG",
    "6.1 chunked in HTTP/1.0": "POST /echo HTTP/1.0\r\nHOST\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n0\r\n\r\n",
    "6.1 two Transfer-Encodings": "POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n0\r\n\r\n",
}  # fmt: skip
for coding in (
    "identity",
    "gzip",
    "chunked, gzip",
    "gzip, chunked",
    "xchunked",
    "chunkedx",
    "chunked;a=b",
    "chunked,",
    ",chunked",
    '"chunked"',
    "\x0bchunked",
    "chunked\x00",
    "identity, chunked",
):
    REFUSED[f"6.1 Transfer-Encoding {coding!r}"] = f"POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: {coding}\r\nTOKEN\r\n\r\n0\r\n\r\n"
for name in ("Transfer-Encoding ", " Transfer-Encoding", "Transfer\x00Encoding", "Transfer-Encoding\x0b"):
    REFUSED[f"6.1 field {name!r}"] = f"POST /echo HTTP/1.1\r\nHOST\r\n{name}: chunked\r\nTOKEN\r\n\r\n0\r\n\r\n"
for length in ("-1", "+5", "5,5", "5, 6", "0x5", "5a", "5 5", "", "1e1", "5;", "\u0665", "9" * 19, "5\x00"):
    REFUSED[f"6.2 Content-Length {length!r}"] = f"POST /echo HTTP/1.1\r\nHOST\r\nContent-Length: {length}\r\nTOKEN\r\n\r\nhello"
for pair in (("5", "6"), ("5", "5"), ("0", "5")):
    REFUSED[f"6.2 two Content-Lengths {pair}"] = (
        f"POST /echo HTTP/1.1\r\nHOST\r\nContent-Length: {pair[0]}\r\nContent-Length: {pair[1]}\r\nTOKEN\r\n\r\nhello"
    )
for code in CONTROLS:
    REFUSED[f"5.5 control {code:#04x} in a value"] = f"GET / HTTP/1.1\r\nHOST\r\nX: a{chr(code)}b\r\nTOKEN\r\n\r\n"
for code in (0, 1, 9, 11, 12, 127):
    REFUSED[f"3.2 control {code:#04x} in the target"] = f"GET /{chr(code)} HTTP/1.1\r\n" + GOOD
for code in (0, 9, 11, 127, *b'"(),/;<=>?@[\\]{}'):
    REFUSED[f"5.1 {chr(code)!r} in a name"] = f"GET / HTTP/1.1\r\nHOST\r\nX{chr(code)}Y: z\r\nTOKEN\r\n\r\n"
for bad in ("5\nhello\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n", "-5\r\nhello\r\n", " 5\r\nhello\r\n0\r\n\r\n", "5_\r\nhello\r\n",
            "\r\nhello\r\n0\r\n\r\n", "5\r\nhelloX\r\n0\r\n\r\n", "6\r\nhello\r\n0\r\n\r\n", "g\r\n", "ffffffffffffffff\r\n", "5 5\r\nhello\r\n", "5;a=\x00\r\nhello\r\n", "5;\nhello\r\n0\r\n\r\n",
            "5;\r\nhello\r\n0\r\n\r\n", "5;;a\r\nhello\r\n0\r\n\r\n", '5;a="x\r\nhello\r\n0\r\n\r\n', "5 ;\r\nhello\r\n0\r\n\r\n",
            "0\r\nX : y\r\n\r\n", "0\r\n folded\r\n\r\n", "0\r\nX: y\n\r\n", "0\r\n: y\r\n\r\n", "0\r\nnocolon\r\n\r\n", "5\r\r\nhello\r\n", "5\rhello\r\n"):  # fmt: skip
    REFUSED[f"7.1 chunks {bad[:24]!r}"] = "POST /never HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n" + bad
REFUSED["5.4 head too large"] = "GET / HTTP/1.1\r\nHOST\r\nX: " + "y" * 33_000 + "\r\nTOKEN\r\n\r\n"
REFUSED["5.4 too many fields"] = "GET / HTTP/1.1\r\nHOST\r\n" + "X: y\r\n" * 201 + "TOKEN\r\n\r\n"
REFUSED["3 line too long"] = "GET /" + "a" * 33_000 + " HTTP/1.1\r\n" + GOOD

ACCEPTED: dict[str, tuple[str, int]] = {
    "2.2 empty lines before a request": ("\r\n\r\nGET /state HTTP/1.1\r\n" + GOOD, 200),
    "3.2 absolute form": ("GET https://AUTHORITY/state HTTP/1.1\r\nHost: ignored\r\nTOKEN\r\n\r\n", 200),
    "3.2 target is not touched": ("GET /%7Ea//b/../c?d=%2F&e=;[] HTTP/1.1\r\n" + GOOD, 404),
    "3.2 OPTIONS *": ("OPTIONS * HTTP/1.1\r\n" + GOOD, 404),
    "3.1 unknown method": ("BREW /state HTTP/1.1\r\n" + GOOD, 200),
    "3 HTTP/1.0": ("GET /state HTTP/1.0\r\n" + GOOD, 200),
    "5 no space after the colon": ("GET /state HTTP/1.1\r\nHOST\r\nX:y\r\nTOKEN\r\n\r\n", 200),
    "5 white space around a value": ("GET /state HTTP/1.1\r\nHOST\r\nX: \t y \t\r\nTOKEN\r\n\r\n", 200),
    "5 empty value": ("GET /state HTTP/1.1\r\nHOST\r\nX:\r\nTOKEN\r\n\r\n", 200),
    "5 value that is not ASCII": ("GET /state HTTP/1.1\r\nHOST\r\nX: \u00e9\r\nTOKEN\r\n\r\n", 200),
    "5 name in any case": ("GET /state HTTP/1.1\r\nHOST\r\nTOKEN\r\ncONTENT-lENGTH: 0\r\n\r\n", 200),
    "6 Transfer-Encoding in any case": ("POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: Chunked\r\nTOKEN\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200),
    "6.2 Content-Length with leading zeros": ("POST /echo HTTP/1.1\r\nHOST\r\nContent-Length: 005\r\nTOKEN\r\n\r\nhello", 200),
    "7.1 chunk extensions": ("POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n5;a=b;c=\"d\"\r\nhello\r\n0\r\n\r\n", 200),
    "7.1.2 trailers": ("POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", 200),
    "7.1 size in upper case with zeros": ("POST /echo HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTOKEN\r\n\r\n000A\r\n0123456789\r\n0\r\n\r\n", 200),
    "9.3 HTTP/1.0 with keep-alive": ("GET /state HTTP/1.0\r\nHOST\r\nConnection: keep-alive\r\nTOKEN\r\n\r\n", 200),
    "9.6 Connection lists a field that ends here": ("GET /state HTTP/1.1\r\nHOST\r\nConnection: x-gone\r\nX-Gone: 1\r\nTOKEN\r\n\r\n", 200),
    "9.6 Connection cannot take the length away": ("POST /echo HTTP/1.1\r\nHOST\r\nConnection: content-length\r\nContent-Length: 5\r\nTOKEN\r\n\r\nhello", 200),
}  # fmt: skip


def exchange(guest: dict[str, Any], text: str) -> tuple[int, bytes]:
    """The status (0: closed without one) and all that came until the end or the answer's end."""
    data = (
        text.replace("HOST", f"Host: {guest['endpoint']}")
        .replace("AUTHORITY", guest["endpoint"])
        .replace("TOKEN", f"X-aws-proxy-auth: {guest['token']}")
    )
    context = ssl.create_default_context(cafile=guest["ca"])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", guest["port"]), 10), server_hostname=guest["host"]) as one:
        one.sendall(data.encode("latin-1", "xmlcharrefreplace") if "\u0665" not in data else data.encode())
        received = b""
        while b"\r\n\r\n" not in received:
            try:
                piece = one.recv(65536)
            except (ssl.SSLError, ConnectionError):
                break
            if not piece:
                break
            received += piece
    return (int(received.split(b" ")[1]) if received.startswith(b"HTTP/1.") else 0), received


@pytest.fixture(scope="module")
def counted(guest: dict[str, Any]) -> int:
    return int(get(guest["endpoint"], guest["ca"], guest["token"], "/state").json()["counter"])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(guest: dict[str, Any], counted: int, name: str) -> None:
    status, received = exchange(guest, REFUSED[name])
    assert status in (400, 408, 431, 501, 505) and b"\r\nConnection: close" in received, received[:200]


def test_none_of_the_refused_reached_the_application(guest: dict[str, Any], counted: int) -> None:
    assert get(guest["endpoint"], guest["ca"], guest["token"], "/state").json()["counter"] == counted
    assert len(REFUSED) >= 150


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(guest: dict[str, Any], name: str) -> None:
    text, wanted = ACCEPTED[name]
    status, received = exchange(guest, text)
    assert status == wanted, received[:200]
