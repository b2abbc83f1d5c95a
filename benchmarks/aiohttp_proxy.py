"""The peer that most people would write: a reverse proxy with aiohttp, which checks the same token."""

from __future__ import annotations

import ssl
import sys
import time
from pathlib import Path

import aiohttp
import msgspec
import uvloop
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gateway.messages import Verifier
from gateway.tokens import Checker, TokenError

DROPPED = {"host", "connection", "x-aws-proxy-auth", "x-aws-proxy-port", "transfer-encoding", "content-length"}


def main() -> None:
    port, certificate, key, keys, origin = sys.argv[1:]
    checker = Checker(msgspec.json.decode(Path(keys).read_bytes(), type=list[Verifier]))
    session: list[aiohttp.ClientSession] = []

    async def forward(request: web.Request) -> web.StreamResponse:
        try:
            checker.verify(request.headers.get("X-aws-proxy-auth", ""), time.time())
        except TokenError:
            return web.Response(status=403)
        fields = {name: value for name, value in request.headers.items() if name.lower() not in DROPPED}
        async with session[0].request(request.method, f"http://127.0.0.1:{origin}{request.raw_path}", headers=fields) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in DROPPED}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def make() -> web.Application:
        session.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=256)))
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", forward)
        return app

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    uvloop.install()
    web.run_app(make(), host="127.0.0.1", port=int(port), ssl_context=context, access_log=None, print=None)


if __name__ == "__main__":
    main()
