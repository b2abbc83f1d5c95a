"""Heads of HTTP/2 messages are read into the same forms as those of HTTP/1.1 (RFC 9113, 8; RFC 8441)."""

from __future__ import annotations

import re
from typing import Final

from . import http2_frames, websocket
from .http1_head import (
    CHUNKED,
    FIXED,
    NO_BODY,
    OWN_FIELDS,
    Fields,
    Malformed,
    RequestHead,
    ResponseHead,
    Trailers,
    allowed_trailers,
    host_of,
    read_fields,
    split_block,
)
from .http2_frames import Field

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+\Z").match
# RFC 9113, 8.2.1: no control characters, no white space around; values are joined by line feeds to be looked at together.
_BAD_VALUE = re.compile(rb"[^\t\x20-\x7e\x80-\xff\n]|(?:\A|\n)[\t ]|[\t ](?:\n|\Z)").search
_BAD_PSEUDO = re.compile(rb"[^\x21-\x7e\x80-\xff]").search
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z").match
_DIGITS = re.compile(rb"[0-9]{1,18}\Z").match
_STATUS = re.compile(rb"[1-9][0-9][0-9]\Z").match
_OF_CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_NO_PSEUDO: frozenset[bytes] = frozenset()
_RESPONSE_PSEUDO = frozenset((b":status",))
_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority", b":protocol"))

# Names that were checked, from whomever: few and short, because nobody is asked for a token before.
_known_names: dict[bytes, bool] = {}
_KNOWN_MOST: Final = 4096
_KNOWN_BYTES: Final = 64


def size_of(fields: list[Field]) -> int:
    """Returns the bytes of names and values, which are what is bounded over HTTP/1.1."""
    return sum([len(name) + len(value) for name, value, _ in fields])


def is_field_name(name: bytes) -> bool:
    """Whether a name may stand in a section of HTTP/2, where fields of the connection have no place (RFC 9113, 8.2.1, 8.2.2)."""
    return _NAME(name) is not None and name not in _OF_CONNECTION


def are_values(values: list[bytes]) -> bool:
    joined = b"\n".join(values)
    return not _BAD_VALUE(joined) and joined.count(b"\n") == max(len(values) - 1, 0)


def _check(fields: list[Field], pseudo: frozenset[bytes], message: str) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Splits pseudo-header fields from the others. Raises Malformed."""
    special: dict[bytes, bytes] = {}
    rest: list[tuple[bytes, bytes]] = []
    for name, value, _ in fields:
        if name[:1] == b":":
            if rest or name in special or name not in pseudo or _BAD_PSEUDO(value):
                raise Malformed(f"{message} has a pseudo-header field that is malformed, repeated or misplaced (RFC 9113 8.3)")
            special[name] = value
            continue
        good = _known_names.get(name)
        if good is None:
            good = is_field_name(name)
            if len(name) <= _KNOWN_BYTES and len(_known_names) < _KNOWN_MOST:
                _known_names[name] = good
        if not good or (name == b"te" and value.lower() != b"trailers"):
            raise Malformed(f"{message} has a field name that is malformed, or of the connection (RFC 9113 8.2.1, 8.2.2)")
        rest.append((name, value))
    if not are_values([value for _, value in rest]):
        raise Malformed(f"{message} has a malformed field value (RFC 9113 8.2.1)")
    return special, rest


def parse_request(fields: list[Field], end: bool, most: int) -> RequestHead:
    """Parses a request; `end` says that no body follows. Raises Malformed: the stream is broken, or with status 431 answered."""
    special, rest = _check(fields, _REQUEST_PSEUDO, "request")
    if len(rest) > most:
        raise Malformed(f"request has more than {most} fields (edge.head_fields)", 431)
    method, path, protocol = special.get(b":method", b""), special.get(b":path", b""), special.get(b":protocol")
    if not _METHOD(method) or (method == b"CONNECT") != (protocol is not None):
        raise Malformed("request has a malformed method, or CONNECT without :protocol (RFC 9113 8.5, RFC 8441 4)")
    if special.get(b":scheme") not in (b"https", b"http") or not (path.startswith(b"/") or (path == b"*" and method == b"OPTIONS")):
        raise Malformed("request has a malformed :scheme or :path (RFC 9113 8.3.1)")
    authority, plain = _one_host(special.get(b":authority"), rest)
    if protocol is not None:
        plain = _of_handshake(protocol, plain)
    head = RequestHead(method, path, 1, host_of(authority))
    read_fields(head, plain, 1)
    _frame(head, plain, end)
    if protocol is not None:
        _upgrade(head, plain)
    elif head.framing == CHUNKED:
        head.block += b"\r\ntransfer-encoding: chunked"
    head.keep_alive = True
    head.is_memorable &= end and protocol is None and not head.expects and path != b"*"
    return head


def _one_host(authority: bytes | None, rest: list[tuple[bytes, bytes]]) -> tuple[bytes, Fields]:
    """Checks that :authority and Host do not differ (RFC 9113, 8.3.1), and joins cookies, which may come in pieces (8.2.3)."""
    cookies: list[bytes] = []
    plain: Fields = []
    for name, value in rest:
        if name == b"host":
            if authority is None:
                authority = value
            elif authority.lower() != value.lower():
                raise Malformed("request has a Host that differs from :authority (RFC 9113 8.3.1)")
        elif name == b"cookie":
            cookies.append(value)
        else:
            plain.append((name, name, value))
    if authority is None:
        raise Malformed("request has neither :authority nor Host (RFC 9113 8.3.1)")
    plain.insert(0, (b"host", b"Host", authority))
    if cookies:
        plain.append((b"cookie", b"cookie", b"; ".join(cookies)))
    return authority, plain


def _frame(head: RequestHead, fields: Fields, end: bool) -> None:
    lengths = [value for name, _, value in fields if name == b"content-length"]
    if lengths and (len(lengths) > 1 or not _DIGITS(lengths[0])):
        raise Malformed("request has a malformed or repeated Content-Length (RFC 9113 8.1.1)")
    if end:
        if lengths and int(lengths[0]):
            raise Malformed("request has a Content-Length, and no content (RFC 9113 8.1.1)")
        head.framing = FIXED if lengths else NO_BODY
    elif lengths:
        head.framing, head.length = FIXED, int(lengths[0])
    else:
        head.framing = CHUNKED


# An extended CONNECT has no content, whose length could be said or which could be waited for (RFC 9110, 9.3.6), and its handshake
# has no key (RFC 8441, 5): the one towards the application is ours.
_NOT_IN_HANDSHAKE = frozenset((b"expect", b"sec-websocket-key"))


def _of_handshake(protocol: bytes, fields: Fields) -> Fields:
    """Returns the fields of an extended CONNECT that go on. Raises Malformed."""
    if protocol != b"websocket":
        raise Malformed("request has a :protocol other than websocket (RFC 8441 4)", 501)
    if any(name == b"content-length" for name, _, _ in fields):
        raise Malformed("request has the method CONNECT and a Content-Length (RFC 9110 9.3.6)")
    return [field for field in fields if field[0] not in _NOT_IN_HANDSHAKE]


def _upgrade(head: RequestHead, fields: Fields) -> None:
    """Makes the usual upgrade of an extended CONNECT, for the application (RFC 8441, 5)."""
    key = websocket.new_key()
    head.method, head.framing, head.length = b"GET", NO_BODY, 0
    head.upgrade, head.websocket_key = b"websocket", key
    head.block += b"\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: " + key
    if not any(name == b"sec-websocket-version" for name, _, _ in fields):
        head.block += b"\r\nSec-WebSocket-Version: 13"


def parse_response(fields: list[Field], end: bool, most: int, is_head: bool) -> ResponseHead:
    """Reads an application's response. Raises Malformed, which its client sees as 502."""
    try:
        special, rest = _check(fields, _RESPONSE_PSEUDO, "response")
    except Malformed as error:
        raise Malformed(str(error), 502) from error
    if len(rest) > most:
        raise Malformed(f"response has more than {most} fields (edge.head_fields)", 502)
    if not _STATUS(special.get(b":status", b"")) or special[b":status"] == b"101":
        raise Malformed("response has a :status that is malformed, or 101 (RFC 9113 8.3.2, 8.6)", 502)
    status = int(special[b":status"])
    lengths = [value for name, value in rest if name == b"content-length"]
    if len(lengths) > 1 or (lengths and not _DIGITS(lengths[0])):
        raise Malformed("response has a malformed or repeated content-length (RFC 9113 8.1.1)", 502)
    dropped = OWN_FIELDS | {b"content-length"} if status < 200 or status == 204 else OWN_FIELDS  # RFC 9110, 8.6
    rest = [field for field in rest if field[0] not in dropped]
    block = b"".join(b"\r\n%b: %b" % field for field in rest)
    names = frozenset(name for name, _ in rest)
    framing, length = NO_BODY, 0
    if not (status < 200 or status in (204, 304) or is_head or (end and not lengths)):
        framing, length = (FIXED, int(lengths[0])) if lengths else (CHUNKED, 0)
        if framing == CHUNKED:
            block += b"\r\nTransfer-Encoding: chunked"
            names |= {b"transfer-encoding"}
    elif end and status >= 200 and status not in (204, 304) and not is_head:
        framing, block = FIXED, block + b"\r\nContent-Length: 0"
    head = ResponseHead(status, framing, length, True, b"HTTP/1.1 %d " % status, block, None, names)
    head.is_dated = status < 200 or b"date" in head.names
    head.hpack = http2_frames.encode_status(status) + http2_frames.encode(rest)  # as it came, without what HTTP/1.1 needs for its framing
    return head


def parse_trailers(fields: list[Field], most: int) -> Trailers:
    """Returns the trailers that may go on. Raises Malformed."""
    if len(fields) > most:
        raise Malformed(f"trailer section has more than {most} fields (edge.head_fields)")
    return allowed_trailers(_check(fields, _NO_PSEUDO, "trailer section")[1])


_NOT_IN_H2 = _OF_CONNECTION | {b"sec-websocket-accept"}


def response_block(head: ResponseHead) -> bytes:
    """Returns status and fields for a client of HTTP/2, and keeps them with the head. 101 is 200 there (RFC 8441, 5)."""
    if not head.hpack:
        drop = _NOT_IN_H2 | {b"content-length"} if head.status == 304 else _NOT_IN_H2  # which clients take for a broken promise
        fields = [field for field in split_block(head.block) if field[0] not in drop]
        head.hpack = http2_frames.encode_status(200 if head.status == 101 else head.status) + http2_frames.encode(fields)
    return head.hpack


def request_block(head: RequestHead, request_id: bytes, scheme: bytes) -> bytes:
    """Returns a request's field block for an application that speaks HTTP/2."""
    fields = [(b":method", head.method), (b":scheme", scheme), (b":path", head.target)]
    plain = split_block(head.block)
    fields += [(b":authority", value) for name, value in plain if name == b"host"]
    fields += [field for field in plain if field[0] not in _OF_CONNECTION and field[0] != b"host"]
    if head.te_trailers:
        fields.append((b"te", b"trailers"))
    fields.append((b"x-amzn-requestid", request_id))
    return http2_frames.encode(fields)
