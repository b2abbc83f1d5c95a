"""One service for all applications, which may take their time under emulation; and the clients' packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from service import Instance, served

from applications.visit import INSTALLED


@pytest.fixture(scope="session")
def service(host_before: dict[str, set[str]]) -> Iterator[Instance]:
    assert INSTALLED.is_dir(), "the clients are missing: make applications-packages"
    sys.path.append(str(INSTALLED / "python"))  # last: what the tests have of their own comes first
    with served(Instance("apps", 700_000 + 4 * 262_144, IMAGES__START_SECONDS="150")) as one:
        yield one
