"""`torpor shell`: a terminal in a microVM, over its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import ssl
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Annotated

import typer
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from .client import bundle, client, resolve
from .output import fail

_TOKEN_MINUTES = 5  # it is checked when the shell opens, not while it lasts
_OPEN_SECONDS = 60.0  # a sleeping microVM is resumed first
_READ_BYTES = 16384


def register(app: typer.Typer) -> None:
    app.command()(shell)


def shell(microvm: Annotated[str, typer.Argument(help="The microVM's id, or the beginning of it.")]) -> None:
    """Open a shell in a microVM that was run with SHELL_INGRESS; exits with the shell's code.

    Example: torpor shell 3f2a
    """
    identifier = resolve(microvm)
    api = client()
    endpoint = api.get_microvm(microvmIdentifier=identifier)["endpoint"]
    token = api.create_microvm_shell_auth_token(microvmIdentifier=identifier, expirationInMinutes=_TOKEN_MINUTES)["authToken"]
    with _raw_terminal():
        code, text = asyncio.run(_session(f"wss://{endpoint}/shell", dict(token)))
    if text:
        fail(text, code)
    raise typer.Exit(code)


async def _session(url: str, token: dict[str, str]) -> tuple[int, str]:
    """Exit code, and what went wrong, if anything did."""
    context = ssl.create_default_context(cafile=bundle())
    try:
        async with connect(
            url, ssl=context, additional_headers={**token, "X-torpor-exit-code": "1"}, max_size=None, open_timeout=_OPEN_SECONDS,
            compression=None, ping_interval=None,
        ) as socket:  # fmt: skip
            return await _relay(socket)
    except InvalidStatus as error:
        return 1, f"the endpoint answered {error.response.status_code}: {(error.response.body or b'').decode() or 'no shell there'}"
    except (OSError, WebSocketException, TimeoutError) as error:
        return 1, f"{url}: {error}"


async def _relay(socket: ClientConnection) -> tuple[int, str]:
    loop = asyncio.get_running_loop()
    typed: asyncio.Queue[bytes | None] = asyncio.Queue()

    def read() -> None:
        data = os.read(0, _READ_BYTES)
        if not data:
            loop.remove_reader(0)
        typed.put_nowait(data or b"\x04")  # the end of a pipe is what Ctrl-D is to a terminal

    loop.add_reader(0, read)
    loop.add_signal_handler(signal.SIGWINCH, typed.put_nowait, None)
    typed.put_nowait(None)
    sender = loop.create_task(_send(socket, typed))
    code = 0
    try:
        async for message in socket:
            if isinstance(message, bytes):
                _write(message)
            elif (said := json.loads(message)).get("type") == "exit":
                code = int(said["code"])
        return code, ""
    except ConnectionClosed as error:
        return 1, f"the shell's connection ended: {error}"
    finally:
        sender.cancel()
        loop.remove_reader(0)
        loop.remove_signal_handler(signal.SIGWINCH)


async def _send(socket: ClientConnection, typed: asyncio.Queue[bytes | None]) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            data = await typed.get()
            if data is None:
                size = shutil.get_terminal_size()
                await socket.send(json.dumps({"type": "resize", "cols": size.columns, "rows": size.lines}))
            else:
                await socket.send(data)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys go to the microVM as they are, Ctrl-C too; afterwards the terminal is as it was."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
