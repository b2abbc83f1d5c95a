"""The host's package sources, lent to whatever fetches Debian's packages for it. Needs the standard library only: `make test-fresh` runs
before there is anything else."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .kernel import AssetError

SUITE = "bookworm"


def host_sources(suite: str = SUITE) -> str:
    """Returns the host's apt sources for a suite, as one deb822 text. Raises AssetError where there are none."""
    texts = []
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        text = file.read_text(encoding="utf-8")
        texts += [stanza for stanza in text.split("\n\n") if suite in stanza and "URIs:" in stanza]
    legacy = Path("/etc/apt/sources.list")
    if legacy.exists():
        for line in legacy.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] == ["deb"] and not words[1].startswith("[") and words[2].startswith(suite):
                texts.append(f"Types: deb\nURIs: {words[1]}\nSuites: {words[2]}\nComponents: {' '.join(words[3:])}")
    if not texts:
        raise AssetError(f"no apt source for {suite} in /etc/apt: this needs Debian 12, or a base image that can be pulled")
    keyring = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"
    return "\n\n".join(text.strip() if "Signed-By" in text else f"{text.strip()}\n{keyring}" for text in texts) + "\n"


def apt_options() -> str:
    """Returns the host's way to its mirror (proxies, certificates, retries), as an apt.conf."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True, timeout=20).stdout
    kept = ("Acquire::http", "Acquire::https", "Acquire::Retries")
    return "".join(f"{line}\n" for line in dump.splitlines() if line.startswith(kept) and '""' not in line)
