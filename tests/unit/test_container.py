"""From an image's configuration to what the guest's agent starts."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.images.container import agent_entries, stop_signal


def entries(**config: Any) -> list[tuple[str, str]]:
    return agent_entries({"Env": [], "Cmd": ["/srv"], **config}, {}, {}, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, 15), ("", 15), ("SIGQUIT", 3), ("QUIT", 3), ("sigint", 2), ("9", 9), ("SIGRTMIN", 34), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("SIGRTMAX", 64),
        ("SIGNOTHING", 15), ("SIG_DFL", 15), ("0", 15), ("65", 15), ("SIGRTMIN+99", 15),
    ],
)  # fmt: skip
def test_a_stop_signal_has_a_name_or_a_number(text: str | None, number: int) -> None:
    assert stop_signal({"StopSignal": text}) == number
    assert ("stop", str(number)) in entries(StopSignal=text)


def test_volumes_are_made_by_the_guest() -> None:
    assert [entry for entry in entries(Volumes={"/data": {}, "/var/lib/x": {}}) if entry[0] == "volume"] == [
        ("volume", "/data"),
        ("volume", "/var/lib/x"),
    ]
    assert not [entry for entry in entries(Volumes=None) if entry[0] == "volume"]


@pytest.mark.parametrize(("given", "taken"), [(None, "/"), ("", "/"), ("/a/b", "/a/b"), ("a", "/a")])
def test_a_working_directory_is_absolute(given: str | None, taken: str) -> None:
    assert ("dir", taken) in entries(WorkingDir=given)


def test_every_variable_and_argument_goes_to_the_guest() -> None:
    names = [f"V{number}=x" for number in range(2000)]
    made = entries(Env=names, Cmd=["/srv", *names])
    assert [value for kind, value in made if kind == "env"] == names
    assert [value for kind, value in made if kind == "arg"] == ["/srv", *names]
