"""A real worker on loopback, with a control and a vmm that a test scripts, and an application that it writes itself."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

from gateway import messages as m
from gateway import reach
from gateway.config import Edge
from gateway.edge.client import http1
from gateway.edge.client.certificates import Certificates
from gateway.edge.origin import upstream
from gateway.edge.worker import Worker
from gateway.rpc import Connection, Reply, RpcError, Server, Service
from gateway.tokens import Minter

HOST = "one.lambda-microvm.us-east-1.localhost"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Sent:
    """A route change that was sent to the workers. Awaiting it waits until they have applied it: a call on the same connection is
    answered after every notification before it."""

    def __init__(self, connections: list[Connection], change: m.Route) -> None:
        self._connections = connections
        self._change = change

    def __await__(self) -> Generator[Any, None, None]:
        return self._applied().__await__()

    async def _applied(self) -> None:
        for connection in self._connections:
            await connection.call("route", self._change)  # the same route once more: it changes nothing


class Control:
    def __init__(self, minter: Minter) -> None:
        self.minter = minter
        self.routes = {HOST: m.Route(HOST, "s1", 1, "open")}
        self.hidden: dict[str, m.Route] = {}
        self.resumed: list[m.ResumeRequest] = []
        self.lookups: list[str] = []
        self.on_resume: Callable[[], None] = lambda: None
        self.connections: list[Connection] = []
        self.faults: list[str] = []  # lines for microVMs' logs
        self.listened: list[tuple[str, int, int]] = []
        self.reported = asyncio.Event()  # set with each of them

    async def rpc_hello(self, connection: Connection, body: m.Hello) -> m.Table:
        self.connections.append(connection)
        return m.Table(list(self.routes.values()), self.minter.verifiers())

    async def rpc_lookup(self, connection: Connection, body: m.LookupRequest) -> m.Route | None:
        self.lookups.append(body.endpoint)
        return self.hidden.get(body.endpoint)

    async def rpc_resume(self, connection: Connection, body: m.ResumeRequest) -> None:
        self.resumed.append(body)
        self.on_resume()

    async def rpc_activity(self, connection: Connection, body: m.Activity) -> None:
        pass

    async def rpc_listened(self, connection: Connection, body: m.Listened) -> None:
        self.listened += body.ports

    async def rpc_counters(self, connection: Connection, body: m.Counters) -> None:
        self.counters = body

    async def rpc_faults(self, connection: Connection, body: m.Faults) -> None:
        self.faults += [f"{session} {line}" for session, lines in body.lines.items() for line in lines]
        self.reported.set()

    async def fault(self) -> str:
        """The one line that workers had written since this was last called."""
        async with asyncio.timeout(5):
            await self.reported.wait()
        self.reported.clear()
        (line,), self.faults = self.faults, []
        return line

    def change(self, gate: str, incarnation: int = 1, session: str = "s1", is_live: bool = True) -> Sent:
        """Sends a route change. `await control.change(...)` returns when it is applied."""
        change = m.Route(HOST, session, incarnation, gate, is_live)
        for connection in self.connections:
            connection.notify("route", change)
        return Sent(self.connections, change)


class Ended(Exception):
    pass


class Vmm:
    """Gives sockets that can reach anything on loopback: the application."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.away = False
        self.drops = 0  # so many calls lose their connection
        self.refused = 0  # calls that got no socket

    async def rpc_sockets(self, connection: Connection, body: m.SocketsRequest) -> Reply:
        if body.incarnation in self.gone:
            self.refused += 1
            raise Ended("no such incarnation")
        if self.drops:
            self.drops -= 1
            connection.close()
        if self.away:
            self.refused += 1
            raise RpcError("Busy", "not now")
        return Reply(None, [socket.socket().detach() for _ in range(body.count)])


class Either(asyncio.Protocol):
    """What ALPN does, by the first bytes."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        inner = self.worker._application("h2" if data.startswith(b"PRI") else None)
        self.transport.set_protocol(inner)
        inner.connection_made(self.transport)
        inner.data_received(data)


class Rig:
    def __init__(self, directory: Path, monkeypatch: Any) -> None:
        self.directory = directory
        monkeypatch.setattr(reach, "GUEST_ADDRESS", "127.0.0.1")
        monkeypatch.setattr(http1, "_LINGER_SECONDS", 0.05)
        monkeypatch.setattr(upstream, "_TLS_SECONDS", 0.2)
        self.now = 1_800_000_000.0
        self.minter = Minter(directory / "keys", lambda: self.now)
        self.control = Control(self.minter)
        self.vmm = Vmm()
        self.connects = 0
        self.received = b""  # everything that the application got
        self.script: Script = self.answer_all

    async def start(self, http2: bool = False, certificates: Certificates | None = None, **settings: Any) -> None:
        """`http2` says what ALPN would, where there are no certificates."""
        users = {os.getuid()}
        self.servers = [
            Server(self.directory / "c", Service(self.control), users), Server(self.directory / "v", Service(self.vmm), users),
        ]  # fmt: skip
        self.worker = Worker("edge-0", Edge.model_validate(settings), self.directory / "c", self.directory / "v")
        self.worker.wall = lambda: self.now
        if http2:
            self.worker._accept = lambda: Either(self.worker)  # type: ignore[method-assign]
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.application = await asyncio.start_server(self._application, "127.0.0.1", 0)
        self.app_port = self.application.sockets[0].getsockname()[1]
        await self.worker.serve([listener], certificates)
        self.token = self.minter.mint("s1", [(1, 65535)], 600)

    async def stop(self) -> None:
        await self.worker.tasks.close()
        for server in self.worker._servers:
            server.close()
        for one in list(self.worker.clients):
            one.transport.abort() if one.transport else None
        self.worker.link.close()
        self.worker.upstream.close()
        self.application.close()
        for rpc in self.servers:
            rpc.close()

    async def _application(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connects += 1
        try:
            await self.script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def head(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        self.received += head
        return head

    async def answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Echoes request targets, for ever."""
        while True:
            target = (await self.head(reader)).split(b" ")[1]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(target), target))

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Echoes bodies, of either framing, for ever."""
        while True:
            head, body = (await self.head(reader)).lower(), b""
            if b"transfer-encoding: chunked" in head:
                while size := int(await reader.readuntil(b"\n"), 16):
                    body += await reader.readexactly(size)
                    await reader.readline()
                await reader.readuntil(b"\r\n")
            elif b"content-length: " in head:
                body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    # ---- a client ----

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def request(self, target: str = "/", *fields: str, method: str = "GET", token: str | None = None, host: str = HOST) -> bytes:
        lines = [
            f"{method} {target} HTTP/1.1",
            f"Host: {host}",
            f"X-aws-proxy-port: {self.app_port}",
            f"X-aws-proxy-auth: {token or self.token}",
        ]
        return "\r\n".join([*lines, *fields, "", ""]).encode()

    async def ask(self, data: bytes, answers: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
        """Sends bytes on a fresh connection and reads this many answers."""
        reader, writer = await self.open()
        writer.write(data)
        got = [await response(reader) for _ in range(answers)]
        writer.close()
        return got


async def response(reader: asyncio.StreamReader, no_body: bool = False) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.strip().split("\r\n")
        status = int(line.split(" ")[1])
        fields = {name.lower(): value for name, _, value in (one.partition(": ") for one in rest)}
        body = b""
        if "content-length" in fields and not no_body and status >= 200:
            body = await reader.readexactly(int(fields["content-length"]))
        return status, fields, body


__all__ = ["HOST", "OK", "Rig", "RpcError", "response"]
