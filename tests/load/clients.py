"""Clients of a load: each sends one request after the other, of any size and at any pace, and says what came of each."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from load.content import PIECE, pieces


class Cut(Exception):
    """The connection or the stream ended before the answer did."""


@dataclass
class Pace:
    """A slow peer waits this often between two pieces, and takes small ones."""

    seconds: float = 0.0
    times: int = 0
    piece: int = PIECE

    async def wait(self) -> None:
        if self.times > 0:
            self.times -= 1
            await asyncio.sleep(self.seconds)


@dataclass
class Target:
    """A worker's endpoint."""

    port: int
    host: str
    fields: dict[str, str]
    authority: str  # the certificate authority's file

    async def connect(self, alpn: str, receive_buffer: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context(cafile=self.authority)
        context.set_alpn_protocols([alpn])
        sock = socket.socket()
        try:
            if receive_buffer:  # a slow reader's: what the kernel would take for it, the worker would never notice
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise


@dataclass
class Request:
    """`upload` is (seed, size) of its content. `abandon_at` bytes of the upload or the answer, its client is gone."""

    path: str
    upload: tuple[int, int] | None = None
    in_chunks: bool = False
    reading: Pace | None = None
    writing: Pace | None = None
    abandon_at: int | None = None

    def content(self) -> Iterator[bytes]:
        assert self.upload is not None
        step = self.writing.piece if self.writing else PIECE
        for piece in pieces(*self.upload):
            yield from (piece[at : at + step] for at in range(0, len(piece), step))


@dataclass
class Answer:
    status: int
    size: int
    digest: str
    body: bytes  # of a short one


class Collected:
    """An answer's content, by its digest; a short one also as it is."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._digest, self._body, self.size = hashlib.sha256(), b"", 0

    async def add(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)
        if len(self._body) < 64:
            self._body = (self._body + data)[:64]
        if self._request.upload is None and self._request.abandon_at is not None and self.size >= self._request.abandon_at:
            raise Abandoned
        if self._request.reading is not None:
            await self._request.reading.wait()

    def answer(self, status: int) -> Answer:
        return Answer(status, self.size, self._digest.hexdigest(), self._body)


class Abandoned(Exception):
    """The client went in the middle, as it was to."""


class Http1Client:
    """One connection after the other, each kept as long as it can be."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._writer: asyncio.StreamWriter | None = None
        self.is_slow = False

    async def ask(self, request: Request) -> Answer:
        """Raises Cut, Abandoned."""
        slow = request.reading is not None
        if self._writer is not None and slow and not self.is_slow:
            self.close()
        if self._writer is None:
            self._reader, self._writer = await self._target.connect("http/1.1", 16 << 10 if slow else 0)
            self.is_slow = slow
        try:
            return await self._exchange(request, self._reader, self._writer)
        except (asyncio.IncompleteReadError, OSError) as error:
            self.abort()
            raise Cut(repr(error)) from error
        except BaseException:
            self.abort()
            raise

    async def _exchange(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
        fields = {"Host": self._target.host, **self._target.fields}
        if request.upload is not None:
            fields |= {"Transfer-Encoding": "chunked"} if request.in_chunks else {"Content-Length": str(request.upload[1])}
        method = "GET" if request.upload is None else "POST"
        lines = [f"{method} {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        uploading = asyncio.create_task(self._upload(request, writer)) if request.upload is not None else None
        try:
            answering = asyncio.create_task(self._answer(request, reader))
            try:
                if uploading is not None:
                    await asyncio.wait([uploading, answering], return_when=asyncio.FIRST_COMPLETED)
                    if uploading.done() and isinstance(uploading.exception(), Abandoned):
                        raise Abandoned
                answer, keeps = await answering
            finally:
                answering.cancel()
            if uploading is not None and answer.status == 200:
                await uploading
            if not keeps or answer.status != 200:
                self.close()
            return answer
        finally:
            if uploading is not None:
                uploading.cancel()
                await asyncio.wait([uploading])
                if not uploading.cancelled():
                    uploading.exception()  # the answer says what there is to say

    async def _upload(self, request: Request, writer: asyncio.StreamWriter) -> None:
        sent = 0
        for piece in request.content():
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if request.in_chunks else piece)
            await writer.drain()
            sent += len(piece)
            if request.abandon_at is not None and sent >= request.abandon_at:
                raise Abandoned
            if request.writing is not None:
                await request.writing.wait()
        if request.in_chunks:
            writer.write(b"0\r\n\r\n")

    async def _answer(self, request: Request, reader: asyncio.StreamReader) -> tuple[Answer, bool]:
        line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        fields = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in rest)}
        collected = Collected(request)
        async for piece in self._content(reader, fields, request.reading.piece if request.reading else PIECE):
            await collected.add(piece)
        return collected.answer(int(line.split(" ")[1])), fields.get("connection", "") != "close"

    async def _content(self, reader: asyncio.StreamReader, fields: dict[str, str], most: int) -> AsyncIterator[bytes]:
        if "transfer-encoding" not in fields:
            async for piece in exactly(reader, int(fields["content-length"]), most):
                yield piece
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            async for piece in exactly(reader, size, most):
                yield piece
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abort(self) -> None:
        """With a reset."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None


async def exactly(reader: asyncio.StreamReader, size: int, most: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, most))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


class Stream:
    """One request on a connection of HTTP/2."""

    def __init__(self) -> None:
        self.status = 0
        self.parts: asyncio.Queue[tuple[bytes, int] | None] = asyncio.Queue()  # data, and what of the windows it took; None: the end
        self.is_over = False  # a reset came, whatever its code
        self.reset = False  # before the answer was whole


class Http2Client:
    """One connection, with many streams, whose state machine is h2's: it raises when the worker breaks the protocol."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._streams: dict[int, Stream] = {}
        self._may_send = asyncio.Event()
        self._broken: Exception | None = None

    async def open(self) -> None:
        self._reader, self._writer = await self._target.connect("h2")
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
        self._h2.initiate_connection()
        self._flush()
        self._pump = asyncio.create_task(self._read())

    async def ask(self, request: Request) -> Answer:
        """Raises Cut, Abandoned."""
        if self._broken is not None:
            raise Cut(repr(self._broken))
        number = self._h2.get_next_available_stream_id()
        stream = self._streams[number] = Stream()
        method = "GET" if request.upload is None else "POST"
        head = [(":method", method), (":scheme", "https"), (":authority", self._target.host), (":path", request.path)]
        self._h2.send_headers(
            number, [*head, *((name.lower(), value) for name, value in self._target.fields.items())], end_stream=request.upload is None
        )
        self._flush()
        uploading = asyncio.create_task(self._upload(request, number, stream)) if request.upload is not None else None
        answering = asyncio.create_task(self._answer(request, number, stream))
        both = [one for one in (uploading, answering) if one is not None]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if uploading is not None and uploading.done():
                uploading.result()
            answer = await answering
            if uploading is not None and answer.status == 200:
                await uploading
            elif uploading is not None:
                self._reset(number, stream)
            return answer
        except BaseException:
            self._reset(number, stream)
            raise
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            del self._streams[number]
            while not stream.parts.empty():  # the connection's window is everybody's
                part = stream.parts.get_nowait()
                if part is not None:
                    self._acknowledge(number, part[1])

    def _reset(self, number: int, stream: Stream) -> None:
        if not stream.is_over and self._broken is None:
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self._h2.reset_stream(number, error_code=8)  # CANCEL
            self._flush()

    async def _upload(self, request: Request, number: int, stream: Stream) -> None:
        sent = 0
        for piece in request.content():
            left = memoryview(piece)
            while left:
                if stream.is_over or self._broken is not None:
                    return  # the answer says why
                room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size, len(left))
                if not room:
                    self._may_send.clear()
                    await self._may_send.wait()
                    continue
                self._h2.send_data(number, bytes(left[:room]))
                self._flush()
                left = left[room:]
                await self._writer.drain()
            sent += len(piece)
            if request.abandon_at is not None and sent >= request.abandon_at:
                raise Abandoned
            if request.writing is not None:
                await request.writing.wait()
        if not stream.is_over and self._broken is None:
            self._h2.end_stream(number)
            self._flush()

    async def _answer(self, request: Request, number: int, stream: Stream) -> Answer:
        collected = Collected(request)
        while (part := await stream.parts.get()) is not None:
            data, taken = part
            try:
                await collected.add(data)
            finally:
                self._acknowledge(number, taken)
        if stream.reset or self._broken is not None:
            raise Cut(f"stream reset, or {self._broken!r}")
        return collected.answer(stream.status)

    def _acknowledge(self, number: int, taken: int) -> None:
        if taken and self._broken is None:
            self._h2.acknowledge_received_data(taken, number)
            self._flush()

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(PIECE):
                for event in self._h2.receive_data(data):
                    self._happened(event)
                self._flush()
            raise EOFError("the connection ended")
        except (OSError, EOFError, h2.exceptions.ProtocolError) as error:
            self._broken = error
        for stream in self._streams.values():
            stream.parts.put_nowait(None)
        self._may_send.set()

    def _happened(self, event: Any) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._may_send.set()
        elif isinstance(event, h2.events.DataReceived) and stream is None:  # of a stream that was reset here
            self._acknowledge(event.stream_id, event.flow_controlled_length)
        elif stream is None:
            return
        elif isinstance(event, h2.events.ResponseReceived):
            stream.status = int(dict(event.headers)[":status"])
        elif isinstance(event, h2.events.DataReceived):
            stream.parts.put_nowait((event.data, event.flow_controlled_length))
        elif isinstance(event, h2.events.StreamReset):
            stream.is_over = True
            stream.reset = event.error_code != 0  # NO_ERROR comes after a whole answer: the rest of the request is not wanted
            stream.parts.put_nowait(None)
            self._may_send.set()
        elif isinstance(event, h2.events.StreamEnded):
            stream.parts.put_nowait(None)

    def _flush(self) -> None:
        if self._broken is None:
            self._writer.write(self._h2.data_to_send())

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    async def close(self) -> None:
        self._pump.cancel()
        await asyncio.wait([self._pump])
        self._writer.close()

    def abort(self) -> None:
        self._pump.cancel()
        self._writer.transport.abort()
