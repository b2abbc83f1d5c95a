"""TLS says nothing about who may have what: names, tickets and protocols that a client mixes up open no session, and what TLS could do
before or beside a handshake is off. Endpoints through a real worker, the API by its context."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig
from waiting import until

from gateway import messages as m
from gateway.api.connections import Certificate
from gateway.config import Settings
from gateway.edge.client.certificates import TICKET_KEY_BYTES, Certificates
from gateway.edge.wire import http2_frames as f
from gateway.instance import make_certificates

OTHER = "two.lambda-microvm.us-east-1.localhost"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    one = Settings(root=tmp_path, api={"tls": True})
    one.tls_dir.mkdir(parents=True)
    make_certificates(one)
    (one.tls_dir / "tickets.key").write_bytes(bytes(range(TICKET_KEY_BYTES)))
    return one


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    one.control.routes[OTHER] = m.Route(OTHER, "s2", 1, "open")
    await one.start(certificates=Certificates(settings.tls_dir), head_seconds=2)
    yield one
    await one.stop()


class Client:
    """A client's end of TLS, in memory, so that a session can be taken along."""

    def __init__(self, ca: Path, *protocols: str, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self.context = ssl.create_default_context(cafile=str(ca))
        self.context.maximum_version = most
        if protocols:
            self.context.set_alpn_protocols(list(protocols))

    async def open(self, port: int, name: str, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
        """Raises ssl.SSLError."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = self.context.wrap_bio(self._in, self._out, server_hostname=name, session=session)
        await self._do(self.tls.do_handshake)
        return self.tls

    async def _do(self, step: Any, *arguments: Any) -> Any:
        async with asyncio.timeout(5):
            while True:
                try:
                    return step(*arguments)
                except ssl.SSLWantReadError:
                    self.writer.write(self._out.read())
                    data = await self.reader.read(65536)
                    self._in.write(data) if data else self._in.write_eof()
                finally:
                    self.writer.write(self._out.read())

    async def ask(self, data: bytes) -> bytes:
        """Returns what comes first, or nothing at the end."""
        await self._do(self.tls.write, data)
        try:
            return bytes(await self._do(self.tls.read, 65536))
        except ssl.SSLError:
            return b""


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


@pytest.mark.parametrize("name", [HOST, OTHER])
async def test_the_name_of_the_handshake_chooses_no_session(rig: Rig, settings: Settings, name: str) -> None:
    """SNI and Host may differ, as they do where a client uses a connection for two hosts: Host and token decide."""
    other = rig.minter.mint("s2", [(1, 65535)], 600)
    client = Client(settings.tls_dir / "ca.crt")
    await client.open(rig.port, name)
    asked = {(host, whose): status(await client.ask(rig.request(host=host, token=token)))
             for host in (HOST, OTHER) for whose, token in (("s1", rig.token), ("s2", other))}  # fmt: skip
    assert asked == {(HOST, "s1"): 200, (HOST, "s2"): 403, (OTHER, "s1"): 403, (OTHER, "s2"): 200}
    client.writer.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_ticket_of_one_endpoint_admits_nobody_at_another(rig: Rig, settings: Settings, version: ssl.TLSVersion) -> None:
    """Workers and endpoints share a ticket's key, so a session of one name is taken up at another: it is a cipher's state and nothing else."""
    client = Client(settings.tls_dir / "ca.crt", most=version)
    await client.open(rig.port, HOST)
    assert status(await client.ask(rig.request())) == 200
    session = client.tls.session
    assert session is not None and session.has_ticket
    client.writer.close()
    tls = await client.open(rig.port, OTHER, session)
    assert tls.session_reused, "the control: it was taken up"
    assert status(await client.ask(rig.request(host=OTHER))) == 403
    assert status(await client.ask(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())) == 403
    client.writer.close()


@pytest.mark.parametrize(
    ("agreed", "spoken"), [("http/1.1", "h2"), ("h2", "http/1.1"), ("h2", "smtp"), ("http/1.1", "smtp"), ("http/1.1", "ftp")]
)
async def test_another_protocol_than_the_one_agreed_on_is_not_spoken(rig: Rig, settings: Settings, agreed: str, spoken: str) -> None:
    """ALPN confusion: what another protocol's client says is answered by an error that carries nothing of it, and reaches no application."""
    said = {
        "h2": f.PREFACE + f.settings({}), "http/1.1": rig.request(), "smtp": b"EHLO <script>x</script>\r\nMAIL FROM:<x>\r\n\r\n",
        "ftp": b"USER <script>x</script>\r\nPASS x\r\n\r\n",
    }  # fmt: skip
    client = Client(settings.tls_dir / "ca.crt", agreed)
    tls = await client.open(rig.port, HOST)
    assert tls.selected_alpn_protocol() == agreed
    answer = await client.ask(said[spoken])
    while agreed == "h2" and answer[3:4] not in (b"\x07", b"") and len(answer) >= 9:
        answer = answer[9 + int.from_bytes(answer[:3], "big") :]  # what both sides say first
        if not answer:
            answer = await client.ask(b"")
    assert status(answer) in (400, 505) if agreed == "http/1.1" else answer[3] == f.GOAWAY
    assert b"script" not in answer and not rig.received
    client.writer.close()


class Openssl:
    """`openssl s_client`, which is told lines when it has printed what a test waits for."""

    def __init__(self, port: int, *words: object) -> None:
        self.words = ("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", HOST, *map(str, words))
        self.printed = ""

    async def __aenter__(self) -> Openssl:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*self.words, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
        return self

    async def until(self, text: str, count: int = 1) -> None:
        """Reads until it has printed this so often. Raises EOFError, TimeoutError."""
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            while self.printed.count(text) < count:
                data = await self.process.stdout.read(65536)
                if not data:
                    raise EOFError(self.printed)
                self.printed += data.decode("latin-1")

    async def end(self, line: bytes = b"") -> str:
        """Tells it a last line, and returns all that it has printed at its end."""
        async with asyncio.timeout(10):
            out, _ = await self.process.communicate(line or None)
        return self.printed + out.decode("latin-1")

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()


class Permissive:
    """OpenSSL's own server, with what ours has off."""

    def __init__(self, settings: Settings, *words: str) -> None:
        certificate, key = settings.tls_dir / "edge.crt", settings.tls_dir / "edge.key"
        self.words = ("openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", str(certificate), "-key", str(key), *words)

    async def __aenter__(self) -> int:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*self.words, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL)
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            while not (line := await self.process.stdout.readline()).startswith(b"ACCEPT"):
                assert line
        return int(line.rpartition(b":")[2])

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.process.communicate()


async def test_nothing_is_taken_before_a_handshake_is_complete(rig: Rig, settings: Settings, tmp_path: Path) -> None:
    """0-RTT, which could be replayed: a ticket allows none of it."""
    early, kept = tmp_path / "early", tmp_path / "session"
    early.write_bytes(rig.request("/early"))
    async with Permissive(settings, "-tls1_3", "-early_data") as permissive:
        said = {}
        for name, port in (("ours", rig.port), ("permissive", permissive)):
            kept.unlink(missing_ok=True)
            async with Openssl(port, "-tls1_3", "-sess_out", kept) as first:
                await until(lambda: kept.exists() and kept.stat().st_size)
                said[name] = [await first.end(b"Q\n")]
            async with Openssl(port, "-tls1_3", "-sess_in", kept, "-early_data", early) as second:
                await second.until("Early data was ")
                said[name].append(await second.end(b"Q\n"))
    assert "Early data was accepted" in said["permissive"][1], "the control"
    assert "Max Early Data: 0" in said["ours"][0] and "Early data was accepted" not in said["ours"][1] and not rig.received


async def test_a_handshake_is_not_begun_anew(rig: Rig, settings: Settings) -> None:
    """Renegotiation of TLS 1.2, at an endpoint and at the API."""
    api = Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key").context
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=api)
    async with Permissive(settings, "-tls1_2", "-client_renegotiation") as permissive:
        async with Openssl(permissive, "-tls1_2") as one:
            await one.until("Extended master secret")
            one.say(b"R\n")
            await one.until("verify return:1", 2)  # the control: the certificate is shown again
        for port in (rig.port, listener.sockets[0].getsockname()[1]):
            async with Openssl(port, "-tls1_2") as one:
                await one.until("Extended master secret")
                one.say(b"R\n")
                await one.until("RENEGOTIATING")
                assert "no renegotiation" in await one.end()
    listener.close()


def test_the_api_offers_what_endpoints_do(settings: Settings) -> None:
    """Of TLS 1.2, ephemeral keys and AEAD alone; Python's default has more (the control)."""
    ours = Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key").context
    default = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    def weak(context: ssl.SSLContext) -> list[str]:
        return [
            one["name"] for one in context.get_ciphers() if one["protocol"] != "TLSv1.3" and not (one["aead"] and one["kea"] == "kx-ecdhe")
        ]

    assert weak(default) and not weak(ours) and ours.minimum_version == ssl.TLSVersion.TLSv1_2
