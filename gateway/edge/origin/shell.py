"""A shell as an application: it answers the WebSocket's handshake, and carries a PTY in its frames (service reference, 3.6).

The server speaks first, in text: {"type": "session_init"}. Binary frames are the PTY's bytes both ways; {"type": "resize",
"cols", "rows"} from the client sets its size; any other text is typed. The end is a close with 1000 `shell exited`; clients
that send `X-torpor-exit-code: 1` are told the code in text before it, which is ours.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import uuid

import msgspec
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from gateway.messages import SHELL_EXIT, SHELL_INPUT, SHELL_MESSAGE_BYTES, SHELL_OUTPUT, SHELL_RESIZE

from ..policy.keys import Key
from ..reading import HELD, PEER_SLOW, UNREAD, ReadGate
from ..sides import HELD_BYTES, ClientSide, OriginContext
from ..wire.http1_head import NO_BODY, RequestHead, ResponseHead, Trailers, split_block
from ..wire.websocket import accept_of

_TYPED_MAX_BYTES = 4096
_SHELL_EXITED, _GOING_AWAY = 1000, 1001
_CLOSE_SECONDS = 5.0  # for a client to answer a Close frame; then its connection is closed all the same


class _Resize(msgspec.Struct, tag_field="type", tag="resize"):
    cols: int
    rows: int


class ShellOrigin:
    """Speaks WebSocket to one exchange, and the shell's messages to control on `sock` (gateway/sessions/shells.py has the other end).
    It lets go of the exchange as soon as that has ended, so that it never calls an exchange that is over."""

    takes_raw = False

    def __init__(self, context: OriginContext, key: Key, sock: socket.socket) -> None:
        self._context = context
        self.key = key
        self.is_parked = False  # its session sleeps; what is typed waits
        self._size = b""  # the size that its window has come to have meanwhile
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._exchange: ClientSide | None = None
        self._frames = Protocol(Side.SERVER, state=State.OPEN, max_size=1 << 20)
        self._typed = bytearray()
        self._reading = ReadGate(self)
        self._tells_code = False
        self._closing: asyncio.TimerHandle | None = None  # a Close frame was sent, and its answer is waited for

    def park(self, one_way: bool) -> None:
        self.is_parked = True

    @property
    def is_paused(self) -> bool:
        return bool(self._typed)

    # ---- what the exchange calls ----

    def open(self, exchange: ClientSide, head: RequestHead) -> None:
        self._exchange = exchange
        fields = dict(split_block(head.block))
        self._tells_code = fields.get(b"x-torpor-exit-code") == b"1"
        block = b"\r\nSec-WebSocket-Accept: " + accept_of(fields[b"sec-websocket-key"])  # which admission has checked
        line = b"HTTP/1.1 101 Switching Protocols"
        exchange.switch(ResponseHead(101, NO_BODY, 0, True, line, block, b"websocket", frozenset((b"sec-websocket-accept",))), b"")
        self._frames.send_text(msgspec.json.encode({"type": "session_init", "session_id": str(uuid.uuid4())}))
        self._flush()
        if not self._reading.is_paused:
            self.resume_reading()

    def send(self, data: bytes) -> None:
        """Takes the client's WebSocket frames, in any cut."""
        before = len(self._typed)
        self._frames.receive_data(data)  # of a mistake it says so itself, in a closing frame
        for event in self._frames.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.TEXT:
                self._text(bytes(event.data))
            elif event.opcode in (Opcode.BINARY, Opcode.CONT):
                self._type(bytes(event.data))
        if self._flush() and self._reading.reasons & PEER_SLOW and self._exchange is not None:
            self._exchange.pause_reading(UNREAD)  # its client asks for pongs, and reads none
        if self.is_parked and len(self._typed) > before:
            self._context.wake(self)

    def finish(self, trailers: Trailers | None) -> None:
        self._frames.receive_eof()
        self._flush()
        self._close()

    def pause(self, reason: int) -> None:
        self._reading.pause(reason)

    def resume(self, reason: int) -> None:
        self._reading.resume(reason)

    def cancel(self) -> None:
        self._let_go()
        self._close()

    def cut(self) -> None:
        """Closes the shell because its incarnation ends, and tells the exchange."""
        exchange = self._let_go()
        self._close()
        if exchange is not None:
            exchange.cut()

    def _let_go(self) -> ClientSide | None:
        """Lets go of the exchange, which is over: the client's connection carries others from now on."""
        exchange, self._exchange = self._exchange, None
        if self._closing is not None:
            self._closing.cancel()
        return exchange

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    # ---- what its ReadGate calls ----

    def pause_reading(self) -> None:
        self._loop.remove_reader(self._socket.fileno())

    def resume_reading(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def is_closing(self) -> bool:
        return self.is_closed

    # ---- through a suspend: control keeps the other end of the socket, and the guest its terminal ----

    @property
    def stream_count(self) -> int:
        return int(self._exchange is not None)

    def parkable(self, one_way: bool) -> int:
        return self.stream_count

    def is_silent(self, one_way: bool) -> bool:
        return self._exchange is not None and self._exchange.response_started and not self.is_closed and not self._typed

    def unpark(self) -> None:
        self.is_parked = False
        if self._size:
            self._write(self._size)
            self._size = b""
        self._typable()

    # ---- typing ----

    def _text(self, data: bytes) -> None:
        try:
            size = msgspec.json.decode(data, type=_Resize)
            message = SHELL_RESIZE + struct.pack("<HH", min(max(size.cols, 1), 1000), min(max(size.rows, 1), 1000))
        except (msgspec.DecodeError, RecursionError):  # the second one of what is nested too deeply
            self._type(data)
            return
        if self.is_parked:
            self._size = message
        else:
            self._write(message)

    def _type(self, data: bytes) -> None:
        self._typed += data
        if not self.is_parked:
            self._typable()
        elif len(self._typed) > HELD_BYTES and self._exchange is not None:
            self._exchange.pause_reading(HELD)

    def _typable(self) -> None:
        """Writes what was typed to the terminal, and pauses the client while the terminal takes nothing."""
        exchange = self._exchange
        while self._typed and self._socket.fileno() >= 0:
            if not self._write(SHELL_INPUT + bytes(self._typed[:_TYPED_MAX_BYTES])):
                self._loop.add_writer(self._socket.fileno(), self._typable)
                if exchange is not None:
                    exchange.pause_reading(PEER_SLOW)
                return
            del self._typed[:_TYPED_MAX_BYTES]
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())
        if exchange is not None:
            exchange.resume_reading(PEER_SLOW | HELD)

    def _write(self, message: bytes) -> bool:
        try:
            self._socket.send(message)
        except BlockingIOError:
            return False
        except OSError:
            pass  # its end comes by the reader
        return True

    # ---- output ----

    def _readable(self) -> None:
        try:
            message = self._socket.recv(SHELL_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        kind, payload = message[:1], message[1:]
        if kind == SHELL_OUTPUT:
            exchange = self._exchange
            if exchange is not None:
                exchange.account.count += 1
                exchange.account.last = self._loop.time()
            self._frames.send_binary(payload)
        elif kind == SHELL_EXIT:
            if self._tells_code:
                self._frames.send_text(msgspec.json.encode({"type": "exit", "code": struct.unpack("<i", payload)[0]}))
            self._frames.send_close(_SHELL_EXITED, "shell exited")
            self._close()
        elif not message:
            self._frames.send_close(_GOING_AWAY)
            self._close()
        self._flush()

    def _flush(self) -> bool:
        """Sends the frames that are due, and returns whether there were any."""
        exchange, has_sent = self._exchange, False
        if exchange is None:
            return False
        for data in self._frames.data_to_send():
            if data:
                has_sent = True
                exchange.response_data(bytes(data))
            else:
                self._let_go()
                self._close()
                exchange.tunnel_over()
                return has_sent
        return has_sent

    def _close(self) -> None:
        if self._exchange is not None and self._closing is None:
            self._closing = self._loop.call_later(_CLOSE_SECONDS, self._close_timed_out)
        if self.is_parked:
            self.is_parked = False
            self._context.forget_parked(self)
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()

    def _close_timed_out(self) -> None:
        """Ends the tunnel of a client that has not answered the Close frame (RFC 6455, 7.1.1)."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.tunnel_over()
