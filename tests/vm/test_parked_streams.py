"""A WebSocket and an event stream whose microVM falls asleep: one goes on, with the same connections and application, one is cut."""

from __future__ import annotations

import contextlib
import ssl
import time
from typing import Any

import pytest
from service import Instance, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from wire import Endpoint, get, read_until

pytestmark = pytest.mark.vm


def websocket(instance: Instance, vm: dict[str, Any], app_port: int = 8080) -> ClientConnection:
    host, _, port = vm["endpoint"].partition(":")
    context = ssl.create_default_context(cafile=str(instance.root / "tls/ca.crt"))
    import socket

    raw = socket.create_connection(("127.0.0.1", int(port)))
    return connect(
        f"wss://{host}:{port}/",
        sock=raw,
        ssl=context,
        additional_headers={"X-aws-proxy-auth": vm["token"], "X-aws-proxy-port": str(app_port)},
        ping_interval=1,
        ping_timeout=5,
    )


def suspend(instance: Instance, vm: dict[str, Any]) -> None:
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    until(lambda: vm["microvmId"] not in instance.hypervisors())


def test_a_websocket_outlives_many_sleeps(instance: Instance, vm: dict[str, Any]) -> None:
    with websocket(instance, vm) as one, websocket(instance, vm) as two:
        for number in range(3):
            one.send(f"message {number}")
            assert one.recv(timeout=30) == f"message {number}"
            suspend(instance, vm)
            time.sleep(2.5)  # its client pings meanwhile, and is answered
            assert instance.describe(vm["microvmId"])["state"] == "SUSPENDED", "pings do not wake it"
        two.send("the other one")
        assert two.recv(timeout=30) == "the other one"
        one.send("and the first")
        assert one.recv(timeout=30) == "and the first"
        assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"], "/state").json()["counter"] == 5


def test_a_websocket_to_an_application_that_speaks_tls_outlives_sleeps(instance: Instance, vm: dict[str, Any]) -> None:
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"], "/tls").status == 200
    with websocket(instance, vm, 8443) as one:
        for number in range(3):
            one.send(f"message {number}")
            assert one.recv(timeout=30) == f"message {number}"
            suspend(instance, vm)
        one.send("the last")
        assert one.recv(timeout=30) == "the last"


def test_an_event_stream_is_cut_and_its_client_wakes_the_microvm(instance: Instance, vm: dict[str, Any]) -> None:
    """As an EventSource does: it connects again when its stream ends."""
    stream = Endpoint(vm["endpoint"], instance.root / "tls/ca.crt")
    stream.request("/stream?n=3&s=1.5", vm["token"])
    seen = read_until(stream.sock, b"data: 0")
    suspend(instance, vm)
    stream.sock.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while data := stream.sock.recv(4096):
            seen += data
    assert b"0\r\nx-end: yes" not in seen.lower()
    again = Endpoint(vm["endpoint"], instance.root / "tls/ca.crt")
    again.request("/stream?n=1&s=0.1", vm["token"])
    assert b"data: 0" in read_until(again.sock, b"0\r\nx-end: yes\r\n\r\n")


def test_restarts_of_vmm_and_control_leave_it_parked(instance: Instance, vm: dict[str, Any]) -> None:
    with websocket(instance, vm) as one:
        one.send("before")
        assert one.recv(timeout=30) == "before"
        suspend(instance, vm)
        instance.kill("vmm")
        instance.kill("control")
        until(lambda: instance.describe(vm["microvmId"])["state"] == "SUSPENDED")
        one.send("after")
        assert one.recv(timeout=30) == "after"


def test_termination_ends_it_with_1001(instance: Instance, app: str) -> None:
    policy = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
    vm = instance.launch(app, idlePolicy=policy)
    vm["token"] = instance.token(vm["microvmId"])
    with websocket(instance, vm) as one:
        one.send("x")
        one.recv(timeout=30)
        suspend(instance, vm)
        instance.terminate(vm["microvmId"])
        with pytest.raises(ConnectionClosed) as ended:
            one.recv(timeout=20)
        assert ended.value.rcvd is not None and ended.value.rcvd.code == 1001


def test_without_auto_resume_streams_are_cut(instance: Instance, app: str) -> None:
    vm = instance.launch(app)
    vm["token"] = instance.token(vm["microvmId"])
    with websocket(instance, vm) as one:
        one.send("x")
        one.recv(timeout=30)
        suspend(instance, vm)
        with pytest.raises(ConnectionClosed) as ended:
            one.recv(timeout=20)
        assert ended.value.rcvd is not None and ended.value.rcvd.code == 1001
    instance.terminate(vm["microvmId"])


def test_a_stop_lets_go_of_what_is_parked(instance: Instance, vm: dict[str, Any]) -> None:
    """Asleep before the stop, with a stream: the worker ends it with 1001, nothing of its network stays, and it wakes as any does."""
    with websocket(instance, vm) as one:
        one.send("x")
        one.recv(timeout=30)
        suspend(instance, vm)
        instance.stop()
        assert not list((instance.run / instance.name).glob("netns/*"))
        with pytest.raises(ConnectionClosed):
            one.recv(timeout=20)
        instance.start()
    assert get(vm["endpoint"], instance.root / "tls/ca.crt", vm["token"]).json()["counter"] == 2
