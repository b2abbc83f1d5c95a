"""Streams of a session that falls asleep, at the edge alone: parked when silent, woken by a word, kept out of the accounts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from edge_rig import HOST, Rig
from h2_client import Judge
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from gateway import messages as m
from gateway.edge.origin import http1
from gateway.edge.wire import http2_frames as f
from gateway.edge.wire.websocket import GOING_AWAY, PING, PONG, FrameCounter, pong

UPGRADED = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def frame(opcode: int, payload: bytes, mask: bytes = b"") -> bytes:
    head = bytes([0x80 | opcode, (0x80 if mask else 0) | len(payload)])
    return head + mask + (bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload)) if mask else payload)


class Tunnel:
    """A WebSocket through the edge to an application that echoes bytes as they are, or only listens."""

    def __init__(self, rig: Rig, echoes: bool = True) -> None:
        self.rig, self.echoes = rig, echoes
        self.heard = asyncio.Event()

    async def open(self) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(UPGRADED)
            self.application = writer
            while data := await reader.read(65536):
                self.heard.set()
                writer.write(data if self.echoes else b"")

        self.rig.script = echo
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.rig.port)
        self.writer.write(
            f"GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-aws-proxy-auth: {self.rig.token}\r\n"
            f"X-aws-proxy-port: {self.rig.app_port}\r\n\r\n".encode()
        )
        assert b"101" in await self.reader.readuntil(b"\r\n\r\n")

    async def say(self, data: bytes) -> bytes:
        self.writer.write(data)
        async with asyncio.timeout(5):
            return await self.reader.readexactly(len(data))


async def suspend(rig: Rig, park: int = 8, one_way: bool = False) -> int:
    """As control does it: gate, drain, the route of a session that sleeps; how many streams are parked."""
    rig.control.change("hold", 1)
    (connection,) = rig.control.connections
    drained = await connection.call("drain", m.DrainRequest("s1", 1, 0.0, True, park, one_way=one_way), m.Drained)
    await rig.control.change("hold", 1, is_live=False)
    return int(drained.parked)


async def test_a_silent_tunnel_goes_on_in_the_next_incarnation(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    assert await tunnel.say(frame(1, b"one", b"abcd")) == frame(1, b"one", b"abcd")
    assert await suspend(rig) == 1
    rig.control.on_resume = lambda: rig.control.change("open", 2)
    assert await tunnel.say(frame(1, b"two", b"abcd")) == frame(1, b"two", b"abcd")
    assert [ask.incarnation for ask in rig.control.resumed] == [1]
    assert await tunnel.say(frame(1, b"three", b"abcd"))
    assert rig.worker.parking.count == 0 and rig.worker.upstream.statistics()["open"] == 1
    rig.control.change("hold", 2)
    (connection,) = rig.control.connections
    assert (await connection.call("drain", m.DrainRequest("s1", 2, 0.0, True, 8), m.Drained)).parked == 1, "and again"
    tunnel.writer.close()


async def gated(rig: Rig, incarnation: int = 1) -> m.GateAnswer:
    (connection,) = rig.control.connections
    answer: m.GateAnswer = await connection.call("gate", m.Route(HOST, "s1", incarnation, "hold"), m.GateAnswer)
    return answer


async def test_a_gate_that_closes_ends_idle_connections_while_the_guest_runs(rig: Rig) -> None:
    ended = asyncio.Event()

    async def until_it_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await rig.answer_all(reader, writer)
        finally:
            ended.set()

    rig.script = until_it_ends
    await rig.ask(rig.request())
    assert rig.worker.upstream.statistics()["idle"] == 1
    await gated(rig)
    async with asyncio.timeout(5):
        await ended.wait()
    rig.control.change("open")  # called off
    assert [status for status, _, _ in await rig.ask(rig.request())] == [200] and rig.connects == 2


async def drained(rig: Rig, if_quiet: bool) -> m.Drained:
    (connection,) = rig.control.connections
    answer: m.Drained = await connection.call("drain", m.DrainRequest("s1", 1, 0.0, True, 8, if_quiet), m.Drained)
    return answer


async def test_a_word_after_the_gate_keeps_an_idle_session_awake(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await gated(rig)
    await tunnel.say(frame(1, b"wait", b"abcd"))
    assert await drained(rig, if_quiet=True) == m.Drained(0, False, quiet=False)
    assert await tunnel.say(frame(1, b"on", b"abcd")) and rig.worker.parking.count == 0
    await gated(rig)
    assert await drained(rig, if_quiet=True) == m.Drained(1, False, quiet=True)
    tunnel.writer.close()


async def test_a_word_after_the_gate_of_another_suspend_is_told(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await gated(rig)
    tunnel.application.write(frame(1, b"from the application"))  # which owes nobody an answer
    await tunnel.reader.readexactly(22)
    assert await drained(rig, if_quiet=False) == m.Drained(1, False)
    rig.control.change("open", 1)
    await tunnel.say(frame(1, b"back", b"abcd"))
    await gated(rig)
    await tunnel.say(frame(1, b"wait", b"abcd"))
    assert await drained(rig, if_quiet=False) == m.Drained(1, True)
    tunnel.writer.close()


async def test_what_the_guest_has_not_acknowledged_counts_as_active(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await tunnel.say(frame(1, b"x", b"abcd"))
    await gated(rig)
    monkeypatch.setattr(http1, "unacknowledged", lambda transport: 1)
    assert await drained(rig, if_quiet=True) == m.Drained(quiet=False)
    assert await tunnel.say(frame(1, b"y", b"abcd"))
    assert (await drained(rig, if_quiet=False)).parked == 0
    async with asyncio.timeout(5):
        assert await tunnel.reader.read() == GOING_AWAY  # a suspend that is not called off cuts it


async def test_pings_to_a_parked_tunnel_are_answered_here(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await suspend(rig)
    for payload in (b"", b"keep-alive"):
        tunnel.writer.write(frame(PING, payload, os.urandom(4)))
        async with asyncio.timeout(5):
            assert await tunnel.reader.readexactly(2 + len(payload)) == pong(payload)
    tunnel.writer.write(frame(PONG, b"", b"abcd"))
    tunnel.writer.write(frame(PING, b"last", b"abcd"))  # its answer comes when the pong was looked at
    async with asyncio.timeout(5):
        assert await tunnel.reader.readexactly(6) == pong(b"last")
    assert not rig.control.resumed
    tunnel.writer.close()


async def test_a_ping_that_the_application_did_not_come_to_is_answered_here(rig: Rig) -> None:
    tunnel = Tunnel(rig, echoes=False)
    await tunnel.open()
    tunnel.writer.write(frame(PING, b"there?", b"abcd"))
    await tunnel.heard.wait()
    assert await suspend(rig) == 1
    async with asyncio.timeout(5):
        assert await tunnel.reader.readexactly(8) == pong(b"there?")
    assert not rig.control.resumed
    tunnel.writer.close()


async def test_pings_of_a_running_tunnel_pass_and_do_not_count(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await tunnel.say(frame(1, b"x", b"abcd"))
    account = rig.worker.routes.account("s1")
    before = account.count
    tunnel.application.write(frame(PING, b"from the application"))
    assert await tunnel.reader.readexactly(22) == frame(PING, b"from the application")
    tunnel.writer.write(frame(PONG, b"from the application", b"abcd"))
    assert await tunnel.reader.readexactly(26)  # the echo of it
    assert account.count == before
    await tunnel.say(frame(1, b"y", b"abcd"))
    assert account.count > before
    tunnel.writer.close()


@pytest.mark.parametrize("park", [0, 8])
async def test_a_session_that_ends_cuts_what_is_parked(rig: Rig, park: int) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await tunnel.say(frame(1, b"x", b"abcd"))
    assert await suspend(rig, park) == min(park, 1)
    rig.control.change("refuse", 1, is_live=False)
    async with asyncio.timeout(5):
        rest = await tunnel.reader.read()
    assert rest == GOING_AWAY
    assert rig.worker.parking.count == 0
    tunnel.writer.close()


async def test_what_is_under_way_is_not_parked(rig: Rig) -> None:
    """A request that waits for its head, and an upload that has not ended."""
    hold = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await hold.wait()

    rig.script = never
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    fields = f"Host: {HOST}\r\nX-aws-proxy-auth: {rig.token}\r\nX-aws-proxy-port: {rig.app_port}\r\n"
    writer.write(f"GET / HTTP/1.1\r\n{fields}\r\n".encode())
    await until(lambda: rig.worker.routes.account("s1").waiting)
    assert await suspend(rig) == 0
    hold.set()
    writer.close()


class Events:
    """Server-sent events through the edge, of which one has come; `application` sends the others."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.application: asyncio.StreamWriter

    async def open(self) -> None:
        done = asyncio.Event()

        async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata1\r\n")
            self.application = writer
            assert not await reader.read()
            done.set()

        self.rig.script, self.ended = stream, done
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.rig.port)
        fields = f"Host: {HOST}\r\nX-aws-proxy-auth: {self.rig.token}\r\nX-aws-proxy-port: {self.rig.app_port}\r\n"
        self.writer.write(f"GET / HTTP/1.1\r\n{fields}\r\n".encode())
        await self.reader.readuntil(b"data1\r\n")


async def test_a_stream_on_which_only_the_server_speaks_is_cut(rig: Rig) -> None:
    """Its client could never wake the session on it: an EventSource connects again, and that wakes."""
    events = Events(rig)
    await events.open()
    assert await suspend(rig) == 0
    async with asyncio.timeout(5):
        assert not (await events.reader.read()).endswith(b"0\r\n\r\n"), "and the client sees that it is not complete"
        await events.ended.wait()
    assert rig.worker.parking.count == 0 and not rig.control.resumed
    events.writer.close()


async def test_it_neither_keeps_an_idle_session_awake_nor_its_tunnels_from_being_parked(rig: Rig) -> None:
    events, tunnel = Events(rig), Tunnel(rig)
    await events.open()
    await tunnel.open()
    await gated(rig)
    assert await drained(rig, if_quiet=True) == m.Drained(1, False, quiet=True)
    async with asyncio.timeout(5):
        await events.reader.read()
    assert rig.worker.parking.count == 1
    tunnel.writer.close()
    events.writer.close()


async def test_an_endless_body_goes_on_where_all_is_parked(rig: Rig) -> None:
    """Server-sent events: the rest comes after the sleep, whoever woke the session."""
    events = Events(rig)
    await events.open()
    assert await suspend(rig, one_way=True) == 1
    await rig.control.change("open", 2)
    events.application.write(b"5\r\ndata2\r\n0\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await events.reader.readuntil(b"0\r\n\r\n")).endswith(b"data2\r\n0\r\n\r\n")
    events.writer.close()


async def test_a_client_that_leaves_is_forgotten(rig: Rig) -> None:
    tunnel = Tunnel(rig)
    await tunnel.open()
    await suspend(rig)
    assert rig.worker.parking.count == 1
    tunnel.writer.transport.abort()
    await until(lambda: not rig.worker.parking.count)
    assert not rig.control.resumed


@given(st.lists(st.tuples(st.sampled_from([1, 2, 9, 10]), st.binary(max_size=20), st.booleans()), max_size=6))
def test_control_frames_are_told_from_messages(frames: list[tuple[int, bytes, bool]]) -> None:
    data = b"".join(frame(opcode, payload, b"mask" if masked else b"") for opcode, payload, masked in frames)
    expected = [(opcode, payload) for opcode, payload, _ in frames]
    only = bool(frames) and all(opcode in (PING, PONG) for opcode, _, _ in frames)
    assert FrameCounter().only_control(data) == (expected if only else None)
    if data:
        assert FrameCounter().only_control(data[:-1]) is None or len(frames) > 1 or not only


async def grpc_like(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An application of HTTP/2 that echoes each message of a stream at once, and ends a stream when its client does."""
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="latin-1"))
    server.initiate_connection()
    writer.write(server.data_to_send())
    while data := await reader.read(65536):
        for event in server.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                server.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
            elif isinstance(event, h2.events.DataReceived):
                server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                server.send_data(event.stream_id, event.data)
            elif isinstance(event, h2.events.StreamEnded):
                server.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
            elif isinstance(event, h2.events.StreamReset):
                writer.cancelled = [*getattr(writer, "cancelled", []), event.stream_id]  # type: ignore[attr-defined]
        writer.write(server.data_to_send())


class Calls:
    """Streams of one client's connection of HTTP/2 to an application that speaks it too."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    async def open(self) -> None:
        self.rig.script = grpc_like
        self.client = Judge(*await asyncio.open_connection("127.0.0.1", self.rig.port))

    def call(self) -> int:
        fields = [
            (":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/echo"), ("te", "trailers"),
            ("x-aws-proxy-auth", self.rig.token), ("x-aws-proxy-port", str(self.rig.app_port)), ("x-aws-proxy-force-h2", "true"),
        ]  # fmt: skip
        return self.client.ask(fields, end=False)

    async def say(self, number: int, data: bytes, end: bool = False) -> None:
        self.client.h2.send_data(number, data, end_stream=end)
        self.client.flush()
        before = len(self.client.answers[number].body)
        while len(self.client.answers[number].body) < before + len(data):
            assert await self.client.turn()
        assert self.client.answers[number].body[before:] == data


@pytest.fixture
async def calls(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Calls]:
    rig = Rig(tmp_path, monkeypatch)
    await rig.start(http2=True)
    one = Calls(rig)
    await one.open()
    yield one
    one.client.writer.close()
    await rig.stop()


async def test_silent_calls_of_grpc_go_on_in_the_next_incarnation(calls: Calls) -> None:
    first, second = calls.call(), calls.call()
    await calls.say(first, b"one")
    await calls.say(second, b"two")
    assert await suspend(calls.rig) == 2 and calls.rig.worker.parking.count == 2
    calls.client.h2.ping(b"12345678")
    calls.client.flush()
    while not any(isinstance(event, h2.events.PingAckReceived) for event in calls.client.events):
        assert await calls.client.turn()
    assert not calls.rig.control.resumed, "a ping wakes nobody"
    calls.rig.control.on_resume = lambda: calls.rig.control.change("open", 2)
    await calls.say(first, b"three")
    assert [ask.incarnation for ask in calls.rig.control.resumed] == [1]
    await calls.say(second, b"four", end=True)
    answer = await calls.client.answer(second)
    assert answer.trailers == {"grpc-status": "0"} and calls.rig.connects == 1
    assert await suspend_again(calls.rig, 2) == 1


async def test_calls_on_which_only_the_server_speaks_are_reset(calls: Calls) -> None:
    """Server streaming: its client has ended its half. Other calls on the same connections go on after the sleep."""
    both, server = calls.call(), calls.call()
    await calls.say(both, b"one")
    hold = calls.client.answers[server]
    calls.client.h2.send_data(server, b"", end_stream=False)
    calls.client.flush()
    await calls.say(server, b"two")
    (connection,) = [one for pool in calls.rig.worker.upstream.pools() for one in pool.shared]
    stream = next(one for number, one in connection.streams.items() if number == connection.last_number)
    stream.sent_end = True  # as for a call whose request is complete, and whose answer goes on
    assert await suspend(calls.rig) == 1
    while hold.reset is None:
        assert await calls.client.turn()
    calls.rig.control.on_resume = lambda: calls.rig.control.change("open", 2)
    await calls.say(both, b"three")
    assert calls.rig.connects == 1 and list(connection.streams.values()) != [stream]
    assert await suspend_again(calls.rig, 2) == 1


async def suspend_again(rig: Rig, incarnation: int) -> int:
    rig.control.change("hold", incarnation)
    (connection,) = rig.control.connections
    return int((await connection.call("drain", m.DrainRequest("s1", incarnation, 0.0, True, 8), m.Drained)).parked)


async def test_a_word_on_a_call_after_the_gate_is_told(calls: Calls) -> None:
    number = calls.call()
    await calls.say(number, b"before")
    await gated(calls.rig)
    await calls.say(number, b"after")
    assert await drained(calls.rig, if_quiet=True) == m.Drained(quiet=False)
    assert await drained(calls.rig, if_quiet=False) == m.Drained(1, spoken=True)


async def test_calls_that_wait_for_a_head_are_cut_with_their_connection(calls: Calls) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f.settings({}))
        while await reader.read(65536):
            pass

    calls.rig.script = deaf
    number = calls.call()
    await until(lambda: calls.rig.worker.routes.account("s1").waiting)
    assert await suspend(calls.rig) == 0
    assert (await calls.client.answer(number)).reset is not None


async def test_more_streams_than_may_be_parked_are_cut(calls: Calls) -> None:
    numbers = [calls.call() for _ in range(3)]
    for number in numbers:
        await calls.say(number, b"x")
    assert await suspend(calls.rig, park=2) == 0
    for number in numbers:
        assert (await calls.client.answer(number)).reset is not None


async def test_a_client_that_leaves_parked_calls_wakes_nobody(calls: Calls) -> None:
    first, second = calls.call(), calls.call()
    for number in (first, second):
        await calls.say(number, b"x")
    assert await suspend(calls.rig) == 2
    calls.client.h2.reset_stream(first)
    calls.client.flush()
    (connection,) = calls.rig.worker.clients
    await until(lambda: len(connection.streams) == 1)  # type: ignore[union-attr]
    assert calls.rig.worker.parking.count == 1
    calls.client.writer.close()
    await until(lambda: not calls.rig.worker.parking.count)
    assert not calls.rig.control.resumed


async def test_a_session_that_ends_resets_parked_calls(calls: Calls) -> None:
    number = calls.call()
    await calls.say(number, b"x")
    assert await suspend(calls.rig) == 1
    calls.rig.control.change("refuse", 1)
    assert (await calls.client.answer(number)).reset is not None


async def test_control_can_ask_how_many_streams_clients_still_hold(rig: Rig) -> None:
    tunnels = [Tunnel(rig) for _ in range(2)]
    for tunnel in tunnels:
        await tunnel.open()
        assert await tunnel.say(frame(1, b"one", b"abcd"))
    assert await suspend(rig) == 2
    (connection,) = rig.control.connections
    assert await connection.call("parked", m.SessionName("s1"), int) == 2
    assert await connection.call("parked", m.SessionName("unknown"), int) == 0
    tunnels[0].writer.transport.abort()
    await until(lambda: rig.worker.parking.count == 1)
    assert await connection.call("parked", m.SessionName("s1"), int) == 1
    tunnels[1].writer.close()
