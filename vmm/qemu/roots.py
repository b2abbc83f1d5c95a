"""Roots of hypervisors side by side in the cache: CACHE/qemu-root-<digest of what is in it>; CACHE/qemu-root leads to the host's QEMU.

Another QEMU on the host (an update of its package) makes another root at the next start. States are loaded by the version that wrote
them, so an older root stays for as long as an image needs it. Instances share a cache: each says which roots it needs in a file of its
own there, and who starts removes a root that none needs. An error, a disk that is not mounted for one, removes none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
import xxhash

from .. import digests, jail, making
from ..errors import VmmError
from ..provenance import Provenance
from . import machine as topology

CURRENT = "qemu-root"
_PREFIX = f"{CURRENT}-"
_INFO, _FITTED = "torpor.json", "usr/lib/torpor-mapper.key"  # in a root
_FIRST = "qemu-root.first"  # names the root that was CACHE/qemu-root itself, of commit 165a0cb and before
_NEEDS = "needed-roots"
_FORGOTTEN_SECONDS = 30 * 86400  # after which an instance that has no directory any more needs nothing
_SECONDS = 20
_DIGITS = 16


class Root(msgspec.Struct, frozen=True):
    """`version` is what its QEMU says of itself, `machine` the machine type that it takes for a new q35."""

    name: str
    version: str
    machine: str
    path: Path = Path()


def contents(files: Iterable[str]) -> dict[str, Path]:
    """Returns of files of the host where each lies in a root."""
    return {f"{os.path.realpath(os.path.dirname(file)).lstrip('/')}/{os.path.basename(file)}": Path(file) for file in files}


def digest(found: Mapping[str, Path]) -> str:
    """Returns a digest of names and data: equal for equal hypervisors, whatever their files' dates."""
    state = xxhash.xxh3_128()
    for name, path in sorted(found.items()):
        data = path.read_bytes()
        state.update(f"{name}\0{len(data)}\0".encode() + data)
    return state.hexdigest()[:_DIGITS]


def name_of_hosts(cache: Path) -> str:
    """Returns what the root of the host's QEMU is called. Its files are read again only when one has changed."""
    found = contents(jail.files())
    facts = "".join(f"{name} {(stat := path.stat()).st_size} {stat.st_mtime_ns} {stat.st_ino}\n" for name, path in sorted(found.items()))
    return making.remembered(cache / f"{CURRENT}.digest", hashlib.sha256(facts.encode()).hexdigest(), lambda: _PREFIX + digest(found))


def key(cache: Path) -> str:
    return making.key_of(name_of_hosts(cache), jail.make_root, jail.make_mapper, jail.MAPPER, *jail.FILTER)


def make(cache: Path, link: Path) -> None:
    """Makes the root of the host's QEMU, unless it is there, and `link`, which leads to it. Raises OSError, SubprocessError."""
    _adopt_first(cache)
    name, layout = name_of_hosts(cache), making.key_of(jail.make_root)
    if making.key_at(cache / name) != layout:
        making.make(cache / name, layout, _make)
    for root in directories(cache):
        fit(root)
    link.symlink_to(name)


def _make(work: Path) -> None:
    jail.make_root(work)
    _describe(work)


def fit(root: Path) -> None:
    """Gives a root the mapper of this tree: vmm speaks to it. Raises OSError, SubprocessError."""
    wanted = making.key_of(jail.make_mapper, jail.MAPPER, *jail.FILTER)
    if fitted(root) != wanted:
        jail.make_mapper(root)
        (root / _FITTED).write_text(wanted, encoding="ascii")


def fitted(root: Path) -> str:
    """Returns the key of the mapper in a root, empty where there is none."""
    try:
        return (root / _FITTED).read_text(encoding="ascii")
    except OSError:
        return ""


def _describe(root: Path) -> None:
    """Asks the QEMU in a root what it is; that it answers shows that the root has all that it needs. Raises OSError, SubprocessError."""
    said = _run(root, "--version")
    alias = re.search(r"\(alias of (pc-q35-[0-9.]+)\)", _run(root, "-M", "help"))
    found = re.search(r"version (.+)", said)
    if found is None or alias is None:
        raise OSError(f"{root}{topology.BINARY} says neither its version nor what q35 stands for: {said[:200]!r}")
    (root / _INFO).write_bytes(msgspec.json.encode({"version": found[1], "machine": alias[1]}))


def _run(root: Path, *words: str) -> str:
    command = ["chroot", str(root), topology.BINARY, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout


def _adopt_first(cache: Path) -> None:
    """Before there were several, CACHE/qemu-root was the root itself: it gets its name, and stays, for nobody wrote down who needs it."""
    first = cache / CURRENT
    if first.is_symlink() or not making.key_at(first):
        return
    inside = {
        str(path.relative_to(first)): path
        for path in first.rglob("*")
        if path.is_file() and not path.is_symlink() and path.relative_to(first).parts[0] == "usr" and not path.name.startswith("torpor-")
    }
    name = _PREFIX + digest(inside)
    _describe(first)
    (cache / _FIRST).write_text(name, encoding="ascii")
    if (cache / name).exists():
        making.remove(first)
    else:
        making.key_path(cache / name).write_text("of an earlier layout", encoding="ascii")
        first.rename(cache / name)
    making.key_path(first).unlink()


def directories(cache: Path) -> list[Path]:
    """Returns whole roots only: one without a key was being made."""
    return [path for path in sorted(cache.glob(f"{_PREFIX}*")) if path.is_dir() and making.key_at(path)]


def read(path: Path) -> Root:
    """Raises OSError, ValueError."""
    path = path.resolve()
    info = msgspec.json.decode((path / _INFO).read_bytes(), type=dict[str, str])
    return Root(path.name, info["version"], info["machine"], path)


class Roots:
    """The roots of a cache, looked at each time: another start may add one, and an operator may put one back."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def current(self) -> Root:
        """Returns the root of the host's QEMU, which makes new images. Raises VmmError."""
        try:
            return read(self._cache / CURRENT)
        except (OSError, ValueError, KeyError) as error:
            raise VmmError(f"the hypervisors' root in {self._cache} cannot be used ({error}): run `torpor assets`") from error

    def all(self) -> list[Root]:
        found = []
        for path in directories(self._cache):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(read(path))
        return found

    def first(self) -> str:
        """Returns the name of the root of commit 165a0cb, empty where there was none."""
        try:
            return (self._cache / _FIRST).read_text(encoding="ascii")
        except OSError:
            return ""

    def of(self, made: Provenance, current: Root) -> Root | None:
        """Returns which of them loads what was made so; None where none does."""
        return current if made.version == current.version else choose(made, current, self.all(), self.first())


def choose(made: Provenance, current: Root, there: Iterable[Root], first: str) -> Root | None:
    """Returns the host's QEMU where it is of the same version, with newer libraries perhaps; else the very root that made it, or another of
    that version. Where nobody wrote the version down, the root of that time, else the host's: nothing says that it will not do."""
    if made.version == current.version:
        return current
    same = {root.name: root for root in there if root.version == made.version or (not made.version and root.name == first)}
    return same.get(made.root) or next(iter(same.values()), None) or (None if made.version else current)


def why_refused(what: str, made: Provenance, there: Iterable[Root]) -> str:
    found = ", ".join(sorted({root.version for root in there})) or "none"
    return (
        f"{what} was made by {made.in_words()} ({made.machine}), which alone can load it, and that is not here (there is {found}): "
        f"put its directory {made.root} back into the cache, or install that version and start the service again; "
        f"`torpor images --rebuild-old` makes a new version of an image"
    )


# ---- which may go ----


def collect(cache: Path, instance: Path, needed: set[str], say: Callable[[str], None]) -> None:
    """Writes down what the instance at `instance` needs, then removes the roots that no instance does: neither the host's own nor the one
    of commit 165a0cb. Nothing is removed while somebody makes roots. Raises OSError."""
    needs = cache / _NEEDS
    needs.mkdir(exist_ok=True)
    own = need_of(cache, instance)
    own.with_suffix(".new").write_bytes(msgspec.json.encode(_Needs(str(instance), sorted(needed))))
    own.with_suffix(".new").rename(own)
    with making.alone_unless_busy(cache) as is_alone:
        if not is_alone:
            return
        kept = needed | {Roots(cache).current().name, Roots(cache).first()}
        for path in needs.glob("*[0-9a-f]"):
            try:
                other = msgspec.json.decode(path.read_bytes(), type=_Needs)
            except (OSError, ValueError) as error:
                say(f"no root is removed: {path} cannot be read: {error}")
                return
            if not Path(other.instance).exists() and time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
                path.unlink()
            else:
                kept.update(other.roots)
        for path in directories(cache):
            if path.name not in kept:
                making.key_path(path).unlink()
                digests.forget(path)
                shutil.rmtree(path)
                say(f"{path} is removed: no image of an instance with this cache needs it")


def need_of(cache: Path, instance: Path) -> Path:
    """Returns where an instance writes down what it needs. Who removes the instance for good removes it too."""
    return cache / _NEEDS / hashlib.sha256(str(instance).encode()).hexdigest()[:_DIGITS]


class _Needs(msgspec.Struct):
    instance: str
    roots: list[str]


def needs_of(manifests: Iterable[Provenance], roots: Roots, current: Root) -> set[str]:
    """Returns names of the roots that load what was made so, and of those that would, were they there."""
    there, first = roots.all(), roots.first()
    found = {current.name}
    for made in manifests:
        chosen = choose(made, current, there, first)
        found.add(chosen.name if chosen is not None else made.root)
    return found
