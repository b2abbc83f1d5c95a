"""What Amazon Linux's packages are called in Debian: a table (packages.map) for names that follow no rule, and rules for the rest.

Nothing here runs a program or reads the system: `known` is the set of names that apt knows. A name with a version in it is never given
another version: it is refused with what there is instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

_ARCHITECTURE = re.compile(r"\.(?:x86_64|aarch64|noarch|i[36]86|src|amd64|arm64)$")
_VERSIONED = re.compile(r"(?P<name>.+?)-(?:\d+:)?(?P<version>\d[\w.+~^]*?\*?)(?:-[\w.+~^*]+)?")
_SONAME = r"(?:-?\d[\d.]*(?:-\d+)*[a-z]?)"
_NODE = re.compile(r"nodejs(?P<version>\d\d)(?:-(?P<part>npm|devel|libs|docs|full-i18n))?")
_PYTHON = re.compile(r"python(?P<version>3\.\d+)(?:-(?P<part>[a-z0-9_.-]+))?")
_JAVA = re.compile(r"java-(?P<version>[\d.]+)-(?:amazon-corretto|openjdk|devel)(?:-(?P<part>[a-z-]+))?")
_VERSIONS = {  # name with a version in it: what Debian 12 has, how a part is called there, and how to write it here
    "php": (re.compile(r"php(?P<version>8\.\d)(?P<part>-[a-z0-9-]+)?"), "8.2", "php8.2"),
    "ruby": (re.compile(r"ruby(?P<version>\d\.\d)(?P<part>-[a-z0-9-]+)?"), "3.1", "ruby"),
    "postgresql": (re.compile(r"postgresql(?P<version>\d\d)(?P<part>-[a-z0-9-]+)?"), "15", "postgresql15"),
    "mariadb": (re.compile(r"mariadb(?P<version>\d{3,4})(?P<part>-[a-z0-9-]+)?"), "1011", "mariadb1011"),
    "golang": (re.compile(r"golang(?P<version>1\.\d+)(?P<part>-[a-z0-9-]+)?"), "1.19", "golang"),
    "gcc": (re.compile(r"gcc(?P<version>1\d)(?P<part>-[a-z0-9+-]+)?"), "12", "gcc"),
    "dotnet": (re.compile(r"(?:dotnet|aspnetcore)-(?:sdk|runtime)-(?P<version>\d+\.\d)(?P<part>)"), "", ""),
}
_PARTS = {  # of the above: the part's name in Debian
    "php": {
        "": ["php8.2-cli", "php8.2-fpm", "php8.2-common"], "-cli": ["php8.2-cli"], "-mysqlnd": ["php8.2-mysql"],
        "-pdo": ["php8.2-common"], "-devel": ["php8.2-dev"], "-process": ["php8.2-common"], "-json": ["php8.2-common"],
        "-sodium": ["php8.2-common"],
    },
    "ruby": {"": ["ruby"], "-devel": ["ruby-dev"], "-rubygems": ["ruby"], "-libs": ["ruby"], "-rubygem-bundler": ["ruby-bundler"]},
    "postgresql": {"": ["postgresql-client"], "-server": ["postgresql"], "-contrib": ["postgresql"], "-private-libs": ["libpq5"],
                   "-private-devel": ["libpq-dev"], "-server-devel": ["postgresql-server-dev-15"], "-devel": ["libpq-dev"],
                   "-plpython3": ["postgresql-plpython3-15"], "-plperl": ["postgresql-plperl-15"]},
    "mariadb": {"": ["mariadb-client"], "-server": ["mariadb-server"], "-devel": ["libmariadb-dev"], "-common": ["mariadb-common"],
                "-server-utils": ["mariadb-client"], "-errmsg": [], "-backup": ["mariadb-backup"]},
    "golang": {"": ["golang-go"]},
    "gcc": {"": ["gcc"], "-c++": ["g++"], "-gfortran": ["gfortran"]},
}  # fmt: skip
_INSTEAD = {
    "postgresql": "PostgreSQL here is 15",
    "mariadb": "MariaDB here is 10.11",
    "php": "PHP here is 8.2",
    "ruby": "Ruby here is 3.1",
    "golang": "Go here is 1.19",
    "gcc": "GCC here is 12",
    "dotnet": "there is no .NET here: write `RUN curl -fsSL https://dot.net/v1/dotnet-install.sh | bash -s -- --channel VERSION`",
}
GROUPS = {
    "development tools": [
        "build-essential", "autoconf", "automake", "bison", "flex", "gdb", "gettext", "git", "libtool", "patch", "pkg-config", "strace",
    ],
    "development libraries": [
        "build-essential", "pkg-config", "libssl-dev", "zlib1g-dev", "libffi-dev", "libncurses-dev", "libreadline-dev",
    ],
    "system tools": [
        "iproute2", "iputils-ping", "lsof", "procps", "psmisc", "rsync", "strace", "tcpdump",
    ],
}  # fmt: skip
_GROUP_NAMES = {"development": "development tools", "development-tools": "development tools", "development-libs": "development libraries",
                "development-libraries": "development libraries", "system-tools": "system tools"}  # fmt: skip
PYTHON_HERE = "3.11"


class Refusal(Exception):
    """What was asked for cannot be had; the text says what to write instead."""


@dataclass
class Table:
    """packages.map: a name, then Debian's names. `!` begins a refusal's text, `~` a note after the names; a name with nothing after it
    comes with the base, or with whatever needs it."""

    names: dict[str, list[str]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Table:
        table = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            name, _, rest = line.partition(" ")
            if rest.startswith("!"):
                table.refusals[name] = rest[1:].strip()
                continue
            words, _, note = rest.partition("~")
            table.names[name] = words.split()
            if note.strip():
                table.notes[name] = note.strip()
        return table


@dataclass
class Wanted:
    """What an install comes to. `apt` are packages, perhaps with a version as `name=1.2` or `name=1.2*`; others are from elsewhere."""

    apt: list[str] = field(default_factory=list)
    node: list[str] = field(default_factory=list)  # major versions
    python: list[str] = field(default_factory=list)  # minor versions
    npm: list[str] = field(default_factory=list)
    locales: list[str] = field(default_factory=list)  # languages
    notes: list[str] = field(default_factory=list)

    def add(self, other: Wanted) -> None:
        for name, found in vars(other).items():
            kept = getattr(self, name)
            kept += [one for one in found if one not in kept]


def translate(specs: Iterable[str], table: Table, known: Collection[str]) -> Wanted:
    """Raises Refusal, which names all that cannot be had."""
    wanted, refused = Wanted(), []
    for spec in specs:
        try:
            wanted.add(one(spec, table, known))
        except Refusal as refusal:
            refused.append(str(refusal))
    if refused:
        raise Refusal("\n".join(refused))
    return wanted


def one(spec: str, table: Table, known: Collection[str]) -> Wanted:
    """Of one argument: a name, perhaps with an architecture or a version, a group, a path, an RPM."""
    if spec.startswith("@"):
        return Wanted(apt=group(spec[1:]))
    if spec.endswith(".rpm") or "://" in spec:
        raise Refusal(
            f"{spec} is an RPM, and this base is Debian: fetch its .deb and write `apt-get install ./NAME.deb`, or its tar archive"
        )
    if spec.startswith("/"):
        spec = spec.rpartition("/")[2]
    name = _ARCHITECTURE.sub("", spec)
    found = by_name(name, table, known)
    if found is not None:
        return found
    match = _VERSIONED.fullmatch(name)
    if match is not None:
        found = by_name(match["name"], table, known)
        if found is not None and found.apt:
            # The first package is the one that was named; what is there is checked against its version before anything is installed.
            return Wanted([f"{found.apt[0]}={match['version']}", *found.apt[1:]], notes=found.notes)
    raise Refusal(unknown(name, known))


def by_name(name: str, table: Table, known: Collection[str]) -> Wanted | None:
    """None where nothing is known by that name. Raises Refusal."""
    if name in table.refusals:
        raise Refusal(f"{name}: {table.refusals[name]}")
    if name in table.names:
        note = table.notes.get(name)
        npm = [word.removeprefix("npm:") for word in table.names[name] if word.startswith("npm:")]
        return Wanted(
            [word for word in table.names[name] if not word.startswith("npm:")], npm=npm, notes=[f"{name}: {note}"] if note else []
        )
    return _versioned(name) or _locale(name) or _by_rules(name, known)


def _versioned(name: str) -> Wanted | None:
    """Names of Amazon Linux that have a version in them."""
    if match := _NODE.fullmatch(name):
        return Wanted(node=[match["version"]])
    if match := _PYTHON.fullmatch(name):
        return _python(match["version"], match["part"] or "")
    if match := _JAVA.fullmatch(name):
        if match["version"] not in ("17", "17.0"):
            raise Refusal(f"{name}: Java here is 17: write java-17-amazon-corretto-headless or java-17-amazon-corretto-devel")
        return Wanted(["openjdk-17-jre-headless" if match["part"] == "headless" else "openjdk-17-jdk-headless"])
    for what, (pattern, here, write) in _VERSIONS.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if match["version"] != here:
            raise Refusal(f"{name}: {_INSTEAD[what]}" + (f": write {write}{match['part'] or ''}" if write else ""))
        part = match["part"] or ""
        return Wanted(_PARTS[what].get(part, [f"{write}{part}"]))
    return None


def _python(version: str, part: str) -> Wanted:
    if version == PYTHON_HERE:
        return Wanted({"": ["python3", "python3-venv"], "devel": ["python3-dev"], "libs": ["python3"], "tkinter": ["python3-tk"],
                       "test": ["python3"], "idle": ["idle-python3.11"]}.get(part, [f"python3-{part}"]))  # fmt: skip
    if part in ("", "pip", "devel", "libs", "setuptools", "wheel", "tkinter", "test", "idle", "debug"):
        return Wanted(python=[version])
    raise Refusal(f"python{version}-{part}: write `python{version} -m pip install {part}`")


def _locale(name: str) -> Wanted | None:
    match = re.fullmatch(r"(?:glibc-langpack|langpacks)-([a-z]{2,3})", name)
    return Wanted(["locales"], locales=[match[1]]) if match else None


def _by_rules(name: str, known: Collection[str]) -> Wanted | None:
    for candidates in _candidates(name):
        found = [candidate for candidate in candidates if candidate in known]
        if found:
            return Wanted(found[:1])
    library = _library(re.sub(r"-(?:libs?|devel)$", "", name), "-dev" if name.endswith("-devel") else "", known)
    return Wanted([library]) if library else None


def _candidates(name: str) -> Iterator[list[str]]:
    """Names in Debian, likelier ones first."""
    lower = name.lower()
    if lower.endswith("-devel"):
        stem = lower.removesuffix("-devel")
        bare = stem.removeprefix("lib")
        yield [f"lib{bare}-dev", f"{stem}-dev", f"{bare}-dev", f"lib{bare.replace('-', '')}-dev"]
        return
    if lower.endswith("-fonts"):
        stem = lower.removesuffix("-fonts").removeprefix("google-")
        family = re.sub(r"-(?:sans|serif|mono|common|all)$", "", stem)
        yield [f"fonts-{stem}", f"fonts-{stem}-core", f"fonts-{family}", f"fonts-{family}-core"]
        return
    if lower.startswith("tesseract-langpack-"):
        yield [f"tesseract-ocr-{lower.removeprefix('tesseract-langpack-')}"]
        return
    if lower.startswith("perl-"):
        yield [f"lib{lower.removeprefix('perl-')}-perl"]
        return
    yield [name]
    yield [lower]
    for ending, other in (
        ("-doc", ""),
        ("-docs", ""),
        ("-filesystem", ""),
        ("-common", ""),
        ("-minimal", ""),
        ("-tools", "-utils"),
        ("-utils", "-tools"),
    ):
        if lower.endswith(ending):
            yield [f"{lower.removesuffix(ending)}{other}"]
    if lower.startswith("rubygem-"):
        yield [f"ruby-{lower.removeprefix('rubygem-')}"]
    if lower.startswith("php-"):
        yield [f"php8.2-{lower.removeprefix('php-')}"]


def _library(name: str, ending: str, known: Collection[str]) -> str | None:
    """A library by its name without the version of its interface: libX11 is libx11-6, libicu is libicu72, libuv-devel is libuv1-dev."""
    stem = re.escape(name.lower().removeprefix("lib"))
    pattern = re.compile(rf"lib{stem}(?!64-){_SONAME}{ending}")  # 64-: of the same interface, with wider integers
    found = [one for one in known if one.startswith("lib") and pattern.fullmatch(one)]
    return max(found, key=lambda one: ([int(part) for part in re.findall(r"\d+", one)], one)) if found else None


def group(name: str) -> list[str]:
    """Raises Refusal."""
    key = name.strip().lower().strip("^")
    found = GROUPS.get(_GROUP_NAMES.get(key, key))
    if found is None:
        raise Refusal(f"there is no group {name} here: {', '.join(one.title() for one in GROUPS)} are; or name its packages")
    return list(found)


def unknown(name: str, known: Collection[str]) -> str:
    """What to write instead, where something is near."""
    lower = name.lower()
    near = [one for one in known if lower in one and len(one) < len(lower) + 8]
    near = sorted(near, key=len)[:3] or get_close_matches(lower, known, 3, 0.8)
    return f"no package {name} here, where Debian 12 is the base: " + (
        f"{', '.join(near)}?" if near else f"`dnf search {name}` looks for it"
    )
