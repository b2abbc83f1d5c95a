"""What leaves the host: spans to an OTLP endpoint, log events to a CloudWatch Logs endpoint; and the service's own log."""

from __future__ import annotations

import asyncio
import errno
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import structlog
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from waiting import until

from gateway.observe import log as observe_log
from gateway.observe.spans import Spans
from gateway.observe.steps import Steps
from gateway.sessions import shipping
from gateway.sessions.logs import LogStore
from gateway.sessions.shipping import Shipper

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.BaseHTTPRequestHandler):
    seen: list[Any]

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen += [span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    handler = type("Handler", (Collector,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", handler.seen  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


def test_spans_of_holds_and_resumes(collector: tuple[str, list[Any]]) -> None:
    endpoint, seen = collector
    spans = Spans(endpoint, "test")
    spans.hold(0.25, "microvm-1", f"00-{TRACE}-{PARENT}-01")
    spans.hold(0.1, "microvm-1", "nonsense")
    steps = Steps("control", "resume")
    steps.mark("prepared by the host")
    steps.mark("cont")
    spans.steps(steps, "microvm-1")
    spans._tracer.span_processor.force_flush()
    by_name: dict[str, list[Any]] = {}
    for span in seen:
        by_name.setdefault(span.name, []).append(span)
    held, other = by_name["hold"]
    assert (held.trace_id.hex(), held.parent_span_id.hex()) == (TRACE, PARENT)
    assert held.end_time_unix_nano - held.start_time_unix_nano == 250_000_000
    assert other.trace_id.hex() != TRACE
    (resume,) = by_name["resume"]
    for name in ("prepared by the host", "cont"):
        assert by_name[name][0].parent_span_id == resume.span_id
    assert resume.attributes[0].value.string_value == "microvm-1"


def test_without_an_endpoint_nothing_is_made() -> None:
    spans = Spans("", "test")
    assert not spans.is_on
    spans.hold(1, "s", "")
    spans.steps(Steps("control", "resume"), "s")


@pytest.fixture(scope="module")
def cloudwatch() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def client(endpoint: str) -> Any:
    return boto3.client(
        "logs", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b",
        config=Config(retries={"max_attempts": 1}, connect_timeout=1),
    )  # fmt: skip


def test_log_events_are_sent_in_order_and_once(tmp_path: Path, cloudwatch: str) -> None:
    store, name = LogStore(tmp_path / "logs"), ("123456789012", "/aws/lambda-microvms/a", "2026/11/25[1.0]microvm-1")
    store.append(*name, [f"line {number}" for number in range(3)])
    shipper = Shipper(store, tmp_path / "sent.db", lambda: client(cloudwatch))
    assert shipper.ship(name)
    store.append(*name, ["line 3", ""])
    again = Shipper(store, tmp_path / "sent.db", lambda: client(cloudwatch))  # as after a restart
    assert again.ship(name) and again.ship(name)
    events = client(cloudwatch).get_log_events(logGroupName=name[1], logStreamName=name[2], startFromHead=True)["events"]
    assert [event["message"] for event in events] == ["line 0", "line 1", "line 2", "line 3", " "]


async def test_a_stream_that_cannot_be_sent_keeps_no_other_from_being_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LogStore(tmp_path / "logs")
    for stream in ("a", "b", "c"):
        store.append("1", "g", stream, ["x"])
    shipper, sent = Shipper(store, tmp_path / "sent.db", lambda: None), []

    def ship(name: tuple[str, str, str]) -> bool:
        sent.append(name[2])
        if name[2] == "a":
            raise ClientError({"Error": {"Code": "InvalidParameterException"}}, "PutLogEvents")
        if name[2] == "b" and sent.count("b") == 1:
            raise OSError(28, "No space left on device")
        return True

    monkeypatch.setattr(shipper, "ship", ship)
    monkeypatch.setattr(shipping, "_AWAY_SECONDS", 0.001)
    task = asyncio.create_task(shipper.run())
    await until(lambda: sent.count("a") > 2)
    task.cancel()
    assert (sent.count("b"), sent.count("c")) == (2, 1)


def test_an_endpoint_that_is_away_loses_nothing(tmp_path: Path, cloudwatch: str) -> None:
    store, name = LogStore(tmp_path / "logs"), ("123456789012", "/away", "s")
    store.append(*name, ["kept"])
    with pytest.raises(Exception, match="Could not connect"):
        Shipper(store, tmp_path / "sent.db", lambda: client("http://127.0.0.1:1")).ship(name)
    assert Shipper(store, tmp_path / "sent.db", lambda: client(cloudwatch)).ship(name)
    assert client(cloudwatch).get_log_events(logGroupName="/away", logStreamName="s")["events"][0]["message"] == "kept"


def test_a_trouble_of_the_host_is_one_line_and_a_fault_of_ours_has_its_trace(capfd: pytest.CaptureFixture[str]) -> None:
    """A day on which descriptors ran short filled the log with traces of where each try had met that."""
    before = structlog.get_config()
    try:
        observe_log.configure("vmm")
        log = structlog.get_logger()
        for error in (
            OSError(errno.EMFILE, "Too many open files", "/sessions/a"),
            OSError(errno.EBADF, "Bad file descriptor"),
            KeyError("x"),
        ):
            try:
                raise error
            except Exception as caught:
                log.exception("housekeeping.failed", step="logs")
                log.error("task.failed", error=repr(caught), exc_info=caught)
    finally:
        structlog.configure(**before)
        structlog.contextvars.clear_contextvars()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line.get("exception", "")[:9] for line in lines] == ["", "", *["Traceback"] * 4]
    assert [line["error"] for line in lines[:2]] == ["[Errno 24] Too many open files: '/sessions/a'"] * 2 and lines[0]["step"] == "logs"
