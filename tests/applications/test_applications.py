"""Each application of the table, built as its users build it, used by its real client, put to sleep, woken by it, and looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fidelity.table import archive
from service import REPO, ROLE, Instance

from applications.table import Application, applications
from applications.visit import Visit

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.applications]
ROWS = {row.name: row for row in applications()}
AHEAD = 2  # builds under way at once
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


class Builds:
    """The images of the selected rows, some of them begun ahead of the test that asks."""

    def __init__(self, service: Instance, names: list[str]) -> None:
        self.service, self.waiting, self.begun = service, names, dict[str, str]()

    def begin(self, row: Application) -> str:
        directory = REPO / "tests/applications/images" / row.name
        files: dict[str, bytes | str] = {
            str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }  # fmt: skip
        files |= row.files()
        uri = self.service.upload(archive(files), f"{row.name}.zip")
        return self.service.create(row.name, uri, resources=[{"minimumMemoryInMiB": row.memory}])

    def of(self, name: str) -> str:
        for one in [name, *(other for other in self.waiting if other != name)][:AHEAD]:
            if one not in self.begun:
                self.begun[one] = self.begin(ROWS[one])
        self.waiting = [one for one in self.waiting if one != name]
        return self.begun[name]


@pytest.fixture(scope="session")
def application_builds(request: pytest.FixtureRequest, service: Instance) -> Builds:
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function) and "application_builds" in item.fixturenames]
    return Builds(service, [item.callspec.params["name"] for item in chosen])


def log_of(service: Instance, name: str) -> str:
    pages = (
        service.client("logs")
        .get_paginator("filter_log_events")
        .paginate(logGroupName=f"/aws/lambda-microvms/{name}", logStreamNamePrefix="build/")
    )
    return "\n".join(event["message"] for page in pages for event in page["events"])


@pytest.fixture
def visit(service: Instance, application_builds: Builds, name: str, tmp_path: Path) -> Iterator[Visit]:
    row = ROWS[name]
    arn = application_builds.of(name)
    build = service.built(arn, seconds=row.times)
    assert build["buildState"] == "SUCCESSFUL", f"{build.get('stateReason')}\n{log_of(service, name)[-4000:]}"
    vm = service.launch(arn, **{"idlePolicy": POLICY, "executionRoleArn": ROLE, **row.launch})
    one = Visit(service, vm, row.port, tmp_path)
    yield one
    service.terminate(one.identifier)
    service.client().delete_microvm_image(imageIdentifier=arn)


@pytest.mark.parametrize("name", list(ROWS))
def test_an_application(visit: Visit, name: str) -> None:
    try:
        ROWS[name].use(visit)
    except BaseException:
        print(visit.instance.command("torpor", "logs", visit.identifier, check=False).stdout[-6000:])
        raise
    assert visit.sleeps, "it has slept"
    visit.awake()
