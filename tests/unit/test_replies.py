"""Answers that the edge makes itself (service reference, 3.4), as bytes of HTTP/1.1 and as fields."""

from __future__ import annotations

import http.client
import io
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from gateway.edge.policy import replies
from gateway.edge.policy.admission import BAD_TOKEN, NOT_RUNNING, Refuse

ID = b"00000000-0000-0000-0000-000000000000"


class Stream:
    """What http.client reads an answer from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self._data)


def parsed(data: bytes, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    answer = http.client.HTTPResponse(Stream(data), method=method)  # type: ignore[arg-type]
    answer.begin()
    return answer, answer.read()


@pytest.mark.parametrize("refusal", [replies.UNAVAILABLE, replies.TOO_MANY, replies.LIMITED, replies.FAILED, BAD_TOKEN, Refuse(426, b"13")])
@pytest.mark.parametrize("keep_alive", [False, True])
def test_an_answer_is_plain_complete_and_never_stored(refusal: Refuse, keep_alive: bool) -> None:
    data = replies.make(refusal, ID, keep_alive, False)
    answer, body = parsed(data)
    assert (answer.status, body) == (refusal.status, refusal.body) and answer.reason
    assert answer.getheader("x-amzn-requestid") == ID.decode() and answer.getheader("cache-control") == "private, no-store"
    assert answer.getheader("content-length") == str(len(refusal.body))
    assert answer.getheader("content-type") == ("text/plain" if refusal.body else None)
    assert ("close" in (answer.getheader("connection") or "")) is not keep_alive
    assert parsedate_to_datetime(answer.getheader("date") or "")
    assert refusal.reason.encode() not in data or not refusal.reason, "the reason is for the logs"


@pytest.mark.parametrize(
    ("status", "name", "value"), [(429, "retry-after", "1"), (426, "sec-websocket-version", "13"), (426, "upgrade", "websocket")]
)
def test_what_a_status_asks_for(status: int, name: str, value: str) -> None:
    answer, _ = parsed(replies.make(Refuse(status), ID, True, False))
    assert answer.getheader(name) == value
    other, _ = parsed(replies.make(Refuse(403), ID, True, False))
    assert other.getheader(name) is None


@pytest.mark.parametrize(
    ("refusal", "seconds"), [(replies.NOT_IN_TIME, "1"), (replies.NOT_KNOWN_NOW, "1"), (replies.UNAVAILABLE, None), (NOT_RUNNING, None)]
)
def test_what_passes_may_be_tried_again(refusal: Refuse, seconds: str | None) -> None:
    """A resume that could not be made now; not a MicroVM that no request resumes."""
    answer, _ = parsed(replies.make(refusal, ID, True, False))
    assert (answer.status, answer.getheader("retry-after")) == (502, seconds)


def test_a_head_request_is_told_the_length_and_sent_no_body() -> None:
    data = replies.make(BAD_TOKEN, ID, True, True)
    assert data.endswith(b"\r\n\r\n")
    answer, body = parsed(data, "HEAD")
    assert answer.getheader("content-length") == str(len(BAD_TOKEN.body)) and body == b""


@pytest.mark.parametrize(
    ("keep_alive", "minor", "connection"), [(True, 1, None), (False, 1, "close"), (True, 0, "keep-alive"), (False, 0, "close")]
)
def test_connection_says_what_the_version_does_not(keep_alive: bool, minor: int, connection: str | None) -> None:
    assert parsed(replies.make(BAD_TOKEN, ID, keep_alive, False, minor))[0].getheader("connection") == connection


def test_the_fields_are_the_same_over_http2_without_those_of_the_connection() -> None:
    names = [name for name, _ in replies.fields(replies.LIMITED)]
    assert names == [name.lower() for name in names] and b"connection" not in names and len(set(names)) == len(names)


def test_a_reason_is_the_body_where_nothing_else_is_said() -> None:
    assert BAD_TOKEN.why == "Token authentication failed" and replies.NOT_KNOWN_NOW.why and replies.UNAVAILABLE.why == ""
