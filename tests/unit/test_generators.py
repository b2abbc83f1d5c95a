"""Which bytes of a guest's memory are taken for the state of a generator of OpenSSL's, and what becomes of them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm.generators import make_due, seeded
from vmm.syscalls import PAGE

NOW = 1_790_000_000
FIRST, OF_A_THREAD = (256, 3600), (65536, 420)


def state(when: int, kind: tuple[int, int] = FIRST, made: int = 7) -> bytes:
    """As in OpenSSL: numbers made, numbers until the next seed, when it was seeded, seconds until the next; then counters."""
    return struct.pack("<2I2Q3I", made, kind[0], when, kind[1], 2, 2, 1)


def pages(at: int, what: bytes, count: int = 3) -> bytes:
    memory = bytearray(os.urandom(count * PAGE))
    memory[at : at + len(what)] = what
    return bytes(memory)


@pytest.mark.parametrize("kind", [FIRST, OF_A_THREAD])
@pytest.mark.parametrize("age", [0, 1, 300, 3599, -59])
def test_a_seeded_generator_is_found_where_its_time_stands(kind: tuple[int, int], age: int) -> None:
    assert seeded(pages(0x148, state(NOW - age, kind)), NOW) == [0x150]


def test_several_are_found_in_a_page_and_at_the_turn_of_the_time_s_third_byte() -> None:
    turn = 0x6AB20000
    memory = pages(64, state(turn - 5) + bytes(12) + state(turn + 5, OF_A_THREAD))
    assert seeded(memory, turn + 10) == [72, 120]


@pytest.mark.parametrize("offset", [PAGE - 8, PAGE - 16])
@pytest.mark.parametrize("kind", [FIRST, OF_A_THREAD])
def test_one_that_lies_across_two_pages_which_are_not_neighbours_is_found_by_either_half(offset: int, kind: tuple[int, int]) -> None:
    whole = state(NOW - 9, kind)
    cut = PAGE - offset
    one, other = bytearray(os.urandom(PAGE)), bytearray(os.urandom(PAGE))
    one[offset:], other[: len(whole) - cut] = whole[:cut], whole[cut:]
    found = seeded(bytes(other) + os.urandom(PAGE) + bytes(one), NOW)
    assert found == [0 if cut == 8 else 3 * PAGE - 8]


@pytest.mark.parametrize(
    ("offset", "what"),
    [
        (0x148, state(NOW - 3601)),  # due anyway
        (0x148, state(NOW + 3600)),  # the same: a clock that went back
        (0x14C, state(NOW)),  # not where a structure's member can be
        (0x148, struct.pack("<2I2Q", 7, 300, NOW, 3600)),
        (0x148, struct.pack("<2I2Q", 7, 256, NOW, 420)),
        (0x148, struct.pack("<2I2Q", 900, 256, NOW, 3600)),
        (0x148, struct.pack("<2I2Q", 7, 256, NOW, 3600 + (1 << 40))),
        (PAGE - 16, struct.pack("<2IQ", 7, 300, NOW)),
    ],
)
def test_what_only_resembles_one_is_left_alone(offset: int, what: bytes) -> None:
    assert seeded(pages(offset, what), NOW) == []


def test_their_time_is_over_and_nothing_else_changes(tmp_path: Path) -> None:
    """A hole stays one; chunks of a megabyte are searched one after another."""
    file, size = tmp_path / "memory.raw", 64 << 20
    places = (4096 + 0x148, (5 << 20) - 16, (5 << 20) + 0x200, (63 << 20) + 0x30)
    with file.open("wb") as memory:
        os.ftruncate(memory.fileno(), size)
        for place in places:
            os.pwrite(memory.fileno(), state(NOW - 30), place)
    expected, blocks = bytearray(file.read_bytes()), file.stat().st_blocks
    assert make_due(file, NOW) == len(places)
    for place in places:
        due = struct.pack("<2Q", 0, 1)[: PAGE - (place + 8) % PAGE]
        expected[place + 8 : place + 8 + len(due)] = due
    assert file.read_bytes() == expected
    assert file.stat().st_blocks == blocks
    assert make_due(file, NOW) == 0


def _seeds(mem: int, place: int) -> int:
    """How often it was seeded, which stands behind the times."""
    return int.from_bytes(os.pread(mem, 4, place + 16), "little")


DRAWER = """
import ssl, sys
for line in sys.stdin:
    ssl.RAND_bytes(16)
    print("drawn", flush=True)
"""


def test_openssl_s_own_are_found_in_a_process_and_ask_for_a_new_seed_at_the_next_number() -> None:
    """The host's OpenSSL, so a layout that changes is seen here. What is written in its memory is what is written in a guest's."""

    def draw() -> None:
        assert drawer.stdin is not None and drawer.stdout is not None
        drawer.stdin.write(b"\n")
        drawer.stdin.flush()
        assert drawer.stdout.readline() == b"drawn\n"

    with subprocess.Popen([sys.executable, "-c", DRAWER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as drawer:
        draw()
        maps = [line.split() for line in Path(f"/proc/{drawer.pid}/maps").read_text(encoding="utf-8").splitlines()]
        with Path(f"/proc/{drawer.pid}/mem").open("r+b", buffering=0) as mem:
            found = []
            for fields in maps:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                if fields[1].startswith("rw") and fields[4] == "0" and "[v" not in fields[-1]:
                    found += [start + at for at in seeded(os.pread(mem.fileno(), end - start, start), int(time.time()))]
            assert len(found) == 2, "the process's first, and its thread's for public numbers"
            seeds = {place: _seeds(mem.fileno(), place) for place in found}
            for place in found:
                os.pwrite(mem.fileno(), struct.pack("<2Q", 0, 1), place)
            draw()
            assert all(_seeds(mem.fileno(), place) > seeds[place] for place in found)
        assert drawer.stdin is not None
        drawer.stdin.close()
