"""An incarnation ends: each connection's end is its own, and what one of them raises stops none of the others."""

from __future__ import annotations

import asyncio

from edge_rig import HOST, Rig
from test_parking import UPGRADED, drained, frame, gated
from waiting import until

from gateway.edge.wire.websocket import GOING_AWAY, PING


class Tunnels:
    """Applications' ends of WebSockets, in the order in which their clients came."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.applications: list[asyncio.StreamWriter] = []
        self.heard: list[bytes] = []

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(UPGRADED)
            self.applications.append(writer)
            while data := await reader.read(65536):
                self.heard.append(data)
            await until(writer.is_closing)

        rig.script = script

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.rig.open()
        writer.write(
            f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-aws-proxy-auth: {self.rig.token}\r\n"
            f"X-aws-proxy-port: {self.rig.app_port}\r\n\r\n".encode()
        )
        assert b"101" in await reader.readuntil(b"\r\n\r\n")
        return reader, writer


async def test_a_tunnel_whose_application_ended_its_half_does_not_keep_the_others_open(rig: Rig) -> None:
    tunnels = Tunnels(rig)
    first, second = await tunnels.open(), await tunnels.open()
    for application in tunnels.applications:
        application.write_eof()
    async with asyncio.timeout(5):
        assert await first[0].read() == await second[0].read() == b"", "the half-close is passed on"
    third = await tunnels.open()
    await gated(rig)
    await rig.control.change("hold", 1, is_live=False)
    async with asyncio.timeout(5):
        assert await third[0].read() == GOING_AWAY
    for _, writer in (first, second, third):
        writer.close()
    await until(lambda: not rig.worker.clients)
    assert rig.worker.upstream.statistics()["open"] == 0


async def test_pings_to_a_parked_tunnel_whose_application_ended_its_half_wake_nobody(rig: Rig) -> None:
    tunnels = Tunnels(rig)
    reader, writer = await tunnels.open()
    tunnels.applications[0].write_eof()
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    await gated(rig)
    assert (await drained(rig, if_quiet=False)).parked == 1
    await rig.control.change("hold", 1, is_live=False)
    (client,) = rig.worker.clients
    client.touched = 0.0  # the loop's clock may not have gone on since it was last set
    writer.write(frame(PING, b"there?", b"abcd"))
    await until(lambda: client.touched)
    assert not rig.control.resumed
    writer.write(frame(1, b"a word", b"abcd"))  # which wakes
    await until(lambda: rig.control.resumed)
    await rig.control.change("open", 2)
    await until(lambda: tunnels.heard)
    assert b"".join(tunnels.heard) == frame(1, b"a word", b"abcd")
    writer.close()
