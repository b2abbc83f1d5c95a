"""`make sbom` and `make audit`: what the service is made of, and what is known of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "config"))
import audit  # noqa: E402
import sbom  # noqa: E402

STATUS = """Package: libc6
Status: install ok installed
Version: 2.41-12

Package: gone
Status: deinstall ok config-files
Version: 1.0
"""


def test_each_package_of_the_lock_is_there_with_its_digests() -> None:
    lock = (REPO / "requirements.lock").read_text()
    found = list(sbom.python_packages(lock))
    assert len(found) == sum(not line.startswith(" ") for line in lock.splitlines())
    assert sum(len(one["externalReferences"][0]["hashes"]) for one in found) == lock.count("--hash=sha256:")
    assert {one["purl"] for one in found} >= {"pkg:pypi/cryptography@" + lock.partition("\ncryptography==")[2].split()[0]}


def test_debian_packages_are_those_that_are_installed_with_their_versions() -> None:
    (one,) = sbom.debian_packages("base image", sbom.in_status(STATUS))
    assert (one["name"], one["version"], one["purl"]) == ("libc6", "2.41-12", "pkg:deb/debian/libc6@2.41-12")
    assert sbom.of_the_host(["dpkg", "no-such-package"])[0][0] == "dpkg" and sbom.owners(
        [Path("/usr/bin/dpkg"), Path("/lib/x86_64-linux-gnu/libc.so.6")]
    ) == {"dpkg", "libc6"}


def auditor(tmp_path: Path, stdout: str, stderr: str = "", status: int = 0) -> str:
    """A stand-in for pip-audit."""
    (tmp_path / "out").write_text(stdout)
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/out\necho '{stderr}' >&2\nexit {status}\n")
    program.chmod(0o755)
    return str(program)


def dependencies(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("stdout", "stderr", "ended", "status", "line"),
    [
        (dependencies(GOOD), "", 0, 0, "audit: nothing is known of the lock's 1 packages"),
        (dependencies(GOOD, BAD), "", 1, 1, "audit: bad 2.0: CVE-2026-1, mended in 2.1"),
        (
            dependencies(GOOD, UNKNOWN),
            "",
            0,
            2,
            "audit: the database of known faults could not be had for 1 of 2 packages: Dependency not found",
        ),
        (
            "",
            "Traceback:\nConnectionError: no route",
            1,
            2,
            "audit: the database of known faults could not be had: ConnectionError: no route",
        ),
    ],
)
def test_an_audit_says_what_it_found_and_that_it_could_not_ask(
    tmp_path: Path, stdout: str, stderr: str, ended: int, status: int, line: str
) -> None:
    assert audit.audit(auditor(tmp_path, stdout, stderr, ended), "lock") == (status, [line])


def test_an_auditor_that_is_not_there_is_no_clean_bill(tmp_path: Path) -> None:
    status, (line,) = audit.audit(str(tmp_path / "none"), "lock")
    assert status == 2 and "could not be had" in line
