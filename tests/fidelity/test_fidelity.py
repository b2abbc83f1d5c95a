"""The table of images (table.py), row by row, against real builds and real microVMs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from service import ROLE, Instance, until
from wire import Answer, get

from fidelity.table import Call, Check, Get, Image, Logs, Run, Sleep, archive, subjects

pytestmark = pytest.mark.vm
IMAGES = {image.name: image for subject in subjects() for image in subject.images}
AHEAD = 3  # builds under way at once
_PORT = 8080  # the table's server's
_COMMAND_SECONDS, _START_SECONDS = 420.0, 120.0  # emulated programs are slow, on a machine that others use most of all
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


class Builds:
    """Builds of the selected rows, some of them started ahead of the test that asks."""

    def __init__(self, instance: Instance, server: bytes, names: list[str]) -> None:
        self.instance, self.server = instance, server
        self.waiting, self.started = names, dict[str, str]()

    def start(self, image: Image) -> str:
        if callable(image.files):
            content = image.files(self.server)
        else:
            own = {"Dockerfile": image.dockerfile} if image.dockerfile is not None else {}
            content = archive({**own, "server": self.server, **image.files})
        uri = self.instance.upload(content, f"fidelity-{image.name}.zip")
        return self.instance.create(f"fidelity-{image.name}", uri, **image.request)

    def of(self, name: str) -> str:
        """The row's image; the next ones are begun."""
        wanted = [name, *(one for one in self.waiting if one != name)][:AHEAD]
        for one in wanted:
            if one not in self.started:
                self.started[one] = self.start(IMAGES[one])
        self.waiting = [one for one in self.waiting if one != name]
        return self.started[name]


@pytest.fixture(scope="session")
def row_builds(request: pytest.FixtureRequest, instance: Instance, server: bytes) -> Builds:
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function) and "row_builds" in item.fixturenames]
    return Builds(instance, server, [item.callspec.params["name"] for item in chosen])


class Running:
    """A row's image, and the microVM that was launched from it."""

    def __init__(self, instance: Instance, image: Image, arn: str, build: dict[str, Any]) -> None:
        self.instance, self.image, self.arn, self.build = instance, image, arn, build
        self.vm: dict[str, Any] | None = None
        self.answered: set[int] = set()  # ports on which the application is up

    def started(self) -> dict[str, Any]:
        if self.vm is None:
            self.vm = self.instance.launch(self.arn, **{"idlePolicy": POLICY, "executionRoleArn": ROLE, **self.image.launch})
            self.vm["token"] = self.instance.token(self.vm["microvmId"])
        return self.vm

    def ask(self, path: str, **request: Any) -> Answer:
        vm = self.started()
        return get(vm["endpoint"], self.instance.root / "tls/ca.crt", vm["token"], path, **request)

    def run(self, command: str) -> tuple[int, str]:
        """The first command waits until the server listens: what is started before it may be slow."""

        def answered() -> Answer | None:
            answer = self.ask("/run", method="POST", body=command.encode(), timeout=_COMMAND_SECONDS)
            return answer if answer.status != 502 or _PORT in self.answered else None

        answer = until(answered, _START_SECONDS, 0.5)
        self.answered.add(_PORT)
        assert answer.status == 200, answer
        return int(answer.fields["x-exit-code"]), answer.body.decode(errors="replace").strip()

    def log(self, build: bool = False) -> str:
        if not build:
            return self.instance.command("torpor", "logs", self.started()["microvmId"]).stdout
        pages = (
            self.instance.client("logs")
            .get_paginator("filter_log_events")
            .paginate(logGroupName=f"/aws/lambda-microvms/fidelity-{self.image.name}", logStreamNamePrefix="build/")
        )
        return "\n".join(event["message"] for page in pages for event in page["events"])

    def check(self, check: Check) -> None:
        match check:
            case Run():
                code, printed = self.run(check.command)
                assert code == check.code and re.fullmatch(check.prints, printed, re.DOTALL), f"{check.command}: {code}: {printed}"
            case Get():
                self.get(check)
            case Logs():
                if check.contains:
                    until(lambda: re.search(check.contains, self.log(check.build)), 20, 0.2)
                assert not check.absent or not re.search(check.absent, self.log(check.build)), self.log(check.build)
            case Sleep():
                identifier = self.started()["microvmId"]
                self.instance.client().suspend_microvm(microvmIdentifier=identifier)
                self.instance.state(identifier, "SUSPENDED")
            case Call():
                check.check(self)

    def get(self, check: Get) -> None:
        """It is asked again until the application is up. From then on the first answer must be right, whatever it wakes: an application that
        had lost its memory would come to the answer that is expected after a few more requests."""
        deadline = time.monotonic() + check.within
        fields = {"X_aws_proxy_port": str(check.port), **check.fields}
        while True:
            left = deadline - time.monotonic()
            answer = self.ask(check.path, method=check.method, body=check.body, timeout=max(left, 1.0), **fields)
            if answer.status == check.status and re.search(check.contains.encode(), answer.body, re.DOTALL):
                self.answered.add(check.port)
                return
            assert left > 0 and check.port not in self.answered, f"{check.path}: {answer.status} {answer.body[:2000]!r}"
            time.sleep(0.2)


@pytest.fixture
def running(instance: Instance, row_builds: Builds, name: str) -> Iterator[Running]:
    image = IMAGES[name]
    arn = row_builds.of(name)
    one = Running(instance, image, arn, instance.built(arn, seconds=image.times))
    yield one
    if one.vm is not None:
        instance.terminate(one.vm["microvmId"])
    instance.client().delete_microvm_image(imageIdentifier=arn)


def rows() -> Iterator[Any]:
    for subject in subjects():
        for image in subject.images:
            marks = [pytest.mark.long] * image.long + [pytest.mark.corpus] * subject.corpus
            yield pytest.param(image.name, marks=marks)


@pytest.mark.parametrize("name", list(rows()))
def test_a_row(running: Running, name: str) -> None:
    image, build = running.image, running.build
    log = running.log(build=True)
    if image.fails is None:
        assert build["buildState"] == "SUCCESSFUL", f"{build.get('stateReason')}\n{log[-4000:]}"
        running.started()
    else:
        assert build["buildState"] == "FAILED", log[-4000:]
        assert re.search(image.fails, f"{build['stateReason']}\n{log[-4000:]}"), f"{build['stateReason']}\n{log[-4000:]}"
    for check in image.checks:
        try:
            running.check(check)
        except (AssertionError, TimeoutError):
            print(running.log()[-4000:] if image.fails is None else log)
            raise
