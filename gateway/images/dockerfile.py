"""What control reads of a Dockerfile before BuildKit does, so that what cannot be built here is refused in one line, before it waits.

The builder's front end is the one built into BuildKit 0.13 (frontend/dockerfile there). No registry may be in reach, so that a
`# syntax=` line that names that same front end must not fetch it; and the base has this host's architecture, whatever platform
its FROM names. BuildKit gets the text with those two changed, in lines that keep their numbers; the context keeps its own.
"""

from __future__ import annotations

import codecs
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .artifact import BuildFailed

UIDS = 1_000_000  # an image's files may belong to users up to this one (vmm maps as many)
_UID_MAX = (1 << 32) - 2
_DIGITS_MOST = 20
_TEXT_MOST, _VALUE_MOST = 8192, 1024
_STAGES_MOST, _VARIABLES_MOST = 1000, 1000  # of a file, and of a stage: each stage has a copy of its base's
_DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*$")
_STOCK = re.compile(r"(?:docker\.io/)?docker/dockerfile(?:-upstream)?(?::(?P<tag>[\w.-]+))?(?:@sha256:[0-9a-f]{64})?")
_TRANSPORTS = ("oci", "oci-archive", "dir", "docker-archive", "docker-daemon", "containers-storage", "ostree", "sif", "tarball")
_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|"(?:\\.|[^"\\])*"|'[^']*')+""")
_HEREDOC = re.compile(r"\d*<<(-?)([\"']?)([^\s<\"']+)\2")
# A default has an end to its length: an open brace is looked for in vain from each beginning of one.
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::?-(?P<default>[^}]{0,256}))?\}|(?P<plain>\w+))")
_FLAG = re.compile(r"--([a-z]+)=(\"[^\"]*\"|'[^']*'|\S+)")
_OCTAL = re.compile(r"0?[0-7]{1,4}")


@dataclass(frozen=True)
class Instruction:
    """`lines` are the numbers of its lines, from 0; `text` is what follows the keyword, on one line."""

    keyword: str
    text: str
    lines: Sequence[int]


@dataclass
class Prepared:
    """A Dockerfile as BuildKit gets it. `users` are ids beyond UIDS that the image's last stage runs as; `notes` go into the log."""

    text: str
    users: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(data: bytes, base_names: Sequence[str], pull: bool, architecture: str) -> Prepared:
    """Raises BuildFailed for what the builder cannot do, with the line's number."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _refused(0, "the file is UTF-16, as Windows' shells write it: save it as UTF-8")
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")  # BuildKit takes it away, too
    lines = text.split("\n")
    escape = _directives(lines, pull)
    found = list(instructions(lines, escape))
    made = Prepared("")
    arguments = {"BUILDPLATFORM": f"linux/{architecture}", "TARGETPLATFORM": f"linux/{architecture}"}
    stage = _Stage()
    stages: dict[str, _Stage] = {}
    owners: list[tuple[Instruction, str]] = []
    for one in found:
        if one.keyword == "ARG" and not stages:
            arguments |= _assigned(one.text, arguments)
        elif one.keyword == "FROM":
            name, base = _from(one, lines, arguments, base_names, stages, architecture, made.notes)
            if len(stages) == _STAGES_MOST:
                raise _refused(one.lines[0], f"more than {_STAGES_MOST} stages")
            stage = stages[name] = _Stage(base.users, dict(base.environment)) if base is not None else _Stage()
        elif one.keyword == "ARG":
            stage.arguments |= {name: arguments[name] for name in one.text.split() if name in arguments}
            stage.arguments |= _assigned(one.text, stage.values)
        elif one.keyword == "ENV":
            stage.environment |= _assigned(one.text, stage.values)
            if len(stage.environment) > _VARIABLES_MOST:
                raise _refused(one.lines[0], f"more than {_VARIABLES_MOST} variables")
        elif one.keyword == "USER":
            stage.users = _users(one, substitute(one.text, stage.values))
        elif one.keyword in ("COPY", "ADD"):
            _check_mode(one)
            owners.append((one, substitute(dict(_FLAG.findall(one.text)).get("chown", "").strip("\"'"), stage.values)))
    made.users = stage.users
    for one, owner in owners:
        _check_owner(one, owner, made.users)
    made.text = "\n".join(lines)
    return made


@dataclass
class _Stage:
    """`users` are the ids of its last USER; a stage that is made from this one begins with them and with its environment."""

    users: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def values(self) -> Mapping[str, str]:
        """Returns what a variable means: ENV goes before ARG (Dockerfile reference, "Using ARG variables")."""
        return ChainMap(self.environment, self.arguments)


def _assigned(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """Of ARG and ENV: NAME=value, again and again, or ENV's older form, NAME value."""
    words = _WORD.findall(text)
    if words and "=" not in words[0]:
        return {words[0]: substitute(text.partition(words[0])[2].strip(), values)} if len(words) > 1 else {}
    pairs = (word.partition("=") for word in words)
    return {name: substitute(value.strip("\"'"), values) for name, given, value in pairs if given}


def _directives(lines: list[str], pull: bool) -> str:
    """Takes a `# syntax=` line of the stock front end out of BuildKit's sight; returns the escape character.

    Directives end at the first line that is none, so an `# escape=` behind it takes its place. `# check=` is one for later
    BuildKits; a first line that begins with `#!` is none, and ends nothing.
    """
    escape, first = "\\", None
    for number, line in enumerate(lines):
        if number == 0 and line.startswith("#!"):
            continue
        match = _DIRECTIVE.match(line.rstrip("\r"))
        name = match[1].lower() if match else ""
        if match is None or name not in ("syntax", "check", "escape"):
            break
        if name == "escape":
            escape = match[2]
            if first is not None:
                lines[first], lines[number] = line, lines[first]
            continue
        if name == "check":
            first = number if first is None else first
            continue
        front_end = match[2].partition(" ")[0]
        stock = _STOCK.fullmatch(front_end)
        if pull and (stock is None or "labs" in (stock["tag"] or "")):
            return escape  # it is pulled, and reads the file in our stead
        if stock is None:
            raise _refused(number, f"# syntax= names the front end {front_end}, which is not pulled here: images.pull is off")
        lines[number] = line.replace("=", " ", 1)
        first = number if first is None else first
    return escape


def instructions(lines: Sequence[str], escape: str = "\\") -> Iterator[Instruction]:
    """As BuildKit's parser joins lines: comments go, also between continued lines; the bodies of here-documents are passed over."""
    continued = re.compile(re.escape(escape) + r"[ \t]*$")
    number = 0
    while number < len(lines):
        parts: list[str] = []
        numbers: list[int] = []
        while number < len(lines):
            line = lines[number].rstrip("\r")
            number += 1
            if line.lstrip().startswith("#") or (not line.strip() and parts):
                continue
            numbers.append(number - 1)
            parts.append(continued.sub("", line))
            if parts[-1] == line:
                break
        words = "".join(parts).split(None, 1)
        if not words:
            continue
        one = Instruction(words[0].upper(), words[1].strip() if len(words) > 1 else "", numbers)
        if one.keyword in ("RUN", "COPY", "ADD"):
            # A word of its own, as BuildKit has it: neither a here-string, nor a shift, nor what is quoted.
            for tabs, _, end in (match.groups() for word in _WORD.findall(one.text) if (match := _HEREDOC.fullmatch(word))):
                while number < len(lines):
                    line = lines[number].rstrip("\r")
                    number += 1
                    if (line.lstrip("\t") if tabs else line) == end:
                        break
        yield one


def substitute(text: str, values: Mapping[str, str]) -> str:
    """$NAME, ${NAME} and ${NAME:-default}; what is not known becomes empty, as in BuildKit. Ids and names are short: a value that doubles
    itself line by line would have no end."""
    if "$" not in text:
        return text
    meant = _VARIABLE.sub(lambda match: values.get(match["braced"] or match["plain"]) or match["default"] or "", text[:_TEXT_MOST])
    return meant[:_VALUE_MOST]


def repository(reference: str) -> str:
    """Returns an image's name without tag and digest, and without what Docker adds to short ones."""
    name = reference.partition("@")[0]
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        name = head
    return name.removeprefix("docker.io/").removeprefix("index.docker.io/").removeprefix("library/")


def is_base(reference: str, base_names: Sequence[str]) -> bool:
    """Whether it is the local base: by its repository, whatever its tag or digest."""
    return repository(reference) in {repository(name) for name in base_names}


def _from(
    one: Instruction, lines: list[str], arguments: Mapping[str, str], base_names: Sequence[str], stages: Mapping[str, _Stage],
    architecture: str, notes: list[str],
) -> tuple[str, _Stage | None]:  # fmt: skip
    """Makes the local base's platform this host's; returns the stage's name, and the stage that it is made from."""
    flags = dict(_FLAG.findall(one.text))
    words = [word for word in one.text.split() if not word.startswith("--")]
    image = substitute(words[0].strip("\"'"), arguments) if words else ""
    if image.partition(":")[0].lower() in _TRANSPORTS and "/" in image.partition(":")[2]:
        raise _refused(one.lines[0], f"FROM names a transport ({image.partition(':')[0]}:): only image names are taken")
    name = words[2].lower() if len(words) > 2 and words[1].upper() == "AS" else f"stage {one.lines[0]}"
    if image.lower() in stages or not is_base(image, base_names):
        return name, stages.get(image.lower())
    notes.append(f"{image} is the base that this host has (images.base): no container registry is asked for it")
    asked = substitute(flags.get("platform", "").strip("\"'"), arguments)
    if asked and asked != f"linux/{architecture}":
        notes.append(f"line {one.lines[0] + 1}: --platform={asked}: this base is there for linux/{architecture}, which is taken")
        for number in one.lines:
            lines[number] = lines[number].replace(f"--platform={flags['platform']}", f"--platform=linux/{architecture}")
    return name, None


def _ids(owner: str) -> list[int]:
    """Its numbers, whatever their length; names are the image's."""
    return [int(part[:_DIGITS_MOST]) for part in owner.strip("\"'").split(":") if part.isascii() and part.isdigit()]


def _users(one: Instruction, user: str) -> list[int]:
    """Returns ids that need to be mapped by themselves."""
    ids = _ids(user)
    for number in ids:
        if number > _UID_MAX:
            raise _refused(one.lines[0], f"USER {_meant(one.text, user)}: ids end at {_UID_MAX}")
    return [number for number in ids if number > UIDS]


def _check_owner(one: Instruction, owner: str, users: Sequence[int]) -> None:
    given = dict(_FLAG.findall(one.text)).get("chown", "").strip("\"'")
    for number in _ids(owner):
        if number > UIDS and number not in users:
            where = f"{one.keyword} --chown={_meant(given, owner)}"
            raise _refused(one.lines[0], f"{where}: ids up to {UIDS} can own files, and the one that the last USER names")


def _meant(text: str, meaning: str) -> str:
    return text if text == meaning else f"{text} ({meaning})"


def _check_mode(one: Instruction) -> None:
    mode = dict(_FLAG.findall(one.text)).get("chmod", "")
    if mode and "$" not in mode and not _OCTAL.fullmatch(mode.strip("\"'")):
        raise _refused(one.lines[0], f"{one.keyword} --chmod={mode}: this BuildKit (0.13) takes octal modes, as --chmod=755")


def _refused(line: int, text: str) -> BuildFailed:
    return BuildFailed("CONTAINER_BUILD_FAILED", f"Dockerfile, line {line + 1}: {text}")
