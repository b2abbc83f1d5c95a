"""What the runner of the table of images takes for an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from fidelity.table import Get, Image
from fidelity.test_fidelity import Running
from service import Instance
from wire import Answer


def row(monkeypatch: pytest.MonkeyPatch, answers: Iterable[Answer]) -> Running:
    given = iter(answers)

    def ask(self: Running, path: str, **request: Any) -> Answer:
        return next(given)

    monkeypatch.setattr(Running, "ask", ask)
    return Running(object.__new__(Instance), Image("one", "one"), "", {})


def hits(number: int) -> Answer:
    return Answer(200, {}, b"hits %d\n" % number)


def test_an_application_is_asked_until_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    row(monkeypatch, [Answer(502, {}, b""), hits(1)]).get(Get("answers", contains="hits 1\\b"))


def test_one_that_has_lost_its_memory_in_a_sleep_does_not_pass_by_being_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = row(monkeypatch, [hits(1), hits(1), hits(2)])
    one.get(Get("answers", contains="hits 1\\b"))
    with pytest.raises(AssertionError, match="hits 1"):
        one.get(Get("its memory is as before the sleep", contains="hits 2\\b"))


def test_one_that_is_not_there_for_the_request_that_wakes_it_does_not_pass_by_being_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = row(monkeypatch, [hits(1), Answer(502, {}, b""), hits(2)])
    one.get(Get("answers", contains="hits 1\\b"))
    with pytest.raises(AssertionError, match="502"):
        one.get(Get("its memory is as before the sleep", contains="hits 2\\b"))


def test_another_port_is_waited_for_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one = row(monkeypatch, [hits(1), Answer(502, {}, b""), hits(2)])
    one.get(Get("answers", contains="hits 1\\b"))
    one.get(Get("so does what was started later", port=9001, contains="hits 2\\b"))
