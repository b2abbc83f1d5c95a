"""The control plane's speed: the real control process over a host without machines, beside moto's server.

`make bench-api`. moto has no MicroVMs: its GetFunction and ListFunctions are the peers of GetMicrovm and ListMicrovms, with as
many functions as there are sessions, called over HTTP by the same signing client. ROUNDS, SECONDS and LARGE may be set.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from botocore.config import Config
from report import figure, note, percentile

from gateway.api import sigv4
from gateway.config import Settings
from gateway.messages import Shape
from gateway.process import SETTINGS_VARIABLE, SOCKETS_VARIABLE, passed
from gateway.sessions.model import Build, Image, Session, Version
from gateway.sessions.states import State
from gateway.sessions.store import Store

ROUNDS = int(os.environ.get("ROUNDS", "3"))
SECONDS = float(os.environ.get("SECONDS", "2"))
LARGE = int(os.environ.get("LARGE", "100000"))
SMALL = 10
CONNECTIONS = 8
ACCOUNT, KEY, SECRET, REGION = "123456789012", "AKIABENCHBENCHBENCH0", "bench-secret", "us-east-1"
ARN = f"arn:aws:lambda:{REGION}:{ACCOUNT}:microvm-image:app"
REPO = Path(__file__).resolve().parents[1]


# ---- the client: signs every request, keeps its connections ----


class Client:
    """One blocking keep-alive connection; requests signed as SDKs do (SigV4, header form)."""

    def __init__(self, port: int, key: str = KEY, secret: str = SECRET) -> None:
        self._port = port
        self._connect()
        self._host = f"127.0.0.1:{port}"
        self._key = key
        self._day = time.strftime("%Y%m%d", time.gmtime())
        signing = f"AWS4{secret}".encode()
        for part in (self._day, REGION, "lambda", "aws4_request"):
            signing = hmac.new(signing, part.encode(), hashlib.sha256).digest()
        self._signing = signing

    def _connect(self) -> None:
        self._sock = socket.create_connection(("127.0.0.1", self._port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._sock.makefile("rb")

    def call(self, method: str, path: str, query: str = "", body: bytes = b"") -> int:
        """Sends, waits, returns the status."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        payload = hashlib.sha256(body).hexdigest()
        canonical = f"{method}\n{quote(path, safe='/-_.~')}\n{query}\nhost:{self._host}\nx-amz-date:{stamp}\n\nhost;x-amz-date\n{payload}"
        scope = f"{self._day}/{REGION}/lambda/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        signature = hmac.new(self._signing, text.encode(), hashlib.sha256).hexdigest()
        head = (
            f"{method} {path}{'?' + query if query else ''} HTTP/1.1\r\nHost: {self._host}\r\nX-Amz-Date: {stamp}\r\n"
            f"Authorization: AWS4-HMAC-SHA256 Credential={self._key}/{scope}, SignedHeaders=host;x-amz-date, Signature={signature}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._sock.sendall(head.encode() + body)
        line = self._file.readline()
        status = int(line.split()[1])
        length, closes = 0, line.startswith(b"HTTP/1.0")
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
            closes = closes or (name.lower() == b"connection" and value.strip().lower() == b"close")
        self._file.read(length)
        if closes:  # moto's server ends every connection; an SDK connects again then
            self.close()
            self._connect()
        return status

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def load(port: int, requests: Iterator[tuple[str, str, str, bytes]], seconds: float = 0.0) -> tuple[float, list[float]]:
    """Requests a second, and each one's seconds; connections take turns, so that none is idle for long."""
    clients = [Client(port) for _ in range(CONNECTIONS)]
    times: list[float] = []
    started = time.perf_counter()
    end = started + (seconds or SECONDS)
    try:
        while time.perf_counter() < end:
            for client in clients:
                at = time.perf_counter()
                status = client.call(*next(requests))
                times.append(time.perf_counter() - at)
                assert status in (200, 201), status
    finally:
        for client in clients:
            client.close()
    return len(times) / (time.perf_counter() - started), times


# ---- ours ----


def fill(path: Path, count: int) -> None:
    """A store with an image and `count` suspended sessions, as control writes it."""

    async def work() -> None:
        store = Store(path)
        await store.open()
        now = time.time()
        version = Version(ARN, "1.0", {"resources": [{"minimumMemoryInMiB": 512}]}, now, now, "SUCCESSFUL", key="key")
        version.shape, version.build = Shape(2048, 1, 1 << 30, "tcg", 512), Build("b", "SUCCESSFUL", now)
        store.put_image(Image("i", ARN, "app", now, now, "CREATED", versions=[version], last_number=1))
        for number in range(count):
            session = Session(
                f"microvm-{number:08d}", f"{uuid.uuid4()}.localhost", ARN, "1.0", "key", 512, now + number / 1e4, 28_800,
                state=State.SUSPENDED, incarnation=1, suspended_at=now, suspended_by="api",
            )  # fmt: skip
            store.put_session(session)
        await store.commit()
        await store.close()

    asyncio.run(work())


@contextlib.contextmanager
def control(directory: Path, count: int) -> Iterator[tuple[int, float]]:
    """The real control process with `count` sessions: its API's port, and the seconds from its start to its first answer."""
    settings = Settings(root=directory / "root", run=directory / "run", name="bench")
    settings.control_dir.mkdir(parents=True)
    settings.control_runtime.mkdir(parents=True)
    (settings.control_dir / "access-keys.json").write_text(json.dumps({KEY: SECRET}))
    fill(settings.control_dir / "torpor.db", count)
    api, metrics = socket.create_server(("127.0.0.1", 0), backlog=1024), socket.create_server(("127.0.0.1", 0))
    sockets = {"api": [api.fileno()], "metrics": [metrics.fileno()]}
    environment = os.environ | {SOCKETS_VARIABLE: json.dumps(sockets), "SNAPSHOTS": str(count)}
    host = subprocess.Popen(
        [sys.executable, str(REPO / "benchmarks/api_host.py"), str(settings.vmm_socket)], stdout=subprocess.PIPE, env=environment
    )
    assert host.stdout is not None and host.stdout.readline() == b"ready\n"
    with (directory / "control.log").open("wb") as log, passed(settings) as number:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.control"],
            env=environment | {SETTINGS_VARIABLE: str(number)},
            cwd=REPO,
            stderr=log,
            pass_fds=[api.fileno(), metrics.fileno(), number],
        )
    port = int(api.getsockname()[1])
    try:
        client = Client(port)
        assert client.call("GET", "/2025-09-09/microvms") == 200
        client.close()
        yield port, time.perf_counter() - started
    finally:
        for one in (process, host):
            one.terminate()
            one.wait(60)
        api.close()
        metrics.close()


def gets(count: int) -> Iterator[tuple[str, str, str, bytes]]:
    number = 0
    while True:
        number = (number + 7919) % count
        yield "GET", f"/2025-09-09/microvms/microvm-{number:08d}", "", b""


def always(method: str, path: str, query: str = "", body: bytes = b"") -> Iterator[tuple[str, str, str, bytes]]:
    while True:
        yield method, path, query, body


# ---- the peer ----


@contextlib.contextmanager
def moto(count: int) -> Iterator[int]:
    """moto's server with `count` functions."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "moto_server"), "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        options: dict[str, Any] = {
            "region_name": REGION, "endpoint_url": f"http://127.0.0.1:{port}", "aws_access_key_id": KEY, "aws_secret_access_key": SECRET,
            "config": Config(retries={"max_attempts": 12}),
        }  # fmt: skip
        trust = {"Version": "2012-10-17", "Statement": []}
        role = boto3.client("iam", **options).create_role(RoleName="r", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
        code = io.BytesIO()
        with zipfile.ZipFile(code, "w") as archive:
            archive.writestr("app.py", "def handler(event, context): pass")
        functions = boto3.client("lambda", **options)
        zipped = {"ZipFile": code.getvalue()}
        for number in range(count):
            functions.create_function(
                FunctionName=f"function-{number:08d}", Runtime="python3.11", Role=role, Handler="app.handler", Code=zipped
            )  # fmt: skip
        yield port
    finally:
        process.terminate()
        process.wait(20)


def functions(count: int) -> Iterator[tuple[str, str, str, bytes]]:
    number = 0
    while True:
        number = (number + 7) % count
        yield "GET", f"/2015-03-31/functions/function-{number:08d}", "", b""


# ---- figures ----


class Seen:
    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}

    def add(self, name: str, outcome: tuple[float, list[float]]) -> None:
        self.rates.setdefault(name, []).append(outcome[0])
        self.times.setdefault(name, []).extend(outcome[1])

    def rate(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def p50(self, name: str) -> float:
        return percentile(self.times[name], 0.5) * 1e3

    def p99(self, name: str) -> float:
        return percentile(self.times[name], 0.99) * 1e3


def signature_microseconds() -> float:
    """What checking one signature costs, by itself."""
    body = b'{"imageIdentifier": "' + ARN.encode() + b'"}'
    headers = {"host": "127.0.0.1:4700", "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), "content-type": "application/json"}
    request = sigv4.SignedRequest("POST", "/2025-09-09/microvms", "", headers, body)
    day = headers["x-amz-date"][:8]
    claimed = sigv4.Signature(KEY, day, REGION, "lambda", ("content-type", "host", "x-amz-date"), "", headers["x-amz-date"], "")
    made = sigv4.digest(request, claimed, SECRET, hashlib.sha256(body).hexdigest())
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={KEY}/{day}/{REGION}/lambda/aws4_request, "
        f"SignedHeaders=content-type;host;x-amz-date, Signature={made}"
    )
    signed = sigv4.SignedRequest("POST", "/2025-09-09/microvms", "", headers | {"authorization": authorization}, body)
    count = 5000
    started = time.perf_counter()
    for _ in range(count):
        parsed = sigv4.parse(signed)
        sigv4.check_head(signed, parsed, SECRET, REGION, 900)
        sigv4.check_body(signed, parsed, SECRET)
    return (time.perf_counter() - started) / count * 1e6


def main() -> None:
    seen, starts = Seen(), []
    run = json.dumps({"imageIdentifier": ARN}).encode()
    token = json.dumps({"expirationInMinutes": 5, "allowedPorts": [{"port": 8080}]}).encode()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torpor-bench-api-", dir="/var/tmp")))
        note(f"starting control with {SMALL} and with {LARGE} sessions, and moto with {SMALL} functions")
        small, _ = stack.enter_context(control(directory / "small", SMALL))
        large, seconds = stack.enter_context(control(directory / "large", LARGE))
        starts.append(seconds)
        peer = stack.enter_context(moto(SMALL))
        for number in range(ROUNDS):
            note(f"round {number + 1} of {ROUNDS}")
            seen.add("get", load(small, gets(SMALL)))
            seen.add("moto_get", load(peer, functions(SMALL)))
            seen.add("get_large", load(large, gets(LARGE)))
            seen.add("list", load(small, always("GET", "/2025-09-09/microvms")))
            seen.add("moto_list", load(peer, always("GET", "/2015-03-31/functions/")))
            page = always("GET", "/2025-09-09/microvms", f"maxResults={SMALL}")
            seen.add("list_large", load(large, page))
            seen.add("token", load(small, always("POST", "/2025-09-09/microvms/microvm-00000001/auth-token", "", token)))
        for _ in range(ROUNDS):  # last: it adds sessions
            seen.add("run", load(small, always("POST", "/2025-09-09/microvms", "", run), 1.0))
    figure("get_microvm_rps", seen.rate("get"), "1/s", "moto", seen.rate("moto_get"))
    figure("list_microvms_rps", seen.rate("list"), "1/s", "moto", seen.rate("moto_list"))
    figure("get_microvm_p99", seen.p99("get"), "ms", "moto", seen.p99("moto_get"))
    figure("list_microvms_p99", seen.p99("list"), "ms", "moto", seen.p99("moto_list"))
    figure("get_microvm_100k", seen.p50("get_large"), "ms", "get_microvm_10", seen.p50("get"))
    figure("list_microvms_100k", seen.p50("list_large"), "ms", "list_microvms_10", seen.p50("list"))
    figure("auth_token_rps", seen.rate("token"), "1/s")
    figure("auth_token_p99", seen.p99("token"), "ms")
    figure("run_microvm_rps", seen.rate("run"), "1/s")
    figure("run_microvm_p99", seen.p99("run"), "ms")
    figure("sigv4_check_microseconds", signature_microseconds(), "µs")
    figure("start_100k_seconds", statistics.median(starts), "s")


if __name__ == "__main__":
    main()
