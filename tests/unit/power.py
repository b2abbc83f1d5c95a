"""What a power cut may leave of a directory, at each moment of a program that wrote there.

power.c records the program's calls. A file's bytes are certain after fsync(2) of it, a name after fsync(2) of its directory; until then a
file system may have them or not. Three of the possible outcomes are built for each moment: nothing that was not synced is there; all names are
there, without bytes that were not synced; everything is there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
OUTCOMES = ("synced", "names", "all")


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    entries: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


@dataclass
class Moment:
    """`said` is what the program had written to its file of words by then: what it may rely on."""

    number: int
    call: str
    said: list[str]
    outcomes: dict[str, dict[str, bytes | None]]  # path to content; None for a folder

    def lay_out(self, outcome: str, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path, content in self.outcomes[outcome].items():
            if content is None:
                (target / path).mkdir()
            else:
                (target / path).write_bytes(content)
        return target


@cache
def _library() -> Path:
    target = Path(tempfile.mkdtemp(prefix="torpor-power-")) / "power.so"
    atexit.register(shutil.rmtree, target.parent, ignore_errors=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", target, HERE / "power.c", "-ldl"], check=True, timeout=60)
    return target


def run(scene: str, root: Path) -> list[Moment]:
    """Runs `scene` of power_scenes.py on `root`, of which all is certain before; returns its moments."""
    trace = root.with_name("trace")
    environment = os.environ | {"LD_PRELOAD": str(_library()), "POWER_ROOT": str(root), "POWER_TRACE": str(trace)}
    before = _loaded(root)
    subprocess.run([sys.executable, HERE / "power_scenes.py", scene, root], env=environment, check=True, timeout=60)
    return list(_replayed(before, trace.read_bytes(), root))


def _loaded(path: Path) -> Folder:
    folder = Folder()
    for one in path.iterdir():
        if one.is_dir():
            folder.entries[one.name] = _loaded(one)
        else:
            data = one.read_bytes()
            folder.entries[one.name] = File(bytearray(data), data)
    folder.synced = dict(folder.entries)
    return folder


def _records(trace: bytes) -> Iterator[tuple[str, str, str, int, bytes]]:
    at = 0
    while at < len(trace):
        kind = chr(trace[at])
        end = trace.index(b"\0", at + 1)
        other = trace.index(b"\0", end + 1)
        offset, length = struct.unpack_from("=QQ", trace, other + 1)
        data = trace[other + 17 : other + 17 + (length if kind == "w" else 0)]
        yield kind, trace[at + 1 : end].decode(), trace[end + 1 : other].decode(), offset, data
        at = other + 17 + len(data)


def _replayed(root: Folder, trace: bytes, place: Path) -> Iterator[Moment]:
    words, said = str(place / "words"), list[str]()

    def parent(path: str) -> tuple[Folder, str]:
        folder = root
        *above, name = Path(path).relative_to(place).parts
        for one in above:
            folder = folder.entries[one]  # type: ignore[assignment]
        return folder, name

    def found(path: str) -> File | Folder | None:
        if path == str(place):
            return root
        folder, name = parent(path)
        return folder.entries.get(name)

    for number, (kind, path, other, offset, data) in enumerate(_records(trace)):
        if path == words:
            said += data.decode().split("\n")[:-1] if kind == "w" else []
            continue
        node = found(path.removesuffix(" (deleted)"))
        if kind in "cm":
            folder, name = parent(path)
            folder.entries[name] = Folder() if kind == "m" else File()
        elif kind == "s" and isinstance(node, Folder):
            node.synced = dict(node.entries)
        elif kind == "s" and isinstance(node, File):
            node.synced = bytes(node.data)
        elif kind == "S":
            _sync(root)
        elif kind == "w" and isinstance(node, File):
            node.data[len(node.data) :] = bytes(max(0, offset - len(node.data)))
            node.data[offset : offset + len(data)] = data
        elif kind == "t" and isinstance(node, File):
            node.data[:] = node.data[:offset] + bytes(max(0, offset - len(node.data)))
        elif kind in "rlx" and node is not None:
            (source, old), (target, new) = parent(path), parent(other)
            there = target.entries.get(new)
            target.entries[new] = node
            if kind == "r":
                del source.entries[old]
            elif kind == "x" and there is not None:
                source.entries[old] = there
        elif kind == "u":
            folder, name = parent(path)
            folder.entries.pop(name, None)
        outcomes = {outcome: dict(_content(root, outcome)) for outcome in OUTCOMES}
        yield Moment(number, f"{kind} {path} {other}", list(said), outcomes)


def _sync(folder: Folder) -> None:
    """All that there is (syncfs(2))."""
    folder.synced = dict(folder.entries)
    for node in folder.entries.values():
        if isinstance(node, Folder):
            _sync(node)
        else:
            node.synced = bytes(node.data)


def _content(folder: Folder, outcome: str, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
    for name, node in (folder.synced if outcome == "synced" else folder.entries).items():
        if isinstance(node, Folder):
            yield f"{prefix}{name}", None
            yield from _content(node, outcome, f"{prefix}{name}/")
        elif f"{prefix}{name}" != "words":
            yield f"{prefix}{name}", bytes(node.data) if outcome == "all" else node.synced
