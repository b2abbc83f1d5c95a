"""The relay: passes on connections of guests to hosts that their connectors allow by name.

`python -m gateway.guest.relay DESCRIPTOR`, a process of control's for each account, that reads what guests send, and so has as little as it
needs: it opens no file and connects to nothing (gateway/confine.py). What a client names it reads itself; whether that is allowed control
says, and hands over a socket that is connected. Nothing is decrypted. It ends with control.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from gateway import confine
from gateway import messages as m
from gateway.observe.room import allow_descriptors
from gateway.rpc import Connection, RpcError, Service

from .allow_list import HTTP, HTTPS, TCP
from .client_hello import HANDSHAKE, ClientHelloReader, Malformed
from .http_host import HostReader

CONNECTIONS = 256  # of a microVM; more wait in its own network
_PEEK_SECONDS = 10.0  # for a client to say whom it wants
_VERDICT_SECONDS = 40.0
_IDLE_SECONDS, _SWEEP_SECONDS = 3600.0, 60.0
_BUFFER_BYTES = 32 << 10  # in each direction
_ACCEPT_PAUSE_SECONDS = 0.05
_SO_ORIGINAL_DST = 80  # <linux/netfilter_ipv4.h>
_NEEDS = frozenset({"accept", "accept4", "sendto", "sendmsg"})  # on sockets that it is given: it can make none
# To a client who is refused: TLS's alert access_denied (RFC 8446, 6), and the same in HTTP.
_ALERT = bytes([21, 3, 3, 0, 2, 2, 49])
_TEXT = b"No security group names this host.\n"
_FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(_TEXT),
    _TEXT,
)


def original(sock: socket.socket) -> tuple[str, int]:
    """Returns where a connection that was redirected was going to. Raises OSError."""
    port, address = struct.unpack_from("!2xH4s", sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16))
    return socket.inet_ntoa(address), port


class Peeked:
    """What a client's first bytes say, and these bytes."""

    def __init__(self) -> None:
        self.scheme, self.name, self.fault = "", "", ""
        self.data = bytearray()
        self._tls, self._http = ClientHelloReader(), HostReader()

    def feed(self, data: bytes) -> bool:
        """Returns whether all is known."""
        self.data += data
        self.scheme = HTTPS if self.data[0] == HANDSHAKE else HTTP
        try:
            if self.scheme == HTTP:
                self.name = self._http.feed(data) or ""
                return bool(self.name)
            hello = self._tls.feed(data)
        except Malformed as error:
            self.fault = str(error)
            return True
        if hello is None:
            return False
        self.name = hello.name
        if hello.is_encrypted:
            self.fault = "an encrypted ClientHello (ECH)"
        elif not hello.name:
            self.fault = "the client names no host"
        return True


class _Passing:
    """A connection that is passed on."""

    def __init__(self, number: int, now: float) -> None:
        self.number, self.used = number, now
        self.sent = self.received = 0

    def end(self) -> m.RelayEnd:
        return m.RelayEnd(self.number, self.sent, self.received)


class _Served:
    """A microVM's listener and connections."""

    def __init__(self, body: m.RelayListen, listener: socket.socket) -> None:
        self.session, self.ports, self.blind, self.listener = body.session, set(body.ports), set(body.blind), listener
        self.tasks: set[asyncio.Task[None]] = set()
        self.passing: dict[asyncio.Task[None], _Passing] = {}

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Relay:
    """What control calls."""

    def __init__(self) -> None:
        self._served: dict[str, _Served] = {}

    async def rpc_serve(self, connection: Connection, body: m.RelayListen, descriptors: list[int]) -> None:
        await self.rpc_stop(connection, m.RelaySession(body.session))
        listener = socket.socket(fileno=descriptors[0])
        listener.setblocking(False)
        served = self._served[body.session] = _Served(body, listener)
        served.spawn(self._accept(connection, served))

    async def rpc_stop(self, connection: Connection, body: m.RelaySession) -> list[m.RelayEnd]:
        served = self._served.pop(body.session, None)
        if served is None:
            return []
        ends = [one.end() for one in served.passing.values()]
        served.passing.clear()
        tasks = list(served.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        served.listener.close()
        return ends

    def sweep(self, now: float) -> None:
        """Ends connections on which nothing has passed for long."""
        for served in self._served.values():
            for task, one in served.passing.items():
                if now - one.used > _IDLE_SECONDS:
                    task.cancel()

    async def _accept(self, control: Connection, served: _Served) -> None:
        loop, own = asyncio.get_running_loop(), asyncio.Semaphore(CONNECTIONS)

        async def serve(sock: socket.socket) -> None:
            try:
                with sock:
                    await self._serve(control, served, sock)
            except (OSError, TimeoutError, RpcError):
                pass
            finally:
                own.release()

        while True:
            await own.acquire()
            try:
                sock, _ = await loop.sock_accept(served.listener)
            except OSError:
                own.release()
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            served.spawn(serve(sock))

    async def _serve(self, control: Connection, served: _Served, sock: socket.socket) -> None:
        address, port = original(sock)
        if port in served.blind:
            verdict, upstream = await _ask(control, m.RelayQuestion(served.session, TCP, "", address, port))
            if upstream is not None or not verdict.is_undecided:
                await self._pass_on(control, served, sock, upstream, verdict, b"")
                return
        peeked = Peeked()
        try:
            async with asyncio.timeout(_PEEK_SECONDS):
                await _peek(sock, peeked)
        except TimeoutError:
            peeked.fault = "the client says nothing in time"
        question = m.RelayQuestion(served.session, peeked.scheme or HTTPS, peeked.name, address, port, peeked.fault)
        verdict, upstream = await _ask(control, question)
        if upstream is None and peeked.scheme:
            with contextlib.suppress(OSError):
                sock.send(_ALERT if peeked.scheme == HTTPS else _FORBIDDEN)
            return
        await self._pass_on(control, served, sock, upstream, verdict, bytes(peeked.data))

    async def _pass_on(
        self, control: Connection, served: _Served, sock: socket.socket, upstream: socket.socket | None, verdict: m.RelayVerdict,
        data: bytes,
    ) -> None:  # fmt: skip
        if upstream is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as where nobody is
            return
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        one = served.passing[task] = _Passing(verdict.connection, loop.time())
        try:
            with upstream:
                for end in (sock, upstream):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if data:
                    await loop.sock_sendall(upstream, data)
                    one.sent = len(data)
                async with asyncio.TaskGroup() as both:
                    both.create_task(_pour(sock, upstream, one, is_sent=True))
                    both.create_task(_pour(upstream, sock, one, is_sent=False))
        except* OSError:
            pass  # one of the two has left
        finally:
            if served.passing.pop(task, None) is not None:
                control.notify("ended", one.end())


async def _ask(control: Connection, question: m.RelayQuestion) -> tuple[m.RelayVerdict, socket.socket | None]:
    """Raises RpcError."""
    verdict, descriptors = await control.call_with_descriptors("decide", question, m.RelayVerdict, _VERDICT_SECONDS)
    return verdict, socket.socket(fileno=descriptors[0]) if descriptors else None


async def _peek(sock: socket.socket, peeked: Peeked) -> None:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    while True:
        data = await loop.sock_recv(sock, 4096)
        if not data:
            peeked.fault = "the client has left"
            return
        if peeked.feed(data):
            return


async def _pour(source: socket.socket, target: socket.socket, one: _Passing, is_sent: bool) -> None:
    """What is read is written before more is read. Raises OSError."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _BUFFER_BYTES):  # one that is idle has no buffer
        await loop.sock_sendall(target, data)
        one.used = loop.time()
        if is_sent:
            one.sent += len(data)
        else:
            one.received += len(data)
    target.shutdown(socket.SHUT_WR)


async def _main(descriptor: int) -> None:
    relay = Relay()
    control = Connection(socket.socket(fileno=descriptor), Service(relay))
    missing = {confine.LANDLOCK, confine.FILTER} - set(
        confine.confine([Path(one) for one in (*sys.path, "/usr", "/lib") if one], [], _NEEDS)
    )
    control.notify("walls", sorted(missing))
    while not control.closed.done():
        await asyncio.wait([control.closed], timeout=_SWEEP_SECONDS)
        relay.sweep(asyncio.get_running_loop().time())


def main() -> None:
    allow_descriptors()
    # Not by uvloop: it has a ring (io_uring), and what is asked for in a ring passes the filter of system calls.
    asyncio.run(_main(int(sys.argv[1])))


if __name__ == "__main__":
    main()
