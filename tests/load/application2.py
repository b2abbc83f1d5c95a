"""The application behind a load, as one that speaks HTTP/2 without TLS (RFC 9113, 3.3); its state machine is h2's."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from load.content import PIECE, pieces

_INTERNAL_ERROR = 2


class Gone(Exception):
    """The stream was reset, or its connection ended."""


class Stream:
    def __init__(self, path: str) -> None:
        url = urlsplit(path)
        self.path, self.query = url.path, {name: int(values[0]) for name, values in parse_qs(url.query).items()}
        self.parts: asyncio.Queue[tuple[bytes, int] | None] = asyncio.Queue()  # data, and what of the windows it took; None: the end
        self.is_over = False


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="latin-1"))
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._may_send = asyncio.Event()

    async def run(self) -> None:
        self._h2.initiate_connection()
        self._flush()
        try:
            while data := await self._reader.read(PIECE):
                for event in self._h2.receive_data(data):
                    self._happened(event)
                self._flush()
        except ConnectionError:
            pass
        finally:
            for task in self._tasks:
                task.cancel()
            self._writer.close()

    def _happened(self, event: h2.events.Event) -> None:
        number = getattr(event, "stream_id", None) or 0
        stream = self._streams.get(number)
        if isinstance(event, h2.events.RequestReceived):
            self._streams[number] = Stream(dict(event.headers)[":path"])
            task = asyncio.create_task(self._respond(number, self._streams[number]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(event, h2.events.DataReceived):
            if stream is None:
                self._h2.acknowledge_received_data(event.flow_controlled_length, number)
            else:
                stream.parts.put_nowait((event.data, event.flow_controlled_length))
        elif isinstance(event, h2.events.StreamEnded) and stream is not None:
            stream.parts.put_nowait(None)
        elif isinstance(event, h2.events.StreamReset) and stream is not None:
            stream.is_over = True
            stream.parts.put_nowait(None)
            self._may_send.set()
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._may_send.set()

    async def _content(self, number: int, stream: Stream):
        while (part := await stream.parts.get()) is not None:
            data, taken = part
            self._h2.acknowledge_received_data(taken, number)
            self._flush()
            yield data
        if stream.is_over:
            raise Gone

    async def _send(self, number: int, stream: Stream, data: bytes) -> None:
        left = memoryview(data)
        while left:
            if stream.is_over:
                raise Gone
            room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size, len(left))
            if not room:
                self._may_send.clear()
                await self._may_send.wait()
                continue
            self._h2.send_data(number, bytes(left[:room]))
            self._flush()
            left = left[room:]
            await self._writer.drain()

    async def _respond(self, number: int, stream: Stream) -> None:
        query = stream.query
        pause = query.get("pause_ms", 0) / 1000
        try:
            if stream.path == "/digest":
                found = hashlib.sha256()
                async for piece in self._content(number, stream):
                    found.update(piece)
                    await asyncio.sleep(pause)
                self._h2.send_headers(number, [(":status", "200"), ("content-length", "64")])
                await self._send(number, stream, found.hexdigest().encode())
            elif stream.path == "/echo":
                self._h2.send_headers(number, [(":status", "200")])
                self._flush()
                async for piece in self._content(number, stream):
                    await self._send(number, stream, piece)
            else:
                await asyncio.sleep(pause)
                size, breaks = query["size"], stream.path == "/break"
                if stream.is_over:
                    raise Gone
                length = [] if query.get("chunked") else [("content-length", str(size))]
                self._h2.send_headers(number, [(":status", "200"), *length])
                for piece in pieces(query["seed"], size // 2 if breaks else size):
                    await self._send(number, stream, piece)
                if breaks and not stream.is_over:
                    self._h2.reset_stream(number, _INTERNAL_ERROR)
                    self._flush()
                    return
            if not stream.is_over:
                self._h2.end_stream(number)
                self._flush()
        except (Gone, ConnectionError, h2.exceptions.StreamClosedError):
            pass
        finally:
            del self._streams[number]
            while not stream.parts.empty():  # the connection's window is everybody's
                part = stream.parts.get_nowait()
                if part is not None:
                    self._h2.acknowledge_received_data(part[1], number)
            self._flush()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())


async def main() -> None:
    server = await asyncio.start_server(lambda *streams: Connection(*streams).run(), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
