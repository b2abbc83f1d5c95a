"""Archives: what is safe comes out as it went in, whichever tool wrote it; what is not is refused by the name of its entry."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.images import artifact
from gateway.images.unpack import CONTEXT, DOCKERFILE, ArchiveError, check_link, check_name, unpack

UNIX, MS_DOS = 3, 0


@dataclass
class Put:
    """An entry as some tool writes it."""

    name: str
    data: bytes = b"x"
    mode: int = 0o100644
    system: int = UNIX
    extra: bytes = b""
    raw: bytes = b""  # the name's bytes, where they are not UTF-8 by the flag
    date: tuple[int, int, int, int, int, int] = field(default=(2026, 1, 2, 3, 4, 6))


def archive(path: Path, *entries: Put, dockerfile: bool = True) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for one in ([Put(DOCKERFILE, b"FROM x")] if dockerfile else []) + list(entries):
            info = zipfile.ZipInfo("#" * len(one.raw) if one.raw else one.name, one.date)
            info.orig_filename = info.filename = "#" * len(one.raw) if one.raw else one.name
            info.create_system, info.external_attr, info.extra = one.system, one.mode << 16, one.extra
            info.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(info, one.data)
    content = path.read_bytes()
    for one in entries:
        if one.raw:
            assert content.count(b"#" * len(one.raw)) == 2
            content = content.replace(b"#" * len(one.raw), one.raw)
    path.write_bytes(content)
    return path


def run(source: Path, max_bytes: int = 1 << 20, entries: int = 100, ratio: int = 1100) -> dict[str, tarfile.TarInfo]:
    """The context's members by name; `data_of` reads them."""
    target = source.parent / "out"
    target.mkdir(exist_ok=True)
    unpack(source, target, max_bytes, entries, ratio)
    with tarfile.open(target / CONTEXT) as made:
        return {member.name: member for member in made.getmembers()}


def data_of(source: Path, name: str) -> bytes:
    with tarfile.open(source.parent / "out" / CONTEXT) as made:
        file = made.extractfile(name)
        assert file is not None
        return file.read()


def test_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    modes = {"app.py": 0o644, "key": 0o600, "group": 0o775, "read-only": 0o444, "deep/er/run": 0o755, "set": 0o4755}
    source = archive(
        tmp_path / "a.zip", *(Put(name, name.encode(), 0o100000 | mode) for name, mode in modes.items()), Put("empty/", b"", 0o040750)
    )
    found = run(source)
    assert {name: found[name].mode for name in modes} == modes | {"set": 0o755} and {data_of(source, name) for name in modes} == {
        name.encode() for name in modes
    }
    assert found["empty"].isdir() and found["empty"].mode == 0o750
    assert all(member.uid == member.gid == 0 and member.mtime == 1767323046 for member in found.values())
    assert (tmp_path / "out" / DOCKERFILE).read_bytes() == b"FROM x"


def test_a_real_tar_makes_of_it_what_went_in(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.zip", Put("d/key", b"k", 0o100600), Put("d/ro", b"", 0o100444), Put("d/", b"", 0o040555), Put("l", b"d/key", 0o120777)
    )
    run(source)
    subprocess.run(["tar", "-C", tmp_path / "out", "-xpf", tmp_path / "out" / CONTEXT], check=True)
    made = tmp_path / "out/d"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made / "key", made / "ro")] == [0o555, 0o600, 0o444]
    assert os.readlink(tmp_path / "out/l") == "d/key"
    made.chmod(0o755)


ACCEPTED: dict[str, tuple[Put, str]] = {
    "a name from here": (Put("./src/a"), "src/a"),
    "two slashes": (Put("src//a"), "src/a"),
    "Windows's separators": (Put("src\\a", system=MS_DOS, mode=0), "src/a"),
    "Windows's separators, said to be Unix's": (Put("src\\a"), "src/a"),
    "a unit of systemd": (Put("dev-disk-by\\x2duuid.mount"), "dev-disk-by\\x2duuid.mount"),
    "a colon": (Put("a:b.txt"), "a:b.txt"),
    "a control character": (Put("Icon\r"), "Icon\r"),
    "UTF-8 by the flag": (Put("donn\u00e9es/\u65e5"), "donn\u00e9es/\u65e5"),
    "UTF-8 without the flag": (Put("", raw="donn\u00e9es.txt".encode()), "donn\u00e9es.txt"),
    "code page 437": (Put("", raw="donn\u00e9es.txt".encode("cp437"), system=MS_DOS), "donn\u00e9es.txt"),
    "Latin-1, of Unix": (Put("", raw=b"donn\xe9es.txt"), "donn\udce9es.txt"),
    "no mode": (Put("plain", mode=0, system=MS_DOS), "plain"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path: Path, case: str) -> None:
    entry, name = ACCEPTED[case]
    found = run(archive(tmp_path / "a.zip", entry))
    assert name in found and found[name].mode == 0o644, list(found)


def test_the_extra_field_of_info_zip_gives_the_name(tmp_path: Path) -> None:
    raw, name = b"donn?es", "donn\u00e9es \u2192".encode()
    right = struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(raw)) + name
    stale = struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(b"else")) + name
    assert "donn\u00e9es \u2192" in run(archive(tmp_path / "a.zip", Put("", raw=raw, extra=right)))
    assert "donn?es" in run(archive(tmp_path / "b.zip", Put("", raw=raw, extra=stale)))


def test_a_backslash_is_part_of_a_name_where_slashes_separate(tmp_path: Path) -> None:
    assert "a\\b" in run(archive(tmp_path / "a.zip", Put("a\\b"), Put("src/c")))


@pytest.mark.parametrize("target", ["app.py", "../app.py", "/etc/localtime", "nowhere", "../src/./x"])
def test_links_are_the_images(tmp_path: Path, target: str) -> None:
    found = run(archive(tmp_path / "a.zip", Put("src/link", target.encode(), 0o120777)))
    assert found["src/link"].issym() and found["src/link"].linkname == target


def test_times_are_those_of_the_extra_field(tmp_path: Path) -> None:
    extra = struct.pack("<HHBi", 0x5455, 5, 1, -86400)
    assert run(archive(tmp_path / "a.zip", Put("old", extra=extra)))["old"].mtime == -86400
    assert run(archive(tmp_path / "b.zip", Put("odd", date=(1980, 0, 0, 0, 0, 0))))["odd"].mtime == 0


@pytest.mark.parametrize("tool", [["zip", "-qry"], ["git", "archive"]])
def test_what_other_tools_write(tmp_path: Path, tool: list[str]) -> None:
    """A link, an empty file, a folder, a name that is not ASCII: of Info-ZIP and of git."""
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not there")
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / DOCKERFILE).write_text("FROM x")
    (tree / "src/donn\u00e9es.txt").write_text("1")
    (tree / "src/run").write_text("#!/bin/sh")
    (tree / "src/run").chmod(0o755)
    (tree / "link").symlink_to("src/run")
    if tool[0] == "zip":
        subprocess.run([*tool, tmp_path / "a.zip", "."], cwd=tree, check=True)
    else:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"], ["archive", "-o", tmp_path / "a.zip", "HEAD"]):
            subprocess.run(["git", *words], cwd=tree, check=True)
    found = run(tmp_path / "a.zip")
    assert {"src/donn\u00e9es.txt", "src/run", "link"} <= set(found) and found["link"].linkname == "src/run"
    assert found["src/run"].mode & 0o111 == 0o111


REFUSED: dict[str, tuple[list[Put], str]] = {
    "climbs": ([Put("../x")], "entry '../x' leaves the archive"),
    "climbs inside": ([Put("a/../../x")], "entry 'a/../../x' leaves the archive"),
    "climbs by backslashes": ([Put("a\\..\\..\\x", system=MS_DOS)], "leaves the archive"),
    "absolute": ([Put("/x")], "entry '/x' has an absolute path"),
    "a drive": ([Put("C:/x")], "entry 'C:/x' has an absolute path"),
    "a drive by backslash": ([Put("C:\\x", system=MS_DOS)], "absolute path"),
    "a NUL": ([Put("", raw=b"a\0b")], "has a NUL"),
    "a link that climbs": ([Put("src/l", b"../../etc/passwd", 0o120777)], "entry 'src/l' is a link that leaves the archive"),
    "a link that climbs from the root": ([Put("l", b"/../x", 0o120777)], "entry 'l' is a link that leaves the archive"),
    "a link to nothing": ([Put("l", b"", 0o120777)], "entry 'l' is a link without a proper target"),
    "a file below a link": ([Put("l", b"/tmp", 0o120777), Put("l/x")], "entry 'l/x' uses a link as a folder"),
    "a file below a link, the other way round": ([Put("l/x"), Put("l", b"/tmp", 0o120777)], "entry 'l/x' uses a link as a folder"),
    "a device": ([Put("d", b"", 0o020666)], "entry 'd' is a device or pipe"),
    "a pipe": ([Put("p", b"", 0o010666)], "entry 'p' is a device or pipe"),
    "a socket": ([Put("s", b"", 0o140666)], "entry 's' is a device or pipe"),
    "a long name": ([Put("x" * 300)], "has too long a name"),
    "deep": ([Put("/".join("x" * 70))], "has too long a name"),
    "a file as a folder": ([Put("x"), Put("x/y")], "entry 'x/y' uses a file as a folder"),
    "a Dockerfile that is the host's": ([Put(DOCKERFILE, b"/etc/passwd", 0o120777)], "entry 'Dockerfile' leads to no file"),
    "patterns that are the host's": ([Put(".dockerignore", b"/etc/passwd", 0o120777)], "entry '.dockerignore' leads to no file"),
    "patterns that are the builder's, by a folder": (
        [Put("Dockerfile.dockerignore", b"a/config.json", 0o120777), Put("a", b"/out/login", 0o120777)],
        "entry 'Dockerfile.dockerignore' leads to no file",
    ),
    "patterns that are the builder's, beside where a folder leads": (
        [Put(".dockerignore", b"a/../proc/x", 0o120777), Put("a", b"/dev", 0o120777), Put("proc/x")],
        "entry '.dockerignore' leads to no file",
    ),
    "links in a circle": ([Put(DOCKERFILE, b"a", 0o120777), Put("a", DOCKERFILE.encode(), 0o120777)], "leads to no file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    entries, text = REFUSED[case]
    with pytest.raises(ArchiveError, match=text) as refused:
        run(archive(tmp_path / "a.zip", *entries))
    assert refused.value.code == ("ARCHIVE_DOCKERFILE_NOT_FOUND" if "'Dockerfile'" in text or "circle" in case else "ARCHIVE_INVALID")


def test_an_encrypted_entry(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", Put("secret"))
    content = bytearray(source.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    source.write_bytes(content)
    with pytest.raises(ArchiveError, match="entry 'secret' is encrypted"):
        run(source)


def test_of_the_same_name_twice_the_last_counts(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", Put("a", b"1"), Put(DOCKERFILE, b"FROM y"), Put("a", b"2"))
    assert len(run(source)) == 2 and data_of(source, "a") == b"2"
    assert data_of(source, DOCKERFILE) == (tmp_path / "out" / DOCKERFILE).read_bytes() == b"FROM y"


def test_a_dockerfile_by_a_link(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.zip",
        Put(DOCKERFILE, b"now/file", 0o120777),
        Put("now", b"docker", 0o120777),
        Put("docker/file", b"FROM y"),
        dockerfile=False,
    )
    assert run(source)[DOCKERFILE].issym() and (tmp_path / "out" / DOCKERFILE).read_bytes() == b"FROM y"


def test_an_archive_behind_a_program(tmp_path: Path) -> None:
    """A self-extracting one."""
    source = archive(tmp_path / "a.zip", Put("a"))
    source.write_bytes(b"#!/bin/sh\nexit\n" * 99 + source.read_bytes())
    assert "a" in run(source)


def test_bounds(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="101 entries; 100 are taken"):
        run(archive(tmp_path / "a.zip", *(Put(f"{n}", b"") for n in range(100))))
    with pytest.raises(ArchiveError, match=r"claim to unpack to \d+, entry 'z' to 2097152"):
        run(archive(tmp_path / "a.zip", Put("z", b"\0" * (2 << 20))))
    with pytest.raises(ArchiveError, match="claim to unpack"):
        run(archive(tmp_path / "a.zip", Put("z", b"\0" * (32 << 20))), max_bytes=1 << 30, ratio=200)
    assert run(archive(tmp_path / "a.zip", Put("z", b"\0" * (32 << 20))), max_bytes=1 << 30)["z"].size == 32 << 20


def test_an_entry_that_is_more_than_it_claims(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", Put("more", b"y" * 1000))
    content = bytearray(source.read_bytes())
    at = content.rindex(b"PK\1\2")
    content[at + 24 : at + 28] = struct.pack("<I", 10)
    source.write_bytes(content)
    with pytest.raises(ArchiveError, match="entry 'more'"):
        run(source)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9, 93])
@pytest.mark.parametrize("is_link", [False, True])
def test_an_entry_of_a_method_that_its_bytes_are_not_of(tmp_path: Path, method: int, is_link: bool) -> None:
    """bzip2's reader says an OSError of its own."""
    entry = Put(DOCKERFILE, b"app/file" * 9, 0o120777) if is_link else Put("f", b"hello" * 9)
    source = archive(tmp_path / "a.zip", entry, dockerfile=not is_link)
    content = bytearray(source.read_bytes())
    at = content.rindex(b"PK\1\2")
    for place in (at + 10, struct.unpack_from("<I", content, at + 42)[0] + 8):
        content[place : place + 2] = struct.pack("<H", method)
    source.write_bytes(content)
    with pytest.raises(ArchiveError, match="the artifact cannot be read as a zip file: " if is_link else "entry 'f' cannot be read: "):
        run(source)


def test_a_dockerfile_that_is_too_long_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="entry 'Dockerfile' has 1048577 bytes; 1048576 are taken"):
        run(archive(tmp_path / "a.zip", Put(DOCKERFILE, b"#" * ((1 << 20) + 1)), dockerfile=False), max_bytes=1 << 30)


def test_no_dockerfile(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as refused:
        run(archive(tmp_path / "a.zip", Put("sub/Dockerfile"), dockerfile=False))
    assert refused.value.code == "ARCHIVE_DOCKERFILE_NOT_FOUND"


@pytest.mark.long
def test_zeros_are_no_bomb(tmp_path: Path) -> None:
    assert run(archive(tmp_path / "a.zip", Put("z", b"\0" * (200 << 20))), max_bytes=1 << 30)["z"].size == 200 << 20


@pytest.mark.long
def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", *(Put(f"node_modules/m{n // 50}/lib/{n}.js", b"x" * 40) for n in range(100_000)))
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-m", "gateway.images.unpack", str(source), str(tmp_path / "out"), str(2 << 30), "250000", "1100"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    told = json.loads(done.stdout)
    assert (told["code"], told["text"]) == ("", "")
    with tarfile.open(tmp_path / "out" / CONTEXT) as made:
        assert sum(1 for _ in made) == 100_001


@given(st.binary(max_size=300), st.integers(0, 200))
def test_broken_archives_are_refused_never_worse(data: bytes, at: int) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("Dockerfile", b"FROM x")
    whole = out.getvalue()
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "a", Path(directory) / "t"
        target.mkdir()
        source.write_bytes(whole[:at] + data + whole[at + len(data) :])
        try:
            unpack(source, target, 1 << 20, 10, 100)
        except ArchiveError:
            return
        assert (target / DOCKERFILE).is_file()


@given(st.text(max_size=80))
def test_names_stay_below_the_root(name: str) -> None:
    try:
        path = Path(*check_name(name))
    except (ArchiveError, UnicodeError):
        return
    assert ".." not in path.parts and not path.is_absolute()


@given(st.lists(st.sampled_from(["..", "a", ".", ""]), max_size=8), st.integers(0, 3))
def test_links_stay_below_the_root(parts: list[str], depth: int) -> None:
    place, target = ("d",) * depth + ("link",), "/".join(parts)
    try:
        check_link(place, target, "link")
    except ArchiveError:
        return
    assert target.startswith("/") or os.path.normpath("/".join(("root", *place[:-1], target))).split("/")[0] == "root"


async def test_a_build_that_is_called_off_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.zip")  # whoever opens it waits
    started: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
    execute = asyncio.create_subprocess_exec

    async def noted(*words: Any, **settings: Any) -> asyncio.subprocess.Process:
        process = await execute(*words, **settings)
        started.put_nowait(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    unpacking = asyncio.create_task(artifact.unpack(Settings(), tmp_path / "a.zip", tmp_path / "out"))
    process = await started.get()
    unpacking.cancel()
    try:
        assert await asyncio.wait_for(process.wait(), 3) == -signal.SIGKILL
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = archive(tmp_path / "a.zip", Put("../x"))
    words = [sys.executable, "-m", "gateway.images.unpack", str(source), str(tmp_path / "out"), "1000000", "100", "200"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["code"], told["text"]) == ("ARCHIVE_INVALID", "entry '../x' leaves the archive")
