"""The application behind a load: it sends content, takes content, does both at once, is slow, breaks off, and echoes messages."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from load.content import PIECE, pieces

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


async def content_of(reader: asyncio.StreamReader, fields: dict[str, str]):
    """A request's content, piece by piece."""
    if "chunked" in fields.get("transfer-encoding", ""):
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            while size:
                piece = await reader.read(min(size, PIECE))
                if not piece:
                    raise ConnectionError
                size -= len(piece)
                yield piece
            await reader.readline()
        while (await reader.readline()).strip():
            pass
        return
    left = int(fields.get("content-length", 0))
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            raise ConnectionError
        left -= len(piece)
        yield piece


async def messages(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
    """A WebSocket that echoes (RFC 6455)."""
    accept = base64.b64encode(hashlib.sha1(key.encode() + GUID).digest()).decode()
    writer.write(f"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode())
    while True:
        first, second = await reader.readexactly(2)
        length = second & 127
        if length == 126:
            (length,) = struct.unpack(">H", await reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", await reader.readexactly(8))
        mask = await reader.readexactly(4)
        masked = await reader.readexactly(length)
        whole = int.from_bytes(mask * (-(-length // 4)), "big") >> 8 * (-length % 4)
        data = (int.from_bytes(masked, "big") ^ whole).to_bytes(length, "big")
        kind = 10 if first & 15 == 9 else first & 15
        size = (
            bytes([length])
            if length < 126
            else b"\x7e" + struct.pack(">H", length)
            if length < 65536
            else b"\x7f" + struct.pack(">Q", length)
        )
        writer.write(bytes([first & 0xF0 | kind]) + size + data)
        await writer.drain()
        if kind == 8:
            return


class Broken(Exception):
    """The application breaks off, as the request asked."""


async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str, fields: dict[str, str]) -> None:
    url = urlsplit(target)
    query = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
    pause, chunked = query.get("pause_ms", 0) / 1000, query.get("chunked", 0)

    async def send(piece: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await writer.drain()

    if url.path in ("/content", "/break"):
        size = query["size"]
        async for _ in content_of(reader, fields):
            pass
        await asyncio.sleep(pause)
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % size))
        for piece in pieces(query["seed"], size // 2 if url.path == "/break" else size):
            await send(piece)
        if url.path == "/break":
            raise Broken
    elif url.path == "/digest":
        found = hashlib.sha256()
        async for piece in content_of(reader, fields):
            found.update(piece)
            await asyncio.sleep(pause)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + found.hexdigest().encode())
    elif url.path == "/echo":
        chunked = 1
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        async for piece in content_of(reader, fields):
            await send(piece)
    if chunked and url.path != "/digest":
        writer.write(b"0\r\n\r\n")
    await writer.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            fields = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in rest)}
            if "upgrade" in fields:
                await messages(reader, writer, fields["sec-websocket-key"])
                return
            await respond(reader, writer, line.split(" ")[1], fields)
    except Broken:
        writer.transport.abort()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
