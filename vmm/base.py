"""The base image: the announcement's own where its registry answers, else a small Debian that carries `dnf`, made once with mmdebstrap.

Of the local one: the host's package sources are lent to the bootstrap. They stay in the base where a microVM can reach them by itself, so
that its apt works. Authorities that the host's operator added, the base trusts too.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from . import registry
from .kernel import AssetError
from .making import key_of
from .mirrors import SUITE, apt_options, host_sources

_REGISTRY = "registry"  # first word of the key of a base that was pulled
_DEADLINE_SECONDS = 600
_ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# What users of Amazon Linux's minimal image count on, and little more.
EXTRA = (
    "usr-is-merged", "apt", "ca-certificates", "debian-archive-keyring", "bzip2", "curl", "gpg", "iproute2", "less", "mount", "netbase",
    "procps", "python3-venv", "tzdata", "vim-tiny", "xz-utils",
)  # fmt: skip
SOURCES = "/etc/apt/sources.list.d/torpor.sources"  # builds see the host's own in its place (vmm/build_mirrors.py)
# As Amazon Linux has them: useradd makes a home (adduser, which asks for that by itself, must still be able not to), there is a group of
# nobody's, and one of administrators.
ACCOUNTS = (
    """sed -i '/^USERGROUPS_ENAB/a CREATE_HOME yes' "$1"/etc/login.defs""",
    """sed -i 's|^SHELL=.*|SHELL=/bin/bash|' "$1"/etc/default/useradd""",
    """sed -i "s/&systemcall(\\$useradd, '-d'/\\&systemcall(\\$useradd, '-M', '-d'/" "$1"/usr/sbin/adduser""",
    'chroot "$1" groupadd --system wheel; chroot "$1" groupadd --non-unique --gid 65534 nobody',
)
_AUTHORITIES = Path("/usr/local/share/ca-certificates")
CONFIG = Path(__file__).parents[1] / "config" / "base"


def _essential() -> list[str]:
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True, timeout=120).stdout
    names = []
    for record in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in record.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Essential") == "yes":
            names.append(fields["Package"])
    return sorted(set(names))


def guest_sources(sources: str) -> str:
    """The host's sources for microVMs, where each of their hosts is a name of the internet's: nothing where one is a file, an address or a
    name of this network, since a microVM's way out leads to the internet only."""
    hosts = [urlsplit(word) for line in sources.splitlines() if line.startswith("URIs:") for word in line.split()[1:]]
    reached = all(host.scheme in ("http", "https") and host.port is None and _is_public(host.hostname or "") for host in hosts)
    return "".join(f"{line}\n" for line in sources.splitlines() if not line.startswith("#")) if reached else ""


def _is_public(host: str) -> bool:
    labels = host.rstrip(".").split(".")
    return len(labels) > 1 and labels[-1].isalpha() and labels[-1] not in ("local", "localhost", "internal", "lan", "home", "corp", "test")


def _authorities() -> list[Path]:
    return sorted(_AUTHORITIES.glob("**/*.crt")) if _AUTHORITIES.is_dir() else []


def chosen_key(base: str, name: str, there: str, ask: Callable[[str], str]) -> str:
    """Returns the key of the base that the settings want (images.base), where one with the key `there` is. `ask` gives a name's digest.

    auto takes what is there, of whichever kind; where nothing is, or a local one of other code, the registry's where it answers. Raises
    AssetError where only the registry's will do, and it does not answer.
    """
    local = local_key()
    if base == "local" or (base == "auto" and there == local):
        return local
    if there.startswith(f"{_REGISTRY} {name}@"):
        return there
    try:
        digest = ask(name)
    except AssetError:
        if base == "registry":
            raise
        digest = ""
    return f"{_REGISTRY} {name}@{digest}" if digest or base == "registry" else local


def described(key: str) -> str:
    """Returns which base a key is of, for people."""
    return key.removeprefix(f"{_REGISTRY} ") if key.startswith(f"{_REGISTRY} ") else f"a local Debian ({SUITE}), whose dnf calls apt"


def make(target: Path, key: str, authorities: Path | None = None) -> None:
    """Writes the root of the base with that key as a tar archive. Raises AssetError."""
    if key.startswith(f"{_REGISTRY} "):
        name, _, digest = key.removeprefix(f"{_REGISTRY} ").rpartition("@")
        registry.pull(name, digest, target, authorities)
    else:
        make_base(target)


def local_key() -> str:
    tools = sorted(path for path in (CONFIG / "dnf").iterdir() if path.is_file())
    files = (*tools, CONFIG / "update-ca-trust", CONFIG / "adduser")
    return key_of(make_base, _essential, guest_sources, SUITE, EXTRA, ACCOUNTS, *files, *_authorities())


def make_base(target: Path) -> None:
    """Writes the base's root file system as a tar archive. Raises AssetError."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        work = Path(directory)
        (work / "apt.conf").write_text(apt_options(), encoding="utf-8")
        (work / "host.sources").write_text(host_sources(), encoding="utf-8")
        (work / "torpor.sources").write_text(guest_sources(host_sources()), encoding="utf-8")
        here, dnf, trust = (shlex.quote(str(path)) for path in (directory, CONFIG / "dnf", CONFIG / "update-ca-trust"))
        authorities = '"$1"/usr/local/share/ca-certificates'
        early = [f"mkdir -p {authorities}", *(f"cp {shlex.quote(str(path))} {authorities}/" for path in _authorities())]
        hooks = [
            'rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/99mmdebstrap',
            'mv "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/slim',
            f'install -m 644 {here}/torpor.sources "$1"{SOURCES}',
            f'install -d "$1"/usr/lib/torpor-dnf; install -m 644 {dnf}/*.py {dnf}/packages.map "$1"/usr/lib/torpor-dnf',
            'chmod 755 "$1"/usr/lib/torpor-dnf/dnf.py',
            'for name in dnf yum microdnf; do ln -s ../lib/torpor-dnf/dnf.py "$1"/usr/bin/$name; done',
            # Packages with alternatives (openjdk) fail to configure where the directory of their left-out manual pages is missing.
            'for section in 1 2 3 4 5 6 7 8; do mkdir -p "$1"/usr/share/man/man$section; done',
            *ACCOUNTS,
            f'install -m 755 {shlex.quote(str(CONFIG / "adduser"))} "$1"/usr/local/sbin/adduser',
            f'install -m 755 {trust} "$1"/usr/bin/update-ca-trust; ln -s update-alternatives "$1"/usr/bin/alternatives',
            'cd "$1"/etc && mkdir -p pki/tls/certs pki/ca-trust/source/anchors pki/ca-trust/extracted/pem',
            "for name in tls/certs/ca-bundle.crt ca-trust/extracted/pem/tls-ca-bundle.pem; do "
            'ln -s /etc/ssl/certs/ca-certificates.crt "$1"/etc/pki/$name; done',
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
            *(f"--setup-hook={hook}" for hook in early),
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
