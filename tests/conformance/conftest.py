"""The conformance suite: one service, one image, one microVM; results become docs/conformance.md."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import REPO, Instance, served

HERE = Path(__file__).resolve().parent
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
_results: dict[str, list[tuple[str, str]]] = {}


def application() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in (HERE / "app").iterdir() if path.is_file()}
    files["app.py"] = (REPO / "tests/app/app.py").read_bytes()
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj", "/CN=guest",
         "-keyout", "/dev/stdout", "-out", "/dev/stdout"], capture_output=True, check=True, timeout=30,
    )  # fmt: skip
    return files | {"server.pem": made.stdout}


@pytest.fixture(scope="session")
def service(host_before: dict[str, set[str]]) -> Iterator[Instance]:
    """MicroVMs have a way out through the host's own network, as at most users': clients on the host are not to notice."""
    forwards = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwards.read_text()
    one = Instance("conform", 700_000 + 4 * 262_144, IMAGES__START_SECONDS="60", EGRESS__CLOSED="false")
    try:
        with served(one):
            yield one
    finally:
        forwards.write_text(before)


def log_of(service: Instance, build: str) -> str:
    events = service.client("logs").get_log_events(
        logGroupName="/aws/lambda-microvms/conformance", logStreamName=f"build/1.0/{build}", startFromHead=True
    )["events"]
    return "".join(f"\n{event['message']}" for event in events)[-3000:]


@pytest.fixture(scope="session")
def guest(service: Instance) -> dict[str, Any]:
    arn = service.create("conformance", service.upload(application()))
    build = service.built(arn, seconds=300)
    assert build["buildState"] == "SUCCESSFUL", build["stateReason"] + log_of(service, build["buildId"])
    made = service.launch(arn, idlePolicy=POLICY)
    made["token"] = service.token(made["microvmId"], minutes=60)
    made["ca"] = str(service.root / "tls/ca.crt")
    made["host"], _, port = made["endpoint"].partition(":")
    made["port"] = int(port or 443)
    return made


@pytest.fixture(params=["running", "asleep"])
def state(request: pytest.FixtureRequest, service: Instance, guest: dict[str, Any]) -> str:
    """The same once with the microVM up and once with it suspended."""
    if request.param == "asleep":
        service.client().suspend_microvm(microvmIdentifier=guest["microvmId"])
        service.state(guest["microvmId"], "SUSPENDED")
    return str(request.param)


# ---- the table ----


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome == "failed":
        module, _, name = report.nodeid.partition("::")
        if "conformance" in module:
            outcome = f"known: {report.wasxfail}" if hasattr(report, "wasxfail") else report.outcome
            _results.setdefault(Path(module).stem, []).append((name, outcome))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Only a run of everything writes the table."""
    if os.environ.get("CONFORMANCE_TABLE"):
        Path(os.environ["CONFORMANCE_TABLE"]).write_text(table(), encoding="utf-8")


_TITLES = {
    "test_http1_messages": "RFC 9112: malformed and unusual messages",
    "test_http2_sections": "HTTP/2: RFC 9113, RFC 7541 and RFC 8441, by section",
    "test_websocket_cases": "WebSocket: Autobahn's cases through the edge, equal to those of the direct connection",
    "test_grpc_interop": "gRPC: interop's test names, grpcio's client and server",
    "test_scanners": "Scanners of TLS",
    "test_scanner_verdicts": "Scanners' verdicts on endpoints and the API, as they are kept in tests/conformance/verdicts",
    "test_load_testers": "Load testers: no request fails and connections are kept, with a running microVM and with one that is asleep",
    "test_clients": "Clients, each with a running microVM and with one that is asleep",
}


def table() -> str:
    lines = ["# Conformance", "", "Written by `make conformance`; every row is a test of that run. What is compared with what stands in"]
    lines += ["`tests/conformance/`.", ""]
    for module, title in _TITLES.items():
        rows = _results.get(module, [])
        good = sum(outcome == "passed" for _, outcome in rows)
        lines += [f"## {title}", "", f"{good} of {len(rows)} passed.", "", "| case | result |", "|---|---|"]
        lines += [f"| `{name.replace('|', '&#124;')}` | {outcome} |" for name, outcome in rows] + [""]
    return "\n".join(lines)
