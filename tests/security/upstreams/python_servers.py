"""Servers of HTTP/1.1 that say what they have received: aiohttp, uvicorn over h11, and the standard library's with a lenient reader of bodies.

Each keeps a line for every request that it saw, before it answers; `GET /log` gives them, and begins anew. `/early` is answered before its
body is read.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

seen: list[dict[str, Any]] = []


def note(connection: int, method: str, target: str, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Notes a request, and returns its answer's body."""
    if target == "/log":
        lines = json.dumps(seen).encode()
        seen.clear()
        return lines
    plain = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in fields]
    seen.append({"connection": connection, "method": method, "target": target, "fields": plain, "body": body.decode("latin-1")})
    return target.encode()


async def with_aiohttp(listener: socket.socket) -> None:
    from aiohttp import web

    async def answer(request: web.BaseRequest) -> web.Response:
        body = b"" if request.raw_path.startswith("/early") else await request.read()
        peer = request.get_extra_info("peername")[1]
        return web.Response(body=note(peer, request.method, request.raw_path, request.raw_headers, body))

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.SockSite(runner, listener).start()
    await asyncio.Event().wait()


async def with_uvicorn(listener: socket.socket) -> None:
    import uvicorn

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        target = (scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")).decode("latin-1")
        body, more = b"", not target.startswith("/early")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message.get("more_body", False)
        said = note(scope["client"][1], scope["method"], target, scope["headers"], body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
        await send({"type": "http.response.body", "body": said if scope["method"] != "HEAD" else b""})

    config = uvicorn.Config(answer, http="h11", ws="none", lifespan="off", log_level="critical")
    await uvicorn.Server(config).serve([listener])


class Lenient(BaseHTTPRequestHandler):
    """The standard library's heads (a bare LF ends a line, the first of two lengths counts), and bodies as many programs read them:
    whatever int() takes is a chunk's size, and what stands behind it is passed over."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self) -> None:
        body, target = b"", self.requestline.split(" ")[1]
        if target.startswith("/early"):
            pass
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            length = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                self.close_connection = True
                return
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        said = note(self.client_address[1], self.command, target, fields, body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class LenientServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """What cannot be read ends its connection, and that is all."""


def main() -> None:
    kind, listener = sys.argv[1], socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # heads and bodies are written apart
    print(listener.getsockname()[1], flush=True)
    if kind == "http.server":
        server = LenientServer(("127.0.0.1", 0), Lenient, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        server.serve_forever()
    else:
        asyncio.run({"aiohttp": with_aiohttp, "uvicorn": with_uvicorn}[kind](listener))


if __name__ == "__main__":
    main()
