"""Cached heads: bounded by bytes, kept by those that come again, and never another meaning than the parser's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig, response
from h2_client import Judge
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.edge.client import exchange
from gateway.edge.policy.head_cache import Cache, Cached, CachedAdmission, HeadCache
from gateway.edge.policy.routes import Account
from gateway.edge.wire import http2_head
from gateway.edge.wire.http1_head import Malformed, RequestHead, parse_request, split_block
from gateway.messages import Route
from gateway.tokens import Checker

MOST_BYTES = 100_000
ROUTE = Route("h", "s1", 1, "open")
CHECKER = Checker([])


def filled(cache: Cache[Any, Cached], numbers: range, size: int = 1000) -> None:
    for number in numbers:
        for _ in range(2):
            cache.put(b"%d" % number, Cached(size))


# ---- the cache ----


def test_what_comes_once_is_not_kept() -> None:
    cache: Cache[bytes, Cached] = Cache(MOST_BYTES)
    cache.put(b"x", Cached(10))
    assert cache.get(b"x") is None and len(cache) == 0
    second = Cached(10)
    cache.put(b"x", second)
    assert cache.get(b"x") is second
    third = Cached(10)
    cache.put(b"x", third)
    assert cache.get(b"x") is third and len(cache) == 1


def test_bytes_are_bounded_however_many_and_large() -> None:
    cache: Cache[bytes, Cached] = Cache(MOST_BYTES)
    for size in (0, 10, 1000, 16_000):
        filled(cache, range(2000), size)
        held = sum(one.size for one in [*cache._younger.values(), *cache._older.values()])
        assert 0 < held + 400 * len(cache) <= MOST_BYTES + 2 * 16_400
    cache.clear()
    assert len(cache) == 0


def test_an_entry_is_bounded() -> None:
    cache: Cache[bytes, Cached] = Cache(10 << 20)
    filled(cache, range(1), 17 << 10)
    assert len(cache) == 0


def test_what_is_used_outlives_a_flood_and_what_is_not_used_goes() -> None:
    cache: Cache[bytes, Cached] = Cache(MOST_BYTES)
    filled(cache, range(2))
    for number in range(2, 1000):
        filled(cache, range(number, number + 1))
        assert cache.get(b"0") is not None
    assert cache.get(b"1") is None


def test_keys_that_never_come_again_displace_nothing_and_cost_little() -> None:
    cache: Cache[bytes, Cached] = Cache(MOST_BYTES)
    filled(cache, range(10))
    for number in range(100_000):
        cache.put(b"once %d" % number, Cached(1000))
    assert all(cache.get(b"%d" % number) is not None for number in range(10)) and len(cache) == 10
    assert len(cache._seen) + len(cache._seen_before) <= 8192


def test_replacing_an_entry_counts_it_once() -> None:
    cache: Cache[bytes, Cached] = Cache(MOST_BYTES)
    for _ in range(1000):
        filled(cache, range(1))
    assert cache._bytes == 1400 and cache.get(b"0") is not None


# ---- the same meaning as the parser's ----


def admission(head: RequestHead) -> CachedAdmission:
    return CachedAdmission(head.host, ROUTE, CHECKER, 2e9, ("s1", 1, 8080), Account(), head.block, head.keep_alive)


def meaning(head: RequestHead) -> tuple[Any, ...]:
    return head.host, head.token, head.port, head.keep_alive, head.force_h2, head.te_trailers, head.framing, head.upgrade, head.expects


def per_name(block: bytes) -> dict[bytes, list[bytes]]:
    """Values by name: the order of fields with different names means nothing (RFC 9110, 5.3)."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in split_block(block):
        found.setdefault(name, []).append(value)
    return found


DECISIVE = [
    b"Host: a.example", b"Host: b.example", b"host: a.example ", b"X-aws-proxy-auth: t1", b"X-aws-proxy-auth: t2", b"x-AWS-proxy-port: 80",
    b"X-aws-proxy-port: 81", b"X-aws-proxy-other: 1", b"X-aws-proxy-force-h2: true", b"Connection: close", b"Connection: keep-alive",
    b"Connection: X-Trace", b"Connection: Cookie, close", b"TE: trailers", b"Keep-Alive: 5", b"Content-Length: 0", b"Content-Length: 5",
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade: websocket", b"Max-Forwards: 3", b"x-amzn-requestid: mine",
    b"Sec-WebSocket-Protocol: lambda-microvms, lambda-microvms.authentication.t3, chat", b"Proxy-Connection: close",
]  # fmt: skip
OTHERS = [
    b"X-Trace: 1", b"X-Trace: 2", b"traceparent: 00-1", b"traceparent:00-2", b"x-request-id:  3\t", b"Cookie: a=1", b"Cookie: b=2", b"A:",
    b"Accept: */*", b"Via: 1.1 x", b"X-Forwarded-For: 192.0.2.1", b"Origin: null", b"Authorization: Bearer x", b"Cache-Control: no-cache",
]  # fmt: skip
BROKEN = [b" folded", b"Bad Name: x", b"No-Colon", b"Nul: \0", b"Cr: a\rb", b"Space : x", b": x", b"Host : a.example"]
LINES = st.lists(st.sampled_from(DECISIVE + OTHERS + BROKEN), max_size=8)
BASE = [b"Host: a.example", b"X-aws-proxy-auth: t1"]


def block_of(lines: list[bytes]) -> bytes:
    return b"".join(b"\r\n" + line for line in lines)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), LINES), min_size=2, max_size=8))
@example([(True, [b"X-Trace: 1"]), (True, [b"X-Trace: 1"]), (True, [b"X-Trace: 2"]), (True, [b"X-Trace: 2", b" folded"])])
@example([(True, [b"Connection: X-Trace", b"X-Trace: 1"])] * 3 + [(True, [b"Connection: X-Trace", b"X-Trace: 2"])])
def test_a_block_found_means_what_the_parser_says(requests: list[tuple[bool, list[bytes]]]) -> None:
    """Whatever was remembered before, and in whatever order fields come."""
    cache = HeadCache(32 << 10, 10)
    admitted: dict[tuple[Any, ...], CachedAdmission] = {}
    for with_base, more in requests:
        block = block_of([*BASE, *more] if with_base else more)
        line = b"GET /x HTTP/1.1"
        found = cache.of_parts(line, block)
        try:
            head = parse_request(line, block, 10)
        except Malformed:
            assert found is None
            continue
        if found is not None:
            assert head.is_memorable and found.admission is not None
            assert found.admission.account is admitted[meaning(head)].account
            assert (found.admission.host, found.admission.keep_alive) == (head.host, head.keep_alive)
            assert per_name(found.admission.block) == per_name(head.block)
            assert found.rewritten == line + found.admission.block + b"\r\nx-amzn-requestid: "
        if head.is_memorable:
            kept = admitted.setdefault(meaning(head), admission(head))
            cache.remember_block(block, kept.with_block(head.block))


@pytest.mark.parametrize("more", [*DECISIVE, *BROKEN])
def test_a_decisive_field_beside_fields_that_are_known_is_looked_at(more: bytes) -> None:
    cache, line = HeadCache(32 << 10, 100), b"GET / HTTP/1.1"
    for _ in range(3):
        cache.remember_block(block_of(BASE), admission(parse_request(line, block_of(BASE), 100)))
    assert cache.of_parts(line, block_of([*BASE, b"X-Trace: 1"])) is not None
    assert cache.of_parts(line, block_of([*BASE, more])) is None
    assert cache.of_parts(line, block_of([more, *BASE])) is None


FIELDS2 = [
    (b":authority", b"a.example"), (b":authority", b"b.example"), (b"host", b"a.example"), (b"host", b"A.example"),
    (b"x-aws-proxy-auth", b"t1"), (b"x-aws-proxy-auth", b"t2"), (b"x-aws-proxy-port", b"80"), (b"te", b"trailers"), (b"te", b"gzip"),
    (b"content-length", b"0"), (b"content-length", b"5"), (b"expect", b"100-continue"), (b"x-amzn-requestid", b"mine"),
    (b"x-trace", b"1"), (b"x-trace", b"2"), (b"traceparent", b"00"), (b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"cookie", b""),
    (b"accept", b"*/*"), (b"X-Upper", b"1"), (b"connection", b"close"), (b"bad name", b"1"), (b"x-bad", b"a\nb"), (b"x-bad", b" a"),
    (b"x-bad", b"a\rb"), (b"x-aws-proxy-port", b"80\nx"), (b"", b""), (b":path", b"/y"), (b":method", b"GET"), (b":status", b"200"),
]  # fmt: skip
PSEUDO2 = st.permutations([(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/x")])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PSEUDO2, st.integers(0, 2), st.lists(st.sampled_from(FIELDS2), max_size=8)), min_size=2, max_size=8))
def test_a_list_found_means_what_the_parser_says(requests: list[tuple[list[tuple[bytes, bytes]], int, list[tuple[bytes, bytes]]]]) -> None:
    cache = HeadCache(32 << 10, 14)
    admitted: dict[tuple[Any, ...], CachedAdmission] = {}
    for pseudo, base, more in requests:
        pairs = [*pseudo, *([(b":authority", b"a.example"), (b"x-aws-proxy-auth", b"t1")][:base]), *more]
        fields = tuple((name, value, False) for name, value in pairs)
        found = cache.of_list(fields)
        try:
            head = http2_head.parse_request(list(fields), True, 10)
        except Malformed:
            assert found is None
            continue
        if found is not None:
            assert head.is_memorable and found.admission.account is admitted[meaning(head)].account
            assert per_name(found.admission.block) == per_name(head.block)
            assert found.rewritten.startswith(b"GET /x HTTP/1.1\r\n")
        if head.is_memorable:
            kept = admitted.setdefault(meaning(head), admission(head))
            cache.remember_list(fields, b"%b %b HTTP/1.1" % (head.method, head.target), kept.with_block(head.block))


@pytest.mark.parametrize("more", [one for one in FIELDS2 if one[0] not in (b"x-trace", b"traceparent", b"cookie", b"accept")])
def test_a_decisive_field_of_a_list_beside_fields_that_are_known_is_looked_at(more: tuple[bytes, bytes]) -> None:
    def fields(*more: tuple[bytes, bytes]) -> tuple[tuple[bytes, bytes, bool], ...]:
        pairs = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":path", b"/x"),
            (b":authority", b"a.example"),
            (b"x-aws-proxy-auth", b"t1"),
        ]
        return tuple((name, value, False) for name, value in [*pairs, *more])

    cache = HeadCache(32 << 10, 100)
    for _ in range(3):
        head = http2_head.parse_request(list(fields()), True, 100)
        cache.remember_list(fields(), b"GET /x HTTP/1.1", admission(head))
    assert cache.of_list(fields((b"x-trace", b"1"))) is not None
    assert cache.of_list(fields(more)) is None


def test_more_fields_or_bytes_than_the_parser_takes_are_not_found() -> None:
    cache = HeadCache(300, 5)
    for _ in range(3):
        head = parse_request(b"GET / HTTP/1.1", block_of(BASE), 5)
        cache.remember_block(block_of(BASE), admission(head))
    assert cache.of_parts(b"GET / HTTP/1.1", block_of([*BASE, b"A: 1", b"B: 2", b"C: 3"])) is not None
    assert cache.of_parts(b"GET / HTTP/1.1", block_of([*BASE, b"A: 1", b"B: 2", b"C: 3", b"D: 4"])) is None


@pytest.mark.parametrize(
    "line", [b"GET http://other.example/ HTTP/1.1", b"GET / HTTP/1.0", b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /\x01 HTTP/1.1", b"TRACE / HTTP/1.1"]
)  # fmt: skip
def test_other_request_lines_are_the_parsers(line: bytes) -> None:
    cache = HeadCache(32 << 10, 100)
    for _ in range(3):
        cache.remember_block(block_of(BASE), admission(parse_request(b"GET / HTTP/1.1", block_of(BASE), 100)))
    assert cache.of_parts(line, block_of(BASE)) is None and cache.of_parts(b"HEAD /y HTTP/1.1", block_of(BASE)) is not None


def test_fields_of_intermediaries_are_rewritten_where_a_setting_wants_that() -> None:
    def rewrite(block: bytes, version: bytes) -> bytes:
        kept = [line for line in block.split(b"\r\n")[1:] if not line.lower().startswith(b"x-forwarded-")]
        return block_of([*kept, b"X-Forwarded-Host: ours", b"Via: %b ours" % version])

    cache = HeadCache(32 << 10, 100, rewrite)
    spoofed = [*BASE, b"X-Forwarded-For: 192.0.2.7", b"Via: 1.1 theirs"]
    for number in range(5):
        block = block_of([*spoofed, b"X-Trace: %d" % number])
        found = cache.of_parts(b"GET / HTTP/1.1", block)
        if number > 1:
            assert found is not None
            fields = per_name(found.admission.block)
            assert fields[b"via"] == [b"1.1 theirs", b"1.1 ours"] and fields[b"x-forwarded-host"] == [b"ours"]
            assert b"x-forwarded-for" not in fields and fields[b"x-trace"] == [b"%d" % number]
        head = parse_request(b"GET / HTTP/1.1", block, 100)
        head.block = rewrite(head.block, b"1.1")
        cache.remember_block(block, admission(head))


# ---- a worker ----


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    yield one
    await one.stop()


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Targets of the requests that were parsed and decided anew."""
    found: list[bytes] = []
    real = exchange.Exchange.decide

    def decide(self: exchange.Exchange, head: RequestHead, now: float) -> None:
        found.append(head.target)
        real(self, head, now)

    monkeypatch.setattr(exchange.Exchange, "decide", decide)
    return found


VARYING = ["traceparent: 00-{}-01", "X-Request-Id: {}", "X-Amzn-Trace-Id: Root={}", "Cookie: visit={}", "X-Never-Heard-Of: {}"]


@pytest.mark.parametrize("field", VARYING)
@pytest.mark.parametrize("http2", [False, True])
async def test_a_field_that_differs_each_time_neither_misses_nor_displaces(rig: Rig, decided: list[bytes], field: str, http2: bool) -> None:
    await rig.start(http2=http2)
    if http2:
        client = Judge(*await rig.open())
        base = [
            (":method", "GET"), (":scheme", "https"), (":authority", HOST), ("x-aws-proxy-auth", rig.token),
            ("x-aws-proxy-port", str(rig.app_port)),
        ]  # fmt: skip
        name, _, value = field.partition(": ")
    else:
        reader, writer = await rig.open()

    async def ask(number: int, varying: bool) -> None:
        if http2:
            extra = [(name.lower(), value.format(number))] if varying else []
            assert (await client.answer(client.ask([*base[:3], (":path", f"/{varying}"), *base[3:], *extra]))).status == 200
        else:
            writer.write(rig.request(f"/{varying}", *([field.format(number)] if varying else [])))
            assert (await response(reader))[0] == 200

    for number in range(5):
        await ask(number, False)
    caches = [rig.worker.heads.heads, rig.worker.heads.blocks, rig.worker.heads.lists]
    before, known = [len(one) for one in caches], len(decided)
    for number in range(300):
        await ask(number, True)
    assert len(decided) == known and [len(one) for one in caches] == before
    last = field.format(299).partition(": ")
    assert f"\r\n{last[0].lower()}: {last[2]}".encode() in rig.received.replace(last[0].encode(), last[0].lower().encode())
    await ask(0, False)
    assert len(decided) == known
    (client if http2 else writer).writer.close() if http2 else writer.close()


async def test_a_decisive_field_is_not_taken_from_another_request(rig: Rig) -> None:
    """After the same fields with another trace have been admitted: token, port, expiry and route are this request's."""
    await rig.start()
    reader, writer = await rig.open()

    async def ask(number: int, **changes: Any) -> int:
        data = rig.request("/", f"traceparent: {number}", **changes)
        if changes.get("port"):
            data = data.replace(b"port: %d" % rig.app_port, changes["port"])
        writer.write(data)
        return (await response(reader))[0]

    assert [await ask(number) for number in range(5)] == [200] * 5
    assert await ask(6, token=rig.minter.mint("s2", [(1, 65535)], 600)) == 403
    assert await ask(7, token=rig.minter.mint("s1", [(1, 1)], 600)) == 403
    assert await ask(8, host="other.localhost") == 403
    assert await ask(9) == 200
    await rig.control.change("refuse")
    assert await ask(10) == 502
    await rig.control.change("open", incarnation=2)
    assert await ask(11) == 200
    rig.now += 601
    assert await ask(12) == 403
    writer.close()


async def test_one_clients_large_heads_cost_bounded_memory_and_leave_the_others_theirs(rig: Rig, decided: list[bytes]) -> None:
    await rig.start()
    reader, writer = await rig.open()
    for _ in range(5):
        writer.write(rig.request("/small"))
        await response(reader)
    known = decided.count(b"/small")
    for number in range(180):  # in all more than the bound below
        data = rig.request("/large", f"X-Filler: {number}" + "x" * 30_000, "TE: trailers", f"X-aws-proxy-{number % 50}: 1")
        for _ in range(2):
            writer.write(data)
            await response(reader)
    heads = rig.worker.heads
    for cache in (heads.heads, heads.blocks, heads.lists, heads._decisive, heads._decisive2):
        entries: list[Any] = [*cache._younger.items(), *cache._older.items()]
        assert sum(sys.getsizeof(key) + value.size for key, value in entries) < 5 << 20
        assert all(sys.getsizeof(key) < 17 << 10 for key, _ in entries if isinstance(key, bytes))
    writer.write(rig.request("/small"))
    await response(reader)
    assert decided.count(b"/small") == known
    writer.close()


async def test_an_application_whose_answers_differ_each_time_displaces_no_cached_response(rig: Rig) -> None:
    await rig.start()
    count = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while True:
            target = (await rig.head(reader)).split(b" ")[1]
            count += 1
            writer.write(b"HTTP/1.1 200 OK\r\nX-Id: %d\r\nContent-Length: 0\r\n\r\n" % (0 if target == b"/same" else count))

    rig.script = script
    reader, writer = await rig.open()
    for target in ["/same"] * 5 + ["/other"] * 300:
        writer.write(rig.request(target))
        assert (await response(reader))[0] == 200
    assert len(rig.worker.heads.responses) == 1
    writer.close()


async def test_a_block_of_indexed_fields_is_found_again_after_a_sleep(rig: Rig, decided: list[bytes]) -> None:
    """What a connection knows of its own blocks is no older than what the worker knows."""
    await rig.start(http2=True)
    client = Judge(*await rig.open())
    fields = [
        (":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/"), ("x-aws-proxy-auth", rig.token),
        ("x-aws-proxy-port", str(rig.app_port)),
    ]  # fmt: skip
    for _ in range(6):
        assert (await client.answer(client.ask(fields))).status == 200
    await rig.control.change("open", incarnation=2)
    for _ in range(3):
        assert (await client.answer(client.ask(fields))).status == 200
    known = len(decided)
    for _ in range(5):
        assert (await client.answer(client.ask(fields))).status == 200
    assert len(decided) == known
    client.writer.close()
