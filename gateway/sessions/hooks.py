"""Lifecycle hooks: one POST to the application, on a socket that vmm made inside the microVM's network.

Service reference, section 5: HTTP/1.1, `Host: localhost:<port>`, success is 200 only, a connection of its own each time.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable

import httptools
import msgspec

from gateway.reach import reach
from gateway.rpc import RpcError

DEFAULT_PORT = 9000
PATH = "/aws/lambda-microvms/runtime/v1/"
_REQUEST_ID_FIELD = "x-amzn-requestid"
_RETRY_SECONDS = 0.05
_HOST_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_RESPONSE_MAX_BYTES = 1 << 20

Connect = Callable[[], Awaitable[socket.socket]]


class HookError(Exception):
    """The hook did not answer 200; `outcome` is the recorded wording, `status` what was answered, if anything was."""

    def __init__(self, outcome: str, status: int = 0) -> None:
        super().__init__(outcome)
        self.status = status


class _Status:
    def __init__(self) -> None:
        self.complete = False

    def on_message_complete(self) -> None:
        self.complete = True


async def post(connect: Connect, name: str, port: int, body: bytes, request_id: str) -> int:
    """Sends one hook; returns the status. Raises OSError, HookError for an answer that is not HTTP."""
    fields = f"{_REQUEST_ID_FIELD}: {request_id}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return await ask(connect, port, f"POST {PATH}{name}", fields, body)


async def ask(connect: Connect, port: int, request: str, fields: str = "", body: bytes = b"") -> int:
    """Sends one request (its method and target) on a connection of its own; returns the status. Raises OSError, HookError."""
    sock = await reach(connect, port)
    loop = asyncio.get_running_loop()
    try:
        head = f"{request} HTTP/1.1\r\nHost: localhost:{port}\r\nUser-Agent: torpor\r\n{fields}Connection: close\r\n\r\n"
        await loop.sock_sendall(sock, head.encode() + body)
        state = _Status()
        parser = httptools.HttpResponseParser(state)
        received = 0
        while not state.complete:
            data = await loop.sock_recv(sock, 65536)
            received += len(data)
            if not data or received > _RESPONSE_MAX_BYTES:
                break
            parser.feed_data(data)
        return int(parser.get_status_code())
    except httptools.HttpParserError as error:
        raise HookError("failed") from error
    finally:
        sock.close()


async def call(connect: Connect, name: str, port: int, seconds: float, request_id: str, payload: object = None) -> None:
    """Calls a runtime hook (run, resume, suspend, terminate), once. Raises HookError in the recorded words, RpcError for what this host,
    and not the application, lacked."""
    body = b"" if payload is None else msgspec.json.encode(payload)
    try:
        async with asyncio.timeout(seconds):
            status = await post(connect, name, port, body, request_id)
    except TimeoutError as error:
        raise HookError("timed out") from error
    except ConnectionRefusedError as error:
        raise HookError("connection was refused") from error
    except OSError as error:
        if error.errno in _HOST_ERRORS:
            raise RpcError("Unavailable", f"the {name} hook could not be called: {error}") from error
        raise HookError("failed") from error
    if status != 200:
        raise HookError(f"returned HTTP status {status}", status)


async def poll(connect: Connect, name: str, port: int, seconds: float, request_id: str) -> None:
    """Calls an image hook (ready, validate) again after 503, and while nothing listens, until its time is up.

    Raises HookError: `status` 0 means that the time was up.
    """
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    status = await post(connect, name, port, b"", request_id)
                except OSError:
                    status = 503
                if status == 200:
                    return
                if status != 503:
                    raise HookError(f"returned HTTP status {status}", status)
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError as error:
        raise HookError("timed out") from error


def runtime_reason(name: str, error: HookError) -> str:
    """Returns the stateReason as recorded (service reference, 2.2)."""
    return f"{name.capitalize()} lifecycle hook {error}. Please check your hook endpoint and application logs for more details."


def image_reason(name: str, error: HookError, seconds: int) -> str:
    """Returns a build's stateReason as recorded (service reference, 4)."""
    if error.status >= 500:
        return f"{name.capitalize()} hook check failed: the application returned a server error (HTTP 5xx) response"
    if error.status >= 400:
        return f"{name.capitalize()} hook check failed: the application returned a client error (HTTP 4xx) response"
    if error.status:
        return f"{name.capitalize()} hook check failed: the application returned HTTP status {error.status}"
    minutes, rest = divmod(seconds, 60)
    duration = "PT" + (f"{minutes}M" if minutes else "") + (f"{rest}S" if rest or not minutes else "")
    return f"{name.capitalize()} hook invocation timed out after {duration}"
