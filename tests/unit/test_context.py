"""What `torpor build DIR` sends: the directory as it is, less what .dockerignore names; and what the service makes of it."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cli.context import ContextError, Ignored, entries, pack
from gateway.images.unpack import CONTEXT, unpack

# Patterns, a path, and whether Docker ignores it (moby's patternmatcher, and its documentation).
CASES = [
    ("a", "a", True), ("a", "a/b", True), ("a", "b/a", False), ("/a", "a", True), ("a/", "a/b", True), ("./a", "a", True),
    ("*.md", "x.md", True), ("*.md", "d/x.md", False), ("**/*.md", "x.md", True), ("**/*.md", "d/e/x.md", True),
    ("*/temp*", "d/temporary", True), ("*/temp*", "d/e/temporary", False), ("temp?", "tempa", True), ("temp?", "temp", False),
    ("**/node_modules", "node_modules/x", True), ("**/node_modules", "a/node_modules/x", True), ("a/**/b", "a/b", True),
    ("a/**/b", "a/c/d/b", True), ("a/**", "a/b", True), ("a/**", "a", False), ("**", "a/b", True), ("*", ".git", True),
    ("*.md\n!README.md", "README.md", False), ("*.md\n!README.md", "x.md", True), ("!README.md\n*.md", "README.md", True),
    ("*\n!src", "src/a", False), ("*\n!src/keep", "src/keep", False), ("*\n!src/keep", "src/drop", True),
    ("# a comment\na", "a", True), ("#a", "#a", False), ("[ab].txt", "a.txt", True), ("[ab].txt", "c.txt", False),
    (r"\*", "*", True), (r"\*", "a", False), ("a.txt", "axtxt", False), ("  a  ", "a", True), ("", "a", False), (".", "a", False),
    ("a+b$", "a+b$", True), ("foo(1)", "foo(1)", True),
    # "**" at the start is a suffix, but for another wildcard behind it.
    ("**.md", "x.md", True), ("**.md", "d/x.md", True), ("**foo", "d/barfoo", True), ("**foo*", "barfoo", False), ("*\n!**.md", "x.md", False),
    # A folder's match counts for what is in it as it was found for the folder, where a pattern that could change nothing was not tried.
    ("d\n!d/x\n**/d", "d/x", False), ("d\n!d/x\n**/d", "d/y", True), ("**/x\n!d", "d/x", True), ("**/x\n!d/x", "d/x", False),
    ("a\u2028b", "b", False),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "path", "ignored"), CASES)
def test_dockerignore(patterns: str, path: str, ignored: bool) -> None:
    assert (path in Ignored(patterns)) is ignored


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "src/deep").mkdir(parents=True)
    (tree / "Dockerfile").write_text("FROM x")
    (tree / "src/a").write_text("a")
    return tree


def sent(tree: Path) -> dict[str, tarfile.TarInfo]:
    """By the way that it really goes: packed here, unpacked by the service."""
    archive, target = tree.parent / "a.zip", tree.parent / "out"
    with archive.open("wb") as out:
        pack(tree, out)
    target.mkdir(exist_ok=True)
    unpack(archive, target, 1 << 20, 1000, 1100)
    with tarfile.open(target / CONTEXT) as made:
        return {member.name: member for member in made.getmembers()}


def test_the_directory_is_sent_as_it_is(tree: Path) -> None:
    (tree / "empty").mkdir(mode=0o750)
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__/x.pyc").write_text("")
    links = {"file-link": "src/a", "folder-link": "src", "dangling": "nowhere", "absolute": "/etc/localtime", "src/up": "../Dockerfile"}
    for name, target in links.items():
        (tree / name).symlink_to(target)
    (tree / "key").write_text("k")
    (tree / "key").chmod(0o600)
    (tree / "données 日本").write_text("x")
    for name, when in {"epoch": 0, "before": -86400, "npm": 499162500}.items():
        (tree / name).write_text("")
        os.utime(tree / name, (when, when))
    found = sent(tree)
    assert {name: found[name].linkname for name in links} == links and all(found[name].issym() for name in links)
    assert found["empty"].isdir() and found["empty"].mode == 0o750 and found["key"].mode == 0o600
    assert found["src/deep"].isdir() and {"__pycache__/x.pyc", "données 日本"} <= set(found)
    assert [found[name].mtime for name in ("epoch", "before", "npm")] == [0, -86400, 499162500]
    here = {path.relative_to(tree).as_posix() for path in tree.rglob("*")}
    assert set(found) == here


def test_what_dockerignore_names_stays_here(tree: Path) -> None:
    (tree / ".dockerignore").write_text("**\n!src/a\nDockerfile\n.dockerignore\n")
    (tree / "src").chmod(0o711)
    found = sent(tree)
    assert set(found) == {"Dockerfile", ".dockerignore", "src", "src/a"}, "what is sent has its folders, as they are"
    assert found["src"].mode == 0o711
    (tree / "Dockerfile.dockerignore").write_text("src/a\n")  # BuildKit's own comes before the other
    assert set(sent(tree)) == {"Dockerfile", ".dockerignore", "Dockerfile.dockerignore", "src", "src/deep"}


def test_an_ignored_folder_is_looked_into_where_an_exception_may_be_there_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database's files, say, which only their owner may read."""
    for name in ("data", "src", "other"):
        (tree / name).mkdir(exist_ok=True)
    looked: list[str] = []
    scan = os.scandir

    def noted(where: Path) -> Iterator[os.DirEntry[str]]:
        looked.append(where.relative_to(tree).as_posix())
        return scan(where)

    monkeypatch.setattr(os, "scandir", noted)
    for patterns, into in (("data\nother\nsrc\n!src/a", ["src"]), ("*\n!*/a", ["data", "other", "src", "src/deep"]), ("*", [])):
        looked.clear()
        list(entries(tree, Ignored(patterns)))
        assert looked == [".", *into], patterns


def test_what_is_no_file_is_left_out_and_named(tree: Path) -> None:
    os.mkfifo(tree / "src/pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tree / "sock"))
        assert pack(tree, io.BytesIO()) == ["sock", "src/pipe"]
    assert {"sock", "src/pipe"}.isdisjoint(sent(tree))


def test_what_cannot_be_sent_is_one_line(tree: Path) -> None:
    with pytest.raises(ContextError, match="has no Dockerfile"):
        pack(tree / "src", io.BytesIO())
    with pytest.raises(ContextError, match=r"\.dockerignore: \[z-a\] is no pattern"):
        Ignored("[z-a]")
    (tree / os.fsdecode(b"\xff")).write_text("")
    with pytest.raises(ContextError, match="is not UTF-8"):
        pack(tree, io.BytesIO())


def test_a_backslash_is_part_of_a_name_here(tmp_path: Path) -> None:
    """Where no other name has a slash, an archive's reader takes it for one of Windows."""
    tree = tmp_path / "flat"
    tree.mkdir()
    for name in ("Dockerfile", r"a\b", r"\x", "c\\"):
        (tree / name).write_text("FROM x")
    assert set(sent(tree)) == {"Dockerfile", r"a\b", r"\x", "c\\"}


def test_modes_are_kept(tree: Path) -> None:
    (tree / "src").chmod(0o555)
    (tree / "src/a").chmod(0o4755)
    try:
        found = sent(tree)
    finally:
        (tree / "src").chmod(0o755)
    assert (found["src"].mode, found["src/a"].mode, stat.S_IMODE(found["Dockerfile"].mode)) == (0o555, 0o755, 0o644)
