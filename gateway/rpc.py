"""Frames between Torpor's processes: Unix sockets, msgspec, descriptors, peer credentials.

A frame is a 32-bit little-endian length and a msgpack array [kind, id, method, descriptors, body]. Descriptors travel by
SCM_RIGHTS with the frame's first byte; who sends some gives them away, and they are closed here once they are sent. Requests are
answered by a reply or an error; notifications by nothing.

A connection keeps the order of what is sent: handlers begin in the order of their frames, and whoever waits for an answer goes on
before the handler of a frame that followed it begins. Routes and their gates rest on this (gateway/sessions/routes.py).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import types
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import structlog

log = structlog.get_logger()

_REQUEST, _REPLY, _ERROR, _NOTIFY = range(4)
_FRAME_MAX_BYTES = 64 << 20
_UNSENT_MAX_BYTES = 2 * _FRAME_MAX_BYTES  # for a peer that does not read: a stopped process, say
_CALLED_OFF = "CancelledError"  # the kind of error of a handler that was cancelled
_FDS_MAX = 64
_CUT = -1  # among descriptors that came: here some are missing
_STANDS_SECONDS = 300.0  # a handler that takes longer is reported, unless its caller waits for longer
_PAUSE_SECONDS, _PAUSE_MOST_SECONDS = 0.01, 0.25  # between two tries to connect
_READ_BYTES = 1 << 18
_ACCEPT_SECONDS = 0.1
_CREDENTIALS = struct.Struct("3i")
_NAME_SHOWN = 40  # of a method's name that somebody made up
_FD = struct.Struct("i")
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


class NotOffered(RpcError):
    """This peer has no such call here."""

    def __init__(self, text: str) -> None:
        super().__init__("NotOffered", text)


class _Malformed(Exception):
    """What came is not a frame, or not all of one."""


class _Frame(msgspec.Struct, array_like=True):
    kind: int
    id: int
    method: str
    descriptors: int
    body: msgspec.Raw
    waits: float = 0.0  # seconds for which the caller waits, where they are more than _STANDS_SECONDS


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
    """The methods that one side offers are every public coroutine of the targets named `rpc_…`, called with
    (connection, body) or (connection, body, descriptors); the body's type is its annotation."""

    def __init__(self, *targets: object) -> None:
        self.methods: dict[str, tuple[Handler, Any, bool]] = {}
        for target in targets:
            for name in dir(target):
                if name.startswith("rpc_"):
                    handler = getattr(target, name)
                    hints = get_type_hints(handler, include_extras=True)
                    self.methods[name[4:]] = (handler, hints.get("body", Any), "descriptors" in hints)

    def only(self, names: Collection[str]) -> Service:
        """Returns what a peer gets that may call these methods and no others."""
        narrower = Service()
        narrower.methods = {name: self.methods[name] for name in names}
        return narrower


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
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent = 0  # bytes in `_out`
        self._has_strayed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.uid = peer_of(sock)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), self._readable)

    async def call(
        self, method: str, body: Any = None, kind: type[T] | Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> T:
        """Raises RpcError as the other side said, RpcLost when it is gone or silent for `timeout` seconds."""
        answer, unasked = await self.start_call(method, body, kind, timeout, descriptors)
        _close_all(unasked)
        return answer  # type: ignore[no-any-return]

    async def call_with_descriptors(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> tuple[Any, list[int]]:
        """Like `call`; the descriptors that come with the answer are the caller's."""
        return await self.start_call(method, body, kind, timeout, descriptors)

    def start_call(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> Coroutine[Any, Any, tuple[Any, list[int]]]:
        """Sends a request at once, in the order of the calls of this method and of `notify`; what is returned waits for the answer."""
        self._next += 1
        future: asyncio.Future[tuple[msgspec.Raw, list[int]]] = self._loop.create_future()
        if self.closed.done():
            _close_all(descriptors or ())
            _fail(future, RpcLost(f"{method}: not connected"))
        else:
            self._calls[self._next] = future
            self._send(_REQUEST, self._next, method, body, descriptors or [], timeout if timeout > _STANDS_SECONDS else 0.0)
        return self._answer(future, self._next, method, kind, timeout)

    async def _answer(
        self, future: asyncio.Future[tuple[msgspec.Raw, list[int]]], number: int, method: str, kind: Any, timeout: float
    ) -> tuple[Any, list[int]]:
        try:
            async with asyncio.timeout(timeout):
                raw, descriptors = await future
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:  # it came as its caller gave up
                _close_all(future.result()[1])
            if isinstance(error, TimeoutError):
                raise RpcLost(f"{method}: no answer in {timeout:g} s") from error
            raise
        finally:
            self._calls.pop(number, None)
        try:
            return (msgspec.msgpack.decode(raw, type=kind) if kind is not None else None), descriptors
        except (ValueError, RecursionError) as error:  # the second one of what is nested too deeply
            _close_all(descriptors)
            raise RpcError(type(error).__name__, f"{method}: the answer: {error}") from error

    def notify(self, method: str, body: Any = None) -> None:
        """Sends a notification; nothing happens when the other side is gone."""
        if not self.closed.done():
            self._send(_NOTIFY, 0, method, body, [])

    def close(self) -> None:
        if self.closed.done():
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for _, fds in self._out:
            _close_all(fds)
        _close_all([descriptor for descriptor in self._fds if descriptor != _CUT])
        self.closed.set_result(None)
        for future in self._calls.values():
            if not future.done():
                _fail(future, RpcLost("the connection was closed"))

    def _send(self, kind: int, number: int, method: str, body: Any, descriptors: list[int], waits: float = 0.0) -> None:
        payload = _encode([kind, number, method, len(descriptors), body, waits])
        self._out.append((memoryview(struct.pack("<I", len(payload)) + payload), descriptors))
        self._unsent += len(payload) + 4
        if len(self._out) == 1:
            self._writable()
        elif self._unsent > _UNSENT_MAX_BYTES:
            log.error("rpc.not_read", uid=self.uid, bytes=self._unsent)
            self.close()

    def _writable(self) -> None:
        while self._out:
            data, descriptors = self._out[0]
            try:
                sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            _close_all(descriptors)
            self._unsent -= sent
            if sent < len(data):
                self._out[0] = (data[sent:], [])
                continue
            self._out.popleft()
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data = self._receive()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._in += data
        try:
            self._parse()
        except (_Malformed, ValueError, RecursionError) as error:
            log.error("rpc.malformed", uid=self.uid, error=str(error))
            self.close()

    def _receive(self) -> bytes:
        """Raises OSError, _Malformed."""
        room = socket.CMSG_SPACE(_FDS_MAX * _FD.size)
        data, ancillary, flags, _ = self._socket.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array.array("i", payload[: len(payload) - len(payload) % _FD.size]))
        if flags & socket.MSG_CTRUNC:  # this process may have no more of them: one frame has lost some (unix(7))
            log.error("rpc.descriptors_cut_off", uid=self.uid)
            self._fds.append(_CUT)
        return data

    def _parse(self) -> None:
        """Raises _Malformed, ValueError, RecursionError: where the next frame begins is unknown then."""
        while len(self._in) >= 4 and not self.closed.done():
            (length,) = struct.unpack_from("<I", self._in)
            if length > _FRAME_MAX_BYTES:
                raise _Malformed(f"a frame of {length} bytes")
            if len(self._in) < 4 + length:
                return
            frame = _decode_frame(bytes(self._in[4 : 4 + length]))
            del self._in[: 4 + length]
            self._frame(frame)

    def _frame(self, frame: _Frame) -> None:
        fds = self._descriptors(frame.descriptors)
        if fds is None:
            self._cut(frame)
            return
        if frame.kind in (_REPLY, _ERROR):
            future = self._calls.get(frame.id)
            if future is None or future.done():
                _close_all(fds)
            elif frame.kind == _REPLY:
                future.set_result((frame.body, fds))
            else:
                failure = msgspec.msgpack.decode(frame.body, type=_Failure)
                is_lost = failure.kind == _CALLED_OFF
                future.set_exception(RpcLost(failure.text) if is_lost else RpcError(failure.kind, failure.text))
            return
        task = self._loop.create_task(self._serve(frame, fds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _descriptors(self, count: int) -> list[int] | None:
        """The next ones that came; None where the kernel has cut off some of these. Raises _Malformed."""
        found: list[int] = []
        if count < 0:
            raise _Malformed(f"{count} descriptors")
        while len(found) < count:
            if not self._fds:
                _close_all(found)
                raise _Malformed(f"{count} descriptors, of which {len(found)} came")
            if (one := self._fds.popleft()) == _CUT:
                _close_all(found)
                return None
            found.append(one)
        return found

    def _cut(self, frame: _Frame) -> None:
        """Only this one call has failed, and may be made again."""
        text = f"{frame.method or 'the answer'}: no descriptor is left for what came with it"
        if frame.kind == _REQUEST:
            self._send(_ERROR, frame.id, "", _Failure("Unavailable", text), [])
        elif (future := self._calls.get(frame.id)) is not None and not future.done():
            future.set_exception(RpcLost(text))

    async def _serve(self, frame: _Frame, fds: list[int]) -> None:
        task = asyncio.current_task()
        seconds = max(_STANDS_SECONDS, frame.waits)
        stands = self._loop.call_later(seconds, _report, frame.method, seconds, task)
        try:
            await self._serve_within(frame, fds)
        finally:
            stands.cancel()

    async def _serve_within(self, frame: _Frame, fds: list[int]) -> None:
        try:
            result = await self._handle(frame, fds)
        except asyncio.CancelledError:  # its caller need not wait in vain
            if frame.kind == _REQUEST and not self.closed.done():
                self._send(_ERROR, frame.id, "", _Failure(_CALLED_OFF, f"{frame.method} was called off"), [])
            raise
        except Exception as error:
            if isinstance(error, NotOffered):
                self._not_offered(error)
            elif frame.kind == _NOTIFY or isinstance(error, KeyError | TypeError | AttributeError | AssertionError):
                log.exception("rpc.failed", method=frame.method)
            if frame.kind == _REQUEST and not self.closed.done():
                kind = error.kind if isinstance(error, RpcError) else type(error).__name__
                self._send(_ERROR, frame.id, "", _Failure(kind, str(error)), [])
            return
        reply = result if isinstance(result, Reply) else Reply(result)
        if frame.kind == _REQUEST and not self.closed.done():
            self._send(_REPLY, frame.id, "", reply.body, reply.descriptors)
        else:
            _close_all(reply.descriptors)

    def _not_offered(self, error: NotOffered) -> None:
        """Once a connection: who makes calls up can make up many."""
        if not self._has_strayed:
            self._has_strayed = True
            log.warning("rpc.not_offered", uid=self.uid, error=str(error))

    async def _handle(self, frame: _Frame, fds: list[int]) -> Any:
        """Calls the handler; descriptors are its own only where it takes some."""
        try:
            if self._service is None or frame.method not in self._service.methods:
                raise NotOffered(f"{frame.method[:_NAME_SHOWN]}: user {self.uid} is offered no such call")
            handler, kind, wants_fds = self._service.methods[frame.method]
            body = msgspec.msgpack.decode(frame.body, type=kind)
        except BaseException:
            _close_all(fds)
            raise
        if wants_fds:
            return await handler(self, body, fds)
        _close_all(fds)
        return await handler(self, body)


def _report(method: str, seconds: float, task: asyncio.Task[None] | None) -> None:
    """Says where a call stands that should have ended long ago: its caller has given up, and asks again or does not."""
    where = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in _frames(task)] if task is not None else []
    log.error("rpc.stands", method=method, seconds=seconds, where=where)


def _frames(task: asyncio.Task[None]) -> Iterator[types.FrameType]:
    """Of what a task awaits, outermost first: Task.get_stack gives the first one only."""
    waiting: Any = task.get_coro()
    while (frame := getattr(waiting, "cr_frame", None)) is not None:
        yield frame
        waiting = waiting.cr_await


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Makes a future fail of which nobody need be waiting."""
    future.set_exception(error)
    future.exception()


def _close_all(descriptors: Collection[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def peer_of(sock: socket.socket) -> int:
    """Returns the user who has connected (unix(7), SO_PEERCRED)."""
    return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


class Server:
    """Listens on a Unix socket (mode 0666, the directory guards it) and serves peers of the given users only: those in `narrower` what
    is theirs there, the others all of `service`."""

    def __init__(self, path: Path, service: Service, users: Collection[int], narrower: Mapping[int, Service] | None = None) -> None:
        self.connections: set[Connection] = set()
        self.on_connect: Callable[[Connection], None] = lambda connection: None
        self.on_close: Callable[[Connection], None] = lambda connection: None
        self._services = {user: (narrower or {}).get(user, service) for user in users}
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._socket.listen(128)
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor, say: who waits is ready to be accepted all the while, and the loop would turn for nothing
            log.warning("rpc.not_accepted", error=str(error))
            self._loop.remove_reader(self._socket.fileno())
            self._again = self._loop.call_later(_ACCEPT_SECONDS, self._loop.add_reader, self._socket.fileno(), self._accept)
            return
        try:
            service = self._services.get(uid := peer_of(sock))
            connection = Connection(sock, service) if service is not None else None
        except OSError as error:
            log.warning("rpc.not_accepted", error=str(error))
            sock.close()
            return
        if connection is None:
            log.warning("rpc.refused", uid=uid)
            sock.close()
            return
        self.connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._gone(connection))
        self.on_connect(connection)

    def _gone(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.on_close(connection)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
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
        return Connection(sock, service)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError | TimeoutError):
            raise RpcLost(f"{path}: {error}") from error
        raise


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
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._keep())

    @property
    def connection(self) -> Connection | None:
        return self._connection if self._up.is_set() else None

    async def call(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> Any:
        answer, unasked = await self.call_with_descriptors(method, body, kind, timeout, descriptors)
        _close_all(unasked)
        return answer

    async def call_with_descriptors(
        self, method: str, body: Any = None, kind: Any = None, timeout: float = 10.0, descriptors: list[int] | None = None
    ) -> tuple[Any, list[int]]:
        """Waits for the connection when it is down, and for the answer, both within the timeout. Raises RpcError, RpcLost."""
        if self._connection is not None and self._connection.closed.done():
            self._up.clear()  # the task that connects again has not run yet
        if not self._up.is_set():
            began = self._loop.time()
            try:
                async with asyncio.timeout(timeout):
                    await self._up.wait()
            except BaseException as error:
                _close_all(descriptors or ())
                if isinstance(error, TimeoutError):
                    raise RpcLost(f"{method}: {self._path.name} is not there") from error
                raise
            timeout -= self._loop.time() - began
        assert self._connection is not None
        return await self._connection.call_with_descriptors(method, body, kind, timeout, descriptors)

    def notify(self, method: str, body: Any = None) -> None:
        if self._connection is not None:
            self._connection.notify(method, body)

    async def _keep(self) -> None:
        """A connection on which `on_connect` fails is closed like one that was lost: the peer must not count it as a connected one."""
        pause = _PAUSE_SECONDS
        while True:
            try:
                self._connection = connection = await connect(self._path, self._service)
                try:
                    if self._on_connect:
                        await self._on_connect(connection)
                    self._up.set()
                    pause = _PAUSE_SECONDS
                    await asyncio.wait([connection.closed])  # a future that is awaited itself would be cancelled with this task
                finally:
                    self._up.clear()
                    connection.close()
            except RpcError:
                pass
            except Exception:
                log.exception("rpc.connect_failed", path=str(self._path))
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSE_MOST_SECONDS)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._task.cancel()
