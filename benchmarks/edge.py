"""`make bench-edge`: the endpoint proxy beside nginx, haproxy and aiohttp, all over TLS to the same nginx as the application.

One worker each, keep-alive, 32 connections, a browser's fields and the token in every request. nginx and haproxy check no
token. Rounds are interleaved; medians are printed. On few cores the load and the application take part of the processor,
so `…_cpu` (the proxy's own processor time per request) is the figure to trust.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests/unit")]

from edge_rig import HOST, Control, Vmm  # noqa: E402
from report import figure, note  # noqa: E402

from gateway.config import Settings  # noqa: E402
from gateway.instance import make_certificates  # noqa: E402
from gateway.rpc import Server, Service  # noqa: E402
from gateway.tokens import Minter  # noqa: E402

ROUNDS, SECONDS, CONNECTIONS = int(os.environ.get("ROUNDS", "7")), int(os.environ.get("SECONDS", "4")), 32
TICKS = os.sysconf("SC_CLK_TCK")
FIELDS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Accept": "text/html,*/*;q=0.8",
    "Accept-Language": "en-GB,en;q=0.5", "Accept-Encoding": "gzip, deflate, br", "Cache-Control": "no-cache", "Pragma": "no-cache",
    "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none", "Cookie": "session=0123456789abcdef",
}  # fmt: skip

NGINX = """\
daemon off; worker_processes 1; pid {work}/{name}.pid; error_log {work}/{name}.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {work}/{name}-body; proxy_temp_path {work}/{name}-proxy; fastcgi_temp_path {work}/f; uwsgi_temp_path {work}/u;
  scgi_temp_path {work}/s;
  {body}
}}
"""
ORIGIN = "server {{ listen 127.0.0.1:{origin} backlog=4096; location / {{ return 200 'hello'; }} }}"
PROXY = """\
upstream app {{ server 127.0.0.1:{origin}; keepalive 64; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} ssl backlog=4096; ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}"""
HAPROXY = """\
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
  http-reuse always
frontend tls
  bind 127.0.0.1:{port} ssl crt {pem} ssl-min-ver TLSv1.2
  default_backend app
backend app
  server app 127.0.0.1:{origin} pool-max-conn 64
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Peer:
    """A proxy process; `worker` is the process whose time counts."""

    def __init__(self, name: str, port: int, command: list[str], work: Path) -> None:
        self.name, self.port = name, port
        self.process = subprocess.Popen(command, stdout=(work / f"{name}.out").open("wb"), stderr=subprocess.STDOUT)
        self.rates: list[float] = []
        self.p50: list[float] = []
        self.p99: list[float] = []
        self.cpu: list[float] = []

    @property
    def worker(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if self.name == "nginx_plain" else self.process.pid

    def ticks(self) -> int:
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def wait(self) -> None:
        deadline = time.monotonic() + 15
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start")
            time.sleep(0.05)

    def load(self, token: str, port: int) -> None:
        headers = FIELDS | {"Host": HOST, "X-aws-proxy-auth": token, "X-aws-proxy-port": str(port)}
        words = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
        before = self.ticks()
        out = subprocess.run(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--latency", *words, f"https://127.0.0.1:{self.port}/"],
            capture_output=True, text=True, check=True, timeout=SECONDS + 30,
        ).stdout  # fmt: skip
        used = (self.ticks() - before) / TICKS
        if "Non-2xx" in out or "Socket errors" in out:
            raise RuntimeError(f"{self.name}: {out}")
        count = int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]
        self.rates.append(float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]))  # type: ignore[index]
        self.p50.append(milliseconds(out, "50%"))
        self.p99.append(milliseconds(out, "99%"))
        self.cpu.append(used / count * 1e6)


def milliseconds(text: str, row: str) -> float:
    match = re.search(rf"{row}\s+([\d.]+)(us|ms|s)", text)
    assert match is not None, text
    return float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]]


async def compare(work: Path) -> None:
    settings = Settings(root=work)
    settings.tls_dir.mkdir()
    make_certificates(settings)
    certificate, key = settings.tls_dir / "edge.crt", settings.tls_dir / "edge.key"
    (work / "server.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    minter = Minter(work / "keys")
    (work / "verifiers").write_bytes(msgspec.json.encode(minter.verifiers()))
    users = {os.getuid()}
    servers = [Server(work / "c", Service(Control(minter)), users), Server(work / "v", Service(Vmm()), users)]
    origin = free_port()
    ports = {name: free_port() for name in ("ours", "nginx_plain", "haproxy", "aiohttp")}
    values = {"work": work, "origin": origin, "certificate": certificate, "key": key, "pem": work / "server.pem"}
    configurations = {
        "origin.conf": NGINX.format(name="origin", body=ORIGIN.format(**values), **values),
        "nginx_plain.conf": NGINX.format(name="nginx_plain", body=PROXY.format(port=ports["nginx_plain"], **values), **values),
        "haproxy.conf": HAPROXY.format(port=ports["haproxy"], **values),
    }
    for name, text in configurations.items():
        (work / name).write_text(text)
        note(f"--- {name}\n{text}")
    nginx, haproxy = (shutil.which(name, path="/usr/sbin:/usr/bin") or name for name in ("nginx", "haproxy"))
    application = Peer("application", origin, [nginx, "-c", str(work / "origin.conf")], work)
    ours = [sys.executable, HERE / "edge_worker.py", ports["ours"], certificate, key, work / "c", work / "v"]
    theirs = [sys.executable, HERE / "aiohttp_proxy.py", ports["aiohttp"], certificate, key, work / "verifiers", origin]
    peers = [
        Peer("ours", ports["ours"], list(map(str, ours)), work),
        Peer("nginx_plain", ports["nginx_plain"], [nginx, "-c", str(work / "nginx_plain.conf")], work),
        Peer("haproxy", ports["haproxy"], [haproxy, "-db", "-f", str(work / "haproxy.conf")], work),
        Peer("aiohttp", ports["aiohttp"], list(map(str, theirs)), work),
    ]  # fmt: skip
    try:
        for peer in (application, *peers):
            await asyncio.to_thread(peer.wait)
        token = minter.mint("s1", [(1, 65535)], 3600)
        for number in range(ROUNDS + 1):
            if number == 1:
                for peer in peers:  # the first round warmed up
                    peer.rates, peer.p50, peer.p99, peer.cpu = [], [], [], []
            for peer in peers:
                await asyncio.to_thread(peer.load, token, origin)
                note(f"round {number}: {peer.name} {peer.rates[-1]:.0f}/s, {peer.cpu[-1]:.1f} us")
    finally:
        for peer in (*peers, application):
            peer.process.terminate()
            peer.process.wait(10)
        for server in servers:
            server.close()
    show(peers)


def show(peers: list[Peer]) -> None:
    ours, *others = peers
    for other in others:
        for suffix, unit, what in (("", "req/s", "rates"), ("_p50", "ms", "p50"), ("_p99", "ms", "p99"), ("_cpu", "us", "cpu")):
            value, peer = (statistics.median(getattr(one, what)) for one in (ours, other))
            figure(f"h1_tls_keepalive{suffix}", value, unit, other.name, peer)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir="/var/tmp") as directory:
        asyncio.run(compare(Path(directory)))


if __name__ == "__main__":
    main()
