"""What the host lends to a build's RUN steps: how to reach its package mirrors. None of it may stay in an image.

One directory, mounted read-only at /dev/.lent in each step by what starts it (build-runc.sh): the root has no trace of it then, neither
has the Dockerfile, nor a layer, nor a cache's key. apt's sources and options, pip's settings with file indexes mounted inside, and the
certificates that the host trusts lie there; variables of the step point to them, where the image has none of that name. An image's own
sources are read beside these.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from .kernel import AssetError
from .mirrors import apt_options, host_sources

MOUNT = "/dev/.lent"
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_CA_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO",
)  # fmt: skip


def prepare(directory: Path) -> None:
    """Fills `directory` afresh. `mounts` in it lists what the jail must bind inside, "source target" a line; `environment` is the
    beginning of a JSON array."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "apt").mkdir(parents=True)
    (directory / "xdg/pip").mkdir(parents=True)
    mounts: list[tuple[str, str]] = []
    # pip takes /etc/pip.conf and the user's settings before those of XDG_CONFIG_DIRS, where PIP_CONFIG_FILE would hide the user's.
    environment = {"APT_CONFIG": f"{MOUNT}/apt/apt.conf", "XDG_CONFIG_DIRS": f"{MOUNT}/xdg:/etc/xdg"}
    if os.path.exists(_CA_BUNDLE):
        shutil.copy(_CA_BUNDLE, directory / "ca.pem")
        environment |= dict.fromkeys(_CA_VARIABLES, f"{MOUNT}/ca.pem")
    try:
        (directory / "apt/host.sources").write_text(host_sources(), encoding="utf-8")
    except AssetError:
        (directory / "apt/host.sources").write_text("", encoding="utf-8")
    # A step that is cut off is made again: nothing need be on the disk before it ends.
    (directory / "apt/apt.conf").write_text(
        apt_options().replace(_CA_BUNDLE, f"{MOUNT}/ca.pem") + 'APT::Sandbox::User "root";\nDPkg::Options:: "--force-unsafe-io";\n',
        encoding="utf-8",
    )
    (directory / "xdg/pip/pip.conf").write_text(_pip_settings(mounts), encoding="utf-8")
    for _, target in mounts:
        (directory / target).mkdir(parents=True, exist_ok=True)
    (directory / "mounts").write_text("".join(f"{source} {target}\n" for source, target in mounts), encoding="utf-8")
    (directory / "environment").write_text("".join(f"{json.dumps(f'{name}={value}')}," for name, value in environment.items()))


def _pip_settings(mounts: list[tuple[str, str]]) -> str:
    """Writes the host's pip configuration; indexes that are folders here are mounted there."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True, timeout=60
    ).stdout
    settings: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout"):
            settings[key] = " ".join(_translate(word, mounts) for word in value.strip("'\"").replace("\\n", " ").split())
    if os.path.exists(_CA_BUNDLE):
        settings["cert"] = f"{MOUNT}/ca.pem"
    return "[global]\ndisable-pip-version-check = true\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def _translate(word: str, mounts: list[tuple[str, str]]) -> str:
    path = word.removeprefix("file://")
    if not path.startswith("/"):
        return word
    source = path.rstrip("/")
    # An index of links may point beside itself: its parent comes along.
    if source.endswith("/simple"):
        source = source.removesuffix("/simple")
    target = next((place for known, place in mounts if known == source), f"indexes/{len(mounts)}")
    if (source, target) not in mounts and os.path.isdir(source):
        mounts.append((source, target))
    return word.replace(source, f"{MOUNT}/{target}")


def mirror_hosts(directory: Path) -> list[str]:
    """Returns the hosts that the lent settings name: a build may reach them even when their addresses are private ones."""
    text = "".join((directory / name).read_text(encoding="utf-8") for name in ("apt/host.sources", "apt/apt.conf", "xdg/pip/pip.conf"))
    hosts = {urlsplit(url).hostname for url in re.findall(r"https?://[^\s\"';]+", text)}
    return sorted(host for host in hosts if host)
