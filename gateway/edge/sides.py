"""The two sides of an exchange as each knows the other, and what owns an application's connection: the seams between the rooms.

A client's side (an exchange, client/) calls an OriginSide; an application's connection (origin/http1.py, http2.py and shell.py) calls a
ClientSide, its Owner, which is a pool, and Parking through its context. Neither imports the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from gateway.config import Edge

from .failures import Failure
from .policy.head_cache import Cache, CachedResponse
from .policy.keys import Key
from .policy.routes import Account
from .wire.http1_head import RequestHead, ResponseHead, Trailers

HELD_BYTES: Final = 64 << 10  # of what a client says to a parked stream; then it is not read further
UNADMITTED: Final = Account()  # shared by all exchanges that are not admitted to a session; it is never reported


class ClientSide:
    """What an application's connection knows of the exchange that it carries. A base class and no protocol: its calls are many."""

    __slots__ = ("account", "forwarding_fields", "head", "request_id", "response_started")

    is_raw: bool = True  # the answer's body may come in HTTP/1.1's own framing

    def __init__(self) -> None:
        self.account = UNADMITTED
        self.head: RequestHead | None = None
        self.request_id = b""
        self.forwarding_fields = b""  # lines that each request of this client gets (client/forwarding.py)
        self.response_started = False

    @property
    def request_complete(self) -> bool:
        """Whether all of the request has been read, and sent on if there is an origin."""
        raise AssertionError

    def interim(self, head: ResponseHead) -> None:
        """Passes on an interim (1xx) response. Raises Malformed where the application sends too many of them."""

    def response_head(self, head: ResponseHead) -> None: ...

    def response_data(self, data: bytes) -> None: ...

    def response_done(self, trailers: Trailers | None = None) -> None:
        """Ends the exchange, because the response is complete."""

    def response_whole(self, head: ResponseHead, body: bytes) -> None:
        """Passes on the usual answer, whose head and body come at once."""
        self.response_head(head)
        if body:
            self.response_data(body)
        self.response_done()

    def origin_failed(self, failure: Failure) -> None:
        """Ends the exchange, for which there is no whole response from the application."""

    def cut(self) -> None:
        """Ends the exchange, because its incarnation ends; the client of an open stream or tunnel is told so where it can be."""

    def switch(self, head: ResponseHead, data: bytes) -> None:
        """Begins a tunnel with a 101: from here on bytes go both ways as they are; `data` came with the head."""

    def tunnel_half_closed(self) -> None:
        """Ends our half towards the client, because the application has ended its half of the tunnel."""

    def tunnel_out(self, data: bytes) -> bool:
        """Looks at what the application sends in a tunnel, and returns whether it is activity: nothing but pings and pongs is none."""
        return True

    def parked(self) -> None:
        """Answers what the application has left unanswered, because it is about to freeze."""

    def tunnel_over(self) -> None:
        """Ends the exchange of a tunnel that is over in both directions."""

    def pause_reading(self, reason: int) -> None:
        """Does not read the request while a reason (reading.py) holds."""

    def resume_reading(self, reason: int) -> None: ...


class OriginSide(Protocol):
    """What an exchange needs of the connection, or stream, to its application."""

    takes_raw: bool  # bodies may come in HTTP/1.1's own framing

    @property
    def key(self) -> Key: ...

    @property
    def is_paused(self) -> bool:
        """Whether its write buffer, or its stream's queue, is full."""

    @property
    def is_parked(self) -> bool:
        """Whether its session sleeps, so that what is sent is held."""

    def open(self, exchange: ClientSide, head: RequestHead) -> None:
        """Sends the request's head. Fails the exchange where the connection has closed meanwhile."""

    def send(self, data: bytes) -> None:
        """Sends a piece of the request's body (or of a tunnel)."""

    def finish(self, trailers: Trailers | None) -> None:
        """Sends the end of the request's body, or of the client's half of a tunnel."""

    def pause(self, reason: int) -> None:
        """Does not read the answer while a reason (reading.py) holds."""

    def resume(self, reason: int) -> None: ...

    def cancel(self) -> None:
        """Stops, because the client has left: the application is not waited for."""


class Parkable(Protocol):
    """A connection to an application, or a shell, that may outlive its incarnation."""

    @property
    def key(self) -> Key: ...

    def parkable(self, one_way: bool) -> int:
        """Returns how many of its streams may outlive a suspend: those on which the client can speak, and so wake the session; `one_way`:
        also those on which only the server speaks."""

    def is_silent(self, one_way: bool) -> bool:
        """Whether nothing is under way on those streams, in either direction."""

    @property
    def stream_count(self) -> int:
        """Returns the number of its streams, parked or not."""

    def park(self, one_way: bool) -> None:
        """Keeps those streams, and ends the others."""

    def unpark(self) -> None:
        """Sends what was held to the application, because the session runs again."""

    def cut(self) -> None: ...


class Owner:
    """Owns connections to an application; a pool, as they know it."""

    __slots__ = ("closes_early", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.closes_early = False  # the application has closed an idle connection before the time that is proven elsewhere

    @property
    def waiting(self) -> int:
        """Returns the number of requests that wait for a connection."""
        return 0

    def release(self, origin: Any, now: float) -> None:
        """Takes back a connection whose exchange has ended; the connection sees to it that it is in the state of a new one."""

    def forget(self, origin: Any, now: float) -> None:
        """Forgets a connection that has closed."""

    def forget_shared(self, connection: Any, now: float) -> None:
        """Forgets a connection of HTTP/2 that has closed."""

    def serve(self, now: float) -> None:
        """Serves the requests that wait, because something came free."""


class OriginContext:
    """What every connection to an application is given."""

    __slots__ = ("forget_parked", "responses", "settings", "time", "wake")

    def __init__(
        self, settings: Edge, time: Callable[[], float], responses: Cache[bytes, CachedResponse],
        wake: Callable[[Parkable], None], forget_parked: Callable[[Parkable], None],
    ) -> None:  # fmt: skip
        self.settings = settings
        self.time = time
        self.responses = responses
        self.wake = wake  # somebody spoke on a parked connection
        self.forget_parked = forget_parked  # a parked connection is over
