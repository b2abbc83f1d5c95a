"""`torpor doctor --inside ID`: a program of ours tries, in a microVM, what code that wants out would try first (vmm/inside/inside.c)."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from .client import bundle, client, resolve
from .output import fail

Row = tuple[str, bool, str]
_TOKEN_MINUTES = 5
_SECONDS = 120.0
_LINE, _PIECE = 76, 2048
_FILE = "/tmp/.torpor-tries"
# What is a container's own affair inside its machine, or only said.
_TOLD = {
    "capabilities",
    "seccomp",
    "no new privileges",
    "raw socket",
    "packet socket",
    "vsock",
    "user namespace",
    "trace the first process",
}


def rows(microvm: str) -> Iterator[Row]:
    """The microVM must have been run with SHELL_INGRESS, and its image have a shell, cat, base64, chmod and rm."""
    from vmm import kernel

    identifier = resolve(microvm)
    api = client()
    endpoint = api.get_microvm(microvmIdentifier=identifier)["endpoint"]
    token = api.create_microvm_shell_auth_token(microvmIdentifier=identifier, expirationInMinutes=_TOKEN_MINUTES)["authToken"]
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "inside"
        try:
            kernel.make_inside(program)
        except OSError as error:
            fail(f"the program could not be compiled: {error}", 1)
        said = asyncio.run(_run(f"wss://{endpoint}/shell", dict(token), program.read_bytes()))
    yield from verdicts(said)


def verdicts(said: str) -> Iterator[Row]:
    """Of what the program printed among a terminal's echo."""
    lines = [line.strip() for line in said.splitlines()]
    tries = [json.loads(line) for line in lines if line.startswith('{"try": ') and line.endswith("}")]
    if not tries:
        yield "inside", False, "the program did not run there: its image needs cat, base64, chmod and rm"
    for one in tries:
        name, text, is_done = str(one["try"]), str(one["text"]), bool(one["done"])
        if name == "processor":
            seen = {"svm", "vmx"} & set(text.split())
            yield "inside: virtualisation is seen", not seen, ", ".join(sorted(seen)) or "no flag of it"
        elif name in _TOLD:
            yield f"inside: {name}", True, text or ("done" if is_done else "refused")
        else:
            yield f"inside: {name}", not is_done, "it was done" if is_done else f"refused: {text}"


def script(program: bytes) -> bytes:
    """Returns what is typed: a terminal takes no line of more than 4,096 characters, and no bytes that are not letters."""
    text = base64.b64encode(program).decode()
    lines = "\n".join(text[at : at + _LINE] for at in range(0, len(text), _LINE))
    return (
        f"stty -echo 2>/dev/null; cat > {_FILE}.64 <<'END'\n{lines}\nEND\n"
        f"base64 -d {_FILE}.64 > {_FILE}; chmod 700 {_FILE}; {_FILE}; rm -f {_FILE} {_FILE}.64; exit\n"
    ).encode()


async def _run(url: str, token: dict[str, str], program: bytes) -> str:
    context = ssl.create_default_context(cafile=bundle())
    said = b""
    try:
        async with (
            asyncio.timeout(_SECONDS),
            connect(url, ssl=context, additional_headers=token, max_size=None, compression=None, ping_interval=None) as socket,
        ):
            typed = script(program)
            sender = asyncio.get_running_loop().create_task(_type(socket.send, typed))
            try:
                async for message in socket:
                    said += message if isinstance(message, bytes) else b""
            finally:
                sender.cancel()
    except (OSError, WebSocketException, TimeoutError) as error:
        fail(f"{url}: {error}", 1)
    return said.decode(errors="replace")


async def _type(send: Callable[[bytes], Awaitable[None]], typed: bytes) -> None:
    for at in range(0, len(typed), _PIECE):
        await send(typed[at : at + _PIECE])
