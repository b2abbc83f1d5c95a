"""What control makes of a Dockerfile before BuildKit gets it: what is refused at once, and the few words that are changed."""

from __future__ import annotations

import time

import pytest

from gateway.images.artifact import BuildFailed
from gateway.images.dockerfile import Prepared, instructions, is_base, prepare
from gateway.images.hints import hints

NAME = "public.ecr.aws/lambda/microvms"
BASE = f"{NAME}:al2023-minimal"


def made(text: str, pull: bool = False) -> Prepared:
    return prepare(text.encode(), [BASE], pull, "amd64")


def refusal(text: str, pull: bool = False) -> str:
    with pytest.raises(BuildFailed) as refused:
        made(text, pull)
    assert refused.value.code == "CONTAINER_BUILD_FAILED"
    return str(refused.value).partition(": ")[2]


@pytest.mark.parametrize(
    "name",
    [BASE, NAME, f"{NAME}:latest", f"{NAME}@sha256:{'0' * 64}", f"{BASE}@sha256:{'0' * 64}", f"{NAME}:2"],
)
def test_the_base_has_every_tag_and_digest(name: str) -> None:
    assert is_base(name, [BASE])


@pytest.mark.parametrize(
    ("lines", "users"),
    [
        ("ARG UID=2000000\nUSER $UID", [2000000]),
        ("ARG UID=2000000 GID=3000000\nUSER ${UID}:${GID}", [2000000, 3000000]),
        ("ENV UID=2000000\nARG UID=5\nUSER $UID", [2000000]),  # ENV goes before ARG
        ("ENV UID 2000000\nUSER $UID", [2000000]),
        ('ARG BASE=2000\nARG UID="${BASE}000"\nUSER "${UID}"', [2000000]),
        ("USER ${UID:-2000000}", [2000000]),
        ("USER $UID", []),
        ("ARG UID=2000000\nUSER $UID\nARG UID=5\nUSER $UID", []),
    ],
)
def test_a_user_by_a_variable_is_the_one_that_it_means(lines: str, users: list[int]) -> None:
    """It was not seen, and the build's last step or the microVM failed with an id that nobody had mapped."""
    assert made(f"FROM {BASE}\n{lines}\n").users == users


@pytest.mark.parametrize("first", ["", f"FROM {BASE}\n"])
def test_values_that_double_themselves_take_no_memory(first: str) -> None:
    assert made(f"{first}ARG A=xx\n" + "ARG A=$A$A\n" * 64 + f"FROM {BASE}\nUSER $A\n").users == []


def test_arguments_are_a_stages_own() -> None:
    text = f"ARG UID=2000000\nFROM {BASE} AS a\nARG UID\nENV NAME=$UID\nFROM a\nUSER"
    assert made(f"{text} $UID\n").users == [] and made(f"{text} $NAME\n").users == [2000000]


def test_an_id_by_a_variable_that_no_one_can_have_is_one_line() -> None:
    assert refusal(f"FROM {BASE}\nARG UID=5000000000\nUSER $UID\n") == "Dockerfile, line 3: USER $UID (5000000000): ids end at 4294967294"
    said = refusal(f"FROM {BASE}\nARG UID=2000000\nCOPY --chown=$UID a /a\n")
    assert said.startswith("Dockerfile, line 3: COPY --chown=$UID (2000000): ids up to 1000000 can own files")


def test_short_names_are_docker_hubs() -> None:
    assert is_base("docker.io/library/amazonlinux:2", ["amazonlinux:2023"]) and is_base("amazonlinux", ["docker.io/library/amazonlinux"])
    assert not is_base("example.com:5000/amazonlinux", ["amazonlinux"]) and not is_base(f"{NAME}-other", [BASE])


@pytest.mark.parametrize(
    "front_end", ["docker/dockerfile:1", "docker/dockerfile", "docker.io/docker/dockerfile:1.7-labs", "docker/dockerfile-upstream:master"]
)
def test_the_stock_front_end_is_built_in(front_end: str) -> None:
    text = made(f"# syntax={front_end}\nFROM {BASE}\n").text
    assert text == f"# syntax {front_end}\nFROM {BASE}\n"


def test_an_escape_directive_behind_it_is_still_one() -> None:
    """Directives end at the first comment that is none (BuildKit, parser/directives.go)."""
    text = made(f"#syntax = docker/dockerfile:1\n# escape=`\nFROM {BASE}\nRUN a `\n  b\n").text
    assert text.split("\n")[:3] == ["# escape=`", "#syntax   docker/dockerfile:1", f"FROM {BASE}"]
    text = made(f"#!/usr/bin/env docker\n# check=skip=all\n# syntax=docker/dockerfile:1\n# escape=`\nFROM {BASE}\nRUN a `\n  b\n").text
    directives = ["#!/usr/bin/env docker", "# escape=`", "# syntax docker/dockerfile:1", "# check=skip=all", f"FROM {BASE}"]
    assert text.split("\n")[:5] == directives


def test_another_front_end_is_pulled_or_refused() -> None:
    text = f"# syntax=example.com/front:1\nFROM {BASE}\n"
    assert (
        refusal(text)
        == "Dockerfile, line 1: # syntax= names the front end example.com/front:1, which is not pulled here: images.pull is off"
    )
    assert made(text, pull=True).text == text
    assert made(f"# check=skip=all\n{text}", pull=True).text == f"# check=skip=all\n{text}"
    labs = f"# syntax=docker/dockerfile:1-labs\nFROM {BASE}\n"
    assert made(labs, pull=True).text == labs


@pytest.mark.parametrize(
    "first",
    ["FROM --platform=linux/arm64 {}", "ARG P=linux/arm64\nFROM --platform=$P {}", 'from --platform="linux/arm64/v8" \\\n  {} AS x'],
)
def test_the_base_is_there_for_this_host(first: str) -> None:
    prepared = made(first.format(BASE) + "\nRUN x\n")
    assert "--platform=linux/amd64" in prepared.text and prepared.text.count("\n") == first.count("\n") + 2
    assert len(prepared.notes) == 2 and "--platform=linux/arm64" in prepared.notes[1]


def test_a_foreign_image_keeps_its_platform() -> None:
    text = f"FROM --platform=linux/arm64 python:3 AS p\nFROM {BASE}\nCOPY --from=p /x /x\n"
    assert made(text).text == text and len(made(text).notes) == 1


def test_a_stage_of_the_same_name_is_no_base() -> None:
    assert not made(f"FROM scratch AS {NAME}\nFROM --platform=linux/arm64 {NAME}\n").notes


def test_the_ids_of_the_last_user_are_mapped() -> None:
    assert made(f"FROM {BASE}\nUSER 1000730000:1000730001\nCOPY --chown=1000730000 a /a\n").users == [1000730000, 1000730001]
    assert made(f"FROM {BASE} AS a\nUSER 2000000\nFROM {BASE}\nUSER 1000\n").users == []
    assert made(f"FROM {BASE} AS a\nUSER 2000000\nFROM {BASE}\nFROM A AS b\nFROM b\nCOPY --chown=2000000 a /\n").users == [2000000]
    assert made(f"FROM {BASE} AS a\nUSER 2000000\nFROM a\nUSER \u00b2\n").users == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("COPY --chown=2000000:0 a /a", "COPY --chown=2000000:0: ids up to 1000000 can own files, and the one that the last USER names"),
        ("ADD --chmod=+x a /a", "ADD --chmod=+x: this BuildKit (0.13) takes octal modes, as --chmod=755"),
        ("COPY --chmod=u=rwx a /a", "COPY --chmod=u=rwx: this BuildKit (0.13) takes octal modes, as --chmod=755"),
        ("USER " + "9" * 5000, f"USER {'9' * 5000}: ids end at 4294967294"),
        ("USER 4294967295", "USER 4294967295: ids end at 4294967294"),
        ("FROM oci-archive:/etc/passwd", "FROM names a transport (oci-archive:): only image names are taken"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_line(line: str, text: str) -> None:
    assert refusal(f"FROM {BASE}\n# comment\n{line}\n") == f"Dockerfile, line 3: {text}"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(encoding: str) -> None:
    """PowerShell's `>` writes it: BuildKit shows what it takes for an unknown instruction, byte by byte."""
    with pytest.raises(BuildFailed, match=r"Dockerfile, line 1: the file is UTF-16.*save it as UTF-8"):
        prepare(f"\ufeffFROM {BASE}\n".encode(encoding), [BASE], False, "amd64")


def test_modes_and_variables_pass() -> None:
    text = f"FROM {BASE}\nCOPY --chmod=0755 a /a\nCOPY --chmod=$MODE --chown=$USER:app a /a\nCOPY --chown=1000000:999999 a /a\n"
    assert made(text).text == text and made(text).users == []


def test_what_stands_in_a_here_document_is_no_instruction() -> None:
    text = (
        f'FROM {BASE}\nRUN <<EOF\nUSER 5000000000\nFROM x\nEOF\nCOPY <<-"A" <<B /x/\n\tUSER 5000000000\n\tA\nUSER 5000000000\nB\nUSER 7\n'
    )
    assert [one.keyword for one in instructions(text.split("\n"))] == ["FROM", "RUN", "COPY", "USER"]


@pytest.mark.parametrize(
    "step", ["echo $((1<<4))", 'grep x <<<"x y"', "cat <<<x", 'echo "a <<EOF b"', "echo 'a <<EOF b'", 'echo \\"a <<<x']
)
def test_what_looks_like_a_here_document_hides_nothing(step: str) -> None:
    assert made(f"FROM {BASE}\nRUN {step}\nUSER 2000000\n").users == [2000000]


@pytest.mark.parametrize("step", ["<<EOF", "cat <<-EOF", 'cat <<"EOF" > /x', "cat 3<<'EOF'", 'echo "it\'s" <<A <<EOF\nA'])
def test_here_documents_are_passed_over(step: str) -> None:
    assert made(f"FROM {BASE}\nRUN {step}\nUSER 2000000\nEOF\nUSER 3000000\n").users == [3000000]
    assert not made(f"FROM {BASE}\nRUN {step}\nUSER 2000000\nEOF\n").users


def test_lines_are_joined_as_buildkit_joins_them() -> None:
    one = next(iter(instructions(["run a \\", "# comment", "", "  b \\  \r", " c", "run d"])))
    assert (one.keyword, one.text.split(), list(one.lines)) == ("RUN", ["a", "b", "c"], [0, 3, 4])


@pytest.mark.parametrize("first", ["# syntax=docker/dockerfile:1\r\n", ""])
def test_a_byte_order_mark_is_no_part_of_the_first_line(first: str) -> None:
    found = made(f"\ufeff{first}FROM --platform=linux/arm64 {BASE}\nUSER 2000000\n")
    assert "syntax=" not in found.text and f"--platform=linux/arm64 {BASE}" not in found.text and found.users == [2000000]


def test_bytes_that_are_no_text_stay() -> None:
    data = b"FROM scratch\nLABEL x=\xff\xfe\n"
    assert prepare(data, [BASE], False, "amd64").text.encode(errors="surrogateescape") == data


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ('source "docker-image://docker.io/library/python:3.12-slim" denied by policy: source', "python:3.12-slim is not the base, and other"),
        ('source "docker-image://ghcr.io/astral-sh/uv:latest" denied by policy', "ghcr.io/astral-sh/uv:latest is not the base"),
        ("ERROR: failed to solve: dockerfile parse error on line 2: unknown flag: parents", "--parents is of Dockerfile's labs channel"),
        ("dockerfile parse error on line 2: unknown flag: exclude", "name what is not wanted in .dockerignore"),
        ("dockerfile parse error on line 2: unknown flag: nonsense", "--nonsense is no flag that BuildKit 0.13 knows"),
        ("lchown /var/lib/docker/x/merged/y: invalid argument", "ids up to 1000000 can own files"),
        ("unable to setup user: invalid argument", "a step's USER is too large"),
        ('__populate_fs: Could not allocate block in ext2 filesystem while writing file "x"', "the image's files do not fit the MicroVM's disk: 8 GiB"),
        ("tar: f: Cannot change ownership to uid 2000000, gid 0: Invalid argument", "an owner is too large"),
        ('git error: exec: "git": executable file not found in $PATH', "RUN git clone"),
    ],
)  # fmt: skip
def test_a_failure_that_buildkit_says_badly_is_explained(said: str, hint: str) -> None:
    assert any(hint in line for line in hints(f"#5 0.1 x\n{said}\n"))


def test_an_ordinary_failure_has_no_hint() -> None:
    assert hints('ERROR: failed to solve: process "/bin/sh -c exit 3" did not complete successfully: exit code: 3') == []


# ---- files that mean harm: control reads them beside everybody's calls ----

MIB = 1 << 20
_OPEN = b"ENV a=" + b"${b:-" * 1600 + b"\n"
HARMFUL = {
    "empty lines": b"FROM x\n" + b"\n" * MIB,
    "continued lines": b"FROM x\nRUN a" + b" \\\nb" * (MIB // 5),
    "one line of quotes": b'FROM x\nRUN "' + b"a 'b " * (MIB // 5),
    "variables": b"FROM x\n" + b"ENV a=b\n" * (MIB // 8),
    "defaults without an end": b"FROM x\n" + _OPEN * (MIB // len(_OPEN)),
    "here-documents": b"FROM x\n" + b"RUN <<A\n" * (MIB // 8),
    "owners": b"FROM x\n" + b"COPY --chown=5 a b\n" * (MIB // 20),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_file_that_means_harm_takes_little_of_controls_time(what: str) -> None:
    """80,000 empty lines, or a line of `${b:-` again and again, took half a minute, in which no other account had an answer. A second or
    two on an idle machine; it grows as the file does."""
    began = time.thread_time()
    prepare(HARMFUL[what][:MIB], [BASE], True, "amd64")
    assert time.thread_time() - began < 8


def test_what_each_stage_takes_over_is_bounded() -> None:
    """20,000 stages with 20,000 variables each took gigabytes of control's memory: a file of a megabyte."""
    names = " ".join(f"a{number}=b" for number in range(1000))
    stages = "".join(f"FROM s{number} AS s{number + 1}\nENV c{number}=d\n" for number in range(999))
    assert refusal(f"FROM x AS s0\nENV {names}\n{stages}", True) == "Dockerfile, line 4: more than 1000 variables"
    assert refusal("FROM x\n" * 1001, True) == "Dockerfile, line 1001: more than 1000 stages"
    made("FROM x\n" * 1000, True)


def test_a_syntax_line_of_blanks_names_no_front_end() -> None:
    assert "names the front end , which" in refusal(f"# syntax={' ' * 9}\nFROM {BASE}\n")
