"""Heads of HTTP/1.1 (gateway/edge/wire/http1_head.py): what was compiled and its source agree, and what goes on reads the same again."""

from __future__ import annotations

import dataclasses
from typing import Any

from sources import source

from gateway.edge.wire import http1_head as compiled

written = source("wire.http1_head")
TRACED = ("edge_sources.wire.http1_head",)
WORDS = (b"\r\n", b"\n", b"\r", b"\0", b": ", b" ", b"\t", b"Host: a.example", b"Connection: close, x", b"Content-Length: 1", b"Content-Length: 1, 1",
         b"Transfer-Encoding: chunked", b"Upgrade: websocket", b"Connection: upgrade", b"Keep-Alive: timeout=5", b"Max-Forwards: 3", b"TE: trailers",
         b"http://u@b/", b"http://[::1]:80?x", b"HTTP/1.0", b"OPTIONS *", b"TRACE", b"HTTP/1.1 101 X", b"HTTP/1.1 204", b"HTTP/1.0 200 OK",
         b"Sec-WebSocket-Protocol: lambda-microvms, lambda-microvms.port.80, a", b"X-aws-proxy-auth: t", b"X-aws-proxy-port: 1", b"X-aws-proxy-force-h2: true",
         b"X_Amzn-RequestId: x", b"Expect: 100-continue", b"\xff", b"\x0b")  # fmt: skip


def seeds() -> list[bytes]:
    return [
        b"GET / HTTP/1.1\r\nHost: a.example\r\nAccept: */*", b"POST /x?y HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 5\r\nExpect: 100-continue",
        b"POST http://b.example/z HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", b"GET / HTTP/1.0\r\nConnection: keep-alive", b"OPTIONS * HTTP/1.1\r\nHost: [::1]\r\nMax-Forwards: 3",
        b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Protocol: lambda-microvms.authentication.t, chat",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nDate: x", b"HTTP/1.0 404 No\r\nConnection: keep-alive\r\nContent-Length: 0", b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade",
        b"HTTP/1.1 200\nTransfer-Encoding: chunked\nX: a\x01b\nKeep-Alive: timeout=5\n\n",
    ]  # fmt: skip


def _told(module: Any, name: str, *given: Any) -> Any:
    try:
        head = getattr(module, name)(*given)
    except module.Malformed as error:
        return str(error), error.status
    return {one.name: getattr(head, one.name) for one in dataclasses.fields(head)}


def check(data: bytes) -> None:
    line, _, rest = data.partition(b"\r\n")
    block = b"\r\n" + rest if rest else b""
    request = _told(written, "parse_request", line, block, 50)
    assert request == _told(compiled, "parse_request", line, block, 50), "two readings of a request"
    for is_head in (False, True):
        response = _told(written, "parse_response", data, 50, is_head)
        assert response == _told(compiled, "parse_response", data, 50, is_head), "two readings of a response"
    assert written.find_end(data) == compiled.find_end(data)
    if isinstance(request, dict):
        _goes_on(request)
    if isinstance(response, dict):
        again = compiled.parse_response(response["status_line"] + response["block"], 50, False)
        assert (again.status, again.block) == (response["status"], response["block"]), "a response that goes on reads otherwise"


def _goes_on(first: dict[str, Any]) -> None:
    assert not any(name.startswith(b"x-aws-proxy-") for name, _ in compiled.split_block(first["block"])) and b"\n" not in first[
        "block"
    ].replace(b"\r\n", b"")
    method = first["method"] + b" " + first["target"] + b" HTTP/1.%d" % first["minor"]
    second = compiled.parse_request(method, first["block"], 60)
    assert (second.host, second.framing, second.length) == (first["host"], first["framing"], first["length"]), (
        "a request that goes on reads otherwise"
    )
