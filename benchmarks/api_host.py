"""A host without machines for the API's benchmark: answers what control asks of vmm, and does nothing.

`python benchmarks/api_host.py SOCKET`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import uvloop

from gateway import messages as m
from gateway.rpc import Connection, Reply, Server, Service
from gateway.sessions.agent import frame

_WOKEN = 0x82


class Nothing:
    """Sessions start at once, and say that they woke."""

    def __init__(self) -> None:
        self._guests: list[socket.socket] = []

    async def rpc_host_info(self, connection: Connection, body: None) -> m.HostInfo:
        return m.HostInfo("tcg", "", "qemu", "", 4096, 2, "x86_64", [])

    async def rpc_usage(self, connection: Connection, body: None) -> m.Usage:
        return m.Usage(1 << 40, 1 << 40, 96 << 20)

    async def rpc_state(self, connection: Connection, body: None) -> m.HostState:
        count = int(os.environ.get("SNAPSHOTS", "0"))
        return m.HostState([], {f"microvm-{number:08d}": 1 for number in range(count)}, ["key"], [])

    async def rpc_prepare(self, connection: Connection, body: m.PrepareRequest) -> None:
        pass

    async def rpc_start(self, connection: Connection, body: m.StartRequest) -> Reply:
        ours, guest = socket.socketpair()
        self._guests.append(guest)
        guest.sendall(frame(_WOKEN, struct.pack("<Q", struct.unpack_from("<Q", body.wake, 12 + 8)[0])))
        return Reply(None, [ours.detach()])

    async def rpc_services(self, connection: Connection, body: m.SessionRef) -> Reply:
        made = []
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM):
            one = socket.socket(socket.AF_INET, kind)
            one.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                one.listen()
            made.append(one.detach())
        return Reply(None, made)

    async def rpc_rest(self, connection: Connection, body: m.RestRequest) -> None:
        pass

    async def rpc_kill(self, connection: Connection, body: m.SessionRef) -> None:
        pass

    async def rpc_forget(self, connection: Connection, body: m.SessionRef) -> None:
        pass


async def main(path: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = Server(path, Service(Nothing()), {os.getuid()})
    print("ready", flush=True)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
