"""PROXY header, redirect, limits, and frame counting: decisions without sockets; certificates with a real TLS client."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from edge_rig import HOST, Rig, response
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from gateway.config import Edge, Settings
from gateway.edge.client.certificates import Certificates
from gateway.edge.client.https_redirect import redirect
from gateway.edge.client.proxy_protocol import BadHeader, is_trusted, parse_proxy_header
from gateway.edge.policy.limits import Limiter, bounds_of
from gateway.edge.records.record import peer_of
from gateway.edge.wire.websocket import GOING_AWAY, FrameCounter, accept_of
from gateway.instance import make_certificates

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = SIGNATURE + b"\x21\x11\x00\x0c" + bytes([203, 0, 113, 7, 10, 0, 0, 1, 0x30, 0x39, 1, 0xBB])
V6 = SIGNATURE + b"\x21\x21\x00\x27" + ipaddress.ip_address("2001:db8::7").packed + bytes(16) + b"\x30\x39\x01\xbb" + b"\x04\x00\x00"


MAPPED = V6.replace(ipaddress.ip_address("2001:db8::7").packed, ipaddress.ip_address("::ffff:203.0.113.7").packed)


@pytest.mark.parametrize(
    ("header", "address"), [(V4, "203.0.113.7"), (V6, "2001:db8::7"), (MAPPED, "203.0.113.7"), (SIGNATURE + b"\x20\x00\x00\x00", None)]
)
def test_proxy_header_in_any_cut(header: bytes, address: str | None) -> None:
    for length in range(len(header)):
        assert parse_proxy_header(header[:length]) is None
    assert parse_proxy_header(header + b"rest") == (len(header), address)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1", b"PROXY TCP4 1.1.1.1", SIGNATURE + b"\x11\x11\0\0", SIGNATURE + b"\x22\x11\0\0", SIGNATURE + b"\x21\x11\xff\xff", SIGNATURE + b"\x21\x11\0\x04abcd"]
)  # fmt: skip
def test_what_is_no_proxy_header(data: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_proxy_header(data)


def test_who_is_trusted_with_one() -> None:
    networks = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    assert is_trusted(("10.1.2.3", 5), networks) and is_trusted(("fd00::1", 5, 0, 0), networks) and is_trusted("", networks)
    assert not is_trusted(("11.1.2.3", 5), networks) and not is_trusted(("::1", 5, 0, 0), networks)
    assert is_trusted(("::ffff:10.1.2.3", 5, 0, 0), networks) and not is_trusted(("::ffff:11.1.2.3", 5, 0, 0), networks)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
async def test_an_ipv4_client_of_a_socket_of_both_families_has_its_own_address() -> None:
    """`ListenStream=443` of torpor.socket is one: balancers were not trusted there, and applications were told ::ffff:10.1.2.3."""
    named: asyncio.Queue[str] = asyncio.Queue()

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        named.put_nowait(peer_of(writer.transport))
        writer.close()

    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        async with await asyncio.start_server(accept, sock=listener):
            for address in ("127.0.0.1", "::1"):
                _, writer = await asyncio.open_connection(address, listener.getsockname()[1])
                assert await named.get() == address
                writer.close()


@pytest.mark.parametrize(
    ("head", "suffix", "location"),
    [
        (b"GET /a?b=c HTTP/1.1\r\nHost: x.localhost\r\n\r\n", b"", b"https://x.localhost/a?b=c"),
        (b"POST / HTTP/1.0\r\nA: b\r\nhost:x.localhost:80 \r\n\r\n", b":8443", b"https://x.localhost:8443/"),
    ],
)
def test_redirect(head: bytes, suffix: bytes, location: bytes) -> None:
    assert b"308 Permanent Redirect\r\nLocation: %b\r\nDate: " % location in redirect(head, suffix)


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\n\r\n", b"GET http://evil/ HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"]
)
def test_redirect_of_what_is_no_request(head: bytes) -> None:
    assert redirect(head, b"").startswith(b"HTTP/1.1 400 ")


# ---- limits ----


def test_profiles() -> None:
    assert bounds_of(Edge(), 512) is None
    aws = bounds_of(Edge(limits="aws", workers=1), 2048)
    assert aws is not None and (aws.connections, aws.requests_per_second, aws.bytes_per_second) == (32, 40, 4_000_000)
    custom = bounds_of(Edge(limits="custom", workers=2, limit_connections=5, limit_requests_per_second=1), 512)
    assert custom is not None and (custom.connections, custom.requests_per_second) == (2, 1)


def test_a_limiter_by_its_clock() -> None:
    now = 100.0
    bounds = bounds_of(Edge(limits="custom", workers=1, limit_connections=2, limit_requests_per_second=10, limit_bytes_per_second=1024), 1)
    assert bounds is not None
    limiter = Limiter(bounds, lambda: now)
    assert [limiter.take() for _ in range(11)] == [True] * 10 + [False]
    now += 0.125
    assert limiter.take() and not limiter.take()
    assert limiter.join() and limiter.join() and not limiter.join()
    limiter.leave()
    assert limiter.join()
    assert limiter.spend(1024) == 0.0 and limiter.spend(2048) == pytest.approx(2.0)


async def test_limits_of_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch)
    await rig.start(limits="custom", workers=1, limit_requests_per_second=3, limit_connections=2)
    try:
        answers = await rig.ask(rig.request() * 5, 5)
        assert [status for status, _, _ in answers] == [200] * 3 + [429] * 2
        assert answers[-1][1]["retry-after"] == "1" and answers[-1][2] == b"The rate limit of this MicroVM is exceeded"
        await until(lambda: not rig.worker.clients)  # connections that have ended do not count
        rig.worker.routes.get(HOST).limiter._requests = 100.0  # type: ignore[union-attr]
        open_ones = []
        for expected in (200, 200, 429):
            reader, writer = await rig.open()
            writer.write(rig.request())
            assert (await response(reader))[0] == expected
            open_ones.append(writer)
        for writer in open_ones:
            writer.close()
    finally:
        await rig.stop()


async def test_bandwidth_is_slowed_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the request that comes next, to the same application: it waits for what the first has spent, and no longer."""
    rig = Rig(tmp_path, monkeypatch)
    await rig.start(limits="custom", workers=1, limit_bytes_per_second=2_000_000)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await rig.head(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1500000\r\n\r\n" + b"x" * 1_500_000)

    rig.script = script
    try:
        reader, writer = await rig.open()
        started = asyncio.get_running_loop().time()
        for _ in range(3):
            writer.write(rig.request())
            assert len((await response(reader))[2]) == 1_500_000
        # A burst of a second's worth is free; the rest takes its time, less what the last piece may be ahead.
        assert 0.8 < asyncio.get_running_loop().time() - started < 4
        assert rig.connects == 1
        writer.close()
    finally:
        await rig.stop()


# ---- the access log ----


async def test_access_log_has_a_line_a_request_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, path = Rig(tmp_path, monkeypatch), tmp_path / "access.log"
    await rig.start(access_log=str(path))
    try:
        await rig.ask(rig.request("/a?secret=1") + rig.request("/b", token="no"), 2)
        assert rig.worker.counters.access is not None
        assert rig.worker.counters.access.settle(5)
        text = path.read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [(line["path"], line["status"], line["protocol"]) for line in lines] == [("/a", 200, "HTTP/1.1"), ("/b", 403, "HTTP/1.1")]
        assert lines[0]["host"] == HOST and lines[0]["client"] == "127.0.0.1" and lines[0]["sent_bytes"] == 11
        assert "secret" not in text and rig.token not in text
        path.rename(tmp_path / "rotated")
        rig.worker.counters.access.reopen()
        await rig.ask(rig.request())
        assert rig.worker.counters.access.settle(5)
        assert len(path.read_text().splitlines()) == 1
    finally:
        await rig.stop()


# ---- WebSocket ----


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 70_000), st.sampled_from([0x82, 0x01, 0x89, 0xC1])), max_size=5), st.data())
def test_frame_boundaries_in_any_cut(frames: list[tuple[int, int]], data: st.DataObject) -> None:
    whole, boundaries = b"", {0}
    for size, first in frames:
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 65536 else b"\x7f" + size.to_bytes(8, "big")
        whole += bytes([first]) + length + b"x" * size
        boundaries.add(len(whole))
    counter, at = FrameCounter(), 0
    while at < len(whole):
        step = data.draw(st.integers(1, min(len(whole) - at, 40_000)))
        counter.feed(whole[at : at + step])
        at += step
        assert counter.at_boundary == (at in boundaries)


def test_after_a_close_frame_there_is_nothing_to_say() -> None:
    counter = FrameCounter()
    counter.feed(GOING_AWAY)
    assert not counter.at_boundary
    assert accept_of(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3


# ---- certificates ----


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Rig, Path]]:
    """A worker, and the files of its TLS."""
    settings = Settings(root=tmp_path / "root")
    settings.tls_dir.mkdir(parents=True)
    make_certificates(settings)
    (settings.tls_dir / "tickets.key").write_bytes(bytes(range(80)))
    rig = Rig(tmp_path, monkeypatch)
    await rig.start()
    yield rig, settings.tls_dir
    await rig.stop()


async def test_new_certificates_are_taken_up_and_sessions_are_shared(served: tuple[Rig, Path], tmp_path: Path) -> None:
    import socket

    rig, directory = served
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    certificates = [Certificates(directory), Certificates(directory)]
    from gateway.edge.client.tls import TlsServer

    servers = [
        await asyncio.get_running_loop().create_server(lambda c=c: TlsServer(c.context, rig.worker._application), sock=sock)
        for c, sock in zip(certificates, listeners, strict=True)
    ]
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def connect(listener: socket.socket, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None, bytes]:
        raw = socket.create_connection(listener.getsockname(), 5)
        with context.wrap_socket(raw, server_hostname=HOST, session=session) as one:
            return bool(one.session_reused), one.session, one.getpeercert(binary_form=True) or b""

    try:
        reused, session, first = await asyncio.to_thread(connect, listeners[0], None)
        assert not reused
        reused, _, _ = await asyncio.to_thread(connect, listeners[1], session)
        assert reused  # a session of one worker resumes at the other
        (directory / "edge.crt").unlink()
        make_certificates(Settings(root=directory.parent))
        assert certificates[0].refresh() and not certificates[0].refresh()
        _, _, second = await asyncio.to_thread(connect, listeners[0], None)
        assert second != first
        (directory / "edge.crt").write_text("broken")
        assert not certificates[0].refresh()
        assert (await asyncio.to_thread(connect, listeners[0], None))[2] == second
    finally:
        for server in servers:
            server.close()


async def test_stapled_answer_reaches_a_client_that_asks(served: tuple[Rig, Path]) -> None:
    import socket

    rig, directory = served
    # Any bytes are passed on: what they say is between the authority and the client.
    (directory / "edge.ocsp").write_bytes(b"\x30\x03\x0a\x01\x06")  # OCSPResponse with status unauthorized (RFC 6960, 4.2.1)
    from gateway.edge.client.tls import TlsServer

    certificates, listener = Certificates(directory), socket.create_server(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(lambda: TlsServer(certificates.context, rig.worker._application), sock=listener)
    try:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-servername", HOST, "-status"]
        done = await asyncio.to_thread(subprocess.run, command, input=b"", capture_output=True, timeout=10)
        assert b"OCSP Response Status: unauthorized" in done.stdout
    finally:
        server.close()


async def test_over_tls_a_refused_request_is_answered_and_the_connection_ended(served: tuple[Rig, Path]) -> None:
    """The client reads to the end of the stream, which a close_notify says (RFC 8446, 6.1), and the edge keeps nothing of it."""
    import socket

    from gateway.edge.client.tls import TlsServer

    rig, directory = served
    certificates, listener = Certificates(directory), socket.create_server(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(lambda: TlsServer(certificates.context, rig.worker._application), sock=listener)
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1], ssl=context, server_hostname=HOST)
        writer.write(rig.request())
        assert (await response(reader))[0] == 200
        writer.write(b"GET /\r\n\r\n")
        status, fields, _ = await response(reader)
        assert (status, fields["connection"]) == (400, "close")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        await until(lambda: not rig.worker.clients)
        writer.close()
    finally:
        server.close()
