"""Shells in running microVMs: between an edge's socket and the agent's channel (vmm/guest/shell.c).

The edge's half is one end of a socket pair (gateway/messages.py has its messages). Both directions go by credit, so a terminal that
does not read stops its own shell and nothing else.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable

import structlog

from gateway.messages import SHELL_EXIT, SHELL_INPUT, SHELL_MESSAGE_BYTES, SHELL_OUTPUT, SHELL_RESIZE

from .frame import frame

log = structlog.get_logger()

SHELLS_MAX = 16  # as in vmm/guest/shell.h
_OPEN, _INPUT, _RESIZE, _CREDIT, _CLOSE = 0x05, 0x06, 0x07, 0x08, 0x09
_WINDOW_BYTES = 32 << 10  # typed and not taken by the terminal
_CREDIT_BYTES = 64 << 10  # of output under way
_FRAME_BYTES = 4096


class ShellsFull(Exception):
    """This microVM has as many shells as it can."""


class Shells:
    """Keeps the shells of one agent's connection; `send` writes frames to it."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._shells: dict[int, Shell] = {}
        self._last = 0

    def open(self, columns: int, rows: int) -> socket.socket:
        """Starts a shell and returns the edge's end of its socket pair. Raises ShellsFull."""
        if len(self._shells) >= SHELLS_MAX:
            raise ShellsFull("this microVM has as many shells as it can: close one")
        while True:  # numbers come round: one that is in use is passed over
            self._last = self._last % 0xFFFF + 1
            if self._last not in self._shells:
                break
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        number = self._last
        self._shells[number] = Shell(number, ours, self._send, lambda: self._shells.pop(number, None))
        self._send(frame(_OPEN, struct.pack("<HH", columns, rows), number) + frame(_CREDIT, struct.pack("<I", _CREDIT_BYTES), number))
        return theirs

    def output(self, number: int, data: bytes) -> None:
        if (shell := self._shells.get(number)) is not None:
            shell.output(data)

    def taken(self, number: int, size: int) -> None:
        if (shell := self._shells.get(number)) is not None:
            shell.taken(size)

    def exited(self, number: int, code: int) -> None:
        if (shell := self._shells.get(number)) is not None:
            shell.exited(code)

    @property
    def count(self) -> int:
        return len(self._shells)

    def close(self) -> None:
        """Ends every shell when the channel is gone: edges see the end of their sockets."""
        for shell in list(self._shells.values()):
            shell.end(hang_up=False)


class Shell:
    """One shell. What waits to be written to the edge is bounded by the credit that the guest was given; one that writes beyond it is
    hung up."""

    def __init__(self, number: int, sock: socket.socket, send: Callable[[bytes], None], forget: Callable[[], object]) -> None:
        self._number, self._socket, self._send, self._forget = number, sock, send, forget
        self._loop = asyncio.get_running_loop()
        self._typed = 0
        self._credit = _CREDIT_BYTES  # what the guest may yet write
        self._out: deque[bytes] = deque()
        self._over = False
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            message = self._socket.recv(SHELL_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        kind, payload = message[:1], message[1:]
        if not message:
            self.end(hang_up=True)
        elif kind == SHELL_INPUT:
            for at in range(0, len(payload), _FRAME_BYTES):
                self._send(frame(_INPUT, payload[at : at + _FRAME_BYTES], self._number))
            self._typed += len(payload)
            if self._typed >= _WINDOW_BYTES:
                self._loop.remove_reader(self._socket.fileno())
        elif kind == SHELL_RESIZE and len(payload) == 4:
            self._send(frame(_RESIZE, payload, self._number))

    def taken(self, size: int) -> None:
        full = self._typed >= _WINDOW_BYTES
        self._typed = max(0, self._typed - size)
        if full and self._typed < _WINDOW_BYTES and not self._over:
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def output(self, data: bytes) -> None:
        """Takes what the guest has credit for; an empty message says nothing."""
        self._credit -= len(data)
        if self._over or not data:
            return
        if self._credit < 0:
            log.warning("shell.beyond_credit", number=self._number)
            self.end(hang_up=True)
            return
        self._put(SHELL_OUTPUT, data)

    def _put(self, kind: bytes, data: bytes) -> None:
        self._out.append(kind + data)
        self._writable()

    def exited(self, code: int) -> None:
        if self._over:
            return
        self._over = True
        self._loop.remove_reader(self._socket.fileno())
        self._put(SHELL_EXIT, struct.pack("<i", code))

    def _writable(self) -> None:
        while self._out:
            try:
                self._socket.send(self._out[0])
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError:
                self.end(hang_up=True)
                return
            message = self._out.popleft()
            if message[:1] == SHELL_OUTPUT:
                self._credit += len(message) - 1
                self._send(frame(_CREDIT, struct.pack("<I", len(message) - 1), self._number))
        self._loop.remove_writer(self._socket.fileno())
        if self._over:
            self.end(hang_up=False)

    def end(self, hang_up: bool) -> None:
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._forget()
        if hang_up and not self._over:
            self._send(frame(_CLOSE, b"", self._number))
