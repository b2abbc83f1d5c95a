"""The local base image: a small Debian that carries `dnf`, built once with mmdebstrap, for hosts without a registry.

Nothing of the host's package sources stays in it: they are lent to the bootstrap and taken out again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from .kernel import AssetError
from .making import key_of

SUITE = "bookworm"
_DEADLINE_SECONDS = 600
_ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
EXTRA = ("usr-is-merged", "apt", "ca-certificates", "debian-archive-keyring")
CONFIG = Path(__file__).parents[1] / "config" / "base"


def _essential() -> list[str]:
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True, timeout=120).stdout
    names = []
    for record in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in record.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Essential") == "yes":
            names.append(fields["Package"])
    return sorted(set(names))


def host_sources(suite: str = SUITE) -> str:
    """The host's apt sources for a suite, as one deb822 text. Raises AssetError where there are none."""
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
    """The host's way to its mirror (proxies, certificates, retries), as an apt.conf."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True, timeout=20).stdout
    kept = ("Acquire::http", "Acquire::https", "Acquire::Retries")
    return "".join(f"{line}\n" for line in dump.splitlines() if line.startswith(kept) and '""' not in line)


def base_key() -> str:
    return key_of(make_base, _essential, SUITE, EXTRA, *(CONFIG / name for name in ("dnf", "packages.map")))


def make_base(target: Path) -> None:
    """Writes the base's root file system as a tar archive. Raises AssetError."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        work = Path(directory)
        (work / "apt.conf").write_text(apt_options(), encoding="utf-8")
        (work / "host.sources").write_text(host_sources(), encoding="utf-8")
        config, share = shlex.quote(str(CONFIG)), '"$1"/usr/local/share/torpor'
        hooks = [
            'rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap',
            'mv "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/slim',
            f'mkdir -p "$1"/usr/local/bin {share}; cp {config}/dnf "$1"/usr/local/bin/dnf; chmod 755 "$1"/usr/local/bin/dnf',
            f"cp {config}/packages.map {share}/; chmod 644 {share}/packages.map",
            'for name in yum microdnf; do ln -s dnf "$1"/usr/local/bin/$name; done',
            'rm -rf "$1"/etc/resolv.conf "$1"/etc/hostname "$1"/var/log/* "$1"/var/cache/* "$1"/var/lib/apt/lists/*',
            ': > "$1"/etc/resolv.conf; : > "$1"/etc/machine-id',
        ]
        excludes = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*"]
        command = [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=custom", "--format=tar", f"--include={','.join([*_essential(), *EXTRA])}",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            f"--aptopt={work / 'apt.conf'}", '--aptopt=APT::Install-Recommends "false"', '--aptopt=APT::Sandbox::User "root"',
            *(f"--dpkgopt=path-exclude={path}" for path in excludes),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/lib/python3*/EXTERNALLY-MANAGED",
            *(f"--customize-hook={hook}" for hook in hooks),
            SUITE, str(target), str(work / "host.sources"),
        ]  # fmt: skip
        # Its tree lies beside what it makes: /tmp may be mounted noexec or be small. In namespaces of its own, all of it ends with us.
        environment = os.environ | {"TMPDIR": directory}
        try:
            subprocess.run(
                [*_ENDS_WITH_US, *command], check=True, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, env=environment
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise AssetError(f"mmdebstrap: {str(error.stderr or error).strip()[-600:]}") from error
