"""The QEMU Machine Protocol on a Unix socket, with descriptors in messages (qemu: docs/interop/qmp-spec.txt)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 20.0
_LINE_MOST_BYTES = 16 << 20  # answers have some 100 KiB at most; a hypervisor that was taken over may say what it likes


class QmpError(Exception):
    """QEMU refused a command, or the connection ended."""


class Qmp:
    """One connection. Commands are answered in order, so several may be under way."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._loop = asyncio.get_running_loop()
        self._greeting: asyncio.Future[Any] = self._loop.create_future()
        self._error: Exception | None = None
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None
        self.closed = self._loop.create_future()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def connect(cls, path: Path) -> Qmp:
        """Raises QmpError when nobody answers in time."""
        qmp: Qmp | None = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            try:
                async with asyncio.timeout(COMMAND_SECONDS):
                    await asyncio.get_running_loop().sock_connect(sock, str(path))
                    qmp = cls(sock)
                    await qmp._greeting
                    await qmp.run("qmp_capabilities")
            except BaseException:
                if qmp is not None:
                    qmp.close()
                sock.close()
                raise
        except (OSError, TimeoutError) as error:
            raise QmpError(f"{path}: {error or 'no greeting'}") from error
        return qmp

    def send(self, command: str, descriptors: Sequence[int] = (), **arguments: Any) -> asyncio.Future[Any]:
        """Sends at once; the future holds QEMU's answer. Names with hyphens are written with underscores."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._error is not None:
            future.set_exception(self._error)
            return future
        asked: dict[str, Any] = {"execute": command}
        if arguments:
            asked["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps(asked, separators=(",", ":")).encode()  # QEMU reads byte by byte, 5 µs each
        try:
            if descriptors:
                socket.send_fds(self._socket, [message], list(descriptors))
            else:
                self._socket.sendall(message)
        except OSError as error:
            self._fail(QmpError(f"{command}: {error}"))
            future.set_exception(QmpError(f"{command}: {error}"))
            return future
        self._waiting.append(future)
        return future

    async def run(self, command: str, descriptors: Sequence[int] = (), **arguments: Any) -> Any:
        """Raises QmpError with QEMU's description when it refuses."""
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                return await self.send(command, descriptors, **arguments)
        except TimeoutError as error:
            raise QmpError(f"{command}: no answer in {COMMAND_SECONDS:.0f} s") from error
        except QmpError as error:
            raise QmpError(f"{command}: {error}") from error

    async def give(self, command: str, descriptor: int, **arguments: Any) -> None:
        """Runs a command with a descriptor, which is closed here. Raises QmpError."""
        try:
            await self.run(command, [descriptor], **arguments)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._fail(QmpError("closed"))

    def _readable(self) -> None:
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._fail(QmpError("the hypervisor has ended"))
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _LINE_MOST_BYTES:
            self._buffer = b""
            self._fail(QmpError(f"a line longer than {_LINE_MOST_BYTES >> 20} MiB"))
            return
        try:
            for line in lines:
                self._message(json.loads(line))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            self._fail(QmpError(f"what came is no QMP: {error!r}"))

    def _message(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.on_event(message)
        elif "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message)
        elif self._waiting:
            failure = QmpError(str(message["error"]["desc"])) if "error" in message else None
            answer = message["return"] if failure is None else None
            future = self._waiting.popleft()
            if future.done():
                return
            if failure is not None:
                future.set_exception(failure)
            else:
                future.set_result(answer)

    def _fail(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for future in (*self._waiting, self._greeting):
            if not future.done():
                future.set_exception(error)
                future.exception()
        self._waiting.clear()
        if not self.closed.done():
            self.closed.set_result(None)
