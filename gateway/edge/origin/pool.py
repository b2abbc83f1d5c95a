"""Connections to one port of one incarnation: who has one, who may make one, who waits. A data structure: nothing here connects.

An exchange acquires a connection that is idle, a stream of one that it shares with others, or a slot, which is the right to
make a connection; where there is none it waits in order, and what comes free goes to whoever waits longest. A connection that
is released is in the state of a new one.

How long an idle connection may be used again (RFC 9112, 9.3; RFC 9110, 7.6.1): an application may close it at any moment, and a
request that meets that end is lost. A request that is safe and has no content can be sent once more; any other gets a connection
only while that is *proven*: idle for less than the application's Keep-Alive timeout minus a second, or for less than a second
where it has said none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from ..policy.keys import Key
from ..sides import Owner
from ..wire.http1_head import RequestHead
from .http1 import Origin
from .http2 import Http2Origin, OriginStream

CONNECTIONS_MOST: Final = 256  # to one port of one session; more requests wait in line
SHARED_MOST: Final = 16  # connections of HTTP/2, each with many streams
# What an application gets at once after a resume. More follows with each answer, and with time for those that answer late:
# a listen queue of the usual 100 or 128 must not overflow, because a lost SYN costs a second.
CONNECTIONS_FIRST: Final = 64
RAMP: Final = 16  # more connections, every RAMP_SECONDS in which somebody waits
_FRESH_SECONDS: Final = 0.5  # idle for longer, a connection may have been closed by the application just now: it is looked at
_JUST_NOW: Final = 0.002  # the same for requests that cannot be sent again

# Whether the port speaks TLS.
TLS_UNKNOWN: Final = 0
TLS_PROBING: Final = 1  # the port's first answer was not HTTP: the handshake of the next connection shows whether it speaks TLS
TLS: Final = 2
PLAIN: Final = 3


class Slot:
    """A right to make one connection. It ends with `Pool.add`, or with `Pool.free`."""

    __slots__ = ("is_held", "is_shared")

    def __init__(self, is_shared: bool) -> None:
        self.is_shared = is_shared  # of HTTP/2, as far as is known: others wait for it, because it will serve them too
        self.is_held = True


class Waiter:
    """A request that waits. `lease` resolves to what it gets, or to None when the incarnation has ended."""

    __slots__ = ("fresh", "head", "lease")

    def __init__(self, head: RequestHead, fresh: bool, lease: asyncio.Future[Origin | OriginStream | Slot | None]) -> None:
        self.head = head
        self.fresh = fresh
        self.lease = lease


class Pool(Owner):
    """Owns the connections of one (session, incarnation, port), and decides who gets which. Each one is idle, has an exchange, or is
    being made for a slot; only what is in the state of a new connection becomes idle."""

    __slots__ = (
        "allowed", "asking", "connecting", "has_ended", "has_listened", "idle", "open", "ramping", "shared", "shared_connecting",
        "speaks_h2", "tls", "waiters", "waiters_for_shared",
    )  # fmt: skip

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.idle: list[Origin] = []  # the one used last is at the end, and is used next
        self.open: set[Origin] = set()  # of HTTP/1.1, the idle ones among them
        self.shared: list[Http2Origin] = []
        self.connecting = 0  # slots that are held
        self.shared_connecting = False  # a slot for a shared connection is held
        self.waiters: deque[Waiter] = deque()
        self.waiters_for_shared: deque[Waiter] = deque()
        self.allowed = CONNECTIONS_FIRST
        self.ramping = False
        self.has_ended = False  # the incarnation has ended
        self.has_listened = False  # the application, in this incarnation
        self.asking = asyncio.Lock()  # whoever holds it asks an application that has not
        self.tls = TLS_UNKNOWN
        self.speaks_h2: bool | None = None  # what ALPN agreed on; None: not known yet

    # ---- connections that wait ----

    def take(self, now: float, is_safe: bool) -> Origin | None:
        """Returns an idle connection, where there is one that this request may use. While others wait there is
        none, so that nobody is overtaken."""
        return self._pop_idle(now, is_safe) if self.idle and not self.waiters else None

    def _pop_idle(self, now: float, is_safe: bool) -> Origin | None:
        idle = self.idle
        while idle:
            origin = idle[-1]
            age = now - origin.idle_since
            if not origin.is_closing and age < origin.reuse_seconds:
                if not is_safe and (age >= origin.proven_seconds or self.closes_early):
                    return None  # a request that is safe may still use it; those below have been idle for longer
                if age < (_FRESH_SECONDS if is_safe else _JUST_NOW) or origin.is_quiet:
                    return idle.pop()
            self.close(origin)
        return None

    def release(self, origin: Origin, now: float) -> None:
        """Takes back a connection whose exchange has ended. The connection is in the state of a new one: it has seen to that."""
        assert origin.is_reusable
        if self.has_ended or origin.is_closing or origin.reuse_seconds <= 0:
            self.close(origin)
            return
        origin.idle_since = now
        self.idle.append(origin)
        if self.allowed < CONNECTIONS_MOST:
            self.allowed += 1
        if self.waiters:
            self.serve(now)

    def close(self, origin: Origin) -> None:
        """Closes an idle connection that is of no use any more."""
        self.open.discard(origin)
        if origin in self.idle:
            self.idle.remove(origin)
        origin.close()

    def forget(self, origin: Origin, now: float) -> None:
        """Forgets a connection that has closed."""
        if origin in self.open:
            self.open.discard(origin)
            if origin in self.idle:
                self.idle.remove(origin)
            self.serve(now)

    def forget_shared(self, connection: Http2Origin, now: float) -> None:
        if connection in self.shared:
            self.shared.remove(connection)
            self.serve(now)

    # ---- for one request ----

    def must_wait(self, head: RequestHead) -> bool:
        """Whether others wait for the same already, so that this request must wait behind them."""
        return bool(self.waiters_for_shared if self.wants_shared(head) else self.waiters)

    def wants_shared(self, head: RequestHead) -> bool:
        """Whether a connection for this request is one of HTTP/2, or may turn out to be one: then one is made, and others wait for it."""
        return head.wants_h2 or (self.tls in (TLS_PROBING, TLS) and self.speaks_h2 is not False and head.upgrade is None)

    def ready(self, head: RequestHead, now: float) -> Origin | OriginStream | None:
        """Returns a connection or stream that is there already, or None."""
        return None if self.must_wait(head) else self._ready(head, False, now)

    def _ready(self, head: RequestHead, fresh: bool, now: float) -> Origin | OriginStream | None:
        if self.shared and head.upgrade is None:
            for connection in self.shared:
                if connection.has_room and (head.wants_h2 or connection.is_secure):
                    return connection.reserve()
        return None if fresh or head.wants_h2 else self._pop_idle(now, head.is_safe and head.upgrade is None)

    def acquire(self, head: RequestHead, fresh: bool, now: float) -> Origin | OriginStream | Slot | None:
        """Returns a connection or stream, a slot, or None where the request has to wait; with `fresh`, no connection that was used
        before."""
        found = self._ready(head, fresh, now)
        if found is not None:
            return found
        if self.wants_shared(head):
            if self.shared_connecting or len(self.shared) >= SHARED_MOST:
                return None
            self.shared_connecting = True
            return Slot(True)
        if len(self.open) + self.connecting >= self.allowed:
            if not self.idle:
                return None
            self.close(self.idle[0])  # the one that has been idle for longest gives its place
        self.connecting += 1
        return Slot(False)

    def wait(self, waiter: Waiter) -> None:
        (self.waiters_for_shared if self.wants_shared(waiter.head) else self.waiters).append(waiter)

    @property
    def waiting(self) -> int:
        return len(self.waiters) + len(self.waiters_for_shared)

    def withdraw(self, waiter: Waiter, now: float) -> None:
        """Takes a request out of the queue: its client has left, or its deadline has passed. What it was given meanwhile goes to the
        next."""
        for line in (self.waiters, self.waiters_for_shared):
            if waiter in line:
                line.remove(waiter)
        if not waiter.lease.done() or waiter.lease.cancelled():
            return
        lease = waiter.lease.result()
        if isinstance(lease, Slot):
            self.free(lease, now)
        elif lease is not None:
            lease.give_back()

    def serve(self, now: float) -> None:
        """Gives connections, streams and slots that are free to the requests that wait, in the order of their arrival."""
        for line in (self.waiters, self.waiters_for_shared):
            while line:
                waiter = line[0]
                if waiter.lease.done():
                    line.popleft()
                    continue
                lease = self.acquire(waiter.head, waiter.fresh, now)
                if lease is None:
                    break
                line.popleft()
                waiter.lease.set_result(lease)

    # ---- slots ----

    def free(self, slot: Slot, now: float) -> None:
        """Ends a slot: its connection is made, has failed, or is not kept in the pool."""
        if slot.is_held:
            slot.is_held = False
            if slot.is_shared:
                self.shared_connecting = False
            else:
                self.connecting -= 1
            self.serve(now)

    def add(self, slot: Slot, origin: Origin, now: float) -> None:
        """Takes in the connection that was made for a slot; its first exchange has it at once."""
        self.open.add(origin)
        self.free(slot, now)

    def add_shared(self, slot: Slot, connection: Http2Origin, now: float) -> None:
        self.shared.append(connection)
        self.free(slot, now)

    def adopt(self, connection: Origin | Http2Origin) -> None:
        """Takes in a parked connection, which goes on in this incarnation."""
        self.has_listened = True
        if isinstance(connection, Http2Origin):
            self.shared.append(connection)
        else:
            self.open.add(connection)
        connection.move(self)

    def ramp(self, now: float) -> None:
        """Allows more connections, every RAMP_SECONDS in which a request waits."""
        self.allowed = min(CONNECTIONS_MOST, self.allowed + RAMP)
        self.serve(now)

    # ---- its end ----

    @property
    def is_unused(self) -> bool:
        """Whether nothing is known of the port, and nobody has or awaits a connection to it: a client may name any port."""
        is_known = self.has_listened or self.tls != TLS_UNKNOWN
        return not (is_known or self.open or self.shared or self.connecting or self.shared_connecting or self.waiting)

    @property
    def connections(self) -> list[Origin | Http2Origin]:
        return [*self.open, *self.shared]

    def incarnation_ended(self) -> list[Origin | Http2Origin]:
        """Gives nobody anything any more, because the incarnation ends; returns the connections, for whoever parks or cuts them."""
        self.has_ended = True
        found = self.connections
        self.idle, self.open, self.shared = [], set(), []
        for line in (self.waiters, self.waiters_for_shared):
            while line:
                waiter = line.popleft()
                if not waiter.lease.done():
                    waiter.lease.set_result(None)
        return found

    def sweep(self, now: float) -> None:
        """Closes what has been idle for long."""
        for origin in [idle for idle in self.idle if now - idle.idle_since >= idle.reuse_seconds]:
            self.close(origin)
