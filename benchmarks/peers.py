"""The proxies of bench-edge, each set up as its own best users would, all before the same application (c/origin.c)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from report import note

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")

# TLS 1.3 and 1.2 for all; large buffers and no temporary files for bodies; upstream connections kept.
NGINX = """\
daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid {work}/{name}.pid; error_log {work}/{name}.log;
events {{ worker_connections 16000; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; client_max_body_size 0;
  client_body_temp_path {work}/{name}-body; proxy_temp_path {work}/{name}-proxy; fastcgi_temp_path {work}/f; uwsgi_temp_path {work}/u;
  scgi_temp_path {work}/s;
  ssl_protocols TLSv1.2 TLSv1.3; ssl_certificate {certificate}; ssl_certificate_key {key};
  ssl_session_cache shared:S:10m; map_hash_bucket_size 2048; large_client_header_buffers 4 16k; client_header_buffer_size 4k;
  proxy_http_version 1.1; proxy_max_temp_file_size 0; proxy_request_buffering off;
  proxy_buffer_size 256k; proxy_buffers 4 256k; proxy_busy_buffers_size 256k;
  upstream app {{ server 127.0.0.1:{origin}; keepalive 256; keepalive_requests 1000000000; }}
  {body}
}}
"""
SERVER = """\
server {{
    listen 127.0.0.1:{port} ssl http2 backlog=8192;
    location / {{ {check} proxy_set_header Connection ""; proxy_set_header X-aws-proxy-auth ""; proxy_pass http://app; }}
    location /ws {{
      {check} proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; proxy_pass http://app; proxy_read_timeout 600s;
    }}
    {extra}
  }}"""
MAP = 'map $http_x_aws_proxy_auth $ok {{ default 0; "{token}" 1; }}\n  '
# A token service that only says yes, in nginx itself: what is measured is the question, not the answer.
AUTH = """location = /_check {{ internal; proxy_pass http://app/; proxy_pass_request_body off; proxy_set_header Content-Length "";
      proxy_set_header Connection ""; }}"""
HAPROXY = """\
global
  nbthread 1
  maxconn 8000
  tune.bufsize 65536
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
  http-reuse always
frontend tls
  bind 127.0.0.1:{port} ssl crt {pem} ssl-min-ver TLSv1.2 alpn h2,http/1.1
  default_backend app
backend app
  server app 127.0.0.1:{origin} pool-max-conn 256
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Site:
    """What all have in common."""

    work: Path
    certificate: Path
    key: Path
    token: str
    origin: int


class Peer:
    """A proxy process; `worker` is the process whose time and memory count."""

    def __init__(self, name: str, port: int, command: list[str], work: Path) -> None:
        self.name, self.port = name, port
        self.process = subprocess.Popen(command, stdout=(work / f"{name}.out").open("wb"), stderr=subprocess.STDOUT)

    @property
    def worker(self) -> int:
        if not self.name.startswith("nginx"):
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_bytes(self) -> int:
        for line in Path(f"/proc/{self.worker}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no Pss")

    def wait(self) -> None:
        deadline = time.monotonic() + 15
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start: {self.process.args!r}")
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def program(name: str) -> str:
    return shutil.which(name, path="/usr/sbin:/usr/bin") or name


def compile_tools(work: Path) -> None:
    """The application and the load client."""
    for name, libraries in (("origin", []), ("client", ["-lssl", "-lcrypto"])):
        subprocess.run(["gcc", "-O2", "-Wall", "-o", str(work / name), str(HERE / f"c/{name}.c"), *libraries], check=True, timeout=60)


def start(site: Site) -> dict[str, Peer]:
    """All proxies and the application, ready. Their configurations are printed."""
    work, ports = site.work, {}
    values = {"work": work, "certificate": site.certificate, "key": site.key, "origin": site.origin, "token": site.token}
    (work / "server.pem").write_bytes(site.certificate.read_bytes() + site.key.read_bytes())
    kinds = {
        "nginx": (MAP.format(**values), "if ($ok = 0) { return 403; }", ""),
        "nginx_auth_request": ("", "auth_request /_check;", AUTH.format()),
        "nginx_plain": ("", "", ""),
    }
    texts = {}
    for name, (before, check, extra) in kinds.items():
        ports[name] = free_port()
        body = before + SERVER.format(port=ports[name], check=check, extra=extra)
        texts[name] = NGINX.format(name=name, body=body, **values)
    ports["haproxy"] = free_port()
    texts["haproxy"] = HAPROXY.format(port=ports["haproxy"], pem=work / "server.pem", **values)
    for name, text in texts.items():
        (work / f"{name}.conf").write_text(text)
        note(f"--- {name}\n{text.replace(site.token, 'TOKEN')}")
    python, ours, theirs, many = sys.executable, free_port(), free_port(), free_port()
    commands = {
        "application": (site.origin, [work / "origin", site.origin]),
        "ours": (ours, [python, HERE / "edge_worker.py", ours, site.certificate, site.key, work / "c", work / "v"]),
        "routes_100k": (many, [python, HERE / "edge_worker.py", many, site.certificate, site.key, work / "c100k", work / "v"]),
        "aiohttp": (theirs, [python, HERE / "aiohttp_proxy.py", theirs, site.certificate, site.key, work / "verifiers", site.origin]),
        "haproxy": (ports["haproxy"], [program("haproxy"), "-db", "-f", work / "haproxy.conf"]),
    }
    commands |= {name: (ports[name], [program("nginx"), "-c", work / f"{name}.conf"]) for name in kinds}
    peers = {name: Peer(name, port, list(map(str, command)), work) for name, (port, command) in commands.items()}
    try:
        for peer in peers.values():
            peer.wait()
    except BaseException:
        stop(peers)
        raise
    return peers


def stop(peers: dict[str, Peer]) -> None:
    for peer in peers.values():
        peer.stop()
