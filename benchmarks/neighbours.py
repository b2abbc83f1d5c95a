"""What slow readers, slow uploads and a flood on one session cost another: `make bench-neighbours`.

The real control and one edge worker, over a host without machines (tests/hollow.py); the quiet session is asked 200 times a second
over one connection, open loop: a request that is late counts from when it was due. The flood's client runs behind all others (nice): it
would be on another machine, and take no processor from who measures. Rounds are interleaved.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import peers  # noqa: E402
from hollow import Hollow, hollow  # noqa: E402
from report import figure, note, percentile  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "3"))
SECONDS = float(os.environ.get("SECONDS", "5"))
EVERY = 0.005
SLOW, FLOOD = 50, 32


def latencies(one: Hollow) -> list[float]:
    """Milliseconds of each request of the quiet session, from when it was due."""
    client = one.client(0)
    client.recv(4096)
    request = f"GET / HTTP/1.1\r\nHost: {one.endpoints[0]}\r\nX-aws-proxy-auth: {one.token(0)}\r\n\r\n".encode()
    seen, due, end = [], time.perf_counter(), time.perf_counter() + SECONDS
    while due < end:
        time.sleep(max(0.0, due - time.perf_counter()))
        client.sendall(request)
        client.recv(4096)
        seen.append((time.perf_counter() - due) * 1e3)
        due += EVERY
    client.close()
    return seen


@contextlib.contextmanager
def quiet(one: Hollow) -> Iterator[None]:
    yield


@contextlib.contextmanager
def slow_readers(one: Hollow) -> Iterator[None]:
    """Each asks for 64 MiB and reads nothing."""
    clients = [one.client(1, "GET /bytes/67108864 HTTP/1.1") for _ in range(SLOW)]
    time.sleep(1)
    yield
    for client in clients:
        client.close()


@contextlib.contextmanager
def slow_uploads(one: Hollow) -> Iterator[None]:
    """Each sends a byte now and then."""
    clients = [one.client(1, "PUT / HTTP/1.1", "Content-Length: 100000\r\n") for _ in range(SLOW)]
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    yield
    over.set()
    thread.join()
    for client in clients:
        client.close()


@contextlib.contextmanager
def flood(one: Hollow) -> Iterator[None]:
    """As many requests as the worker answers, over 32 connections."""
    process = subprocess.Popen(
        ["nice", "-n10", "wrk", "-t1", f"-c{FLOOD}", f"-d{int(SECONDS) + 10}s", "-H", f"Host: {one.endpoints[1]}",
         "-H", f"X-aws-proxy-auth: {one.token(1)}", f"https://127.0.0.1:{one.settings.edge.port}/"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(1)
    yield
    process.kill()
    process.wait()


def main() -> None:
    cases = {"quiet": quiet, "slow_readers": slow_readers, "slow_uploads": slow_uploads, "flood": flood}
    seen: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir="/var/tmp") as work, contextlib.ExitStack() as stack:
        peers.compile_tools(Path(work))
        one = stack.enter_context(hollow(2, workers=1, application=f"{work}/origin"))
        one.release()
        for number in (0, 1):
            with contextlib.suppress(OSError, ssl.SSLError):
                client = one.client(number)
                client.recv(4096)
                client.close()
        for number in range(ROUNDS):
            for name, case in cases.items():
                with case(one):
                    values = latencies(one)
                seen[name] += values
                note(f"round {number}: {name}: p50 {percentile(values, 0.5):.2f} ms, p99 {percentile(values, 0.99):.2f} ms")
    for name in list(cases)[1:]:
        for suffix, share in (("p50", 0.5), ("p99", 0.99)):
            figure(f"neighbour_{name}_{suffix}", percentile(seen[name], share), "ms", "quiet", percentile(seen["quiet"], share))


if __name__ == "__main__":
    socket.setdefaulttimeout(40)
    main()
