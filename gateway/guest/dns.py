"""Messages of the DNS, read and made: questions of guests, which are anybody's bytes, and answers to them (RFC 1035, RFC 3596, RFC 9460).

Nothing of a guest's message but the name, in lower case, goes into a question that is sent on: no case, no identifier, no option (a
client's subnet, RFC 7871, is one). Nothing of a server's but addresses goes into an answer.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass

from gateway.messages import HOST_LABEL

A, CNAME, OPT = 1, 5, 41
# Asked for beside A by every client. That there is none is true here: the link has no IPv6, and what HTTPS records offer is not let out.
WITHOUT_ANSWER = frozenset({28, 64, 65})  # AAAA, SVCB, HTTPS
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, REFUSED = 0, 1, 2, 3, 5
MOST_ADDRESSES = 12  # so that each answer fits 512 bytes
_HEADER = struct.Struct(">HHHHHH")
_TAIL = struct.Struct(">HH")  # of a question: type, class
_RECORD = struct.Struct(">HHIH")
_IN = 1
_QUERY, _RESPONSE, _RECURSE, _OFFERED, _OPCODE = 0, 0x8000, 0x0100, 0x0080, 0x7800
_NAME_BYTES, _JUMPS, _RECORDS, _ALIASES = 255, 32, 128, 16
_UPSTREAM_BYTES = 1232  # of an answer over UDP (DNS flag day 2020)
_LABEL = re.compile(HOST_LABEL)


class Malformed(Exception):
    """What came is no message that can be read."""


@dataclass(frozen=True)
class Question:
    """`name` in lower case, without the last dot; `section` is the question as it came, which its answer repeats."""

    identifier: int
    flags: int
    name: str
    kind: int
    is_internet: bool
    section: bytes


@dataclass(frozen=True)
class Answer:
    """What a server says of a name: a response code, and addresses with the seconds for which they hold."""

    code: int
    addresses: tuple[ipaddress.IPv4Address, ...] = ()
    seconds: int = 0


def read_question(data: bytes) -> Question:
    """Raises Malformed for what is no single question, and for names that are no host's."""
    identifier, flags, count, answers, _, _ = _header(data)
    if flags & (_RESPONSE | _OPCODE) or count != 1 or answers:
        raise Malformed("not one question")
    name, at = _name(data, _HEADER.size, jumps=0)
    if at + _TAIL.size > len(data):
        raise Malformed("cut short")
    kind, kind_class = _TAIL.unpack_from(data, at)
    return Question(identifier, flags, name, kind, kind_class == _IN, data[_HEADER.size : at + _TAIL.size])


def make_question(identifier: int, name: str) -> bytes:
    """Asks for a name's IPv4 addresses. Raises Malformed for a name that is none."""
    labels = name.split(".")
    if len(name) > _NAME_BYTES - 2 or not all(_LABEL.fullmatch(label) for label in labels):
        raise Malformed(f"no name of a host: {name[:80]!r}")
    encoded = b"".join(bytes([len(label)]) + label.encode("ascii") for label in labels)
    options = b"\0" + _RECORD.pack(OPT, _UPSTREAM_BYTES, 0, 0)
    return _HEADER.pack(identifier, _RECURSE, 1, 0, 0, 1) + encoded + b"\0" + _TAIL.pack(A, _IN) + options


def read_answer(data: bytes, identifier: int, name: str) -> Answer:
    """Returns the addresses of `name`, also of what it is an alias of. Raises Malformed for what does not answer that question."""
    found, flags, questions, answers, _, _ = _header(data)
    if found != identifier or not flags & _RESPONSE or questions != 1:
        raise Malformed("another's answer")
    asked, at = _name(data, _HEADER.size)
    if asked != name or at + _TAIL.size > len(data) or _TAIL.unpack_from(data, at) != (A, _IN):
        raise Malformed("another question's answer")
    at += _TAIL.size
    aliases: dict[str, tuple[str, int]] = {}
    addresses: dict[str, list[tuple[ipaddress.IPv4Address, int]]] = {}
    for _ in range(min(answers, _RECORDS)):
        owner, at = _name(data, at)
        if at + _RECORD.size > len(data):
            raise Malformed("cut short")
        kind, kind_class, seconds, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if at + length > len(data):
            raise Malformed("cut short")
        if kind_class == _IN and kind == A and length == 4:
            addresses.setdefault(owner, []).append((ipaddress.IPv4Address(data[at : at + 4]), seconds))
        elif kind_class == _IN and kind == CNAME:
            aliases[owner] = (_name(data, at)[0], seconds)
        at += length
    lives = []
    for _ in range(_ALIASES):
        if name not in aliases:
            break
        name, seconds = aliases[name]
        lives.append(seconds)
    own = addresses.get(name, [])
    return Answer(flags & 0x0F, tuple(address for address, _ in own), min([*lives, *(seconds for _, seconds in own)], default=0))


def make_answer(question: Question, code: int, addresses: tuple[ipaddress.IPv4Address, ...] = (), seconds: int = 0) -> bytes:
    """Returns the reply that has these addresses of the name itself, whatever aliases led to them."""
    flags = _RESPONSE | question.flags & _RECURSE | _OFFERED | code
    records = [b"\xc0\x0c" + _RECORD.pack(A, _IN, seconds, 4) + one.packed for one in addresses[:MOST_ADDRESSES]]
    return _HEADER.pack(question.identifier, flags, 1, len(records), 0, 0) + question.section + b"".join(records)


def _header(data: bytes) -> tuple[int, int, int, int, int, int]:
    if len(data) < _HEADER.size:
        raise Malformed("cut short")
    return _HEADER.unpack_from(data)


def _name(data: bytes, at: int, jumps: int = _JUMPS) -> tuple[str, int]:
    """Returns a name in lower case and where what follows it begins. Raises Malformed."""
    labels: list[str] = []
    size, end = 1, -1
    while True:
        if at >= len(data):
            raise Malformed("cut short")
        length = data[at]
        if length >= 0xC0:
            if not jumps or at + 2 > len(data):
                raise Malformed("too many jumps")
            jumps -= 1
            end = at + 2 if end < 0 else end
            at = (length & 0x3F) << 8 | data[at + 1]
            continue
        at += 1
        if not length:
            return ".".join(labels), at if end < 0 else end
        size += length + 1
        label = data[at : at + length]
        if length > 63 or len(label) < length or size > _NAME_BYTES:
            raise Malformed("a name that is too long")
        labels.append(label.decode("latin-1").lower().replace(".", "\\."))
        at += length
