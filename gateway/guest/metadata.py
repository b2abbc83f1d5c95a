"""The credentials endpoint: IMDSv2, the part that SDKs use (EC2 User Guide, "Use IMDSv2"; service reference, 6).

What comes in is an untrusted guest's: heads are short, connections few, each has a deadline, and answers come at a pace.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import cast

import httptools

from gateway.accounts.directory import Credentials
from gateway.sessions.allowance import Allowance

_HEAD_BYTES = 8192
_CONNECTION_SECONDS = 15.0
_TOKEN_FIELD = "x-aws-ec2-metadata-token"
_TTL_FIELD = "x-aws-ec2-metadata-token-ttl-seconds"
_LONGEST_SECONDS = 21_600
_TOKENS = 64
_AT_ONCE, _A_SECOND = 200.0, 100.0  # answers to one microVM
_PREFIX = "/latest/meta-data/"
_ADDRESS = "169.254.169.254"
_OWN_NAMES = frozenset({_ADDRESS, f"{_ADDRESS}:80"})
_ROLE = "execution_role"

Issue = Callable[[], Awaitable[Credentials]]


class Metadata:
    """One microVM's: `issue` gives credentials of its role, None where it has no role."""

    def __init__(self, region: str, issue: Issue | None, clock: Callable[[], float] = time.time) -> None:
        self._issue = issue
        self._clock = clock
        self._tokens: dict[str, float] = {}
        self.pace = Allowance(_AT_ONCE, _A_SECOND, time.monotonic)
        self._plain = {"placement/region": region, "placement/availability-zone": f"{region}a"}

    async def answer(self, method: str, path: str, fields: dict[str, str]) -> tuple[int, str, str]:
        """(status, media type, text)."""
        path = path.partition("?")[0]
        if "x-forwarded-for" in fields:  # a proxy that passes strangers' requests on is not the guest
            return 403, "text/plain", "Forbidden"
        if fields.get("host", _ADDRESS) not in _OWN_NAMES:  # a page whose name was led here, in a browser of the guest's (DNS rebinding)
            return 403, "text/plain", "Forbidden"
        if path == "/latest/api/token":
            return self._token(fields) if method == "PUT" else (405, "text/plain", "Method Not Allowed")
        if method != "GET":
            return 405, "text/plain", "Method Not Allowed"
        if self._tokens.get(fields.get(_TOKEN_FIELD, ""), 0.0) <= self._clock():
            return 401, "text/plain", "Unauthorized"
        name = path.removeprefix(_PREFIX)
        if path.startswith(_PREFIX) and name in self._plain:
            return 200, "text/plain", self._plain[name]
        if self._issue is not None and name.rstrip("/") == "iam/security-credentials":
            return 200, "text/plain", _ROLE
        if self._issue is not None and name == f"iam/security-credentials/{_ROLE}":
            return 200, "application/json", _document(await self._issue(), self._clock())
        return 404, "text/plain", "Not Found"

    def _token(self, fields: dict[str, str]) -> tuple[int, str, str]:
        lives = fields.get(_TTL_FIELD, "")
        if not (lives.isascii() and lives.isdigit() and len(lives) < 6 and 1 <= int(lives) <= _LONGEST_SECONDS):
            return 400, "text/plain", "Bad Request"
        now = self._clock()
        self._tokens = {token: end for token, end in list(self._tokens.items())[1 - _TOKENS :] if end > now}
        token = secrets.token_urlsafe(40)
        self._tokens[token] = now + int(lives)
        return 200, "text/plain", token


def _document(made: Credentials, now: float) -> str:
    def text(at: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))

    return json.dumps({
        "Code": "Success", "LastUpdated": text(now), "Type": "AWS-HMAC", "AccessKeyId": made.access_key,
        "SecretAccessKey": made.secret, "Token": made.token, "Expiration": text(made.expires_at),
    })  # fmt: skip


class MetadataConnection(asyncio.Protocol):
    """One connection to a microVM's metadata; requests on it are answered one after another."""

    def __init__(self, metadata: Metadata, tasks: set[asyncio.Task[None]]) -> None:
        self._metadata = metadata
        self._tasks = tasks
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._path = b""
        self._fields: dict[str, str] = {}
        self._bytes = 0
        self._busy = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._deadline = asyncio.get_running_loop().call_later(_CONNECTION_SECONDS, self._transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes > _HEAD_BYTES or self._busy:  # nobody pipelines to a metadata service
            self._write(400, "text/plain", "Bad Request", keep=False)
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the second one is none of the first
            self._write(400, "text/plain", "Bad Request", keep=False)

    # ---- httptools ----

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_message_complete(self) -> None:
        self._busy = True
        task = asyncio.get_running_loop().create_task(self._respond(self._parser.get_method().decode(), self._parser.should_keep_alive()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _respond(self, method: str, keep: bool) -> None:
        if seconds := self._metadata.pace.spend(1):
            await asyncio.sleep(seconds)  # nothing more is read meanwhile: a guest asks no faster than it is answered
        try:
            status, kind, text = await self._metadata.answer(method, self._path.decode("latin-1"), self._fields)
        except Exception:  # the issuer failed; SDKs ask again
            status, kind, text = 500, "text/plain", "Internal Server Error"
        self._path, self._fields, self._bytes, self._busy = b"", {}, 0, False
        self._write(status, kind, text, keep)

    def _write(self, status: int, kind: str, text: str, keep: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        body = text.encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {'keep-alive' if keep else 'close'}\r\nServer: EC2ws\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        if not keep:
            self._transport.close()
