"""An application that listens late, or not at all, in a real microVM: what is held, what is 502, and what the logs say of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from service import Instance, until
from wire import get

pytestmark = pytest.mark.vm


def lines(instance: Instance, identifier: str) -> list[str]:
    return [line for line in instance.command("torpor", "logs", identifier).stdout.splitlines() if line.startswith("torpor: ")]


def test_a_port_that_is_not_listened_on_yet_and_one_that_is_no_more(instance: Instance, vm: dict[str, Any]) -> None:
    ca = Path(instance.root / "tls/ca.crt")

    def ask(port: str, path: str = "/state") -> Any:
        return get(vm["endpoint"], ca, vm["token"], path, X_aws_proxy_port=port)

    assert ask("8080", "/listen?port=7777&after=4").body == b"later"
    started = time.monotonic()
    assert ask("7777", "/early").status == 413, "held until its application listens; the connection is closed after this answer"
    assert 3 < time.monotonic() - started < 20
    assert ask("8080", "/listen?port=5173&host=%3A%3A1").status == ask("8080", "/listen?port=5174&host=127.0.0.2").status == 200
    assert ask("8080", "/unlisten?port=7777").body == b"closed"
    started = time.monotonic()
    answer = ask("7777")
    assert (answer.status, answer.body) == (502, b"") and time.monotonic() - started < 10
    said = until(lambda: [line for line in lines(instance, vm["microvmId"]) if "7777" in line], 20, 0.2)
    assert said == ["torpor: port 7777: nothing listens; 5173, 127.0.0.2:5174, 7001, 8080 and 9000 do"]


def test_a_builds_log_says_what_is_waited_for(instance: Instance, app: str, hooked: str) -> None:
    said = instance.command("torpor", "logs", "app").stdout
    waiting = "torpor: waiting for EXPOSEd port 8080 to listen, 20 s at most (images.start_seconds); a ready hook"
    assert waiting in said and "torpor: port 8080 listens after " in said
    assert "torpor: waiting for the ready hook on port 9000, " in instance.command("torpor", "logs", "hooked").stdout


@pytest.mark.long
def test_an_application_that_listens_on_one_of_two_exposed_ports(instance: Instance) -> None:
    """The snapshot is taken all the same, and a request for the other is held until it listens."""
    from service import app_files

    late = {"EXPOSE 8080": "EXPOSE 8080 7777"}
    arn = instance.create("late", instance.upload(app_files(**late), "late.zip"))
    build = instance.built(arn)
    assert build["buildState"] == "SUCCESSFUL", build
    said = instance.command("torpor", "logs", "late").stdout
    nothing = "torpor: nothing listens on EXPOSEd port 7777 after 20 s; 7001, 8080 and 9000 do. The snapshot is taken all the same"
    assert "torpor: waiting for EXPOSEd ports 7777, 8080 to listen, 20 s at most" in said and nothing in said
    instance.client().delete_microvm_image(imageIdentifier=arn)
