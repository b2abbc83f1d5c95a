"""Random generators in an image's memory: those of OpenSSL are made to seed themselves anew in each of its clones.

A clone's kernel draws from a generator of its own (vmm/guest/wake.c), but a process that was seeded before the snapshot would go on with
the numbers that every other clone's goes on with. OpenSSL's generator (1.1.1 and 3, crypto/rand/rand_local.h and
providers/implementations/rands/drbg_local.h) asks the kernel again when the time since it last did is over; that time stands in its
state, as do the intervals, which tell the state from anything else: see `_INTERVALS`. The time is set to 0, so it is over at the next
number, and the interval to a second: a clone runs for some milliseconds before its kernel is told, and who drew in them asks again.
It makes no difference whether a process links OpenSSL or has it built in, and an image brings its own base.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

from . import syscalls
from .syscalls import PAGE

# Of the process's first generator and of its threads': (numbers, seconds) until it is seeded again.
_INTERVALS = ((1 << 8, 3600), (1 << 16, 420))
_LONGEST_SECONDS = 3600  # one that was seeded earlier is due anyway
_AHEAD_SECONDS = 60
_COUNTERS = struct.Struct("<2I")  # numbers made since it was seeded, numbers until it is seeded again
_TIMES = struct.Struct("<2Q")  # when it was seeded, seconds until it is seeded again
_TIME = struct.Struct("<Q")
_DUE = _TIMES.pack(0, 1)
_CHUNK = 1 << 20


def make_due(memory: Path, now: float | None = None) -> int:
    """Has the generators of a guest that is stopped seed themselves anew: in the file of its memory. Returns how many there were. Raises
    OSError."""
    wall = int(time.time() if now is None else now)
    count = 0
    with memory.open("r+b", buffering=0) as file:
        for start, end in syscalls.data_segments(file.fileno()):
            for first in range(start, end, _CHUNK):
                for at in seeded(os.pread(file.fileno(), min(_CHUNK, end - first), first), wall):
                    os.pwrite(file.fileno(), _DUE[: PAGE - at % PAGE], first + at)
                    count += 1
    return count


def seeded(pages: bytes, now: int) -> list[int]:
    """Returns where in these pages stands the time at which a generator was seeded.

    What follows in a process's memory need not follow in the guest's: of a state that lies across the end of a page one half is enough.
    """
    earliest, latest = now - _LONGEST_SECONDS, now + _AHEAD_SECONDS
    found = set()
    for numbers, seconds in _INTERVALS:
        for high in {earliest >> 16, latest >> 16}:  # these bytes of the time are known, those of the interval follow
            known = _TIME.pack(high)[:6] + _TIME.pack(seconds)[:2]
            at = pages.find(known) - 2
            while at >= 0:
                if at % 8 == 0 and at + _TIMES.size <= len(pages):
                    when, interval = _TIMES.unpack_from(pages, at)
                    if interval == seconds and earliest <= when <= latest and (at % PAGE == 0 or _counts(pages, at, numbers)):
                        found.add(at)
                at = pages.find(known, at + 3) - 2
    last = PAGE - _TIME.size
    for number, when in enumerate(memoryview(pages).cast("Q")[last // 8 :: PAGE // 8].tolist()):
        at = number * PAGE + last
        if earliest <= when <= latest and any(_counts(pages, at, numbers) for numbers, _ in _INTERVALS):
            found.add(at)
    return sorted(found)


def _counts(pages: bytes, at: int, numbers: int) -> bool:
    made, until = _COUNTERS.unpack_from(pages, at - _COUNTERS.size)
    return bool(until == numbers and 0 < made <= numbers + 1)
