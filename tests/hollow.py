"""A service without microVMs: the real control and edge workers over a host that only says that it did what was asked.

Every session's application is one server in a network namespace of the test's, at the address that all guests have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from namespaces import Namespace
from outside import bound
from service import REPO, free_port

from gateway import instance
from gateway import messages as m
from gateway.config import Edge, Limits, Settings
from gateway.messages import Shape
from gateway.process import READY_VARIABLE, SETTINGS_VARIABLE, SOCKETS_VARIABLE, passed
from gateway.rpc import Connection, Reply, Server, Service
from gateway.sessions.frame import frame
from gateway.sessions.model import Build, IdlePolicy, Image, Session, Version
from gateway.sessions.states import State
from gateway.sessions.store import Store
from gateway.tokens import Minter
from vmm.namespaces import inside
from vmm.network import GUEST_ADDRESS

ARN = "arn:aws:lambda:us-east-1:123456789012:microvm-image:app"
PORT = 8080
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"


class Host:
    """What vmm would answer. Resumes wait until `released`."""

    def __init__(self, sessions: list[str], namespace: str) -> None:
        self._sessions, self._namespace = sessions, namespace
        self._guests: list[socket.socket] = []
        self.released = asyncio.Event()
        self.prepared = 0

    async def rpc_host_info(self, connection: Connection, body: None) -> m.HostInfo:
        return m.HostInfo("tcg", "", "qemu", 4096, 2, "x86_64")

    async def rpc_reclaim_and_report_capacity(self, connection: Connection, body: None) -> m.Capacity:
        return m.Capacity(1 << 40, 1 << 40, 1 << 40, 1 << 20)

    async def rpc_state(self, connection: Connection, body: None) -> m.HostState:
        return m.HostState([], dict.fromkeys(self._sessions, 1), ["key"], [])

    async def rpc_prepare(self, connection: Connection, body: m.PrepareRequest) -> None:
        await self.released.wait()
        self.prepared += 1

    async def rpc_start(self, connection: Connection, body: m.StartRequest) -> Reply:
        ours, guest = socket.socketpair()
        self._guests.append(guest)
        guest.sendall(frame(0x82, struct.pack("<Q", struct.unpack_from("<Q", body.wake, 12 + 8)[0])))
        return Reply(None, [ours.detach()])

    async def rpc_services(self, connection: Connection, body: m.ServicesRequest) -> Reply:
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM)
        made = [bound(kind, ("127.0.0.1", 0)) for kind in kinds]
        for one, kind in zip(made, kinds, strict=True):
            if kind == socket.SOCK_STREAM:
                one.listen()
        return Reply(None, [one.detach() for one in made])

    async def rpc_sockets(self, connection: Connection, body: m.SocketsRequest) -> Reply:
        def make() -> list[int]:
            return [socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK).detach() for _ in range(body.count)]

        return Reply(None, inside(Path(self._namespace), make))

    async def rpc_marks(self, connection: Connection, body: None) -> m.Marks:
        return m.Marks("", "")

    async def rpc_mark(self, connection: Connection, body: m.MarkRequest) -> None:
        pass

    async def rpc_quarantined(self, connection: Connection, body: None) -> list[m.Quarantined]:
        return []

    async def rpc_forget(self, connection: Connection, body: m.SessionRef) -> None:
        pass

    rpc_kill = rpc_forget


class Hollow:
    """`application` is a program that is started in place of our own server, with the port and address to listen on."""

    def __init__(self, directory: Path, sessions: int, workers: int = 2, application: str = "") -> None:
        self._program = application
        self.settings = Settings(
            root=directory / "root", run=directory / "run", name="hollow", edge=Edge(port=free_port(), workers=workers),
            limits=Limits(reserve_mib=0),
        )  # fmt: skip
        self.ids = [f"microvm-{uuid.UUID(int=number)}" for number in range(1, sessions + 1)]
        suffix = instance.wildcard(self.settings).removeprefix("*")
        self.endpoints = [f"{uuid.uuid4()}{suffix}:{self.settings.edge.port}" for _ in self.ids]
        self._namespace = Namespace()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._loop = asyncio.new_event_loop()
        self._log = directory / "log"

    def start(self) -> None:
        self._namespace.ip("addr", "add", f"{GUEST_ADDRESS}/32", "dev", "lo")
        for path in (self.settings.root, self.settings.runtime):
            path.mkdir(parents=True)
        instance.prepare(self.settings)
        asyncio.run(self._fill())
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._do(self._serve())
        self._launch("control", ["gateway.control"], {"api": [listening()], "metrics": [listening()]})
        for slot in range(self.settings.edge.workers):
            edge = socket.socket()
            edge.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            edge.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            edge.bind(("127.0.0.1", self.settings.edge.port))
            edge.listen(4096)
            self._launch(f"edge-{slot}", ["gateway.edge", str(slot)], {"edge": [edge]})
        self.minter = Minter(self.settings.control_dir / "keys.json")

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait(20)
        if self._loop.is_running():
            self._do(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._namespace.close()

    def token(self, number: int) -> str:
        return self.minter.mint(self.ids[number], [(1, 65535)], 3600)

    def client(self, number: int, request: str = "GET / HTTP/1.1", fields: str = "") -> ssl.SSLSocket:
        """A connection, with a request for this session on its way."""
        context = ssl.create_default_context(cafile=str(self.settings.tls_dir / "ca.crt"))
        host = self.endpoints[number]
        sock = context.wrap_socket(socket.create_connection(("127.0.0.1", self.settings.edge.port)), server_hostname=host.partition(":")[0])
        sock.settimeout(40)
        sock.sendall(f"{request}\r\nHost: {host}\r\nX-aws-proxy-auth: {self.token(number)}\r\n{fields}\r\n".encode())
        return sock

    def memory_kib(self, name: str) -> int:
        status = Path(f"/proc/{self.processes[name].pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.host.released.set)

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def _fill(self) -> None:
        """As control writes it: an image, and its sessions, asleep."""
        store = Store(self.settings.control_dir / "torpor.db")
        await store.open()
        now = time.time()
        version = Version(ARN, "1.0", {"resources": [{"minimumMemoryInMiB": 512}]}, now, now, "SUCCESSFUL", key="key")
        version.shape, version.build = Shape(2048, 1, 1 << 30, "tcg", 512), Build("b", "SUCCESSFUL", now)
        store.put_image(Image("i", ARN, "app", now, now, "CREATED", versions=[version], last_number=1))
        for identifier, endpoint in zip(self.ids, self.endpoints, strict=True):
            store.put_session(
                Session(
                    identifier, endpoint.partition(":")[0], ARN, "1.0", "key", 512, now, 28_800, state=State.SUSPENDED, incarnation=1,
                    suspended_at=now, suspended_by="api", idle_policy=IdlePolicy(3600, 3600, True),
                    ingress=["arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:ALL_INGRESS"],
                )
            )  # fmt: skip
        await store.commit()
        await store.close()

    async def _serve(self) -> None:
        self.host = Host(self.ids, self._namespace.path)
        self._server = Server(self.settings.vmm_socket, Service(self.host), {0, self.settings.users.edge})
        if self._program:
            self.processes["application"] = subprocess.Popen(self._namespace.enter(self._program, str(PORT), GUEST_ADDRESS))
            return
        listener = self._namespace.inside(lambda: bound(socket.SOCK_STREAM, (GUEST_ADDRESS, PORT)))
        self._application = await asyncio.start_server(answer, sock=listener, backlog=4096)

    async def _end(self) -> None:
        self._server.close()
        if not self._program:
            self._application.close()

    def _do(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)  # type: ignore[arg-type]

    def _as_edge(self) -> list[str]:
        """Control has an edge's calls for the edges' user alone. That user reads root's files here: the code may be below a closed home."""
        rights = "+dac_override,+dac_read_search"
        user = self.settings.users.edge
        return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}", "--"]

    def _launch(self, name: str, module: list[str], sockets: dict[str, list[socket.socket]]) -> None:
        numbers = {purpose: [sock.fileno() for sock in socks] for purpose, socks in sockets.items()}
        out, ready = os.pipe()
        with passed(self.settings) as settings, self._log.open("ab") as log:
            environment = os.environ | {
                SETTINGS_VARIABLE: str(settings), SOCKETS_VARIABLE: json.dumps(numbers), READY_VARIABLE: str(ready),
            }  # fmt: skip
            self.processes[name] = subprocess.Popen(
                [*(self._as_edge() if name.startswith("edge") else []), sys.executable, "-m", *module], env=environment, cwd=REPO, stderr=log, stdout=log,
                pass_fds=[ready, settings, *(number for group in numbers.values() for number in group)],
            )  # fmt: skip
        os.close(ready)
        word = os.read(out, 1)
        os.close(out)
        for group in sockets.values():
            for sock in group:
                sock.close()
        assert word == b".", self.log


def listening() -> socket.socket:
    sock = bound(socket.SOCK_STREAM, ("127.0.0.1", 0))
    sock.listen(1024)
    return sock


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes what a request has of content, then says yes."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            left = int(length[1]) if length else 0
            while left:
                left -= len(await reader.readexactly(min(left, 1 << 16)))
            writer.write(ANSWER)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def hollow(sessions: int, workers: int = 2, application: str = "") -> Iterator[Hollow]:
    with tempfile.TemporaryDirectory(prefix="torpor-hollow-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        one = Hollow(Path(directory), sessions, workers, application)
        try:
            one.start()
            yield one
        finally:
            one.stop()
        assert "Traceback" not in one.log, one.log[-4000:]
