"""A Dockerfile, as control reads it before BuildKit does (gateway/images/dockerfile.py)."""

from __future__ import annotations

import codecs

from gateway.images.artifact import BuildFailed
from gateway.images.dockerfile import UIDS, prepare

TRACED = ("gateway.images.dockerfile",)
_BASE = "public.ecr.aws/lambda/microvms"
WORDS = (b"\n", b"\r\n", b"\\\n", b"`\n", b"FROM ", b" AS a", b"FROM a\n", b"ARG a=b\n", b"ENV a $a$a\n", b"ENV a=${b:-c}\n", b"USER 2000000\n", b"COPY --chown=1:2 --chmod=755 a b\n", b"RUN <<EOF\n", b"<<-'E'",
         b"# syntax=docker/dockerfile:1\n", b"# escape=`\n", b"# check=skip=all\n", b"#!", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"${", b"}", b"'", b'"', b"--platform=linux/arm64 ", b"9" * 30,
         b"\xd9\xa3", b"\0", b"\x85", b"\x0c", b"\xe2\x80\xa8")  # fmt: skip


def seeds() -> list[bytes]:
    base = _BASE.encode()
    return [
        b"# syntax=docker/dockerfile:1\n# escape=`\nARG V=1\nFROM --platform=linux/arm64 " + base + b":${V} AS one\nENV a=b c=\"d e\"\nRUN echo `\n  x\nUSER 1001:1001\n",
        b"FROM " + base + b"\nRUN <<EOF\nFROM x\nEOF\nCOPY --chown=${u:-7}:7 --chmod=0644 . /app\nENTRYPOINT [\"python3\", \"app.py\"]\n",
        b"FROM alpine AS a\nARG u=2000000\nUSER $u\nFROM a\nCOPY --from=a --chown=2000000 x y\nENV old form of it\nHEALTHCHECK NONE", b"\xef\xbb\xbffrom " + base + b"\r\nadd <<a <<-b /x\r\na\r\n\tb\r\n",
    ]  # fmt: skip


def check(data: bytes) -> None:
    for pull in (False, True):
        try:
            made = prepare(data, [_BASE], pull, "amd64")
        except BuildFailed as error:
            assert (
                str(error).startswith("CONTAINER_BUILD_FAILED: Dockerfile, line ")
                and "\n" not in str(error)
                and len(str(error)) < 4096 + 500
            ), str(error)
            str(error).encode()
            continue
        assert made.text.count("\n") == data.count(b"\n"), "lines move"
        assert all(UIDS < one < 1 << 32 for one in made.users)
        again = prepare(codecs.BOM_UTF8 + made.text.encode(errors="surrogateescape"), [_BASE], True, "amd64")
        assert again.users == made.users, "what BuildKit gets means another user"
