"""Floods that no load generator has: `python benchmarks/flooding.py KIND PORT HOST TOKEN SECONDS`; prints how much it did.

`silent`: connections that say nothing, 1,000 open at a time, 4,000 new ones a second at most. `resets`: HTTP/2 requests with a token, each
taken back at once (CVE-2023-44487). `pings`: PING and SETTINGS in turn. The last two over 8 connections, made again as they are closed.
`spin` and `disk` have nothing to do with the service: what they cost is the machine's; `disk` writes as guest/flood.c does.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import resource
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from gateway.edge.wire import http2_frames as f  # noqa: E402

SILENT, NEW_EACH_SECOND = 1000, 4000
CONNECTIONS, BURST = 8, 100
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # l_onoff, l_linger: no port waits for late packets (socket(7))


def silent(port: int, seconds: float) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * SILENT, 4 * SILENT))
    held: collections.deque[socket.socket] = collections.deque()
    made, started = 0, time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if made > passed * NEW_EACH_SECOND:
            time.sleep(0.005)
            continue
        if len(held) == SILENT:
            held.popleft().close()
        one = socket.create_connection(("127.0.0.1", port), 10)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        held.append(one)
        made += 1
    for one in held:
        one.close()
    return made


def spin(seconds: float) -> int:
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        done += 1
    return done


def disk(seconds: float) -> int:
    """MiB."""
    done, end, block = 0, time.monotonic() + seconds, bytes(1 << 20)
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        while time.monotonic() < end:
            os.pwrite(file.fileno(), block, (done % 512) << 20)
            done += 1
            if done % 8 == 0:
                os.fdatasync(file.fileno())
    return done


class Http2Flood:
    def __init__(self, port: int, host: str, seconds: float, burst: Callable[[int], bytes]) -> None:
        """`burst` gives what is sent at once, from the next stream's number."""
        self._port, self._host, self._burst = port, host, burst
        self._end = time.monotonic() + seconds
        self._context = ssl.create_default_context()
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._context.set_alpn_protocols(["h2"])
        self.done = 0

    async def run(self) -> int:
        await asyncio.gather(*(self._again_and_again() for _ in range(CONNECTIONS)))
        return self.done

    async def _again_and_again(self) -> None:
        while time.monotonic() < self._end:
            try:
                async with asyncio.timeout(self._end - time.monotonic()):
                    await self._connection()
            except (OSError, TimeoutError):
                await asyncio.sleep(0.01)

    async def _connection(self) -> None:
        """Until it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._context, server_hostname=self._host)
        reading = asyncio.create_task(read_all(reader))
        try:
            writer.write(f.PREFACE + f.settings({}))
            stream = 1
            while not reading.done():
                writer.write(self._burst(stream))
                await writer.drain()
                await asyncio.sleep(0)
                stream += 2 * BURST
                self.done += BURST
        finally:
            reading.cancel()
            writer.transport.abort()


async def read_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(1 << 16):
            pass


def resets(host: str, token: str) -> Callable[[int], bytes]:
    fields = {":method": "GET", ":scheme": "https", ":path": "/", ":authority": host, "x-aws-proxy-auth": token}
    block = f.encode([(name.encode(), value.encode()) for name, value in fields.items()])

    def burst(first: int) -> bytes:
        streams = range(first, first + 2 * BURST, 2)
        return b"".join(f.headers(one, block, True) + f.rst_stream(one, f.Code.CANCEL) for one in streams)

    return burst


def pings(first: int) -> bytes:
    return (f.frame(f.PING, 0, 0, b"12345678") + f.settings({f.MAX_CONCURRENT_STREAMS: 100})) * (BURST // 2)


def main(kind: str, port: int, host: str, token: str, seconds: float) -> int:
    if kind in ("spin", "disk"):
        return spin(seconds) if kind == "spin" else disk(seconds)
    if kind == "silent":
        return silent(port, seconds)
    flood = Http2Flood(port, host.partition(":")[0], seconds, resets(host, token) if kind == "resets" else pings)
    return asyncio.run(flood.run())


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5])))
