"""What a guest's client says first, which names whom it calls (gateway/guest/client_hello.py, http_host.py): the same in any cut."""

from __future__ import annotations

import contextlib
import re
import ssl
import struct
from typing import Any

from gateway.guest.client_hello import ClientHelloReader, Malformed
from gateway.guest.http_host import HostReader

TRACED = ("gateway.guest.client_hello", "gateway.guest.http_host")
WORDS = (b"\x16\3\1", b"\0\0\0\x10\0\x0e\0\0\x0bexample.org", b"\xfe\x0d\0\0", b"\r\n", b"Host: example.org\r\n", b"Host : a.b", b"\r\n\r\n", b"\n", b"GET http://example.org/ HTTP/1.1",
         b"example.org:443", b"\xff", b"\0")  # fmt: skip
_NAME = re.compile(r"[a-z0-9_.-]*")


def _vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def _hello(*extensions: tuple[int, bytes], size: int = 1 << 14) -> bytes:
    body = (
        b"\3\3"
        + bytes(32)
        + b"\0"
        + _vector(2, b"\x13\1")
        + b"\1\0"
        + _vector(2, b"".join(struct.pack(">H", kind) + _vector(2, value) for kind, value in extensions))
    )
    message = b"\1" + _vector(3, body)
    return b"".join(b"\x16\3\1" + _vector(2, message[at : at + size]) for at in range(0, len(message), size))


def seeds() -> list[bytes]:
    outgoing = ssl.MemoryBIO()
    client = ssl._create_unverified_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="api.example.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    name = (0, _vector(2, b"\0" + _vector(2, b"example.org")))
    return [
        outgoing.read(), _hello(name), _hello(name, (0xFE0D, b"x"), size=20), _hello(), b"GET / HTTP/1.1\r\nHost: example.org:80\r\nAccept: */*\r\n\r\nbody",
        b"GET http://example.org/x HTTP/1.0\r\nHost: Example.org\r\n\r\n", b"\x16\3\1\0\x04\1\0\0\0",
    ]  # fmt: skip


def _read(reader: Any, data: bytes, cut: int) -> Any:
    try:
        for at in range(0, len(data), cut):
            if (found := reader.feed(data[at : at + cut])) is not None:
                return found
    except Malformed:
        return "malformed"
    return None


def check(data: bytes) -> None:
    for kind in (ClientHelloReader, HostReader):
        whole = _read(kind(), data, len(data) or 1)
        assert whole == _read(kind(), data, 1 + len(data) // 4) == _read(kind(), data, 1 + len(data) // 50), (
            f"{kind.__name__}: a cut changes what is read"
        )
        name = whole if isinstance(whole, str | None) else whole.name
        assert name is None or _NAME.fullmatch(name)
