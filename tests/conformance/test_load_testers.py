"""Load testers as people use them, each sending a body and reading one: no request fails, every body is the right one, connections are kept."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from relay import Relay

pytestmark = [pytest.mark.vm, pytest.mark.conformance]
REQUESTS, CONNECTIONS = 200, 4
BODY = b"torpor sends this and reads it again; " * 500
AUTOCANNON = Path(sys.prefix) / "autocannon/node_modules/autocannon/autocannon.js"


class Target:
    """The endpoint behind a relay that counts connections."""

    def __init__(self, relay: Relay, guest: dict[str, Any], port: int, body: Path) -> None:
        self._relay = relay
        self.host, self.port, self.body = guest["host"], port, body
        self.field = f"X-aws-proxy-auth: {guest['token']}"
        self.token, self.ca = guest["token"], guest["ca"]
        self.url = f"https://{self.host}:{port}"

    def run(self, *command: str, **environment: str) -> str:
        """What a load tester prints; it ended well, and on no more connections than it was told to keep and two to look."""
        before = self._relay.accepted
        settings = os.environ | {"HOME": str(self.body.parent), "BODY": str(self.body)} | environment
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=90, check=False)
        said = done.stdout + done.stderr
        assert not done.returncode, said[-2000:]
        assert 1 <= self._relay.accepted - before <= CONNECTIONS + 2, said[-2000:]
        return said


@pytest.fixture
def target(guest: dict[str, Any], state: str, tmp_path: Path) -> Iterator[Target]:
    (tmp_path / "body").write_bytes(BODY)
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with Relay(listener, ("127.0.0.1", guest["port"]), 0) as relay:
        yield Target(relay, guest, listener.getsockname()[1], tmp_path / "body")


def numbers(pattern: str, said: str) -> list[int]:
    found = re.search(pattern, said)
    assert found, said[-3000:]
    return [int(one) for one in found.groups()]


def test_ab_k(target: Target) -> None:
    """It speaks HTTP/1.0 and asks for `Connection: Keep-Alive`."""
    said = target.run(
        *("ab", "-k", "-n", str(REQUESTS), "-c", str(CONNECTIONS), "-H", target.field),
        *("-p", str(target.body), "-T", "text/plain", f"{target.url}/echo"),
    )
    assert numbers(r"Complete requests: +(\d+)\nFailed requests: +(\d+)\nKeep-Alive requests: +(\d+)", said) == [REQUESTS, 0, REQUESTS]
    assert "Non-2xx" not in said
    assert numbers(r"HTML transferred: +(\d+)", said) == [REQUESTS * len(BODY)]


def test_siege(target: Target) -> None:
    rules = target.body.with_name("siegerc")
    rules.write_text("connection = keep-alive\nprotocol = HTTP/1.1\njson_output = true\nquiet = true\n")
    said = target.run(
        *("siege", "-R", str(rules), "-b", "-c", str(CONNECTIONS), "-r", str(REQUESTS // CONNECTIONS), "-H", target.field),
        *("--content-type", "text/plain", f"{target.url}/echo POST <{target.body}"),
    )
    counted = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert (counted["transactions"], counted["failed_transactions"], counted["availability"]) == (REQUESTS, 0, 100)
    assert counted["data_transferred"] == pytest.approx(REQUESTS * len(BODY) / 1e6, rel=0.06)  # in MB or MiB, two decimals


WRK = """
wrk.method = "POST"
local file = io.open(os.getenv("BODY"), "rb")
wrk.body = file:read("*a")
file:close()
local all = {}
function setup(thread) table.insert(all, thread) end
function init(arguments) right, wrong = 0, 0 end
function response(status, fields, body)
  if status == 200 and body == wrk.body then right = right + 1 else wrong = wrong + 1 end
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("right %d, wrong %d, errors %d\\n", all[1]:get("right"), all[1]:get("wrong"),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def test_wrk(target: Target) -> None:
    script = target.body.with_name("post.lua")
    script.write_text(WRK)
    said = target.run("wrk", "-t1", f"-c{CONNECTIONS}", "-d3s", "-s", str(script), "-H", target.field, f"{target.url}/echo")
    right, wrong, errors = numbers(r"right (\d+), wrong (\d+), errors (\d+)", said)
    assert right > CONNECTIONS and (wrong, errors) == (0, 0), said


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
def test_hey(target: Target, version: str) -> None:
    said = target.run(
        *("hey", *(["-h2"] if version == "HTTP/2" else []), "-n", str(REQUESTS), "-c", str(CONNECTIONS), "-m", "POST"),
        *("-D", str(target.body), "-H", target.field, f"{target.url}/echo"),
    )
    assert numbers(r"\[200\]\s+(\d+) responses", said) == [REQUESTS] and "Error distribution" not in said
    assert numbers(r"Total data:\s+(\d+) bytes", said) == [REQUESTS * len(BODY)]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
def test_h2load_with_a_body(target: Target, version: str) -> None:
    said = target.run(
        *(
            "h2load",
            *(["--h1"] if version == "HTTP/1.1" else []),
            "-n",
            str(REQUESTS),
            "-c",
            str(CONNECTIONS),
            "-m",
            "5",
            "-d",
            str(target.body),
            "-H",
            target.field,
        ),
        f"{target.url}/echo",
    )
    assert f"{REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout" in said and f"status codes: {REQUESTS} 2xx" in said
    assert numbers(r"\((\d+)\) data", said) == [REQUESTS * len(BODY)]


def test_httperf(target: Target) -> None:
    """A session of its own language: a body up, and one down, on each connection, again and again.

    httperf waits for ever for an answer whose last TLS record comes in two pieces, though it has read both (strace shows it): what it is
    to read comes in one."""
    up, down, calls = 2000, 5_000, REQUESTS // CONNECTIONS // 2
    session = target.body.with_name("session")
    session.write_text(f'/echo method=POST contents="{"x" * up}"\n/big?n={down}\n' * calls)
    said = target.run(
        *("httperf", "--ssl", "--server", target.host, "--port", str(target.port), "--timeout", "30"),
        *(f"--wsesslog={CONNECTIONS},0,{session}", "--add-header", f"{target.field}\\n"),
    )
    assert numbers(r"Total: connections (\d+) requests (\d+) replies (\d+)", said) == [CONNECTIONS, REQUESTS, REQUESTS]
    assert numbers(r"Reply status: 1xx=0 2xx=(\d+)", said) == [REQUESTS] and "Errors: total 0 " in said
    assert numbers(r"content (\d+)\.0 footer", said) == [(up + down) // 2]


def test_autocannon(target: Target) -> None:
    assert AUTOCANNON.exists(), "make conformance installs it"
    said = target.run(
        *("node", str(AUTOCANNON), "--json", "-a", str(REQUESTS), "-c", str(CONNECTIONS), "-m", "POST", "-i", str(target.body)),
        *("--expectBody", BODY.decode(), "-H", target.field, f"{target.url}/echo"),
        NODE_EXTRA_CA_CERTS=target.ca,
    )
    counted = json.loads(said[said.index('{"url"') :])
    assert {name: counted[name] for name in ("2xx", "non2xx", "errors", "timeouts", "mismatches", "resets")} == {
        "2xx": REQUESTS, "non2xx": 0, "errors": 0, "timeouts": 0, "mismatches": 0, "resets": 0,
    }  # fmt: skip


LOCUST = """
import os

from locust import HttpUser, events, task

with open(os.environ["BODY"], "rb") as file:
    BODY = file.read()


class User(HttpUser):
    def on_start(self):
        self.client.verify = os.environ["CA"]
        self.client.headers["X-aws-proxy-auth"] = os.environ["TOKEN"]

    @task
    def echo(self):
        with self.client.post("/echo", data=BODY, catch_response=True) as answer:
            if answer.content != BODY:
                answer.failure("another body")


@events.quitting.add_listener
def _(environment, **_):
    print("requests", environment.stats.total.num_requests, "failures", environment.stats.total.num_failures)
"""


def test_locust(target: Target) -> None:
    script = target.body.with_name("locustfile.py")
    script.write_text(LOCUST)
    said = target.run(
        *("/usr/bin/locust", "-f", str(script), "--headless", "-u", str(CONNECTIONS), "-r", str(CONNECTIONS), "-t", "3s"),
        *("--host", target.url, "--only-summary"), CA=target.ca, TOKEN=target.token,
    )  # fmt: skip
    requests, failures = numbers(r"requests (\d+) failures (\d+)", said)
    assert requests > CONNECTIONS and failures == 0, said[-2000:]
