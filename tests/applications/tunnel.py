"""A local port that leads to a TCP server in a microVM, through a WebSocket that `websockify` ends beside it: for clients that speak
neither HTTP nor WebSocket. A sleep is between two bytes: neither side's connection ends."""

import asyncio
import contextlib
import ssl

from websockets.asyncio.client import connect


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: str, fields: dict[str, str], trust: ssl.SSLContext) -> None:
    async with connect(url, ssl=trust, additional_headers=fields, subprotocols=["binary"], max_size=None, open_timeout=60) as socket:

        async def up() -> None:
            while data := await reader.read(65536):
                await socket.send(data)

        async def down() -> None:
            async for data in socket:
                writer.write(data)
                await writer.drain()

        ways = {asyncio.ensure_future(up()), asyncio.ensure_future(down())}
        _, rest = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in rest:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()


async def tunnel(url: str, fields: dict[str, str], trust: ssl.SSLContext, port: int = 0) -> asyncio.Server:
    return await asyncio.start_server(lambda reader, writer: pipe(reader, writer, url, fields, trust), "127.0.0.1", port)
