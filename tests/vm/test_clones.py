"""Clones of one image draw different random numbers, each runtime from each of its generators, as docs/clones.md says; and what a sleep
does to timers, as docs/sleep.md says.

The programs in tests/clones drew from all of them before the snapshot; what they run in their hooks is what those pages say, verbatim.
"""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from service import REPO, Instance, until
from wire import get

pytestmark = pytest.mark.vm

PAGES = ("clones", "sleep")
HOOKS = {
    "port": 9000,
    "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 300},
    "microvmHooks": {"run": "ENABLED", "runTimeoutInSeconds": 30, "resume": "ENABLED", "resumeTimeoutInSeconds": 30},
}
# The same in every clone: until the program renews itself, and even then.
RENEWED: dict[str, set[str]] = {
    "python": {"random"}, "node": {"randomUUID", "randomInt"}, "node with its own OpenSSL": {"randomUUID", "randomInt"}, "perl": {"rand"},
    "ruby": {"rand", "shuffle"}, "php": {"mt_rand", "rand"}, "go": {"own"}, "java": {"DRBG", "Random", "SHA1PRNG"}, "openssl s_server": set(),
}  # fmt: skip
SAME: dict[str, set[str]] = {
    "node": {"Math.random, taken before"}, "node with its own OpenSSL": {"Math.random, taken before"}, "php": {"lcg_value"},
    "go": {"math/rand"}, "java": {"Math.random", "ThreadLocalRandom"},
}  # fmt: skip
CORE = ("python", "node", "perl", "openssl s_server")
MORE = "python3-pip ruby php-cli openjdk-17-jdk-headless golang-go"


def snippets() -> dict[str, bytes | str]:
    """The blocks that a line like "Python, `renew.py`" announces."""
    pages = "\n".join((REPO / f"docs/{name}.md").read_text(encoding="utf-8") for name in PAGES)
    found = dict(re.findall(r"^[A-Z][\w.]*, `([\w.]+)`[^\n]*\n(?:[^\n]+\n)*\n```\w+\n(.*?)^```", pages, re.S | re.M))
    assert sorted(found) == [
        "Renew.java", "alarm.js", "alarm.py", "renew.go", "renew.js", "renew.php", "renew.pl", "renew.py", "renew.rb",
    ]  # fmt: skip
    return found


def files(packages: str = "") -> dict[str, bytes | str]:
    programs = {path.name: path.read_text() for path in (REPO / "tests/clones").iterdir() if path.is_file()}
    dockerfile = programs["Dockerfile"].replace("python3 nodejs", f"python3 nodejs {packages}")
    return programs | snippets() | {"Dockerfile": dockerfile}


def ask(instance: Instance, vm: dict[str, Any], path: str) -> Any:
    return get(vm["endpoint"], instance.root / "tls/ca.crt", instance.token(vm["microvmId"]), path, x_aws_proxy_port="9000").json()


def drawn(instance: Instance, image: str, payload: str) -> list[dict[str, dict[str, Any]]]:
    """What two microVMs draw from each generator."""
    vms = [instance.launch(image, runHookPayload=payload) for _ in range(2)]
    try:
        return [ask(instance, vm, "/draw") for vm in vms]
    finally:
        instance.terminate(*(vm["microvmId"] for vm in vms))


def equal(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    return {runtime: {name for name, value in values.items() if value == other[runtime][name]} for runtime, values in one.items()}


def clones_differ(instance: Instance, image: str, runtimes: tuple[str, ...]) -> None:
    """They draw what nobody has to renew; then, renewed by the run hook, all that docs/clones.md does not except."""
    first = drawn(instance, image, "stay")
    assert set(first[0]) == set(runtimes)
    assert equal(*first) == {name: RENEWED[name] | SAME.get(name, set()) for name in runtimes}
    renewed = drawn(instance, image, "renew")
    assert equal(*renewed) == {name: SAME.get(name, set()) for name in runtimes}


def lines(instance: Instance, image: str) -> str:
    logs, group = instance.client("logs"), f"/aws/lambda-microvms/{image}"
    streams = logs.describe_log_streams(logGroupName=group)["logStreams"]
    events = [event for one in streams for event in logs.get_log_events(logGroupName=group, logStreamName=one["logStreamName"])["events"]]
    return "\n".join(event["message"] for event in events)


@pytest.fixture(scope="module")
def image(instance: Instance) -> str:
    arn = instance.create("clones", instance.upload(files(), "clones.zip"), hooks=HOOKS)
    build = instance.built(arn, seconds=240)
    assert build["buildState"] == "SUCCESSFUL", lines(instance, "clones")[-2000:]
    return arn


def test_two_microvms_draw_different_numbers(instance: Instance, image: str) -> None:
    clones_differ(instance, image, CORE)


def test_the_build_log_says_how_many_generators_were_seeded(instance: Instance, image: str) -> None:
    found = re.search(r"(\d+) random generators of OpenSSL were seeded", lines(instance, "clones"))
    assert found and int(found[1]) >= 6, "two at least of each program that links it"


def test_after_a_sleep_timers_of_the_wall_clock_fire_and_the_others_go_on(instance: Instance, image: str) -> None:
    vm = instance.launch(image, runHookPayload="stay")
    when = time.time() + 4
    ask(instance, vm, f"/schedule/{when}")
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    until(lambda: time.time() > when + 0.5)
    instance.client().resume_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "RUNNING")
    late = {"python": {"threading.Timer", "time.sleep"}, "node": {"setTimeout"}}
    in_time = {"python": {"alarm", "timerfd"}, "node": {"alarm"}}

    def fired() -> dict[str, set[str]]:
        return {runtime: set(names) for runtime, names in ask(instance, vm, "/fired").items()}

    assert fired() == in_time
    until(lambda: fired() == {name: in_time[name] | late[name] for name in late})
    instance.terminate(vm["microvmId"])


@pytest.mark.long
def test_two_microvms_draw_different_numbers_in_every_runtime(instance: Instance) -> None:
    """With Node and Python packages that have an OpenSSL built in, of another version than the base's."""
    image = instance.create("every-runtime", instance.upload(files(MORE), "every-runtime.zip"), hooks=HOOKS)
    build = instance.built(image, seconds=900)
    assert build["buildState"] == "SUCCESSFUL", lines(instance, "every-runtime")[-2000:]
    clones_differ(instance, image, tuple(RENEWED))
