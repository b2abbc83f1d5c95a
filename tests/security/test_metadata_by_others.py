"""The metadata service answers the guest's own programs, and nobody who only gets them to ask: each way that is known, and its control."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from named_way import NamedWay, write
from namespaces import Namespace

from gateway.accounts.directory import Credentials
from gateway.guest import metadata
from gateway.sessions.allowance import Allowance
from vmm import network
from vmm.egress import METADATA_ADDRESS
from vmm.network import GUEST_ADDRESS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
ROLE = "/latest/meta-data/iam/security-credentials/execution_role"
TTL = "X-aws-ec2-metadata-token-ttl-seconds: 60"
INNER = "172.17.0.2"


async def issue() -> Credentials:
    return Credentials("ASIAX", "the-secret", "token", 4e9)


@pytest.fixture
async def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NamedWay]:
    one = NamedWay(tmp_path, monkeypatch)
    one.issue = issue
    yield one
    await one.close()


async def ask(
    where: Namespace, request: str, *fields: str, address: str = METADATA_ADDRESS, host: str = METADATA_ADDRESS, seconds: float = 5.0
) -> tuple[int, str]:  # fmt: skip
    """(status, body) of a request that a program in a namespace makes; (0, "") without an answer."""
    loop = asyncio.get_running_loop()
    head = "".join(
        f"{field}\r\n" for field in ((f"Host: {host}", "Connection: close", *fields) if host else ("Connection: close", *fields))
    )
    with where.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as sock:
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_connect(sock, (address, 80))
                await loop.sock_sendall(sock, f"{request} HTTP/1.1\r\n{head}\r\n".encode())
                answer = b""
                while data := await loop.sock_recv(sock, 65536):
                    answer += data
        except (OSError, TimeoutError):
            return 0, ""
    return int(answer.split(b" ")[1]), answer.partition(b"\r\n\r\n")[2].decode()


async def token(where: Namespace) -> str:
    status, text = await ask(where, "PUT /latest/api/token", TTL)
    assert status == 200
    return f"X-aws-ec2-metadata-token: {text}"


async def test_a_program_of_the_guests_gets_them(way: NamedWay) -> None:
    """The control of all the others."""
    await way.open()
    status, text = await ask(way.guest, f"GET {ROLE}", await token(way.guest))
    assert status == 200 and "the-secret" in text


@pytest.mark.parametrize(
    "fields",
    [(), ("X-aws-ec2-metadata-token:",), ("X-aws-ec2-metadata-token: x",), ("X-aws-ec2-metadata-token: " + "A" * 54,), ("Metadata-Flavor: Google",),
     ("Metadata: true",), ("Authorization: Bearer Oracle",)],
)  # fmt: skip
async def test_who_can_only_have_something_fetched_gets_nothing(way: NamedWay, fields: tuple[str, ...]) -> None:
    """A fetch on a stranger's behalf (SSRF) is a GET without fields of the stranger's."""
    await way.open()
    await token(way.guest)
    for path in (ROLE, "/latest/meta-data/", "/", "/latest/user-data", "/computeMetadata/v1/", "/metadata/instance", "/opc/v2/instance/"):
        assert await ask(way.guest, f"GET {path}", *fields) == (401, "Unauthorized")


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE", "OPTIONS"])
async def test_a_token_is_given_to_put_alone(way: NamedWay, method: str) -> None:
    await way.open()
    assert (await ask(way.guest, f"{method} /latest/api/token", TTL))[0] == 405
    assert (await ask(way.guest, "PUT /latest/api/token", "Content-Length: 0"))[0] == 400, "without the field that a form cannot send"


@pytest.mark.parametrize("name", ["X-Forwarded-For", "x-forwarded-for", "X-FORWARDED-FOR"])
async def test_an_open_proxy_of_the_guests_gets_none(way: NamedWay, name: str) -> None:
    await way.open()
    held = await token(way.guest)
    assert await ask(way.guest, "PUT /latest/api/token", TTL, f"{name}: 198.51.100.7") == (403, "Forbidden")
    assert await ask(way.guest, f"GET {ROLE}", held, f"{name}: 198.51.100.7") == (403, "Forbidden")
    assert await ask(way.guest, f"GET {ROLE}", held, f"{name}:") == (403, "Forbidden"), "whatever it says"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "169.254.169.254.evil.example", "localhost", "[fd00:ec2::254]"])
async def test_a_page_whose_name_was_led_here_gets_nothing(way: NamedWay, host: str) -> None:
    """DNS rebinding: a browser in the guest asks with the page's own name, and may then send what fields it likes."""
    await way.open()
    held = await token(way.guest)
    assert await ask(way.guest, "PUT /latest/api/token", TTL, host=host) == (403, "Forbidden")
    assert await ask(way.guest, f"GET {ROLE}", held, host=host) == (403, "Forbidden")


@pytest.mark.parametrize("host", ["", METADATA_ADDRESS, f"{METADATA_ADDRESS}:80"])
async def test_the_services_own_address_is_its_name(way: NamedWay, host: str) -> None:
    await way.open()
    assert (await ask(way.guest, "PUT /latest/api/token", TTL, host=host))[0] == 200


async def test_one_microvms_token_is_not_anothers(way: NamedWay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await way.open()
    held = await token(way.guest)
    other = NamedWay(tmp_path, monkeypatch)
    other.issue = issue
    try:
        await other.open()
        assert (await ask(other.guest, f"GET {ROLE}", held))[0] == 401
        assert (await ask(way.guest, f"GET {ROLE}", held))[0] == 200
    finally:
        await other.close()


@pytest.mark.parametrize("address", ["169.254.170.2", "169.254.170.23", "100.100.100.200", "192.0.0.192", "169.254.169.253"])
async def test_other_clouds_services_are_not_here(way: NamedWay, address: str) -> None:
    await way.open()
    assert await ask(way.guest, "GET /", address=address, seconds=0.5) == (0, "")


# ---- containers in the guest ----


def contain(way: NamedWay) -> Namespace:
    """A container behind the guest, as Docker's bridge has them."""
    inner = Namespace()
    way.guest.ip("link", "add", "docker0", "type", "veth", "peer", "name", "eth0", "netns", inner.path)
    way.guest.ip("addr", "add", "172.17.0.1/16", "dev", "docker0")
    way.guest.ip("link", "set", "docker0", "up")
    inner.ip("addr", "add", f"{INNER}/16", "dev", "eth0")
    inner.ip("link", "set", "eth0", "up")
    inner.ip("route", "add", "default", "via", "172.17.0.1")

    def forward() -> None:
        write("/proc/sys/net/ipv4/ip_forward", "1")
        network.run_nft(
            f"table ip d {{\nchain p {{\ntype nat hook postrouting priority srcnat;\nip saddr {INNER} oifname eth0 snat to {GUEST_ADDRESS}\n}}\n}}\n"
        )

    way.guest.inside(forward)
    return inner


async def test_an_answer_lives_for_one_hop(way: NamedWay) -> None:
    """A container of the guest's with a network of its own is one hop further, and does not get its role (EC2's default)."""
    await way.open()
    inner = contain(way)
    try:
        assert await ask(inner, "PUT /latest/api/token", TTL, seconds=1.0) == (0, "")
        assert await token(way.guest)
    finally:
        inner.close()


async def test_with_more_hops_it_gets_there(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_METADATA_HOPS", 64)
    await way.open()
    inner = contain(way)
    try:
        assert await token(inner)
    finally:
        inner.close()


# ---- who takes room ----


async def test_connections_that_say_nothing_end(way: NamedWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_CONNECTION_SECONDS", 0.5)
    await way.open()
    loop = asyncio.get_running_loop()
    held = [way.socket() for _ in range(40)]
    try:
        async with asyncio.timeout(10):
            for sock in held:
                await loop.sock_connect(sock, (METADATA_ADDRESS, 80))
                await loop.sock_sendall(sock, b"GET / HT")
            assert (await ask(way.guest, "PUT /latest/api/token", TTL, seconds=9))[0] == 200
    finally:
        for sock in held:
            sock.close()


@pytest.mark.parametrize("has_pace", [True, False])
async def test_one_microvms_questions_are_answered_at_a_pace(way: NamedWay, monkeypatch: pytest.MonkeyPatch, has_pace: bool) -> None:
    """On a connection that stays open, as fast as it is answered; a clock that stands still says which answers had to wait."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    one = metadata.Metadata("us-east-1", issue)
    one.pace = Allowance(20.0 if has_pace else 1e9, 10.0, lambda: 0.0)
    monkeypatch.setattr(metadata, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    connection = metadata.MetadataConnection(one, set())
    await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours)
    reader, writer = await asyncio.open_connection(sock=theirs)
    for _ in range(50):
        writer.write(b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
        await reader.readexactly(len("Unauthorized"))
    writer.close()
    await connection.closed
    assert waits == pytest.approx([number / 10 for number in range(1, 31)] if has_pace else [])


@pytest.mark.parametrize("request_line", ["GET / HTTP/1.1\r\n\r\nGET /latest/meta-data/", "GET /" + "a" * 9000, "\x00\x01\x02"])
async def test_what_is_no_single_short_request_is_refused(way: NamedWay, request_line: str) -> None:
    await way.open()
    assert (await ask(way.guest, request_line))[0] in (400, 401)
    assert await token(way.guest)
