"""What is said of a request's way: Via and X-Forwarded-*, where settings ask for them."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config import Edge
from gateway.edge.client.forwarding import Forwarding

BLOCK = b"\r\nHost: one.example\r\nX-Forwarded-For: 9.9.9.9\r\nx_forwarded_proto: https\r\nForwarded: for=x\r\nVia: 1.0 old\r\nA: 1"


class Transport:
    def __init__(self, is_tls: bool) -> None:
        self.is_tls = is_tls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"ssl_object": object() if self.is_tls else None, "peername": ("192.0.2.7", 4242)}.get(name, default)


def test_nothing_is_said_by_default() -> None:
    forwarding = Forwarding(Edge())
    assert not forwarding.is_on
    assert forwarding.of_block(BLOCK, b"1.1") == BLOCK
    assert forwarding.of_connection(Transport(True)) == forwarding.via_line(b"1.1") == b""  # type: ignore[arg-type]


def test_via_is_behind_those_before_us() -> None:
    forwarding = Forwarding(Edge(via="us"))
    assert forwarding.is_on
    assert forwarding.of_block(BLOCK, b"2") == BLOCK + b"\r\nVia: 2 us"


@pytest.mark.parametrize(("is_tls", "scheme"), [(True, b"https"), (False, b"http")])
def test_what_a_client_says_of_its_own_way_is_replaced(is_tls: bool, scheme: bytes) -> None:
    forwarding = Forwarding(Edge(forwarded=True))
    block = forwarding.of_block(BLOCK, b"1.1")
    assert block == b"\r\nHost: one.example\r\nVia: 1.0 old\r\nA: 1\r\nX-Forwarded-Host: one.example"
    lines = forwarding.of_connection(Transport(is_tls))  # type: ignore[arg-type]
    assert lines == b"\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: " + scheme
