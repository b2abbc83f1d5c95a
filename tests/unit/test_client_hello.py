"""What a client names, in TLS and in HTTP: read from any pieces, bounded, and refused where another parser might read it otherwise."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.guest.client_hello import ClientHelloReader, Hello, Malformed
from gateway.guest.http_host import HostReader

NAME = "api.example.org"


def real(name: str | None = NAME) -> bytes:
    """OpenSSL's own ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def server_name(*names: bytes, kind: int = 0) -> tuple[int, bytes]:
    return 0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names))


def hello(*extensions: tuple[int, bytes], tail: bytes = b"", inner: bytes = b"") -> bytes:
    """A handshake message."""
    body = b"\3\3" + bytes(32) + vector(1, b"") + vector(2, b"\x13\1") + vector(1, b"\0")
    body += vector(2, b"".join(struct.pack(">H", kind) + vector(2, value) for kind, value in extensions) + inner) + tail
    return b"\1" + vector(3, body)


def records(message: bytes, size: int = 1 << 14) -> bytes:
    return b"".join(b"\x16\3\1" + vector(2, message[at : at + size]) for at in range(0, len(message), size))


def read(data: bytes, pieces: int = 1 << 20) -> Hello | None:
    reader, found = ClientHelloReader(), None
    for at in range(0, len(data), pieces):
        found = reader.feed(data[at : at + pieces]) or found
    return found


@pytest.mark.parametrize("pieces", [1, 2, 7, 100, 10_000])
def test_a_real_client_is_understood_in_pieces(pieces: int) -> None:
    assert read(real(), pieces) == Hello(NAME, False)


@pytest.mark.parametrize("size", [1, 3, 50, 16_384])
def test_a_message_in_several_records(size: int) -> None:
    assert read(records(hello(server_name(NAME.encode())), size), 5) == Hello(NAME, False)


def test_what_comes_behind_is_nothing_to_it() -> None:
    """Early data, say."""
    assert read(records(hello(server_name(b"A.Example.ORG"))) + b"\x17\3\3\0\1x") == Hello("a.example.org", False)


def test_who_names_nobody_says_so() -> None:
    assert read(real(None)) == Hello("", False)
    assert read(records(b"\1" + vector(3, b"\3\3" + bytes(32) + b"\0" + vector(2, b"\x13\1") + b"\1\0"))) == Hello("", False)


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_an_encrypted_hello_is_seen(kind: int) -> None:
    assert read(records(hello(server_name(b"front.example.org"), (kind, b"\0secret")))) == Hello("front.example.org", True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x80\x2e\1\0\2\0\x15",  # SSL 2's own hello
        b"\x16\2\0\0\5\1\0\0\1\0",
        b"\x16\3\1\0\0",  # an empty record
        b"\x16\3\1\x40\1",  # longer than a record may be
        records(b"\2" + hello(server_name(NAME.encode()))[1:]),  # a ServerHello
        b"\x16\3\1" + vector(2, hello(server_name(NAME.encode()))[:20]) + b"\x17\3\3\0\1x",  # another record in its middle
        records(hello(server_name(NAME.encode())) + b"\1"),  # a second message in its record
        records(hello(server_name(NAME.encode()), server_name(b"other.example.org"))),
        records(hello(server_name(NAME.encode(), b"other.example.org"))),
        records(hello(server_name(NAME.encode(), kind=1))),
        records(hello((0, b""))),
        records(hello((0, server_name(NAME.encode())[1] + b"x"))),
        records(hello(server_name(b"10.0.0.1"))),
        records(hello(server_name(b"api.example.org."))),
        records(hello(server_name(b"api.example.org\0.evil.example"))),
        records(hello(server_name(b"api.ex\xc3\xa4mple.org"))),
        records(hello(server_name(b"localhost"))),
        records(hello(server_name(NAME.encode()), tail=b"x")),
        records(hello(server_name(NAME.encode()), inner=b"\0\7\xff\xff")),
        records(b"\1" + (1 << 15).to_bytes(3, "big")),
        records(hello((21, bytes(17_000)))),  # padding without end
    ],
)
def test_what_could_be_read_otherwise_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        read(data)
    with pytest.raises(Malformed):
        read(data, 1)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_refused_or_waited_for(data: bytes, pieces: int) -> None:
    try:
        read(data, pieces)
    except Malformed:
        return


@given(st.integers(0, 511), st.integers(1, 255), st.integers(1, 64))
def test_a_bit_that_falls_changes_no_name_unseen(at: int, change: int, pieces: int) -> None:
    """Whatever is changed: the name is the one that is there, or it is refused, or the client has not said all."""
    data = bytearray(records(hello((10, b"\0\2\0\x1d"), server_name(NAME.encode()), (43, b"\2\3\4")), 40))
    data[at % len(data)] ^= change
    try:
        found = read(bytes(data), pieces)
    except Malformed:
        return
    plain = b"".join(bytes(data[i + 5 : i + 45]) for i in range(0, len(data), 45)).lower()
    assert found is None or not found.name or found.name.encode() in plain


@given(st.binary(max_size=200_000))
def test_no_client_has_more_kept_than_a_hello_has(data: bytes) -> None:
    reader = ClientHelloReader()
    try:
        for at in range(0, len(data), 4096):
            reader.feed(b"\x16\3\1\x10\0\1\0\x3f\xf0" + data[at : at + 4087])
            assert len(reader._in) + len(reader._message) <= (16 << 10) + 4096
    except Malformed:
        return


# ---- HTTP ----


def host(data: bytes, pieces: int = 1 << 20) -> str | None:
    reader, found = HostReader(), None
    for at in range(0, len(data), pieces):
        found = reader.feed(data[at : at + pieces]) or found
    return found


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
        b"POST /a?b HTTP/1.0\r\nAccept: */*\r\nHOST:\t API.Example.org:8080 \r\nX: \xff\r\n\r\nbody",
        b"GET http://api.example.org/ HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
    ],
)
def test_the_host_of_a_request(head: bytes, pieces: int) -> None:
    assert host(head, pieces) == NAME
    assert host(head[: head.index(b"\r\n\r\n")], pieces) is None, "it has not said all"


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: api.example.org\r\nHost: other.example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : api.example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\r\n Host: other.example.org\r\nHost: api.example.org\r\n\r\n",
        b"GET / HTTP/1.1\nHost: api.example.org\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\nHost: other.example.org\r\nHost: api.example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\rHost: other.example.org\r\nHost: api.example.org\r\n\r\n",
        b"GET http://other.example.org/ HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
        b"GET http://a@api.example.org/ HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
        b"CONNECT other.example.org:443 HTTP/1.1\r\nHost: api.example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: api.example.org:80a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: api.example.org, other.example.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4000,
    ],
)
def test_a_request_that_two_servers_could_read_differently_is_refused(head: bytes) -> None:
    with pytest.raises(Malformed):
        host(head)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_head_is_refused_or_waited_for(data: bytes, pieces: int) -> None:
    try:
        host(data, pieces)
    except Malformed:
        return
