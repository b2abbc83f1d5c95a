"""Requests that are made to be read in two ways, each named after what it tries (RFC 9110, RFC 9112, RFC 9113, published classes of bugs).

HOST and TOKEN stand for a client's own fields, EVIL for the request that is to be smuggled, SIZE for the length of what follows the head. A
case says how the edge answers, and what it means to send on: method, target and body.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EVIL = b"GET /evil HTTP/1.1\r\nHost: x\r\nX-Evil: 1\r\n\r\n"
LAST = b"0\r\n\r\n"
Meant = tuple[str, str, bytes]


@dataclass
class Case:
    data: bytes
    statuses: tuple[int, ...] = (400,)  # of the answers, one after the other; the last that is no 200 ends the connection
    meant: tuple[Meant, ...] = ()
    is_cut: bool = False  # the client leaves where the request has not come whole: nobody is answered
    or_refused: bool = False  # by the application: it may answer anything, and need not have seen the request


def post(fields: bytes, body: bytes = b"", line: bytes = b"POST /a HTTP/1.1", head_end: bytes = b"\r\n\r\n") -> bytes:
    """A request with these fields behind the client's own."""
    body = body.replace(b"EVIL", EVIL)
    return line + b"\r\nHOST\r\nTOKEN" + (b"\r\n" + fields if fields else b"").replace(b"SIZE", b"%d" % len(body)) + head_end + body


def goes_on(fields: bytes, body: bytes, meant: bytes | None = None, line: bytes = b"POST /a HTTP/1.1", **more: bool) -> Case:
    """A request with one meaning, which the application gets."""
    method, target, _ = line.decode().split(" ")
    content = (body if meant is None else meant).replace(b"EVIL", EVIL)
    return Case(post(fields, body, line), (200,), ((method, target, content),), **more)


def chunks(body: bytes) -> Case:
    return Case(post(b"Transfer-Encoding: chunked", body))


CL, TE = b"Content-Length: SIZE", b"Transfer-Encoding: chunked"

TWO_FRAMINGS = {
    "CL.TE": Case(post(CL + b"\r\n" + TE, LAST + b"EVIL")),
    "CL.TE, the coding first": Case(post(TE + b"\r\n" + CL, LAST + b"EVIL")),
    "TE.CL": Case(post(b"Content-Length: 4\r\n" + TE, b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL))),
    "TE.CL, the coding first": Case(post(TE + b"\r\nContent-Length: 4", b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL))),
    "TE.0: the application takes no body from OPTIONS": goes_on(TE, b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL), EVIL, b"OPTIONS /a HTTP/1.1"),
    "CL.TE of HTTP/1.0": Case(post(CL + b"\r\n" + TE, LAST + b"EVIL", b"POST /a HTTP/1.0")),
    "TE of HTTP/1.0": Case(post(TE, LAST + b"EVIL", b"POST /a HTTP/1.0")),
    "CL.TE, Connection takes the coding away": Case(post(b"Connection: transfer-encoding\r\n" + CL + b"\r\n" + TE, LAST + b"EVIL")),
    "CL.TE, Connection takes the length away": Case(post(b"Connection: content-length\r\n" + CL + b"\r\n" + TE, LAST + b"EVIL")),
}

# A coding that one reader knows and another does not, beside a length.
CODINGS = {
    f"TE.TE {obfuscated!r}": Case(post(obfuscated + b"\r\n" + CL, LAST + b"EVIL"))
    for obfuscated in (
        b"Transfer-Encoding: xchunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: \x0cchunked", b"Transfer-Encoding: chunked\x00", b"Transfer-Encoding: \xa0chunked", b'Transfer-Encoding: "chunked"',
        b"Transfer-Encoding: 'chunked'", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity, chunked", b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: ,chunked", b"Transfer-Encoding: chunked,", b"Transfer-Encoding: chunked chunked", b"Transfer-Encoding: CHUNKED",
        b"Transfer-Encoding:\r\n chunked", b"Transfer-Encoding: x\r\n chunked", b"Transfer-Encoding\r\n: chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: identity", b" Transfer-Encoding: chunked", b"\tTransfer-Encoding: chunked",
        b"X: x\nTransfer-Encoding: chunked", b"X: x\rTransfer-Encoding: chunked", b"X: x\r\n\rTransfer-Encoding: chunked", b"X: x\x00\r\nTransfer-Encoding: chunked",
        b"X: x\n\nTransfer-Encoding: chunked", b"Transfer-Encoding\x00: chunked", b"Transfer Encoding: chunked", b"\xefTransfer-Encoding: chunked",
        b"Transfer-Encoding: cow\r\n" + TE, b"Transfer-Encoding:", b"Transfer-Encoding chunked", b"Transfer-Encoding=: chunked",
    )
} | {
    "TE.TE, a name that CGI takes for the coding's": goes_on(b"Transfer_Encoding: chunked\r\n" + CL, LAST + b"EVIL"),
    "TE.TE, a name that ends like the coding's": goes_on(b"X-Transfer-Encoding: chunked\r\n" + CL, LAST + b"EVIL"),
    "TE, deflated before it is chunked": Case(post(b"Transfer-Encoding: gzip, chunked", LAST + b"EVIL"), (501,)),
    "TE, chunked twice": Case(post(b"Transfer-Encoding: chunked, chunked", LAST + b"EVIL")),
}  # fmt: skip

LENGTHS = {
    f"CL {lengths!r}": Case(post(lengths, b"EVIL"))
    for lengths in (
        b"Content-Length: 0\r\nContent-Length: SIZE", b"Content-Length: SIZE\r\nContent-Length: 0", b"Content-Length: SIZE\r\nContent-Length: SIZE",
        b"Content-Length: SIZE, SIZE", b"Content-Length: 0, SIZE", b"Content-Length: +SIZE", b"Content-Length: -SIZE", b"Content-Length: 0x0", b"Content-Length: 0_0",
        b"Content-Length: SIZE 0", b"Content-Length: 0\x0b", b"Content-Length: \x0bSIZE", b"Content-Length: 0.0", b"Content-Length: 0e0", b"Content-Length:",
        b"Content-Length: \"SIZE\"", b"Content-Length: SIZE;", b"Content-Length : SIZE", b" Content-Length: SIZE", b"Content-Length\x00: SIZE", b"Content-Length\r\n : SIZE",
        b"Content-Length:\r\n SIZE", b"Content-Length: 0\r\n SIZE", b"X: x\nContent-Length: SIZE", b"Content-Length: 0\nContent-Length: SIZE", b"Content-Length: 18446744073709551616",
        b"Content-Length: 99999999999999999999999", b"Content-Length: \xb2",
    )
} | {
    "CL with leading zeros": goes_on(b"Content-Length: 000SIZE", b"EVIL"),
    "CL beside a name that CGI takes for it": goes_on(b"Content_Length: 0\r\n" + CL, b"EVIL"),
    "CL with white space around": goes_on(b"Content-Length: \t SIZE \t", b"EVIL"),
    "CL with no space before": goes_on(b"content-LENGTH:SIZE", b"EVIL"),
}  # fmt: skip

LINES = {
    "bare LF ends the line": Case(post(CL, b"EVIL").replace(b"HTTP/1.1\r\n", b"HTTP/1.1\n", 1)),
    "bare LF ends the head": Case(post(b"X: y", b"EVIL", b"GET /a HTTP/1.1", b"\r\n\n")),
    "two bare LF end the head": Case(post(b"X: y", b"EVIL", b"GET /a HTTP/1.1", b"\n\n")),
    "bare CR ends a field": Case(post(b"X: y\r" + CL, b"EVIL")),
    "bare CR ends the head": Case(post(b"X: y", b"EVIL", b"GET /a HTTP/1.1", b"\r\r\n\r\n")),
    "folded field": Case(post(b"X: y\r\n " + CL, b"EVIL")),
    "folded field with a tab": Case(post(b"X: y\r\n\t" + CL, b"EVIL")),
    "first field is folded": Case(post(CL, b"EVIL").replace(b"\r\nHOST", b"\r\n HOST", 1)),
    "line without a colon": Case(post(b"X\r\n" + CL, b"EVIL")),
    "empty name": Case(post(b": y\r\n" + CL, b"EVIL")),
    "NUL in a value": Case(post(b"X: y\x00z\r\n" + CL, b"EVIL")),
    "NUL in a name": Case(post(b"X\x00: y\r\n" + CL, b"EVIL")),
    "line of HTTP/0.9 before the request": Case(b"GET /evil\r\n" + post(CL, b"EVIL")),
    "version with white space behind": Case(post(CL, b"EVIL", b"POST /a HTTP/1.1 ")),
    "version 1.10": Case(post(CL, b"EVIL", b"POST /a HTTP/1.10")),
    "version 2.0": Case(post(CL, b"EVIL", b"POST /a HTTP/2.0"), (400,)),
    "version twice": Case(post(CL, b"EVIL", b"POST /a HTTP/1.1 HTTP/1.1")),
    "request in the target": Case(post(CL, b"EVIL", b"GET /a HTTP/1.1\rGET /evil HTTP/1.1")),
    "tab for a space": Case(post(CL, b"EVIL", b"POST\t/a\tHTTP/1.1")),
    "two spaces": Case(post(CL, b"EVIL", b"POST  /a HTTP/1.1")),
    "empty lines before": Case(b"\r\n\r\n" + post(CL, b"EVIL"), (200,), (("POST", "/a", EVIL),)),
    "white space before": Case(b" " + post(CL, b"EVIL")),
    "NUL before": Case(b"\x00" + post(CL, b"EVIL")),
}

CHUNKS = {
    "bare LF behind a size": chunks(b"1\nx\r\n" + LAST + b"EVIL"),
    "bare LF behind a chunk": chunks(b"1\r\nx\n" + LAST + b"EVIL"),
    "bare CR behind a size": chunks(b"1\rx\r\n" + LAST + b"EVIL"),
    "bare LF in the end": chunks(b"1\r\nx\r\n0\n\nEVIL"),
    "bare LF in the end, after a CRLF": chunks(b"1\r\nx\r\n0\r\n\nEVIL"),
    "bare CR in the end": chunks(b"1\r\nx\r\n0\r\n\rEVIL"),
    "TERM.EXT: bare LF in an extension": chunks(b"1;\nx\r\n" + LAST + b"EVIL"),
    "TERM.EXT: bare LF in a value of one": chunks(b"1;a=b\nx\r\n" + LAST + b"EVIL"),
    "TERM.EXT: bare CR in an extension": chunks(b"1;a\rb\r\nx\r\n" + LAST + b"EVIL"),
    "EXT.TERM: an extension that is not closed": chunks(b'1;a="\r\nx\r\n' + LAST + b"EVIL"),
    "EXT.TERM: CRLF in a quoted value": chunks(b'1;a="b\r\nx"\r\nx\r\n' + LAST + b"EVIL"),
    "EXT.TERM: NUL in an extension": chunks(b"1;a=\x00\r\nx\r\n" + LAST + b"EVIL"),
    "TERM.SPILL: two bytes behind a chunk that are no CRLF": chunks(b"5\r\nhelloXX0\r\n\r\nEVIL"),
    "SPILL.TERM: a chunk longer than its size": chunks(b"5\r\nhello-more\r\n" + LAST + b"EVIL"),
    "SPILL.TERM: a chunk shorter than its size": chunks(b"8\r\nhello\r\n" + LAST + b"EVIL"),
    "size with 0x": chunks(b"0x1\r\nx\r\n" + LAST + b"EVIL"),
    "size with a sign": chunks(b"+1\r\nx\r\n" + LAST + b"EVIL"),
    "size below nothing": chunks(b"-1\r\nx\r\n" + LAST + b"EVIL"),
    "size with an underscore": chunks(b"0_1\r\nx\r\n" + LAST + b"EVIL"),
    "size with a space before": chunks(b" 1\r\nx\r\n" + LAST + b"EVIL"),
    "size with a space behind": chunks(b"1 \r\nx\r\n" + LAST + b"EVIL"),
    "size with a vertical tab": chunks(b"1\x0b\r\nx\r\n" + LAST + b"EVIL"),
    "size beyond 64 bits": chunks(b"10000000000000001\r\nx\r\n" + LAST + b"EVIL"),
    "size of 64 bits": chunks(b"ffffffffffffffff\r\nx\r\n" + LAST + b"EVIL"),
    "size of many zeros": chunks(b"0" * 40 + b"1\r\nx\r\n" + LAST + b"EVIL"),
    "empty size": chunks(b"\r\nx\r\n" + LAST + b"EVIL"),
    "extension alone": chunks(b";a\r\nx\r\n" + LAST + b"EVIL"),
    "extension too long": chunks(b"1;" + b"a" * 5000 + b"\r\nx\r\n" + LAST + b"EVIL"),
    "extensions too long together": chunks(b"".join(b"1;" + b"a" * 2000 + b"\r\nx\r\n" for _ in range(10)) + LAST + b"EVIL"),
    "trailer that is folded": chunks(b"1\r\nx\r\n0\r\nX: y\r\n z\r\n\r\nEVIL"),
    "trailer with a bare LF": chunks(b"1\r\nx\r\n0\r\nX: y\nContent-Length: 50\r\n\r\nEVIL"),
    "trailer without a colon": chunks(b"1\r\nx\r\n0\r\nEVIL\r\n\r\n"),
    "trailer with a space before its colon": chunks(b"1\r\nx\r\n0\r\nX : y\r\n\r\nEVIL"),
    "extensions are not passed on": goes_on(TE, b'1;a=b;c="d;\xff"\r\nx\r\n0;e\r\n\r\n', b"x"),
    "size with zeros before": goes_on(TE, b"0001\r\nx\r\n000\r\n\r\n", b"x"),
    "trailer that would be a length": goes_on(TE, b"1\r\nx\r\n0\r\nContent-Length: 50\r\n\r\n", b"x"),
    "trailer that would be a coding": goes_on(TE, b"1\r\nx\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", b"x"),
    "trailers that would be of the head": goes_on(TE, b"1\r\nx\r\n0\r\nHost: evil\r\nX-aws-proxy-port: 1\r\nX-Forwarded-For: evil\r\nCookie: evil\r\n\r\n", b"x"),
    "trailing garbage": Case(post(TE, b"1\r\nx\r\n0\r\n\r\nx EVIL"), (200, 400), (("POST", "/a", b"x"),)),
    "a request behind, that has no token": Case(post(TE, b"1\r\nx\r\n0\r\n\r\nEVIL"), (200, 403), (("POST", "/a", b"x"),)),
    "the client leaves in a chunk": Case(post(TE, b"100\r\nEVIL"), (), (), is_cut=True),
    "the client leaves before the last chunk": Case(post(TE, b"1\r\nx\r\n"), (), (), is_cut=True),
    "the client leaves in the trailers": Case(post(TE, b"1\r\nx\r\n0\r\nX: y"), (), (), is_cut=True),
}  # fmt: skip

NO_BODIES = {
    "0.CL: GET with a body": goes_on(CL, b"EVIL", line=b"GET /a HTTP/1.1"),
    "0.CL: HEAD with a body": goes_on(CL, b"EVIL", line=b"HEAD /a HTTP/1.1"),
    "0.CL: DELETE with a body": goes_on(CL, b"EVIL", line=b"DELETE /a HTTP/1.1"),
    "0.CL: OPTIONS with a body": goes_on(CL, b"EVIL", line=b"OPTIONS /a HTTP/1.1"),
    "0.TE: GET with chunks": goes_on(TE, b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL), EVIL, b"GET /a HTTP/1.1"),
    "0.CL: an unknown method with a body": goes_on(CL, b"EVIL", line=b"PROPFIND /a HTTP/1.1"),
    "CL.0: Expect, and the body at once": goes_on(b"Expect: 100-continue\r\n" + CL, b"EVIL", or_refused=True),
    "a body behind a length of nothing": Case(post(b"Content-Length: 0", b"EVIL"), (200, 403), (("POST", "/a", b""),)),
    "a body without a length": Case(post(b"", b"EVIL"), (200, 403), (("POST", "/a", b""),)),
    "a body behind a GET": Case(post(b"", b"EVIL", b"GET /a HTTP/1.1"), (200, 403), (("GET", "/a", b""),)),
    "more than the length": Case(post(b"Content-Length: 1", b"xEVIL"), (200, 403), (("POST", "/a", b"x"),)),
    "the client leaves before the length is reached": Case(post(b"Content-Length: 500", b"EVIL"), (), (), is_cut=True),
    "the client leaves with nothing of the body sent": Case(post(b"Content-Length: 500"), (), (), is_cut=True),
} | {
    f"CL.0: obfuscated Expect {expect!r}": goes_on(expect + b"\r\n" + CL, b"EVIL", or_refused=True)
    for expect in (
        b"Expect: y 100-continue", b"Expect: 100-continue, 100-continue", b"Expect: 100-continue\r\nExpect: 100-continue", b"Expect:\t100-CONTINUE", b"Expect: 100-continue;x",
        b"Expect: y", b"Expect: ", b"Expect: 100-continue y",
    )
}  # fmt: skip

EARLY = {
    "early answer: the body is a request": goes_on(CL, b"EVIL", b"", b"POST /early HTTP/1.1"),
    "early answer: chunks": goes_on(TE, b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL), b"", b"POST /early HTTP/1.1"),
    "early answer: Expect": goes_on(b"Expect: 100-continue\r\n" + CL, b"EVIL", b"", b"POST /early HTTP/1.1", or_refused=True),
    "early answer: a GET with a body": goes_on(CL, b"EVIL", b"", b"GET /early HTTP/1.1"),
}

HOSTS = {
    "absolute form with another Host": Case(post(b"", b"", b"GET http://AUTHORITY/a HTTP/1.1").replace(b"HOST", b"Host: evil"), (200,), (("GET", "/a", b""),)),
    "absolute form of another host": Case(post(b"", b"", b"GET http://evil/a HTTP/1.1"), (403,)),
    "absolute form with user information": Case(post(b"", b"", b"GET http://AUTHORITY@evil/a HTTP/1.1")),
    "absolute form without a path": Case(post(b"", b"", b"GET http://AUTHORITY?x HTTP/1.1"), (200,), (("GET", "/?x", b""),)),
    "absolute form of another scheme": Case(post(b"", b"", b"GET gopher://AUTHORITY/a HTTP/1.1")),
    "authority form": Case(post(b"", b"", b"GET AUTHORITY HTTP/1.1")),
    "CONNECT": Case(post(b"", b"EVIL", b"CONNECT AUTHORITY HTTP/1.1")),
    "CONNECT of a path": Case(post(b"", b"EVIL", b"CONNECT /a HTTP/1.1")),
    "two Hosts": Case(post(b"Host: evil", b"", b"GET /a HTTP/1.1")),
    "two Hosts that are equal": Case(post(b"HOST", b"", b"GET /a HTTP/1.1")),
    "Host with a comma": Case(post(b"", b"", b"GET /a HTTP/1.1").replace(b"HOST", b"Host: AUTHORITY, evil")),
    "Host with user information": Case(post(b"", b"", b"GET /a HTTP/1.1").replace(b"HOST", b"Host: evil@AUTHORITY")),
    "Host with a path": Case(post(b"", b"", b"GET /a HTTP/1.1").replace(b"HOST", b"Host: AUTHORITY/evil")),
    "Host with a space before its colon": Case(post(b"Host : evil", b"", b"GET /a HTTP/1.1")),
    "Host that is folded": Case(post(b"", b"", b"GET /a HTTP/1.1").replace(b"HOST", b"HOST\r\n evil")),
    "no Host": Case(post(b"", b"", b"GET /a HTTP/1.1").replace(b"HOST\r\n", b"")),
    "target that looks like a host": goes_on(b"", b"", line=b"GET //evil/a HTTP/1.1"),
    "target with an encoded request": goes_on(b"", b"", line=b"GET /a%20HTTP/1.1%0d%0aX:%20y HTTP/1.1"),
    "target with dots": goes_on(b"", b"", line=b"GET /a/..;/../%2e%2e/evil HTTP/1.1"),
    "asterisk of a GET": Case(post(b"", b"", b"GET * HTTP/1.1")),
}  # fmt: skip

CONNECTIONS = {
    f"Connection names {name!r}": goes_on(b"Connection: " + name + b"\r\n" + CL, b"EVIL")
    for name in (
        b"content-length", b"host", b"x-aws-proxy-auth", b"x-aws-proxy-port", b"x-amzn-requestid", b"authorization", b"content-length, host", b"CONTENT-LENGTH",
        b"keep-alive, content-length", b"x\r\nConnection: content-length",
    )
} | {
    "Connection names the coding": goes_on(b"Connection: transfer-encoding\r\n" + TE, b"%x\r\nEVIL\r\n0\r\n\r\n" % len(EVIL), EVIL),
    "Connection is no token": goes_on(b"Connection: ;content-length\r\n" + CL, b"EVIL"),
    "Proxy-Connection ends here": goes_on(b"Proxy-Connection: close\r\n" + CL, b"EVIL"),
    "Keep-Alive ends here": goes_on(b"Keep-Alive: timeout=1, max=1\r\n" + CL, b"EVIL"),
    "TE ends here": goes_on(b"TE: chunked\r\n" + CL, b"EVIL"),
    "the edge's own field from a client": goes_on(b"X-Amzn-RequestId: evil\r\nX_Amzn_RequestId: evil\r\n" + CL, b"EVIL"),
    "two ports": Case(post(b"X-aws-proxy-port: 1", b"EVIL")),
    "two tokens": Case(post(b"X-aws-proxy-auth: evil", b"EVIL")),
}  # fmt: skip

UPGRADES = {
    "h2c, and its preface": Case(
        post(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nEVIL", b"GET /a HTTP/1.1"),
        (200, 400), (("GET", "/a", b""),)),
    "h2c with Upgrade in Connection alone": Case(post(b"Connection: Upgrade\r\nUpgrade: h2c", b"EVIL", b"GET /a HTTP/1.1"), (200, 403), (("GET", "/a", b""),)),
    "h2c in a list": Case(post(b"Connection: Upgrade\r\nUpgrade: foo, h2c", b"EVIL", b"GET /a HTTP/1.1"), (200, 403), (("GET", "/a", b""),)),
    "h2c of a request with a body": goes_on(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n" + CL, b"EVIL"),
    "TLS": Case(post(b"Connection: Upgrade\r\nUpgrade: TLS/1.2", b"EVIL", b"GET /a HTTP/1.1"), (200, 403), (("GET", "/a", b""),)),
    "WebSocket of a version that nobody has": Case(
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", b"EVIL", b"GET /a HTTP/1.1"),
        (200, 403), (("GET", "/a", b""),)),
    "WebSocket that is not taken up": Case(
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", b"EVIL", b"GET /a HTTP/1.1"),
        (200, 403), (("GET", "/a", b""),)),
    "WebSocket of a request with a body": goes_on(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" + CL, b"EVIL"),
    "HTTP/2's preface behind a request": Case(post(b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nEVIL", b"GET /a HTTP/1.1"), (200, 400), (("GET", "/a", b""),)),
}  # fmt: skip

HTTP1: dict[str, dict[str, Case]] = {
    "two framings": TWO_FRAMINGS, "codings": CODINGS, "lengths": LENGTHS, "lines": LINES, "chunks": CHUNKS, "no bodies": NO_BODIES, "early": EARLY,
    "hosts": HOSTS, "connections": CONNECTIONS, "upgrades": UPGRADES,
}  # fmt: skip


@dataclass
class Downgrade:
    """A request of HTTP/2, for an application that speaks HTTP/1.1. Pseudo-header fields are the usual ones unless the case has others."""

    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    pseudo: dict[bytes, bytes | None] = field(default_factory=dict)
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    outcome: str = "reset PROTOCOL_ERROR"
    meant: tuple[Meant, ...] = ()


def passes(fields: list[tuple[bytes, bytes]], body: bytes, meant: Meant, **more: list[tuple[bytes, bytes]]) -> Downgrade:
    return Downgrade(fields, body, outcome="answer 200", meant=(meant,), **more)


_SPLIT = b"\r\n\r\n" + EVIL
HTTP2 = {
    # The head goes on before its body has come, which is then taken for no request.
    "H2.CL: a length of nothing": Downgrade([(b"content-length", b"0")], EVIL, meant=(("POST", "/a", b""),)),
    "H2.CL: a length that is less": Downgrade([(b"content-length", b"1")], EVIL),
    "H2.CL: a length that is more": Downgrade([(b"content-length", b"500")], EVIL),
    "H2.CL: two lengths": Downgrade([(b"content-length", b"0"), (b"content-length", b"%d" % len(EVIL))], EVIL),
    "H2.CL: a length with a sign": Downgrade([(b"content-length", b"+%d" % len(EVIL))], EVIL),
    "H2.CL: a length that is a list": Downgrade([(b"content-length", b"0, %d" % len(EVIL))], EVIL),
    "H2.TE": Downgrade([(b"transfer-encoding", b"chunked")], LAST + EVIL),
    "H2.TE beside a length": Downgrade([(b"content-length", b"%d" % len(LAST + EVIL)), (b"transfer-encoding", b"chunked")], LAST + EVIL),
    "H2.TE, a name with a space": Downgrade([(b"transfer-encoding ", b"chunked")], LAST + EVIL),
    "H2.TE, a name with a space before": Downgrade([(b" transfer-encoding", b"chunked")], LAST + EVIL),
    "H2.TE, a name in upper case": Downgrade([(b"Transfer-Encoding", b"chunked")], LAST + EVIL),
    "H2.TE, in a name": Downgrade([(b"x: y\r\ntransfer-encoding", b"chunked")], LAST + EVIL),
    "H2.TE, in a name with its value": Downgrade([(b"transfer-encoding: chunked\r\nx", b"y")], LAST + EVIL),
    "H2.TE, in a value": Downgrade([(b"x", b"y\r\ntransfer-encoding: chunked")], LAST + EVIL),
    "H2.TE, in a value by LF": Downgrade([(b"x", b"y\ntransfer-encoding: chunked")], LAST + EVIL),
    "H2.TE, in a value by CR": Downgrade([(b"x", b"y\rtransfer-encoding: chunked")], LAST + EVIL),
    "H2.TE, in a cookie": Downgrade([(b"cookie", b"y\r\ntransfer-encoding: chunked")], LAST + EVIL),
    "H2.TE, in the token": Downgrade([(b"x-aws-proxy-force-h2", b"false\r\ntransfer-encoding: chunked")], LAST + EVIL),
    "a request in a value": Downgrade([(b"x", b"y" + _SPLIT)]),
    "a request in a name": Downgrade([(b"x: y" + _SPLIT + b"z", b"z")]),
    "a request in :path": Downgrade(pseudo={b":path": b"/a HTTP/1.1\r\nHost: x" + _SPLIT}),
    "a request in :path, without CR": Downgrade(pseudo={b":path": b"/a HTTP/1.1\nHost: x\n\n" + EVIL}),
    "a version in :path": Downgrade(pseudo={b":path": b"/a HTTP/1.1 "}),
    "a tab in :path": Downgrade(pseudo={b":path": b"/a\tHTTP/1.1"}),
    ":path that is a URI": Downgrade(pseudo={b":path": b"http://evil/a"}),
    ":path that is an asterisk": Downgrade(pseudo={b":path": b"*"}),
    "a request in :method": Downgrade(pseudo={b":method": b"GET /evil HTTP/1.1\r\nHost: x\r\n\r\nGET"}),
    "a line in :method": Downgrade(pseudo={b":method": b"GET /evil HTTP/1.1"}),
    "a request in :scheme": Downgrade(pseudo={b":scheme": b"https://evil/x HTTP/1.1" + _SPLIT}),
    ":scheme that is a prefix": Downgrade(pseudo={b":scheme": b"http://evil/?"}),
    "a request in :authority": Downgrade(pseudo={b":authority": b"AUTHORITY" + _SPLIT}),
    "user information in :authority": Downgrade(pseudo={b":authority": b"evil@AUTHORITY"}),
    "a path in :authority": Downgrade(pseudo={b":authority": b"AUTHORITY/evil"}),
    "a Host that differs": Downgrade([(b"host", b"evil")]),
    "two Hosts": Downgrade([(b"host", b"AUTHORITY"), (b"host", b"evil")]),
    "a name with a colon": Downgrade([(b"host:evil", b"x")]),
    "a pseudo-header field with a colon more": Downgrade([(b"::path", b"/evil")]),
    "an empty name": Downgrade([(b"", b"x")]),
    "a NUL in a value": Downgrade([(b"x", b"y\x00z")]),
    "white space before a value": Downgrade([(b"x", b" y")]),
    "Connection": Downgrade([(b"connection", b"content-length")], EVIL),
    "Proxy-Connection": Downgrade([(b"proxy-connection", b"keep-alive")]),
    "Upgrade to h2c": Downgrade([(b"upgrade", b"h2c"), (b"http2-settings", b"AAMAAABkAAQAAP__")]),
    "TE that is not trailers": Downgrade([(b"te", b"trailers, chunked")]),
    "CONNECT": Downgrade(pseudo={b":method": b"CONNECT"}),
    "CONNECT without a path": Downgrade(pseudo={b":method": b"CONNECT", b":path": None, b":scheme": None}),
    "trailers with a pseudo-header field": Downgrade([], b"x", trailers=[(b":path", b"/evil")]),
    "trailers with CRLF": Downgrade([], b"x", trailers=[(b"x", b"y" + _SPLIT)]),
    "trailers that are a coding": Downgrade([], b"x", trailers=[(b"transfer-encoding", b"chunked")]),
    "a body without a length": passes([], EVIL, ("POST", "/a", EVIL)),
    "a body that is the end of chunks": passes([], LAST + EVIL, ("POST", "/a", LAST + EVIL)),
    "a body with its length": passes([(b"content-length", b"%d" % len(EVIL))], EVIL, ("POST", "/a", EVIL)),
    "trailers that are a length": passes([], b"x", ("POST", "/a", b"x"), trailers=[(b"content-length", b"50"), (b"host", b"evil")]),
    "a name that CGI takes for the coding's": passes([(b"transfer_encoding", b"chunked")], LAST + EVIL, ("POST", "/a", LAST + EVIL)),
}  # fmt: skip
