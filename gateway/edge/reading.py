"""Why a transport is not read at the moment: back-pressure of each kind is a reason, and reading goes on when none is left.

Whoever adds a reason takes it away again, and nobody else does, so that one kind of back-pressure cannot lift another's. A
connection that changes hands (an application's that goes back to its pool, a client's whose next request begins) starts without
any: `clear`.
"""

from __future__ import annotations

from typing import Final, Protocol

PEER_SLOW: Final = 1  # the other side of the exchange takes nothing: its write buffer, or its stream's queue, is full
THROTTLED: Final = 2  # the session's bytes a second are spent
READ_AHEAD: Final = 4  # what has been read has nowhere to go yet, and its bound is reached
HELD: Final = 8  # the stream is parked, and enough of what its client said is kept
UNREAD: Final = 16  # the client does not read the answers that it has: it is asked for no more requests


class Readable(Protocol):
    """The part of asyncio.Transport that is about reading."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool: ...


class ReadGate:
    """Pauses one transport while at least one reason holds."""

    __slots__ = ("_transport", "reasons")

    def __init__(self, transport: Readable) -> None:
        self._transport = transport
        self.reasons = 0

    @property
    def is_paused(self) -> bool:
        return self.reasons != 0

    def pause(self, reason: int) -> None:
        if not self.reasons and not self._transport.is_closing():
            self._transport.pause_reading()
        self.reasons |= reason

    def resume(self, reason: int) -> None:
        if self.reasons & reason:
            self.reasons &= ~reason
            if not self.reasons and not self._transport.is_closing():
                self._transport.resume_reading()

    def clear(self) -> None:
        """Lifts every reason."""
        if self.reasons:
            self.resume(self.reasons)
