"""A tunnel is over when both its sides have ended, whichever was first; and then both connections are closed, at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from waiting import until

from gateway.edge.client.http2 import Http2
from gateway.edge.wire import http2_frames as f

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
FIELDS = ("Connection: upgrade", "Upgrade: websocket")
SWITCHED = b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


@pytest.mark.parametrize("first", ["application", "client"])
async def test_a_tunnel_whose_sides_have_both_ended_is_over_at_once(rig: Rig, first: str) -> None:
    ends, ended = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(SWITCHED + b"hello")
        await ends.wait()
        writer.write_eof()
        assert await reader.read() == b""
        ended.set()

    rig.script = script
    await rig.start()
    reader, writer = await rig.open()
    writer.write(rig.request("/", *FIELDS))
    async with asyncio.timeout(5):
        await reader.readuntil(b"hello")
        for side in (first, "client" if first == "application" else "application"):
            if side == "application":
                ends.set()
                assert await reader.read() == b""
            else:
                writer.write_eof()
        await ended.wait()
    await until(lambda: not rig.worker.clients and not rig.worker.upstream.statistics()["open"], 2)
    writer.close()


async def test_an_end_before_the_application_has_agreed_is_passed_on(rig: Rig) -> None:
    agrees = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        await agrees.wait()
        writer.write(SWITCHED)
        assert await reader.read() == b""
        writer.write(b"bye")

    rig.script = script
    await rig.start()
    reader, writer = await rig.open()
    writer.write(rig.request("/", *FIELDS))
    await until(lambda: rig.received)
    writer.write_eof()
    (client,) = rig.worker.clients
    await until(lambda: client._half_closed_at)  # type: ignore[union-attr]
    agrees.set()
    async with asyncio.timeout(5):
        assert (await reader.read()).endswith(b"\r\n\r\nbye")
    writer.close()


@pytest.mark.parametrize("first", ["application", "client"])
async def test_a_tunnel_in_a_stream_is_over_when_both_sides_have_ended(rig: Rig, first: str) -> None:
    ends, heard, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await rig.head(reader)
        key = head.lower().partition(b"sec-websocket-key: ")[2].partition(b"\r\n")[0]
        key = head[head.lower().index(key) :][: len(key)]
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        writer.write(SWITCHED[:-2] + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\nhello")
        if first == "client":
            assert await reader.read() == b"bye"
            heard.set()
        await ends.wait()
        writer.write_eof()
        if first == "application":
            assert await reader.read() == b"bye"
        ended.set()

    rig.script = script
    await rig.start(http2=True)
    client = Judge(*await rig.open())
    while not client.h2.remote_settings.get(f.ENABLE_CONNECT_PROTOCOL):
        assert await client.turn()
    number = client.ask(
        [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"), (":path", "/ws"), (":authority", HOST),
         ("sec-websocket-version", "13"), ("x-aws-proxy-auth", rig.token), ("x-aws-proxy-port", str(rig.app_port))], end=False,
    )  # fmt: skip
    answer = client.answers[number]
    while answer.body != b"hello":
        assert await client.turn()
    async with asyncio.timeout(5):
        for side in (first, "client" if first == "application" else "application"):
            if side == "application":
                ends.set()
                assert await client.answer(number) is answer and answer.reset is None
            else:
                client.h2.send_data(number, b"bye", end_stream=True)
                client.flush()
                if first == "client":
                    await heard.wait()
        await ended.wait()
    await until(lambda: not rig.worker.upstream.statistics()["open"], 2)
    (connection,) = rig.worker.clients
    assert isinstance(connection, Http2) and not connection.streams
    client.writer.close()
