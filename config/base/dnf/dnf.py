#!/usr/bin/python3 -Es
"""dnf (and yum, microdnf) on Torpor's local base, which is Debian: what people use of it, carried out by apt.

Packages are called as Amazon Linux calls them (names.py). Versions of Node and Python that Debian has not come from where they are
published (elsewhere.py). With DNF_DRY_RUN set it prints what it would run.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import elsewhere
from names import GROUPS, Refusal, Table, Wanted, group, translate

HERE = Path(__file__).resolve().parent
DRY = bool(os.environ.get("DNF_DRY_RUN"))
LISTS = Path("/var/lib/apt/lists")
REPOSITORIES = Path("/etc/yum.repos.d")
VERSION = "4.14.0"
_VALUES = {  # options that take a value, by what they are called here; "" is of no consequence on this base
    "-c": "", "--config": "", "--releasever": "", "--enablerepo": "", "--disablerepo": "", "--repo": "", "--repoid": "",
    "--repofrompath": "", "-x": "exclude", "--exclude": "exclude", "--excludepkgs": "exclude", "--installroot": "installroot",
    "--setopt": "options", "--downloaddir": "into", "--destdir": "into", "-d": "", "--debuglevel": "", "-e": "", "--errorlevel": "",
    "-R": "", "--randomwait": "", "--comment": "", "--forcearch": "", "--arch": "", "--archlist": "", "--color": "", "--advisory": "",
    "--advisories": "", "--bz": "", "--bzs": "", "--cve": "", "--cves": "", "--sec-severity": "", "--secseverity": "",
    "--rpmverbosity": "", "--disableexcludes": "", "--disableplugin": "", "--enableplugin": "", "--from-repo": "", "--qf": "",
    "--queryformat": "",
}  # fmt: skip
_FLAGS = {
    "-y", "--assumeyes", "-q", "--quiet", "-v", "--verbose", "-C", "--cacheonly", "-b", "--best", "--nobest", "--nodocs", "--noplugins",
    "--allowerasing", "--skip-broken", "--skip-unavailable", "--strict", "--nostrict", "--refresh", "--nogpgcheck", "--no-gpgchecks",
    "--obsoletes", "--noobsoletes", "--security", "--bugfix", "--enhancement", "--newpackage", "-4", "-6", "--noautoremove",
    "--installed", "--available", "--upgrades", "--updates", "--all", "--recent", "--extras", "--showduplicates", "--disableexcludepkgs",
    "--transient", "--setopt", "--no-best", "--with-optional", "--ids", "--hidden", "--info", "--url", "--resolve", "--alldeps",
    "--source", "--debuginfo", "--add-repo", "--set-enabled", "--set-disabled", "--save", "--dump", "--enable", "--disable",
}  # fmt: skip


@dataclass
class Call:
    """A command line."""

    command: str = ""
    words: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    exclude: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    installroot: str = ""
    into: str = ""

    @property
    def is_lenient(self) -> bool:
        """Whether what cannot be had is passed over (dnf.conf(5), strict)."""
        flags = {"--skip-broken", "--skip-unavailable", "--nostrict"}
        return bool(self.flags & flags) or any(option in ("strict=0", "strict=false", "strict=no") for option in self.options)


def parse(arguments: list[str]) -> Call:
    """Raises Refusal."""
    call, left = Call(), list(arguments)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            if call.command:
                call.words.append(word)
            else:
                call.command = word
        elif name in _VALUES:
            if not equals:
                if not left:
                    raise Refusal(f"{name} needs a value")
                value = left.pop(0)
            if _VALUES[name] == "exclude":
                call.exclude += value.replace(",", " ").split()
            elif _VALUES[name] == "options":
                call.options.append(value.replace(" ", "").lower())
            elif _VALUES[name]:
                setattr(call, _VALUES[name], value)
        elif name in ("--version", "--help", "-h", "--assumeno", "--downloadonly"):
            call.flags.add(name)
        elif word in _FLAGS or re.fullmatch(r"-[yqvCb]+", word):
            call.flags.add(word)
        elif re.fullmatch(r"-[xcdeR].+", word):  # -x kernel as -xkernel
            left.insert(0, f"{_long(word[:2])}={word[2:]}")
        else:
            raise Refusal(f"the option {word} is not known here")
    return call


def _long(name: str) -> str:
    return {"-x": "--exclude", "-c": "--config", "-d": "--debuglevel", "-e": "--errorlevel", "-R": "--randomwait"}[name]


class Dnf:
    """Runs what a call comes to. `run` is given a program's words, and returns its exit code."""

    def __init__(self, call: Call, run: Callable[[list[str]], int], table: Table) -> None:
        self._call = call
        self._run = run
        self._table = table
        self._fresh = False
        self._has_said = False

    def known(self) -> set[str]:
        """The names of packages that apt has; its lists are fetched where there are none."""
        self._lists()
        if not DRY and not any(LISTS.glob("*Packages*")):
            raise Refusal(
                "the lists of packages could not be fetched: no archive is reached from here (a microVM needs an egress connector)"
            )
        return set(_output("apt-cache", "pkgnames").split())

    def install(self) -> int:
        if not self._call.words:
            raise Refusal(f"{self._call.command} names no package: write `dnf {self._call.command} NAME`")
        return self._install(self._wanted(self._call.words))

    def reinstall(self) -> int:
        return self._install(self._wanted(self._call.words), "--reinstall")

    def group(self) -> int:
        """dnf group install|list NAME…"""
        verb, names = next(iter(self._call.words), ""), self._call.words[1:]
        if self._call.command in ("groupinstall", "grouplist"):
            verb, names = self._call.command.removeprefix("group"), self._call.words
        if verb in ("list", "summary", ""):
            print("Available Groups:", *(f"   {name.title()}" for name in GROUPS), sep="\n")
            return 0
        if verb not in ("install", "mark") or not names:
            raise Refusal(f'group {verb} is not there: write `dnf groupinstall "Development Tools"`, or name packages')
        packages = [package for name in names for package in group(name)]
        return self._install(Wanted(apt=list(dict.fromkeys(packages))))

    def swap(self) -> int:
        """What is swapped for its equal in Debian (curl-minimal for curl) stays."""
        if len(self._call.words) != 2:
            raise Refusal("swap needs two packages")
        known = self.known()
        old, new = (translate([word], self._table, known) for word in self._call.words)
        gone = [f"{name}-" for name in old.apt if name not in new.apt]
        return self._install(new, *gone)

    def upgrade(self) -> int:
        self._lists(fresh=True)
        if self._call.words:
            names = [name for name in self._wanted(self._call.words).apt if _installed(name.partition("=")[0])]
            return self._apt("install", "--only-upgrade", *names) if names else _nothing()
        held = [name for pattern in self._call.exclude for name in _matching(pattern)]
        if held:
            self._run(["apt-mark", "-q", "hold", *held])
        try:
            return self._apt("upgrade")
        finally:
            if held:
                self._run(["apt-mark", "-q", "unhold", *held])

    def remove(self) -> int:
        names = []
        for word in self._call.words:
            found = [word] if _installed(word) else [name for name in _names(word, self._table) if _installed(name)]
            if not found:
                _say(f"No match for argument: {word}")
            names += found
        return self._apt("remove", *names) if names else _nothing()

    def autoremove(self) -> int:
        return self.remove() or self._apt("autoremove") if self._call.words else self._apt("autoremove")

    def makecache(self) -> int:
        return self._lists(fresh=True)

    def clean(self) -> int:
        code = self._run(["apt-get", "clean"])
        if not DRY:
            for entry in LISTS.glob("*"):
                entry.unlink() if entry.is_file() else shutil.rmtree(entry, ignore_errors=True)
        return code

    def list(self) -> int:
        words = [word for word in self._call.words if word not in ("installed", "available", "all", "updates", "upgrades")]
        is_available = "available" in self._call.words or "--available" in self._call.flags
        is_installed = "installed" in self._call.words or "--installed" in self._call.flags
        found = 0
        if not is_available:
            rows = _output("dpkg-query", "-W", "-f", "${Package}.${Architecture}\t${Version}\t${db:Status-Abbrev}\n").splitlines()
            rows = [row for row in rows if row.split("\t")[2].startswith("ii") and _chosen(row.partition(".")[0], words, self._table)]
            found += _rows("Installed Packages", [(*row.split("\t")[:2], "@System") for row in rows])
        if not is_installed and (is_available or words):
            names = sorted(name for name in self.known() if _chosen(name, words, self._table) and not _installed(name))
            found += _rows("Available Packages", [(name, _candidate(name), "debian") for name in names[:2000]])
        if words and not found:
            _say("No matching Packages to list")
            return 1
        return 0

    def info(self) -> int:
        self._lists()
        names = [name for word in self._call.words for name in _names(word, self._table)]
        return self._run(["apt-cache", "show", "--no-all-versions", *names])

    def search(self) -> int:
        self._lists()
        return self._run(["apt-cache", "search", *self._call.words])

    def provides(self) -> int:
        code = 1
        for word in self._call.words:
            path = word if word.startswith("/") else shutil.which(word) or word
            code &= self._run(["dpkg", "-S", os.path.realpath(path)])
        if code:
            _say("only files of installed packages are known here: `dnf search NAME` looks for the others")
        return code

    def repolist(self) -> int:
        return self._run(["apt-cache", "policy"])

    def download(self) -> int:
        self._lists()
        names = self._wanted(self._call.words).apt
        if self._call.into:
            os.makedirs(self._call.into, exist_ok=True)
            os.chdir(self._call.into)
        return self._run(["apt-get", "-q", "download", *names])

    def mark(self) -> int:
        verb = {"install": "manual", "user": "manual", "remove": "auto", "dependency": "auto"}.get((self._call.words or [""])[0])
        if verb is None:
            raise Refusal("mark knows install and remove")
        return self._run(["apt-mark", verb, *(name for word in self._call.words[1:] for name in _names(word, self._table))])

    def configure(self) -> int:
        """dnf config-manager: repositories of RPMs are of no use; to switch one on that is not there is done."""
        if "--add-repo" in self._call.flags:
            raise Refusal(
                f"config-manager --add-repo: {' '.join(self._call.words)} has RPMs, and this base is Debian: write its apt source to "
                "/etc/apt/sources.list.d/NAME.list and run apt-get update"
            )
        return 0

    def version(self) -> int:
        print(f"{VERSION}\n  on Debian {_release()}: packages are installed by apt, and called as Amazon Linux 2023 calls them")
        return 0

    # ---- the steps of an install ----

    def _wanted(self, specs: list[str]) -> Wanted:
        known, wanted = self.known(), Wanted()
        refused: list[str] = []
        for spec in specs:
            try:
                wanted.add(self._checked(translate([spec], self._table, known)))
            except Refusal as refusal:
                refused.append(str(refusal))
        if refused and not self._call.is_lenient:
            raise Refusal("\n".join(refused))
        for text in refused:
            _say(f"{text}; it is passed over")
        excluded = {name for word in self._call.exclude for name in (word, *_names(word, self._table))}
        wanted.apt = [name for name in wanted.apt if not any(fnmatch.fnmatch(name.partition("=")[0], pattern) for pattern in excluded)]
        return wanted

    def _checked(self, wanted: Wanted) -> Wanted:
        wanted.apt = [_pinned(spec) for spec in wanted.apt]
        return wanted

    def _install(self, wanted: Wanted, *more: str) -> int:
        for note in wanted.notes:
            _say(note)
        if "--assumeno" in self._call.flags:
            _say("Operation aborted.")
            return 1
        if wanted.npm and not wanted.node and not shutil.which("npm"):
            wanted.apt += ["nodejs", "npm"]
        if shutil.which("npm"):  # of another version of Node, which brought its own
            wanted.apt = [name for name in wanted.apt if name != "npm"]
        if self._call.installroot:
            return self._elsewhere(wanted)
        if "--downloadonly" in self._call.flags:
            into = self._call.into or "/var/cache/apt/archives"
            if not DRY:
                os.makedirs(f"{into}/partial", exist_ok=True)
            return self._apt("install", "--download-only", "-o", f"Dir::Cache::archives={into}", *wanted.apt)
        code = self._apt("install", *more, *wanted.apt) if wanted.apt or more else 0
        for version in wanted.node if not code else ():
            elsewhere.node(version, self._run)
        for version in wanted.python if not code else ():
            elsewhere.python(version, self._run)
        if wanted.npm and not code:
            code = self._run(["npm", "install", "--global", "--no-fund", "--no-audit", *wanted.npm])
        if not code and not DRY:
            elsewhere.locales(wanted.locales, self._run)
            elsewhere.paths(wanted.apt)
        return code

    def _elsewhere(self, wanted: Wanted) -> int:
        """--installroot: a tree of its own, with what every tree needs, as people copy it to an image FROM scratch."""
        if wanted.node or wanted.python or wanted.npm:
            raise Refusal("--installroot: only Debian's own packages can go there")
        code = 0 if shutil.which("mmdebstrap") else self._apt("install", "mmdebstrap")
        return code or elsewhere.root(Path(self._call.installroot), wanted.apt, self._run)

    def _lists(self, fresh: bool = False) -> int:
        self._say_unread()
        if self._fresh or (not fresh and any(LISTS.glob("*Packages*"))):
            return 0
        self._fresh = True
        return self._run(["apt-get", "-q", "update"])

    def _say_unread(self) -> None:
        """Repositories of RPMs, which an image brings, are of no use to apt."""
        unread = [] if self._has_said else [path.name for path in sorted(REPOSITORIES.glob("*.repo")) if _is_enabled(path)]
        self._has_said = True
        if unread:
            are = "is" if len(unread) == 1 else "are"
            instead = "write an apt source to /etc/apt/sources.list.d/NAME.list"
            _say(f"{REPOSITORIES}/{', '.join(unread)} {are} not read: RPMs are there, and this base is Debian: {instead}")

    def _apt(self, verb: str, *words: str) -> int:
        """With lists that are old, a package may be gone: they are fetched, and it is tried once more."""
        command = ["apt-get", "-q", "-y", verb, *(["--no-install-recommends"] if verb == "install" else []), *words]
        code = self._run(command)
        if code and not self._fresh:
            self._lists(fresh=True)
            code = self._run(command)
        return code


COMMANDS = {
    Dnf.install: ("install", "in", "localinstall", "install-n", "install-na", "install-nevra"), Dnf.reinstall: ("reinstall", "rei"),
    Dnf.group: ("group", "groups", "grp", "groupinstall", "grouplist", "groupinfo"), Dnf.swap: ("swap",), Dnf.upgrade: ("update",
    "upgrade", "up", "upgrade-minimal", "update-minimal", "distro-sync", "dsync", "distribution-synchronization"), Dnf.remove: ("remove",
    "erase", "rm"), Dnf.autoremove: ("autoremove",), Dnf.makecache: ("makecache", "mc", "check-update", "check-upgrade"), Dnf.clean:
    ("clean",), Dnf.list: ("list", "ls"), Dnf.info: ("info", "if"), Dnf.search: ("search", "se"), Dnf.provides: ("provides",
    "whatprovides", "prov"), Dnf.repolist: ("repolist", "repoinfo"), Dnf.download: ("download",), Dnf.mark: ("mark",), Dnf.configure:
    ("config-manager",), Dnf.version: ("version",),
}  # fmt: skip
_REFUSED = {
    "module": "there are no modules here: a version is part of a name, as nodejs22 and php8.2",
    "builddep": "there are no source RPMs here: write `apt-get build-dep NAME`, or name the -devel packages",
    "downgrade": "one version of each package is here",
    "copr": "there are no RPM repositories here: write an apt source to /etc/apt/sources.list.d/NAME.list",
    "versionlock": "write `apt-mark hold NAME`",
    "history": "write `cat /var/log/apt/history.log`",
    "repoquery": "write `dnf list NAME`, or `apt-cache depends NAME`",
    "deplist": "write `apt-cache depends NAME`",
    "groupremove": "name its packages",
}


def main(arguments: list[str], run: Callable[[list[str]], int]) -> int:
    try:
        call = parse(arguments)
        if "--version" in call.flags:
            return Dnf.version(Dnf(call, run, Table()))
        if not call.command or "--help" in call.flags or "-h" in call.flags or call.command == "help":
            print("dnf", *sorted(names[0] for names in COMMANDS.values()), sep="\n  ")
            return 0 if call.command or call.flags else 1
        for method, names in COMMANDS.items():
            if call.command in names:
                return method(Dnf(call, run, Table.read(HERE / "packages.map")))
        raise Refusal(f"{call.command}: {_REFUSED.get(call.command, 'this is not here: `dnf --help` lists what is; apt-get is there too')}")
    except Refusal as refusal:
        for line in str(refusal).splitlines():
            _say(line)
        return 1


def _is_enabled(repository: Path) -> bool:
    """Whether one of a file's sections is, as all are that say nothing (dnf.conf(5))."""
    try:
        sections = re.split(r"^\s*\[", repository.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)[1:]
    except OSError:
        return False
    return any(not re.search(r"^\s*enabled\s*=\s*(?:0|no|false)\s*$", section, re.MULTILINE | re.IGNORECASE) for section in sections)


def _say(text: str) -> None:
    print(f"dnf: {text}", file=sys.stderr, flush=True)


def _nothing() -> int:
    print("Nothing to do.", flush=True)
    return 0


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout


def _names(word: str, table: Table) -> list[str]:
    """Debian's names of what may be installed; the word itself where it has no translation."""
    try:
        known = set(_output("apt-cache", "pkgnames").split()) | {word}
        return [name.partition("=")[0] for name in translate([word], table, known).apt]
    except Refusal:
        return [word]


def _installed(name: str) -> bool:
    return _output("dpkg-query", "-W", "-f", "${db:Status-Abbrev}", name).startswith("ii")


def _matching(pattern: str) -> list[str]:
    return [name for name in _output("dpkg-query", "-W", "-f", "${Package}\n").split() if fnmatch.fnmatch(name, pattern)]


def _candidate(name: str) -> str:
    match = re.search(r"Candidate: (\S+)", _output("apt-cache", "policy", name))
    return match[1] if match and match[1] != "(none)" else ""


def _pinned(spec: str) -> str:
    """Of `name=1.2` or `name=1.2*`, the version that is there: 1.2.3 is a 1.2, and 1.22 is none but of 1.2*. Raises Refusal."""
    name, _, version = spec.partition("=")
    if not version:
        return spec
    there = _candidate(name)
    end = "" if version.endswith("*") else r"(?![0-9a-z])"
    if not re.match(rf"(?:\d+:)?{re.escape(version.rstrip('*'))}{end}", there):
        raise Refusal(f"{name} {version} is not here: {name} is {there or 'not there either'}: write `dnf install {name}`")
    return f"{name}={there}"


def _chosen(name: str, words: list[str], table: Table) -> bool:
    return not words or any(fnmatch.fnmatch(name, word) or name in table.names.get(word, []) for word in words)


def _rows(title: str, rows: list[tuple[str, ...]]) -> int:
    if rows:
        print(title, *(f"{row[0]:<40} {row[1]:<30} {row[2]}" for row in rows), sep="\n")
    return len(rows)


def _release() -> str:
    return Path("/etc/debian_version").read_text(encoding="ascii").strip()


def _really(command: list[str]) -> int:
    if DRY:
        print(shlex.join(command), flush=True)
        return 0
    return subprocess.run(command, check=False, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], _really))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(130)
