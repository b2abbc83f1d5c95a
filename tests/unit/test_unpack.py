"""Archives: everything a careful reader refuses, and files that come out as they went in."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.images.unpack import ArchiveError, check_name, unpack


def archive(tmp_path: Path, entries: dict[str, bytes], modes: dict[str, int] | None = None) -> Path:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in ({"Dockerfile": b"FROM x"} | entries).items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            out.writestr(info, data)
    return path


def run(tmp_path: Path, source: Path, max_bytes: int = 1 << 20, entries: int = 100, ratio: int = 200) -> Path:
    target = tmp_path / "out"
    target.mkdir()
    unpack(source, target, max_bytes, entries, ratio)
    return target


def test_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    files = {"app.py": b"print(1)", "deep/er/x": b"\0\1", "run.sh": b"#!/bin/sh"}
    target = run(tmp_path, archive(tmp_path, files | {"empty/": b""}, {"run.sh": 0o104755, "empty/": 0o040777}))
    assert {name: (target / name).read_bytes() for name in files} == files and (target / "empty").is_dir()
    assert stat.S_IMODE((target / "run.sh").stat().st_mode) == 0o755  # executable, and no set-user-id
    assert stat.S_IMODE((target / "app.py").stat().st_mode) == 0o644


REFUSED: dict[str, tuple[dict[str, bytes], dict[str, int], str]] = {
    "climbs": ({"../x": b""}, {}, "leaves the archive"),
    "climbs inside": ({"a/../../x": b""}, {}, "leaves the archive"),
    "absolute": ({"/x": b""}, {}, "absolute path"),
    "a drive": ({"C:/x": b""}, {}, "absolute path"),
    "a backslash": ({"a\\..\\x": b""}, {}, "character"),
    "a control character": ({"a\nb": b""}, {}, "character"),
    "a link": ({"l": b"/etc/passwd"}, {"l": 0o120777}, "a link"),
    "a device": ({"d": b""}, {"d": 0o020666}, "a device or pipe"),
    "a pipe": ({"p": b""}, {"p": 0o010666}, "a device or pipe"),
    "a long name": ({"x" * 300: b""}, {}, "too long a name"),
    "deep": ({"/".join("x" * 70): b""}, {}, "too long a name"),
    "a file as a folder": ({"x": b"", "x/y": b""}, {}, "uses a file as a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    entries, modes, text = REFUSED[case]
    with pytest.raises(ArchiveError, match=text) as refused:
        run(tmp_path, archive(tmp_path, entries, modes))
    assert refused.value.code == "ARCHIVE_INVALID"
    assert not list(tmp_path.parent.glob("x")) and not (tmp_path / "x").exists()


def test_the_same_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as out, contextlib.suppress(UserWarning), pytest.warns(UserWarning):
        out.writestr("Dockerfile", b"a")
        out.writestr("Dockerfile", b"b")
    with pytest.raises(ArchiveError, match="twice"):
        run(tmp_path, path)


def test_bounds(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="entries"):
        run(tmp_path, archive(tmp_path, {f"{n}": b"" for n in range(100)}))
    (tmp_path / "out").rmdir()
    with pytest.raises(ArchiveError, match="claim to unpack"):
        run(tmp_path, archive(tmp_path, {"z": b"\0" * (2 << 20)}))
    (tmp_path / "out").rmdir()
    with pytest.raises(ArchiveError, match="claim to unpack"):
        run(tmp_path, archive(tmp_path, {"z": b"\0" * (32 << 20)}), max_bytes=1 << 30)


def test_no_dockerfile(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("sub/Dockerfile", b"a")
    with pytest.raises(ArchiveError) as refused:
        run(tmp_path, path)
    assert refused.value.code == "ARCHIVE_DOCKERFILE_NOT_FOUND"


@given(st.binary(max_size=300), st.integers(0, 200))
def test_broken_archives_are_refused_never_worse(data: bytes, at: int) -> None:
    import tempfile

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
        assert (target / "Dockerfile").is_file()


@given(st.text(max_size=80))
def test_names_stay_below_the_target(name: str) -> None:
    try:
        path = check_name(name)
    except (ArchiveError, UnicodeError):
        return
    assert ".." not in path.parts and not path.is_absolute()
    assert Path("/t", path).resolve().is_relative_to("/t")


def test_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = archive(tmp_path, {"../x": b""})
    words = [sys.executable, "-m", "gateway.images.unpack", str(source), str(tmp_path / "out"), "1000000", "100", "200"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"code": "ARCHIVE_INVALID", "text": "entry '../x' leaves the archive"}
