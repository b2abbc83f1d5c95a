"""What a row of the table of images is: a Dockerfile with its files, and what must be true of what comes out.

Rows stand in fidelity/rows/*.py, one module for each subject. test_fidelity.py runs them against real builds; document.py writes
docs/images.md from them. A row is in `make test` unless it is `long`.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASE = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n"
# The image runs the table's server: it executes commands as the application, and needs nothing of the image (tests/fidelity/server.c).
SERVER = 'COPY server /server\nEXPOSE 8080\nCMD ["/server"]\n'


@dataclass(frozen=True)
class Run:
    """A shell command that the server executes in the microVM, as the application's user. `prints` is a regular expression for the whole of
    what it prints, stripped."""

    says: str
    command: str
    prints: str = ""
    code: int = 0


@dataclass(frozen=True)
class Get:
    """A request to the microVM's endpoint. `contains` is searched for in the body, as a regular expression."""

    says: str
    path: str = "/"
    port: int = 8080
    status: int = 200
    contains: str = ""
    method: str = "GET"
    body: bytes | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    within: float = 30.0  # seconds in which the answer must have come; a port that has not answered a row yet is asked again until then


@dataclass(frozen=True)
class Logs:
    """A regular expression that must be in the log, of the microVM or (`build`) of the build; with `absent`, one that must not."""

    says: str
    contains: str = ""
    absent: str = ""
    build: bool = False


@dataclass(frozen=True)
class Sleep:
    """The microVM is suspended; what follows is checked after the next request has resumed it."""

    says: str = "sleeps, and is woken by the next request"


@dataclass(frozen=True)
class Call:
    """Anything else: called with the running row (test_fidelity.Running)."""

    says: str
    check: Callable[[Any], None]


Check = Run | Get | Logs | Sleep | Call


@dataclass(frozen=True)
class Image:
    """`title` names the subject in docs/images.md, `note` says what differs from Docker's and what to write instead.

    `dockerfile` is the whole file, or None where `files` has one. `files` are those of the archive, or a function that makes the archive,
    given the server.
    `fails` is a regular expression for the reason of a build that must fail, with the log's last lines behind it. `request` and `launch`
    are members of CreateMicrovmImage and RunMicrovm. `times` is how long a build may take, in seconds."""

    name: str
    title: str
    dockerfile: str | None = None
    checks: Sequence[Check] = ()
    files: Mapping[str, str | bytes] | Callable[[bytes], bytes] = field(default_factory=dict)
    fails: str | None = None
    note: str = ""
    long: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)
    launch: Mapping[str, Any] = field(default_factory=dict)
    times: float = 600.0


def archive(files: Mapping[str, str | bytes]) -> bytes:
    """A zip of `files`, as Info-ZIP makes it of a directory: programs and scripts are executable."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, text in files.items():
            data = text.encode() if isinstance(text, str) else text
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            entry.create_system, entry.compress_type = 3, zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if data.startswith((b"\x7fELF", b"#!")) else 0o100644) << 16
            made.writestr(entry, data)
    return out.getvalue()


@dataclass(frozen=True)
class Subject:
    """A module of rows: a section of docs/images.md. Those of the `corpus` are whole applications."""

    title: str
    text: str
    images: Sequence[Image]
    corpus: bool = False


def subjects() -> list[Subject]:
    """Every subject, in the order of its modules' names."""
    package = importlib.import_module("fidelity.rows")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"fidelity.rows.{name}").SUBJECT for name in names]
