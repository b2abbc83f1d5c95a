"""Artifacts: whichever tool packed them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

from fidelity.table import BASE, Image, Run, Subject

_UNIX, _MS_DOS = 3, 0
_FILE, _LINK = 0o100644, 0o120777
_COPIED = BASE + 'COPY . /all/\nEXPOSE 8080\nCMD ["/all/server"]\n'


def _packed(
    *entries: tuple[str, bytes, int, int], ahead: bytes = b"", names: tuple[bytes, bytes] | None = None
) -> Callable[[bytes], bytes]:
    """Entries of a name, data, a mode, and the system that they say they are from. `names` replaces a name by these bytes, as tools write
    them that know nothing of the flag for UTF-8."""

    def pack(server: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data, mode, system in (("Dockerfile", _COPIED.encode(), _FILE, _UNIX), ("server", server, 0o100755, _UNIX), *entries):
                info = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
                info.create_system, info.external_attr, info.compress_type = system, mode << 16, zipfile.ZIP_DEFLATED
                if names and name.encode() == names[0] and mode == 0o100640:
                    text = "données".encode()
                    info.extra = struct.pack("<HHBI", 0x7075, 5 + len(text), 1, zlib.crc32(names[1])) + text
                archive.writestr(info, data)
        return ahead + (out.getvalue().replace(*names) if names else out.getvalue())

    return pack


SUBJECT = Subject(
    "Archives",
    "The tree of an artifact reaches the build as it was packed: modes, links and names. What would leave the tree is refused by its name.",
    [
        Image(
            "archive-tree",
            "modes, links, empty folders, and names from here (`./`)",
            None,
            [
                Run("modes are kept", "stat -c %a /all/key /all/group /all/read-only", "600\n775\n444"),
                Run("links are links", "readlink /all/link /all/absolute /all/dangling", "src/a\n/etc/localtime\nnowhere"),
                Run("a link to a folder leads there, and an empty folder is there", "cat /all/folder/a; ls -A /all/empty", "a"),
                Run("all is root's", "find /all ! -user 0 -o ! -group 0", ""),
            ],
            files=_packed(
                ("./", b"", 0o040755, _UNIX), ("./src/a", b"a", _FILE, _UNIX), ("key", b"k", 0o100600, _UNIX), ("group", b"", 0o100775, _UNIX),
                ("read-only", b"", 0o100444, _UNIX), ("link", b"src/a", _LINK, _UNIX), ("absolute", b"/etc/localtime", _LINK, _UNIX),
                ("dangling", b"nowhere", _LINK, _UNIX), ("folder", b"src", _LINK, _UNIX), ("empty/", b"", 0o040755, _UNIX),
                ahead=b"#!/bin/sh\nexit 0\n" * 64,
            ),
            note="also behind a program, as self-extracting archives are",
        ),
        Image(
            "archive-names",
            "names of other systems and tools",
            None,
            [
                Run("Windows's separators are folders", "cat /all/src/deep/a", "windows"),
                Run("UTF-8 without the flag is UTF-8", "cat /all/donnees/été", "utf-8"),
                Run("colons and control characters are part of a name", r"ls /all/a:b.txt /all/Icon*", "/all/Icon\r\n/all/a:b.txt"),
            ],
            files=_packed(
                ("src\\deep\\a", b"windows", 0, _MS_DOS), ("donnees/#####", b"utf-8", _FILE, _UNIX), ("a:b.txt", b"", _FILE, _UNIX),
                ("Icon\r", b"", _FILE, _UNIX), names=(b"#####", "été".encode()),
            ),
        ),
        Image(
            "archive-extra-field",
            "a name in Info-ZIP's extra field",
            None,
            [Run("the field's name is taken", "cat /all/données", "x")],
            files=_packed(("#######", b"x", 0o100640, _UNIX), names=(b"#######", b"donn_es")),
            long=True,
        ),
        Image("archive-zeros", "200 MB of zeros", None, [Run("are no bomb", "stat -c %s /all/zeros", "209715200")],
              files=_packed(("zeros", b"\0" * (200 << 20), _FILE, _UNIX)), long=True),
        Image("archive-link-out", "a link that leaves the tree", None,
              files=_packed(("link", b"../../etc/passwd", _LINK, _UNIX)), fails="ARCHIVE_INVALID: entry 'link' is a link that leaves the archive"),
        Image("archive-below-link", "a file below a link", None,
              files=_packed(("link", b"/tmp", _LINK, _UNIX), ("link/x", b"", _FILE, _UNIX)),
              fails="ARCHIVE_INVALID: entry 'link/x' uses a link as a folder"),
        Image("archive-device", "a device", None, files=_packed(("null", b"", 0o020666, _UNIX)),
              fails="ARCHIVE_INVALID: entry 'null' is a device or pipe"),
    ],
)  # fmt: skip
