"""Shells in a real microVM: the recorded frames, and `torpor shell` as a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import ssl
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest
from service import BIN, PATIENCE, Instance
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from wire import get

pytestmark = pytest.mark.vm
CONNECTOR = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:"
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}


@pytest.fixture(scope="module")
def vm(instance: Instance, app: str) -> Iterator[dict[str, Any]]:
    made = instance.launch(app, ingressNetworkConnectors=[CONNECTOR + "HTTP_INGRESS", CONNECTOR + "SHELL_INGRESS"], idlePolicy=POLICY)
    yield made
    instance.terminate(made["microvmId"])


def shell_token(instance: Instance, vm: dict[str, Any]) -> str:
    answer = instance.client().create_microvm_shell_auth_token(microvmIdentifier=vm["microvmId"], expirationInMinutes=5)
    return str(answer["authToken"]["X-aws-proxy-auth"])


def open_shell(instance: Instance, vm: dict[str, Any], **options: Any) -> ClientConnection:
    context = ssl.create_default_context(cafile=str(instance.root / "tls/ca.crt"))
    offered = ["lambda-microvms", f"lambda-microvms.authentication.{shell_token(instance, vm)}"]
    options = {"open_timeout": 10 * PATIENCE} | options
    return connect(f"wss://{vm['endpoint']}/shell", ssl=context, subprotocols=offered, compression=None, **options)  # type: ignore[arg-type]


def read_until(socket: ClientConnection, wanted: bytes) -> bytes:
    data, deadline = b"", time.monotonic() + 60 * PATIENCE
    while wanted not in data:
        message = socket.recv(timeout=min(20 * PATIENCE, deadline - time.monotonic()))
        assert isinstance(message, bytes), message
        data += message
    return data


def read_on(socket: ClientConnection, said: list[str | bytes] | None = None) -> None:
    """Reads until the connection is closed, which raises ConnectionClosed, and is within a minute."""
    deadline = time.monotonic() + 60 * PATIENCE
    while True:
        message = socket.recv(timeout=min(20 * PATIENCE, deadline - time.monotonic()))
        if said is not None:
            said.append(message)


def test_frames_of_the_recorded_shell(instance: Instance, vm: dict[str, Any]) -> None:
    with open_shell(instance, vm) as socket:
        assert socket.subprotocol == "lambda-microvms"
        first = json.loads(socket.recv(timeout=20 * PATIENCE))
        assert first["type"] == "session_init" and len(first["session_id"]) == 36
        read_until(socket, "λ $ ".encode())
        socket.send(json.dumps({"type": "resize", "cols": 133, "rows": 41}))
        socket.send(b"id -u; echo $TERM; stty size; tty; cat /proc/1/comm; pwd\n")
        told = read_until(socket, b"/app\r\n")
        for line in (b"0\r\nxterm\r\n", b"41 133\r\n", b"/dev/pts/", b"python3\r\n"):
            assert line in told, told
        socket.send('{"not": "ours"}')  # unrecognised text is typed
        assert b'{"not": "ours"}' in read_until(socket, b"ours")
        socket.send(b"\x15sh -c 'echo rea\"\"dy; exec sleep 100'\n")
        read_until(socket, b"ready")
        socket.send(b"\x1a")  # Ctrl-Z: job control
        read_until(socket, b"Stopped")
        socket.send(b"kill %1; exit 3\n")
        with pytest.raises(ConnectionClosed) as ended:
            read_on(socket)
    assert ended.value.rcvd is not None and (ended.value.rcvd.code, ended.value.rcvd.reason) == (1000, "shell exited")


def test_a_silent_shell_sleeps_with_its_microvm(instance: Instance, vm: dict[str, Any]) -> None:
    """Same terminal, same processes, its variables too; a resize wakes nobody, a key does. Twice, and the exit code is told."""
    with open_shell(instance, vm, additional_headers={"X-torpor-exit-code": "1"}) as socket:
        socket.recv(timeout=20 * PATIENCE)
        socket.send(b"stty -echo; mine=kept; sleep 1000 & job=$!; echo re''ady\n")
        read_until(socket, b"ready\r\n")
        for cols in (101, 102):
            instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
            instance.state(vm["microvmId"], "SUSPENDED")
            socket.send(json.dumps({"type": "resize", "cols": cols, "rows": 33}))
            assert socket.ping().wait(10 * PATIENCE), "the edge answers"
            assert instance.describe(vm["microvmId"])["state"] == "SUSPENDED"
            socket.send(b"stty size; kill -0 $job && echo $mine\n")
            assert b"33 %d\r\nkept\r\n" % cols in read_until(socket, b"kept\r\n")
        socket.send(b"exit 7\n")
        said: list[str | bytes] = []
        with pytest.raises(ConnectionClosed):
            read_on(socket, said)
    assert json.loads(said[-1]) == {"type": "exit", "code": 7}


def test_who_gets_none(instance: Instance, vm: dict[str, Any], app: str) -> None:
    answer = get(vm["endpoint"], instance.root / "tls/ca.crt", shell_token(instance, vm))
    assert (answer.status, answer.body) == (502, b"")
    plain = instance.launch(app)
    refused = instance.client().exceptions.ValidationException
    with pytest.raises(refused, match="Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM"):
        shell_token(instance, plain)
    with pytest.raises(InvalidStatus):  # another microVM's token
        open_shell(instance, vm | {"endpoint": plain["endpoint"]})
    instance.terminate(plain["microvmId"])


def test_much_output_and_a_slow_reader(instance: Instance, vm: dict[str, Any]) -> None:
    with open_shell(instance, vm) as fast, open_shell(instance, vm) as slow:
        for socket in (slow, fast):
            socket.recv(timeout=20 * PATIENCE)
        slow.send(b"yes\n")  # never read: it must stop itself, and nobody else
        fast.send(b"stty -echo; seq 1 20000 | sha256sum; seq 1 20000; echo en''d\n")
        data = read_until(fast, b"end\r\n").replace(b"\r\n", b"\n")
        numbers = b"".join(b"%d\n" % n for n in range(1, 20001))
        assert numbers in data
        token = instance.token(vm["microvmId"])
        assert get(vm["endpoint"], instance.root / "tls/ca.crt", token, "/state").status == 200


def test_a_suspend_ends_it_where_no_key_may_wake(instance: Instance, app: str) -> None:
    made = instance.launch(app, ingressNetworkConnectors=[CONNECTOR + "HTTP_INGRESS", CONNECTOR + "SHELL_INGRESS"])
    with open_shell(instance, made) as socket:
        read_until_first = socket.recv(timeout=20 * PATIENCE)
        assert "session_init" in str(read_until_first)
        read_until(socket, b"$ ")
        instance.client().suspend_microvm(microvmIdentifier=made["microvmId"])
        with pytest.raises(ConnectionClosed) as ended:
            read_on(socket)
        assert ended.value.rcvd is not None and ended.value.rcvd.code == 1001
    instance.state(made["microvmId"], "SUSPENDED")
    instance.terminate(made["microvmId"])


def test_a_new_shell_wakes_its_microvm(instance: Instance, vm: dict[str, Any]) -> None:
    instance.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    instance.state(vm["microvmId"], "SUSPENDED")
    with open_shell(instance, vm, open_timeout=30 * PATIENCE) as socket:
        socket.recv(timeout=20 * PATIENCE)
        socket.send(b"echo a''wake\n")
        read_until(socket, b"awake")


class Terminal:
    """A person at a terminal."""

    def __init__(self, instance: Instance, identifier: str) -> None:
        self.master, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        command = [str(BIN / "torpor"), "shell", identifier]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=instance.environment, start_new_session=True, close_fds=True
        )
        os.close(other)
        self.seen = b""

    def wait_for(self, wanted: bytes, seconds: float = 30 * PATIENCE) -> None:
        import select

        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 65536)

    def type(self, data: bytes) -> None:
        self.seen = b""
        os.write(self.master, data)


def test_torpor_shell_is_a_terminal(instance: Instance, vm: dict[str, Any]) -> None:
    terminal = Terminal(instance, vm["microvmId"])
    try:
        terminal.wait_for("λ $ ".encode())
        terminal.type(b"stty size\n")
        terminal.wait_for(b"30 100")
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        os.kill(terminal.process.pid, 28)  # SIGWINCH, as the terminal would send it to its foreground
        terminal.type(b"sleep 0.3; stty size\n")
        terminal.wait_for(b"50 120")
        terminal.type(b"sh -c 'echo rea\"\"dy; exec sleep 60'\n")
        terminal.wait_for(b"ready")
        terminal.type(b"\x03")  # Ctrl-C goes to the microVM, not to torpor
        terminal.type(b"echo $((6*7))\n")
        terminal.wait_for(b"42")
        terminal.type(b"exit 7\n")
        assert terminal.process.wait(20 * PATIENCE) == 7
    finally:
        terminal.process.kill()
        os.close(terminal.master)
    done = subprocess.run(
        [str(BIN / "torpor"), "shell", vm["microvmId"]], input="echo from a pipe; exit 4\n", capture_output=True, text=True, timeout=60 * PATIENCE,
        env=instance.environment, check=False,
    )  # fmt: skip
    assert done.returncode == 4 and re.search(r"^from a pipe", done.stdout, re.M)
