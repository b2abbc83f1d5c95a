"""An artifact's zip file (gateway/images/unpack.py): what comes out stays in its tree, and is no more than was allowed."""

from __future__ import annotations

import functools
import io
import os
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

from gateway.images.unpack import CONTEXT, ArchiveError, unpack

TRACED = ("gateway.images.unpack", "zipfile")
WORDS = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"../", b"/", b"\\", b"Dockerfile", b"\x75\x70", b"UT\5\0\3", b"\0\0\xff\xa1", b"\0\0\xff\x81", b"\x0c\0", b"\x0e\0", b"\x63\0", b"\1\0", b"\0\x08",
         b"\1\0\x18\0" + b"\xff" * 24, b"\xff\xff\xff\xff", b"\x2d\0")  # fmt: skip
_MOST = 1 << 20


def _packed(*entries: tuple[str, bytes, int, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", kind) as made:
        for name, data, mode, extra in (("Dockerfile", b"FROM x\n", 0o100644, b""), *entries):
            info = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
            info.create_system, info.external_attr, info.extra, info.compress_type = 3, mode << 16, extra, kind
            made.writestr(info, data)
    return out.getvalue()


def seeds() -> list[bytes]:
    named = struct.pack("<BI", 1, zlib.crc32(b"x")) + "\u65e5".encode()
    return [
        _packed(("a/b.py", b"print()\n" * 20, 0o100755, b""), ("a/", b"", 0o040755, b""), ("l", b"a/b.py", 0o120777, b"")), _packed(("x", b"y", 0o100600, struct.pack("<HH", 0x7075, len(named)) + named)),
        _packed(("t", b"", 0o100644, struct.pack("<HHBi", 0x5455, 5, 1, 1_700_000_000)), kind=zipfile.ZIP_STORED), _packed(("z", bytes(2000), 0o100644, b""), kind=zipfile.ZIP_BZIP2),
        _packed(("z", bytes(2000), 0o100644, b""), kind=zipfile.ZIP_LZMA), _packed(("d\u00e9", b"1", 0o100644, b""), ("b\\c", b"2", 0, b"")), b"# of a program\n" + _packed(("k", b"v", 0o100644, b"")),
    ]  # fmt: skip


@functools.cache
def _room() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def check(data: bytes) -> None:
    room = Path(_room().name)
    archive, target = room / "a.zip", room / "out"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    archive.write_bytes(data)
    try:
        with warnings.catch_warnings(action="ignore"):
            unpack(archive, target, _MOST, 100, 1100)
    except ArchiveError as error:
        assert "\n" not in str(error) and len(str(error)) < 6000
        return
    assert sorted(path.name for path in target.iterdir()) == ["Dockerfile", CONTEXT]
    with tarfile.open(target / CONTEXT) as made:
        members = made.getmembers()
    assert sum(member.size for member in members) <= _MOST
    for member in members:
        assert not member.name.startswith("/") and ".." not in member.name.split("/") and "\0" not in member.name
        assert member.isfile() or member.isdir() or member.issym()
        assert member.uid == member.gid == 0 and member.mode & 0o7000 == 0
