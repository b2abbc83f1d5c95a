"""`make bench-edge-instructions OLD=DIR`: what the edge's worker executes for a request, beside an older tree's, by callgrind.

Counts of instructions do not depend on the machine's other work, as times do: differences of a hundredth can be seen. The kernel's
part is not counted. Each case is the same octets for both trees, over one connection (c/origin.c is the application), and is
repeated; the median counts. OLD is a checkout with its own virtual environment and compiled edge (`make setup` there).
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h2.config
import h2.connection
import h2.events

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests/unit")]

import peers  # noqa: E402
from edge_rig import HOST  # noqa: E402
from loads import BROWSER  # noqa: E402
from report import figure, note  # noqa: E402

REPEATS = int(os.environ.get("REPEATS", "3"))
ONLY = set(filter(None, os.environ.get("ONLY", "").split(",")))
START_SECONDS = 300
MIB = 1 << 20
UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"


class Side:
    """One tree's worker under callgrind."""

    def __init__(self, name: str, tree: Path, work: Path, origin: int) -> None:
        self.name, self.work, self.origin = name, work, origin
        work.mkdir()
        python = tree / ".venv/bin/python"
        self._host = subprocess.Popen(
            [python, HERE / "instructions_host.py", tree, work, str(origin)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._host.stdout is not None
        line = self._host.stdout.readline()
        if not line:
            raise RuntimeError(f"{name}: the worker's host did not start")
        told = json.loads(line)
        self.port, self.token, self.pid = int(told["port"]), str(told["token"]), int(told["pid"])
        self._dumps = 0
        self._trace = 0

    def next_trace(self) -> int:
        """Where a repeat begins to number its requests, so that no two of a side carry the same trace."""
        self._trace += 1 << 20
        return self._trace

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            if time.monotonic() > deadline or self._host.poll() is not None:
                raise RuntimeError(f"{self.name} did not start: {(self.work / 'worker.log').read_text()[-500:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        assert self._host.stdin is not None
        self._host.stdin.close()
        self._host.wait(30)

    def _tell(self, word: str) -> None:
        subprocess.run(["vgdb", f"--vgdb-prefix={self.work}/vgdb", f"--pid={self.pid}", word], check=True, capture_output=True, timeout=120)

    def zero(self) -> None:
        self._tell("zero")

    def instructions(self) -> int:
        """Since `zero`."""
        self._tell("dump")
        self._dumps += 1
        text = (self.work / f"count.{self._dumps}").read_text()
        found = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        assert found is not None, text[:300]
        return int(found[1])

    # ---- connections ----

    def connect(self, protocol: str) -> ssl.SSLSocket:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([protocol])
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(raw, server_hostname=HOST)

    def fields(self, browser: bool) -> dict[str, str]:
        return {"X-aws-proxy-auth": self.token, "X-aws-proxy-port": str(self.origin), **(BROWSER if browser else {})}

    def head(self, target: str = "/", method: str = "GET", browser: bool = False, extra: str = "") -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.fields(browser).items())
        return f"{method} {target} HTTP/1.1\r\nHost: {HOST}\r\n{lines}{extra}\r\n".encode()


def read_answer(sock: ssl.SSLSocket) -> None:
    """Head and a body of Content-Length; other statuses than 200 and 101 are an error."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"200", b"101"), head
    length = re.search(rb"content-length: (\d+)", head, re.I)
    left = int(length[1]) - len(body) if length else 0
    while left > 0:
        left -= len(sock.recv(min(left, 262144)))


Case = Callable[[Side, int], float]  # makes so many requests after a few that are not counted; instructions each


def _counted(side: Side, count: int, once: Callable[[int], None], warm_up: int = 40) -> float:
    for number in range(warm_up):
        once(-1 - number)
    side.zero()
    for number in range(count):
        once(number)
    return side.instructions() / count


def http1(browser: bool, varying: bool = False) -> Case:
    def case(side: Side, count: int) -> float:
        first = side.next_trace()
        with side.connect("http/1.1") as sock:

            def once(number: int) -> None:
                extra = f"traceparent: 00-{first + number:032x}-{first + number:016x}-01\r\n" if varying else ""
                sock.sendall(side.head(browser=browser, extra=extra))
                read_answer(sock)

            return _counted(side, count, once)

    return case


def http2(streams: int) -> Case:
    def case(side: Side, count: int) -> float:
        with side.connect("h2") as sock:
            client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="latin-1"))
            client.initiate_connection()
            client.increment_flow_control_window(1 << 30)
            fields = [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/")]
            fields += [(name.lower(), value) for name, value in side.fields(True).items()]

            def once(_: int) -> None:
                for _ in range(streams):
                    client.send_headers(client.get_next_available_stream_id(), fields, end_stream=True)
                sock.sendall(client.data_to_send())
                left = streams
                while left:
                    for event in client.receive_data(sock.recv(65536)):
                        left -= isinstance(event, h2.events.StreamEnded)
                        assert not isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)), event
                if data := client.data_to_send():
                    sock.sendall(data)

            return _counted(side, max(1, count // streams), once) / streams

    return case


def messages(side: Side, count: int) -> float:
    frame = b"\x82\xfe\x04\x00\0\0\0\0" + b"x" * 1024  # masked with zeros
    with side.connect("http/1.1") as sock:
        sock.sendall(side.head("/ws", extra=UPGRADE))
        read_answer(sock)

        def once(_: int) -> None:
            sock.sendall(frame)
            left = len(frame)
            while left:
                left -= len(sock.recv(left))

        return _counted(side, count, once)


def transfer(upload: bool) -> Case:
    """Instructions for a mebibyte, of 16."""

    def case(side: Side, _: int) -> float:
        body = bytes(16 * MIB)
        with side.connect("http/1.1") as sock:

            def once(_: int) -> None:
                if upload:
                    sock.sendall(side.head(method="PUT", extra=f"Content-Length: {len(body)}\r\n"))
                    sock.sendall(body)
                else:
                    sock.sendall(side.head(f"/bytes/{len(body)}"))
                read_answer(sock)

            return _counted(side, 2, once, warm_up=1) / 16

    return case


def handshake(side: Side, count: int) -> float:
    def once(_: int) -> None:
        with side.connect("http/1.1") as sock:
            sock.sendall(side.head())
            read_answer(sock)

    return _counted(side, count // 10, once, warm_up=5)


CASES: dict[str, tuple[str, Case]] = {
    "instructions_h1_tls_keepalive": ("per request", http1(False)),
    "instructions_h1_tls_browser_fields": ("per request", http1(True)),
    "instructions_h1_tls_traceparent": ("per request", http1(True, varying=True)),
    "instructions_h2_tls": ("per request", http2(1)),
    "instructions_h2_tls_16_streams": ("per request", http2(16)),
    "instructions_ws_messages": ("per message", messages),
    "instructions_download": ("per MiB", transfer(False)),
    "instructions_upload": ("per MiB", transfer(True)),
    "instructions_handshake_and_request": ("per connection", handshake),
}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("instructions.py OLD: the checkout to compare with")
    trees = {"ours": HERE.parent, "old": Path(sys.argv[1]).resolve()}
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir="/var/tmp") as directory:
        work = Path(directory)
        peers.compile_tools(work)
        origin = peers.free_port()
        application = peers.Peer("application", origin, [str(work / "origin"), str(origin)], work)
        sides: list[Side] = []
        try:
            sides += [Side(name, tree, work / name, origin) for name, tree in trees.items()]
            for side in sides:
                side.wait()
            for name, (unit, case) in CASES.items():
                if not ONLY or name in ONLY:
                    seen: dict[str, list[float]] = {side.name: [] for side in sides}
                    for _ in range(REPEATS):
                        for side in sides:
                            seen[side.name].append(case(side, 400))
                    note(f"{name}: {seen}")
                    figure(name, statistics.median(seen["ours"]), f"instructions {unit}", "old", statistics.median(seen["old"]))
        finally:
            for side in sides:
                side.stop()
            application.stop()


if __name__ == "__main__":
    main()
