"""Tunnels by names: iodine and dns2tcp carry data out by the questions that a guest asks. Past an allow-list they do not; without it they do.

Both servers stand where the host's own name server is; the clients are a guest's, and ask the resolver of its link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from named_way import NAME, SERVER, NamedWay
from namespaces import Namespace

from vmm.network import HOST_ADDRESS

TOOLS = ("iodine", "iodined", "dns2tcpc", "dns2tcpd")
UNPACKED = Path(__file__).parents[2] / ".venv/tunnels/usr"  # make security-packages
FOUND = {tool: shutil.which(tool, path=f"{UNPACKED}/bin:{UNPACKED}/sbin:{os.environ['PATH']}") for tool in TOOLS}
pytestmark = [
    pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces"),
    pytest.mark.skipif(None in FOUND.values(), reason="make security-packages"),
]  # fmt: skip
ZONE = "t.tunnel.example"
INNER, PORT = "10.77.0.1", 4000  # where somebody listens beside the server, in iodine's tunnel
# The tunnel's zone on no list; and below a wildcard, where a label is the guest's to choose.
LISTS = [[f"https:{NAME}"], [f"https:{NAME}", f"https:*.{ZONE}"]]


@pytest.fixture
async def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NamedWay]:
    one = NamedWay(tmp_path, monkeypatch)
    one.world.start(ports=(PORT,), has_names=False)
    yield one
    await one.close()


@contextlib.asynccontextmanager
async def running(where: Namespace, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *where.enter(FOUND[command[0]] or command[0], *command[1:]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def says(process: asyncio.subprocess.Process, text: bytes, seconds: float) -> bool:
    """Whether a program says so, in time and before it ends."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            async for line in process.stdout:
                if text in line:
                    return True
    except TimeoutError:
        pass
    return False


async def iodine_gets_through(way: NamedWay, *more: str) -> bool:
    """Whether an address of the server's is reached through the tunnel."""
    server = ("iodined", "-f", "-c", "-P", "secret", "-l", SERVER, f"{INNER}/27", ZONE)
    async with running(way.world.namespace, *server) as outside:
        assert await says(outside, b"Listening to dns for domain", 10), "the server itself has to be there"
        async with running(way.guest, "iodine", "-f", "-r", "-P", "secret", *more, HOST_ADDRESS, ZONE) as client:
            if not await says(client, b"Connection setup complete", 40):
                return False
            return await way.say(INNER, PORT, b"secret") == b"secret"


async def dns2tcp_gets_through(way: NamedWay, directory: Path) -> bool:
    """Whether a connection is answered by what listens beside the server."""
    way.world._thread(way.world.bound(1, "127.0.0.1", 7), way.world._accept)
    configuration = directory / "dns2tcpd.conf"
    configuration.write_text(f"listen = {SERVER}\nport = 53\nuser = root\nchroot = /tmp\ndomain = {ZONE}\nresources = echo:127.0.0.1:7\n")
    async with running(way.world.namespace, "dns2tcpd", "-F", "-d", "1", "-f", str(configuration)) as outside:
        assert await says(outside, b"Listening on", 10), "the server itself has to be there"
        command = ("dns2tcpc", "-d", "1", "-c", "-r", "echo", "-z", ZONE, "-l", "8888", HOST_ADDRESS)
        async with running(way.guest, *command) as client:
            if not await says(client, b"Listening on port : 8888", 40):
                return False
            return await way.say("127.0.0.1", 8888, b"secret", seconds=15) == b"secret"


@pytest.mark.parametrize("kind", ["", "NULL", "TXT", "CNAME", "A"])
async def test_iodine_works_without_the_wall(way: NamedWay, kind: str) -> None:
    await way.open(is_walled=False)
    assert await iodine_gets_through(way, *(["-T", kind] if kind else []))


@pytest.mark.parametrize("hosts", LISTS)
@pytest.mark.parametrize("kind", ["", "A"])
async def test_iodine_does_not_get_past_an_allow_list(way: NamedWay, hosts: list[str], kind: str) -> None:
    await way.open(*hosts)
    assert not await iodine_gets_through(way, *(["-T", kind] if kind else []))


async def test_dns2tcp_works_without_the_wall(way: NamedWay, tmp_path: Path) -> None:
    await way.open(is_walled=False)
    assert await dns2tcp_gets_through(way, tmp_path)


@pytest.mark.parametrize("hosts", LISTS)
async def test_dns2tcp_does_not_get_past_an_allow_list(way: NamedWay, tmp_path: Path, hosts: list[str]) -> None:
    await way.open(*hosts)
    assert not await dns2tcp_gets_through(way, tmp_path)
