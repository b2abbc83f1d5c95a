"""The thread inside a hypervisor (vmm/qemu/mapper.c), in a process that only has its name."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm import calls, jail, mapping, memory, sparse, syscalls
from vmm.mapping import Mapper
from vmm.memory import sealed
from vmm.syscalls import PAGE

MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the filter of system calls, which the thread has around it in a hypervisor, too."""
    made = tmp_path_factory.mktemp("mapper") / "mapper.so"
    made.with_name("calls.inc").write_text(calls.header(), encoding="ascii")
    sources = [f"-I{made.parent}", str(jail.MAPPER), str(jail.FILTER[0])]
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-pthread", "-o", str(made), *sources], check=True)
    return made


@contextlib.contextmanager
def waiting(library: Path, descriptors: list[int]) -> Iterator[tuple[Mapper, int]]:
    """A mapper, and the pid of a process that has `descriptors` open and does nothing."""
    program = Path(shutil.copy("/bin/sleep", library.with_name("qemu-system-sleep")))
    ours, theirs = socket.socketpair()
    environment = {"LD_PRELOAD": str(library), "TORPOR_MAPPER": str(theirs.fileno())}
    process = subprocess.Popen([str(program), "60"], pass_fds=[*descriptors, theirs.fileno()], env=environment)
    theirs.close()
    mapper = Mapper(ours)
    try:
        yield mapper, process.pid
    finally:
        mapper.close()
        process.kill()
        process.wait()


def open_in(pid: int, number: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{number}").removesuffix(" (deleted)")


def test_a_file_takes_the_place_of_another_wherever_that_is_open(library: Path, tmp_path: Path) -> None:
    stand_in, other = sealed("stand-in", b"nothing"), sealed("other", b"nothing")
    again = os.dup(stand_in)
    (tmp_path / "disk").write_bytes(b"the session's")
    with waiting(library, [stand_in, again, other]) as (mapper, pid), (tmp_path / "disk").open("r+b") as disk:
        mapper.replace_fd(disk.fileno(), stand_in)
        mapper.finish()
        assert open_in(pid, stand_in) == open_in(pid, again) == str(tmp_path / "disk")
        assert open_in(pid, other) == "/memfd:other"
        left = {open_in(pid, int(entry)) for entry in os.listdir(f"/proc/{pid}/fd")}
        assert "/memfd:stand-in" not in left, "what was replaced is still open"
    for descriptor in (stand_in, again, other):
        os.close(descriptor)


def test_what_fails_is_said_at_the_end_and_the_rest_is_done(library: Path, tmp_path: Path) -> None:
    stand_in, nobody_has = sealed("stand-in", b"nothing"), sealed("nobody-has", b"nothing")
    (tmp_path / "disk").write_bytes(b"the session's")
    with waiting(library, [stand_in]) as (mapper, pid), (tmp_path / "disk").open("r+b") as disk:
        mapper.replace_fd(disk.fileno(), nobody_has)
        mapper.replace_fd(disk.fileno(), stand_in)
        with pytest.raises(OSError, match="inside the hypervisor") as caught:
            mapper.finish()
        assert caught.value.errno == errno.EBADF
        assert open_in(pid, stand_in) == str(tmp_path / "disk")
        mapper.map(disk.fileno(), [(4097, mmap.PAGESIZE, 0)])  # no address of a page
        with pytest.raises(OSError) as caught:
            mapper.finish()
        assert caught.value.errno == errno.EINVAL
        mapper.finish()  # nothing was asked
    for descriptor in (stand_in, nobody_has):
        os.close(descriptor)


def test_files_are_mapped_where_they_are_wanted(library: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.write_bytes(b"a" * mmap.PAGESIZE + b"b" * mmap.PAGESIZE)
    with waiting(library, []) as (mapper, pid), pages.open("rb") as file:
        free = 0x10_0000_0000
        mapper.map(file.fileno(), [(free, mmap.PAGESIZE, mmap.PAGESIZE), (free + mmap.PAGESIZE, mmap.PAGESIZE, 0)])
        mapper.finish()
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            assert os.pread(memory.fileno(), 2 * mmap.PAGESIZE, free) == b"b" * mmap.PAGESIZE + b"a" * mmap.PAGESIZE


@pytest.mark.parametrize("scan", [True, False], ids=["PAGEMAP_SCAN", "pagemap"])
def test_what_an_image_has_no_data_for_is_the_clones_own(
    library: Path, tmp_path: Path, scan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone that writes zeros of its image leaves the image's memory as large as it was; what it has only read is no change."""
    if not scan:
        monkeypatch.setattr(syscalls, "_PAGEMAP_SCAN", 0)
    image, size, at = memory.new_memory("unit", 64 * MIB), 64 * MIB, 0x10_0000_0000
    os.pwrite(image, b"a" * MIB, 8 * MIB)
    os.pwrite(image, b"b" * MIB, 32 * MIB)
    before = os.fstat(image).st_blocks
    with waiting(library, []) as (mapper, pid), open(f"/proc/{pid}/mem", "r+b", buffering=0) as guest:
        mapper.map(image, [(at, size, 0)])
        mapping.clear(memory.Mapping(pid, at, at + size), mapper, sparse.holes(image))
        for place in range(0, 16 * MIB, PAGE):  # over the first data
            assert os.pread(guest.fileno(), 1, at + place) == (b"a" if 8 * MIB <= place < 9 * MIB else b"\0")
        assert syscalls.private_pages(pid, at, at + size) == []
        for page in (0, 5, 8 * MIB // PAGE, 20 * MIB // PAGE, size // PAGE - 1):
            os.pwrite(guest.fileno(), b"x", at + page * PAGE)
        assert os.fstat(image).st_blocks == before
        changed = syscalls.private_pages(pid, at, at + size)
        assert changed == [(page, page + 1) for page in (0, 5, 8 * MIB // PAGE, 20 * MIB // PAGE, size // PAGE - 1)]
        written = memory.save_diff(memory.Mapping(pid, at, at + size), tmp_path, 1, image)
        assert written[1].size == 5 * PAGE
    os.close(image)


def test_an_end_of_the_process_is_an_error(library: Path, tmp_path: Path) -> None:
    stand_in = sealed("stand-in", b"nothing")
    with waiting(library, [stand_in]) as (mapper, pid):
        mapper.replace_fd(stand_in, stand_in)
        os.kill(pid, 9)
        with pytest.raises(OSError):
            mapper.finish()
            mapper.replace_fd(stand_in, stand_in)
            mapper.finish()
    os.close(stand_in)
