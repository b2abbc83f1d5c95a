"""Which bytes of a guest's memory are taken for the state of a generator of OpenSSL's, and what becomes of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from vmm.generators import make_due, seeded
from vmm.host import PAGE

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


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("memory")
    yield descriptor
    os.close(descriptor)


def test_their_time_is_over_and_nothing_else_changes(memory: int) -> None:
    """A hole stays one; chunks of a megabyte are searched one after another."""
    os.ftruncate(memory, 64 << 20)
    places = (4096 + 0x148, (5 << 20) - 16, (5 << 20) + 0x200, (63 << 20) + 0x30)
    for place in places:
        os.pwrite(memory, state(NOW - 30), place)
    before, blocks = os.pread(memory, 64 << 20, 0), os.fstat(memory).st_blocks
    assert make_due(memory, NOW) == len(places)
    expected = bytearray(before)
    for place in places:
        expected[place + 8 : place + 16] = bytes(8)
    assert os.pread(memory, 64 << 20, 0) == expected
    assert os.fstat(memory).st_blocks == blocks
    assert make_due(memory, NOW) == 0
