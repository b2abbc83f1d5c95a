"""Heads that come again need not be parsed and admitted again.

Clients repeat their heads to the byte, but for a trace id, a path, a cookie. A request is looked for as a whole, then by its field
block, then by those of its fields alone that decide anything: the rest is checked, and goes on as it is. An entry is used only for a
request of HTTP/1.1 in origin form, or of HTTP/2 (an absolute form would override Host), never for one with a body, Expect or Upgrade,
and only while the token has not expired, the key set is the one that it was verified with, and the route is the very one that it was
admitted to (Exchange.try_cached): anything less would be a way around the token.

Memory is bounded by bytes. A head is kept when it comes the second time, so that those that differ each time displace nothing; and
what is used outlives what is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from gateway.messages import Route
from gateway.tokens import Checker

from ..wire import http2_head
from ..wire.http1_head import DECISIVE, DECISIVE_PREFIX, FIELD_BLOCK, RequestHead, ResponseHead, parse_request
from ..wire.http2_frames import Field
from .keys import FieldList, Key
from .routes import Account

_MIB: Final = 1 << 20
_ENTRY_MAX_BYTES: Final = 16 << 10
_OVERHEAD_BYTES: Final = 400  # of an entry, besides what it was made for
_SEEN_MOST: Final = 4096
_SAFE: Final = (b"GET ", b"HEAD ", b"OPTIONS ")  # RFC 9110, 9.2.1
_FAST_METHODS: Final = frozenset((b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"))
_ORIGIN_FORM = re.compile(rb"/[\x21-\x7e\x80-\xff]*\Z").match
_REQUEST_LINE = re.compile(rb"(?:GET|POST|PUT|DELETE|HEAD|OPTIONS|PATCH) /[\x21-\x7e\x80-\xff]* HTTP/1\.1\Z").match
_PSEUDO: Final = ((b":method", b"GET", False), (b":scheme", b"https", False), (b":path", b"/", False))
# What a name means for the cache.
_PASSES: Final = 1
_DECIDES: Final = 2
_COOKIE: Final = 3  # of HTTP/2, whose clients may send it in pieces (RFC 9113, 8.2.3)


class Cached:
    """An entry; `size` says what it was made for, in bytes, and the cache's bound counts it."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class CachedAdmission(Cached):
    """Says that the request of a field block may be forwarded at once; `block` is what becomes of it."""

    __slots__ = ("account", "block", "checker", "expires", "host", "keep_alive", "key", "route")

    def __init__(
        self, host: str, route: Route, checker: Checker, expires: float, key: Key, account: Account, block: bytes, keep_alive: bool
    ) -> None:
        super().__init__(2 * len(block))
        self.host = host
        self.route = route
        self.checker = checker
        self.expires = expires
        self.key = key
        self.account = account
        self.block = block
        self.keep_alive = keep_alive

    def with_block(self, block: bytes) -> CachedAdmission:
        return CachedAdmission(self.host, self.route, self.checker, self.expires, self.key, self.account, block, self.keep_alive)


class CachedRequest(Cached):
    """Says of a request's whole head how it was admitted, and what becomes of it, up to our own field."""

    __slots__ = ("admission", "is_head", "is_new", "is_safe", "rewritten")

    def __init__(self, admission: CachedAdmission, line: bytes, is_new: bool = False) -> None:
        self.admission = admission
        self.is_new = is_new  # one of its fields never came before: the whole has not, and perhaps will not again
        self.rewritten = rewritten = b"%b%b\r\nx-amzn-requestid: " % (line, admission.block)
        self.is_head = line.startswith(b"HEAD ")
        self.is_safe = line.startswith(_SAFE)
        super().__init__(2 * len(rewritten))


class CachedResponse(Cached):
    __slots__ = ("head",)

    def __init__(self, head: ResponseHead) -> None:
        super().__init__(3 * len(head.block))  # as it came, as it goes on, and for HTTP/2
        self.head = head


class CachedField(Cached):
    """Says of a field line, or a field of HTTP/2, that was checked, what it means for the cache, and how it goes on."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: int, text: bytes) -> None:
        super().__init__(2 * len(text))
        self.kind = kind
        self.text = text


K = TypeVar("K")
V = TypeVar("V", bound=Cached)


class Cache(Generic[K, V]):
    """Keeps two generations: when the younger one has half of the bytes, it becomes the older one, and what that still had is forgotten.
    What is used in the older one returns to the younger one. So a hit costs what a dictionary costs, and nothing is ever searched for the
    least recently used."""

    __slots__ = ("_bytes", "_half", "_older", "_seen", "_seen_before", "_younger")

    def __init__(self, most_bytes: int) -> None:
        self._half = most_bytes // 2
        self._bytes = 0  # of the younger generation
        self._younger: dict[K, V] = {}
        self._older: dict[K, V] = {}
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()

    def get(self, key: K) -> V | None:
        value = self._younger.get(key)
        if value is None and self._older:
            value = self._older.pop(key, None)
            if value is not None:
                self.keep(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Keeps what comes again; of what came once only the hash is kept."""
        if self.note(key):
            self.keep(key, value)

    def note(self, key: K) -> bool:
        """Notes that the key came; returns whether it had come before, not long ago, or is here, and may be replaced."""
        if key in self._younger or key in self._older:
            return True
        mark = hash(key)
        if mark in self._seen or mark in self._seen_before:
            return True
        if len(self._seen) >= _SEEN_MOST:
            self._seen_before = self._seen
            self._seen = set()
        self._seen.add(mark)
        return False

    def keep(self, key: K, value: V) -> None:
        size = value.size
        if size > _ENTRY_MAX_BYTES:
            return
        replaced = self._younger.get(key)
        if replaced is not None:
            self._bytes -= replaced.size + _OVERHEAD_BYTES
        self._older.pop(key, None)
        self._bytes += size + _OVERHEAD_BYTES
        self._younger[key] = value
        if self._bytes > self._half:
            self._older = self._younger
            self._younger = {}
            self._bytes = 0

    def clear(self) -> None:
        self._younger = {}
        self._older = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)


class HeadCache:
    """Holds the caches of a worker. `rewrite(block, version)` says what becomes of the fields of intermediaries (Via, Forwarded,
    X-Forwarded-*), where they do not go on as they are."""

    __slots__ = (
        "_decisive", "_decisive2", "_fields", "_fields_most", "_head_bytes", "_lines", "_rewrite", "blocks", "heads", "lists", "responses",
    )  # fmt: skip

    def __init__(self, head_bytes: int, fields_most: int, rewrite: Callable[[bytes, bytes], bytes] | None = None) -> None:
        self._head_bytes, self._fields_most, self._rewrite = head_bytes, fields_most, rewrite
        self.heads: Cache[bytes, CachedRequest] = Cache(4 * _MIB)  # of HTTP/1.1, whole
        self.blocks: Cache[bytes, CachedAdmission] = Cache(4 * _MIB)  # of HTTP/1.1: heads without their first lines
        self.lists: Cache[FieldList, CachedRequest] = Cache(4 * _MIB)  # of HTTP/2, whole
        self.responses: Cache[bytes, CachedResponse] = Cache(2 * _MIB)
        self._decisive: Cache[tuple[bytes, ...], CachedAdmission] = Cache(_MIB)
        self._decisive2: Cache[FieldList, CachedAdmission] = Cache(_MIB)
        self._lines: Cache[bytes, CachedField] = Cache(_MIB)
        self._fields: Cache[Field, CachedField] = Cache(_MIB)

    def clear(self) -> None:
        """Forgets all admissions, because the keys or the routes are others. What applications answer stays."""
        self.heads.clear()
        self.blocks.clear()
        self.lists.clear()
        self._decisive.clear()
        self._decisive2.clear()

    # ---- HTTP/1.1 ----

    def of_parts(self, line: bytes, block: bytes) -> CachedRequest | None:
        """Returns a request whose head did not come before as a whole, but whose field block did, or the decisive fields."""
        if _REQUEST_LINE(line) is None:
            return None
        admission = self.blocks.get(block)
        if admission is not None:
            return CachedRequest(admission, line)
        split = self._split_block(block)
        if split is None:
            return None
        decisive, others, is_new = split
        admission = self._decisive.get(decisive)
        if admission is None:
            return None
        admission = admission.with_block(admission.block + others)
        if not is_new:
            self.blocks.put(block, admission)
        return CachedRequest(admission, line, is_new)

    def remember_block(self, block: bytes, admission: CachedAdmission) -> None:
        self.blocks.put(block, admission)
        split = self._split_block(block)
        if split is None or not self._decisive.note(split[0]):
            return
        head = parse_request(b"GET / HTTP/1.1", b"\r\n" + b"\r\n".join(split[0]), self._fields_most)
        if _is_part_of(head, admission):
            self._decisive.keep(split[0], admission.with_block(self._rewritten(head.block, b"1.1")))

    def _split_block(self, block: bytes) -> tuple[tuple[bytes, ...], bytes, bool] | None:
        """Returns the decisive lines as they came, the others as they go on, and whether one of them never came before; None where the
        parser has to look at them."""
        lines = block.split(b"\r\n")
        if lines[0] or len(lines) - 1 > self._fields_most:
            return None
        decisive: list[bytes] = []
        others, is_new = [b""], False
        for line in lines[1:]:
            field = self._lines.get(line)
            if field is None:
                field = self._read_line(line)
                if field is None:
                    return None
                is_new = True
            if field.kind == _DECIDES:
                decisive.append(line)
            else:
                others.append(field.text)
        return tuple(decisive), b"\r\n".join(others), is_new

    def _read_line(self, line: bytes) -> CachedField | None:
        if FIELD_BLOCK(b"\r\n" + line) is None:
            return None
        name, _, value = line.partition(b":")
        field = CachedField(self._kind(name.lower()), b"%b: %b" % (name, value.strip(b" \t")))
        self._lines.keep(line, field)
        return field

    # ---- HTTP/2 ----

    def of_list(self, fields: FieldList) -> CachedRequest | None:
        """Returns a request without a body that came before, or whose decisive fields did."""
        found = self.lists.get(fields)
        if found is not None:
            return found
        split = self._split_list(fields)
        if split is None:
            return None
        line, decisive, others, is_new = split
        admission = self._decisive2.get(decisive)
        if admission is None:
            return None
        found = CachedRequest(admission.with_block(admission.block + others), line, is_new)
        if not is_new:
            self.lists.put(fields, found)
        return found

    def remember_list(self, fields: FieldList, line: bytes, admission: CachedAdmission) -> None:
        self.lists.put(fields, CachedRequest(admission, line))
        split = self._split_list(fields)
        if split is None or not self._decisive2.note(split[1]):
            return
        head = http2_head.parse_request([*_PSEUDO, *split[1]], True, self._fields_most)
        if _is_part_of(head, admission):
            self._decisive2.keep(split[1], admission.with_block(self._rewritten(head.block, b"2")))

    def _split_list(self, fields: FieldList) -> tuple[bytes, FieldList, bytes, bool] | None:
        """Returns the request line, the decisive fields, the others as they go on, and whether one of them never came before; None where
        the parser has to look at them."""
        if len(fields) > self._fields_most or http2_head.size_of(list(fields)) > self._head_bytes:
            return None
        line, decisive, at = _request_line(fields)
        if not line:
            return None
        others, is_new = [b""], False
        cookies: list[bytes] = []
        for field in fields[at:]:
            known = self._fields.get(field)
            if known is None:
                known = self._read_field(field)
                if known is None:
                    return None
                is_new = True
            if known.kind == _DECIDES:
                decisive.append(field)
            elif known.kind == _PASSES:
                others.append(known.text)
            else:
                cookies.append(known.text)
        if cookies:
            others.append(b"cookie: " + b"; ".join(cookies))
        return line, tuple(decisive), b"\r\n".join(others), is_new

    def _read_field(self, field: Field) -> CachedField | None:
        name, value, _ = field
        if not http2_head.is_field_name(name) or not http2_head.are_values([value]):
            return None
        checked = CachedField(_COOKIE, value) if name == b"cookie" else CachedField(self._kind(name), b"%b: %b" % (name, value))
        self._fields.keep(field, checked)
        return checked

    # ---- both ----

    def _kind(self, name: bytes) -> int:
        if name in DECISIVE or name.startswith(DECISIVE_PREFIX) or (self._rewrite is not None and _is_hop(name)):
            return _DECIDES
        return _PASSES

    def _rewritten(self, block: bytes, version: bytes) -> bytes:
        return block if self._rewrite is None else self._rewrite(block, version)


def _request_line(fields: FieldList) -> tuple[bytes, list[Field], int]:
    """Returns the line that the pseudo-header fields become, empty where the parser has to look at them; the decisive field among them;
    and their number."""
    method: bytes | None = None
    scheme: bytes | None = None
    path: bytes | None = None
    decisive: list[Field] = []
    for field in fields:
        name, value, _ = field
        if name[:1] != b":":
            break
        if name == b":method" and method is None:
            method = value
        elif name == b":path" and path is None:
            path = value
        elif name == b":scheme" and scheme is None:
            scheme = value
        elif name == b":authority" and not decisive:
            decisive.append(field)
        else:
            return b"", decisive, 0
    at = len(decisive) + (method is not None) + (path is not None) + (scheme is not None)
    if method not in _FAST_METHODS or path is None or _ORIGIN_FORM(path) is None or scheme not in (b"https", b"http"):
        return b"", decisive, at
    return b"%b %b HTTP/1.1" % (method, path), decisive, at


def _is_part_of(head: RequestHead, admission: CachedAdmission) -> bool:
    """Whether a head of decisive fields alone means what the whole head did, whatever other fields stand beside them. One whose
    Connection lists fields decides about those, too (RFC 9110, 7.6.1)."""
    return head.is_memorable and not head.nominates and head.host == admission.host and head.keep_alive == admission.keep_alive


def _is_hop(name: bytes) -> bool:
    name = name.replace(b"_", b"-")  # as client/forwarding.py reads it
    return name in (b"via", b"forwarded") or name.startswith(b"x-forwarded-")
