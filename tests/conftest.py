"""Fixtures by stage: `instance` (a service), `app` (its image, built once), `vm` (a running microVM of it)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import host_state
import hypothesis
import pytest
import uvloop
from known_keys import KEYS
from outside import NAME_SERVER, PORT, PRIVATE, Outside, outside
from scratch import scratch
from service import HOOKS, PATIENCE, Instance, app_files, everywhere, free_port, served

from vmm import seals

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
_QUIET = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("repeat", derandomize=True, **_QUIET)
hypothesis.settings.register_profile("explore", max_examples=2000, **_QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
_SCRATCH = pytest.StashKey[contextlib.ExitStack]()
seals.use(KEYS)  # of whatever a test writes and reads by itself
os.umask(0o022)  # users of the service's own read what tests make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerator", choices=("tcg", "kvm"), default="tcg", help="what the microVMs of tests/vm/test_drivers.py run under")
    parser.addoption("--firecracker", choices=("stand-in", "real"), default="stand-in", help="which one; the real one is on the path")
    parser.addoption("--setting", action="append", default=[], help="of every instance of the run: NAME=VALUE, as TORPOR_NAME has it")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The service's loop."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    """A run's temporary files and its home directory are in one directory that goes with it: pytest's own would stay in /tmp, which may be
    noexec, and nothing of a run may depend on what is in somebody's home, or be left there."""
    everywhere.update(one.split("=", 1) for one in config.getoption("--setting"))
    config.stash[_SCRATCH] = contextlib.ExitStack()
    if not hasattr(config, "workerinput") and not config.option.basetemp:
        directory = config.stash[_SCRATCH].enter_context(scratch(".torpor-tests-"))  # not of a name that the leak check looks for
        os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = str(directory)
        config.option.basetemp = directory / "t"


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_SCRATCH].close()


@pytest.fixture(scope="session")
def host_before(request: pytest.FixtureRequest) -> Iterator[dict[str, set[str]]]:
    """Torn down last of all: the host is then as it was."""
    before = host_state.snapshot()
    yield before
    if os.geteuid() == 0:
        left = host_state.left(before, host_state.snapshot())
        assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def outside_world(host_before: dict[str, set[str]]) -> Iterator[Outside]:
    with outside() as one:
        yield one


@pytest.fixture(scope="session")
def instance(outside_world: Outside) -> Iterator[Instance]:
    one = Instance(
        "test", 700_000, IMAGES__START_SECONDS="20", EDGE__HOLD_SECONDS=str(30 * PATIENCE), EGRESS__CLOSED="false", EGRESS__UPLINK=outside_world.path,
        EGRESS__RESOLVERS=json.dumps([NAME_SERVER]), EGRESS__SUBNETS=json.dumps({"subnet-1": [f"{PRIVATE}/32"], "subnet-all": ["0.0.0.0/0"], "subnet-none": []}),
        EGRESS__SECURITY_GROUPS=json.dumps({"sg-1": [f"tcp:{PORT}"], "sg-names": [f"https:example.com:{PORT}", f"http:example.com:{PORT + 1}"]}),
    )  # fmt: skip
    log = one.directory / "access.log"
    one.environment |= {
        "TORPOR_EDGE__ACCESS_LOG": str(log), "TORPOR_EDGE__REDIRECT_PORT": str(free_port()),
        "TORPOR_EDGE__ADDRESSES": json.dumps(["127.0.0.1", "::1", f"unix:{one.directory}/edge.sock"]),
        "TORPOR_EDGE__PROXY_PROTOCOL_FROM": json.dumps(["127.0.0.9/32"]),
    }  # fmt: skip
    with served(one):
        yield one


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, instance: Instance) -> dict[str, str]:
    """The builds of those shared images that the run's tests want, under way together."""
    made = {"app": instance.create("app", instance.upload(app_files()))}
    if any("hooked" in getattr(item, "fixturenames", ()) for item in request.session.items):
        uri = instance.upload(app_files(), "hooked.zip")
        made["hooked"] = instance.create("hooked", uri, hooks=HOOKS, environmentVariables={"COLOUR": "blue"})
    return made


@pytest.fixture(scope="session")
def app(instance: Instance, builds: dict[str, str]) -> str:
    """The test application's image, without hooks."""
    build = instance.built(builds["app"])
    assert build["buildState"] == "SUCCESSFUL", build
    return builds["app"]


@pytest.fixture(scope="session")
def hooked(instance: Instance, app: str, builds: dict[str, str]) -> str:
    """The same with every runtime hook and the ready hook."""
    build = instance.built(builds["hooked"])
    assert build["buildState"] == "SUCCESSFUL", build
    return builds["hooked"]


@pytest.fixture
def vm(instance: Instance, app: str) -> Iterator[dict[str, Any]]:
    """A running microVM that wakes on requests and is never idle for long enough to sleep by itself."""
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    made = instance.launch(app, idlePolicy=policy, executionRoleArn="arn:aws:iam::123456789012:role/test")
    made["token"] = instance.token(made["microvmId"])
    yield made
    if instance.process is not None:
        instance.terminate(made["microvmId"])
