"""TLS on the edge: OpenSSL's memory BIOs driven by hand between a TCP transport and the application protocol.

It does what uvloop's own TLS does, with less between the bytes and the application: one read buffer for all connections of
the process, no application object before the handshake is complete, and half-closed connections stay open for the answer
(RFC 8446, 6.1: a close_notify ends one direction). After the handshake it calls the C object inside `ssl.SSLObject`, whose
methods only pass their arguments on; that attribute is private, so the tests would notice its loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

_READ_BYTES: Final = 256 << 10
_HANDSHAKE_SECONDS = 10.0
_RECORD_BYTES: Final = 16384

# One for the process: what is in it is used up before the loop comes round.
_cipher = memoryview(bytearray(_READ_BYTES))


class Application(Protocol):
    """What this carries: an asyncio.Protocol that is told of the two ends that a TLS connection can have."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...

    def close_notified(self) -> None:
        """The peer's close_notify: it sends no more, and may still read."""


Factory = Callable[[str | None], Application]


class TlsServer:
    """One accepted connection; to the application it is the transport. `factory` is given the ALPN protocol."""

    __slots__ = (
        "_app", "_closing", "_factory", "_incoming", "_outgoing", "_paused", "_raw_read", "_raw_write", "_timer", "_tls", "_unread",
        "peer", "transport",
    )  # fmt: skip

    def __init__(self, context: ssl.SSLContext, factory: Factory, peer: str | None = None) -> None:
        """`peer` is the client's address where a load balancer has said it."""
        self.peer = peer
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        raw: Any = self._tls._sslobj  # type: ignore[attr-defined]
        self._raw_read: Callable[[int], bytes] = raw.read
        self._raw_write: Callable[[bytes | memoryview], int] = raw.write
        self._factory = factory
        self._app: Application | None = None
        self._closing = False
        self._paused = False
        self._unread = False  # plaintext waits inside OpenSSL, because the application paused
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None

    # ---- the TCP side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(_HANDSHAKE_SECONDS, self.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _cipher

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(_cipher[:nbytes])
        if self._app is not None:
            self._read()
        elif self._timer is not None:
            self._handshake()

    def eof_received(self) -> bool:
        if self._app is None:
            return False
        return bool(self._app.eof_received()) and not self._closing

    def connection_lost(self, error: Exception | None) -> None:
        self._disarm()
        self._closing = True
        app, self._app = self._app, None
        if app is not None:
            app.connection_lost(error)

    def pause_writing(self) -> None:
        if self._app is not None:
            self._app.pause_writing()

    def resume_writing(self) -> None:
        if self._app is not None:
            self._app.resume_writing()

    # ---- OpenSSL ----

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (ssl.SSLError, OSError):
            self._flush()  # the alert that says why
            self._close_transport()
            return
        self._flush()
        self._disarm()
        self._app = self._factory(self._tls.selected_alpn_protocol())
        self._app.connection_made(cast(asyncio.Transport, self))
        if self._incoming.pending:
            self._read()

    def _read(self) -> None:
        """Everything that has come, in one piece, unless the application has paused."""
        app = self._app
        if app is None:
            return
        if self._paused:
            self._unread = True
            return
        read, incoming = self._raw_read, self._incoming
        records: list[bytes] = []
        over = False
        try:
            while True:
                data = read(_RECORD_BYTES)  # a whole record at a time, so OpenSSL keeps nothing back
                if not data:
                    over = True
                    break
                records.append(data)
                if not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            over = True
        except (ssl.SSLError, OSError):
            self._flush()  # the alert that says why
            self.abort()
            return
        if records:
            app.data_received(records[0] if len(records) == 1 else b"".join(records))
        if over:
            app.close_notified()
        if self._outgoing.pending:  # a key update's answer
            self._flush()

    def _flush(self) -> None:
        if self.transport is not None and self._outgoing.pending:
            self.transport.write(self._outgoing.read())

    def _close_transport(self) -> None:
        self._disarm()
        if self.transport is not None:
            self.transport.close()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- what the application calls: the part of asyncio.Transport that it uses ----

    def write(self, data: bytes) -> None:
        if self._closing or not data:
            return
        write = self._raw_write
        written = write(data)
        if written < len(data):
            view = memoryview(data)
            while written < len(data):  # OpenSSL takes a record at a time
                written += write(view[written:])
        assert self.transport is not None
        self.transport.write(self._outgoing.read())

    def close(self) -> None:
        """Says close_notify, writes out what is buffered, closes."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(ssl.SSLError, OSError):  # our close_notify is in the buffer; the peer's is not waited for
            self._tls.unwrap()
        self._flush()
        self._close_transport()

    def abort(self) -> None:
        self._closing = True
        self._disarm()
        if self.transport is not None:
            self.transport.abort()

    def is_closing(self) -> bool:
        return self._closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Says close_notify, and goes on reading."""
        with contextlib.suppress(ssl.SSLError, OSError):
            self._tls.unwrap()
        self._flush()

    def pause_reading(self) -> None:
        self._paused = True
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._paused or self.transport is None or self.transport.is_closing():
            return
        self._paused = False
        self.transport.resume_reading()
        if self._unread:
            self._unread = False
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._app is not None and not self._closing:
            self._read()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self.transport is not None:
            self.transport.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        if name == "peername" and self.peer is not None:
            return (self.peer, 0)
        return default if self.transport is None else self.transport.get_extra_info(name, default)
