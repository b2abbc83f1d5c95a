"""The edge in operation: HTTP/2 to a sleeping microVM, reloads under load, listeners, metrics, the access log."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import BIN, PATIENCE, Instance, until
from wire import Endpoint, get, read_until

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def guest(instance: Instance, app: str) -> Iterator[dict[str, Any]]:
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    made = instance.launch(app, idlePolicy=policy)
    made["token"] = instance.token(made["microvmId"])
    yield made
    instance.terminate(made["microvmId"])


def ca(instance: Instance) -> Path:
    return instance.root / "tls/ca.crt"


def client(instance: Instance, guest: dict[str, Any], http2: bool) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(ca(instance)))
    headers = {"X-aws-proxy-auth": guest["token"]}
    return httpx.Client(
        verify=context, http1=not http2, http2=http2, headers=headers, timeout=40 * PATIENCE, base_url=f"https://{guest['endpoint']}"
    )


def test_http2_wakes_a_sleeping_microvm_once(instance: Instance, guest: dict[str, Any]) -> None:
    instance.client().suspend_microvm(microvmIdentifier=guest["microvmId"])
    instance.state(guest["microvmId"], "SUSPENDED")
    with client(instance, guest, True) as http:
        body = b"x" * 200_000
        answer = http.post("/echo", content=body)  # held with a body that is larger than a stream's first window
        assert answer.content == body and answer.http_version == "HTTP/2"
        timing = answer.headers["server-timing"]
        assert timing.startswith("hold;dur=") and "resume;dur=" in timing and "connect;dur=" in timing
        assert "server-timing" not in http.get("/state").headers


def test_reload_under_load_fails_no_request(instance: Instance, guest: dict[str, Any]) -> None:
    """Two reloads while clients of both protocols ask without a pause, on connections that they keep."""
    stop, counts, failures = threading.Event(), [0, 0, 0], []

    def ask(number: int, http2: bool) -> None:
        with client(instance, guest, http2) as http:
            while not stop.is_set():
                try:
                    answer = http.post("/echo", content=b"again")
                    assert (answer.status_code, answer.content) == (200, b"again")
                    counts[number] += 1
                except Exception as error:
                    failures.append(repr(error))
                    return

    threads = [threading.Thread(target=ask, args=one) for one in ((0, False), (1, True), (2, True))]
    before = get(guest["endpoint"], ca(instance), guest["token"], "/state").json()["counter"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            seen = list(counts)
            until(lambda seen=seen: all(now > then + 5 for now, then in zip(counts, seen, strict=True)) or failures)
            old = instance.pid_of("edge-0")
            done = subprocess.run(
                [str(BIN / "torpor"), "reload"], env=instance.environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert not done.returncode, done.stderr
            assert instance.pid_of("edge-0") != old
        seen = list(counts)
        until(lambda: all(now > then + 5 for now, then in zip(counts, seen, strict=True)) or failures)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert get(guest["endpoint"], ca(instance), guest["token"], "/state").json()["counter"] == before + sum(counts)  # none twice


def test_balancer_says_who_the_client_is(instance: Instance, guest: dict[str, Any]) -> None:
    """127.0.0.9 may send a PROXY header (conftest.py); others may not."""
    header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c" + bytes([203, 0, 113, 7, 127, 0, 0, 1, 0x30, 0x39, 1, 0xBB])
    context = ssl.create_default_context(cafile=str(ca(instance)))

    def ask(source: str, first: bytes, path: str) -> bytes:
        raw = socket.create_connection(("127.0.0.1", instance.edge_port), 10, (source, 0))
        raw.sendall(first)
        with context.wrap_socket(raw, server_hostname=guest["endpoint"].partition(":")[0]) as one:
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: {guest['endpoint']}\r\nX-aws-proxy-auth: {guest['token']}\r\n\r\n".encode())
            return one.recv(12)

    assert ask("127.0.0.9", header, "/state?balanced") == b"HTTP/1.1 200"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask("127.0.0.1", header, "/state")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask("127.0.0.9", b"", "/state")
    until(lambda: {"client": "203.0.113.7", "path": "/state", "status": 200} in lines(instance), 5)
    assert not [line for line in lines(instance) if line["client"] == "203.0.113.7" and line["status"] != 200]


def lines(instance: Instance) -> list[dict[str, Any]]:
    """Who asked for what, and what came of it, as far as the access log says it yet: workers write it every now and then."""
    whole, _, _ = (instance.directory / "access.log").read_text().rpartition("\n")
    return [{name: line[name] for name in ("client", "path", "status")} for line in map(json.loads, whole.splitlines())]


def test_unix_socket_and_redirect(instance: Instance, guest: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=str(ca(instance)))
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(instance.directory / "edge.sock"))
    raw.sendall(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00")  # a local peer is trusted with a header, and here sends one
    with context.wrap_socket(raw, server_hostname=guest["endpoint"].partition(":")[0]) as one:
        one.sendall(f"GET /state HTTP/1.1\r\nHost: {guest['endpoint']}\r\nX-aws-proxy-auth: {guest['token']}\r\n\r\n".encode())
        assert one.recv(12) == b"HTTP/1.1 200"
    port = int(instance.environment["TORPOR_EDGE__REDIRECT_PORT"])
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        plain.sendall(b"GET /a?b=c HTTP/1.1\r\nHost: x.localhost:80\r\n\r\n")
        answer = plain.recv(4096)
    assert b"308" in answer.split(b"\r\n")[0] and b"Location: https://x.localhost:%d/a?b=c\r\n" % instance.edge_port in answer


def test_sockets_that_systemd_passes(host_before: dict[str, set[str]]) -> None:
    """sd_listen_fds(3): descriptors from 3 on, for the process that LISTEN_PID names."""
    one = Instance("testa", 700_000 + 7 * 262_144, EDGE__ADDRESSES=json.dumps(["127.0.0.1", "systemd"]), STANDBYS__LINKS="0")
    activate = 'exec 3<&$0; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    with socket.create_server(("127.0.0.1", 0)) as passed:
        try:
            one.start(("/bin/bash", "-c", activate, str(passed.fileno())), (passed.fileno(),))
            context = ssl.create_default_context(cafile=str(ca(one)))
            for port in (passed.getsockname()[1], one.edge_port):
                host = f"{uuid.uuid4()}.lambda-microvm.us-east-1.localhost"
                with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20), server_hostname=host) as client:
                    client.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                    assert client.recv(12) == b"HTTP/1.1 403"
        finally:
            if one.process is not None:
                one.stop()
            one.remove()


def test_metrics_count_what_was_answered(instance: Instance, guest: dict[str, Any]) -> None:
    url = f"http://127.0.0.1:{instance.environment['TORPOR_API__METRICS_PORT']}/metrics"

    def value(name: str) -> float:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        return float(next((line.split()[-1] for line in text.splitlines() if line.startswith(name)), "0"))

    name = 'torpor_edge_answers_total{protocol="HTTP/1.1",status="4xx"}'
    before = value(name)
    assert get(guest["endpoint"], ca(instance), "nonsense").status == 403
    until(lambda: value(name) >= before + 1, 5)
    assert value('torpor_transitions_total{event="suspend"}') > 0 and value('torpor_action_seconds_count{action="wake"}') > 0


def test_half_closed_clients_are_answered(instance: Instance, guest: dict[str, Any]) -> None:
    """close_notify after the request: the answer still comes, and then the end."""
    one = Endpoint(guest["endpoint"], ca(instance))
    one.request("/slow?s=0.3", guest["token"])
    raw = one.sock
    raw.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLSyscallError):
        raw._sslobj.shutdown()  # type: ignore[attr-defined]  # unwrap() would wait for the other half
    raw.settimeout(20)
    assert read_until(raw, b"slow").startswith(b"HTTP/1.1 200")
    with pytest.raises(ssl.SSLZeroReturnError):  # close_notify, and nothing before it
        raw.recv(4096)
    one.close()
