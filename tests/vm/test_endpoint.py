"""The endpoint against a real microVM: bodies, refusals, tunnels, with real clients."""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from service import PATIENCE, Instance
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wire import Endpoint, get

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def ca(instance: Instance) -> Path:
    return instance.root / "tls/ca.crt"


@pytest.fixture(scope="module")
def shared(instance: Instance, app: str) -> Any:
    made = instance.launch(app)
    made["token"] = instance.token(made["microvmId"])
    yield made
    instance.terminate(made["microvmId"])


def test_keep_alive_and_pipelining(shared: dict[str, Any], ca: Path) -> None:
    one = Endpoint(shared["endpoint"], ca)
    for path in ("/fields", "/state", "/empty", "/fields"):
        one.request(path, shared["token"])
    assert [one.answer().status for _ in range(4)] == [200, 200, 204, 200]
    one.close()


def test_what_is_stripped_and_added(shared: dict[str, Any], ca: Path) -> None:
    answer = get(
        shared["endpoint"],
        ca,
        shared["token"],
        "/fields",
        X_aws_proxy_port="8080",
        X_aws_proxy_other="1",
        Traceparent="00-1",
        Connection="x-gone",
        X_gone="1",
    )
    fields = answer.json()["fields"]
    assert not [name for name in fields if name.startswith("x-aws-proxy-") or name.startswith("x-forwarded")]
    assert "x-gone" not in fields and "connection" not in fields
    assert fields["host"] == shared["endpoint"] and fields["traceparent"] == "00-1"
    assert fields["x-amzn-requestid"] == answer.fields["x-amzn-requestid"]


def test_bodies_of_every_framing(shared: dict[str, Any], ca: Path) -> None:
    data = os.urandom(300_000)
    one = Endpoint(shared["endpoint"], ca)
    one.request("/echo", shared["token"], "POST", data)
    assert one.answer().body == data
    one.send(
        f"POST /echo HTTP/1.1\r\nHost: {shared['endpoint']}\r\nX-aws-proxy-auth: {shared['token']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    for at in range(0, 5000, 1000):
        one.send(b"3e8\r\n" + data[at : at + 1000] + b"\r\n")
    one.send(b"0\r\n\r\n")
    assert one.answer().body == data[:5000]
    one.request("/big?n=3000000", shared["token"])
    assert len(one.answer().body) == 3_000_000
    one.request("/state", shared["token"], "HEAD")
    answer = one.answer(head_only=True)
    assert answer.status == 200 and int(answer.fields["content-length"]) > 0
    one.close()


def test_stream_arrives_as_it_is_sent(shared: dict[str, Any], ca: Path) -> None:
    one = Endpoint(shared["endpoint"], ca)
    one.request("/stream?n=3&s=0.3", shared["token"])
    started, seen, data = time.monotonic(), [], b""
    while b"0\r\nx-end: yes\r\n" not in data.lower():  # the trailer, too
        piece = one.sock.recv(65536)
        assert piece, data
        data += piece
        seen.append(time.monotonic() - started)
    assert seen[0] < 0.25 * PATIENCE and seen[-1] - seen[0] > 0.35, seen
    one.close()


def test_expect_and_early_response(shared: dict[str, Any], ca: Path) -> None:
    one = Endpoint(shared["endpoint"], ca)
    head = f"POST /echo HTTP/1.1\r\nHost: {shared['endpoint']}\r\nX-aws-proxy-auth: {shared['token']}\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    one.send(head.encode())
    assert b"100 Continue" in one.sock.recv(1000)
    one.send(b"abc")
    assert one.answer().body == b"abc"
    one.send(
        head.replace("/echo", "/early")
        .replace("Content-Length: 3", "Content-Length: 100000000")
        .replace("Expect: 100-continue\r\n", "")
        .encode()
    )
    assert one.answer().status == 413
    one.close()


@pytest.mark.parametrize(
    ("change", "status", "body"),
    [
        ({"token": None}, 403, b"Request missing authentication"),
        ({"token": "nonsense"}, 403, b"Request missing authentication"),
        ({"cut": True}, 403, b"Token authentication failed"),
        ({"other": True}, 403, b"Token authentication failed"),
        ({"host": "00000000-0000-0000-0000-000000000000.lambda-microvm.us-east-1.localhost"}, 403, b"Token authentication failed"),
        ({"ports": [{"port": 9000}]}, 403, b"Access to port denied"),
        ({"X_aws_proxy_port": "http"}, 400, b"X-aws-proxy-port must be a number from 1 to 65535"),
    ],
)
def test_refusals(instance: Instance, app: str, shared: dict[str, Any], ca: Path, change: dict[str, Any], status: int, body: bytes) -> None:
    token: str | None = shared["token"]
    fields = {name: value for name, value in change.items() if name in ("host", "X_aws_proxy_port")}
    if "token" in change:
        token = change["token"]
    elif "cut" in change:
        head, _, rest = shared["token"].partition("..")
        token = f"{head}..{rest[:-8]}AAAAAAAA"
    elif "ports" in change:
        token = instance.token(shared["microvmId"], change["ports"])
    elif "other" in change:
        stranger = instance.client().run_microvm(imageIdentifier=app)
        token = instance.token(stranger["microvmId"])
        instance.client().terminate_microvm(microvmIdentifier=stranger["microvmId"])
    answer = get(shared["endpoint"], ca, token, **fields)
    assert (answer.status, answer.body) == (status, body)
    assert "x-amzn-requestid" in answer.fields
    if status == 403:
        assert answer.fields["cache-control"] == "private, no-store"


def test_terminated_microvm_is_a_502(instance: Instance, app: str, ca: Path) -> None:
    made = instance.launch(app)
    token = instance.token(made["microvmId"])
    instance.terminate(made["microvmId"])
    answer = get(made["endpoint"], ca, token)
    assert (answer.status, answer.body) == (502, b"")
    instance.client().terminate_microvm(microvmIdentifier=made["microvmId"])
    with pytest.raises(instance.client().exceptions.ValidationException, match="has been terminated and its state cannot be changed"):
        instance.client().suspend_microvm(microvmIdentifier=made["microvmId"])


def test_garbage_plain_http_and_half_a_handshake_harm_nobody(instance: Instance, shared: dict[str, Any], ca: Path) -> None:
    ports = [instance.edge_port, int(instance.environment["TORPOR_API__PORT"]), int(instance.environment["TORPOR_API__METRICS_PORT"])]
    held = []
    for port in ports:
        for data in (
            b"\x00\xff" * 400,
            b"GET / HTTP/1.0\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/1.1\r\nHost: x\r\nX: \x01\r\n\r\n",
        ):
            one = socket.create_connection(("127.0.0.1", port), 5)
            one.sendall(data)
            held.append(one)
    assert get(shared["endpoint"], ca, shared["token"], "/state").status == 200
    for one in held:
        one.close()


def test_browser_websocket_rules(shared: dict[str, Any], ca: Path) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    token = shared["token"]
    authentication, port = f"lambda-microvms.authentication.{token}", "lambda-microvms.port.8080"
    url = f"wss://{shared['endpoint']}/ws"
    with connect(url, ssl=context, subprotocols=["lambda-microvms", authentication, port, "chat"], open_timeout=10 * PATIENCE) as one:
        assert one.subprotocol == "chat"
        one.send(b"\x00\x01" * 300)
        assert one.recv(timeout=5 * PATIENCE) == b"\x00\x01" * 300
    with connect(url, ssl=context, additional_headers={"X-aws-proxy-auth": token}, open_timeout=10 * PATIENCE) as one:
        one.send("text")
        assert one.recv(timeout=5 * PATIENCE) == "text"
    for offered in ([authentication, port], ["lambda-microvms", port], ["lambda-microvms", authentication, "lambda-microvms.port.0"]):
        with pytest.raises(InvalidStatus):
            connect(url, ssl=context, subprotocols=offered, open_timeout=10 * PATIENCE)


def test_tls_versions(instance: Instance, shared: dict[str, Any], ca: Path) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = context.maximum_version = version
        name = shared["endpoint"].partition(":")[0]
        raw = socket.create_connection(("127.0.0.1", instance.edge_port), 5)
        with raw, context.wrap_socket(raw, server_hostname=name) as one:
            assert one.version() == version.name.replace("_", ".")
    if socket.has_ipv6:
        with socket.create_connection(("::1", instance.edge_port), 5):
            pass


def test_the_link_answers_at_once_where_nothing_listens(instance: Instance, shared: dict[str, Any]) -> None:
    """A guest's reset has to find back to the host, though its socket, if it had one, would be bound to loopback."""

    def knock() -> int:
        with socket.socket() as sock:
            sock.settimeout(3)
            return sock.connect_ex(("169.254.77.2", 7777))

    assert instance.inside(shared["microvmId"], knock) == errno.ECONNREFUSED


def test_no_connection_of_ours_looks_like_one_that_the_guest_makes_to_itself(instance: Instance, shared: dict[str, Any], ca: Path) -> None:
    """Both are from 127.0.0.1 to 127.0.0.1 there: the ports differ."""

    def numbers() -> list[int]:
        opened = [socket.create_connection(("169.254.77.2", 8080), 3) for _ in range(50)]
        try:
            return [one.getsockname()[1] for one in opened]
        finally:
            for one in opened:
                one.close()

    assert all(10_000 <= number <= 32_767 for number in instance.inside(shared["microvmId"], numbers))
    for _ in range(3):
        body = json.dumps({"url": "http://127.0.0.1:8080/"}).encode()
        answer = get(shared["endpoint"], ca, shared["token"], "/fetch", method="POST", body=body)
        assert answer.json()["status"] == 200
