"""Clones of one image draw different random numbers, each runtime from each of its generators, as docs/clones.md says.

The programs in tests/clones drew from all of them before the snapshot; how they renew themselves is what that page says, verbatim.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from service import REPO, Instance
from wire import get

pytestmark = pytest.mark.vm

FILES = {
    "python": "renew.py", "js": "renew.js", "ruby": "renew.rb", "php": "renew.php", "java": "Renew.java", "go": "renew.go",
    "perl": "renew.pl",
}  # fmt: skip
HOOKS = {
    "port": 9000,
    "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 300},
    "microvmHooks": {"run": "ENABLED", "runTimeoutInSeconds": 30},
}
# The same in every clone: until the program renews itself, and even then.
RENEWED: dict[str, set[str]] = {
    "python": {"random"}, "node": {"randomUUID", "randomInt"}, "node with its own OpenSSL": {"randomUUID", "randomInt"}, "perl": {"rand"},
    "ruby": {"rand", "shuffle"}, "php": {"mt_rand", "rand"}, "go": {"own"}, "java": {"DRBG", "Random"}, "openssl s_server": set(),
}  # fmt: skip
SAME: dict[str, set[str]] = {
    "node": {"Math.random, taken before"}, "node with its own OpenSSL": {"Math.random, taken before"}, "php": {"lcg_value"},
    "go": {"math/rand"}, "java": {"Math.random", "ThreadLocalRandom", "new Random", "SHA1PRNG"},
}  # fmt: skip
CORE = ("python", "node", "perl", "openssl s_server")
MORE = "python3-pip ruby php-cli openjdk-17-jdk-headless golang-go"


def snippets() -> dict[str, bytes | str]:
    text = (REPO / "docs/clones.md").read_text(encoding="utf-8")
    return {FILES[kind]: code for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M) if kind in FILES}


def files(packages: str = "") -> dict[str, bytes | str]:
    made = {path.name: path.read_bytes() for path in (REPO / "tests/clones").iterdir() if path.is_file()} | snippets()
    dockerfile = (REPO / "tests/clones/Dockerfile").read_text().replace("python3 nodejs", f"python3 nodejs {packages}")
    assert set(FILES.values()) <= set(made)
    return made | {"Dockerfile": dockerfile}


def drawn(instance: Instance, image: str, payload: str) -> list[dict[str, dict[str, Any]]]:
    """What two microVMs draw from each generator."""
    vms = [instance.launch(image, runHookPayload=payload) for _ in range(2)]
    ca = instance.root / "tls/ca.crt"
    try:
        return [get(vm["endpoint"], ca, instance.token(vm["microvmId"]), "/draw", x_aws_proxy_port="9000").json() for vm in vms]
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


def test_two_microvms_draw_different_numbers(instance: Instance) -> None:
    image = instance.create("clones", instance.upload(files(), "clones.zip"), hooks=HOOKS)
    build = instance.built(image, seconds=240)
    said = lines(instance, "clones")
    assert build["buildState"] == "SUCCESSFUL", said[-2000:]
    found = re.search(r"(\d+) random generators of OpenSSL were seeded", said)
    assert found and int(found[1]) >= 6, "two at least of each program that links it"
    clones_differ(instance, image, CORE)


@pytest.mark.long
def test_two_microvms_draw_different_numbers_in_every_runtime(instance: Instance) -> None:
    """With Node and Python packages that have an OpenSSL built in, of another version than the base's."""
    image = instance.create("every-runtime", instance.upload(files(MORE), "every-runtime.zip"), hooks=HOOKS)
    build = instance.built(image, seconds=900)
    assert build["buildState"] == "SUCCESSFUL", lines(instance, "every-runtime")[-2000:]
    clones_differ(instance, image, tuple(RENEWED))
