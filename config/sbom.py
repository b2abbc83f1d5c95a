"""Writes what the service is made of, as CycloneDX 1.6 (`make sbom`): the lock's packages with the digests of their files, what was made on
this host with its digest, and the Debian packages in that, and of the host, with their versions."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gateway.config import Settings
from vmm import assets, builder_root, digests, jail, kernel

REPO = Path(__file__).resolve().parents[1]
_SECONDS = 60


def python_packages(lock: str) -> Iterator[dict[str, Any]]:
    for name, version, rest in re.findall(r"^([a-z0-9.-]+)==(\S+) \\\n((?: .*\n?)+)", lock, re.MULTILINE):
        hashes = [{"alg": "SHA-256", "content": digest} for digest in re.findall(r"sha256:([0-9a-f]{64})", rest)]
        purl = f"pkg:pypi/{name}@{version}"
        files = {"type": "distribution", "url": "requirements.lock", "comment": "of each file of the release", "hashes": hashes}
        yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, "externalReferences": [files]}


def debian_packages(place: str, versions: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """`place`: where they are, since one may be in several, in several versions."""
    for name, version in sorted(set(versions)):
        one = {"type": "library", "bom-ref": f"{place}: {name}", "name": name, "properties": [{"name": "torpor:in", "value": place}]}
        yield one | {"purl": f"pkg:deb/debian/{name}" + (f"@{version}" if version else "")} | ({"version": version} if version else {})


def in_status(status: str) -> list[tuple[str, str]]:
    """Of dpkg's list of what is installed."""
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found.append((fields["Package"], fields["Version"]))
    return found


def of_the_host(words: Iterable[str]) -> list[tuple[str, str]]:
    lines = _said("dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n", *words).splitlines()
    return [(name, version) for state, name, version in (line.split() for line in lines if len(line.split()) == 3) if state == "ii"]


def owners(files: Iterable[Path]) -> set[str]:
    """Which packages of the host files come from. dpkg knows some by names of before /usr had all."""
    names = {str(path.resolve()) for path in files}
    listing = _said("dpkg-query", "-S", *names, *(name.removeprefix("/usr") for name in names))
    return {name.partition(":")[0] for line in listing.splitlines() for name in line.partition(": ")[0].split(", ")}


def made_here(cache: Path) -> Iterator[dict[str, Any]]:
    versions = {"kernel": kernel.described(cache / "kernel"), "guest": f"protocol {kernel.guest(cache)[2]}"}
    for name, digest in assets.recorded(cache).items():
        if not digest:
            sys.exit(f"sbom: {cache / name} has no digest yet: run `torpor assets`")
        one = {"type": "file", "bom-ref": f"asset: {name}", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        yield one | ({"version": versions[name]} if name in versions else {})
    for name, path in (("vmlinuz", cache / "kernel/vmlinuz"), ("agent", cache / "guest/init")):
        yield {"type": "file", "bom-ref": f"file: {name}", "name": name, "hashes": [{"alg": "SHA-256", "content": digests.of_file(path)}]}


def document(cache: Path) -> dict[str, Any]:
    wanted = re.search(r"^PACKAGES = ((?:.*\\\n)*.*)$", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert wanted is not None
    base = _said("tar", "-xOf", str(cache / "base.tar"), "./var/lib/dpkg/status")
    components = [
        *python_packages((REPO / "requirements.lock").read_text(encoding="ascii")), *made_here(cache),
        *debian_packages("kernel", [(kernel.meta_package(), (cache / "kernel/version").read_text(encoding="ascii").strip())]),
        *debian_packages("base image", in_status(base)),
        *debian_packages("hypervisors' root", of_the_host(owners(Path(file) for file in jail.files()))),
        *debian_packages("host", of_the_host(wanted[1].replace("\\\n", " ").split())),
        # Unpacked without a list of what is installed: which files they are the root's digest says.
        *debian_packages("builder's root", ((name, "") for name in builder_root.PACKAGES)),
    ]  # fmt: skip
    version = importlib.metadata.version("torpor")
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components,
        "metadata": {"component": {"type": "application", "bom-ref": "torpor", "name": "torpor", "version": version}},
    }  # fmt: skip


def _said(*words: str) -> str:
    """What a program says; of dpkg-query also where it does not know one of the names."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode and words[0] != "dpkg-query":
        sys.exit(f"sbom: {' '.join(words[:3])}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(document(Settings().cache), indent=1))
