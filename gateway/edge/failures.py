"""Why an application's connection did not bring a whole answer: what an exchange decides by, and what the microVM's log is told."""

from __future__ import annotations

from typing import Final

NOT_HTTP: Final = 0  # the first bytes of its first answer are not HTTP's: perhaps it speaks TLS
STALE: Final = 1  # a connection that had answered before ended without a byte of this answer
REFUSED: Final = 2  # the application has not looked at the request, and said so (RFC 9113, 8.7)
UNANSWERED: Final = 3  # a new connection ended without a byte of an answer
INVALID: Final = 4  # what it sent breaks a rule
CUT_SHORT: Final = 5  # it ended in the middle of the answer
ENDED: Final = 6  # the incarnation ended


class Failure:
    """What became of a request; `reason` is a sentence for the log, with the rule that was broken and its clause, and nothing that was
    sent."""

    __slots__ = ("kind", "reason")

    def __init__(self, kind: int, reason: str) -> None:
        self.kind = kind
        self.reason = reason


NOT_HTTP_FAILURE: Final = Failure(NOT_HTTP, "what the application answered is not HTTP (RFC 9112, 4)")
SPOKE_FIRST: Final = Failure(INVALID, "the application sent data before there was a request (RFC 9112, 9.2)")
STALE_FAILURE: Final = Failure(STALE, "the application closed a connection that was being used again, without an answer (RFC 9112, 9.3.1)")
UNANSWERED_FAILURE: Final = Failure(UNANSWERED, "the application closed the connection without an answer")
HEAD_CUT_SHORT: Final = Failure(CUT_SHORT, "the application closed the connection in the middle of the response's head (RFC 9112, 8)")
CONTENT_CUT_SHORT: Final = Failure(
    CUT_SHORT, "the application closed the connection before the response's content was complete (RFC 9112, 8)"
)
UNASKED_UPGRADE: Final = Failure(INVALID, "the response switches protocols, which the request did not ask for (RFC 9110, 15.2.2)")
STREAM_RESET: Final = Failure(CUT_SHORT, "the application reset the stream before its response was complete (RFC 9113, 5.4.2)")
STREAM_REFUSED: Final = Failure(REFUSED, "the application ended the connection before it took the request (RFC 9113, 8.7)")
SUSPENDED: Final = Failure(ENDED, "the MicroVM was suspended, or ended, before the application's response was complete")
