"""Chains of memory diffs: what shows, what a fold makes of it, and what damage is noticed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import diffs
from vmm.errors import Damaged, Missing
from vmm.syscalls import PAGE

PAGES = 64
WRITES = st.lists(st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=20), min_size=1, max_size=6)


def runs_from(pages: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs


def content(diff: int, page: int) -> bytes:
    return bytes([diff, page]) * (PAGE // 2)


def make(directory: Path, writes: list[set[int]]) -> diffs.Manifest:
    """A snapshot whose diffs wrote those pages, one after another."""
    for diff, pages in enumerate(writes, 1):
        runs = runs_from(pages)
        diffs.write_runs(directory / f"{diff}.runs", runs)
        (directory / f"{diff}.pages").write_bytes(b"".join(content(diff, page) for first, after in runs for page in range(first, after)))
    (directory / "devices.state").write_bytes(b"devices")
    chain = list(range(1, len(writes) + 1))
    files = [diffs.checksum(directory / name) for name in ("devices.state", *diffs.names(chain))]
    manifest = diffs.Manifest(chain, files, 0, session=directory.parent.name)
    diffs.write_manifest(directory, manifest)
    return manifest


def memory(directory: Path, chain: list[int]) -> dict[int, bytes]:
    """What the guest sees in each page that anything wrote."""
    seen: dict[int, bytes] = {}
    for one in diffs.merge([(number, diffs.runs_of(directory / f"{number}.runs")) for number in chain]):
        data = (directory / f"{one.diff}.pages").read_bytes()
        for page in range(one.first, one.after):
            at = (one.at + page - one.first) * PAGE
            assert page not in seen, "segments do not overlap"
            seen[page] = data[at : at + PAGE]
    return seen


@given(WRITES)
def test_the_last_write_shows_and_folding_keeps_it(writes: list[set[int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, folded = Path(name) / "a", Path(name) / "b"
        directory.mkdir()
        folded.mkdir()
        manifest = make(directory, writes)
        expected = {page: content(diff, page) for diff, pages in enumerate(writes, 1) for page in pages}
        assert memory(directory, manifest.chain) == expected
        made = diffs.fold(directory, manifest, folded)
        assert made.chain == [len(writes)] and memory(folded, made.chain) == expected
        assert diffs.page_count(diffs.runs_of(folded / f"{len(writes)}.runs")) == len(expected)
        for one in diffs.read_manifest(folded).files:
            diffs.verify(folded / one.name, one)


@given(st.sets(st.integers(0, 400), min_size=1))
def test_filling_gaps_keeps_every_page_and_adds_a_tenth_at_most(pages: set[int]) -> None:
    runs = runs_from(pages)
    made = diffs.filled(runs)
    covered = {page for first, after in made for page in range(first, after)}
    assert pages <= covered and len(covered) <= len(pages) * 1.1 and len(made) <= len(runs)
    assert runs_from(covered) == made


@pytest.mark.parametrize("name", ["1.pages", "1.runs", "devices.state"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    manifest = make(tmp_path, [{1, 2, 9}])
    path = tmp_path / name
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    expected = next(one for one in manifest.files if one.name == name)
    with pytest.raises(Missing if damage == "gone" else Damaged, match=name):
        diffs.verify(path, expected)


@pytest.mark.parametrize("numbers", [[1], [5, 5], [5, 4], [1, 5, 4, 8], [1, 2, 0, 1]])
def test_what_is_no_list_of_runs(tmp_path: Path, numbers: list[int]) -> None:
    import array

    (tmp_path / "1.runs").write_bytes(array.array("Q", numbers).tobytes())
    with pytest.raises(Damaged, match="no list of runs"):
        diffs.runs_of(tmp_path / "1.runs")


def test_a_manifest_that_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(Missing):
        diffs.read_manifest(tmp_path)
    (tmp_path / diffs.MANIFEST).write_text("{")
    with pytest.raises(Damaged):
        diffs.read_manifest(tmp_path)
