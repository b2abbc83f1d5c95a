"""Heads of HTTP/1.1 messages are parsed strictly, and it is decided which of their fields go on (RFC 9110, RFC 9112).

A request that another parser could read differently is refused. A response of an application is refused only where it stays
ambiguous: what can be written anew in one meaning (a bare LF, a control character, equal lengths, a length beside chunks) is
written anew. A refusal names the rule and its clause. Parsing is pure; `http2_head.py` reads heads of HTTP/2 into the same forms.
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
_TIMEOUT = re.compile(rb"(?:^|[,; \t])timeout[ \t]*=[ \t]*\"?([0-9]{1,6})\b", re.I)  # of Keep-Alive (RFC 2068, 19.7.1.1)
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
_NAME = re.compile(_TOKEN + rb"\Z")
FIELD_BLOCK = _BLOCK.match
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CONTROLS = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")

MARKER = b"lambda-microvms"
WEBSOCKET: Final = b"websocket"
_AUTHENTICATION = b"lambda-microvms.authentication."
_PORT = b"lambda-microvms.port."
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"))
_CONNECTION_OPTIONS = _HOP_BY_HOP | frozenset((b"close",))
_PROXY_PREFIX = b"x-aws-proxy-"
# A Connection field may not take these away from the message (RFC 9110, 7.6.1: end-to-end fields).
_UNLISTABLE = frozenset((b"host", b"content-length", b"transfer-encoding", b"cache-control", b"authorization"))

NO_BODY: Final = 0
FIXED: Final = 1
CHUNKED: Final = 2
UNTIL_CLOSE: Final = 3
Fields = list[tuple[bytes, bytes, bytes]]  # name in lower case, name as sent, value
Trailers = list[tuple[bytes, bytes]]  # name in lower case, value
# Fields that only this service writes, in either direction, in each spelling that is one name to CGI and WSGI.
OWN_FIELDS = frozenset((b"x-amzn-requestid", b"x_amzn-requestid", b"x-amzn_requestid", b"x_amzn_requestid"))
# What a request's fields decide, here and nowhere else: all others go on as they are (policy/head_cache.py relies on that).
DECISIVE = _HOP_BY_HOP | OWN_FIELDS | frozenset((
    b"host", b"content-length", b"transfer-encoding", b"expect", b"max-forwards", b"sec-websocket-protocol",
))  # fmt: skip
DECISIVE_PREFIX = _PROXY_PREFIX
# Framing, routing, authentication, controls and how content is read must be known before content: a trailer may not bring
# them (RFC 9110, 6.5.1).
_NOT_IN_TRAILERS = _HOP_BY_HOP | OWN_FIELDS | frozenset((
    b"authorization", b"cache-control", b"content-encoding", b"content-length", b"content-range", b"content-type", b"cookie", b"expect",
    b"forwarded", b"host", b"max-forwards", b"pragma", b"proxy-authenticate", b"proxy-authorization", b"range", b"set-cookie", b"trailer",
    b"transfer-encoding", b"via", b"www-authenticate",
))  # fmt: skip
_NOT_IN_TRAILERS_PREFIXES = (_PROXY_PREFIX, b"x-forwarded-", b"if-", b"sec-websocket-")


class Malformed(Exception):
    """The message cannot be accepted: the text names the rule and its clause. `status` is what a request's sender is told."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class RequestHead:
    """A request's head after it was checked. `fields` are those that go on to the origin, as they will be written."""

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
    nominates: bool = False  # Connection lists fields by their names, which then do not go on
    te_trailers: bool = False
    websocket_key: bytes = b""  # of the handshake that we make for a client of HTTP/2
    max_forwards: int = -1  # of TRACE and OPTIONS, as received; -1: not said
    block: bytes = b""

    @property
    def wants_h2(self) -> bool:
        """Whether the application is to be spoken to in HTTP/2 without asking first (RFC 9113, 3.3)."""
        return self.force_h2 and self.upgrade is None

    @property
    def is_safe(self) -> bool:
        """Whether the method is safe (RFC 9110, 9.2.1) and there is no body."""
        return self.method in (b"GET", b"HEAD", b"OPTIONS") and self.framing == NO_BODY


@dataclass(slots=True)
class ResponseHead:
    """A response's head. `block` is its field block without hop-by-hop fields; `hpack` the same for HTTP/2, made when it is
    first wanted. `is_dated` says that it has a Date, or needs none."""

    status: int
    framing: int
    length: int
    keep_alive: bool
    status_line: bytes
    block: bytes
    upgrade: bytes | None = None
    names: frozenset[bytes] = field(default_factory=frozenset)
    hpack: bytes = b""
    idle_seconds: float = -1.0  # how long the application keeps an idle connection, where it says so (Keep-Alive: timeout)
    is_dated: bool = True


def split_block(block: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the fields of a block that was checked, with names in lower case."""
    fields = []
    for line in block.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def allowed_trailers(trailers: Trailers) -> Trailers:
    """Returns the fields of a trailer section that may go on, whichever protocol it came by and goes on in."""
    return [trailer for trailer in trailers if trailer[0] not in _NOT_IN_TRAILERS and not trailer[0].startswith(_NOT_IN_TRAILERS_PREFIXES)]


def split_fields(block: bytes, most: int, message: str = "request") -> Fields:
    """Returns the fields of a block that begins with CRLF and ends without one. Raises Malformed."""
    lines = block.split(b"\r\n")[1:]
    if not _BLOCK.match(block):
        raise Malformed(f"{message} {_fault(lines)}")
    if len(lines) > most:
        raise Malformed(f"{message} has more than {most} fields (edge.head_fields)", 431)
    fields: Fields = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), name, value.strip(b" \t")))
    return fields


def _fault(lines: list[bytes]) -> str:
    """Says what is wrong with the first line that is no field."""
    for line in lines:
        name, colon, value = line.partition(b":")
        if line[:1] in (b" ", b"\t"):
            return "has a folded line (RFC 9112 5.2)"
        if b"\n" in line:
            return "has a bare LF (RFC 9112 2.2)"
        if b"\r" in line:
            return "has a bare CR (RFC 9112 2.2)"
        if not colon:
            return "has a line without a colon (RFC 9112 5)" if line else "has an empty line among its fields (RFC 9112 2.1)"
        if name[-1:] in (b" ", b"\t"):
            return "has white space before a colon (RFC 9112 5.1)"
        if not _NAME.match(name):
            return "has a field name that is no token (RFC 9110 5.1)"
        if b"\0" in value or _CONTROLS.search(value):
            return "has a control character in a field value (RFC 9110 5.5)"
    return "has a malformed field (RFC 9112 5)"


def _tokens(value: bytes) -> list[bytes]:
    return [part.strip(b" \t").lower() for part in value.split(b",") if part.strip(b" \t")]


def _values(fields: Fields, wanted: bytes) -> list[bytes]:
    return [value for name, _, value in fields if name == wanted]


def _request_framing(fields: Fields, minor: int) -> tuple[int, int]:
    """Returns a request's framing: one length, or chunked; never both, never several (RFC 9112, 6.3). Raises Malformed."""
    lengths, codings = _values(fields, b"content-length"), _values(fields, b"transfer-encoding")
    if codings:
        if lengths:
            raise Malformed("request has both Transfer-Encoding and Content-Length (RFC 9112 6.1)")
        if minor == 0:
            raise Malformed("request has Transfer-Encoding in HTTP/1.0 (RFC 9112 6.1)")
        names = [part.strip(b" \t").lower() for value in codings for part in value.split(b",")]
        if names[-1] != b"chunked" or names.count(b"chunked") > 1 or b"" in names:
            raise Malformed("request has a Transfer-Encoding whose last coding is not the one chunked (RFC 9112 6.3)")
        if len(names) > 1:
            raise Malformed("request has a transfer coding besides chunked (RFC 9112 6.1)", 501)
        return CHUNKED, 0
    if not lengths:
        return NO_BODY, 0
    if len(lengths) > 1:
        raise Malformed("request has several Content-Length fields (RFC 9112 6.3)")
    if not _DIGITS.match(lengths[0]):
        raise Malformed("request has a Content-Length that is not a number (RFC 9112 6.3)")
    return FIXED, int(lengths[0])


def _response_framing(fields: Fields, minor: int) -> tuple[int, int]:
    """Returns a response's framing: Transfer-Encoding wins over Content-Length, and equal lengths are one (RFC 9112, 6.3). Raises
    Malformed."""
    codings = _values(fields, b"transfer-encoding")
    if codings:
        if minor == 0:
            raise Malformed("response has Transfer-Encoding in HTTP/1.0 (RFC 9112 6.1)", 502)
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise Malformed("response has a Transfer-Encoding other than one chunked (RFC 9112 6.1)", 502)
        return CHUNKED, 0
    lengths = {part.strip(b" \t") for value in _values(fields, b"content-length") for part in value.split(b",")}
    if not lengths:
        return NO_BODY, 0
    if len(lengths) > 1:
        raise Malformed("response has two different Content-Length values (RFC 9112 6.3)", 502)
    (length,) = lengths
    if not _DIGITS.match(length):
        raise Malformed("response has a Content-Length that is not a number (RFC 9112 6.3)", 502)
    return FIXED, int(length)


def _listed(fields: Fields) -> tuple[frozenset[bytes], bool, bool, bool]:
    """Returns what Connection lists: names to drop, and whether it says close, keep-alive, upgrade."""
    options = [option for name, _, value in fields if name == b"connection" for option in _tokens(value)]
    drop = frozenset(options) - _UNLISTABLE
    return drop, b"close" in options, b"keep-alive" in options, b"upgrade" in options


def host_of(value: bytes) -> str:
    """Returns the host of an authority, in lower case. Raises Malformed."""
    if not _HOST.match(value):
        raise Malformed("request has a malformed Host (RFC 9112 3.2)")
    host = value if value.endswith(b"]") else value.rpartition(b":")[0] if b":" in value else value
    return host.decode("ascii").lower().rstrip(".")


def parse_request(line: bytes, block: bytes, most: int) -> RequestHead:
    """Parses a request's head: its request line, and its field block. Raises Malformed."""
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise Malformed("request has a malformed request line (RFC 9112 3)")
    method, target, minor = match[1], match[2], int(match[3])
    if method == b"CONNECT":
        raise Malformed("request has the method CONNECT, which only a tunnel to another host needs (RFC 9110 9.3.6)")
    fields = split_fields(block, most)
    hosts = _values(fields, b"host")
    if len(hosts) > 1 or (not hosts and minor == 1):
        raise Malformed("request has no Host, or several (RFC 9112 3.2)")
    authority, memorable = (hosts[0] if hosts else b""), minor == 1
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        absolute = _ABSOLUTE.match(target)
        if absolute is None:
            raise Malformed("request has a target in none of the forms (RFC 9112 3.2)")
        authority, memorable = absolute[1], False
        target = absolute[2] or b"/"
        if target.startswith(b"?"):
            target = b"/" + target
        fields = [f for f in fields if f[0] != b"host"]
        fields.insert(0, (b"host", b"Host", authority))
    head = RequestHead(method, target, minor, host_of(authority) if authority or minor else "")
    head.framing, head.length = _request_framing(fields, minor)
    read_fields(head, fields, minor)
    head.is_memorable &= memorable and head.framing == NO_BODY and not head.expects and head.upgrade is None and target != b"*"
    return head


def read_fields(head: RequestHead, fields: Fields, minor: int) -> None:
    """Takes out what is ours or of the connection; the rest becomes `head.block`. Raises Malformed.

    WebSocket is the only protocol that the service speaks after an upgrade: an offer of another is not passed on, nor one of
    HTTP/1.0 or in a request with content (RFC 9110, 7.8; RFC 6455, 4.1)."""
    drop, close, keep, upgrade = _listed(fields)
    head.keep_alive = not close and (minor == 1 or keep)
    head.nominates = not drop <= _CONNECTION_OPTIONS
    may_upgrade = upgrade and minor == 1 and head.method == b"GET" and head.framing == NO_BODY
    kept: list[bytes] = []
    for name, sent, value in fields:
        if name.startswith(_PROXY_PREFIX):
            _proxy_field(head, name, value)
            continue
        if name == b"upgrade":
            head.is_memorable = False  # what it asks for depends on the method, and what is remembered is used for any
            if may_upgrade and WEBSOCKET in _tokens(value):
                head.upgrade = WEBSOCKET
        elif name == b"expect":
            head.expects = True
        elif name == b"te":
            head.te_trailers = b"trailers" in _tokens(value)
        elif name == b"max-forwards":
            value = _one_hop_less(head, value)
        if name in _HOP_BY_HOP or name in drop or name in OWN_FIELDS:
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


def _one_hop_less(head: RequestHead, value: bytes) -> bytes:
    """Returns Max-Forwards as it goes on, for the methods that have it (RFC 9110, 7.6.2). Raises Malformed."""
    head.is_memorable = False  # what is remembered of a field block is used for any method
    if head.method not in (b"TRACE", b"OPTIONS"):
        return value
    if not _DIGITS.match(value):
        raise Malformed("request has a Max-Forwards that is not a number (RFC 9110 7.6.2)")
    head.max_forwards = int(value)
    return b"%d" % max(0, head.max_forwards - 1)


def _proxy_field(head: RequestHead, name: bytes, value: bytes) -> None:
    if name == b"x-aws-proxy-auth":
        if head.token is not None:
            raise Malformed("request has several X-aws-proxy-auth fields")
        head.token = value.decode("latin-1")
    elif name == b"x-aws-proxy-port":
        if head.port is not None:
            raise Malformed("request has several X-aws-proxy-port fields")
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


def find_end(data: bytes) -> tuple[int, int]:
    """Returns where an application's head ends, and where what follows it begins; (-1, 0) while its end has not come. A bare LF ends a
    line (RFC 9112, 2.2)."""
    match = _END_OF_HEAD.search(data)
    if match is None:
        return -1, 0
    end = match.start()
    return (end - 1 if data[end - 1 : end] == b"\r" else end), match.end()


def parse_response(raw: bytes, most: int, is_head: bool) -> ResponseHead:
    """Parses an application's response, from its status line to before the empty line. Raises Malformed, which its client sees as 502."""
    line, block = _split_line(raw)
    match = _STATUS_LINE.match(line)
    if match is None or not _BLOCK.match(block):
        line, block = _split_line(_CONTROLS.sub(b" ", _BARE_LF.sub(b"\r\n", raw)))
        match = _STATUS_LINE.match(line)
    if match is None:
        raise Malformed("response has a malformed status line (RFC 9112 4)", 502)
    minor, status = int(match[1]), int(match[2])
    fields = split_fields(block, most, "response")
    drop, close, keep, upgrade = _listed(fields)
    framing, length = _response_framing(fields, minor)
    dropped = _HOP_BY_HOP | OWN_FIELDS | drop
    if status < 200 or status == 204:
        dropped |= {b"content-length", b"transfer-encoding"}  # RFC 9110, 8.6; RFC 9112, 6.1
        close = close or framing == CHUNKED or length > 0  # the content that it may not have can come later, into another's answer
    if framing == CHUNKED:
        close = close or any(name == b"content-length" for name, _, _ in fields)  # RFC 9112, 6.1
        dropped |= {b"content-length"}
    kept: list[bytes] = []
    idle_seconds = -1.0
    for name, sent, value in fields:
        if name in dropped:
            if name == b"keep-alive":
                timeout = _TIMEOUT.search(value)
                idle_seconds = float(timeout[1]) if timeout is not None else idle_seconds
            continue
        if name == b"content-length":
            dropped |= {name}  # written once, however often it was said
            value = b"%d" % length
        kept.append(sent + b": " + value)
    if status < 200 or status in (204, 304) or is_head:
        framing, length = NO_BODY, 0
    elif framing == NO_BODY:
        framing = UNTIL_CLOSE
    switched = next((value for name, _, value in fields if name == b"upgrade" and upgrade), None) if status == 101 else None
    names = frozenset(name for name, _, _ in fields)
    return ResponseHead(
        status, framing, length,
        keep_alive=not close and (minor == 1 or keep) and framing != UNTIL_CLOSE,
        status_line=b"HTTP/1.1" + line[8:] + (b" " if len(line) == 12 else b""),  # RFC 9112, 4: also where no reason follows
        block=b"\r\n" + b"\r\n".join(kept) if kept else b"",
        upgrade=switched,
        names=names,
        is_dated=status < 200 or b"date" in names,
        idle_seconds=idle_seconds,
    )  # fmt: skip


def _split_line(raw: bytes) -> tuple[bytes, bytes]:
    at = raw.find(b"\r\n")
    return (raw, b"") if at < 0 else (raw[:at], raw[at:])
