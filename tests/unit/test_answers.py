"""An answer's framing is checked against what came, from every kind of application to every kind of client, trailers included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig
from h2_client import Judge, OnHead, speaks_h2
from waiting import until

from gateway.edge.wire import http2_frames as f


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


def head(stream: int, status: int, length: int | None, end: bool = False) -> bytes:
    fields = [] if length is None else [(b"content-length", b"%d" % length)]
    return f.headers(stream, f.encode_status(status) + f.encode(fields), end)


def data(stream: int, payload: bytes, end: bool = False) -> bytes:
    return f.frame(f.DATA, f.END_STREAM if end else 0, stream, payload)


def trailers(stream: int) -> bytes:
    return f.headers(stream, f.encode([(b"x-sum", b"1")]), True)


# Each malformed (RFC 9113, 8.1.1), and whether the answer's head can have gone on to the client by then.
MALFORMED: dict[str, tuple[str, bool, OnHead]] = {
    "a length, and END_STREAM with the head": ("GET", False, lambda n: head(n, 200, 8, end=True)),
    "less than its length, then trailers": ("GET", True, lambda n: head(n, 200, 8) + data(n, b"four") + trailers(n)),
    "a length, then trailers alone": ("GET", True, lambda n: head(n, 200, 8) + trailers(n)),
    "less than its length": ("GET", True, lambda n: head(n, 200, 8) + data(n, b"four", end=True)),
    "more than its length": ("GET", True, lambda n: head(n, 200, 2) + data(n, b"four", end=True)),
    "content in an answer to HEAD": ("HEAD", True, lambda n: head(n, 200, 4) + data(n, b"four", end=True)),
    "content in a 204": ("GET", True, lambda n: head(n, 204, None) + data(n, b"four", end=True)),
    "content in a 304": ("GET", True, lambda n: head(n, 304, 4) + data(n, b"four", end=True)),
    "an interim response that ends the stream": ("GET", False, lambda n: head(n, 103, None, end=True)),
    "content before the head": ("GET", False, lambda n: data(n, b"four")),
}
GOOD: dict[str, tuple[str, OnHead, bytes]] = {
    "no content with a length, to HEAD": ("HEAD", lambda n: head(n, 200, 8, end=True), b""),
    "no content, in two frames": ("GET", lambda n: head(n, 204, None) + data(n, b"", end=True), b""),
    "304 with the length of what is not sent": ("GET", lambda n: head(n, 304, 8, end=True), b""),
    "a length, and trailers": ("GET", lambda n: head(n, 200, 4) + data(n, b"four") + trailers(n), b"four"),
    "no length, and trailers": ("GET", lambda n: head(n, 200, None) + data(n, b"four") + trailers(n), b"four"),
    "nothing": ("GET", lambda n: head(n, 200, 0, end=True), b""),
}


def http1(rig: Rig, method: str) -> bytes:
    return rig.request("/", "X-aws-proxy-force-h2: true", method=method)


@pytest.mark.parametrize(("method", "head_sent", "answer"), MALFORMED.values(), ids=list(MALFORMED))
async def test_a_malformed_answer_of_http2_is_never_another_ones(rig: Rig, method: str, head_sent: bool, answer: OnHead) -> None:
    """To a client of HTTP/1.1 that pipelines: what follows on the connection must not be read as this answer's content."""
    await rig.start()
    speaks_h2(rig, answer)
    reader, writer = await rig.open()
    writer.write(http1(rig, method) + rig.request("/second"))
    async with asyncio.timeout(5):
        first = await reader.readuntil(b"\r\n\r\n")
        if b" 502 " not in first:
            assert head_sent, first
            rest = await reader.read()
            assert b"HTTP/1.1" not in rest and b"four" not in rest.partition(b"four")[2], "cut, with nothing of another answer"
            if method == "HEAD" or b" 204 " in first or b" 304 " in first:
                assert not rest
    writer.close()
    await until(lambda: not any(pool.shared for pool in rig.worker.upstream.pools()))
    await until(lambda: not rig.worker.routes.account("s1").waiting)


@pytest.mark.parametrize(("method", "head_sent", "answer"), MALFORMED.values(), ids=list(MALFORMED))
async def test_a_malformed_answer_of_http2_ends_the_clients_stream(rig: Rig, method: str, head_sent: bool, answer: OnHead) -> None:
    await rig.start(http2=True)
    speaks_h2(rig, answer)
    client = Judge(*await rig.open())
    got = await client.answer(client.ask(h2_fields(rig, method)))
    assert got.reset is not None if not got.fields or got.status != 502 else not head_sent
    client.writer.close()
    await until(lambda: not any(pool.shared for pool in rig.worker.upstream.pools()))


def h2_fields(rig: Rig, method: str) -> list[tuple[str, str]]:
    return [
        (":method", method), (":scheme", "https"), (":authority", HOST), (":path", "/"), ("x-aws-proxy-auth", rig.token),
        ("x-aws-proxy-port", str(rig.app_port)), ("x-aws-proxy-force-h2", "true"),
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "answer", "content"), GOOD.values(), ids=list(GOOD))
async def test_answers_of_http2_that_are_as_they_say(rig: Rig, method: str, answer: OnHead, content: bytes) -> None:
    await rig.start()
    speaks_h2(rig, answer)
    reader, writer = await rig.open()
    writer.write(http1(rig, method) + http1(rig, method).replace(b"Host:", b"Connection: close\r\nHost:"))
    async with asyncio.timeout(5):
        everything = await reader.read()
    assert everything.count(b"HTTP/1.1 ") == 2 and everything.count(content or b"HTTP/1.1 ") == 2 and rig.connects == 1
    writer.close()


async def test_chunks_of_an_application_of_http2_are_not_announced_to_a_client_of_http_1_0(rig: Rig) -> None:
    await rig.start()
    speaks_h2(rig, GOOD["no length, and trailers"][1])
    reader, writer = await rig.open()
    writer.write(http1(rig, "GET").replace(b"HTTP/1.1", b"HTTP/1.0"))
    async with asyncio.timeout(5):
        everything = await reader.read()
    assert (
        everything.startswith(b"HTTP/1.1 200 ") and everything.endswith(b"\r\n\r\nfour") and b"transfer-encoding" not in everything.lower()
    )
    writer.close()


# What an application of HTTP/1.1 says, the statuses that a client may see of it, and whether its connection may be used again.
OF_HTTP1: dict[str, tuple[str, bytes, bool]] = {
    "more than its length": ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", False),
    "content in an answer to HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfour", False),
    "content in a 204": ("GET", b"HTTP/1.1 204 No Content\r\n\r\nfour", False),
    "content in a 304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nfour", False),
    "chunks, and more": ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nfour", False),
    "a 204 whose content may yet come": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n", False),
    "a 204 whose chunks may yet come": ("GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", False),
    "a 204 with a length of nothing": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", True),
    "an answer": ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
}


@pytest.mark.parametrize(("method", "answer", "reused"), OF_HTTP1.values(), ids=list(OF_HTTP1))
async def test_what_follows_an_answer_of_http1_reaches_nobody(rig: Rig, method: str, answer: bytes, reused: bool) -> None:
    await rig.start()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await rig.head(reader)
            writer.write(answer)

    rig.script = script
    for _ in range(2):
        reader, writer = await rig.open()
        writer.write(rig.request("/", "Connection: close", method=method))
        async with asyncio.timeout(5):
            everything = await reader.read()
        assert everything.startswith(answer[:12]) and b"four" not in everything and everything.count(b"HTTP/1.1") == 1
        writer.close()
    assert rig.connects == (1 if reused else 2)
