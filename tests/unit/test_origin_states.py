"""What a connection of HTTP/1.1 to an application does in each of its states, without a socket."""

from __future__ import annotations

import pytest

from gateway.config import Edge
from gateway.edge.origin.http1 import Origin
from gateway.edge.policy.head_cache import Cache
from gateway.edge.sides import ClientSide, OriginContext, Owner
from gateway.edge.wire.http1_head import RequestHead


class Transport:
    def __init__(self) -> None:
        self.written = b""
        self.ended = ""

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def is_closing(self) -> bool:
        return bool(self.ended)

    def set_write_buffer_limits(self, high: int) -> None: ...


# By state, what an application has sent by then in answer to a request that may upgrade.
ANSWERED = {
    "at a head": b"",
    "in a head": b"HTTP/1.1 200",
    "in content of a known length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
    "in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhell",
    "in content that ends with the connection": b"HTTP/1.1 200 OK\r\n\r\nhell",
    "in a tunnel": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhell",
}


@pytest.fixture
def origin() -> Origin:
    made = Origin(OriginContext(Edge(), lambda: 0.0, Cache(1 << 16), lambda _: None, lambda _: None), Owner(("s", 1, 80)), False)
    made.connection_made(Transport())  # type: ignore[arg-type]
    return made


def request() -> RequestHead:
    return RequestHead(b"GET", b"/", 1, "s.example", upgrade=b"websocket")


def answered(origin: Origin, data: bytes) -> ClientSide:
    exchange = ClientSide()
    exchange.head = request()
    origin.open(exchange, request())
    if data:
        origin.data_received(data)
    return exchange


@pytest.mark.parametrize("data", ANSWERED.values(), ids=ANSWERED)
def test_a_connection_with_an_exchange_begins_no_other(origin: Origin, data: bytes) -> None:
    exchange = answered(origin, data)
    assert origin.exchange is exchange and not origin.is_reusable
    with pytest.raises(AssertionError):
        origin.begin(ClientSide(), False)
    assert origin.exchange is exchange


@pytest.mark.parametrize("end", ["cut", "cancel", "connection_lost", "finish"])
@pytest.mark.parametrize("data", ANSWERED.values(), ids=ANSWERED)
def test_an_end_in_any_state_is_the_last_of_the_connection(origin: Origin, data: bytes, end: str) -> None:
    answered(origin, data)
    if end == "connection_lost":
        origin.connection_lost(None)
    elif end == "finish":
        origin.park(False)
        origin.finish(None)  # a client that leaves a parked stream
    else:
        getattr(origin, end)()
    assert not origin.is_reusable and origin.is_closing
    origin.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")  # on its way when the end came
    assert not origin.spoke_first
    with pytest.raises(AssertionError):
        origin.begin(ClientSide(), False)


def test_an_application_that_speaks_before_it_is_asked_is_not_asked(origin: Origin) -> None:
    assert origin.is_reusable
    origin.data_received(b"220 smtp.example ESMTP\r\n")
    assert origin.spoke_first and origin.is_closing and not origin.is_reusable
