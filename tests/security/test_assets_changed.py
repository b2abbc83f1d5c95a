"""What is made once per host (kernel, initramfs, agent, base image, hypervisors' roots) is used only as it was made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm import assets, digests, kernel, making
from vmm.qemu import roots

ROOT = "qemu-root-0123456789abcdef"
LATER = "qemu-root-fedcba9876543210"
FILES = {
    "kernel": "kernel/vmlinuz", "initrd": "initrd", "guest": "guest/init", "base.tar": "base.tar", "modules": "modules/lib/net.ko",
    "builder": "builder/usr/bin/buildkitd", ROOT: f"{ROOT}/usr/bin/qemu-system-x86_64", LATER: f"{LATER}/usr/bin/qemu-system-x86_64",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As after a run that made everything: of two hypervisors, one is an older image's alone."""
    monkeypatch.setattr(kernel, "available", lambda cache: "6.1.1")  # apt takes a second
    for file in FILES.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("as it was made")
    (tmp_path / roots.CURRENT).symlink_to(LATER)
    for step in assets._steps():
        making.key_path(tmp_path / step.name).write_text(step.key(tmp_path))
    for name in (ROOT, LATER):
        making.key_path(tmp_path / name).write_text("key")
    assets.make(tmp_path, print)
    return tmp_path


def overwrite(path: Path) -> None:
    """By another content of the same length, whose date is set back."""
    its = path.stat()
    path.write_text("AS IT WAS MADE")
    os.utime(path, ns=(its.st_atime_ns, its.st_mtime_ns))


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_text("AS IT WAS MADE")
    new.rename(path)


def make_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/bin/sh")


@contextlib.contextmanager
def no_making() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "make", None)
        yield


@pytest.mark.parametrize(
    ("name", "attack"), [*((name, overwrite) for name in FILES), ("kernel", replace), ("initrd", make_a_link), (ROOT, replace)]
)
def test_nothing_starts_with_another_one(cache: Path, name: str, attack: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    attack(cache / FILES[name])
    with no_making(), pytest.raises(assets.AssetError, match=f"^{cache}/{name} is not what was made: its SHA-256 is .*[^\n]*$"):
        assets.make(cache, print)
    assert [one for one, why in assets.changed(cache).items() if why] == [name]

    monkeypatch.setattr(digests, "check", lambda path, made_of, is_thorough=False: None)
    with no_making():
        assets.make(cache, print)  # it would have been used


def test_a_file_more_in_a_hypervisors_root_is_seen(cache: Path) -> None:
    (cache / ROOT / "usr/bin/more").touch()
    with no_making(), pytest.raises(assets.AssetError, match="is not what was made"):
        assets.make(cache, print)


def test_what_is_as_it_was_made_is_read_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a cache is read again, and is well."""
    read: list[Path] = []
    content = digests._content
    monkeypatch.setattr(digests, "_content", lambda path: (read.append(path), content(path))[1])
    assets.make(cache, print)
    assert not read
    replace(cache / "initrd")
    (cache / "initrd").write_text("as it was made")
    assets.make(cache, print)
    assert read == [cache / "initrd"]
    assets.make(cache, print)
    assert read == [cache / "initrd"] and not any(assets.changed(cache).values()) and len(read) == 1 + len(FILES)


def test_what_another_version_has_made_again_is_no_attack(cache: Path) -> None:
    """Two versions of the code may share a cache, and one of before digests leaves those of others behind."""
    overwrite(cache / FILES[ROOT])
    making.key_path(cache / ROOT).write_text("another key")
    assets.make(cache, print)
    assert assets.recorded(cache)[ROOT] != assets.recorded(cache)[LATER]


def test_what_is_removed_to_be_made_again_gets_another_digest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overwrite(cache / "initrd")
    making.key_path(cache / "initrd").unlink()

    def make(target: Path, key: str, work: object) -> None:
        target.write_text("made again")
        making.key_path(target).write_text(key)

    monkeypatch.setattr(making, "make", make)
    before = assets.recorded(cache)
    assets.make(cache, print)
    after = assets.recorded(cache)
    assert after["initrd"] and {name for name in after if after[name] != before.get(name)} == {"initrd"}
