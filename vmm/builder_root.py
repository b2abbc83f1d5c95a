"""The root in which builds run: Debian 13's dockerd, whose BuildKit does the work, with what it needs and no more.

Packages are unpacked, not configured: nothing in it is started but what build.sh names. Its programs are newer than the host's, so it
brings its libraries. It holds no setting and no name of the host.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from .kernel import AssetError
from .making import key_of
from .mirrors import SUITE as BASE_SUITE
from .mirrors import apt_options, host_sources

SUITE = "trixie"
PACKAGES = (
    "docker.io", "docker-cli", "docker-buildx", "containerd", "runc", "uidmap", "e2fsprogs", "mount", "util-linux", "coreutils", "tar",
    "sed", "dash",
)  # fmt: skip
# Of no use to a build: other ways to run containers, and what people read.
_LEFT_OUT = (
    "/usr/bin/ctr", "/usr/bin/containerd-shim*", "/usr/sbin/docker-proxy", "/usr/bin/docker-proxy", "/usr/bin/perl*", "/usr/share/*",
    "/usr/lib/systemd/*", "/usr/lib/udev/*", "/var/lib/*", "/usr/lib/x86_64-linux-gnu/gconv/*",
)  # fmt: skip
_DEADLINE_SECONDS = 600
_ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def root_key() -> str:
    return key_of(make_root, sources, SUITE, PACKAGES, _LEFT_OUT)


def sources() -> str:
    """The host's apt sources, of the release that has BuildKit. Raises AssetError."""
    try:
        return host_sources(SUITE)
    except AssetError:
        return re.sub(rf"\b{BASE_SUITE}\b", SUITE, host_sources(BASE_SUITE))


def make_root(target: Path) -> None:
    """Unpacks the packages into `target`, which is made. Raises AssetError."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        work = Path(directory)
        (work / "apt.conf").write_text(apt_options(), encoding="utf-8")
        (work / "host.sources").write_text(sources(), encoding="utf-8")
        command = [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=extract", "--format=directory", f"--include={','.join(PACKAGES)}",
            f"--aptopt={work / 'apt.conf'}", '--aptopt=APT::Install-Recommends "false"', '--aptopt=APT::Sandbox::User "root"',
            *(f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT),
            SUITE, str(target), str(work / "host.sources"),
        ]  # fmt: skip
        try:
            subprocess.run(
                [*_ENDS_WITH_US, *command], check=True, capture_output=True, text=True, timeout=_DEADLINE_SECONDS,
                env=os.environ | {"TMPDIR": directory},
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise AssetError(f"mmdebstrap: {str(error.stderr or error).strip()[-600:]}") from error
    for name in ("etc", "var", "dev", "tmp"):
        subprocess.run(["rm", "-rf", target / name], check=True, timeout=60)
    for name in ("bin", "sbin", "lib", "lib64"):
        (target / name).symlink_to(f"usr/{name}")
