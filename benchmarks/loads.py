"""How bench-edge loads a proxy: wrk, h2load, curl, and a client of our own (c/client.c) for what they cannot."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_rig import HOST
from peers import Peer, Site

BROWSER = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Accept": "text/html,*/*;q=0.8",
    "Accept-Language": "en-GB,en;q=0.5", "Accept-Encoding": "gzip, deflate, br", "Cache-Control": "no-cache", "Pragma": "no-cache",
    "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none", "Sec-Fetch-User": "?1",
    "Upgrade-Insecure-Requests": "1", "Cookie": "session=0123456789abcdef",
}  # fmt: skip


@dataclass
class Seen:
    """`cpu_us`: the proxy's own processor time for each request."""

    rate: float
    cpu_us: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0


class LoadFailed(Exception):
    pass


def fields(site: Site, browser: bool) -> dict[str, str]:
    return {"X-aws-proxy-auth": site.token, "X-aws-proxy-port": str(site.origin), **(BROWSER if browser else {})}


def _words(found: dict[str, str]) -> list[str]:
    return [part for name, value in found.items() for part in ("-H", f"{name}: {value}")]


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise LoadFailed(f"{command[0]}: {done.stdout[-300:]}{done.stderr[-300:]}")
    return done.stdout


def keepalive(peer: Peer, site: Site, seconds: int, connections: int, browser: bool) -> Seen:
    """wrk: HTTP/1.1, each connection asks again when it has its answer."""
    found = {"Host": HOST, **fields(site, browser)}
    before = peer.seconds()
    out = _run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", *_words(found), f"https://127.0.0.1:{peer.port}/"], seconds)
    used = peer.seconds() - before
    if "Non-2xx" in out or "Socket errors" in out:
        raise LoadFailed(f"{peer.name}: {out}")
    count = int(_find(r"(\d+) requests in", out))
    return Seen(float(_find(r"Requests/sec:\s+([\d.]+)", out)), used / count * 1e6, _milliseconds(out, "50%"), _milliseconds(out, "99%"))


def multiplexed(peer: Peer, site: Site, seconds: int, connections: int, streams: int) -> Seen:
    """h2load: HTTP/2, a browser's fields."""
    words = ["h2load", "-t1", f"-c{connections}", f"-m{streams}", "-D", str(seconds), *_words(fields(site, True))]
    before = peer.seconds()
    out = _run([*words, f"--connect-to=127.0.0.1:{peer.port}", f"https://{HOST}/"], seconds)
    used = peer.seconds() - before
    good, failed = int(_find(r"(\d+) 2xx", out)), int(_find(r"(\d+) errored", out))
    if failed or not good or re.search(r"[1-9]\d* [345]xx", out):
        raise LoadFailed(f"{peer.name}: {out}")
    return Seen(float(_find(r"finished in [\d.]+m?s, ([\d.]+) req/s", out)), used / good * 1e6)


def own(mode: str, peer: Peer, site: Site, seconds: int, connections: int, rate: int = 0) -> tuple[Seen, list[float]]:
    """Our client: what it did a second, and its p50 and p99 in microseconds."""
    path = "/ws" if mode == "websocket" else "/"
    head = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields(site, False).items())
    if mode == "websocket":
        head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    with tempfile.NamedTemporaryFile("w", dir=site.work, newline="") as file:
        file.write(head + "\r\n")
        file.flush()
        before = peer.seconds()
        words = [str(site.work / "client"), mode, str(peer.port), str(connections), str(seconds), str(rate), file.name]
        out = _run(words, seconds).splitlines()[-1].split()
        used = peer.seconds() - before
    done, errors = int(out[0]), int(out[1])
    if errors > done // 1000 or not done:
        raise LoadFailed(f"{peer.name}: {mode}: {done} done, {errors} errors")
    return Seen(done / float(out[2]), used / done * 1e6), [float(out[3]), float(out[4])]


def idle_bytes(peer: Peer, site: Site, connections: int) -> float:
    """Memory of the proxy for each connection that has had one answer and rests."""
    head = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields(site, False).items()) + "\r\n"
    path = site.work / "idle-head"
    path.write_bytes(head.encode())
    before = peer.memory_bytes()
    words = [str(site.work / "client"), "idle", str(peer.port), str(connections), "60", "0", str(path)]
    client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        _, ready, errors = client.stdout.readline().split()
        if int(errors):
            raise LoadFailed(f"{peer.name}: {errors} of {ready} connections failed")
        return (peer.memory_bytes() - before) / connections
    finally:
        client.kill()
        client.wait()


def transfer(peer: Peer, site: Site, size: int, upload: bool) -> Seen:
    """curl: MB a second of one body over TLS."""
    url = f"https://{HOST}:{peer.port}/" + ("" if upload else f"bytes/{size}")
    words = ["curl", "-s", "--http1.1", "-k", "--resolve", f"{HOST}:{peer.port}:127.0.0.1", "-o", "/dev/null", *_words(fields(site, False))]
    if upload:
        sparse = site.work / "body"
        if not sparse.exists() or sparse.stat().st_size != size:
            with Path(sparse).open("wb") as file:
                file.truncate(size)
        words += ["-T", str(sparse), "-w", "%{http_code} %{speed_upload}"]
    else:
        words += ["-w", "%{http_code} %{speed_download}"]
    before = peer.seconds()
    status, speed = _run([*words, url], 60).split()
    if status != "200":
        raise LoadFailed(f"{peer.name}: {status}")
    return Seen(float(speed) / 1e6, (peer.seconds() - before) * 1e6 / (size / 1e6))


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise LoadFailed(text)
    return match[1]


def _milliseconds(text: str, row: str) -> float:
    match = re.search(rf"{row}\s+([\d.]+)(us|ms|s)", text)
    assert match is not None, text
    return float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]]
