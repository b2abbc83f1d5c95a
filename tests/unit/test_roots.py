"""Roots of hypervisors side by side: which one loads what, which may go, and how another QEMU of the host makes another."""

from __future__ import annotations

import os
import time
from pathlib import Path

import host_state
import msgspec
import pytest
from service import Instance

from vmm import jail, making
from vmm.provenance import Provenance, lacking
from vmm.qemu import roots
from vmm.qemu.roots import Root, Roots

OLD, NEW = Root("qemu-root-a", "7.2.21", "pc-q35-7.2"), Root("qemu-root-b", "7.2.22", "pc-q35-7.2")
FIXED = Root("qemu-root-c", "7.2.21", "pc-q35-7.2")  # the same version with another library


@pytest.mark.parametrize(
    ("version", "root", "there", "first", "expected"),
    [
        ("7.2.22", "qemu-root-b", [NEW], "", NEW),
        ("7.2.22", "qemu-root-gone", [NEW], "", NEW),  # the same version with newer libraries: what is mended there reaches every launch
        ("7.2.21", "qemu-root-a", [OLD, NEW], "", OLD),
        ("7.2.21", "qemu-root-a", [FIXED, OLD, NEW], "", OLD),
        ("7.2.21", "qemu-root-gone", [FIXED, NEW], "", FIXED),
        ("7.2.21", "qemu-root-a", [NEW], "", None),
        ("8.0.0", "qemu-root-z", [OLD, NEW], "", None),
        ("", "", [OLD, NEW], "qemu-root-a", OLD),  # by commit 165a0cb
        ("", "", [OLD, NEW], "", NEW),
    ],
)
def test_a_state_is_loaded_by_the_version_that_wrote_it(
    version: str, root: str, there: list[Root], first: str, expected: Root | None
) -> None:  # fmt: skip
    assert roots.choose(Provenance(version=version, root=root), NEW, there, first) == expected


def test_the_refusal_names_what_could_load_it_and_what_there_is() -> None:
    made = Provenance(version="7.2.21 (Debian 1:7.2)", machine="pc-q35-7.2", root="qemu-root-a")
    said = roots.why_refused("image one", made, [NEW])
    assert said.startswith("image one was made by QEMU 7.2.21 (Debian 1:7.2) (pc-q35-7.2), which alone can load it")
    assert "there is 7.2.22" in said and "qemu-root-a" in said and "torpor images --rebuild-old" in said


def test_features_that_a_guest_saw_must_be_there_and_others_do_no_harm() -> None:
    assert not lacking(["1.0.ecx=6"], ["1.0.ecx=7", "7.0.ebx=1"])
    assert lacking(["1.0.ecx=6", "7.0.ebx=1"], ["1.0.ecx=5"]) == ["1.0.ecx=6", "7.0.ebx=1"]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU of two files: its first line is its version."""
    place = tmp_path / "host/bin"
    place.mkdir(parents=True)
    (place / "qemu").write_text("7.2.21\nprogram")
    (place / "library").write_text("library")
    monkeypatch.setattr(jail, "files", lambda: {str(place / "qemu"), str(place / "library")})

    def make_root(work: Path) -> None:
        (work / "usr/lib").mkdir(parents=True)
        (work / "usr/qemu").write_bytes((place / "qemu").read_bytes())

    def make_mapper(root: Path) -> None:
        (root / "usr/lib/torpor-mapper.so").write_text(jail.MAPPER.read_text())

    def describe(root: Path) -> None:
        version = (root / "usr/qemu").read_text().splitlines()[0]
        (root / roots._INFO).write_bytes(msgspec.json.encode({"version": version, "machine": "pc-q35-7.2"}))

    monkeypatch.setattr(jail, "make_root", make_root)
    monkeypatch.setattr(jail, "make_mapper", make_mapper)
    monkeypatch.setattr(roots, "_describe", describe)
    monkeypatch.setattr(roots, "contents", lambda files: {Path(file).name: Path(file) for file in files})
    return place


def started(cache: Path) -> Root:
    """As a start of the service: what is missing is made."""
    cache.mkdir(exist_ok=True)
    with making.alone(cache):
        if making.key_at(cache / roots.CURRENT) != (key := roots.key(cache)):
            making.make(cache / roots.CURRENT, key, lambda link: roots.make(cache, link))
    return Roots(cache).current()


def test_another_qemu_of_the_host_makes_another_root_at_the_next_start_and_the_old_one_stays(host: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = started(cache)
    assert first == started(cache) and first.version == "7.2.21"
    (host / "qemu").write_text("7.2.22\nprogram")
    second = started(cache)
    assert second.version == "7.2.22" and second.name != first.name
    (host / "library").write_text("mended")
    third = started(cache)
    assert (third.version, third.name) != (second.version, second.name) and len(Roots(cache).all()) == 3
    made = Provenance(version=first.version, machine=first.machine, root=first.name)
    assert Roots(cache).of(made, third) == first
    os.rename(first.path, tmp_path / "away")
    assert Roots(cache).of(made, third) is None
    os.rename(tmp_path / "away", first.path)
    assert Roots(cache).of(made, third) == first


def test_a_file_that_was_only_touched_makes_no_other_root(host: Path, tmp_path: Path) -> None:
    first = started(tmp_path / "cache")
    os.utime(host / "qemu", (1, 1))
    assert started(tmp_path / "cache") == first


def test_older_roots_get_the_mapper_of_this_tree(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, mapper = tmp_path / "cache", tmp_path / "mapper.c"
    first = started(cache)
    (host / "qemu").write_text("7.2.22\nprogram")
    mapper.write_text("another")
    monkeypatch.setattr(jail, "MAPPER", mapper)
    second = started(cache)
    assert {(root.path / "usr/lib/torpor-mapper.so").read_text() for root in (first, second)} == {"another"}


def test_the_only_root_of_commit_165a0cb_gets_a_name_and_stays(host: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "qemu-root/usr/lib").mkdir(parents=True)
    (cache / "qemu-root/usr/qemu").write_text("7.2.20\nprogram")
    (cache / "qemu-root.key").write_text("of that commit")
    current = started(cache)
    assert current.version == "7.2.21" and sorted(root.version for root in Roots(cache).all()) == ["7.2.20", "7.2.21"]
    chosen = Roots(cache).of(Provenance(), current)
    assert chosen is not None and (chosen.version, chosen.name) == ("7.2.20", Roots(cache).first())
    roots.collect(cache, tmp_path, set(), print)
    assert Roots(cache).of(Provenance(), current) == chosen


# ---- which may go ----


def needed(cache: Path, instance: Path, *names: str) -> list[str]:
    """What a start of an instance that needs these removes."""
    said: list[str] = []
    roots.collect(cache, instance, set(names), said.append)
    return said


def test_a_root_goes_when_no_instance_of_the_cache_needs_it(host: Path, tmp_path: Path) -> None:
    cache, one, other = tmp_path / "cache", tmp_path / "one", tmp_path / "other"
    for instance in (one, other):
        instance.mkdir()
    first = started(cache)
    (host / "qemu").write_text("7.2.22\nprogram")
    started(cache)
    assert not needed(cache, one, first.name) and not needed(cache, other, first.name)
    assert not needed(cache, one) and first.path.exists(), "the other one needs it"
    assert "no image of an instance" in needed(cache, other)[0] and not first.path.exists()
    assert [root.version for root in Roots(cache).all()] == ["7.2.22"], "the host's own is never removed"


def test_an_instance_whose_disk_is_not_there_keeps_what_it_needs(host: Path, tmp_path: Path) -> None:
    """Until nobody has seen it for thirty days."""
    cache, away = tmp_path / "cache", tmp_path / "on a disk that is not mounted"
    first = started(cache)
    (host / "qemu").write_text("7.2.22\nprogram")
    started(cache)
    needed(cache, away, first.name)
    assert not needed(cache, tmp_path) and first.path.exists()
    (record,) = [path for path in (cache / "needed-roots").iterdir() if b"not mounted" in path.read_bytes()]
    os.utime(record, (time.time() - 31 * 86400,) * 2)
    assert needed(cache, tmp_path) and not first.path.exists()


def test_nothing_goes_where_a_need_cannot_be_read_or_roots_are_being_made(host: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = started(cache)
    (host / "qemu").write_text("7.2.22\nprogram")
    started(cache)
    with making.alone(cache):
        assert not needed(cache, tmp_path)
    for damage in (b"half a reco", b'{"instance":"\xff","roots":[]}'):
        (cache / "needed-roots/abc").write_bytes(damage)
        assert "cannot be read" in needed(cache, tmp_path)[0] and first.path.exists()


def test_a_tests_instance_that_is_removed_needs_no_root_and_one_that_is_left_is_seen(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORPOR_CACHE", str(cache))
    started(cache)
    before = set(host_state.KINDS["files"]())
    one = Instance("removed", 1_000_000)
    roots.collect(cache, one.root, {"qemu-root-old"}, print)
    (record,) = (cache / "needed-roots").iterdir()
    assert str(record) in set(host_state.KINDS["files"]()) - before
    one.remove()
    assert set(host_state.KINDS["files"]()) <= before and not record.exists()
