"""`make bench-edge`: the endpoint proxy beside nginx, haproxy and aiohttp, over TLS, before the same application.

One worker each; rounds are interleaved, medians are printed. `nginx` checks the token by `map`, `nginx_auth_request` asks a
token service, `nginx_plain` and haproxy check nothing. On few cores the load and the application take their part of the
processor, so `cpu_per_request_…` is the figure to trust.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests/unit")]

import loads  # noqa: E402
import peers  # noqa: E402
from edge_rig import Control, Vmm  # noqa: E402
from peers import Peer, Site  # noqa: E402
from report import figure, note  # noqa: E402

from gateway.config import Settings  # noqa: E402
from gateway.instance import make_certificates  # noqa: E402
from gateway.messages import Route  # noqa: E402
from gateway.rpc import Server, Service  # noqa: E402
from gateway.tokens import Minter  # noqa: E402

ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "3")), int(os.environ.get("SECONDS", "4"))
ONLY = os.environ.get("ONLY", "")  # names of rows, separated by commas
GIB = 1 << 30
Measured = dict[str, float]  # suffix to value
Row = Callable[[Peer], Measured]


def rows(site: Site) -> dict[str, tuple[list[str], str, Row]]:
    """Name to (peers, unit, how one peer is measured once)."""

    def h1(browser: bool) -> Row:
        def measure(peer: Peer) -> Measured:
            seen = loads.keepalive(peer, site, SECONDS, 32, browser)
            return {"": seen.rate, "_p50": seen.p50_ms, "_p99": seen.p99_ms, "_cpu": seen.cpu_us}

        return measure

    def h2(peer: Peer) -> Measured:
        seen = loads.multiplexed(peer, site, SECONDS, 8, 16)
        return {"": seen.rate, "_cpu": seen.cpu_us}

    def own(mode: str, connections: int) -> Row:
        def measure(peer: Peer) -> Measured:
            seen, _ = loads.own(mode, peer, site, SECONDS, connections)
            return {"": seen.rate, "_cpu": seen.cpu_us}

        return measure

    def transfer(upload: bool) -> Row:
        def measure(peer: Peer) -> Measured:
            seen = loads.transfer(peer, site, GIB, upload)
            return {"": seen.rate, "_cpu": seen.cpu_us}

        return measure

    everybody = ["nginx", "nginx_auth_request", "nginx_plain", "haproxy", "aiohttp"]
    return {
        "h1_tls_keepalive": (everybody, "req/s", h1(False)),
        "h1_tls_browser_fields": (["nginx", "haproxy"], "req/s", h1(True)),
        "h2_tls": (["nginx", "haproxy"], "req/s", h2),
        "tls_handshakes": (["nginx"], "1/s", own("full", 16)),
        "tls_resumed_handshakes": (["nginx"], "1/s", own("resumed", 16)),
        "ws_messages": (["nginx", "haproxy"], "1/s", own("websocket", 100)),
        "download_1gib": (["nginx"], "MB/s", transfer(False)),
        "upload_1gib": (["nginx"], "MB/s", transfer(True)),
    }


def measure(name: str, row: Row, running: dict[str, Peer], names: list[str]) -> dict[str, Measured]:
    """Medians by peer."""
    seen: dict[str, list[Measured]] = {one: [] for one in ("ours", *names)}
    for number in range(ROUNDS + 1):
        for one, results in seen.items():
            result = row(running[one])
            if number:  # the first round warmed up
                results.append(result)
                note(f"{name}, round {number}: {one} {result}")
    return {one: {key: statistics.median(r[key] for r in results) for key in results[0]} for one, results in seen.items()}


def show(name: str, unit: str, medians: dict[str, Measured]) -> None:
    ours = medians.pop("ours")
    for suffix, value in ours.items():
        what = {"_p50": "ms", "_p99": "ms", "_cpu": "us"}.get(suffix, unit)
        for peer, theirs in medians.items():
            figure(name + suffix, value, what, peer, theirs[suffix])
    cpu = {"h1_tls_keepalive": "cpu_per_request_h1", "h2_tls": "cpu_per_request_h2"}.get(name)
    if cpu:
        for peer, theirs in medians.items():
            figure(cpu, ours["_cpu"], "us", peer, theirs["_cpu"])


def latency(site: Site, running: dict[str, Peer]) -> None:
    """An open loop at 2,000 a second, what comes on top of the application alone."""
    names = ["ours", "nginx", "haproxy"]
    added: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        _, direct = loads.own("direct", running["application"], site, SECONDS, 32, 2000)
        for name in names:
            _, through = loads.own("open", running[name], site, SECONDS, 32, 2000)
            if number:
                added[name].append((through[0] - direct[0], through[1] - direct[1]))
                note(f"added latency, round {number}: {name} {added[name][-1]}, direct {direct}")
    for place, suffix in enumerate(("p50", "p99")):
        medians = {name: statistics.median(one[place] for one in values) for name, values in added.items()}
        for peer in names[1:]:
            figure(f"added_latency_{suffix}", medians["ours"], "us", peer, medians[peer])


def routes(site: Site, running: dict[str, Peer]) -> None:
    """A request with 100,000 sessions in the routing table, against one: processor time, for rates differ more between two rounds
    than by what is looked for."""
    seen: dict[str, list[float]] = {"routes_100k": [], "ours": []}
    for number in range(4 * ROUNDS + 1):
        for name, times in seen.items():
            one = loads.keepalive(running[name], site, max(1, SECONDS // 2), 32, False)
            if number:
                times.append(one.cpu_us)
                note(f"routes, round {number}: {name} {one}")
    figure("routes_100k", statistics.median(seen["routes_100k"]), "us", "routes_1", statistics.median(seen["ours"]))


def idle(site: Site, running: dict[str, Peer]) -> None:
    sizes = {name: loads.idle_bytes(running[name], site, 5000) for name in ("ours", "nginx", "haproxy")}
    for peer in ("nginx", "haproxy"):
        figure("idle_connection_bytes", sizes["ours"], "bytes", peer, sizes[peer])


async def compare(work: Path) -> None:
    settings = Settings(root=work)
    settings.tls_dir.mkdir()
    make_certificates(settings)
    minter = Minter(work / "keys")
    (work / "verifiers").write_bytes(msgspec.json.encode(minter.verifiers()))
    users = {os.getuid()}
    servers = [Server(work / "c", Service(Control(minter)), users), Server(work / "v", Service(Vmm()), users)]
    crowded = Control(minter)  # the same with 100,000 sessions more in the table
    for number in range(100_000):
        name = f"{uuid.UUID(int=number)}.lambda-microvm.us-east-1.localhost"
        crowded.routes[name] = Route(name, f"microvm-{uuid.UUID(int=number)}", 1, "hold", is_live=False)
    servers.append(Server(work / "c100k", Service(crowded), users))
    token = minter.mint("s1", [(1, 65535)], 3600)
    site = Site(work, settings.tls_dir / "edge.crt", settings.tls_dir / "edge.key", token, peers.free_port())
    await asyncio.to_thread(peers.compile_tools, work)
    running = await asyncio.to_thread(peers.start, site)
    try:
        await asyncio.to_thread(everything, site, running)
    finally:
        peers.stop(running)
        for server in servers:
            server.close()


def everything(site: Site, running: dict[str, Peer]) -> None:
    wanted = set(filter(None, ONLY.split(",")))
    if not wanted or "idle_connection_bytes" in wanted:
        idle(site, running)  # first: a proxy that has worked has memory to spare
    for name, (names, unit, row) in rows(site).items():
        if not wanted or name in wanted:
            show(name, unit, measure(name, row, running, names))
    if not wanted or "added_latency" in wanted:
        latency(site, running)
    if not wanted or "routes_100k" in wanted:
        routes(site, running)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir="/var/tmp") as directory:
        asyncio.run(compare(Path(directory)))


if __name__ == "__main__":
    main()
