"""HTTP/2 clients for tests: `h2` as a judge of what we say, and raw frames for what no library would say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
from edge_rig import HOST, Rig

from gateway.edge.wire import http2_frames as f

Fields = list[tuple[str, str]]
OnHead = Callable[[int], bytes]  # what an application sends when the head of a request on this stream has come


def fields(rig: Rig, path: str = "/", method: str = "GET", *more: tuple[str, str], host: str = HOST) -> Fields:
    return [
        (":method", method), (":scheme", "https"), (":path", path), (":authority", host),
        ("x-aws-proxy-auth", rig.token), ("x-aws-proxy-port", str(rig.app_port)), *more,
    ]  # fmt: skip


class Judge:
    """A client whose state machine is h2's: it raises when we break the protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
        self.h2.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.events: list[Any] = []
        self.auto_credit = True
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def ask(self, fields: Fields, body: bytes | None = None, end: bool = True) -> int:
        number = self.h2.get_next_available_stream_id()
        self.answers[number] = Answer()
        self.h2.send_headers(number, fields, end_stream=body is None and end)
        if body is not None:
            self.h2.send_data(number, body, end_stream=end)
        self.flush()
        return number

    async def turn(self) -> bool:
        """Reads once; False at the end."""
        async with asyncio.timeout(10):
            data = await self.reader.read(65536)
        if not data:
            return False
        for event in self.h2.receive_data(data):
            self.events.append(event)
            number = getattr(event, "stream_id", 0)
            answer = self.answers.get(number, Answer())
            if isinstance(event, h2.events.InformationalResponseReceived):
                answer.interim.append(dict(event.headers))
            elif isinstance(event, h2.events.ResponseReceived):
                answer.fields = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                answer.body += event.data
                if self.auto_credit:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, number)
            elif isinstance(event, h2.events.TrailersReceived):
                answer.trailers = dict(event.headers)
            elif isinstance(event, h2.events.StreamEnded):
                answer.ended = True
            elif isinstance(event, h2.events.StreamReset):
                answer.reset = event.error_code
        self.flush()
        return True

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Reads until `condition` is true, and returns its value. Raises EOFError, TimeoutError."""
        async with asyncio.timeout(20):
            while not (value := condition()):
                if not await self.turn():
                    raise EOFError("closed")
            return value

    async def answer(self, number: int) -> Answer:
        answer = self.answers[number]
        await self.until(lambda: answer.ended or answer.reset is not None)
        return answer

    async def upload(self, number: int, size: int) -> int:
        """Sends so many bytes as the windows allow, and the end; the widest that the window was."""
        left, widest = size, 0
        while left:
            window = self.h2.local_flow_control_window(number)
            widest = max(widest, window)
            step = min(left, window, self.h2.max_outbound_frame_size)
            if step:
                self.h2.send_data(number, b"x" * step, end_stream=step == left)
                self.flush()
                left -= step
            elif not await self.turn():
                raise EOFError("closed")
        return widest

    def terminations(self) -> list[h2.events.ConnectionTerminated]:
        """The GOAWAYs that were received."""
        return [one for one in self.events if isinstance(one, h2.events.ConnectionTerminated)]


class Answer:
    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.interim: list[dict[str, str]] = []
        self.trailers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.fields[":status"])


class Raw:
    """Frames as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, start: bool = True) -> None:
        self.reader, self.writer = reader, writer
        if start:
            self.send(f.PREFACE + f.settings({}))

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def frame(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream, payload. Raises EOFError at the end of the connection."""
        try:
            async with asyncio.timeout(5):
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError from error
        return head[3], head[4], int.from_bytes(head[5:9], "big"), payload

    async def until(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """The next frame of one of these kinds; our acknowledgements of settings are passed over. Raises TimeoutError."""
        async with asyncio.timeout(10):
            while True:
                got = await self.frame()
                if got[0] in kinds and not (got[0] == f.SETTINGS and got[1] & f.ACK):
                    return got

    async def settled(self) -> None:
        """Everything that was sent has been received and acted on: PING is answered in order."""
        self.send(f.frame(f.PING, 0, 0, b"settled?"))
        while True:
            _, flags, _, payload = await self.until(f.PING)
            if flags & f.ACK and payload == b"settled?":
                return

    async def outcome(self) -> str:
        """How the peer judged: `goaway NAME`, `reset NAME`, `answer STATUS`, or `closed`."""
        try:
            kind, _, _, payload = await self.until(f.GOAWAY, f.RST_STREAM, f.HEADERS, f.PING)
        except EOFError:
            return "closed"
        if kind == f.GOAWAY:
            return f"goaway {f.Code(int.from_bytes(payload[4:8], 'big')).name}"
        if kind == f.RST_STREAM:
            return f"reset {f.Code(int.from_bytes(payload, 'big')).name}"
        if kind == f.PING:
            return "ping"
        status = f.new_decoder(1 << 16).decode(payload, True)[0]
        return f"answer {status[1].decode()}"


def speaks_h2(rig: Rig, answer: OnHead) -> None:
    """The rig's application speaks HTTP/2 with prior knowledge."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_h2(reader, writer, answer)

    rig.script = script


async def serve_h2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: OnHead) -> None:
    writer.write(f.settings({}))
    await reader.readexactly(len(f.PREFACE))
    while True:
        head = await reader.readexactly(9)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == f.HEADERS:
            writer.write(answer(int.from_bytes(head[5:9], "big")))
