"""What of a guest's memory is stored: the pages that are its own and not as its image has them."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from vmm import diffs, memory, sparse, syscalls
from vmm.syscalls import PAGE


class Guest:
    """A private mapping of an image's memory, in this process."""

    PAGES = 64

    def __init__(self) -> None:
        self.image = memory.new_memory("unit", self.PAGES * PAGE)
        for page in range(0, self.PAGES, 2):  # every other one is a hole
            os.pwrite(self.image, bytes([page + 1]) * PAGE, page * PAGE)
        self.mapped = mmap.mmap(self.image, self.PAGES * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mapped))
        self.mapping = memory.Mapping(os.getpid(), start, start + self.PAGES * PAGE)

    def write(self, page: int, data: bytes) -> None:
        self.mapped[page * PAGE : page * PAGE + len(data)] = data


def test_pages_that_are_as_the_image_has_them_are_not_stored(tmp_path: Path) -> None:
    guest = Guest()
    guest.write(4, bytes([5]) * PAGE)  # as it was
    guest.write(7, bytes(PAGE))  # a hole of the image, zeroed
    for page in (10, 11, 12, 40):
        guest.write(page, b"changed")
    guest.write(12, bytes([13]) * PAGE)  # between changed ones and back to what it was
    memory.save_diff(guest.mapping, tmp_path, 1, guest.image)
    assert diffs.runs_of(tmp_path / "1.runs") == [(10, 12), (40, 41)]
    pages = (tmp_path / "1.pages").read_bytes()
    assert pages == bytes(guest.mapped[10 * PAGE : 12 * PAGE]) + bytes(guest.mapped[40 * PAGE : 41 * PAGE])
    memory.save_diff(guest.mapping, tmp_path, 2)  # over older diffs the image says nothing
    assert diffs.page_count(diffs.runs_of(tmp_path / "2.runs")) == 6


def test_a_large_change_is_not_compared_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    reads = open_for_reading(guest)
    runs = [(page, page + 1) for page in range(0, guest.PAGES, 2)]
    for page, _ in runs:
        guest.write(page, b"changed" if page < 60 else bytes([page + 1]) * PAGE)
    try:
        assert memory.differing(runs, reads, guest.mapping.start, guest.image) == runs[:30]
        monkeypatch.setattr(memory, "_LOOKED_AT_PAGES", 8)
        assert memory.differing(runs, reads, guest.mapping.start, guest.image) == runs
    finally:
        os.close(reads)


def test_a_run_of_all_of_a_guest_is_looked_at_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that has used all its memory would otherwise cost vmm twice as much."""
    guest, reads = Guest(), []
    for page in range(guest.PAGES):
        guest.write(page, bytes([page + 1]) * PAGE if page in (0, 6, 8) else b"changed")
    process = open_for_reading(guest)
    pread = os.pread

    def counted(file: int, size: int, at: int) -> bytes:
        reads.append(size)
        return pread(file, size, at)

    monkeypatch.setattr(memory, "_CHUNK", 4 * PAGE)
    monkeypatch.setattr(os, "pread", counted)
    whole = [(0, guest.PAGES)]
    try:
        assert memory.differing(whole, process, guest.mapping.start, guest.image) == [(1, 6), (7, 8), (9, guest.PAGES)]
        assert max(reads) == 4 * PAGE and len(reads) == 2 * guest.PAGES // 4
        monkeypatch.setattr(memory, "_LOOKED_AT_PAGES", 8)
        monkeypatch.setattr(memory, "_WORTH", 2)
        assert memory.differing(whole, process, guest.mapping.start, guest.image) == [(1, 6), (7, 8), (9, guest.PAGES)]
        assert len(reads) == 2 * guest.PAGES // 4 + 2 * 3
    finally:
        os.close(process)


def test_small_holes_of_an_image_are_filled_and_large_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hole costs two mappings, which the kernel counts."""
    stored, size = tmp_path / "memory.raw", 1024 * PAGE
    with stored.open("wb") as file:
        file.truncate(size)
        for page in (10, 12, 20, 100, 900):
            file.seek(page * PAGE)
            file.write(bytes([page % 256]) * PAGE)
    image = memory.new_memory("unit", size)
    sparse.fill(stored, image)
    wanted = [(10 * PAGE, 21 * PAGE), (100 * PAGE, 101 * PAGE), (900 * PAGE, 901 * PAGE)]
    assert list(syscalls.data_segments(image)) == sparse.pieces(image) == sparse.pieces(image) == wanted
    assert sparse.holes(image) == [(0, 10 * PAGE), (21 * PAGE, 100 * PAGE), (101 * PAGE, 900 * PAGE), (901 * PAGE, size)]
    assert os.pread(image, size, 0) == stored.read_bytes()
    monkeypatch.setattr(sparse, "_PIECES_MOST", 2)
    assert sparse.pieces(image) == [(10 * PAGE, 101 * PAGE), (900 * PAGE, 901 * PAGE)]
    os.close(image)


def test_memory_full_of_data_has_no_holes() -> None:
    image = memory.new_memory("unit", 4 * PAGE)
    assert sparse.holes(image) == [(0, 4 * PAGE)]
    os.pwrite(image, b"x" * 4 * PAGE, 0)
    assert sparse.holes(image) == []
    os.close(image)


def open_for_reading(guest: Guest) -> int:
    return os.open(f"/proc/{guest.mapping.pid}/mem", os.O_RDONLY)


def test_only_the_very_memory_that_was_given_is_taken_back_from_a_process() -> None:
    """A hypervisor that was taken over can make a file of the same name, and seal it."""
    given, planted = memory.new_memory("one", PAGE), memory.sealed(memory.memfd_name("one"), b"planted" * 600)
    which = memory.identity(given)
    assert memory.adopt_image_memory(os.getpid(), which, True) is None, "it is not sealed: anybody may have written to it"
    fcntl.fcntl(given, memory._F_ADD_SEALS, memory._SEALS)
    taken = memory.adopt_image_memory(os.getpid(), which, True)
    assert taken is not None and memory.identity(taken) == which != memory.identity(planted)
    for descriptor in (given, taken):
        os.close(descriptor)
    assert memory.adopt_image_memory(os.getpid(), which, True) is None
    os.close(planted)


def test_what_boots_is_taken_back_before_it_is_sealed() -> None:
    booting = memory.new_memory("one", PAGE)
    taken = memory.adopt_image_memory(os.getpid(), memory.identity(booting), False)
    assert taken is not None
    os.close(taken)
    os.close(booting)
