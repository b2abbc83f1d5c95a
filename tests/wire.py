"""A raw TLS client for endpoints: what goes over the wire is what the test wrote."""

from __future__ import annotations

import json
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import PATIENCE


@dataclass
class Answer:
    status: int
    fields: dict[str, str]
    body: bytes

    def json(self) -> Any:
        assert self.body, self
        return json.loads(self.body)


class Endpoint:
    """One connection to a microVM's endpoint."""

    def __init__(self, endpoint: str, ca: Path, timeout: float = 40.0 * PATIENCE) -> None:
        host, _, port = endpoint.partition(":")
        context = ssl.create_default_context(cafile=str(ca))
        raw = socket.create_connection(("127.0.0.1", int(port or 443)), timeout)
        self.host = endpoint
        self.sock = context.wrap_socket(raw, server_hostname=host)
        self._file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, path: str = "/", token: str | None = None, method: str = "GET", body: bytes | None = None, **fields: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {fields.pop('host', self.host)}"]
        if token is not None:
            lines.append(f"X-aws-proxy-auth: {token}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))

    def answer(self, head_only: bool = False) -> Answer:
        """The next final response. Raises EOFError when the connection closes instead."""
        while True:
            line = self._file.readline()
            if not line:
                raise EOFError("closed")
            status = int(line.split()[1])
            fields: dict[str, str] = {}
            while text := self._file.readline().decode("latin-1").strip():
                name, _, value = text.partition(":")
                fields[name.lower()] = value.strip()
            if status >= 200 or status == 101:
                break
        return Answer(status, fields, b"" if head_only or status in (101, 204, 304) else self._body(fields))

    def _body(self, fields: dict[str, str]) -> bytes:
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                self._file.readline()
            while self._file.readline().strip():
                pass
            return body
        if "content-length" in fields:
            return self._file.read(int(fields["content-length"]))
        return self._file.read()

    def close(self) -> None:
        self._file.close()
        self.sock.close()


def read_until(sock: socket.socket, wanted: bytes, seconds: float = 60.0) -> bytes:
    """What comes up to and with `wanted`. Raises EOFError where the connection ends before, TimeoutError where it does not come."""
    deadline, seen = time.monotonic() + seconds * PATIENCE, b""
    while wanted not in seen:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {wanted!r} in {seen[-500:]!r}")
        piece = sock.recv(65536)
        if not piece:
            raise EOFError(f"no {wanted!r} in {seen[-500:]!r}")
        seen += piece
    return seen


def get(endpoint: str, ca: Path, token: str | None, path: str = "/", timeout: float = 40.0 * PATIENCE, **fields: Any) -> Answer:
    """One request on a connection of its own."""
    one = Endpoint(endpoint, ca, timeout)
    try:
        one.request(path, token, **fields)
        return one.answer()
    finally:
        one.close()
