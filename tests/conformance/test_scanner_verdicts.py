"""What two scanners say of an edge's TLS and of the API's, kept in verdicts/: whatever changes there is looked at, and kept anew by
VERDICTS=write."""

from __future__ import annotations

import asyncio
import json
import os
import re
import xml.etree.ElementTree as Xml
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from api_rig import ApiRig
from edge_rig import HOST, Rig

from gateway.api.connections import Certificate
from gateway.config import Settings
from gateway.edge.client.certificates import Certificates
from gateway.instance import make_certificates

pytestmark = [pytest.mark.service, pytest.mark.conformance]
VERDICTS = Path(__file__).resolve().parent / "verdicts"
# Of testssl: what is no verdict (times, addresses, the scanner's own OpenSSL), or another in each run.
_NO_VERDICT = re.compile(r"engine_problem|scanTime|service|host_certificate|DROWN_hint|TLS_timestamp")


@pytest.fixture(params=["endpoint", "api"])
async def scanned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, str, int]]:
    """Name, host and port of a listener of ours."""
    settings = Settings(root=tmp_path, api={"tls": True})
    settings.tls_dir.mkdir(parents=True)
    make_certificates(settings)
    if request.param == "endpoint":
        rig = Rig(tmp_path, monkeypatch)
        await rig.start(certificates=Certificates(settings.tls_dir))
        yield "endpoint", HOST, rig.port
        await rig.stop()
    else:
        api = ApiRig(tmp_path / "api", tls=Certificate(settings.tls_dir / "api.crt", settings.tls_dir / "api.key").context)
        yield "api", "localhost", api.port
        await asyncio.to_thread(api.close)


async def scan(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(300):
        out, _ = await process.communicate()
    assert process.returncode == 0, out[-2000:]
    return out.decode()


def judge(name: str, verdict: list[str]) -> None:
    """Compares a verdict with what is kept of it."""
    path = VERDICTS / f"{name}.txt"
    if os.environ.get("VERDICTS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(verdict) + "\n", encoding="utf-8")
    kept = path.read_text(encoding="utf-8").splitlines()
    assert verdict == kept, "\n".join(
        [f"+ {one}" for one in verdict if one not in kept] + [f"- {one}" for one in kept if one not in verdict]
    )


async def test_sslscan(scanned: tuple[str, str, int]) -> None:
    name, host, port = scanned
    found = Xml.fromstring(
        await scan("sslscan", "--no-colour", "--no-check-certificate", "--xml=-", f"--sni-name={host}", f"127.0.0.1:{port}")
    )
    verdict = []
    for one in found.iter():
        said = {key: value for key, value in one.attrib.items() if key not in ("host", "port", "sniname", "time", "id", "strength")}
        if one.tag in ("protocol", "renegotiation", "compression", "fallback", "heartbleed", "cipher", "group") and said:
            verdict.append(" ".join([one.tag, *(f"{key}={value}" for key, value in sorted(said.items()))]))
    judge(f"{name}-sslscan", sorted(verdict))


async def test_testssl(scanned: tuple[str, str, int], tmp_path: Path) -> None:
    name, host, port = scanned
    file = tmp_path / "found.json"
    what = ("-p", "-s", "-f", "-U", "-P")  # protocols, suites, forward secrecy, attacks, the server's preference
    await scan(
        "testssl",
        "--quiet",
        "--color",
        "0",
        "--warnings",
        "batch",
        "--nodns",
        "none",
        "--ip",
        "127.0.0.1",
        *what,
        "--jsonfile",
        str(file),
        f"{host}:{port}",
    )
    found = [one for one in json.loads(file.read_text()) if not _NO_VERDICT.search(one["id"])]
    judge(f"{name}-testssl", [f"{one['id']}: {one['severity']}: {' '.join(one['finding'].split())}" for one in found])
