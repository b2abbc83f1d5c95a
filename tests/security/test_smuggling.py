"""No request is smuggled past the edge: what an application receives is what the edge has judged, and nobody gets another's answer.

Behind a real worker stand real servers, which say what they have received. The same bytes sent straight to them, or by a forwarder that
writes HTTP/2's fields as they are, are seen to smuggle.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_rig import HOST, Rig, response
from h2_client import Raw
from smuggled import HTTP1, HTTP2, Case, Downgrade, Meant

from gateway.edge.wire import http2_frames as f

HERE = Path(__file__).resolve().parent / "upstreams"
NODE = shutil.which("node")
SERVERS = {
    "aiohttp": [sys.executable, str(HERE / "python_servers.py"), "aiohttp"],
    "uvicorn": [sys.executable, str(HERE / "python_servers.py"), "uvicorn"],
    "http.server": [sys.executable, str(HERE / "python_servers.py"), "http.server"],
    "node": [str(NODE), str(HERE / "node_server.js")],
}
EACH = [
    pytest.param(name, marks=[pytest.mark.conformance, pytest.mark.skipif(NODE is None, reason="node is not installed")] if name == "node" else [])
    for name in SERVERS
]  # fmt: skip


class Upstream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(SERVERS[name], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    async def straight(self, data: bytes) -> None:
        """Sends bytes on a connection of their own, and another client's request behind them, as a pool of connections would."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data + b"GET /victim HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        try:
            async with asyncio.timeout(1):
                await reader.read(-1)
        except (TimeoutError, ConnectionError):
            pass
        writer.close()

    async def seen(self) -> list[dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /log HTTP/1.1\r\nHost: x\r\n\r\n")
        _, _, body = await response(reader)
        writer.close()
        lines: list[dict[str, Any]] = json.loads(body)
        return lines

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module", params=EACH)
def upstream(request: pytest.FixtureRequest) -> Iterator[Upstream]:
    one = Upstream(request.param)
    yield one
    one.close()


@pytest.fixture
async def rig(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    one = Rig(tmp_path, monkeypatch)
    await one.start(http2=True, head_seconds=2, body_seconds=2, connect_seconds=2)
    one.app_port = upstream.port
    yield one
    await one.stop()


def filled(rig: Any, data: bytes) -> bytes:
    token = f"X-aws-proxy-port: {rig.app_port}\r\nX-aws-proxy-auth: {rig.token}".encode()
    return data.replace(b"HOST", b"Host: " + HOST.encode()).replace(b"AUTHORITY", HOST.encode()).replace(b"TOKEN", token)


async def attack(rig: Rig, case: Case) -> list[int]:
    """Sends a case to the edge; the statuses of its answers, up to the number that is expected, or the end of the connection."""
    reader, writer = await rig.open()
    writer.write(filled(rig, case.data))
    statuses: list[int] = []
    try:
        while case.statuses and len(statuses) < len(case.statuses):
            status, fields, _ = await response(reader, no_body=case.data.startswith(b"HEAD") and not statuses)
            if status >= 200:
                statuses.append(status)
        if statuses and statuses[-1] == 400:
            assert fields["connection"] == "close" and await asyncio.wait_for(reader.read(), 5) == b""
    except asyncio.IncompleteReadError:
        pass
    writer.close()
    return statuses


def requests(lines: list[dict[str, Any]]) -> list[Meant]:
    return [(line["method"], line["target"], line["body"].encode("latin-1")) for line in lines]


def faults_of_fields(line: dict[str, Any]) -> list[str]:
    """What no request that an edge wrote may have."""
    names = [name for name, _ in line["fields"]]
    found = [
        name
        for name in ("x-evil", "http2-settings", "proxy-connection", "keep-alive", "te", "x-aws-proxy-auth", "x-aws-proxy-port")
        if name in names
    ]
    found += [name for name in ("host", "content-length", "transfer-encoding", "x-amzn-requestid") if names.count(name) > 1]
    if "content-length" in names and "transfer-encoding" in names:
        found.append("two framings")
    if dict(line["fields"]).get("upgrade", "websocket") != "websocket":
        found.append("an upgrade to what the edge does not speak")
    if dict(line["fields"])["host"] != HOST:
        found.append("another Host")
    if "evil" in dict(line["fields"]).get("x-amzn-requestid", ""):
        found.append("a request id of the client's")
    return found


async def judged(rig: Rig, upstream: Upstream, meant: tuple[Meant, ...], or_refused: bool, victims: list[str]) -> list[str]:
    """What is wrong with what the server has seen, when others have asked over the connections that an attack has used."""
    faults = []
    answers = await asyncio.gather(*(rig.ask(rig.request(target)) for target in victims))
    for target, ((status, _, body),) in zip(victims, answers, strict=True):
        if (status, body) != (200, target.encode()):
            faults.append(f"{target} was answered {status} {body!r}")
    lines = await upstream.seen()
    seen = requests(lines)
    for target in victims:
        if seen.count(("GET", target, b"")) != 1:
            faults.append(f"{target} was not seen once")
    got = [one for one in seen if one[1] not in victims]
    if got != list(meant) and not (or_refused and not got):
        faults.append(f"seen: {got}")
    return faults + [f"fields: {found}" for line in lines if (found := faults_of_fields(line)) and line["target"] not in ("/?x",)]


@pytest.mark.parametrize("kind", HTTP1)
async def test_what_an_application_receives_is_what_the_edge_meant(rig: Rig, upstream: Upstream, kind: str) -> None:
    """An attack, then two clients on connections that may be the attack's, for each case."""
    faults: dict[str, Any] = {}
    await upstream.seen()
    for number, (name, case) in enumerate(HTTP1[kind].items()):
        if kind == "early" and upstream.name == "http.server":
            continue  # it leaves a body unread, and takes it for a request by itself: its own control (below)
        await rig.ask(rig.request(f"/before-{number}"))  # a connection is there to be taken over
        await upstream.seen()
        statuses = await attack(rig, case)
        found = await judged(rig, upstream, case.meant, case.or_refused, [f"/victim-{number}", f"/other-{number}"])
        if statuses != list(case.statuses) and not (case.or_refused and statuses):
            found.append(f"answered {statuses}")
        if found:
            faults[name] = found
    assert not faults, "\n".join(f"{name}: {found}" for name, found in faults.items())


def head_of(rig: Any, case: Downgrade) -> list[tuple[bytes, bytes]]:
    pseudo = {
        b":method": b"POST" if case.body else b"GET",
        b":scheme": b"https",
        b":path": b"/a",
        b":authority": b"AUTHORITY",
    } | case.pseudo
    fields = [(name, value) for name, value in pseudo.items() if value is not None]
    fields += [(b"x-aws-proxy-auth", rig.token.encode()), (b"x-aws-proxy-port", b"%d" % rig.app_port), *case.fields]
    return [(name, value.replace(b"AUTHORITY", HOST.encode())) for name, value in fields]


async def test_what_an_application_receives_of_http2_is_what_the_edge_meant(rig: Rig, upstream: Upstream) -> None:
    faults: dict[str, Any] = {}
    for number, (name, case) in enumerate(HTTP2.items()):
        await rig.ask(rig.request(f"/before-{number}"))
        await upstream.seen()
        raw = Raw(*await rig.open())
        raw.send(f.headers(1, f.encode(head_of(rig, case)), not case.body))
        if case.body:
            raw.send(f.frame(f.DATA, 0 if case.trailers else f.END_STREAM, 1, case.body))
        if case.trailers:
            raw.send(f.headers(1, f.encode(case.trailers), True))
        outcome = await raw.outcome()
        found = await judged(rig, upstream, case.meant, False, [f"/victim-{number}", f"/other-{number}"])
        if outcome != case.outcome:
            found.append(outcome)
        raw.writer.close()
        if found:
            faults[name] = found
    assert not faults, "\n".join(f"{name}: {found}" for name, found in faults.items())


# ---- the same without the edge ----


class Nobody:
    """Who speaks straight to a server needs no token."""

    token, app_port = "none", 1


# What a server takes for two requests that another reads as one, of those that it gets as they are.
SMUGGLES = {
    "uvicorn": {
        "two framings": ["CL.TE", "CL.TE, the coding first"],
        "codings": ["TE.TE b'Transfer-Encoding:\\r\\n chunked'", "TE.TE b'X: x\\nTransfer-Encoding: chunked'"],
        "lines": ["bare LF ends the head", "folded field"],
        "chunks": ["bare LF in the end, after a CRLF", "TERM.EXT: bare CR in an extension", "EXT.TERM: an extension that is not closed", "trailer with a bare LF"],
    },
    "http.server": {
        "two framings": ["CL.TE", "CL.TE, Connection takes the length away"],
        "codings": ["TE.TE b'Transfer-Encoding: xchunked'", "TE.TE b'Transfer-Encoding: chunked, identity'", "TE.TE b'Transfer-Encoding: chunked\\r\\nTransfer-Encoding: x'",
                    "TE.TE b'X: x\\rTransfer-Encoding: chunked'", "TE.TE b'Transfer-Encoding:\\r\\n chunked'", "TE, chunked twice"],
        "lengths": ["CL b'Content-Length: 0\\r\\nContent-Length: SIZE'", "CL b'Content-Length: 0_0'", "CL b'Content-Length : SIZE'", "CL b'Content-Length: 0\\nContent-Length: SIZE'"],
        "lines": ["two bare LF end the head", "folded field", "line without a colon", "NUL in a name", "line of HTTP/0.9 before the request"],
        "chunks": ["bare LF behind a size", "bare LF behind a chunk", "TERM.EXT: bare LF in an extension", "SPILL.TERM: a chunk longer than its size", "size with 0x", "size with a sign",
                   "size with an underscore", "trailer with a space before its colon"],
        "early": ["early answer: the body is a request", "early answer: Expect"],
    },
}  # fmt: skip


@pytest.mark.parametrize("upstream", SMUGGLES, indirect=True, scope="module")
async def test_without_the_edge_the_same_bytes_smuggle(upstream: Upstream) -> None:
    await upstream.seen()
    missed = []
    for kind, names in SMUGGLES[upstream.name].items():
        for name in names:
            await upstream.straight(filled(Nobody, HTTP1[kind][name].data))
            if "/evil" not in [target for _, target, _ in requests(await upstream.seen())]:
                missed.append(f"{kind}: {name}")
    assert not missed


def downgraded(fields: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """As a forwarder writes it that looks at nothing."""
    pseudo = dict(fields)
    lines = [b"%b %b HTTP/1.1" % (pseudo[b":method"], pseudo[b":path"]), b"host: " + pseudo[b":authority"]]
    lines += [name + b": " + value for name, value in fields if not name.startswith(b":")]
    if body and not {b"content-length", b"transfer-encoding"} & pseudo.keys():
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


DOWNGRADES = ("H2.CL: a length of nothing", "H2.TE", "a request in a value", "a request in :method")


async def test_a_forwarder_that_writes_fields_as_they_are_smuggles(upstream: Upstream) -> None:
    await upstream.seen()
    missed = []
    for name in DOWNGRADES:
        await upstream.straight(downgraded(head_of(Nobody, HTTP2[name]), HTTP2[name].body))
        if "/evil" not in [target for _, target, _ in requests(await upstream.seen())]:
            missed.append(name)
    assert not missed
