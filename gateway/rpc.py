"""Frames between Torpor's processes: Unix sockets, msgspec, descriptors, peer credentials.

A frame is a 32-bit little-endian length and a msgpack array [kind, id, method, descriptors, body]. Descriptors travel by
SCM_RIGHTS with the frame's first byte. Requests are answered by a reply or an error; notifications by nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import structlog

log = structlog.get_logger()

_REQUEST, _REPLY, _ERROR, _NOTIFY = range(4)
_FRAME_MAX_BYTES = 64 << 20
_FDS_MAX = 64
_READ_BYTES = 1 << 18
_CREDENTIALS = struct.Struct("3i")
T = TypeVar("T")


class RpcError(Exception):
    """The other side refused or failed; `kind` names its exception's class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class RpcLost(RpcError):
    """The connection is gone; the call may or may not have been carried out, and may be repeated."""

    def __init__(self, text: str) -> None:
        super().__init__("RpcLost", text)


class _Frame(msgspec.Struct, array_like=True):
    kind: int
    id: int
    method: str
    descriptors: int
    body: msgspec.Raw


class _Failure(msgspec.Struct, array_like=True):
    kind: str
    text: str


class Reply(msgspec.Struct):
    """What a handler returns when descriptors go with the answer; they are closed here once sent."""

    body: Any = None
    descriptors: list[int] = []


Handler = Callable[..., Awaitable[Any]]
_encode = msgspec.msgpack.Encoder().encode
_decode_frame = msgspec.msgpack.Decoder(_Frame).decode


class Service:
    """The methods that one side offers: every public coroutine of the targets named `rpc_…`, called with
    (connection, body) or (connection, body, descriptors); the body's type is its annotation."""

    def __init__(self, *targets: object) -> None:
        self.methods: dict[str, tuple[Handler, Any, bool]] = {}
        for target in targets:
            for name in dir(target):
                if name.startswith("rpc_"):
                    handler = getattr(target, name)
                    hints = get_type_hints(handler)
                    self.methods[name[4:]] = (handler, hints.get("body", Any), "descriptors" in hints)


class Connection:
    """One connected socket; both sides may call. Used from one event loop."""

    def __init__(self, sock: socket.socket, service: Service | None = None) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[tuple[msgspec.Raw, list[int]]]] = {}
        self._next = 0
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int], bool]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.uid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), self._readable)

    async def call(
        self, method: str, body: Any = None, kind: type[T] | Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> T:
        """Raises RpcError as the other side said, RpcLost when it is gone or silent for `timeout` seconds."""
        answer: T = (await self.call_with_descriptors(method, body, kind, timeout, descriptors))[0]
        return answer

    async def call_with_descriptors(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> tuple[Any, list[int]]:
        if self.closed.done():
            raise RpcLost(f"{method}: not connected")
        self._next += 1
        number = self._next
        future: asyncio.Future[tuple[msgspec.Raw, list[int]]] = self._loop.create_future()
        self._calls[number] = future
        self._send(_REQUEST, number, method, body, descriptors or [])
        try:
            async with asyncio.timeout(timeout):
                raw, fds = await future
        except TimeoutError as error:
            raise RpcLost(f"{method}: no answer in {timeout:g} s") from error
        finally:
            self._calls.pop(number, None)
        return (msgspec.msgpack.decode(raw, type=kind) if kind is not None else None), fds

    def notify(self, method: str, body: Any = None) -> None:
        """Sends and forgets; nothing happens when the other side is gone."""
        if not self.closed.done():
            self._send(_NOTIFY, 0, method, body, [])

    def close(self) -> None:
        if self.closed.done():
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for _, fds, ours in self._out:
            if ours:
                _close_all(fds)
        _close_all(self._fds)
        self.closed.set_result(None)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(RpcLost("the connection was closed"))
                future.exception()

    def _send(self, kind: int, number: int, method: str, body: Any, descriptors: list[int], ours: bool = False) -> None:
        payload = _encode([kind, number, method, len(descriptors), body])
        self._out.append((memoryview(struct.pack("<I", len(payload)) + payload), descriptors, ours))
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._out:
            data, descriptors, ours = self._out[0]
            try:
                sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            if ours:
                _close_all(descriptors)
            if sent < len(data):
                self._out[0] = (data[sent:], [], False)
                continue
            self._out.popleft()
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _FDS_MAX)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds.extend(fds)
        if not data:
            self.close()
            return
        self._in += data
        while len(self._in) >= 4:
            (length,) = struct.unpack_from("<I", self._in)
            if length > _FRAME_MAX_BYTES:
                log.error("rpc.frame_too_long", bytes=length)
                self.close()
                return
            if len(self._in) < 4 + length:
                return
            frame = _decode_frame(bytes(self._in[4 : 4 + length]))
            del self._in[: 4 + length]
            self._frame(frame)
            if self.closed.done():
                return

    def _frame(self, frame: _Frame) -> None:
        fds = [self._fds.popleft() for _ in range(frame.descriptors)]
        if frame.kind in (_REPLY, _ERROR):
            future = self._calls.get(frame.id)
            if future is None or future.done():
                _close_all(fds)
            elif frame.kind == _REPLY:
                future.set_result((frame.body, fds))
            else:
                failure = msgspec.msgpack.decode(frame.body, type=_Failure)
                future.set_exception(RpcError(failure.kind, failure.text))
            return
        task = self._loop.create_task(self._serve(frame, fds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, frame: _Frame, fds: list[int]) -> None:
        reply = Reply()
        try:
            handler, kind, wants_fds = self._service.methods[frame.method] if self._service else (None, None, False)
            if handler is None:
                raise KeyError(frame.method)
            body = msgspec.msgpack.decode(frame.body, type=kind)
            result = await (handler(self, body, fds) if wants_fds else handler(self, body))
            reply = result if isinstance(result, Reply) else Reply(result)
        except Exception as error:
            if frame.kind == _NOTIFY or isinstance(error, KeyError | TypeError | AttributeError | AssertionError):
                log.exception("rpc.failed", method=frame.method)
            if frame.kind == _REQUEST and not self.closed.done():
                self._send(_ERROR, frame.id, "", _Failure(type(error).__name__, str(error)), [])
            return
        if frame.kind == _REQUEST and not self.closed.done():
            self._send(_REPLY, frame.id, "", reply.body, reply.descriptors, ours=True)
        else:
            _close_all(reply.descriptors)


def _close_all(descriptors: Collection[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Server:
    """Listens on a Unix socket (mode 0666, the directory guards it) and serves peers of the given users only."""

    def __init__(self, path: Path, service: Service, users: Collection[int]) -> None:
        self.connections: set[Connection] = set()
        self.on_connect: Callable[[Connection], None] = lambda connection: None
        self.on_close: Callable[[Connection], None] = lambda connection: None
        self._service = service
        self._users = set(users)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._socket.listen(128)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return
        connection = Connection(sock, self._service)
        if connection.uid not in self._users:
            log.warning("rpc.refused", uid=connection.uid)
            connection.close()
            return
        self.connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._gone(connection))
        self.on_connect(connection)

    def _gone(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.on_close(connection)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for connection in list(self.connections):
            connection.close()


async def connect(path: Path, service: Service | None = None, timeout: float = 5.0) -> Connection:
    """Raises RpcLost when nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(sock, str(path))
    except (OSError, TimeoutError) as error:
        sock.close()
        raise RpcLost(f"{path}: {error}") from error
    return Connection(sock, service)


class Client:
    """A connection that is made again when it is lost. `on_connect` runs before others may call."""

    def __init__(
        self, path: Path, service: Service | None = None, on_connect: Callable[[Connection], Awaitable[None]] | None = None
    ) -> None:
        self._path = path
        self._service = service
        self._on_connect = on_connect
        self._connection: Connection | None = None
        self._up = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._keep())

    @property
    def connection(self) -> Connection | None:
        return self._connection if self._up.is_set() else None

    async def call(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> Any:
        return (await self.call_with_descriptors(method, body, kind, timeout, descriptors))[0]

    async def call_with_descriptors(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> tuple[Any, list[int]]:
        """Waits for the connection, within the timeout, when it is down. Raises RpcError, RpcLost."""
        if self._connection is not None and self._connection.closed.done():
            self._up.clear()  # the task that connects again has not run yet
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError as error:
            raise RpcLost(f"{method}: {self._path.name} is not there") from error
        assert self._connection is not None
        return await self._connection.call_with_descriptors(method, body, kind, timeout, descriptors)

    def notify(self, method: str, body: Any = None) -> None:
        if self._connection is not None:
            self._connection.notify(method, body)

    async def _keep(self) -> None:
        pause = 0.01
        while True:
            try:
                connection = await connect(self._path, self._service)
                self._connection = connection
                if self._on_connect:
                    await self._on_connect(connection)
                self._up.set()
                pause = 0.01
                await connection.closed
            except RpcError:
                pass
            except Exception:
                log.exception("rpc.connect_failed", path=str(self._path))
            self._up.clear()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.25)

    def close(self) -> None:
        self._task.cancel()
        if self._connection is not None:
            self._connection.close()
