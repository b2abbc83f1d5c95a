"""What is made once per host, in the cache directory: kernel, initramfs, the hypervisor's root, the local base image, the builder's root.

Each step names what it makes from what (its key), so an update of the code, of the list of modules or of init makes again what depends
on it, and nothing else.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway import executors
from gateway.config import Images

from . import base, builder_root, digests, kernel, making, probe, registry
from .kernel import AssetError
from .qemu import roots

__all__ = ["LOCAL", "AssetError", "Base", "changed", "make", "missing", "recorded"]
_QUOTED_CHARACTERS = 600


@dataclass(frozen=True)
class Step:
    """`work` makes the file or directory at the path that it is given. `says` is what the user is told while it takes long. `may_wait`:
    where it cannot be made again, with mirrors away for one, what there is will do."""

    name: str
    key: Callable[[Path], str]
    work: Callable[[Path, Path], None]
    says: str
    may_wait: bool = False


def _kernel_key(cache: Path) -> str:
    """Another version of the package is fetched when apt has heard of it; where apt knows none, the one that is there is the newest."""
    known = cache / "kernel/version"
    version = kernel.available(cache) or (known.read_text(encoding="ascii") if known.exists() else "")
    return making.key_of(kernel.fetch_kernel, kernel.meta_package(), version)


def _kernel_keys(cache: Path) -> tuple[str | Path, ...]:
    return making.key_at(cache / "kernel"), cache / "kernel/release"


def _initrd(name: str, modules: tuple[str, ...]) -> Step:
    def key(cache: Path) -> str:
        made_of = (*_kernel_keys(cache), making.key_at(cache / "guest"))
        return making.key_of(kernel.make_initrd, kernel.module_files, kernel.cpio, modules, *made_of)

    def work(cache: Path, target: Path) -> None:
        kernel.make_initrd(cache / "kernel", cache / "guest/init", target, modules)

    return Step(name, key, work, "making the guest's initramfs")


# In the order in which they are made: keys of later ones name earlier ones.
_STEPS = (
    Step(
        "kernel", _kernel_key, lambda cache, target: kernel.fetch_kernel(target), "fetching the guest's kernel (Debian's cloud kernel)",
        may_wait=True,
    ),
    Step(
        "guest", lambda cache: making.key_of(kernel.make_init, *kernel.init_sources()), lambda cache, target: kernel.make_init(target),
        "compiling the guest's init",
    ),
    _initrd("initrd", kernel.MODULES),
    Step(
        "modules", lambda cache: making.key_of(kernel.make_modules, kernel.needed, kernel.EXTRA_MODULES, *_kernel_keys(cache)),
        lambda cache, target: kernel.make_modules(cache / "kernel", target), "choosing the kernel's modules",
    ),
    Step(roots.CURRENT, roots.key, roots.make, "making the hypervisors' root"),
)  # fmt: skip
_FIRECRACKER = (
    Step(
        "vmlinux", lambda cache: making.key_of(kernel.extract_elf, *_kernel_keys(cache)),
        lambda cache, target: kernel.extract_elf(cache / "kernel/vmlinuz", target), "unpacking the guest's kernel",
    ),
    _initrd("initrd-firecracker", kernel.FIRECRACKER_MODULES),
)  # fmt: skip


# Needs nothing of the others, and waits for a mirror and the disk most of the time: it is made beside them.
_BUILDER = Step(
    "builder", lambda cache: builder_root.root_key(), lambda cache, target: builder_root.make_root(target),
    "making the builder's root with mmdebstrap (Debian 13's BuildKit; some 40 s, once)",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """Which base image is wanted (images.base), by which name, and what signs for registries beside the host's authorities."""

    kind: str = "local"
    name: str = ""
    authorities: Path | None = None

    @classmethod
    def of(cls, images: Images) -> Base:
        kind = images.base if images.base_names else "local"
        return cls(kind, next(iter(images.base_names), ""), Path(images.registry_ca) if images.registry_ca else None)


LOCAL = Base()


def _base(wanted: Base, ask: Callable[[str], str]) -> Step:
    chosen = [""]

    def key(cache: Path) -> str:
        chosen[0] = base.chosen_key(wanted.kind, wanted.name, making.key_at(cache / "base.tar"), ask)
        return chosen[0]

    def work(cache: Path, target: Path) -> None:
        base.make(target, chosen[0], wanted.authorities)

    return Step("base.tar", key, work, "making the base image (pulled, or a local one with mmdebstrap: some 40 s, once)")


def _steps(wanted: Base = LOCAL, ask: Callable[[str], str] = lambda name: "") -> Iterator[Step]:
    yield from _STEPS
    yield _base(wanted, ask)
    if probe.firecracker_programs() is not None:
        yield from _FIRECRACKER
    yield _BUILDER


def make(cache: Path, say: Callable[[str], None], wanted: Base = LOCAL) -> None:
    """Makes what is missing; quick when all is there. Raises AssetError."""
    try:
        with making.alone(cache):
            steps = tuple(_steps(wanted, lambda name: registry.digest(name, wanted.authorities)))
            lines = (tuple(one for one in steps if one is not _BUILDER), (_BUILDER,))
            executors.BULK.map(lambda line: _make(cache, line, say), lines)
    except OSError as error:
        raise AssetError(str(error)) from error


def missing(cache: Path, wanted: Base = LOCAL) -> dict[str, bool]:
    """Returns of each file or directory whether it has to be made. No registry is asked."""
    return {step.name: making.key_at(cache / step.name) != step.key(cache) for step in _steps(wanted)}


def _make(cache: Path, steps: tuple[Step, ...], say: Callable[[str], None]) -> None:
    for step in steps:
        try:
            key = step.key(cache)
            _check(cache, step)
            if making.key_at(cache / step.name) == key:
                continue
            say(step.says)
            for path in (cache / step.name, *_made(cache, step)):
                digests.forget(path)
            making.make(cache / step.name, key, lambda target, step=step: step.work(cache, target))  # type: ignore[misc]
            _check(cache, step)
        except digests.Changed as error:
            raise AssetError(str(error)) from error
        except (OSError, subprocess.SubprocessError, AssetError) as error:
            if step.may_wait and making.key_at(cache / step.name):
                say(f"{step.name}: {_words(error)}; the one that is there goes on being used")
                _check(cache, step)
            else:
                raise AssetError(f"{step.name}: {_words(error)}") from error


def _made(cache: Path, step: Step) -> list[Path]:
    """What is there of a step's, and is trusted: of hypervisors' roots all, since images were made by older ones."""
    return roots.directories(cache) if step.name == roots.CURRENT else [path for path in (cache / step.name,) if making.key_at(path)]


def _made_of(path: Path) -> str:
    return making.key_at(path) + roots.fitted(path)


def _check(cache: Path, step: Step) -> None:
    """Raises digests.Changed, OSError."""
    for path in _made(cache, step):
        digests.check(path, _made_of(path))


def recorded(cache: Path) -> dict[str, str]:
    """Returns the SHA-256 of what is there, by names."""
    return {path.name: digests.recorded(path, _made_of(path)) for step in _steps() for path in _made(cache, step)}


def changed(cache: Path) -> dict[str, str]:
    """Reads all that is there; returns why each is not what was made, empty where it is."""
    found = {}
    for path in (path for step in _steps() for path in _made(cache, step)):
        try:
            digests.check(path, _made_of(path), is_thorough=True)
            found[path.name] = ""
        except (digests.Changed, OSError) as error:
            found[path.name] = str(error)
    return found


def _words(error: Exception) -> str:
    """Returns what a program that failed wrote last, else what became of it."""
    said = getattr(error, "stderr", None) or str(error)
    return (said.decode(errors="replace") if isinstance(said, bytes) else str(said)).strip()[-_QUOTED_CHARACTERS:]
