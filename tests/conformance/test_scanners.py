"""What scanners of TLS say of the endpoint."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.conformance]


def scan(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=300).stdout


def test_sslscan(guest: dict[str, Any]) -> None:
    """TLS 1.2 and 1.3 alone, and of 1.2 what HTTP/2 may be spoken over (RFC 9113, 9.2.2)."""
    found = Xml.fromstring(scan("sslscan", "--no-colour", "--xml=-", f"--sni-name={guest['host']}", f"127.0.0.1:{guest['port']}"))
    assert {(one.get("type"), one.get("version")) for one in found.iter("protocol") if one.get("enabled") == "1"} == {
        ("tls", "1.2"),
        ("tls", "1.3"),
    }
    older = [one.get("cipher", "") for one in found.iter("cipher") if one.get("sslversion") == "TLSv1.2"]
    assert older and all(name.startswith("ECDHE-") and ("GCM" in name or "CHACHA20" in name) for name in older)
    assert {one.get("vulnerable") for one in found.iter("heartbleed")} == {"0"}
    assert {one.get("supported") for one in found.iter("renegotiation")} == {"0"}


def test_testssl(guest: dict[str, Any], tmp_path: Path) -> None:
    """Protocols, suites and known attacks: nothing but OK, or a plain fact. (The certificate is a development authority's.)"""
    file, scanned = tmp_path / "found.json", f"{guest['host']}:{guest['port']}"
    scan(
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
        "-p",
        "-s",
        "-U",
        "--jsonfile",
        str(file),
        scanned,
    )
    found = {one["id"]: one for one in json.loads(file.read_text())}
    found.pop("engine_problem", None)  # of the scanner's own OpenSSL
    assert [one for one in found.values() if one["severity"] not in ("OK", "INFO")] == []
    assert found["cipherlist_AVERAGE"]["finding"] == "not offered" and found["ALPN_HTTP2"]["finding"] == "h2"
