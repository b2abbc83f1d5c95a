"""Heads of messages: strict parsing, and what of them goes on to the other side.

RFC 9110 and 9112 as an intermediary must read them: anything that another parser could read differently is refused.
Parsing is pure; what is parsed is remembered by `memo.py`. Heads of HTTP/2 are read by `head2.py` into the same forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Every line a field: a token, a colon with no space before it, and a value without control characters (RFC 9112, 5).
_BLOCK = re.compile(rb"(?:\r\n" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*)*\Z")
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\Z")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?\Z")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5})?)?\Z")
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)([/?].*)?\Z", re.I)
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")

MARKER = b"lambda-microvms"
_AUTHENTICATION = b"lambda-microvms.authentication."
_PORT = b"lambda-microvms.port."
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"))
_PROXY_PREFIX = b"x-aws-proxy-"
# A Connection field may not take these away from the message (RFC 9110, 7.6.1: end-to-end fields).
_UNLISTABLE = frozenset((b"host", b"content-length", b"transfer-encoding", b"cache-control", b"authorization"))

NO_BODY: Final = 0
FIXED: Final = 1
CHUNKED: Final = 2
UNTIL_CLOSE: Final = 3
Fields = list[tuple[bytes, bytes, bytes]]  # name in lower case, name as sent, value
Trailers = list[tuple[bytes, bytes]]  # name in lower case, value
# Fields that say how a message is framed or routed: a trailer may not bring them (RFC 9110, 6.5.1).
_NOT_IN_TRAILERS = _HOP_BY_HOP | {b"content-length", b"transfer-encoding", b"host", b"trailer", b"authorization", b"content-type"}


class Malformed(Exception):
    """The head cannot be accepted; `status` is what its sender is told."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class RequestHead:
    """A request's head, checked. `fields` are those that go on to the origin, as they will be written."""

    method: bytes
    target: bytes
    minor: int  # of HTTP/1.x
    host: str  # lower case, without port
    framing: int = NO_BODY
    length: int = 0
    token: str | None = field(default=None, repr=False)
    port: bytes | None = None
    subprotocol_auth: bool = False
    marker_offered: bool = False
    force_h2: bool = False
    upgrade: bytes | None = None
    expects: bool = False
    keep_alive: bool = True
    is_memorable: bool = True
    te_trailers: bool = False
    websocket_key: bytes = b""  # of the handshake that we make for a client of HTTP/2
    block: bytes = b""

    @property
    def wants_h2(self) -> bool:
        """The application is to be spoken to in HTTP/2 without asking first."""
        return self.force_h2 and self.upgrade is None

    @property
    def is_safe(self) -> bool:
        """RFC 9110, 9.2.1, without a body."""
        return self.method in (b"GET", b"HEAD", b"OPTIONS") and self.framing == NO_BODY


@dataclass(slots=True)
class ResponseHead:
    """A response's head. `block` is its field block without hop-by-hop fields; `hpack` the same for HTTP/2, made when it is
    first wanted."""

    status: int
    framing: int
    length: int
    keep_alive: bool
    status_line: bytes
    block: bytes
    upgrade: bytes | None = None
    names: frozenset[bytes] = field(default_factory=frozenset)
    hpack: bytes = b""


def split_block(block: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a block that was checked: names in lower case."""
    fields = []
    for line in block.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def allowed_trailers(trailers: Trailers) -> Trailers:
    return [one for one in trailers if one[0] not in _NOT_IN_TRAILERS and not one[0].startswith(_PROXY_PREFIX)]


def split_fields(block: bytes, most: int) -> Fields:
    """The fields of a block that begins with CRLF and ends without one. Raises Malformed."""
    if not _BLOCK.match(block):
        raise Malformed("malformed field")
    lines = block.split(b"\r\n")[1:]
    if len(lines) > most:
        raise Malformed("too many fields", 431)
    fields: Fields = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), name, value.strip(b" \t")))
    return fields


def _tokens(value: bytes) -> list[bytes]:
    return [part.strip(b" \t").lower() for part in value.split(b",") if part.strip(b" \t")]


def _framing(fields: Fields, minor: int) -> tuple[int, int]:
    """RFC 9112, 6.3: one length or chunked, never both, never several. Raises Malformed."""
    lengths = [value for name, _, value in fields if name == b"content-length"]
    codings = [value for name, _, value in fields if name == b"transfer-encoding"]
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or minor == 0:
            raise Malformed("ambiguous or unsupported Transfer-Encoding", 400 if lengths or minor == 0 else 501)
        return CHUNKED, 0
    if not lengths:
        return NO_BODY, 0
    if len(lengths) > 1 or not _DIGITS.match(lengths[0]):
        raise Malformed("malformed or repeated Content-Length")
    return FIXED, int(lengths[0])


def _listed(fields: Fields) -> tuple[frozenset[bytes], bool, bool, bool]:
    """What Connection lists: names to drop, and whether it says close, keep-alive, upgrade."""
    options = [option for name, _, value in fields if name == b"connection" for option in _tokens(value)]
    drop = frozenset(options) - _UNLISTABLE
    return drop, b"close" in options, b"keep-alive" in options, b"upgrade" in options


def host_of(value: bytes) -> str:
    """The host of an authority, in lower case. Raises Malformed."""
    if not _HOST.match(value):
        raise Malformed("malformed Host")
    host = value if value.endswith(b"]") else value.rpartition(b":")[0] if b":" in value else value
    return host.decode("ascii").lower().rstrip(".")


def parse_request(line: bytes, block: bytes, most: int) -> RequestHead:
    """Raises Malformed."""
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise Malformed("malformed request line")
    method, target, minor = match[1], match[2], int(match[3])
    fields = split_fields(block, most)
    hosts = [value for name, _, value in fields if name == b"host"]
    if len(hosts) > 1 or (not hosts and minor == 1):
        raise Malformed("Host is missing or repeated")
    authority, memorable = (hosts[0] if hosts else b""), minor == 1
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        absolute = _ABSOLUTE.match(target)
        if absolute is None or method == b"CONNECT":
            raise Malformed("unsupported request target")
        authority, memorable = absolute[1], False
        target = absolute[2] or b"/"
        if target.startswith(b"?"):
            target = b"/" + target
        fields = [f for f in fields if f[0] != b"host"]
        fields.insert(0, (b"host", b"Host", authority))
    head = RequestHead(method, target, minor, host_of(authority) if authority or minor else "")
    head.framing, head.length = _framing(fields, minor)
    read_fields(head, fields, minor)
    head.is_memorable = memorable and head.framing == NO_BODY and not head.expects and head.upgrade is None and target != b"*"
    return head


def read_fields(head: RequestHead, fields: Fields, minor: int) -> None:
    """Takes out what is ours or of the connection; the rest becomes `head.block`. Raises Malformed."""
    drop, close, keep, upgrade = _listed(fields)
    head.keep_alive = not close and (minor == 1 or keep)
    kept: list[bytes] = []
    for name, sent, value in fields:
        if name.startswith(_PROXY_PREFIX):
            _proxy_field(head, name, value)
            continue
        if name == b"upgrade" and upgrade:
            head.upgrade = value
        elif name == b"expect":
            head.expects = True
        elif name == b"te":
            head.te_trailers = b"trailers" in _tokens(value)
        if name in _HOP_BY_HOP or name in drop:
            continue
        if name == b"sec-websocket-protocol":
            rest = _subprotocols(head, value)
            if rest:
                kept.append(sent + b": " + rest)
            continue
        kept.append(sent + b": " + value)
    if head.upgrade is not None:
        kept += [b"Connection: upgrade", b"Upgrade: " + head.upgrade]
    head.block = b"\r\n" + b"\r\n".join(kept) if kept else b""


def _proxy_field(head: RequestHead, name: bytes, value: bytes) -> None:
    if name == b"x-aws-proxy-auth":
        if head.token is not None:
            raise Malformed("repeated X-aws-proxy-auth")
        head.token = value.decode("latin-1")
    elif name == b"x-aws-proxy-port":
        if head.port is not None:
            raise Malformed("repeated X-aws-proxy-port")
        head.port = value
    elif name == b"x-aws-proxy-force-h2":
        head.force_h2 = value.lower() == b"true"


def _subprotocols(head: RequestHead, value: bytes) -> bytes:
    """Takes the token, the port and the marker out of what a browser offers (service reference, 3.2); the rest goes on."""
    rest = []
    for offer in (part.strip(b" \t") for part in value.split(b",")):
        if offer == MARKER:
            head.marker_offered = True
        elif offer.startswith(_AUTHENTICATION):
            head.subprotocol_auth = True
            if head.token is None:
                head.token = offer[len(_AUTHENTICATION) :].decode("latin-1")
        elif offer.startswith(_PORT):
            if head.port is None:
                head.port = offer[len(_PORT) :]
        elif offer:
            rest.append(offer)
    return b", ".join(rest)


def parse_response(line: bytes, block: bytes, most: int, is_head: bool) -> ResponseHead:
    """An origin's response. Raises Malformed, which its client sees as 502."""
    match = _STATUS_LINE.match(line)
    if match is None:
        raise Malformed("malformed status line", 502)
    minor, status = int(match[1]), int(match[2])
    fields = split_fields(block, most)
    drop, close, keep, upgrade = _listed(fields)
    framing, length = _framing(fields, 1)
    if status < 200 or status in (204, 304) or is_head:
        framing, length = NO_BODY, 0
    elif framing == NO_BODY:
        framing = UNTIL_CLOSE
    switched = next((value for name, _, value in fields if name == b"upgrade" and upgrade), None) if status == 101 else None
    kept = [sent + b": " + value for name, sent, value in fields if name not in _HOP_BY_HOP and name not in drop]
    return ResponseHead(
        status, framing, length,
        keep_alive=not close and (minor == 1 or keep) and framing != UNTIL_CLOSE,
        status_line=b"HTTP/1.1" + line[8:],
        block=b"\r\n" + b"\r\n".join(kept) if kept else b"",
        upgrade=switched,
        names=frozenset(name for name, _, _ in fields),
    )  # fmt: skip
