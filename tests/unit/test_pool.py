"""A pool of connections: who gets one, who may make one, and in which order. No socket is opened; the clock is the test's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from gateway.config import Edge
from gateway.edge.origin import pool as pools
from gateway.edge.origin.http1 import Origin
from gateway.edge.origin.http2 import Http2Origin
from gateway.edge.origin.pool import CONNECTIONS_FIRST, CONNECTIONS_MOST, PLAIN, SHARED_MOST, TLS, TLS_PROBING, Pool, Slot, Waiter
from gateway.edge.policy.head_cache import Cache
from gateway.edge.sides import OriginContext
from gateway.edge.wire.http1_head import CHUNKED, NO_BODY, RequestHead

KEY = ("s1", 1, 8080)


def get(method: bytes = b"GET", framing: int = NO_BODY, h2: bool = False, upgrade: bytes | None = None) -> RequestHead:
    return RequestHead(method, b"/", 1, "host", framing, force_h2=h2, upgrade=upgrade)


class Transport:
    """An open connection on which nothing comes."""

    def __init__(self) -> None:
        self.closed = self.paused = False
        self.sockets = socket.socketpair()

    def get_extra_info(self, name: str) -> socket.socket:
        return self.sockets[0]

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True
        for one in self.sockets:
            one.close()

    abort = close

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_reading(self) -> bool:
        return not self.paused

    def set_write_buffer_limits(self, high: int) -> None: ...

    def write(self, data: bytes) -> None: ...


class Rig:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = 100.0
        self.context = OriginContext(Edge(), lambda: self.now, Cache(1 << 16), lambda connection: None, lambda connection: None)
        self.pool = Pool(KEY)
        self.transports: list[Transport] = []

    def transport(self) -> Any:
        made = Transport()
        self.transports.append(made)
        return made

    def close(self) -> None:
        for one in self.transports:
            one.close()

    def acquire(self, head: RequestHead | None = None, fresh: bool = False) -> Any:
        head = head or get()
        return None if self.pool.must_wait(head) else self.pool.acquire(head, fresh, self.now)

    def connect(self, slot: Slot) -> Origin:
        origin = Origin(self.context, self.pool, is_secure=False)
        origin.connection_made(self.transport())
        origin.has_answered = True
        self.pool.add(slot, origin, self.now)
        return origin

    def connected(self) -> Origin:
        slot = self.acquire(fresh=True)
        assert isinstance(slot, Slot)
        return self.connect(slot)

    def fill(self) -> None:
        """All other places are taken, too."""
        self.pool.allowed = CONNECTIONS_MOST
        self.pool.connecting = CONNECTIONS_MOST - len(self.pool.open)

    def idle(self) -> Origin:
        origin = self.connected()
        self.pool.release(origin, self.now)
        return origin

    def wait(self, head: RequestHead | None = None) -> Waiter:
        waiter = Waiter(head or get(), False, self.loop.create_future())
        self.pool.wait(waiter)
        return waiter

    def lose(self, origin: Origin) -> None:
        origin.connection_lost(None)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig(asyncio.get_running_loop())
    yield made
    made.close()


async def test_the_connection_used_last_is_used_next(rig: Rig) -> None:
    first, second = rig.connected(), rig.connected()
    rig.pool.release(second, rig.now)
    rig.pool.release(first, rig.now)
    assert rig.pool.take(rig.now, True) is first and rig.pool.take(rig.now, True) is second and rig.pool.take(rig.now, True) is None


async def test_a_connection_that_is_not_as_new_is_not_taken_back(rig: Rig) -> None:
    origin = rig.connected()
    origin.pause(1)
    with pytest.raises(AssertionError):
        rig.pool.release(origin, rig.now)


async def test_one_that_has_closed_is_passed_over(rig: Rig) -> None:
    first, second = rig.idle(), rig.connected()
    rig.pool.release(second, rig.now)
    second.close()
    assert rig.pool.take(rig.now, True) is first and second not in rig.pool.open


# Keep-Alive timeout (None: not said), seconds idle, and what may use it: anything, only what can be sent again, nothing.
REUSE: list[tuple[float | None, float, str]] = [
    (None, 0.9, "any"), (None, 1.0, "safe"), (None, 19.9, "safe"), (None, 20.0, "none"), (5, 3.9, "any"), (5, 4.0, "none"),
    (120, 19.9, "any"), (120, 20.0, "none"), (2, 0.9, "any"), (2, 1.0, "none"),
]  # fmt: skip


@pytest.mark.parametrize(("timeout", "idle", "who"), REUSE)
async def test_how_long_a_connection_may_be_used_again(rig: Rig, timeout: float | None, idle: float, who: str) -> None:
    origin = rig.connected()
    if timeout is not None:
        origin.keep_alive(timeout)
    rig.pool.release(origin, rig.now)
    rig.now += idle
    assert rig.pool.take(rig.now, False) is (origin if who == "any" else None)
    if who != "any":
        assert rig.pool.take(rig.now, True) is (origin if who == "safe" else None)


async def test_a_timeout_that_leaves_no_time_is_no_reuse(rig: Rig) -> None:
    origin = rig.connected()
    origin.reuse_seconds = 0.0
    rig.pool.release(origin, rig.now)
    assert origin.is_closing and not rig.pool.idle and not rig.pool.open


async def test_after_an_early_close_only_what_can_be_sent_again_uses_what_is_idle(rig: Rig) -> None:
    origin, other = rig.connected(), rig.connected()
    rig.pool.release(origin, rig.now)
    rig.pool.release(other, rig.now)
    rig.now += 0.1
    assert other.eof_received() is False
    rig.lose(other)
    assert rig.pool.closes_early and rig.pool.take(rig.now, False) is None and rig.pool.take(rig.now, True) is origin


@pytest.mark.parametrize(("head", "reuses"), [(get(), True), (get(b"HEAD"), True), (get(b"DELETE"), False), (get(b"POST", CHUNKED), False), (get(upgrade=b"websocket"), False)])  # fmt: skip
async def test_which_requests_use_a_connection_that_is_not_proven(rig: Rig, head: RequestHead, reuses: bool) -> None:
    origin = rig.idle()
    rig.now += 5
    got = rig.acquire(head)
    assert got is origin if reuses else isinstance(got, Slot)


async def test_a_retry_is_on_a_new_connection(rig: Rig) -> None:
    rig.idle()
    assert isinstance(rig.acquire(fresh=True), Slot)


async def test_slots_are_bounded_and_come_back(rig: Rig) -> None:
    slots = [rig.acquire() for _ in range(CONNECTIONS_FIRST)]
    assert all(isinstance(slot, Slot) for slot in slots) and rig.acquire() is None
    waiter = rig.wait()
    rig.pool.free(slots[0], rig.now)
    rig.pool.free(slots[0], rig.now)
    assert isinstance(waiter.lease.result(), Slot) and rig.pool.connecting == CONNECTIONS_FIRST


async def test_an_idle_connection_gives_its_place_to_a_new_one(rig: Rig) -> None:
    """All places are taken by connections that this request may not use."""
    rig.pool.allowed = 2
    first, second = rig.connected(), rig.connected()
    rig.pool.release(first, rig.now)
    rig.now += 1
    rig.pool.release(second, rig.now)
    rig.now += 3
    rig.pool.allowed = 2
    assert isinstance(rig.acquire(get(b"POST", CHUNKED)), Slot)
    assert first.is_closing and not second.is_closing and len(rig.pool.open) == 1


async def test_more_connections_with_each_answer_and_with_time(rig: Rig) -> None:
    origin = rig.connected()
    for _ in range(10):
        rig.pool.release(origin, rig.now)
        assert rig.pool.take(rig.now, True) is origin
    assert rig.pool.allowed == CONNECTIONS_FIRST + 10
    waiting = [rig.wait() for _ in range(CONNECTIONS_MOST)]
    for _ in range(20):
        rig.pool.ramp(rig.now)
    assert rig.pool.allowed == CONNECTIONS_MOST
    assert [one.lease.done() for one in waiting] == [True] * (CONNECTIONS_MOST - 1) + [False]


async def test_what_comes_free_goes_to_whoever_waits_longest_and_nobody_overtakes(rig: Rig) -> None:
    origin = rig.connected()
    rig.fill()
    first, second = rig.wait(), rig.wait()
    rig.pool.release(origin, rig.now)
    assert first.lease.result() is origin and not second.lease.done()
    assert rig.pool.take(rig.now, True) is None, "a cached request"
    assert rig.acquire() is None, "and any other"
    rig.lose(origin)
    assert isinstance(second.lease.result(), Slot)


async def test_a_request_that_leaves_gives_its_turn_to_the_next(rig: Rig) -> None:
    origin = rig.connected()
    rig.fill()
    first, second, third = rig.wait(), rig.wait(), rig.wait()
    second.lease.cancel()
    rig.pool.withdraw(second, rig.now)
    rig.pool.release(origin, rig.now)
    assert first.lease.result() is origin
    rig.pool.withdraw(first, rig.now)
    assert third.lease.result() is origin and rig.pool.waiting == 0


async def test_the_end_tells_everybody(rig: Rig) -> None:
    idle, busy, waiter = rig.idle(), rig.connected(), rig.wait()
    assert set(rig.pool.incarnation_ended()) == {idle, busy}
    assert waiter.lease.result() is None and rig.pool.waiting == 0
    rig.pool.release(busy, rig.now)
    assert busy.is_closing and not rig.pool.idle


async def test_the_sweep_closes_what_has_been_idle_for_long(rig: Rig) -> None:
    old = rig.idle()
    rig.now += 15
    new = rig.connected()
    rig.pool.release(new, rig.now)
    rig.now += 5
    rig.pool.sweep(rig.now)
    assert old.is_closing and not new.is_closing and rig.pool.idle == [new]


# ---- connections that are shared ----


def shared(rig: Rig, slot: Slot, most: int = 2) -> Http2Origin:
    connection = Http2Origin(rig.context, rig.pool, is_secure=False)
    connection.connection_made(rig.transport())
    connection._most = most
    rig.pool.add_shared(slot, connection, rig.now)
    return connection


async def test_one_shared_connection_is_made_at_a_time(rig: Rig) -> None:
    slot = rig.acquire(get(h2=True))
    assert isinstance(slot, Slot) and slot.is_shared
    first, second, third = (rig.wait(get(h2=True)) for _ in range(3))
    assert rig.acquire(get(h2=True)) is None and isinstance(rig.acquire(), Slot), "HTTP/1.1 is not stopped by it"
    connection = shared(rig, slot)
    assert first.lease.result().connection is second.lease.result().connection is connection
    assert isinstance(third.lease.result(), Slot), "its streams are used up: another one is made"
    second.lease.result().give_back()
    assert rig.acquire(get(h2=True)).connection is connection


async def test_who_did_not_ask_for_http2_without_tls_gets_http1_also_where_others_did(rig: Rig) -> None:
    """What is spoken is the request's choice, whatever requests came before. Under TLS it was agreed upon, for all."""
    shared(rig, rig.acquire(get(h2=True)), most=9)
    plain = rig.acquire()
    assert isinstance(plain, Slot) and not plain.is_shared
    assert rig.acquire(get(h2=True)).connection is rig.pool.shared[0]
    rig.pool.tls = TLS
    agreed = Http2Origin(rig.context, rig.pool, is_secure=True)
    agreed.connection_made(rig.transport())
    rig.pool.adopt(agreed)
    assert rig.acquire().connection is agreed


async def test_shared_connections_are_bounded(rig: Rig) -> None:
    for _ in range(SHARED_MOST):
        slot = rig.acquire(get(h2=True))
        shared(rig, slot, most=1)
        assert not isinstance(rig.acquire(get(h2=True)), Slot)
    assert rig.acquire(get(h2=True)) is None


@pytest.mark.parametrize(("tls", "speaks_h2", "upgrade", "is_shared"), [
    (pools.TLS_UNKNOWN, None, None, False), (PLAIN, None, None, False), (TLS_PROBING, None, None, True), (TLS, None, None, True),
    (TLS, True, None, True), (TLS, False, None, False), (TLS, True, b"websocket", False), (TLS_PROBING, None, b"websocket", False),
])  # fmt: skip
async def test_handshakes_of_tls_count_in_the_ramp(
    rig: Rig, tls: int, speaks_h2: bool | None, upgrade: bytes | None, is_shared: bool
) -> None:
    """Before ALPN has said what is spoken, one connection is made; what is made of HTTP/1.1 counts from its slot on."""
    rig.pool.tls, rig.pool.speaks_h2 = tls, speaks_h2
    slot = rig.acquire(get(upgrade=upgrade))
    assert isinstance(slot, Slot) and slot.is_shared is is_shared and rig.pool.connecting == (not is_shared)
    more = [rig.acquire(get(upgrade=upgrade)) for _ in range(CONNECTIONS_FIRST)]
    assert sum(isinstance(one, Slot) for one in more) == (0 if is_shared else CONNECTIONS_FIRST - 1)


async def test_who_waited_for_a_handshake_gets_what_it_showed(rig: Rig) -> None:
    """It agreed on HTTP/1.1, so each of them makes a connection of its own."""
    rig.pool.tls = TLS
    slot = rig.acquire()
    waiting = [rig.wait() for _ in range(3)]
    rig.pool.speaks_h2 = False
    rig.connect(slot)
    assert [isinstance(one.lease.result(), Slot) and not one.lease.result().is_shared for one in waiting] == [True] * 3


# ---- any order ----


class Model(RuleBasedStateMachine):
    """Requests come, wait, leave, get, end; connections are made, fail, close; the incarnation ends."""

    busy = Bundle("busy")
    slots = Bundle("slots")
    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rig = Rig(self.loop)
        self.waiters: list[Waiter] = []
        self.held: set[Slot] = set()
        self.used: set[Origin] = set()

    def teardown(self) -> None:
        self.rig.close()
        self.loop.close()

    @initialize(allowed=st.integers(1, 4))
    def few(self, allowed: int) -> None:
        self.rig.pool.allowed = allowed

    def got(self, lease: Any) -> Any:
        if isinstance(lease, Slot):
            self.held.add(lease)
        elif isinstance(lease, Origin):
            assert lease not in self.used, "one connection, one exchange"
            self.used.add(lease)
        return lease

    @rule(target=waiting, is_safe=st.booleans(), fresh=st.booleans())
    def ask(self, is_safe: bool, fresh: bool) -> Any:
        head = get(b"GET" if is_safe else b"POST")
        lease = self.got(self.rig.acquire(head, fresh))
        waiter = Waiter(head, fresh, self.loop.create_future())
        if lease is not None:
            waiter.lease.set_result(lease)
        elif self.rig.pool.has_ended:
            waiter.lease.set_result(None)
        else:
            self.rig.pool.wait(waiter)
            self.waiters.append(waiter)
        return waiter

    @rule()
    def cached(self) -> None:
        before = self.rig.pool.waiting
        origin = self.got(self.rig.pool.take(self.rig.now, True))
        assert origin is None or not before, "overtakes nobody"
        if origin is not None:
            self.used.discard(origin)
            self.rig.pool.release(origin, self.rig.now)

    def collect(self) -> None:
        for waiter in [one for one in self.waiters if one.lease.done()]:
            self.waiters.remove(waiter)
            if not waiter.lease.cancelled():
                self.got(waiter.lease.result())

    @rule(
        waiter=consumes(waiting),
        what=st.sampled_from(["answered", "closed", "fails", "leaves"]),
        idle=st.sampled_from([0.0, 0.5, 2.0, 30.0]),
    )
    def end_request(self, waiter: Waiter, what: str, idle: float) -> None:
        pool, now = self.rig.pool, self.rig.now
        self.collect()
        if not waiter.lease.done():
            waiter.lease.cancel()
            pool.withdraw(waiter, now)
            self.collect()
            return
        lease = waiter.lease.result()
        if what == "leaves" and not pool.has_ended:
            self.held.discard(lease)
            self.used.discard(lease)
            pool.withdraw(waiter, now)
        elif isinstance(lease, Slot):
            self.held.discard(lease)
            if what == "fails":
                pool.free(lease, now)
            else:
                origin = self.rig.connect(lease)
                pool.release(origin, now) if what == "answered" else origin.close()
                if what == "closed":
                    self.rig.lose(origin)
        elif lease is not None:
            self.used.discard(lease)
            if what == "answered":
                pool.release(lease, now)
            else:
                lease.close()
                self.rig.lose(lease)
        self.collect()
        self.rig.now += idle

    @rule()
    def an_idle_one_is_closed_by_the_application(self) -> None:
        for origin in self.rig.pool.idle[:1]:
            origin.eof_received()
            origin.close()
            self.rig.lose(origin)
        self.collect()

    @rule()
    def swept(self) -> None:
        self.rig.pool.sweep(self.rig.now)

    @rule()
    def ramped(self) -> None:
        self.rig.pool.ramp(self.rig.now)
        self.collect()

    @precondition(lambda self: self.rig.now > 130)
    @rule()
    def ended(self) -> None:
        self.rig.pool.incarnation_ended()
        self.collect()
        assert not self.waiters

    @invariant()
    def nothing_is_lost(self) -> None:
        pool = self.rig.pool
        assert pool.connecting == len(self.held)
        assert pool.waiting == len(self.waiters)
        if not pool.has_ended:
            assert set(pool.idle) | self.used == pool.open and not set(pool.idle) & self.used
            assert not (pool.waiting and len(pool.open) + pool.connecting < pool.allowed), "somebody waits for what is free"
        assert all(one.is_reusable and one.transport is not None and one.transport.is_reading() for one in pool.idle)


Bounded: Callable[..., Any] = hypothesis.settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = Model.TestCase
TestAnyOrder.settings = Bounded
