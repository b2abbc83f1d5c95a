"""Streams of sessions that sleep: the client's connection stays open here, the application's in the session's own network.

A stream is parked only where nothing is under way in either direction (docs/architecture.md). What the client then sends is kept,
within a bound, and resumes the session; the next incarnation has the same connections, and the stream goes on.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, Protocol

from gateway.messages import Route

from .hold import HoldFull, Ticket

if TYPE_CHECKING:
    from .keys import Key
    from .upstream import Upstream
    from .worker import Worker

HELD_BYTES = 64 << 10  # of what a client says to a parked stream; then it is not read further

_OUTQ = struct.Struct("i")


def unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the guest has not acknowledged (tcp(7), SIOCOUTQ): after a sleep they would wait for a retransmission."""
    sock = transport.get_extra_info("socket")
    return int(_OUTQ.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]) if sock is not None else 0


class Parkable(Protocol):
    """A connection to an application, or a shell, that may outlive its incarnation."""

    @property
    def key(self) -> Key: ...

    def parkable(self, one_way: bool) -> int:
        """How many of its streams may outlive a suspend: those on which the client can speak, and so wake the session; `one_way`:
        also those on which only the server speaks."""

    def is_silent(self, one_way: bool) -> bool:
        """Whether nothing is under way on those streams, in either direction."""

    @property
    def stream_count(self) -> int:
        """Its streams, parked or not."""

    def park(self, one_way: bool) -> None:
        """Keeps those streams, and ends the others."""

    def join(self, upstream: Upstream, incarnation: int) -> None:
        """It belongs to this incarnation of its session from now on."""

    def unpark(self) -> None:
        """The session runs again: what was held goes to the application."""

    def cut(self) -> None: ...


class _Waker:
    """What the holds keep for a session whose parked stream was spoken to."""

    def __init__(self) -> None:
        self.held_for: Ticket | None = None
        self.held_bytes = 0


class Parking:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._parked: dict[str, set[Parkable]] = {}
        self._waking: set[str] = set()

    def add(self, origin: Parkable) -> None:
        self._parked.setdefault(origin.key[0], set()).add(origin)

    def discard(self, origin: Parkable) -> None:
        """A parked connection is over: its client left, or it was cut."""
        parked = self._parked.get(origin.key[0])
        if parked is not None:
            parked.discard(origin)
            if not parked:
                del self._parked[origin.key[0]]

    def wake(self, origin: Parkable) -> None:
        """Somebody spoke: the session is resumed, once."""
        session = origin.key[0]
        if session not in self._waking:
            self._waking.add(session)
            self._worker.spawn(self._wake(session))

    async def _wake(self, session: str) -> None:
        worker = self._worker
        deadline = worker.time() + worker.settings.hold_seconds
        try:
            while session in self._parked:
                route = worker.route_of_session(session)
                if route is None or route.gate == "refuse":
                    self.over(session)
                elif route.gate == "open":
                    self.opened(route)
                else:
                    await worker.holds.wait(route, max(0.0, deadline - worker.time()), _Waker())
        except (TimeoutError, HoldFull) as error:
            count = self.streams(session)
            why = str(error) or f"it did not run again within {worker.settings.hold_seconds:g} s (edge.hold_seconds)"
            worker.report_fault(session, f"{count} streams that waited for the MicroVM were closed: {why}")
            self.over(session)
        finally:
            self._waking.discard(session)

    def opened(self, route: Route) -> None:
        """The session runs (again): its streams go on, as connections of this incarnation."""
        for origin in self._parked.pop(route.session, ()):
            if not self._worker.guard(self._worker.upstream.adopt, origin, route.incarnation):
                self._worker.guard(origin.cut)

    def over(self, session: str) -> None:
        """The session will not run again: its streams are cut."""
        for origin in self._parked.pop(session, ()):
            self._worker.guard(origin.cut)

    def close(self) -> None:
        """The worker ends, and with it what it has parked."""
        for session in list(self._parked):
            self.over(session)

    def streams(self, session: str) -> int:
        return sum(origin.stream_count for origin in self._parked.get(session, ()))

    @property
    def count(self) -> int:
        return sum(origin.stream_count for parked in self._parked.values() for origin in parked)
