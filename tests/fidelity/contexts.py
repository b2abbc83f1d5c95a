"""Build contexts whose images are compared with the reference's (test_reference.py): what Dockerfiles do to files and to the configuration.

No step needs a network, so that nothing but time can differ between two builds. Files are root's, and of one time.
"""

from __future__ import annotations

import datetime
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fidelity.table import BASE, SERVER

DATE = (2026, 1, 1, 0, 0, 0)
_TIME = datetime.datetime(*DATE, tzinfo=datetime.UTC).timestamp()


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class File:
    content: str | bytes
    mode: int


Content = str | bytes | File | Link | None  # None: an empty directory


@dataclass(frozen=True)
class Context:
    """`about` says in docs/images.md what is compared. A process of it is probed when the image has a shell and Python."""

    name: str
    about: str
    dockerfile: str
    files: Mapping[str, Content] = field(default_factory=dict)
    probed: bool = True

    def entries(self, server: bytes) -> list[tuple[str, int, bytes]]:
        """Each path with the mode of its type and the content, or the link's target. Directories are not named, but where they are empty."""
        found: list[tuple[str, int, bytes]] = []
        for path, content in ({"Dockerfile": self.dockerfile, "server": File(server, 0o755)} | dict(self.files)).items():
            match content:
                case None:
                    found.append((path, stat.S_IFDIR | 0o755, b""))
                case Link():
                    found.append((path, stat.S_IFLNK | 0o777, content.target.encode()))
                case File():
                    found.append((path, stat.S_IFREG | content.mode, _bytes(content.content)))
                case _:
                    found.append((path, stat.S_IFREG | 0o644, _bytes(content)))
        return found

    def lay_out(self, directory: Path, server: bytes) -> None:
        for path, mode, content in self.entries(server):
            place = directory / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(mode):
                place.mkdir()
            elif stat.S_ISLNK(mode):
                place.symlink_to(content.decode())
            else:
                place.write_bytes(content)
                place.chmod(stat.S_IMODE(mode))
        for found in [*directory.rglob("*"), directory]:
            os.utime(found, (_TIME, _TIME), follow_symlinks=False)

    def packed(self, server: bytes) -> bytes:
        """As `zip -y` packs it: directories have entries of their own."""
        entries = self.entries(server)
        folders = {str(parent): b"" for path, _, _ in entries for parent in Path(path).parents if str(parent) != "."}
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, mode, content in [*((path, stat.S_IFDIR | 0o755, b"") for path in sorted(folders)), *entries]:
                entry = zipfile.ZipInfo(f"{path}/" if stat.S_ISDIR(mode) else path, DATE)
                entry.create_system, entry.compress_type, entry.external_attr = 3, zipfile.ZIP_DEFLATED, mode << 16
                archive.writestr(entry, content)
        return out.getvalue()


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _tar(mode: str, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _member(
    name: str, mode: int = 0o644, content: bytes = b"", change: Callable[[tarfile.TarInfo], None] = lambda _: None, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = mode, 1_500_000_000
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


_ARCHIVE = (
    _member("d", 0o2750, type=tarfile.DIRTYPE, uid=33, gid=33),
    _member("d/file", 0o640, b"content\n", uid=33, gid=34),
    _member("d/hard", type=tarfile.LNKTYPE, linkname="d/file"),
    _member("d/link", 0o777, type=tarfile.SYMTYPE, linkname="../d/file"),
    _member("d/dangling", 0o777, type=tarfile.SYMTYPE, linkname="/nowhere"),
    _member("d/pipe", 0o600, type=tarfile.FIFOTYPE),
    _member("d/setuid", 0o4755, b"#!/bin/sh\n"),
    _member("d/sticky", 0o1777, type=tarfile.DIRTYPE),
    _member("d/old", 0o644, b"old\n", mtime=1),
    _member("d/far", 0o600, b"far\n", uid=200_000, gid=300_000),
    _member("d/attribute", 0o644, b"x\n", pax_headers={"SCHILY.xattr.user.colour": "blue"}),
    _member("d/" + "long" * 40, 0o644, b"name\n"),
)

CONTEXTS = [
    Context(
        "configuration",
        "ENV, ARG, LABEL, EXPOSE, VOLUME, STOPSIGNAL, HEALTHCHECK, SHELL, WORKDIR, ENTRYPOINT with CMD",
        "ARG VERSION=1.2\n" + BASE + "ARG VERSION\nARG WHO=world\nMAINTAINER somebody\n"
        'ENV GREETING="hello $WHO" SPACED=a\\ b QUOTED=\'$WHO\' EMPTY=\nENV OLD style with  spaces\nENV PATH=/opt/bin:$PATH TOOL=${WHO:-x}${NONE:+y}${VERSION%.*}\n'
        'LABEL one="1" two="multiple \\\nlines" $WHO=expanded\nEXPOSE 8080 8443/tcp 53/udp 9000-9002\nVOLUME ["/data", "/with space"]\nVOLUME /a /b\nSTOPSIGNAL SIGQUIT\n'
        "HEALTHCHECK --interval=5s --retries=2 CMD true\nWORKDIR /srv\nWORKDIR sub/$WHO\nCOPY server /server\n"
        'SHELL ["/bin/bash", "-c"]\nENTRYPOINT ["/server"]\nCMD ["8080"]\n',
    ),
    Context(
        "copies",
        "COPY of files, directories, links and patterns, with owners and modes; .dockerignore",
        BASE + "COPY one.txt /plain\nCOPY one.txt two.txt /into/\nCOPY tree /tree\nCOPY tree/ /new/deep/place/\nCOPY *.txt sub?/ /pattern/\n"
        'COPY --chown=33:34 --chmod=750 tree /owned\nCOPY --chown=www-data one.txt /named\nCOPY ["with space.txt", "/spaces in/name"]\nCOPY . /all/\n'
        "RUN mkdir -p /real && ln -s real /linked && ln -s /real/file /tofile\nCOPY one.txt /linked/\nCOPY one.txt /tofile\nCOPY --link one.txt /linked/two\n"
        "COPY --link --chown=12 tree /far/linked\nCOPY données.txt /\n" + SERVER,
        {
            "one.txt": "one\n", "two.txt": File("two\n", 0o600), "with space.txt": "s\n", "données.txt": "é\n", "tree/run": File("#!/bin/sh\n", 0o755),
            "tree/deep/file": File("deep\n", 0o444), "tree/link": Link("deep/file"), "tree/folder": Link("deep"), "tree/dangling": Link("none"),
            "tree/empty": None, "tree/.hidden": "h\n", "sub1/a": "a\n", "sub2/b": "b\n", "ignored/file": "i\n", "ignored/kept": "k\n",
            "deep/x/skip.log": "l\n", "deep/keep.log": "l\n", ".dockerignore": "ignored\n!ignored/kept\n**/*.log\n!deep/keep.log\n# a remark\n",
        },
    ),
    Context(
        "archives",
        "ADD of tar archives: owners, modes, hard and symbolic links, pipes, attributes, times; of files that are none",
        BASE + "ADD tree.tar /tar/\nADD tree.tar.gz tree.tar.xz /packed/\nADD --chown=5:6 tree.tar.bz2 /owned/\nADD plain.gz notes.txt /plain/\nADD tree.tar /\n" + SERVER,
        {
            "tree.tar": _tar("w", *_ARCHIVE), "tree.tar.gz": _tar("w:gz", _member("gz/file", 0o600, b"gz\n")), "tree.tar.xz": _tar("w:xz", _member("xz/file", 0o600, b"xz\n")),
            "tree.tar.bz2": _tar("w:bz2", _member("bz2/file", 0o600, b"bz2\n")), "plain.gz": b"\x1f\x8b\x08\0\0\0\0\0\0\3K\4\0C\xbe\xb7\xe8\1\0\0\0", "notes.txt": "notes\n",
        },
    ),
    Context(
        "scratch", "FROM scratch, COPY --from a stage by name and by number",
        BASE.replace("\n", " AS Build\n") + "RUN mkdir -p /out/etc && echo nobody:x:65534:65534::/:/none > /out/etc/passwd && ln -s etc /out/conf\n"
        "FROM scratch AS other\nCOPY --from=0 /out /\nFROM other\nCOPY --from=build /out/etc/passwd /second/\nCOPY server /server\nUSER 65534:65533\nEXPOSE 8080\n" + 'ENTRYPOINT ["/server"]\n',
        probed=False,
    ),
    Context(
        "heredocs", "here-documents: scripts, files, with variables and without, with modes",
        BASE + "ENV WHO=world\nRUN <<EOF\nset -e\necho $WHO > /one\nEOF\nRUN <<-'EOT' bash -e\n\techo ${WHO/w/W} > /two\nEOT\n"
        "RUN cat > /three <<EOF && cat <<MORE >> /three\nfirst\nEOF\nsecond\nMORE\nRUN <<EOF\n#!/usr/bin/env python3\nprint('four', file=open('/four', 'w'))\nEOF\n"
        "COPY <<five.txt <<-\"six.txt\" /files/\nhello $WHO\nfive.txt\n\thello $WHO\nsix.txt\nCOPY --chmod=711 --chown=33 <<EOF /script\n#!/bin/sh\nEOF\n" + SERVER,
    ),
    Context(
        "mounts", "RUN --mount of caches, contexts, stages and memory: what is left where they were",
        BASE.replace("\n", " AS other\n") + "RUN mkdir /lib-of && echo lib > /lib-of/file\n" + BASE + "RUN mkdir -p /kept/sub && echo image > /kept/file\nWORKDIR /app\n"
        "RUN --mount=type=cache,target=/kept,uid=5,mode=0700 stat -c '%u %a' /kept > /app/cache\nRUN --mount=type=tmpfs,target=/kept touch /kept/x\n"
        "RUN --mount=type=bind,source=one.txt,target=here.txt cp here.txt copied\nRUN --mount=type=bind,from=other,source=/lib-of,target=/mnt/new/lib cp /mnt/new/lib/file .\n"
        "RUN --mount=type=bind,target=/context,rw touch /context/new && ls -A /context > listed\nRUN --mount=type=secret,id=none,target=/none/secret true\n"
        "RUN --mount=type=cache,target=/var/cache/apt --mount=type=cache,target=/root/.cache true\nRUN --network=none true\n" + SERVER,
        {"one.txt": "first\n"},
    ),
    Context(
        "volumes", "VOLUME before and after what RUN and COPY write there",
        BASE + "RUN useradd -m app && mkdir /before && echo b > /before/file\nVOLUME /before /after /never\nRUN mkdir -p /after && echo a > /after/file && chown -R app /after && echo more > /before/more\n"
        "COPY one.txt /before/copied\nCOPY --chown=app one.txt /after/copied\nUSER app\nWORKDIR /after\nWORKDIR made/here\n" + SERVER,
        {"one.txt": "one\n"},
    ),
    Context(
        "removed", "files of lower layers that are removed or replaced",
        BASE + "RUN mkdir -p /d/sub /e/sub /f && touch /d/one /d/sub/two /e/sub/three /f/four /plain && ln -s d /l\nRUN rm /d/one && rm -r /e && mkdir /e && touch /e/new\n"
        "RUN rm -r /f && echo file > /f && rm /plain && mkdir /plain && touch /plain/in && rm /l && ln -s e /l\nRUN mv /d/sub /moved && chmod 700 /moved\n"
        "RUN rm /etc/motd /etc/issue 2>/dev/null; rm -rf /usr/share/doc /usr/share/man /opt && mkdir -m 711 /opt\n" + SERVER,
    ),
    Context(
        "users", "useradd, owners beyond 65,535, USER with a group",
        BASE + "RUN groupadd -g 70000 far && useradd -m -u 100000 -g far -G audio,video -s /bin/bash far && su far -c 'touch ~/mine' && install -d -o 999999 -g 5 /far\n"
        "COPY --chown=far:video one.txt /home/far/\nUSER far:video\nRUN id > /tmp/id; touch /home/far/step\nENV WHERE=$HOME\n" + SERVER,
        {"one.txt": "one\n"},
    ),
    Context(
        "number", "a USER that is a number and stands in no file, ENTRYPOINT and CMD in shell form",
        BASE + "USER 12345\nRUN id -u > /tmp/id\nENV A=b\nEXPOSE 8080/tcp\nCOPY server /server\n" + 'ENTRYPOINT exec /server\nCMD ignored\n',
    ),
    Context(
        "modes", "modes, special bits, hard links within and across layers, extended attributes, sparse files",
        BASE + "RUN umask 077 && mkdir -p /m/d && echo x > /m/f && chmod 4755 /m/f && chmod 2771 /m/d && chown 1:2 /m/d && mkfifo /m/p\n"
        "RUN echo h > /m/h1 && ln /m/h1 /m/h2 && ln -s h1 /m/s && chown -h 7:8 /m/s\nRUN ln /m/h1 /m/h3\n"
        "RUN python3 -c \"import os; open('/m/x', 'w'); os.setxattr('/m/x', 'user.a', b'b'); os.setxattr('/m/x', 'security.capability', "
        "bytes.fromhex('0100000200040000000000000000000000000000'))\"\nRUN truncate -s 64M /m/sparse && touch -d 1971-02-03T04:05:06Z /m/h1 && chmod 1777 /m\n" + SERVER,
    ),
    Context(
        "stages", "ONBUILD, stages on stages, names in any case, TARGETARCH and its likes, escapes, line ends of other systems",
        ("# escape=`\nARG TAG=al2023-minimal\nFROM public.ecr.aws/lambda/microvms:${TAG} AS Base\nONBUILD COPY one.txt /onbuild\nONBUILD RUN echo ran > /ran\n"
        "ENV FIRST=1\nFROM base AS second\nARG TARGETARCH\nARG TARGETPLATFORM\nRUN echo $TARGETARCH `\n  # a remark within\n  $TARGETPLATFORM > /platform\n"
        "FROM base AS Unused\nRUN false\nFROM second\nENV SECOND=${FIRST}2\nRUN echo $FIRST $SECOND $PATH $HOME > /environment\n" + SERVER).replace("\n", "\r\n"),
        {"one.txt": "one\r\n"},
    ),
    Context(
        "python", "an application of Python's own modules: a user, a WORKDIR, compiled modules",
        BASE + "ENV PYTHONDONTWRITEBYTECODE=1\nWORKDIR /app\nRUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin appuser\n"
        "COPY app ./app\nRUN python3 -m venv --without-pip /venv && python3 -m compileall -q --invalidation-mode unchecked-hash app\nENV PATH=/venv/bin:$PATH\nUSER appuser\n" + SERVER,
        {"app/__init__.py": "", "app/main.py": "print('hello')\n"},
    ),
]  # fmt: skip

# Steps that write down what they find (probe.py), each in /found/NAME.json: not a tree that is compared.
_PROBE = (Path(__file__).parent / "probe.py").read_text()
STEPS = Context(
    "steps",
    "what a RUN step finds: as root, as a user with groups, as a number that stands in no file, without a shell, with mounts, without a network",
    BASE
    + "COPY probe.py /probe.py\nRUN mkdir -m 1777 /found && useradd -m -u 1001 -G audio,video app\nRUN python3 /probe.py /found/root.json\n"
    "ENV HOME=/elsewhere GREETING=hello\nARG VERSION=1\nWORKDIR /srv/app\nUSER app\nRUN python3 /probe.py /found/user.json\n"
    'USER 12345:54321\nRUN python3 /probe.py /found/number.json\nUSER root\nRUN ["python3", "/probe.py", "/found/exec.json"]\n'
    'SHELL ["/bin/bash", "-euo", "pipefail", "-c"]\nRUN python3 /probe.py /found/shell.json; true\n'
    "RUN --mount=type=cache,target=/cache,uid=5,mode=0700 --mount=type=tmpfs,target=/fast --mount=type=bind,target=/context "
    "--mount=type=bind,target=rw,rw --mount=type=secret,id=none python3 /probe.py /found/mounts.json\n"
    "RUN --network=none python3 /probe.py /found/alone.json\n" + SERVER,
    {"probe.py": _PROBE},
    probed=False,
)
STEP_NAMES = ("root", "user", "number", "exec", "shell", "mounts", "alone")
