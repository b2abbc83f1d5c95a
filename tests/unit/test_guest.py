"""What a guest may ask of its host: metadata's rules, credentials that are made again in time, names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from api_rig import ACCOUNT, KEY, SECRET, ApiRig
from hypothesis import given
from hypothesis import strategies as st
from written import Written

from gateway.accounts.directory import Credentials as Made
from gateway.config import Credentials
from gateway.guest import resolver
from gateway.guest.credentials import Issuer
from gateway.guest.metadata import Metadata, MetadataConnection
from gateway.guest.resolver import Names, NameStreams, host_resolvers, without_answer

ROLE = f"arn:aws:iam::{ACCOUNT}:role/worker"
CREDENTIALS = "/latest/meta-data/iam/security-credentials/"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def issue() -> Made:
    return Made("ASIAX", "secret", "token", 1_003_300.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metadata(clock: Clock) -> Metadata:
    return Metadata("us-east-1", issue, clock)


async def token(metadata: Metadata, seconds: str = "60") -> str:
    status, _, text = await metadata.answer("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": seconds})
    assert status == 200
    return text


async def test_credentials(metadata: Metadata) -> None:
    fields = {"x-aws-ec2-metadata-token": await token(metadata)}
    assert await metadata.answer("GET", CREDENTIALS, fields) == (200, "text/plain", "execution_role")
    status, kind, text = await metadata.answer("GET", f"{CREDENTIALS}execution_role", fields)
    made = json.loads(text)
    assert (status, kind, made["AccessKeyId"], made["Expiration"]) == (200, "application/json", "ASIAX", "1970-01-12T14:41:40Z")
    assert (await metadata.answer("GET", "/latest/meta-data/placement/region", fields))[2] == "us-east-1"


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", CREDENTIALS, {}, 401),
        ("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": "made up"}, 401),
        ("PUT", "/latest/api/token", {}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "0"}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "21601"}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "9²"}, 400),
        ("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": "60", "x-forwarded-for": "1.2.3.4"}, 403),
        ("GET", "/latest/api/token", {}, 405),
        ("POST", CREDENTIALS, {}, 405),
    ],
)
async def test_refusals(metadata: Metadata, method: str, path: str, fields: dict[str, str], status: int) -> None:
    assert (await metadata.answer(method, path, fields))[0] == status


async def test_tokens_end(metadata: Metadata, clock: Clock) -> None:
    fields = {"x-aws-ec2-metadata-token": await token(metadata, "60")}
    clock.now += 59
    assert (await metadata.answer("GET", CREDENTIALS, fields))[0] == 200
    clock.now += 1
    assert (await metadata.answer("GET", CREDENTIALS, fields))[0] == 401


async def test_tokens_are_bounded(metadata: Metadata) -> None:
    first = await token(metadata)
    for _ in range(64):
        last = await token(metadata)
    assert (await metadata.answer("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": first}))[0] == 401
    assert (await metadata.answer("GET", CREDENTIALS, {"x-aws-ec2-metadata-token": last}))[0] == 200


async def test_no_role(clock: Clock) -> None:
    without = Metadata("us-east-1", None, clock)
    fields = {"x-aws-ec2-metadata-token": await token(without)}
    for tail in ("", "execution_role"):
        assert (await without.answer("GET", CREDENTIALS + tail, fields))[0] == 404


async def test_credentials_are_made_again_before_they_end(clock: Clock) -> None:
    made: list[str] = []

    class Directory:
        def issue(self, role: str, name: str) -> Made:
            made.append(role)
            return Made(f"ASIA{len(made)}", "s", "t", clock.now + 3300)

    kept = Issuer(Credentials(), "us-east-1", Directory(), clock).of(ROLE, "microvm-1")  # type: ignore[arg-type]
    assert (await kept()).access_key == (await kept()).access_key == "ASIA1"
    clock.now += 2000  # 1,300 seconds left
    assert (await kept()).access_key == "ASIA1"
    clock.now += 200
    assert (await kept()).access_key == "ASIA2"
    clock.now += 100_000  # after a long sleep
    assert (await kept()).access_key == "ASIA3"


def test_credentials_from_a_real_sts(tmp_path: Path) -> None:
    api = ApiRig(tmp_path)
    try:
        settings = Credentials(sts_endpoint=f"http://127.0.0.1:{api.port}", access_key=KEY, secret_key=SECRET)
        made = Issuer(settings, "us-east-1", api.accounts)._assume(ROLE, "microvm-1")
        client: Any = api.client("sts", (made.access_key, made.secret, made.token))
        assert client.get_caller_identity()["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/worker/microvm-1"
    finally:
        api.close()


@given(st.binary(min_size=12, max_size=60))
def test_a_refusal_answers_its_question(question: bytes) -> None:
    answer = without_answer(question)
    assert answer[:2] == question[:2] and answer[2] & 0x80 and answer[3] & 0x0F == 5
    assert answer[4:6] == question[4:6] and answer[12:] == question[12:]


class Server(asyncio.DatagramProtocol):
    """A DNS server that answers `delay` seconds later, and loses the first `loses` questions."""

    def __init__(self, delay: float = 0.0, loses: int = 0) -> None:
        self.delay, self.loses, self.asked, self.most, self.now = delay, loses, 0, 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        if self.asked > self.loses:
            asyncio.get_running_loop().call_later(self.delay, self._answer, data, address)

    def _answer(self, data: bytes, address: Any) -> None:
        self.now -= 1
        self.transport.sendto(data[:2] + bytes([data[2] | 0x80]) + data[3:], address)


class Client:
    """What Names sends back, by the question's id; `all` is set when there are so many."""

    def __init__(self, wanted: int) -> None:
        self.answers: dict[int, int] = {}
        self.wanted, self.all = wanted, asyncio.Event()

    def is_closing(self) -> bool:
        return False

    def sendto(self, data: bytes, address: Any) -> None:
        assert data[2] & 0x80
        self.answers[int.from_bytes(data[:2], "big")] = data[3] & 0x0F
        if len(self.answers) == self.wanted:
            self.all.set()


def question(number: int) -> bytes:
    return number.to_bytes(2, "big") + b"\1\0\0\1\0\0\0\0\0\0\1a\0\0\1\0\1"


@pytest.fixture
async def dns(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[Server], Awaitable[None]]]:
    """Starts a server on 127.0.0.1; questions go to its port."""
    opened = []

    async def start(server: Server) -> None:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", 0))
        opened.append(transport)
        monkeypatch.setattr(resolver, "_PORT", transport.get_extra_info("sockname")[1])

    yield start
    for transport in opened:
        transport.close()


async def asked(numbers: Iterable[int], wanted: int, upstream: tuple[str, ...] = ("127.0.0.1",)) -> dict[int, int]:
    """The response codes by id."""
    client, names = Client(wanted), Names(list(upstream), set())
    names.connection_made(client)  # type: ignore[arg-type]
    for number in numbers:
        names.datagram_received(question(number), ("10.0.0.2", 5353))
    async with asyncio.timeout(10):
        await client.all.wait()
    return client.answers


async def test_a_burst_of_questions_is_answered_to_the_last(dns: Callable[[Server], Awaitable[None]]) -> None:
    server = Server(delay=0.02)
    await dns(server)
    assert await asked(range(200), 200) == dict.fromkeys(range(200), 0)
    assert server.most <= 64  # what a slow server is asked at once is bounded all the same


async def test_what_is_lost_is_asked_again(dns: Callable[[Server], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_WAITS_SECONDS", (0.05, 0.1, 5.0))
    server = Server(loses=70)
    await dns(server)
    assert await asked(range(40), 40) == dict.fromkeys(range(40), 0)
    assert server.asked > 70


async def test_the_next_server_is_asked_while_the_first_is_silent(dns: Callable[[Server], Awaitable[None]]) -> None:
    await dns(Server())
    assert await asked([7], 1, ("127.0.0.9", "127.0.0.1")) == {7: 0}


async def test_what_nobody_answers_is_said_to_have_failed(
    dns: Callable[[Server], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await dns(Server(loses=1000))
    monkeypatch.setattr(resolver, "_WAITS_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(resolver, "_WAITING", 100)
    assert await asked(range(200), 200) == dict.fromkeys(range(200), 2)
    monkeypatch.setattr(resolver, "_PORT", 1)  # where nobody listens
    assert await asked([7], 1) == {7: 2}


async def test_a_question_that_is_repeated_takes_one_turn(dns: Callable[[Server], Awaitable[None]]) -> None:
    server = Server(delay=0.02)
    await dns(server)
    assert await asked([5, 5, 5], 1) == {5: 0} and server.asked == 1


@pytest.mark.parametrize(("upstream", "code"), [([], 5), (["127.0.0.1"], 2)])
async def test_a_stream_that_leads_nowhere_is_declined_by_an_answer(
    upstream: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_PORT", 1)
    server = await asyncio.start_server(NameStreams(upstream).serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(len(question(7)).to_bytes(2, "big") + question(7))
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        assert answer[:2] == question(7)[:2] and answer[3] & 0x0F == code
        writer.close()
        assert await reader.read() == b""


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from(
                [
                    b"GET / HTTP/1.1\r\n",
                    b"PUT /latest/api/token HTTP/1.1\r\n",
                    b"Host: x\r\n",
                    b"\r\n",
                    b"Content-Length: 5\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                ]
            ),
        ),
        max_size=12,
    )
)
def test_any_bytes_to_metadata_are_answered_or_waited_for(pieces: list[bytes]) -> None:
    async def speak() -> None:
        tasks: set[asyncio.Task[None]] = set()
        connection, wire = MetadataConnection(Metadata("us-east-1", issue), tasks), Written()
        connection.connection_made(wire)  # type: ignore[arg-type]
        for piece in pieces:
            if not wire.is_closed:
                connection.data_received(piece)
                assert connection._bytes <= 8192 + 200
        await asyncio.gather(*tasks)
        connection.connection_lost(None)
        assert b"HTTP/1.1 200" not in wire.data and b"HTTP/1.1 500" not in wire.data
        assert wire.data == b"" or wire.data.startswith(b"HTTP/1.1 4")

    asyncio.run(speak())


def test_the_hosts_resolvers(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# no\nsearch example.com\nnameserver 10.0.0.1\nnameserver fe80::1\noptions rotate\n")
    assert host_resolvers(path) == ["10.0.0.1", "fe80::1"]
    assert host_resolvers(tmp_path / "none") == []
