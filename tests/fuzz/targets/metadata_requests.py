"""A guest's requests to its metadata service (gateway/guest/metadata.py)."""

from __future__ import annotations

import asyncio
from typing import Any

from written import Written

from gateway.accounts.directory import Credentials
from gateway.guest.metadata import Metadata, MetadataConnection

TRACED = ("gateway.guest.metadata",)
_TOKEN = b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nx-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n"
_SECRET = "a-secret-of-the-role"
WORDS = (b"\r\n", b"Connection: upgrade\r\nUpgrade: x\r\n", b"CONNECT", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"\r\n5\r\nhello\r\n0\r\n\r\n",
         b"X-Forwarded-For: x\r\n", b"HTTP/1.0", b"HTTP/2.0", b"GET", b"PRI", b"\0", b"\xff", b"/latest/meta-data/", _TOKEN)  # fmt: skip
_loop = asyncio.new_event_loop()


def seeds() -> list[bytes]:
    get = b"GET /latest/meta-data/%b HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: %b\r\n\r\n"
    return [
        _TOKEN, get % (b"placement/region", b"x"), get % (b"iam/security-credentials/", b"x"), get % (b"iam/security-credentials/execution_role", b"x"),
        get.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhello") % (b"x", b"y"), _TOKEN.replace(b"1.1", b"1.0"), _TOKEN + _TOKEN,
        _TOKEN.replace(b"60", b"99999"), _TOKEN.replace(b"Host:", b"X-Forwarded-For: x\r\nHost:"),
    ]  # fmt: skip


async def _issue() -> Credentials:
    return Credentials("AKIA", _SECRET, "token", 2e9)


def check(data: bytes) -> None:
    metadata = Metadata("us-east-1", _issue)
    said = _loop.run_until_complete(_spoken(metadata, data, len(data) or 1))
    assert _SECRET.encode() not in said, "credentials without a token"
    assert b"HTTP/1.1 500" not in said and (not said or said.startswith(b"HTTP/1.1 "))
    _loop.run_until_complete(_spoken(metadata, data, 1 + len(data) // 5))
    assert _loop.run_until_complete(_spoken(metadata, _TOKEN, 1000)).startswith(b"HTTP/1.1 200"), "the next client is not answered"
    assert len(metadata._tokens) <= 64


async def _spoken(metadata: Metadata, data: bytes, cut: int) -> bytes:
    tasks: set[asyncio.Task[None]] = set()
    connection, wire = MetadataConnection(metadata, tasks), Written()
    made: Any = wire
    connection.connection_made(made)
    for at in range(0, len(data), cut):
        if wire.is_closed:
            break
        connection.data_received(data[at : at + cut])
        await asyncio.gather(*tasks)
    await asyncio.gather(*tasks)
    connection.connection_lost(None)
    return wire.data
