"""Long answers: every byte, in order, over TLS and plain, and what comes after them. (HTTP/2: test_http2.py, with small windows.)"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from edge_rig import HOST, Rig, response

from gateway.config import Settings
from gateway.edge.client.certificates import Certificates
from gateway.edge.client.tls import TlsServer
from gateway.instance import make_certificates

BODY = random.Random(1).randbytes((3 << 20) + 12_345)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)
Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Open = Callable[[], Awaitable[Opened]]


@pytest.fixture(params=["tls", "plain"])
async def edge(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Rig, Open]]:
    settings = Settings(root=tmp_path / "root")
    settings.tls_dir.mkdir(parents=True)
    make_certificates(settings)
    rig = Rig(tmp_path, monkeypatch)
    await rig.start()
    certificates, listener = Certificates(settings.tls_dir), socket.create_server(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(lambda: TlsServer(certificates.context, rig.worker._application), sock=listener)
    trusted = ssl.create_default_context(cafile=str(settings.tls_dir / "ca.crt"))

    async def over_tls() -> Opened:
        return await asyncio.open_connection("127.0.0.1", listener.getsockname()[1], ssl=trusted, server_hostname=HOST)

    yield rig, over_tls if request.param == "tls" else rig.open
    server.close()
    await rig.stop()


@pytest.mark.parametrize("after", ["", "together", "more"])
async def test_every_byte_and_what_follows(edge: tuple[Rig, Open], after: str) -> None:
    rig, opened = edge

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(HEAD + BODY[:70_000])
        await writer.drain()
        at = 70_000
        for step in (1, 16_384, 999_999, 7):
            await asyncio.sleep(0.002)
            writer.write(BODY[at : at + step])
            at += step
        writer.write(BODY[at:] + (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil" if after == "more" else b""))
        await rig.answer_all(reader, writer)

    rig.script = script
    reader, writer = await opened()
    writer.write(rig.request() + (rig.request("/next") if after == "together" else b""))
    status, _, body = await response(reader)
    assert status == 200 and body == BODY
    if after != "together":
        rig.script = rig.answer_all
        writer.write(rig.request("/next"))
    assert (await response(reader))[2] == b"/next"
    assert rig.connects == (2 if after == "more" else 1), "reused though more had come, or not reused"
    writer.close()


async def test_one_that_is_cut_short_is_seen_as_cut_short(edge: tuple[Rig, Open]) -> None:
    rig, opened = edge

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await rig.head(reader)
        writer.write(HEAD + BODY[:-1])

    rig.script = script
    reader, writer = await opened()
    writer.write(rig.request())
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await response(reader)
    writer.close()


async def test_a_slow_reader_gets_its_own_bytes(edge: tuple[Rig, Open]) -> None:
    """What waits for it is not what another connection's answer passes through meanwhile."""
    rig, opened = edge

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            fill = (await rig.head(reader)).split(b" ")[1][1:2]
            writer.write(HEAD + fill * len(BODY))
            await writer.drain()

    rig.script = script
    slow, slow_writer = await opened()
    slow_writer.write(rig.request("/a"))
    for _ in range(3):
        quick, quick_writer = await opened()
        quick_writer.write(rig.request("/b"))
        assert (await response(quick))[2] == b"b" * len(BODY)
        quick_writer.close()
    assert (await response(slow))[2] == b"a" * len(BODY)
    slow_writer.close()
