"""DNS: guests' questions and servers' answers (gateway/guest/dns.py, gateway/guest/resolver.py)."""

from __future__ import annotations

import contextlib
import ipaddress
import struct

from gateway.guest import dns, resolver

TRACED = ("gateway.guest.dns",)
NAME = "www.example.org"
_QUESTION = b"\3www\7example\3org\0\0\1\0\1"
WORDS = (
    b"\xc0\x0c",
    b"\xc0\x00",
    b"\xff\xff",
    b"\3www",
    b"\7example",
    b"\x3f" + b"a" * 63,
    b"\0\1\0\1",
    b"\0\5\0\1",
    b"\0\0\1\x2c\0\4",
    _QUESTION,
    b"\1.",
    b"\1\xe9",
)


def _answer(*records: bytes, code: int = 0) -> bytes:
    return struct.pack(">HHHHHH", 5, 0x8180 | code, 1, len(records), 0, 0) + _QUESTION + b"".join(records)


def _record(owner: bytes, kind: int, data: bytes) -> bytes:
    return owner + struct.pack(">HHIH", kind, 1, 300, len(data)) + data


def seeds() -> list[bytes]:
    return [
        dns.make_question(5, NAME), dns.make_question(5, NAME).replace(b"www", b"wWW"), _answer(_record(b"\xc0\x0c", 1, b"\x7f\0\0\1")), _answer(code=3),
        _answer(_record(b"\xc0\x0c", 5, b"\1a\xc0\x10"), _record(b"\1a\xc0\x10", 1, b"\1\2\3\4"), _record(b"\1a\7example\3org\0", 1, b"\1\2\3\5")),
        _answer(_record(b"\xc0\x0c", 28, bytes(16)), _record(b"\xc0\x0c", 1, b"\1\2\3\4")),
    ]  # fmt: skip


def check(data: bytes) -> None:
    with contextlib.suppress(dns.Malformed):
        question = dns.read_question(data)
        _answered(question)
    with contextlib.suppress(dns.Malformed):
        answer = dns.read_answer(data, int.from_bytes(data[:2], "big"), NAME)
        assert 0 <= answer.code < 16 and len(answer.addresses) <= 128 and answer.seconds >= 0
    if len(data) >= 12:
        refused = resolver.without_answer(data)
        assert refused[:2] == data[:2] and refused[2] & 0x80 and refused[3] & 15 == 5 and refused[6:12] == bytes(6)


def _answered(question: dns.Question) -> None:
    """What is made for a question is read as what was meant."""
    addresses = (ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv4Address("192.0.2.2"))
    made = dns.make_answer(question, 0, addresses, 60)
    assert len(made) < 512
    if question.kind == dns.A and question.is_internet:
        assert dns.read_answer(made, question.identifier, question.name) == dns.Answer(0, addresses, 60)
    try:
        asked = dns.make_question(question.identifier, question.name)
    except dns.Malformed:
        return
    again = dns.read_question(asked)
    assert (again.name, again.kind) == (question.name, dns.A) and question.name == question.name.lower()
